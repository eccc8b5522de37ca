"""What the samples of a fitted plan are to be like, and how far they are from it.

Two objectives, each with noise and references of its own for fitting, for choosing and for reporting:

* *Energy*: 2 E|S - Y|^b - E|S - S'|^b - E|Y - Y'|^b between samples S and references Y (Szekely & Rizzo 2013), the
  unbiased U-statistic. For 0 < b < 2 it is 0 where, and only where, both have the same law; it pairs nothing, so it
  suits any sampler. b = 1/2 here, which sees small differences better than the usual 1. It is the mean of three: that
  of whole samples, the mean of those of patches, and that of features. Whole samples are in units of the
  references' spread. The distances of whole images hardly tell a sharp one from a noisy one; those of patches do, and
  so does the eye, if the patches are whitened: in images, nearly all variance is that of slow changes of brightness,
  beside which edges and noise would not count. What an image shows is seen by neither as well as by features, which the
  network itself has learnt (features.py). They are whitened too.
* *Paired*: E|S - T| where S and T start from the same noise, and T is a fine solution of the same flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, one_hot

from ..basics.precision import finest

# References cost no call of the network, but their noise moves all samples of a step alike, so it must be the smaller.
REFERENCES_PER_SAMPLE = 4
REFERENCES_OF_UNITS = 4096  # in random order, at most: more would tell no more of variances
PATCH_SIDES = (3, 5)
PATCHES_ASIDE = 4  # along each axis, where the image is wide enough
# What is whitened gets this part of its mean variance added in every direction; where images hardly differ, as in a
# corner that is always black, this part of the images' usual variance counts as that mean.
ADDED_VARIANCE = 0.05
LEAST_VARIANCE = 0.01
SHORTEST = 1e-4  # is added to distances, whose roots have finite derivatives then
WHOLE, PATCHES, FEATURES = "whole_images", "patches", "features"  # parts of a distance, which count alike
SETS = ("fit", "choice", "report")  # disjoint: what a set has seen judges no other


def stream(seed: int, *purpose: int) -> torch.Generator:
    """A generator for one purpose, independent of those for others under the same seed."""
    state = np.random.SeedSequence((seed, *purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class Batch(NamedTuple):
    """What a sampler starts from, and what its samples are compared with.

    Attributes:
        noise: Unit noise, shape (B, ...).
        reference: Data, shape (N, ...), or one end point for each sample.
        conditioning: Further arguments of the denoiser, with one row for each sample.
        reference_classes: Classes of the references, shape (N,), where the samples have classes too.
        reference_features: Features of the references, shape (N, C), if they are known already.
    """

    noise: Tensor
    reference: Tensor
    conditioning: Mapping[str, Tensor] = {}
    reference_classes: Tensor | None = None
    reference_features: Tensor | None = None


class Units(NamedTuple):
    """What distances of a view are measured in.

    Attributes:
        origin: Shape (n,).
        scale: A factor, shape (), or a matrix, shape (n, n).
    """

    origin: Tensor
    scale: Tensor

    def of(self, view: Tensor) -> Tensor:
        """Points in these units, shape (B, n)."""
        origin, scale = self.origin.to(view), self.scale.to(view)
        return (view - origin) @ scale if scale.ndim else (view - origin) * scale


class Gain(NamedTuple):
    """By how much a fitted sampler is nearer, and the standard error of that."""

    value: float
    error: float


class Comparison(NamedTuple):
    """Two samplers on the same noise.

    Attributes:
        fitted: Distance of the fitted one.
        unfitted: Distance of the unfitted one.
        error: Standard error of their difference.
        parts: What each part of the distance gains, by its name; empty where the distance has no parts.
    """

    fitted: float
    unfitted: float
    error: float
    parts: Mapping[str, Gain] = {}

    @property
    def gain(self) -> float:
        """By how much the fitted one is nearer."""
        return self.unfitted - self.fitted

    def is_nearer(self, errors: float) -> bool:
        """Whether it is by so many standard errors, in all or in a part, and neither images nor features are further.

        Each part is looked at, since one that gains nothing adds its error to the sum. Patches may be nearer where what
        the images show is further off; by more than one standard error neither whole images nor features must be, which
        five of six samplers pass that change nothing about one of them.
        """
        shown = [self.parts[name] for name in (WHOLE, FEATURES) if name in self.parts]
        further = self.gain < 0.0 or any(part.value < -part.error for part in shown)
        gains = [Gain(self.gain, self.error), *self.parts.values()]
        return not further and any(gain.value > errors * gain.error for gain in gains)


class Target(Protocol):
    """An objective with its data."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def batch(self, part: str, size: int, generator: torch.Generator) -> Batch:
        """Some noise and references of one of the ``SETS``; for ``fit`` drawn anew each time."""

    def loss(self, samples: Tensor, batch: Batch) -> Tensor:
        """The distance of samples, shape (), with gradients."""

    def compare(self, fitted: Tensor, unfitted: Tensor, batch: Batch) -> Comparison:
        """Both distances, and the standard error of their difference."""


@dataclass(frozen=True, eq=False)
class EnergyTarget:
    """Energy distance to references.

    Args:
        references: Of each of ``SETS``, shape (N, ...).
        classes: Their classes, shape (N,), for samplers of classes; None without.
        labels: Classes to draw from, where samples have classes; None without.
        bounds: The smallest and the largest value of pixels, at which samples are cut off as images are; None for data
            that are no pixels.
        features: Samples, shape (B, ...), -> shape (B, C), such as ``MiddleFeatures``; None without.
    """

    references: Mapping[str, Tensor]
    classes: Mapping[str, Tensor] | None = None
    labels: Tensor | None = None
    bounds: tuple[float, float] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    name: str = field(default="energy", init=False)

    @cached_property
    def units(self) -> list[Units]:
        """Of each view, from the references of ``fit``; those of another set would look white to themselves."""
        references = self.references["fit"][:REFERENCES_OF_UNITS].float()
        known = self.reference_features.get("fit")
        usual = float(self._cut(references).flatten(1).var(0).mean())
        return [
            _of_spread(view) if part == WHOLE else _white(view, usual if part == PATCHES else float(view.var(0).mean()))
            for part, view in self._views(references, None if known is None else known[:REFERENCES_OF_UNITS])
        ]

    @cached_property
    @torch.no_grad()
    def reference_features(self) -> dict[str, Tensor]:
        """Features of all references of each set, shape (N, C); empty without features."""
        if self.features is None:
            return {}
        return {part: self.features(self._cut(images.float())) for part, images in self.references.items()}

    def _cut(self, images: Tensor) -> Tensor:
        """Images as they are saved, within the bounds."""
        return images if self.bounds is None else images.clamp(*self.bounds)

    def _views(self, images: Tensor, features: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole images, each patch, and features, if these are not known yet: the name of their part, and (B, n)."""
        images = self._cut(images)
        yield WHOLE, images.flatten(1)
        for patch in _patches(images):
            yield PATCHES, patch
        if self.features is not None:
            yield FEATURES, (self.features(images.float()) if features is None else features).to(images)

    def _points(
        self, images: Tensor, classes: Tensor | None, features: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The views in their units. Classes, shape (B, K), are further coordinates of each."""
        for units, (part, view) in zip(self.units, self._views(images, features), strict=True):
            points = units.of(view)
            yield part, points if classes is None else torch.cat([points, classes], 1)

    def batch(self, part: str, size: int, generator: torch.Generator) -> Batch:
        """See ``Target``."""
        references = self.references[part]
        count = min(REFERENCES_PER_SAMPLE * size, len(references))
        rows = torch.randperm(len(references), generator=generator)[:count].to(references.device)
        noise = torch.randn(size, *references.shape[1:], generator=generator).to(references.device)
        known = self.reference_features.get(part)
        features = None if known is None else known[rows]
        if self.labels is None:
            return Batch(noise, references[rows], reference_features=features)
        drawn = self.labels[torch.randint(len(self.labels), (size,), generator=generator)].to(references.device)
        classes = None if self.classes is None else self.classes[part][rows]
        return Batch(noise, references[rows], {"class_labels": drawn}, classes, features)

    def loss(self, samples: Tensor, batch: Batch) -> Tensor:
        """See ``Target``; E|Y - Y'|^b is left out, which does not depend on the samples."""
        own, others = _classes_as_points(batch, samples.float())
        found: dict[str, list[Tensor]] = {}
        views = zip(
            self._points(samples.float(), own),
            self._points(batch.reference.float(), others, batch.reference_features),
            strict=True,
        )
        for (part, s), (_, y) in views:
            found.setdefault(part, []).append(2.0 * _distances(s, y).mean() - _mean_of_different(_distances(s, s)))
        return _balanced(found)

    def compare(self, fitted: Tensor, unfitted: Tensor, batch: Batch) -> Comparison:
        """See ``Target``; the error is that of the projections of the U-statistics (Hoeffding 1948)."""
        own, others = _classes_as_points(batch, finest(fitted))
        found: tuple[dict[str, list[_Statistic]], ...] = ({}, {})
        views = zip(
            self._points(finest(batch.reference), others, batch.reference_features),
            *(self._points(finest(samples), own) for samples in (fitted, unfitted)),
            strict=True,
        )
        for (part, y), *both in views:
            between = _mean_of_different(_distances(y, y))
            for (_, points), statistics in zip(both, found, strict=True):
                statistics.setdefault(part, []).append(_statistic(points, y, between))
        parts = [{name: _mean_of(each) for name, each in statistics.items()} for statistics in found]
        ours, theirs = (_mean_of(list(each.values())) for each in parts)
        gains = {name: _gain(parts[0][name], parts[1][name]) for name in parts[0]} if len(parts[0]) > 1 else {}
        return Comparison(float(ours.value), float(theirs.value), _gain(ours, theirs).error, gains)


@dataclass(frozen=True, eq=False)
class PairedTarget:
    """Distance to the end points of a fine solution from the same noise.

    Args:
        noise: Of each of ``SETS``, shape (N, ...).
        ends: The end points, same shapes.
        classes: The classes that they were drawn with, shape (N,); None without.
    """

    noise: Mapping[str, Tensor]
    ends: Mapping[str, Tensor]
    classes: Mapping[str, Tensor] | None = None
    name: str = field(default="paired", init=False)

    def batch(self, part: str, size: int, generator: torch.Generator) -> Batch:
        """See ``Target``."""
        noise = self.noise[part]
        rows = torch.randperm(len(noise), generator=generator)[: min(size, len(noise))].to(noise.device)
        conditioning = {} if self.classes is None else {"class_labels": self.classes[part][rows]}
        return Batch(noise[rows], self.ends[part][rows], conditioning)

    def loss(self, samples: Tensor, batch: Batch) -> Tensor:
        """See ``Target``: the mean over samples of the root mean square over their entries."""
        return _rms(samples, batch.reference).mean()

    def compare(self, fitted: Tensor, unfitted: Tensor, batch: Batch) -> Comparison:
        """See ``Target``."""
        ours, theirs = (_rms(finest(samples), finest(batch.reference)) for samples in (fitted, unfitted))
        return Comparison(float(ours.mean()), float(theirs.mean()), float((ours - theirs).std()) / math.sqrt(len(ours)))


def _rms(samples: Tensor, ends: Tensor) -> Tensor:
    """Root mean square of the difference of each sample, shape (B,)."""
    square = (samples - ends).flatten(1).square().mean(1)
    return torch.sqrt(square + torch.finfo(square.dtype).tiny)  # whose derivative at 0 is finite


def _of_spread(view: Tensor) -> Units:
    """Points whose distances are in units of their spread."""
    spread = view.var(0).sum().sqrt()
    scale = torch.where(spread > 0.0, spread, torch.ones_like(spread))  # for references that are all equal
    return Units(torch.zeros_like(view[0]), 1.0 / scale)


def _white(view: Tensor, usual: float) -> Units:
    """Whitened points, shape (B, n): (y - m) (C + e)^(-1/2) / sqrt(n) up to a rotation, with the covariance C of view.

    Directions in which the points hardly differ, by less than e, stay short.
    """
    view, dimensions = finest(view), view.shape[1]
    mean = view.mean(0)
    deviations = view - mean
    covariance = (deviations.T @ deviations / max(len(view) - 1, 1)).cpu().double()
    variances, axes = torch.linalg.eigh(covariance)  # small, and not on every device
    least = ADDED_VARIANCE * max(float(variances.mean()), LEAST_VARIANCE * usual)
    scale = (variances.clamp(min=0.0) + least).sqrt() if least > 0.0 else torch.ones_like(variances)
    return Units(mean, (axes / (scale * math.sqrt(dimensions))).to(mean))


def _classes_as_points(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Classes of the samples and of the references as coordinates, or None twice where one of them has none.

    Two classes lie as far apart as two references do.
    """
    labels, others = batch.conditioning.get("class_labels"), batch.reference_classes
    if labels is None or others is None:
        return None, None
    count = int(max(int(labels.max()), int(others.max()))) + 1
    first, second = (one_hot(classes, count).to(like) for classes in (labels, others))
    return first, second


def _patches(images: Tensor) -> Iterator[Tensor]:
    """Patches of images, of all scales and from all over the image: each of shape (B, n)."""
    while images.ndim == 4 and min(images.shape[2:]) >= min(PATCH_SIDES):
        height, width = images.shape[2:]
        for side in PATCH_SIDES:
            for i, j in product(_spread_out(height - side), _spread_out(width - side)):
                yield images[:, :, i : i + side, j : j + side].flatten(1)
        images = avg_pool2d(images, 2)


def _spread_out(last: int) -> list[int]:
    """Places from 0 to ``last``, both among them; none where ``last`` is negative."""
    count = min(last + 1, PATCHES_ASIDE)
    return [round(k * last / max(count - 1, 1)) for k in range(count)]


def _balanced(parts: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """The mean of the parts, each of which is the mean of its views."""
    return _stacked_mean([_stacked_mean(views) for views in parts.values()])


def _stacked_mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Square roots of all distances, shape (len(a), len(b))."""
    return torch.sqrt(torch.cdist(a, b) + SHORTEST)


def _mean_of_different(distances: Tensor) -> Tensor:
    """Mean over the pairs of two different points."""
    count = len(distances)
    return (distances.sum() - distances.diagonal().sum()) / (count * (count - 1))


class _Statistic(NamedTuple):
    """The energy distance, and its projections on single samples and references."""

    value: Tensor
    of_samples: Tensor
    of_references: Tensor


def _statistic(s: Tensor, y: Tensor, between: Tensor) -> _Statistic:
    across, within = _distances(s, y), _distances(s, s)
    own = 2.0 * across.mean(1) - 2.0 * (within.sum(1) - within.diagonal()) / (len(s) - 1)
    return _Statistic(2.0 * across.mean() - _mean_of_different(within) - between, own, 2.0 * across.mean(0))


def _mean_of(statistics: Sequence[_Statistic]) -> _Statistic:
    return _Statistic(*map(_stacked_mean, zip(*statistics, strict=True)))


def _gain(fitted: _Statistic, unfitted: _Statistic) -> Gain:
    differences = (fitted.of_samples - unfitted.of_samples, fitted.of_references - unfitted.of_references)
    error = math.sqrt(sum(float(d.var()) / len(d) for d in differences))
    return Gain(float(unfitted.value - fitted.value), error)
