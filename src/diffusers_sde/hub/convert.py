"""Pipelines of this package from models that others have saved.

* **Stock repositories** of diffusers with one ``UNet2DModel`` on pixels (``DDPMPipeline``, ``DDIMPipeline``,
  ``PNDMPipeline``, ``ScoreSdeVePipeline``): the network is the same, the scheduler's config is translated.
* **Checkpoints of score_sde_pytorch** (``.pth``) of its ``ddpm`` network, trained on a VP or sub-VP SDE: the weights
  are renamed, and the result is the same function.

Not converted: NCSN++ and DDPM++ (``ncsnpp``), whose blocks scale their sums and resample by FIR filters; NCSN and
NCSNv2; and VE checkpoints of ``ddpm``, which rescale their input and are told the index of a noise level. diffusers'
own repositories google/ncsnpp-* hold NCSN++ as a ``UNet2DModel``; those are stock repositories.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor

from ..basics.files import check_folder, saving, write_folder_whole
from ..basics.options import CheckedOptions, option
from ..pipelines import SDEPipeline
from ..schedulers import SCHEDULERS, SDEScheduler, SubVPSDEScheduler, VPSDEScheduler
from ..schedulers.conversion import fitting_class, with_stock_defaults
from ..shipping.flattening import LIBRARY

State = dict[str, Tensor]
CHECKPOINT_SDES = ("vp", "sub_vp")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(CheckedOptions):
    """What to convert; each field is the option of ``scripts/convert.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    source: str = option(MISSING, "Repository user/name, its folder, or a .pth checkpoint.")
    output_dir: str = option(MISSING, "Where the pipeline goes.")
    image_size: int | None = option(None, "Side of the images. Only checkpoints take it, and need it.", least=1)
    sde: str = option("vp", "SDE of a checkpoint.", choices=CHECKPOINT_SDES)
    discrete: bool = option(False, "The checkpoint was trained on DDPM's table instead of continuous time.")
    use_ema: bool = option(True, "Take the averaged weights of a checkpoint.")


def convert(config: ConvertConfig) -> None:
    """Convert a repository or a checkpoint, and save the pipeline: all of it or nothing.

    Raises:
        ValueError: Something that is not converted, and what to do with it; or a checkpoint without ``image_size``.
        OSError: There is no such repository or file, or the folder cannot be written.
    """
    folder = Path(config.output_dir)
    check_folder(folder)
    if Path(config.source).is_file():
        if config.image_size is None:
            raise ValueError("image_size is needed: a checkpoint does not say how large its images are.")
        pipe = convert_checkpoint(config.source, config.image_size, config.sde, config.discrete, config.use_ema)
    else:
        pipe = convert_repository(config.source)
    with saving("The pipeline", folder):
        write_folder_whole(folder, folder / ".unfinished-pipeline", lambda place: pipe.save_pretrained(str(place)))


def convert_repository(name: str, token: str | None = None) -> SDEPipeline:
    """A stock repository, on the Hub or in a folder, as an ``SDEPipeline``.

    Legacy ``ScoreSdeVePipeline`` repositories keep their sampler, with step sizes from each image's own norms;
    ``langevin_norm="batch"`` is the old behaviour.

    Args:
        name: ``user/name``, or the folder.
        token: Access token, which private repositories need.

    Raises:
        ValueError: Another kind of model, and what to do with it.
        OSError: There is no such repository.
    """
    index = DiffusionPipeline.load_config(name, token=token)
    parts = sorted(key for key, value in index.items() if isinstance(value, list) and key[0] != "_")
    if parts != ["scheduler", "unet"] or index["unet"][-1] != "UNet2DModel":
        raise ValueError(
            f"{name!r} is a {index.get('_class_name')} with {', '.join(parts)}: only pipelines of one UNet2DModel and "
            "a scheduler are converted. Keep it, and assign its scheduler: pipe.scheduler = "
            "VPSDEScheduler.from_config(pipe.scheduler.config)."
        )
    if index["scheduler"][0] == LIBRARY:
        raise ValueError(f"{name!r} has a scheduler of this package already: load it as it is.")
    config = VPSDEScheduler.load_config(name, subfolder="scheduler", token=token)
    try:
        scheduler = SCHEDULERS[fitting_class(with_stock_defaults(config))].from_config(config)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    try:
        unet = UNet2DModel.from_pretrained(name, subfolder="unet", token=token)
    except (ValueError, OSError):
        raise
    except Exception as error:  # diffusers checks no types: whatever a wrong one leads to
        raise ValueError(f"{name!r}: its network cannot be loaded: {error}") from error
    return SDEPipeline(unet, scheduler, data_min=0.0 if index.get("_class_name") == "ScoreSdeVePipeline" else -1.0)


def convert_checkpoint(
    path: str | Path,
    image_size: int,
    sde: str = "vp",
    discrete: bool = False,
    use_ema: bool = True,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
) -> SDEPipeline:
    """A checkpoint of score_sde_pytorch's ``ddpm`` network as an ``SDEPipeline``.

    The official upward path attends once per resolution, behind its blocks, diffusers' after each: the others get zero
    weights, with which an attention block returns its input.

    Args:
        path: The ``.pth`` file.
        image_size: Side of the images in pixels, which the file does not say.
        sde: The SDE that it was trained on, ``vp`` or ``sub_vp``.
        discrete: Whether it was trained on DDPM's table instead of continuous time.
        use_ema: Take the averaged weights.
        beta_min: beta(0) of the SDE, for 1000 noise scales.
        beta_max: beta(1) of the SDE.

    Raises:
        ValueError: Not such a file, or another network; the message says what was found.
    """
    if sde not in CHECKPOINT_SDES:
        raise ValueError(
            f"sde must be one of {', '.join(CHECKPOINT_SDES)}, got {sde!r}: VE checkpoints of score_sde are told the "
            "index of a noise level, which no scheduler here does."
        )
    if discrete and sde != "vp":
        raise ValueError("discrete is a table of the vp SDE.")
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise ValueError(f"image_size must be an integer at least 1, got {image_size!r}.")
    state = _read(Path(path), use_ema)
    try:
        unet = _unet(state, image_size)
    except ValueError:
        raise
    except Exception as error:  # shapes that no such network has lead to anything
        raise ValueError(f"{str(path)!r} does not hold score_sde's ddpm network: {error}") from error
    betas: dict[str, Any] = {"beta_start": beta_min / 1000, "beta_end": beta_max / 1000}
    scheduler: SDEScheduler
    if sde == "sub_vp":
        scheduler = SubVPSDEScheduler(time_conditioning="score_sde", **betas)
    elif discrete:
        scheduler = VPSDEScheduler(**betas)
    else:
        scheduler = VPSDEScheduler(continuous=True, time_conditioning="score_sde", **betas)
    return SDEPipeline(unet, scheduler)


def _read(path: Path, use_ema: bool) -> State:
    """The network's parameters by name."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{str(path)!r} is damaged, or holds more than tensors and numbers.") from error
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not model:
        raise ValueError(f"{str(path)!r} is no checkpoint of score_sde_pytorch: it has no 'model'.")
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{str(path)!r} is no checkpoint of score_sde_pytorch: its 'model' has {key!r}, a "
                f"{type(value).__name__}, where names and tensors are needed."
            )
    state = {key.removeprefix("module."): value for key, value in model.items()}
    state.pop("sigmas", None)
    if not use_ema:
        return state
    ema = saved.get("ema")
    averaged = ema.get("shadow_params") if isinstance(ema, dict) else None
    if (
        not isinstance(averaged, (list, tuple))
        or not all(isinstance(p, Tensor) for p in averaged)
        or [tuple(p.shape) for p in averaged] != [tuple(p.shape) for p in state.values()]
    ):
        raise ValueError(f"{str(path)!r}: its averaged weights do not fit its network; try use_ema=False.")
    return dict(zip(state, averaged, strict=True))


# ---------------------------------------------------------------------- the network


def _unet(state: State, image_size: int) -> UNet2DModel:
    modules: dict[int, State] = {}
    for key, value in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if match is None:
            raise ValueError(f"the checkpoint has a parameter {key!r}, which score_sde's ddpm network has not.")
        modules.setdefault(int(match[1]), {})[match[2]] = value
    kinds = {number: _kind(module) for number, module in modules.items()}
    order = sorted(modules)
    if order != list(range(len(order))) or "unknown" in kinds.values():
        strange = next((sorted(modules[n]) for n in order if kinds[n] == "unknown"), "modules without parameters")
        raise ValueError(
            f"the checkpoint is not of score_sde's ddpm network (found: {strange}). NCSN++ and DDPM++ are other "
            "networks, which are not converted."
        )
    resamplings = [n for n in order if kinds[n] == "resample"]
    if not resamplings or len(resamplings) % 2 or [kinds[n] for n in order[:3]] != ["linear", "linear", "conv"]:
        raise ValueError(f"the checkpoint is not of score_sde's ddpm network: its modules are {list(kinds.values())}.")
    levels = 1 + len(resamplings) // 2
    layers = sum(kinds[n] == "resnet" for n in range(resamplings[0]))
    new: State = {}
    position = 0

    def take(kind: str, name: str) -> None:
        """The next module, which must be of this kind, under diffusers' name."""
        nonlocal position
        if kinds.get(position) != kind:
            raise ValueError(
                f"the checkpoint is not of score_sde's ddpm network: module {position} is a {kinds.get(position)}, not "
                f"a {kind}."
            )
        new.update({f"{name}.{key}": value for key, value in _renamed(kind, modules[position])})
        position += 1

    take("linear", "time_embedding.linear_1")
    take("linear", "time_embedding.linear_2")
    take("conv", "conv_in")
    channels, attends = [], []
    for i in range(levels):
        block = f"down_blocks.{i}"
        attends.append(kinds.get(position + 1) == "attention")
        for j in range(layers):
            take("resnet", f"{block}.resnets.{j}")
            if attends[i]:
                take("attention", f"{block}.attentions.{j}")
        channels.append(len(new[f"{block}.resnets.0.conv1.bias"]))
        if i < levels - 1:
            take("resample", f"{block}.downsamplers.0")
    take("resnet", "mid_block.resnets.0")
    take("attention", "mid_block.attentions.0")
    take("resnet", "mid_block.resnets.1")
    for i in range(levels):
        block, level = f"up_blocks.{i}", levels - 1 - i
        for j in range(layers + 1):
            take("resnet", f"{block}.resnets.{j}")
        if attends[level]:
            take("attention", f"{block}.attentions.{layers}")
            last = f"{block}.attentions.{layers}."
            for key in [key for key in new if key.startswith(last)]:
                for j in range(layers):
                    new[key.replace(last, f"{block}.attentions.{j}.")] = torch.zeros_like(new[key])
        if level > 0:
            take("resample", f"{block}.upsamplers.0")
    take("norm", "conv_norm_out")
    take("conv", "conv_out")

    unet = UNet2DModel(
        sample_size=image_size,
        in_channels=new["conv_in.weight"].shape[1],
        out_channels=new["conv_out.weight"].shape[0],
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
    )
    try:
        unet.load_state_dict(new)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's shapes are not those of score_sde's ddpm network: {error}") from error
    return unet.eval()


def _kind(module: Mapping[str, Tensor]) -> str:
    keys = set(module)
    if keys == {"weight", "bias"}:
        return {1: "norm", 2: "linear", 4: "conv"}.get(module["weight"].ndim, "unknown")
    pair = {"weight", "bias"}
    if keys == {f"Conv_0.{p}" for p in pair}:
        return "resample"
    if keys == {f"GroupNorm_0.{p}" for p in pair} | {f"NIN_{n}.{p}" for n in range(4) for p in "Wb"}:
        return "attention"
    resnet = {f"{name}.{p}" for name in ("GroupNorm_0", "GroupNorm_1", "Conv_0", "Conv_1", "Dense_0") for p in pair}
    return "resnet" if keys in (resnet, resnet | {"NIN_0.W", "NIN_0.b"}) else "unknown"


NAMES = {
    "resnet": {
        "GroupNorm_0": "norm1",
        "Conv_0": "conv1",
        "Dense_0": "time_emb_proj",
        "GroupNorm_1": "norm2",
        "Conv_1": "conv2",
        "NIN_0": "conv_shortcut",
    },
    "attention": {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"},
    "resample": {"Conv_0": "conv"},
}


def _renamed(kind: str, module: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in module.items():
        name, _, parameter = key.rpartition(".")
        if parameter == "W":  # a linear map of channels, (in, out)
            value = value.T[..., None, None] if kind == "resnet" else value.T
        parameter = {"W": "weight", "b": "bias"}.get(parameter, parameter)
        yield (f"{NAMES[kind][name]}.{parameter}" if name else parameter), value.contiguous()
