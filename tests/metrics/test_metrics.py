"""Metrics of sets whose distances are known."""

import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_sde.metrics import (
    InceptionFeatures,
    PixelFeatures,
    SampleQuality,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_classifier,
    make_extractor,
    nearest_neighbours,
    precision_recall,
    train_feature_classifier,
)

GENERATOR = np.random.default_rng


def with_moments(n, mean, covariance, seed=0):
    """Vectors whose own mean and covariance are exactly those given."""
    x = GENERATOR(seed).standard_normal((n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_gaussians():
    c1, c2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    m1, m2 = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(c1) @ c2 @ scipy.linalg.sqrtm(c1))
    expected = 5.0 + np.trace(c1 + c2 - 2.0 * root)
    x, y = with_moments(50, m1, c1, 1), with_moments(80, m2, c2, 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, with_moments(70, m1, c1, 3)) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_where_there_are_more_features_than_vectors():
    x = torch.from_numpy(GENERATOR(0).standard_normal((20, 50)))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-4)
    assert frechet_distance(x + 1.0, x) == pytest.approx(50.0, rel=1e-5)


def test_kernel_distance_is_the_unbiased_mmd():
    x, y = GENERATOR(0).standard_normal((90, 5)), GENERATOR(1).standard_normal((70, 5)) + 0.5
    x = x[:70]  # as many as a subset has: every subset is the whole set

    def mean_kernel(a, b, without_itself):
        table = (a @ b.T / 5.0 + 1.0) ** 3
        return (table.sum() - np.trace(table)) / (70 * 69) if without_itself else table.mean()

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2.0 * mean_kernel(x, y, False)
    mean, deviation = kernel_distance(torch.from_numpy(y), torch.from_numpy(x))
    assert mean == pytest.approx(expected, rel=1e-9) and deviation < 1e-9


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    draws = [torch.from_numpy(GENERATOR(seed).standard_normal((200, 1))) for seed in range(40)]
    values = [kernel_distance(a, b)[0] for a, b in zip(draws[::2], draws[1::2], strict=True)]
    # The biased estimate would be 2 (E k(x, x) - E k(x, x')) / 200 = 0.24 more; five standard errors here are 0.2.
    error = np.std(values, ddof=1) / len(values) ** 0.5
    assert abs(np.mean(values)) < min(5 * error, 0.2)


def test_inception_score_of_known_classifiers():
    certain = 50.0 * torch.eye(5).repeat(2000, 1)
    assert inception_score(certain)[0] == pytest.approx(5.0, rel=5e-3)
    assert inception_score(torch.zeros(1000, 5))[0] == pytest.approx(1.0, abs=1e-5)
    two_of_five = certain[certain.argmax(1) < 2]
    assert inception_score(two_of_five)[0] == pytest.approx(2.0, rel=5e-3)
    # Right with probability 0.7, otherwise one of the others: exp(log K - H).
    p = torch.tensor([0.7, 0.2, 0.1])
    turned = torch.stack([p.roll(k) for k in range(3)]).log().repeat(3000, 1)
    expected = 3.0 * float((p * p.log()).sum().exp())
    assert inception_score(turned)[0] == pytest.approx(expected, rel=5e-3)


def test_precision_and_recall():
    x = torch.from_numpy(GENERATOR(0).uniform(size=(1500, 2)))
    y = torch.from_numpy(GENERATOR(1).uniform(size=(1500, 2)))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 10.0, x) == (0.0, 0.0)
    assert min(precision_recall(x, y)) > 0.95
    half = y[y[:, 0] < 0.5]  # samples that miss half of the data
    precision, recall = precision_recall(half, x)
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.05)
    wide = torch.cat([y, y + 10.0])  # half of the samples are no data
    precision, recall = precision_recall(wide, x)
    assert recall > 0.95 and precision == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(x[:3], x)


def test_neighbours_beyond_the_third_do_not_count():
    # Radii are 3, 2, 2, 3 for k = 3 on a line; the first vector lies in none, the second on the edge of one.
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).double()
    samples = torch.tensor([[6.5], [6.0], [-3.5], [100.0]]).double()
    assert precision_recall(samples, line)[0] == 0.25


def test_nearest_neighbours_find_copies():
    images = torch.randint(0, 256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = images[[7, 200]].clone()
    changed[1, 0, 0, 0] = (int(changed[1, 0, 0, 0]) + 128) % 256
    distances, indices = nearest_neighbours(changed, images, 2)
    assert indices[:, 0].tolist() == [7, 200]
    assert distances[0, 0] == 0.0
    assert float(distances[1, 0]) == pytest.approx(128 / 255 / 8, rel=1e-5)
    assert bool((distances[:, 0] < distances[:, 1]).all())


def shades(n, seed=0):
    """Class 0 is dark, class 1 is light."""
    generator = GENERATOR(seed)
    labels = np.arange(n) % 2
    pixels = generator.integers(-40, 40, (n, 1, 8, 8)) + np.array([70, 180])[labels][:, None, None, None]
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


def test_the_classifier_learns_and_comes_back(tmp_path):
    images, labels = shades(200)
    state = torch.random.get_rng_state()
    classifier = train_feature_classifier(images, labels, steps=30, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert classifier.accuracy == 1.0
    again = train_feature_classifier(images, labels, steps=30, seed=3)
    first, second = (c.network.state_dict() for c in (classifier, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    path = tmp_path / "folder" / "classifier.safetensors"
    classifier.save(path)
    loaded = load_classifier(path, images, labels)
    assert loaded.accuracy == 1.0
    for a, b in zip(loaded(images), classifier(images), strict=True):
        assert torch.equal(a, b)
    # A sample's features do not depend on its batch mates.
    torch.testing.assert_close(loaded(images[:1])[0], loaded(images)[0][:1])
    with pytest.raises(ValueError, match="other images"):
        load_classifier(path, images, 1 - labels)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"classifier .* cannot be read"):
        load_classifier(path, images, labels)
    with pytest.raises(ValueError, match="two classes"):
        train_feature_classifier(images, torch.zeros(200, dtype=torch.int64))


def test_quality_of_good_and_bad_samples():
    images, labels = shades(400)
    quality = SampleQuality(images, train_feature_classifier(images, labels, steps=60), batch_size=64)
    state = torch.random.get_rng_state()
    good, bad = quality(*shades(400, 1)), quality(shades(400, 1)[0].roll(1, 0) // 2, labels)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(good) == set(bad) and {"FD-classifier", "KID-classifier", "IS-classifier", "precision"} < set(good)
    assert good["class_accuracy"] == 1.0 and good["precision"] > 0.7 and good["recall"] > 0.7
    assert bad["class_accuracy"] < 0.7 and bad["precision"] < 0.5
    assert 10 * good["FD-classifier"] < bad["FD-classifier"]
    assert quality(*shades(400, 1)) == good
    assert "class_accuracy" not in quality(images)
    with pytest.raises(ValueError, match="images must be more than 4"):
        quality(images[:4])


def test_pixel_features():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features, logits = PixelFeatures()(images)
    assert features.shape == (3, 768) and logits is None
    expected = images.float().unflatten(-1, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)) / 255
    torch.testing.assert_close(features, expected.flatten(1))
    small = images[:, :1, :28, :28]
    torch.testing.assert_close(PixelFeatures()(small)[0], small.flatten(1) / 255)


def test_inception_that_cannot_be_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="need torch-fidelity"):
        InceptionFeatures()

    class Module(type(sys)):
        URL_INCEPTION_V3 = "https://example.com/weights.pth"

        @staticmethod
        def FeatureExtractorInceptionV3(*arguments):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "torch_fidelity", Module("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", Module("inception"))
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no network\): put https://example.com/weights.pth"):
        InceptionFeatures()


class StandIn(torch.nn.Module):
    """In the place of torch-fidelity's Inception: the mean of each colour in two halves, and logits of the same."""

    def __init__(self, name, features):
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3  # torch-fidelity takes bytes in colour alone
        halves = images.double().unflatten(2, (2, -1)).mean((3, 4)).flatten(1) / 255.0
        return halves, 10.0 * halves


def test_with_inception_the_numbers_are_the_fid_and_its_like(monkeypatch):
    """Of 256 pixels, grey and in colour, as far as that goes without the weights: a small network stands in."""
    module = type(sys)("inception")
    module.URL_INCEPTION_V3, module.FeatureExtractorInceptionV3 = "https://example.com/weights.pth", StandIn
    generator = torch.Generator().manual_seed(0)
    shades = torch.randint(60, 200, (48, 3, 2, 1), dtype=torch.uint8, generator=generator)
    images = shades.repeat_interleave(128, 2).repeat_interleave(256, 3)
    with monkeypatch.context() as context:  # torchmetrics looks for torch-fidelity when it is imported
        context.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
        context.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
        extractor = make_extractor("inception", images[:24], None, None)
    grey, logits = extractor(images[:2, :1])
    assert torch.equal(grey[:, :2], grey[:, 2:4])
    torch.testing.assert_close(logits, 10.0 * grey)
    numbers = SampleQuality(images[:24], extractor)(images[24:])
    assert {"FID", "KID", "KID_std", "IS", "IS_std", "precision", "recall"} == set(numbers)
    x, y = (part.double().flatten(1).numpy() / 255.0 for part in (images[:24, :, ::128, 0], images[24:, :, ::128, 0]))
    c1, c2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(c1) @ c2 @ scipy.linalg.sqrtm(c1)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2.0 * root)
    assert numbers["FID"] == pytest.approx(expected, rel=1e-3)


def test_the_distance_of_few_samples_is_the_error_of_their_covariance():
    """Two samples per dimension make 13 % of the variance, for a Gaussian against itself; the means add d / n."""
    d, n = 64, 128
    # Eigenvalues of the samples' covariance have Marchenko and Pastur's density, and cost (1 - lambda^(1/2))^2 each.
    ratio = d / n
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 100_001)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / (2 * np.pi * ratio * x)
    share = float(np.sum(density * (1 - np.sqrt(x)) ** 2) * (x[1] - x[0]))
    assert share == pytest.approx(0.134, abs=0.001)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50_000, d, generator=generator)
    found = [frechet_distance(torch.randn(n, d, generator=generator), reference) for _ in range(4)]
    assert sum(found) / 4 == pytest.approx(d * share + d / n, rel=0.08)
