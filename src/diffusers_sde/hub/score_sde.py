"""Checkpoints of score_sde_pytorch (``.pth``): what they hold, and its NCSN++, DDPM++ and VE networks as pipelines.

The official networks number their parts in the order in which they are called, whatever their kind, and a file says
neither the SDE nor the options of the network. So the options are read off the shapes, a network is built with them,
and every one of its parameters has to be in the file, with its name and shape, and nothing else. A few options leave no
trace in the shapes; for these the official configurations are followed, or a preset that the caller names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..basics.checks import check_choice
from ..networks.ncsnpp import PRESETS, NCSNpp
from ..networks.ncsnpp_blocks import AttentionBlock, CombinedImage, FourierFeatures, NormalizedConv, ResidualBlock
from ..networks.resampling import DoubledConv, HalvedConv
from ..pipelines import SDEPipeline
from ..schedulers import SDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

OfficialState = dict[str, Tensor]
CHECKPOINT_SDES = ("vp", "sub_vp", "ve")
# The official configurations choose the corrector's signal-to-noise ratio by data set, of which each has its size.
LANGEVIN_SNR = {32: 0.16, 64: 0.17, 256: 0.075, 1024: 0.15}
FREQUENCIES = "all_modules.0.W"


# ---------------------------------------------------------------------- the file


def read_checkpoint(path: str | Path, use_ema: bool = True) -> OfficialState:
    """The network's parameters by their official names, and its noise levels as ``sigmas`` if the file has them.

    The averaged weights are a list without names, in the order of the parameters that are trained: all of ``model``
    but for the noise levels and the frequencies of a Fourier embedding. Nothing but tensors, containers and numbers is
    ever unpickled; the optimiser's learning rate, which is a number of numpy, is the only thing beyond torch's own.

    Args:
        path: The ``.pth`` file.
        use_ema: Take the averaged weights.

    Raises:
        ValueError: Not such a file, a damaged one, or averaged weights that do not belong to the network.
        OSError: There is no such file.
    """
    path = Path(path)
    scalar = np.float64(0.0).__reduce__()[0]
    numpy_number: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype(np.float64))]
    try:
        with torch.serialization.safe_globals(numpy_number):
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
    if not use_ema:
        return state
    trained = [key for key in state if key not in ("sigmas", FREQUENCIES)]
    ema = saved.get("ema")
    averaged = ema.get("shadow_params") if isinstance(ema, dict) else None
    if (
        not isinstance(averaged, (list, tuple))
        or not all(isinstance(p, Tensor) for p in averaged)
        or [tuple(p.shape) for p in averaged] != [tuple(state[key].shape) for key in trained]
    ):
        raise ValueError(f"{str(path)!r}: its averaged weights do not fit its network; try use_ema=False.")
    return {**state, **dict(zip(trained, averaged, strict=True))}


# ---------------------------------------------------------------------- the pipeline


def is_ncsnpp(state: Mapping[str, Tensor]) -> bool:
    """Whether these are parameters of NCSN++ or DDPM++, and not of the ``ddpm`` network."""
    return any(key == FREQUENCIES or key.endswith((".Conv_2.weight", ".Conv2d_0.weight")) for key in state)


def preset_setting(preset: str) -> tuple[int, str, bool]:
    """Side of the images, SDE, and whether time is discrete, of an official configuration.

    Raises:
        ValueError: Unknown name.
    """
    folder, _, name = check_choice("preset", preset, PRESETS).partition("/")
    return PRESETS[preset]["sample_size"], "sub_vp" if folder == "subvp" else folder, not name.endswith("_continuous")


def convert_ncsnpp(
    state: OfficialState,
    image_size: int,
    sde: str,
    discrete: bool = False,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    options: Mapping[str, Any] | None = None,
) -> SDEPipeline:
    """The ``SDEPipeline`` of an ``NCSNpp`` with official parameters: NCSN++, DDPM++, or ``ddpm`` on the VE SDE.

    The sampler is the package's own. ``predictor="reverse_diffusion"``, ``corrector="langevin"`` and
    ``time_grid="uniform"`` make its scheduler the paper's; ``snr`` is the official one for images of this size.

    Args:
        state: What ``read_checkpoint`` returns.
        image_size: Side of the images in pixels, which the file does not say.
        sde: ``vp``, ``sub_vp`` or ``ve``, on which it was trained.
        discrete: Whether a VP network was trained on a table of noise levels instead of continuous time. A VE network
            shows by its embedding which of the two it is.
        beta_min: Of a VP or sub-VP SDE, for 1000 noise scales.
        beta_max: Likewise.
        options: Arguments of ``NCSNpp``, such as those of a preset, that take the place of what is read off the shapes.
            ``sigma_levels`` are those of the file, if it has them.

    Raises:
        ValueError: Another network, or an SDE that does not belong to it; the message says what was found.
    """
    check_choice("sde", sde, CHECKPOINT_SDES)
    if FREQUENCIES in state and sde != "ve":
        raise ValueError(
            f"sde must be 've' for a network with a Fourier embedding of sigma, as the checkpoint has, got {sde!r}."
        )
    options = dict(options or {})
    given = options.pop("sigma_levels", None)
    levels = _sigma_levels(state["sigmas"]) if sde == "ve" and "sigmas" in state else given
    if sde == "ve" and levels is None:
        raise ValueError("the checkpoint does not say its noise levels ('sigmas'): pass sigma_levels among options.")
    parameters = {key: value for key, value in state.items() if key != "sigmas"}
    config = {"dropout": 0.0, **_VALUES_OF[sde], **_read_off(parameters, image_size), **options}
    told_index = sde == "ve" and config["time_embedding_type"] == "positional"
    try:
        network = NCSNpp(**config, sigma_levels=levels if told_index else None)
    except ValueError as error:
        raise _unlike(str(error)) from error
    _load(network, parameters)
    snr: dict[str, Any] = {"snr": LANGEVIN_SNR[image_size]} if image_size in LANGEVIN_SNR else {}
    if sde == "ve":
        low, high, count = levels
        scheduler: SDEScheduler = VESDEScheduler(count, low, high, **snr)
    else:
        scheduler = vp_scheduler(sde, discrete, beta_min, beta_max, **snr)
    return SDEPipeline(network.eval(), scheduler, data_min=0.0 if network.config.center_input_sample else -1.0)


_VALUES_OF: Mapping[str, Mapping[str, bool]] = {
    "ve": {"scale_by_sigma": True, "center_input_sample": True},
    "vp": {"scale_by_sigma": False, "center_input_sample": False},
    "sub_vp": {"scale_by_sigma": False, "center_input_sample": False},
}


def vp_scheduler(
    sde: str, discrete: bool = False, beta_min: float = 0.1, beta_max: float = 20.0, **sampler: Any
) -> SDEScheduler:
    """The scheduler of an official VP or sub-VP network, which is fed 999 t and predicts the noise.

    Args:
        sde: ``vp`` or ``sub_vp``.
        discrete: Whether it was trained on DDPM's table, instead of in continuous time.
        beta_min: For 1000 noise scales.
        beta_max: Likewise.
        **sampler: Further arguments of the scheduler.

    Raises:
        ValueError: ``discrete`` with the sub-VP SDE.
    """
    if discrete and sde != "vp":
        raise ValueError("discrete is a table of the vp SDE.")
    sampler |= {"beta_start": beta_min / 1000, "beta_end": beta_max / 1000}
    if sde == "sub_vp":
        return SubVPSDEScheduler(time_conditioning="score_sde", **sampler)
    if discrete:
        return VPSDEScheduler(**sampler)
    return VPSDEScheduler(continuous=True, time_conditioning="score_sde", **sampler)


def _sigma_levels(sigmas: Tensor) -> tuple[float, float, int]:
    """(sigma_min, sigma_max, N) of the table of a file, which has to be geometric and decreasing."""
    table = sigmas.double()
    usable = table.ndim == 1 and len(table) >= 2 and bool(torch.isfinite(table).all()) and bool((table > 0.0).all())
    steps = table.log().diff() if usable else table
    if not usable or not bool((steps < 0.0).all()) or float(steps.max() - steps.min()) > 1e-3 * abs(float(steps[0])):
        raise ValueError("the checkpoint's noise levels ('sigmas') are no decreasing geometric sequence.")
    # The table was computed by exp(log(...)): without its round-off the ends are the numbers of the configuration.
    return float(f"{float(table[-1]):.6g}"), float(f"{float(table[0]):.6g}"), len(table)


# ---------------------------------------------------------------------- the network


def _read_off(state: OfficialState, image_size: int) -> dict[str, Any]:
    """The arguments of ``NCSNpp`` that the order and the shapes of official parameters show.

    That there are filters, rescaled sums and how many groups are not shown. The official NCSN++ has filters wherever
    images or features go beside the network, DDPM++ has none of the two, and ``ddpm`` has neither rescaled sums.
    """
    modules = _modules(state)
    kinds = [_official_kind(module) for module in modules]
    start = int(kinds[:1] == ["fourier"])
    if kinds[start : start + 3] != ["linear", "linear", "conv"]:
        raise _unlike(f"it begins with {', '.join(kinds[:4])}")

    def channels(number: int) -> tuple[int, int]:
        out, into = modules[number]["Conv_0.weight"].shape[:2]
        return into, out

    def kind(number: int) -> str:
        if number >= len(kinds):
            raise _unlike("it ends too early")
        # Of blocks that keep the number of channels, only those that resample have a convolution on the short branch.
        resamples = kinds[number] == "biggan" and len(set(channels(number))) == 1
        return "resample" if resamples else kinds[number]

    image_channels = modules[start + 2]["weight"].shape[1]
    position, layers = start + 3, 0
    widths: list[int] = []
    attended: list[int] = []
    progressive_input, combine = "none", "sum"
    while True:
        count, width = 0, 0
        while kind(position) in ("block", "biggan", "ddpm") and (count < layers or not widths):
            width, count, position = channels(position)[1], count + 1, position + 1
            if kind(position) == "attention":
                position += 1
                attended = [*attended, len(widths)] if len(widths) not in attended else attended
        if not count or (widths and count != layers):
            raise _unlike(f"resolution {len(widths)} has {count} residual blocks, and the first has {layers}")
        layers = count
        widths.append(width)
        if kind(position) != "resample":
            break
        position += 1
        if kind(position) in ("combine", "fir_conv", "resample"):
            progressive_input = "input_skip" if kind(position) == "combine" else "residual"
            position += 1
            if progressive_input == "input_skip" and channels(position)[0] == 2 * width:
                combine = "cat"
    pictures = [n for n, each in enumerate(kinds) if each == "conv" and modules[n]["weight"].shape[0] == image_channels]
    progressive_output = "none" if kinds.count("norm") == 1 else "residual"
    if len(widths) > 1 and len(pictures) == len(widths):
        progressive_output = "output_skip"
    plain = "ddpm" in kinds or "biggan" not in kinds
    filtered = (progressive_input, progressive_output) != ("none", "none")
    return {
        "sample_size": image_size,
        "in_channels": image_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "attention_resolutions": tuple(image_size // 2**level for level in attended),
        "resblock_type": "ddpm" if plain else "biggan",
        "time_embedding_type": "fourier" if start else "positional",
        "fir_kernel": (1, 3, 3, 1) if filtered else None,
        "skip_rescale": not plain,
        "norm_num_groups": 32 if plain else None,
        "progressive_input": progressive_input,
        "progressive_output": progressive_output,
        "progressive_combine": combine,
    }


def _unlike(what: str) -> ValueError:
    return ValueError(f"the checkpoint is not of score_sde's NCSN++, DDPM++ or ddpm network: {what}.")


def _modules(state: OfficialState) -> list[OfficialState]:
    """The parameters of each part by their names, in the order of the parts."""
    modules: dict[int, OfficialState] = {}
    for key, value in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if match is None:
            raise _unlike(f"it has a parameter {key!r}")
        modules.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(modules) != list(range(len(modules))):
        raise _unlike("some of its parts have no parameters")
    return [modules[number] for number in range(len(modules))]


_PAIR = ("weight", "bias")
_BLOCK = {f"{name}.{p}" for name in ("GroupNorm_0", "GroupNorm_1", "Conv_0", "Conv_1", "Dense_0") for p in _PAIR}
_KINDS: dict[frozenset[str], str] = {
    frozenset({"W"}): "fourier",
    frozenset({*(f"GroupNorm_0.{p}" for p in _PAIR), *(f"NIN_{n}.{p}" for n in range(4) for p in "Wb")}): "attention",
    frozenset(_BLOCK): "block",
    frozenset({*_BLOCK, *(f"Conv_2.{p}" for p in _PAIR)}): "biggan",
    frozenset({*_BLOCK, "NIN_0.W", "NIN_0.b"}): "ddpm",
    frozenset(f"Conv2d_0.{p}" for p in _PAIR): "fir_conv",
}


def _official_kind(module: OfficialState) -> str:
    keys = frozenset(module)
    if keys == set(_PAIR):
        kind = {1: "norm", 2: "linear", 4: "conv"}.get(module["weight"].ndim)
    elif keys == {f"Conv_0.{p}" for p in _PAIR} and module["Conv_0.weight"].ndim == 4:
        kind = "combine" if module["Conv_0.weight"].shape[-1] == 1 else "resample"
    else:
        kind = _KINDS.get(keys)
    if kind is None or ("Conv_0.weight" in module and module["Conv_0.weight"].ndim != 4):
        raise _unlike(f"it has a part of {', '.join(sorted(module))}")
    return kind


def _load(network: NCSNpp, state: OfficialState) -> None:
    """Fill the network with official parameters, each of which it has to have, and no others."""
    expected = dict(official_names(network))
    lacking = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    if lacking or foreign:
        raise _unlike(
            f"it lacks {', '.join(lacking[:3]) or 'nothing'}, and has {', '.join(foreign[:3]) or 'no others'}"
        )
    targets = network.state_dict()
    renamed: OfficialState = {}
    for key, name in expected.items():
        value, shape = state[key], tuple(targets[name].shape)
        if key.endswith(".W") and key != FREQUENCIES:  # a linear map of channels, (in, out)
            value = value.T if value.ndim == 2 else value
            value = value.reshape(shape) if value.numel() == targets[name].numel() and len(shape) == 4 else value
        if tuple(value.shape) != shape:
            raise _unlike(
                f"{key} has shape {tuple(state[key].shape)}, which gives {tuple(value.shape)} instead of {shape}"
            )
        renamed[name] = value
    network.load_state_dict(renamed)


def official_names(network: NCSNpp) -> Iterator[tuple[str, str]]:
    """Each parameter's official name and its own, in the official order.

    The official parts are numbered in the order of their calls. Fourier embedding, two linear layers, the first
    convolution; on the way down block and attention in turn, what shrinks, what shows the image; block, attention and
    block; on the way up all blocks, one attention, what draws, what enlarges; and at last norm and convolution.
    """
    names = {module: name for name, module in network.named_modules()}
    for number, part in enumerate(_parts(network)):
        for theirs, ours in _names_within(part).items():
            for parameter in _PAIR:
                theirs_parameter = {"weight": "W", "bias": "b"}[parameter] if "NIN" in theirs else parameter
                official = f"{theirs}.{theirs_parameter}" if theirs else theirs_parameter
                own = f"{names[part]}.{ours}.{parameter}" if ours else f"{names[part]}.{parameter}"
                if isinstance(part, FourierFeatures):
                    official, own = "W", f"{names[part]}.frequencies"
                yield f"all_modules.{number}.{official}", own


def _parts(network: NCSNpp) -> Iterator[nn.Module]:
    """The parts of the network as the official code counts them."""
    yield from (
        part
        for part in (network.fourier, network.embedding_in, network.embedding_out, network.conv_in)
        if part is not None
    )
    for down in network.down_levels:
        for number, block in enumerate(down.blocks):
            yield block
            if len(down.attentions):
                yield down.attentions[number]
        yield from (part for part in (down.resample, down.image) if part is not None)
    yield from (network.mid_block_in, network.mid_attention, network.mid_block_out)
    for up in network.up_levels:
        yield from up.blocks
        if up.attention is not None:
            yield up.attention
        yield from _split(up.output)
        if up.resample is not None:
            yield up.resample
    yield from _split(network.conv_out)


def _split(part: nn.Module | None) -> Iterator[nn.Module]:
    """A part as the official code counts it: a normalisation in front of a convolution is one by itself."""
    if isinstance(part, NormalizedConv):
        yield from (part.norm, part.conv)
    elif part is not None:
        yield part


def _names_within(part: nn.Module) -> dict[str, str]:
    """Official names of the layers within a part, and its own."""
    if isinstance(part, AttentionBlock):
        return {"GroupNorm_0": "norm", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out"}
    if isinstance(part, CombinedImage):
        return {"Conv_0": "conv"}
    if isinstance(part, HalvedConv | DoubledConv):
        filtered = part.fir is not None or (isinstance(part, DoubledConv) and part.doubled.fir is not None)
        return {"Conv2d_0" if filtered else "Conv_0": "conv"}
    if not isinstance(part, ResidualBlock):
        return {"": ""}
    names = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "embedding", "GroupNorm_1": "norm2"}
    names |= {"Conv_1": "conv2"}
    if part.embedding is None:
        del names["Dense_0"]
    if part.shortcut is not None:
        names["Conv_2" if part.biggan else "NIN_0"] = "shortcut"
    return names
