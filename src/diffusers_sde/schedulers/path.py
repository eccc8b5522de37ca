"""The path that an SDE scheduler describes: its marginals, and what a network on it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..guidance.temperature import rescale_temperature
from ..networks.conditioning import TimeConditioning
from ..networks.denoisers import Denoiser, network_denoiser
from ..networks.parametrizations import Parametrization
from ..sdes import SDE, expand_like
from .configured import ConfiguredScheduler


class PathScheduler(ConfiguredScheduler):
    """A scheduler on the path of an SDE, for training and editing."""

    sde: SDE
    parametrization: Parametrization
    conditioning: TimeConditioning
    timesteps: Tensor
    _clips: bool
    _data_range: list[float]

    def sde_time(self, timestep: float | Tensor) -> Tensor:
        """SDE time at which the network is fed ``timestep``, same shape.

        With it an exact score can stand in for a network: at ``timestep`` it is grad log p_t, t = sde_time(timestep).
        """
        return self.conditioning.time(self.sde, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """Draw from the marginal: alpha(t) x_0 + sigma(t) noise.

        Args:
            original_samples: x_0, shape (B, ...).
            noise: Unit noise of the same shape.
            timesteps: Network timesteps, shape (B,) or ().

        Raises:
            ValueError: A timestep at which the path does not exist.
        """
        alpha, sigma = self._marginal(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: float | Sequence[float] | Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` under the name and argument order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """The target of a network with ``v_prediction``: alpha(t) noise - sigma(t) x_0, on any path.

        Args:
            sample: x_0, shape (B, ...).
            noise: Unit noise of the same shape.
            timesteps: Network timesteps, shape (B,) or ().

        Raises:
            ValueError: A timestep at which the path does not exist.
        """
        alpha, sigma = self._marginal(timesteps, sample)
        return alpha * noise - sigma * sample

    def _marginal(self, timesteps: float | Sequence[float] | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at network timesteps, shaped to be multiplied with ``like``."""
        fed = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps, dtype=torch.float32)
        t = self.sde_time(fed.to(like.device))
        # Entries of ``timesteps`` are right. Others are checked, for which the host waits if they are on a device.
        own = fed.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
        if not own and not torch.compiler.is_compiling():
            t_max, seen = self.sde.t_max, self.sde_time(fed)
            # A pipeline may have cast them to half precision; index -1 of a table would be the data.
            slack = 5e-3 if fed.dtype in (torch.float16, torch.bfloat16) else 1e-5
            first = 1.0 / self.config.num_train_timesteps if self.conditioning.name == "discrete" else 0.0
            if not bool(((seen >= (first - slack) * t_max) & (seen <= (1.0 + slack) * t_max)).all()):
                low, high = (float(self.conditioning.timestep(self.sde, u * t_max)) for u in (first, 1.0))
                raise ValueError(f"timesteps must lie between {low:g} and {high:g}, got {fed.tolist()}.")
            t = t.clamp(first * t_max, t_max)
        alpha, sigma = (expand_like(v, like).to(like) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        return alpha, sigma

    def denoiser(self, network: Callable[..., Any], **kwargs: Any) -> Callable[[Tensor, Tensor | float], Tensor]:
        """(x_t, SDE time) -> x0_hat for a network that this scheduler describes; see ``network_denoiser``."""
        return network_denoiser(network, self.sde, self.parametrization, self.conditioning, **kwargs)

    def tempered(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose samples have the config's ``temperature``; at 1, ``denoiser`` itself.

        ``step`` does the same with what the network returns. ``denoiser`` of this class is at temperature 1.
        """
        return rescale_temperature(denoiser, self.sde, self.config.temperature, self._temperature_std)

    @property
    def _temperature_std(self) -> float:
        known = (self.config.temperature_std, self.config.data_std, self.config.sigma_data)
        return float(next(std for std in known if std is not None))

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.sde.log_snr(t))

    def bounded(self, x0_hat: Tensor, t: Tensor | float) -> Tensor:
        """x0_hat at an SDE time as predictors take it: within the bounds that the config states."""
        threshold = self.config.bound_above_sigma
        ratio = self._noise_to_signal(torch.as_tensor(t).detach())
        return self._clipped(x0_hat, threshold is not None and float(ratio) > threshold)

    @property
    def bounds_estimates(self) -> bool:
        """Whether the config states any bounds of x0_hat."""
        return bool(self._clips) or self.config.bound_above_sigma is not None

    def _clipped(self, x0_hat: Tensor, at_high_noise: bool) -> Tensor:
        config = self.config
        if config.get("thresholding", False):
            # Per sample, in the order of Saharia et al. 2022, section 2.3: clip at the quantile, then divide by it.
            quantile = torch.quantile(x0_hat.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
            limit = expand_like(quantile.clamp(1.0, config.sample_max_value), x0_hat)
            x0_hat = torch.clamp(x0_hat, -limit, limit) / limit
        elif config.clip_sample:
            x0_hat = x0_hat.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0_hat.clamp(*self._data_range) if at_high_noise else x0_hat

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
