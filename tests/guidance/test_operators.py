"""Linear operators: adjoints, linearity, and everything that is derived from them, against the operator as a matrix."""

import math

import pytest
import torch

from diffusers_sde.guidance.operators import (
    BOUNDARIES,
    OPERATORS,
    ChannelMixture,
    Downsampling,
    GaussianBlur,
    Grayscale,
    LinearMap,
    LinearOperator,
    Mask,
    conjugate_gradients,
)

SHAPE = (3, 8, 6)


def random_mask(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.5


EXAMPLES = {
    "mask": lambda: Mask(random_mask(8, 6), SHAPE),
    "mask per image": lambda: Mask(random_mask(4, 3, 8, 6), SHAPE),
    "channels": lambda: ChannelMixture([[0.3, 0.6, 0.1], [1.0, -1.0, 0.0]], SHAPE),
    "grayscale": lambda: Grayscale(SHAPE),
    "luma": lambda: Grayscale(SHAPE, (0.299, 0.587, 0.114)),
    "downsampling": lambda: Downsampling(2, SHAPE),
    **{f"blur {b}": lambda b=b: GaussianBlur(1.1, SHAPE, boundary=b) for b in BOUNDARIES},
    "wide blur": lambda: GaussianBlur(3.0, SHAPE, boundary="reflect"),
    "map": lambda: LinearMap(lambda x: x.cumsum(-1)[..., ::2], SHAPE),
}


def example(name):
    return EXAMPLES[name]()


def batch(operator, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(operator.batch_size or 3, *SHAPE, dtype=torch.float64, generator=generator)


def test_every_registered_operator_has_an_example():
    assert {type(make()) for make in EXAMPLES.values()} == set(OPERATORS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_adjoint(name):
    operator = example(name)
    operator.check_adjoint()
    x = batch(operator)
    ax = operator.apply(x)
    assert ax.shape[1:] == operator.measurement_shape and ax.dtype == x.dtype
    y = torch.randn(ax.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        (ax * y).flatten(1).sum(1), (x * operator.adjoint(y)).flatten(1).sum(1), rtol=1e-12, atol=1e-12
    )


# Wide blurs have singular values below any precision: the pseudo-inverse is asked for well-posed operators only.
@pytest.mark.parametrize(
    "name, shift",
    [(n, s) for n in EXAMPLES for s in (0.0, 0.01, 2.0) if s > 0 or n not in ("wide blur", "map")],
)
def test_gram_solve_against_the_matrix(name, shift):
    operator = example(name)
    a = operator.matrix()
    own = operator.select(torch.zeros(1, dtype=torch.int64))
    y = own.apply(batch(operator)[:1])
    gram = a @ a.T + shift * torch.eye(len(a), dtype=torch.float64)
    expected = torch.linalg.pinv(gram, hermitian=True, rtol=1e-13) @ y.flatten()
    error = (own.solve_gram(y, shift).flatten() - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.mark.parametrize("name", ["mask", "mask per image", "channels", "grayscale", "downsampling", "blur zero"])
def test_pseudo_inverse_reproduces_measurements(name):
    operator = example(name)
    y = operator.apply(batch(operator))
    torch.testing.assert_close(operator.apply(operator.pseudo_inverse(y)), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_shift_per_sample(name):
    operator = example(name)
    y = operator.apply(batch(operator))
    shifts = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)[: len(y)]
    together = operator.solve_gram(y, shifts.reshape(-1, 1, 1, 1))
    for i, shift in enumerate(shifts.tolist()):
        own = operator.select(torch.tensor([i]))
        torch.testing.assert_close(together[i : i + 1], own.solve_gram(y[i : i + 1], shift), rtol=1e-4, atol=1e-5)


def test_wrong_adjoint_is_detected():
    class Wrong(Downsampling):
        def adjoint(self, y):
            return super().adjoint(y) * self.factor**2

    with pytest.raises(ValueError, match=r"Wrong.adjoint is not the adjoint"):
        Wrong(2, SHAPE).check_adjoint()

    class Shifted(GaussianBlur):
        def adjoint(self, y):
            return self.apply(y).roll(1, -1)

    with pytest.raises(ValueError, match=r"Shifted.adjoint"):
        Shifted(1.0, SHAPE, boundary="circular").check_adjoint()
    with pytest.raises(ValueError, match="adjoint"):
        LinearMap(lambda x: x.cumsum(-1), SHAPE, adjoint=lambda y: y.cumsum(-1))
    with pytest.raises(ValueError, match="must return shape"):
        LinearMap(lambda x: x[..., :2], SHAPE, adjoint=lambda y: y)
    with pytest.raises(ValueError, match="not linear"):
        LinearMap(lambda x: x + 1.0, SHAPE)


def test_the_papers_colour_basis():
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(Grayscale(SHAPE).apply(x)[:, 0], x.sum(1) / math.sqrt(3))
    # Grey images are reproduced by the pseudo-inverse, whatever the weights.
    grey = x[:, :1].expand(-1, 3, -1, -1)
    for operator in (Grayscale(SHAPE), ChannelMixture([[1.0, 1.0, 1.0]], SHAPE)):
        torch.testing.assert_close(operator.pseudo_inverse(operator.apply(grey)), grey)


@pytest.mark.parametrize("boundary", ["reflect", "circular"])
def test_blur_keeps_constants_and_mass(boundary):
    operator = GaussianBlur(1.3, SHAPE, boundary=boundary)
    ones = torch.ones(1, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(operator.apply(ones), ones)
    x = batch(operator)
    torch.testing.assert_close(operator.apply(x).sum((1, 2, 3)), x.sum((1, 2, 3)))


def test_blur_of_a_point_is_the_kernel():
    x = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    x[..., 16, 16] = 1.0
    y = GaussianBlur(2.0, (1, 33, 33)).apply(x)
    weights = torch.exp(-0.5 * (torch.arange(-8, 9, dtype=torch.float64) / 2.0) ** 2)
    kernel = weights / weights.sum()
    torch.testing.assert_close(y[0, 0, 16, 8:25], kernel * kernel[8])
    assert float(y[0, 0, 16, :8].abs().max()) == 0.0


def test_measurement_noise():
    operator = Mask(random_mask(40, 50), (3, 40, 50))
    x = torch.zeros(4, 3, 40, 50)
    y = operator.measure(x, 0.3, torch.Generator().manual_seed(0))
    known = operator.mask.expand_as(y)
    assert abs(float(y[known].std()) - 0.3) < 0.01 and float(y[~known].abs().max()) == 0.0
    assert torch.equal(operator.measurements(y), known.flatten(1).sum(1).float())
    with pytest.raises(ValueError, match="noise_std"):
        operator.measure(x, -0.1)


def test_masks_ignore_what_was_not_measured():
    operator = example("mask")
    x = batch(operator)
    y = torch.where(operator.mask, operator.apply(x), math.nan)
    assert float(operator.residual(y, x).abs().max()) == 0.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mask(torch.full((8, 6), 0.5), SHAPE), "only 0 and 1"),
        (lambda: Mask(torch.ones(6, 8), SHAPE), "same height and width"),
        (lambda: Mask(torch.ones(1, 2, 3, 8, 6), SHAPE), "broadcast"),
        (lambda: Downsampling(5, SHAPE), "factor"),
        (lambda: Downsampling(0, SHAPE), "factor"),
        (lambda: Downsampling(2, (8,)), "data_shape"),
        (lambda: GaussianBlur(0.0, SHAPE), "std"),
        (lambda: GaussianBlur(1.0, SHAPE, boundary="wrap"), "boundary"),
        (lambda: GaussianBlur(1.0, (8, 6)), "data_shape"),
        (lambda: ChannelMixture([[1.0, 1.0]], SHAPE), "weights"),
        (lambda: Downsampling(1, (0, 2, 2)), "data_shape"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_conjugate_gradients_stops_each_sample_by_itself():
    matrices = torch.stack([torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0] * 4, [1.0, 2, 3, 4])])
    b = torch.tensor([[1.0, 2, 3, 4], [0.0, 0, 0, 0]], dtype=torch.float64)
    for right in (b, b.flip(0), torch.ones_like(b)):
        x = conjugate_gradients(lambda v: torch.einsum("bij,bj->bi", matrices, v), right, 4)
        torch.testing.assert_close(torch.einsum("bij,bj->bi", matrices, x), right)


def test_an_operator_is_one_class():
    class Flip(LinearOperator):
        def apply(self, x):
            return 2.0 * x.flip(-1)

        def adjoint(self, y):
            return 2.0 * y.flip(-1)

    operator = Flip(SHAPE)
    operator.check_adjoint()
    x = batch(operator)
    torch.testing.assert_close(operator.pseudo_inverse(operator.apply(x)), x)
    torch.testing.assert_close(operator.solve_gram(x, 1.0), x / 5.0)
