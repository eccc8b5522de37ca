"""Weights of Adams methods against textbooks and polynomials."""

import numpy as np
import pytest

from diffusers_sde.flow.adams import adams_weights


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_adams_weights_integrate_polynomials_exactly(count):
    nodes = np.array([[1.0, 0.0, -0.7, -1.1, -2.9, -4.0], [1.0, 0.0, -300.0, -500.0, -800.0, -900.0]])
    weights = adams_weights(nodes, np.full(2, count))
    assert (weights[:, count:] == 0).all()
    for power in range(count):
        terms = weights * nodes**power
        assert (np.abs(terms.sum(1) - 1 / (power + 1)) < 1e-12 * np.abs(terms).sum(1) + 1e-12).all()


def test_uniform_steps_give_the_textbook_adams_bashforth_and_moulton_weights():
    back = adams_weights(np.array([[0.0, -1.0, -2.0, -3.0]]), np.array([4]))
    np.testing.assert_allclose(back[0], np.array([55, -59, 37, -9]) / 24, rtol=1e-12)
    with_new = adams_weights(np.array([[1.0, 0.0, -1.0, -2.0]]), np.array([4]))
    np.testing.assert_allclose(with_new[0], np.array([9, 19, -5, 1]) / 24, rtol=1e-12)
