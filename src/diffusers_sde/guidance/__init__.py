"""Conditional denoisers by Bayes' rule: grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x).

With Tweedie's formula, x0_hat = (x_t + sigma^2 score) / alpha, this reads

    E[x_0 | x_t, y] = E[x_0 | x_t] + (sigma^2 / alpha) grad log p_t(y | x_t),

so guidance turns a denoiser into another denoiser, and predictor-corrector sampling, the ODE and the likelihood take
the new one like any other (Song et al. 2021, eq. 14 and appendix I). Where alpha vanishes, both factors are taken at
the time where sigma / alpha = 1000.

Linear measurements y = A x_0 + noise have p_t(y | x_t) = E[N(y; A x_0, noise_std^2 I) | x_t], which every method
approximates by a Gaussian of its own. With r = y - A x0_hat, J = d x0_hat / d x_t and S = noise_std^2 I they shift
x0_hat by

    dps       scale sqrt(m) sigma J^T A^T r / |r|, m the number of measurements;
    psld      the same through a decoder, with a term for latents that encoding gives back;
    pigdm     (sigma^2/alpha) J^T A^T (v A A^T + S)^-1 r,  v = 1 / (1/data_std^2 + alpha^2/sigma^2);
    mmps      V A^T (A V A^T + S)^-1 r with V = (sigma^2/alpha) J, the true covariance of x_0 given x_t;
    gaussian  the same with V of Gaussian data with a given covariance.

Beside one call of the denoiser, ``dps`` and ``pigdm`` cost one backward pass, ``mmps`` costs one for each iteration of
its solver and one more, and ``gaussian`` costs nothing.

A method is one frozen dataclass, whose fields are its options, and one line in ``POSTERIOR_METHODS``. A
``GuidingMethod`` maps (denoiser, sde, operator, y, noise_std) to the guided denoiser. ``SMC`` corrects the
approximation with weighted particles, which it moves by itself. Replacement and resampling move the sample and not its
estimate, so they are ways to execute a plan: ``Replacement`` and ``resampled``.

Measurements of images whose latents are drawn, y = A D(x_0) + noise with a decoder D, are a ``DecodedOperator``, which
the methods see linearised around their estimate; ``gaussian`` alone does not take it.

``rescale_temperature`` knows no y: it makes samples more typical or more diverse, by a factor on the score.

A backward pass keeps the activations of the network in memory for the whole batch. ``chunk_size`` limits this to so
many samples at a time, and costs one more forward pass per backward pass.
"""

from .classes import classifier_free_guidance, classifier_guidance, guide_within
from .decoding import DecodedOperator
from .methods import GuidingMethod, PosteriorMethod, PosteriorProblem, PosteriorRun
from .operators import ChannelMixture, Downsampling, GaussianBlur, Grayscale, LinearMap, LinearOperator, Mask
from .particles import SMC, Particles
from .posteriors import (
    DPS,
    MMPS,
    POSTERIOR_METHODS,
    PSLD,
    GaussianPosterior,
    PiGDM,
    posterior_denoiser,
    posterior_method,
)
from .replacement import Replacement, renoise, resampled
from .temperature import rescale_temperature

__all__ = [
    "DPS",
    "MMPS",
    "POSTERIOR_METHODS",
    "PSLD",
    "SMC",
    "ChannelMixture",
    "DecodedOperator",
    "Downsampling",
    "GaussianBlur",
    "GaussianPosterior",
    "Grayscale",
    "GuidingMethod",
    "LinearMap",
    "LinearOperator",
    "Mask",
    "Particles",
    "PiGDM",
    "PosteriorMethod",
    "PosteriorProblem",
    "PosteriorRun",
    "Replacement",
    "classifier_free_guidance",
    "classifier_guidance",
    "guide_within",
    "posterior_denoiser",
    "posterior_method",
    "renoise",
    "resampled",
    "rescale_temperature",
]
