"""FSDP: every process keeps a part of the weights, of their average and of Adam's moments.

What leaves the training loop is whole: checkpoints have the files, names and shapes of a run that is not sharded, so
that either kind of run continues the other, on any number of processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import OPTIMIZER_NAME, SAFE_WEIGHTS_NAME, convert_outputs_to_fp32
from diffusers.models.embeddings import GaussianFourierProjection
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)


def check_launch(accelerator: Accelerator) -> None:
    """Make sure that training can shard as accelerate was launched to.

    Raises:
        ValueError: DeepSpeed, or FSDP 1.
    """
    kind, sharded = accelerator.distributed_type, is_sharded(accelerator)
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and not sharded:
        name = "FSDP 1" if kind == DistributedType.FSDP else "DeepSpeed"
        raise ValueError(
            f"accelerate was launched with {name}, which hides the single weights that averages and checkpoints are "
            "made of: use FSDP 2 (fsdp_version: 2, accelerate 1.6 or newer) or DDP, for example --config_file "
            "scripts/launch/fsdp.yaml or scripts/launch/ddp.yaml."
        )
    if not sharded and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        logger.warning(
            "FSDP was asked for, but accelerate shards on several GPUs (or other accelerators) only: this run on %d "
            "process(es) with device %s keeps the whole network in each.",
            accelerator.num_processes,
            accelerator.device.type,
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the network is divided among the processes, by FSDP 2."""
    return getattr(accelerator, "is_fsdp2", False)  # accelerate < 1.6 does not know it


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Any) -> Any:
    """``accelerator.prepare``: (network, optimizer). FSDP gets the precision of a run that is not sharded.

    Weights are kept in float32 and gathered in bf16 (or fp16) where that is the precision of training. Inputs are left
    alone, as under autocast: accelerate would round times to bf16 too, in which 1000 of them become 506.

    Raises:
        ValueError: Dropout and activation checkpointing, which accelerate lets draw other masks the second time.
    """
    if not is_sharded(accelerator):
        return accelerator.prepare(network, optimizer)
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing and any(isinstance(m, nn.Dropout) and m.p > 0.0 for m in network.modules()):
        raise ValueError(
            "fsdp_activation_checkpointing: true needs a network without dropout (dropout=0): accelerate computes the "
            "gradient with other dropout masks than the loss."
        )
    if plugin.mixed_precision_policy is not None:
        # Nor can the frequencies of Fourier embeddings be rounded: such networks are gathered in float32.
        fourier = any(isinstance(module, GaussianFourierProjection) for module in network.modules())
        changes = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
        changes |= {"param_dtype": None} if fourier else {}
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **changes)
    network, optimizer = accelerator.prepare(network, optimizer)
    network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))
    return network, optimizer


def compute_channels_last(accelerator: Accelerator, network: nn.Module) -> None:
    """Let a network compute in channels_last. FSDP's weights must stay contiguous: there the inputs are laid out so."""
    if not is_sharded(accelerator):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous(memory_format=torch.channels_last))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is sharded; then to be called on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The main process's ``tensor``, divided among the processes as ``pattern`` is; to be called on all of them."""
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements)


def gather(tensors: dict[Any, Any], keep: bool) -> dict[Any, Any]:
    """Whole tensors on the host, one after the other; empty where they are not kept. To be called on all processes."""
    gathered = {}
    for name, value in tensors.items():
        value = whole(value) if isinstance(value, Tensor) else value
        if keep:
            gathered[name] = value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
    return gathered


@torch.no_grad()
def copy_whole(sources: Iterable[Tensor], network: nn.Module) -> None:
    """Copy tensors that may be sharded to the parameters of a whole network; to be called on all processes."""
    for parameter, source in zip(network.parameters(), sources, strict=True):
        parameter.copy_(whole(source))


@torch.no_grad()
def copy_sharded(source: Tensor, target: Tensor) -> None:
    """Copy the main process's whole tensor to one that may be sharded; to be called on all processes."""
    target.copy_(_sharded_like(source, target))


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """``accelerator.save_state``, which under FSDP writes the files of a run that is not sharded."""
    if not is_sharded(accelerator):
        accelerator.save_state(str(folder))
        return
    (network,), (optimizer,), main = accelerator._models, accelerator._optimizers, accelerator.is_main_process
    weights, state = gather(network.state_dict(), main), optimizer.state_dict()
    state["state"] = {number: gather(moments, main) for number, moments in state["state"].items()}
    if main:
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        torch.save(state, folder / f"{OPTIMIZER_NAME}.bin")
    process, step = accelerator.process_index, accelerator.step
    save_accelerator_state(str(folder), [], [], [], [], process, step, accelerator.scaler)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """``accelerator.load_state``, which under FSDP reads the files of a run that is not sharded."""
    if not is_sharded(accelerator):
        accelerator.load_state(str(folder))
        return
    (network,), (optimizer,) = accelerator._models, accelerator._optimizers
    weights = load_file(folder / SAFE_WEIGHTS_NAME)
    for name, parameter in network.state_dict().items():
        copy_sharded(weights[name], parameter)
    state = torch.load(folder / f"{OPTIMIZER_NAME}.bin", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        state["state"][number] = {
            name: _sharded_like(value, parameter) if value.shape == parameter.shape else value  # not the step count
            for name, value in values.items()
        }
    optimizer.load_state_dict(state)
    load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler)
