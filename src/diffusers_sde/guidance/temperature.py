"""Samples at another temperature: the score is rescaled in time, which gives another denoiser.

Data N(m, c^2 I) have p_t = N(alpha m, (alpha^2 c^2 + sigma^2) I). At temperature T the data are N(m, T c^2 I), which is
p^(1/T) normalised, and their score at every time is that of p_t times

    r = (alpha^2 c^2 + sigma^2) / (T alpha^2 c^2 + sigma^2) = (snr c^2 + 1) / (snr c^2 / k + 1),

with snr = alpha^2 / sigma^2 and k = 1/T: this is temporal score rescaling (Xu et al. 2025, arXiv:2510.01184). With
Tweedie's formula, score = (alpha x0_hat - x_t) / sigma^2, it reads

    x0_hat' = r x0_hat + (1 - r) x_t / alpha,  (1 - r) / alpha = -(1 - T) alpha c^2 / (T alpha^2 c^2 + sigma^2),

which is bounded where alpha vanishes, since r is 1 there. For these data, the samples of every SDE and every convergent
sampler have variance T c^2. Their mean stays m: a factor changes the length of the score and not where it vanishes, so
that nobody has to tell what m is.

For other data r score is not the score of any diffused data. Three facts say what to expect then. Components of
standard deviation c that lie far apart keep their weights, because r is near 1 at the noise that separates them, and
each has variance T c^2; p^(1/T) would change the weights, too. Where components overlap, or T is far from 1, weights
move. And along a direction of variance v, the probability flow gives Gaussian data the variance

    v^b (T c^2)^(1 - b),  b = (v - c^2) / (v - T c^2),

which is T c^2 for v = c^2, nearly v for v >> c^2, and v (v / (T c^2))^(1/T - 1) for v << c^2: structure that is finer
than c is cooled by far more than T, and coarser structure hardly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..basics.checks import check_number
from ..networks.denoisers import Denoiser
from ..networks.parametrizations import Parametrization
from ..sdes import SDE, as_time, expand_like

HOTTEST = 1000.0


def temperature_coefficients(
    alpha: Tensor, sigma: Tensor, temperature: float, data_std: float
) -> tuple[Tensor, Tensor]:
    """(a, r) of x0_hat' = a x_t + r x0_hat, as at the head of this module; same shape as ``alpha`` and ``sigma``."""
    signal, noise = (alpha * data_std).square(), sigma.square()
    cooled = temperature * signal + noise
    return (temperature - 1.0) * alpha * data_std**2 / cooled, (signal + noise) / cooled


def rescale_temperature(denoiser: Denoiser, sde: SDE, temperature: float, data_std: float) -> Denoiser:
    """Return a denoiser whose samples have another temperature T; see the head of this module.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat; a guided one will do.
        sde: Its SDE.
        temperature: T = 1/k, the factor on the variance: below 1 samples are more typical and less diverse, above 1 the
            other way round. 1 returns ``denoiser`` itself.
        data_std: c, the standard deviation of the data, or of the structure in them that is to be cooled, in their own
            units.

    Raises:
        ValueError: ``temperature`` is not in (0, 1000], or ``data_std`` is not positive.
    """
    temperature = check_number("temperature", temperature, above=0.0, at_most=HOTTEST)
    data_std = check_number("data_std", data_std, above=0.0)
    if temperature == 1.0:
        return denoiser

    def denoise(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        time = as_time(t)
        coefficients = temperature_coefficients(sde.alpha(time), sde.sigma(time), temperature, data_std)
        of_x, of_estimate = (expand_like(c, x).to(x) for c in coefficients)
        return of_x * x + of_estimate * denoiser(x, t, **conditioning)

    return denoise


@dataclass(frozen=True)
class Tempered(Parametrization):
    """The parametrisation of a network whose samples are to have temperature T: x0_hat' as an affine map of x_t and F.

    Attributes:
        network: The parametrisation of the network itself.
        temperature: T, positive.
        data_std: c, the standard deviation of the data.
    """

    meaning: ClassVar[str] = "what it was trained for, read at another temperature"

    network: Parametrization
    temperature: float
    data_std: float

    @property
    def name(self) -> str:
        """The name of the network's own parametrisation."""
        return self.network.name

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a + r skip, r out), where x0_hat = skip x_t + out F and x0_hat' = a x_t + r x0_hat."""
        skip, out = self.network.coefficients(alpha, sigma)
        of_x, of_estimate = temperature_coefficients(alpha, sigma, self.temperature, self.data_std)
        return of_x + of_estimate * skip, of_estimate * out

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """That of the network."""
        return self.network.input_scale(alpha, sigma)
