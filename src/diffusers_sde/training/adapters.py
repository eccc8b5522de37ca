"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), by peft: few weights are trained beside frozen ones.

A layer W x becomes W x + (alpha/r) B A x, where A and B have rank r, and B begins at zero. What is trained, averaged
and kept in checkpoints are A and B alone. A finished pipeline has the sum in place of W, so that it loads without peft;
the adapter lies beside it in peft's format.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..basics.options import CheckedOptions, option

ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME, _PART, _FROZEN = "default", ".lora_", ".base_layer."


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(CheckedOptions):
    """Whether a low-rank adapter is trained instead of all weights."""

    lora_rank: int | None = option(
        None,
        "Train a LoRA adapter of this rank, beside the frozen weights of a trained network; needs peft. The pipeline "
        "is saved with the adapter merged into its weights, and the adapter by itself in the folder adapter, which "
        "peft.PeftModel.from_pretrained adds to the original network.",
        least=1,
    )
    lora_alpha: float | None = option(
        None, "Scale of the adapter times its rank. Default: lora_rank, which is scale 1.", above=0.0
    )
    lora_target_modules: tuple[str, ...] | None = option(
        None,
        "Layers that get the adapter, by the ends of their names, such as to_q to_v. Default: every linear and every "
        "convolutional layer in which it has fewer weights than the layer itself.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [name for name in ("lora_alpha", "lora_target_modules") if getattr(self, name) is not None]
        if idle and self.lora_rank is None:
            raise ValueError(f"{' and '.join(idle)} must be None without lora_rank.")
        if self.lora_rank is not None and importlib.util.find_spec("peft") is None:
            raise ValueError("lora_rank needs peft: pip install 'diffusers-sde[lora]'.")


def worthwhile_layers(network: nn.Module, rank: int) -> list[str]:
    """Names of the linear and convolutional layers in which an adapter of this rank saves weights."""
    names = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
            rows, columns = module.weight.flatten(1).shape
            if rank * (rows + columns) < rows * columns:
                names.append(name)
    return names


def add_adapter(network: nn.Module, options: AdapterOptions, seed: int) -> None:
    """Put the adapter into a network, if the options ask for one, and freeze all other weights.

    Args:
        network: The network, which is changed.
        options: Rank, scale and layers.
        seed: Seed of the weights of A.

    Raises:
        ValueError: There are no such layers.
    """
    if options.lora_rank is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    targets = options.lora_target_modules or worthwhile_layers(network, options.lora_rank)
    if not targets:
        raise ValueError(
            f"lora_rank {options.lora_rank} leaves no layer of this network in which an adapter has fewer weights than "
            "the layer: choose a smaller one, or name lora_target_modules."
        )
    alpha: Any = options.lora_rank if options.lora_alpha is None else options.lora_alpha
    config = LoraConfig(r=options.lora_rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network, _NAME)
        except ValueError as error:
            raise ValueError(f"lora_target_modules {list(targets)!r} do not fit this network: {error}") from error


def has_adapter(network: nn.Module) -> bool:
    """Whether ``add_adapter`` has put an adapter into a network."""
    return hasattr(network, "peft_config")


def describe_adapter(network: nn.Module) -> str:
    """The adapter of a network in words, for the log."""
    config: Any = network.peft_config[_NAME]  # type: ignore[index]
    count, layers = sum(p.numel() for p in trained_parameters(network)), len(_adapted_layers(network))
    return (
        f"LoRA of rank {config.r}, alpha {config.lora_alpha:g}, in {layers} layers, {count / 1e6:.3f} million weights"
    )


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: those of the adapter, or all of a network without one."""
    if not has_adapter(network):
        return list(network.parameters())
    return [parameter for name, parameter in network.named_parameters() if _PART in name]


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has of a network: the adapter, or the whole state of a network without one."""
    state = network.state_dict()
    return {k: v for k, v in state.items() if _PART in k} if has_adapter(network) else state


def keep_adapter_alone(accelerator: Accelerator, network: nn.Module) -> None:
    """Let accelerate save and load the adapter of a network without its frozen weights; nothing without an adapter."""
    if not has_adapter(network):
        return

    def select(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights[:] = [{k: v for k, v in each.items() if _PART in k} for each in weights]

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()  # accelerate is to load none
        network.load_state_dict(load_file(Path(folder) / SAFE_WEIGHTS_NAME), strict=False)

    accelerator.register_save_state_pre_hook(select)
    accelerator.register_load_state_pre_hook(load)


@contextmanager
def without_adapter(network: nn.Module) -> Iterator[None]:
    """The network as it was before ``add_adapter``, for a while."""
    layers = _adapted_layers(network)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


@torch.no_grad()
def merged(network: Any) -> Any:
    """A copy of a diffusers model with W + (alpha/r) B A in place of W; the model itself if it has no adapter."""
    if not has_adapter(network):
        return network
    weights = {k.replace(_FROZEN, "."): v for k, v in network.state_dict().items() if _PART not in k}
    for name, layer in _adapted_layers(network).items():
        weights[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight(_NAME)
    whole = type(network).from_config(network.config)
    whole.load_state_dict(weights)
    return whole.to(device=network.device, dtype=network.dtype).eval()


def save_adapter(network: Any, folder: Path) -> None:
    """Save the adapter of a network in peft's format; nothing for a network without one."""
    if not has_adapter(network):
        return
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    network.peft_config[_NAME].save_pretrained(str(folder))
    weights = get_peft_model_state_dict(network, adapter_name=_NAME)
    own = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(own, folder / ADAPTER_FILES[1], metadata={"format": "pt"})


def adapter_identity(options: AdapterOptions, base: str | None) -> dict[str, Any]:
    """What a checkpoint of an adapter must have in common with the run that continues it; empty without one.

    Args:
        options: The options of the run.
        base: A fingerprint of the frozen weights, which are not in the checkpoint.
    """
    if options.lora_rank is None:
        return {}
    alpha = options.lora_rank if options.lora_alpha is None else options.lora_alpha
    return {
        "lora_rank": options.lora_rank,
        "lora_alpha": float(alpha),
        "lora_target_modules": options.lora_target_modules,
        "frozen_weights": base,
    }


def _adapted_layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
