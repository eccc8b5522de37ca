"""How close a set of images is to another.

    from diffusers_sde.metrics import SampleQuality, train_feature_classifier
    quality = SampleQuality(images, train_feature_classifier(images, labels))
    quality(samples)  # {"FD-classifier": ..., "KID-classifier": ..., "precision": ..., ...}

Needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .classifier import ClassifierFeatures, load_classifier, train_feature_classifier
from .distances import frechet_distance, inception_score, kernel_distance, nearest_neighbours, precision_recall
from .extractors import FEATURES, make_extractor
from .features import InceptionFeatures, PixelFeatures
from .quality import SampleQuality

__all__ = [
    "FEATURES",
    "ClassifierFeatures",
    "InceptionFeatures",
    "PixelFeatures",
    "SampleQuality",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "make_extractor",
    "nearest_neighbours",
    "precision_recall",
    "train_feature_classifier",
]
