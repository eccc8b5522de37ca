"""The fit: distances against closed forms, Gaussian data to their exact variance, and what keeps it honest."""

import math

import pytest
import torch
from analytic import PointwiseGaussian, push_gaussian
from scipy.special import hyp1f1

from diffusers_sde import VPSDEScheduler
from diffusers_sde.fitting import EnergyTarget, FitOptions, PairedTarget, PlanFamily, fit_parameters, simulate
from diffusers_sde.fitting.targets import (
    ADDED_VARIANCE,
    FEATURES,
    PATCH_SIDES,
    PATCHES,
    PATCHES_ASIDE,
    SETS,
    WHOLE,
    Batch,
    Comparison,
    Gain,
    stream,
)

STD = 0.3


def normal(n, d=1, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def mean_root(mean, variance):
    """E|Z|^(1/2) of Z ~ N(mean, variance), an absolute moment (Winkelbauer 2012, arXiv:1209.4340)."""
    scale = (2.0 * variance) ** 0.25 * math.gamma(0.75) / math.sqrt(math.pi)
    return scale * float(hyp1f1(-0.25, 0.5, -0.5 * mean**2 / variance))


# ---------------------------------------------------------------------- distances


def test_the_energy_distance_of_two_normal_laws():
    target = EnergyTarget(dict.fromkeys(SETS, normal(4000, seed=1)))
    batch = Batch(normal(2000), target.references["report"])
    found = target.compare(normal(2000, seed=2, mean=0.5, std=1.5), normal(2000, seed=3), batch)
    exact = 2 * mean_root(0.5, 1 + 2.25) - mean_root(0.0, 4.5) - mean_root(0.0, 2.0)
    assert exact > 0.05
    assert found.fitted == pytest.approx(exact, abs=0.01)
    assert abs(found.unfitted) < 0.005
    x, unit = normal(2000, seed=2).double(), float(batch.reference.std())
    roots = (x - x.T).abs().sqrt()
    across = float((x - batch.reference.T.double()).abs().sqrt().mean())
    exact = (2 * across - float(roots.sum()) / (2000 * 1999)) / math.sqrt(unit)
    assert float(target.loss(x.float(), batch)) == pytest.approx(exact, rel=1e-3)


def random_walks(n, side=8, seed=0, noise=0.0):
    """Smooth images: sums of noise along both axes, in [-1, 1] or so; then noise for each pixel."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(n, 1, side, side, generator=generator).cumsum(2).cumsum(3) / side
    return smooth + noise * torch.randn(n, 1, side, side, generator=generator)


def compared(first, second, references):
    """Samples with other ones, by whole images and patches, and by whole images alone."""
    rows = references.flatten(1)
    return (
        EnergyTarget({"fit": references}).compare(first, second, Batch(first, references)),
        EnergyTarget({"fit": rows}).compare(first.flatten(1), second.flatten(1), Batch(first, rows)),
    )


def test_patches_see_noise_better_than_whole_images():
    """A noisy image lies nearly as far from others as a clean one does; its patches lie further from theirs."""
    references = random_walks(1000, seed=1)
    clean, noisy = random_walks(500, seed=2), random_walks(500, seed=2, noise=0.2)
    found, whole = compared(clean, noisy, references)
    assert found.gain > 10.0 * found.error
    assert found.gain > 1.3 * whole.gain
    assert found.gain / found.error > 3.0 * whole.gain / whole.error


@pytest.mark.parametrize(
    "gain, whole, patches, nearer",
    [
        (0.3, None, None, True),
        (0.1, None, None, False),
        (0.3, 0.0, 0.0, True),
        (0.1, 0.3, 0.0, True),
        (0.1, 0.0, 0.3, True),
        (0.3, -0.09, 0.7, True),
        (0.3, -0.11, 0.7, False),
        (-0.01, 0.3, -0.4, False),
        (0.1, 0.1, 0.1, False),
    ],
)
def test_a_fit_is_nearer_in_all_or_in_a_part_and_not_further_as_a_whole(gain, whole, patches, nearer):
    found = ((name, value) for name, value in ((WHOLE, whole), (PATCHES, patches)) if value is not None)
    parts = {name: Gain(value, 0.1) for name, value in found}
    assert Comparison(1.0 - gain, 1.0, 0.1, parts).is_nearer(2.0) is nearer


@pytest.mark.parametrize("features, nearer", [(0.3, True), (-0.09, True), (-0.11, False)])
def test_a_fit_must_not_be_further_off_by_features(features, nearer):
    parts = {WHOLE: Gain(0.1, 0.1), PATCHES: Gain(0.3, 0.1), FEATURES: Gain(features, 0.1)}
    assert Comparison(0.9, 1.0, 0.1, parts).is_nearer(2.0) is nearer
    alone = Comparison(0.9, 1.0, 0.1, {WHOLE: Gain(0.1, 0.1), FEATURES: Gain(features, 0.1)})
    assert alone.is_nearer(2.0) is (features == 0.3)


def test_patches_alone_do_not_make_a_fit():
    """All that is fitted to is right beyond the noise, but whole samples are further off beyond the noise."""

    class OfPatches:
        name = "energy"

        def __init__(self, whole_gain):
            self.whole_gain = whole_gain

        def batch(self, part, size, generator):
            noise = torch.randn(size, 2, generator=generator)
            return Batch(noise, noise)

        def loss(self, samples, batch):
            return (samples - batch.noise - 1.0).square().mean()

        def compare(self, fitted, unfitted, batch):
            return Comparison(float(self.loss(fitted, batch)), 1.0, 1e-3, {WHOLE: Gain(self.whole_gain, 1e-3)})

    def simulator(parameters, batch, generator):
        return batch.noise + parameters.float()

    options = FitOptions(steps=20, batch_size=8, held_out=8, learning_rate=0.1)
    kept, refused = (fit_parameters(2, simulator, OfPatches(gain), options) for gain in (-0.9e-3, -1.1e-3))
    assert kept.is_fitted and not refused.is_fitted
    assert kept.fitted == refused.fitted < 0.5
    assert not bool(refused.parameters.any())


def test_half_of_the_distance_is_that_of_whole_images():
    """Patches that are right, put together wrongly: halves of different images, of which patches see the seam alone."""
    references, samples = random_walks(1000, seed=1), random_walks(500, seed=2)
    exchanged = torch.cat([samples[..., :4], samples.roll(1, 0)[..., 4:]], dim=3)
    found, whole = compared(samples, exchanged, references)
    assert found.gain > 3.0 * found.error
    assert found.gain > 0.5 * whole.gain > 0.0
    assert found.parts[WHOLE] == pytest.approx((whole.gain, whole.error), rel=1e-6) and not whole.parts
    assert found.gain == pytest.approx(0.5 * (found.parts[WHOLE].value + found.parts[PATCHES].value))


def test_features_see_what_pixels_do_not():
    """Two signs of which one follows from two others: a law that pairs of pixels do not tell from independent ones."""

    def signs(n, seed, dependent):
        x = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).sign()
        if dependent:
            x[:, :, 1, 1] = x[:, :, 0, 0] * x[:, :, 0, 1] * x[:, :, 1, 0]
        return x + 0.01 * torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed + 1))

    references, right, wrong = signs(1000, 1, True), signs(500, 3, True), signs(500, 5, False)
    products = lambda x: x.flatten(1).prod(1, keepdim=True)  # noqa: E731
    batch, target = Batch(right, references), EnergyTarget({"fit": references}, features=products)
    blind = EnergyTarget({"fit": references}).compare(right, wrong, batch)
    found = target.compare(right, wrong, batch)
    assert set(found.parts) == {WHOLE, FEATURES}
    assert found.parts[WHOLE].value == pytest.approx(blind.gain)
    assert found.gain == pytest.approx(0.5 * (found.parts[WHOLE].value + found.parts[FEATURES].value))
    assert found.gain > 5.0 * found.error
    assert found.parts[FEATURES].value > 20.0 * found.parts[WHOLE].value > 0.0
    assert float(target.loss(right, batch)) < float(target.loss(wrong, batch))


def test_features_have_gradients_and_count_as_the_other_parts():
    references, samples = random_walks(400, seed=1), random_walks(100, seed=2).requires_grad_(True)
    batch = Batch(samples, references)
    target = EnergyTarget({"fit": references}, features=lambda x: x.flatten(1).square())
    whole_and_patches, loss = EnergyTarget({"fit": references}).loss(samples, batch), target.loss(samples, batch)
    s, y = (dict(target._points(x, None))[FEATURES] for x in (samples, references))
    across, within = (torch.sqrt(torch.cdist(s, other) + 1e-4) for other in (y, s))
    expected = 2.0 * across.mean() - (within.sum() - within.trace()) / (100 * 99)
    assert loss.item() == pytest.approx((2.0 * whole_and_patches + expected).item() / 3.0, rel=1e-5)
    loss.backward()
    assert float(samples.grad.abs().max()) > 0.0


def test_patches_are_white_in_the_units_of_what_is_fitted_to():
    """Covariance 1/n in all directions that vary by more than what is added; other images do not change the units."""
    references = random_walks(4000, seed=1, noise=0.3)
    target = EnergyTarget({"fit": references, "report": 3.0 * references[:30]})
    views = list(target._views(references.double()))
    for units, (_, view) in list(zip(target.units, views, strict=True))[1:]:
        n = view.shape[1]
        found = n * torch.cov(units.of(view).T)
        variances, axes = torch.linalg.eigh(torch.cov(view.T))
        expected = axes @ torch.diag(variances / (variances + ADDED_VARIANCE * variances.mean())) @ axes.T
        assert torch.allclose(torch.linalg.eigvalsh(found), torch.linalg.eigvalsh(expected), atol=1e-5)
        assert float(found.trace()) > 0.6 * n
    batch = target.batch("report", 30, stream(0))
    (_, whole), *patches = target._points(batch.reference, None)
    assert float(whole.var(0).sum()) == pytest.approx(9.0, rel=0.5)
    assert min(float(y.var(0).sum()) for _, y in patches) > 2.0


def test_white_patches_see_what_hardly_varies():
    """Grain of a hundredth of the variance, half as strong as it should be, beside slow changes of brightness."""

    def grainy(n, grain, seed):
        generator = torch.Generator().manual_seed(seed)
        slow = torch.randn(n, 1, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return slow + grain * torch.randn(n, 1, 8, 8, generator=generator)

    found, whole = compared(grainy(500, 0.1, 1), grainy(500, 0.05, 1), grainy(1000, 0.1, 2))
    assert found.gain > 10.0 * found.error
    assert abs(whole.gain) < 2.0 * whole.error


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 16, 9), (4, 5, 5), (2, 3, 3), (1, 2, 2)])
def test_patches_come_from_all_over_the_image(shape):
    """Every pixel of the whole, and of the patches the first and the last of both axes, at all scales."""
    image = torch.arange(math.prod(shape)).reshape(1, *shape).float()
    views = [view for _, view in EnergyTarget({"fit": image})._views(image)]
    assert torch.equal(views[0][0], torch.arange(math.prod(shape)).float())
    channels, height, width = shape
    sizes = {len(view[0]) for view in views[1:]}
    assert sizes == {channels * side**2 for side in PATCH_SIDES if side <= min(height, width)}
    seen = torch.cat(
        [view[0] for view in views[1:] if len(views) > 1 and len(view[0]) == channels * 9] or [views[0][0]]
    )
    assert float(seen.min()) == 0.0
    assert float(seen.max()) == math.prod(shape) - 1
    assert len(views) <= 1 + 2 * PATCHES_ASIDE**2 * math.ceil(math.log2(max(min(height, width), 2)))


def test_pixels_are_cut_off_as_images_are():
    """What lies beyond black and white is not seen, and the noise of a black background lies there by half."""
    references, samples = random_walks(200, seed=1).clamp(-1.0, 1.0), random_walks(100, seed=2)
    batch = Batch(samples, references)
    cut, as_they_are = EnergyTarget({"fit": references}, bounds=(-1.0, 1.0)), EnergyTarget({"fit": references})
    assert float(cut.loss(samples, batch)) == float(as_they_are.loss(samples.clamp(-1.0, 1.0), batch))
    assert float(cut.loss(samples, batch)) != float(as_they_are.loss(samples, batch))
    beyond = torch.where(samples.abs() > 1.0, 3.0 * samples, samples)
    found = cut.compare(beyond, samples, batch)
    assert found.gain == 0.0 and found.error == 0.0


def test_distances_are_in_units_of_the_data():
    """The same at every scale, and finite where all references are equal."""
    references, samples = random_walks(200, seed=1), random_walks(100, seed=2, noise=0.1)
    references[..., :4, :4] = samples[..., :4, :4] = 0.0

    def loss(scale=1.0, of_references=1.0):
        scaled = scale * of_references * references
        return float(EnergyTarget({"fit": scaled}).loss(scale * samples, Batch(samples, scaled)))

    one, large = loss(), loss(1000.0)
    assert one == pytest.approx(large, rel=1e-4)
    samples[..., :4, :4] = 0.05 * normal(100, 16, seed=3).reshape(100, 1, 4, 4)
    assert one + 1e-3 < loss() < one + 1.0
    assert math.isfinite(loss(of_references=0.0))


def test_the_error_of_a_gain_is_the_spread_of_gains():
    """Over repetitions with fresh samples and references; the spread of 100 is known to 7 %, 35 % is five of that."""
    gains, errors = [], []
    for k in range(100):
        target = EnergyTarget(dict.fromkeys(SETS, normal(300, 4, seed=3 * k)))
        z = normal(150, 4, seed=3 * k + 1)
        batch = target.batch("report", 150, stream(k))
        found = target.compare(1.1 * z, 1.3 * z, batch)
        gains.append(found.gain)
        errors.append(found.error)
    spread = float(torch.tensor(gains).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.35)


def test_classes_count_as_coordinates():
    """Samples that have the right images under the wrong classes are far from the references."""
    images = torch.cat([normal(400, 2, seed=1, mean=-2.0), normal(400, 2, seed=2, mean=2.0)])
    classes = torch.arange(800) // 400
    target = EnergyTarget(dict.fromkeys(SETS, images), dict.fromkeys(SETS, classes), torch.tensor([0, 1]))
    right = Batch(images, images, {"class_labels": classes}, classes)
    wrong = right._replace(conditioning={"class_labels": 1 - classes})
    other = torch.cat([normal(400, 2, seed=3, mean=-2.0), normal(400, 2, seed=4, mean=2.0)])
    assert float(target.loss(other, right)) < float(target.loss(other, wrong)) - 0.2
    batch = target.batch("fit", 64, stream(0))
    assert set(batch.conditioning["class_labels"].tolist()) == {0, 1}


def test_sets_are_apart():
    streams = [torch.randn(4, generator=stream(7, *purpose)) for purpose in ((0, 1, 0), (1, 0), (2, 0), (1, 1), (9, 0))]
    assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
    references = {part: normal(50, seed=i) for i, part in enumerate(SETS)}
    target = EnergyTarget(references)
    seen = {part: target.batch(part, 50, stream(0)).reference for part in SETS}
    assert all(set(seen[part].flatten().tolist()) == set(references[part].flatten().tolist()) for part in SETS)


# ---------------------------------------------------------------------- fits


def gaussian_problem(scheduler, levels, n=256):
    """Gaussian data, whose flow has closed-form end points: x_T times the ratio of standard deviations."""
    sde, data = scheduler.sde, PointwiseGaussian(0.0, STD)

    def denoiser(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x

    times = scheduler.sampling_times(levels)
    family = PlanFamily(sde, times, scheduler.own_predictor, stochasticity=scheduler.own_stochasticity, data_std=STD)
    first = float(torch.sqrt((sde.alpha(times[0]) * STD) ** 2 + sde.sigma(times[0]) ** 2))
    end = float(sde.alpha(times[-1])), float(sde.sigma(times[-1]))
    # The last row is x0_hat at the last level, whose standard deviation is STD gain alpha / S.
    last = end[0] * STD**2 / math.sqrt((end[0] * STD) ** 2 + end[1] ** 2)
    noise = {part: normal(n, 2, seed=i) for i, part in enumerate(SETS)}
    ends = {part: last / first * z for part, z in noise.items()}
    simulator = lambda p, batch, g: simulate(family.plan(p), denoiser, batch.noise, g)  # noqa: E731
    start = scheduler.init_noise_sigma**2

    def variance(parameters):
        return push_gaussian(family.plan(parameters), sde, 0.0, STD, 0.0, start)[1]

    assert data.std == STD
    return family, simulator, PairedTarget(noise, ends), variance, (last / first) ** 2 * start, noise


def test_gaussian_data_reach_their_exact_variance():
    scheduler = VPSDEScheduler(probability_flow=True, solver_order=1, solver_correction=False, gaussian_std=0.0)
    family, simulator, target, variance, exact, _ = gaussian_problem(scheduler, 4)
    before = variance(torch.zeros(family.size, dtype=torch.float64))
    assert abs(before / exact - 1.0) > 0.1
    options = FitOptions(steps=60, batch_size=64, held_out=128, learning_rate=0.03)
    fit = fit_parameters(family.size, simulator, target, options)
    assert fit.is_fitted and fit.fitted < 0.1 * fit.unfitted
    assert variance(fit.parameters) == pytest.approx(exact, rel=0.02)


def test_the_same_without_gradients():
    scheduler = VPSDEScheduler(probability_flow=True, solver_order=1, solver_correction=False, gaussian_std=0.0)
    family, simulator, target, variance, exact, _ = gaussian_problem(scheduler, 3)
    options = FitOptions(steps=60, batch_size=64, held_out=128, learning_rate=0.03, gradients=False)

    def black_box(parameters, batch, generator):
        assert not torch.is_grad_enabled()
        return simulator(parameters, batch, generator)

    fit = fit_parameters(family.size, black_box, target, options)
    assert fit.is_fitted and fit.fitted < 0.4 * fit.unfitted
    before = variance(torch.zeros(family.size, dtype=torch.float64))
    assert abs(variance(fit.parameters) - exact) < 0.5 * abs(before - exact)


def test_a_fit_goes_back_where_it_has_lost_most_of_its_gain():
    """Looks after 10, 20, 30 and 40 steps: what a look loses to noise changes nothing, a loss of more does."""
    looks, seen = iter([1.0, 0.5, 0.6, 0.9, 0.5]), []

    class Scripted:
        name = "energy"

        def batch(self, part, size, generator):
            return Batch(torch.zeros(size, 1), torch.zeros(size, 1))

        def loss(self, samples, batch):
            return -samples.mean() if samples.requires_grad else torch.tensor(next(looks))

        def compare(self, fitted, unfitted, batch):
            return Comparison(0.5, 1.0, 0.1)

    def simulator(parameters, batch, generator):
        if parameters.requires_grad:
            seen.append(float(parameters.detach()))
        return batch.noise + parameters.float()

    fit = fit_parameters(1, simulator, Scripted(), FitOptions(steps=40, batch_size=2, held_out=4, learning_rate=0.1))
    rises = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    assert all(rise > 0.0 for i, rise in enumerate(rises) if i != 29)
    assert fit.chosen_step == 10 and seen[30] == pytest.approx(float(fit.parameters)) and seen[30] < seen[10]
    assert rises[30] < 0.4 * rises[28]


def test_what_is_exact_already_comes_back_unfitted():
    """With its own ``gaussian_std`` the predictor has no error on Gaussian data, so that nothing can beat it."""
    scheduler = VPSDEScheduler(probability_flow=True, solver_order=1, solver_correction=False, gaussian_std=STD)
    family, simulator, target, _, _, _ = gaussian_problem(scheduler, 4)
    fit = fit_parameters(family.size, simulator, target, FitOptions(steps=10, batch_size=32, held_out=64))
    assert not fit.is_fitted and not fit.parameters.any()
    assert fit.fitted <= fit.unfitted


def test_noise_alone_is_no_gain():
    """Exact samples of the reverse SDE, judged by few: of six fits hardly any may count as better."""
    scheduler = VPSDEScheduler(solver_order=1, solver_correction=False, gaussian_std=STD, stochasticity=1.0)
    family, simulator, _, _, _, _ = gaussian_problem(scheduler, 3)
    accepted = 0
    for seed in range(6):
        references = {part: normal(200, 2, seed=50 + 3 * seed + i, std=STD) for i, part in enumerate(SETS)}
        options = FitOptions(steps=4, batch_size=32, held_out=128, learning_rate=0.002, seed=seed)
        fit = fit_parameters(family.size, simulator, EnergyTarget(references), options)
        accepted += fit.is_fitted
    assert accepted <= 2  # each has a false alarm of about 2.5 %


def test_a_fit_is_reproducible_and_its_seed_counts():
    scheduler = VPSDEScheduler(probability_flow=True, solver_order=1, solver_correction=False, gaussian_std=0.0)
    family, simulator, target, _, _, _ = gaussian_problem(scheduler, 3)
    fits = [
        fit_parameters(family.size, simulator, target, FitOptions(steps=5, batch_size=16, held_out=64, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(fits[0].parameters, fits[1].parameters)
    assert not torch.equal(fits[0].parameters, fits[2].parameters)
    assert fits[0].samples == 5 * 16 + 32 * (1 + 5) + 2 * 64


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"held_out": 1}, {"seed": -1}, {"gradients": 1}]
)
def test_other_options_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        FitOptions(**given)


def test_a_sampler_without_finite_samples_is_refused():
    target = PairedTarget(dict.fromkeys(SETS, normal(8)), dict.fromkeys(SETS, normal(8)))
    with pytest.raises(ValueError, match="not finite"):
        fit_parameters(3, lambda p, b, g: b.noise * math.nan, target, FitOptions(steps=1, batch_size=4, held_out=4))


def test_steps_that_are_too_long_are_shortened():
    """Where the fit pulls far beyond what is better by other noise, short steps from the best so far find that."""

    class FarOff:
        name = "energy"

        def batch(self, part, size, generator):
            best = 1.0 if part == "fit" else 0.02
            return Batch(torch.zeros(size, 1), torch.full((size, 1), best))

        def loss(self, samples, batch):
            return (samples - batch.reference).square().mean()

        def compare(self, fitted, unfitted, batch):
            return Comparison(float(self.loss(fitted, batch)), float(self.loss(unfitted, batch)), 1e-9)

    options = FitOptions(steps=80, checks=8, batch_size=2, held_out=4, learning_rate=0.5)
    found = fit_parameters(1, lambda p, batch, g: batch.noise + p.float(), FarOff(), options)
    assert found.is_fitted and found.chosen_step > 10
    assert 0.0 < float(found.parameters) < 0.04
