"""Small networks of score_sde_pytorch, of which tests/data/score_sde_networks.npz holds the outputs.

Neither parameters nor inputs are stored: both are made from the raw words of a PCG64 generator, whose stream numpy
promises to keep. The outputs come from the official code, unmodified (github.com/yang-song/score_sde_pytorch at
cb1f359f4aadf0ff9a5e122fe8fffc9451fd6e44, Apache-2.0), run on one thread by

    python tests/official_networks.py CHECKOUT tests/data/score_sde_networks.npz

with a no-op in place of the compiler of CUDA extensions, so that ``upfirdn2d`` takes its own branch for CPUs; and with
``interpolate(x, size, "nearest")`` read as it was meant, because torch takes the word for a scale and raises an error.
"""

import json
import math
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import torch

COMMON = {
    "name": "ncsnpp",
    "nf": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "embedding_type": "positional",
    "fourier_scale": 16,
    "scale_by_sigma": False,
    "centered": True,
    "fir": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "sigma_max": 50.0,
    "sigma_min": 0.01,
    "num_scales": 1000,
}
VE = {"embedding_type": "fourier", "scale_by_sigma": True, "centered": False}
SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip"}
PLAIN = {"fir": False, "progressive_input": "none"}
CASES = {
    # cut down from the official configurations
    "ve_ncsnpp_continuous": VE,
    "ve_ncsnpp_256": {**VE, **SKIPS, "sigma_max": 348.0, "num_scales": 2000},
    "ve_ncsnpp_discrete": {**VE, "embedding_type": "positional"},
    "vp_ncsnpp": {},
    "vp_ddpmpp": PLAIN,
    "ddpm": {**PLAIN, "name": "ddpm", "nf": 64, "ch_mult": (1, 1)},
    "ve_ddpm_discrete": {**VE, **PLAIN, "name": "ddpm", "nf": 64, "ch_mult": (1, 1), "embedding_type": "positional"},
    # what the ablations of the paper vary
    "concatenated": {**VE, **SKIPS, "progressive_combine": "cat", "skip_rescale": False},
    "residual_output": {"fir": False, "progressive": "residual"},
    "ddpm_blocks": {**PLAIN, "resblock_type": "ddpm", "nf": 12, "progressive": "output_skip"},
    "three_levels": {
        **VE,
        **SKIPS,
        "ch_mult": (1, 3, 2),
        "num_res_blocks": 2,
        "attn_resolutions": (8, 2),
        "fir_kernel": (1, 2, 3, 4),
    },
    "faint": PLAIN,  # its first features are so small that the constant inside the norms matters
    "odd_filter": {"fir_kernel": (1, 2, 4), "ch_mult": (1, 2, 2), "attn_resolutions": ()},
}
SIDE = 8


def configuration(case):
    """Options of a case, under their official names."""
    return {**COMMON, **CASES[case]}


def uniform(name, shape):
    """Numbers in [-1, 1), float32, the same for the same name everywhere."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0).float().reshape(shape)


def parameter(case, name, shape):
    """One parameter of the official network, by its official name: of the size that keeps variances, none of it 0."""
    value = uniform(f"{case}/{name}", shape)
    if case == "faint" and name.startswith("all_modules.2."):
        return 1e-3 * value
    if name.endswith("all_modules.0.W"):
        return 10.0 * value
    if len(shape) == 1:
        return 0.3 * value + (1.0 if name.endswith("weight") else 0.0)
    fan_in = shape[0] if name.endswith(".W") else math.prod(shape[1:])
    return value * math.sqrt(3.0 / fan_in)


def inputs(case):
    """Noisy images and noise levels sigma, which lie on the table; the time of a VP network is as large as 999 t."""
    config = configuration(case)
    labels = torch.tensor([649, 200])
    sigmas = np.exp(np.linspace(np.log(config["sigma_max"]), np.log(config["sigma_min"]), config["num_scales"]))
    sigma = torch.from_numpy(sigmas)[labels]
    x = uniform(f"{case}/x", (2, 3, SIDE, SIDE))
    if not config["centered"]:
        x = 0.5 * x + 0.5 + sigma.float()[:, None, None, None] * uniform(f"{case}/noise", x.shape)
    return x, labels, sigma


def official_state(case, shapes):
    """The official state dict, given the shapes of its parameters by name."""
    return {name: parameter(case, name, shape) for name, shape in shapes.items()}


def record(checkout):
    torch.utils.cpp_extension.load = lambda *arguments, **options: None
    interpolate = torch.nn.functional.interpolate
    torch.nn.functional.interpolate = lambda x, size, mode, **options: interpolate(x, size, mode=mode, **options)
    sys.path.insert(0, checkout)
    from models import ddpm, ncsnpp

    found = {}
    for case in CASES:
        c = configuration(case)
        model = {key: value for key, value in c.items() if key != "centered"} | {
            "dropout": 0.0,
            "resamp_with_conv": True,
            "conditional": True,
            "init_scale": 0.0,
            "nonlinearity": "swish",
            "normalization": "GroupNorm",
        }
        config = SimpleNamespace(
            model=SimpleNamespace(**model),
            data=SimpleNamespace(image_size=SIDE, num_channels=3, centered=c["centered"]),
            training=SimpleNamespace(continuous=c["embedding_type"] == "fourier"),
        )
        network = {"ncsnpp": ncsnpp.NCSNpp, "ddpm": ddpm.DDPM}[c["name"]](config).eval()
        shapes = {name: tuple(p.shape) for name, p in network.state_dict().items() if name != "sigmas"}
        network.load_state_dict({**official_state(case, shapes), "sigmas": network.sigmas})
        x, labels, sigma = inputs(case)
        if c["embedding_type"] == "fourier":
            fed = sigma.float()
        else:
            fed = labels if c["scale_by_sigma"] else labels.float() + 0.3
        with torch.no_grad():
            found[f"{case}/output"] = network(x, fed).float().numpy()
        found[f"{case}/shapes"] = json.dumps(shapes)
    return found


if __name__ == "__main__":
    import torch.utils.cpp_extension

    torch.set_num_threads(1)
    np.savez_compressed(sys.argv[2], **record(sys.argv[1]))
