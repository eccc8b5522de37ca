"""A mixture with classes, and the exact classifier of its noisy data."""

import torch
from analytic import GaussianMixture
from posteriors import (
    MIXTURE,
)

from diffusers_sde import VESDE, VPSDE, CosineSDE, RectifiedFlowSDE, SubVPSDE

SDES = {
    "ve": VESDE(0.001, 30.0),
    "vp": VPSDE(),
    "sub_vp": SubVPSDE(),
    "flow": RectifiedFlowSDE(),
    "cosine": CosineSDE(),
}


CLASS = 1


COMPONENT = GaussianMixture.gaussian(MIXTURE.means[CLASS], MIXTURE.covariances[CLASS])


def log_classifier(sde):
    """Exact log p_t(component CLASS | x_t), differentiable."""

    def log_prob(x, t):
        logits = MIXTURE._components(x, sde.alpha(t), sde.sigma(t))[-1]
        return torch.log_softmax(logits, 1)[:, CLASS]

    return log_prob
