"""Pipelines of this package from models that others have saved.

* **Stock repositories** of diffusers with one ``UNet2DModel`` on pixels (``DDPMPipeline``, ``DDIMPipeline``,
  ``PNDMPipeline``, ``ScoreSdeVePipeline``): the network is the same, the scheduler's config is translated.
* **Checkpoints of score_sde_pytorch** (``.pth``): the weights are renamed, and the result is the same function. Its
  ``ddpm`` network, trained on a VP or sub-VP SDE, becomes a ``UNet2DModel``, which stock diffusers loads too; NCSN++,
  DDPM++ and the VE networks become an ``NCSNpp`` (see ``score_sde.py``).

Not converted: NCSN and NCSNv2. diffusers' own repositories google/ncsnpp-* hold NCSN++ as a ``UNet2DModel``; those are
stock repositories.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor

from ..basics.checks import check_choice
from ..basics.files import check_folder, saving, write_folder_whole
from ..basics.options import CheckedOptions, option
from ..networks.ncsnpp import PRESETS
from ..pipelines import SDEPipeline
from ..schedulers import SCHEDULERS, VPSDEScheduler
from ..schedulers.families import fitting_class
from ..schedulers.stock_configs import with_stock_defaults
from ..shipping.flattening import LIBRARY
from .score_sde import CHECKPOINT_SDES, convert_ncsnpp, is_ncsnpp, preset_setting, read_checkpoint, vp_scheduler

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(CheckedOptions):
    """What to convert; each field is the option of ``scripts/convert.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    source: str = option(MISSING, "Repository user/name, its folder, or a .pth checkpoint.")
    output_dir: str = option(MISSING, "Where the pipeline goes.")
    image_size: int | None = option(None, "Side of the images of a checkpoint without a preset.", least=1)
    sde: str = option("vp", "SDE of a checkpoint.", choices=CHECKPOINT_SDES)
    discrete: bool = option(False, "The checkpoint was trained on DDPM's table instead of continuous time.")
    use_ema: bool = option(True, "Take the averaged weights of a checkpoint.")
    preset: str | None = option(
        None,
        "Official configuration of a checkpoint, in place of its size and SDE.",
        choices=tuple(sorted(PRESETS)),
    )


def convert(config: ConvertConfig) -> None:
    """Convert a repository or a checkpoint, and save the pipeline: all of it or nothing.

    Raises:
        ValueError: Something that is not converted, and what to do with it; or a checkpoint without ``image_size``.
        OSError: There is no such repository or file, or the folder cannot be written.
    """
    folder = Path(config.output_dir)
    check_folder(folder)
    if Path(config.source).is_file():
        if config.image_size is None and config.preset is None:
            raise ValueError("image_size is needed: a checkpoint does not say how large its images are.")
        pipe = convert_checkpoint(
            config.source, config.image_size, config.sde, config.discrete, config.use_ema, preset=config.preset
        )
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
    image_size: int | None = None,
    sde: str = "vp",
    discrete: bool = False,
    use_ema: bool = True,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    preset: str | None = None,
) -> SDEPipeline:
    """A checkpoint of score_sde_pytorch's NCSN++, DDPM++ or ``ddpm`` network as an ``SDEPipeline``.

    The upward path of the official ``ddpm`` attends once per resolution, behind its blocks, diffusers' after each: the
    others get zero weights, with which an attention block returns its input.

    Args:
        path: The ``.pth`` file.
        image_size: Side of the images in pixels, which the file does not say; needed without a ``preset``.
        sde: ``vp``, ``sub_vp`` or ``ve``.
        discrete: Whether a VP network was trained on DDPM's table instead of continuous time; a VE network shows it.
        use_ema: Take the averaged weights.
        beta_min: Of a VP or sub-VP SDE, for 1000 noise scales.
        beta_max: Likewise.
        preset: Name of the official configuration, one of ``networks.ncsnpp.PRESETS``, such as
            ``ve/cifar10_ncsnpp_continuous``. It takes the place of ``image_size``, ``sde`` and ``discrete``, and of the
            few options of the network that leave no trace in the file and are otherwise those of its kind.

    Raises:
        ValueError: Not such a file, or another network; the message says what was found.
    """
    if preset is not None:
        image_size, sde, discrete = preset_setting(preset)
    check_choice("sde", sde, CHECKPOINT_SDES)
    if discrete and sde == "sub_vp":
        raise ValueError("discrete is a table of the vp SDE.")
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise ValueError(f"image_size must be an integer at least 1, got {image_size!r}.")
    state = read_checkpoint(path, use_ema)
    options = None if preset is None else PRESETS[preset]
    try:
        if options is not None or sde == "ve" or is_ncsnpp(state):
            return convert_ncsnpp(state, image_size, sde, discrete, beta_min, beta_max, options)
        state.pop("sigmas", None)
        return SDEPipeline(_unet(state, image_size), vp_scheduler(sde, discrete, beta_min, beta_max))
    except ValueError:
        raise
    except Exception as error:  # shapes that no such network has lead to anything
        raise ValueError(f"{str(path)!r} does not hold score_sde's ddpm network: {error}") from error


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
        raise ValueError(f"the checkpoint is not of score_sde's ddpm network (found: {strange}).")
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
