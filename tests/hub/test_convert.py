"""Conversion of other people's models: the same network function, and the same path of noise.

The official ``ddpm`` network is stated again below, functionally and from its description (Ho et al. 2020, appendix B;
Song et al. 2021, appendix H), for the comparison of outputs.
"""

import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from hub_models import fingerprint
from tiny_networks import tiny_unet

from diffusers_sde import SDEPipeline, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.hub.cli import convert_main
from diffusers_sde.hub.convert import convert_checkpoint, convert_repository

WIDTH, MULTIPLIERS, LAYERS, SIZE = 32, (1, 2), 2, 8


class OfficialNetwork:
    """score_sde's ddpm network as a list of parameters; attention at the lower resolution."""

    def __init__(self, seed=0, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.state = {}
        self.count = 0
        self.plan = []
        self._build()

    def _add(self, kind, **shapes):
        for name, shape in shapes.items():
            name = name.replace("__", ".")
            value = torch.randn(shape, generator=self.generator, dtype=self.dtype) / math.sqrt(math.prod(shape[1:]))
            if name.endswith("weight") and len(shape) == 1:
                value = 1.0 + 0.1 * value  # a norm's gain
            elif len(shape) == 1:
                value = 0.1 * value
            self.state[f"all_modules.{self.count}.{name}"] = value
        self.plan.append((kind, self.count))
        self.count += 1

    def _resnet(self, c_in, c_out):
        shapes = {"GroupNorm_0__weight": (c_in,), "GroupNorm_0__bias": (c_in,)}
        shapes |= {"GroupNorm_1__weight": (c_out,), "GroupNorm_1__bias": (c_out,)}
        shapes |= {"Conv_0__weight": (c_out, c_in, 3, 3), "Conv_0__bias": (c_out,)}
        shapes |= {"Conv_1__weight": (c_out, c_out, 3, 3), "Conv_1__bias": (c_out,)}
        shapes |= {"Dense_0__weight": (c_out, 4 * WIDTH), "Dense_0__bias": (c_out,)}
        if c_in != c_out:
            shapes |= {"NIN_0__W": (c_in, c_out), "NIN_0__b": (c_out,)}
        self._add("resnet", **shapes)

    def _attention(self, c):
        shapes = {"GroupNorm_0__weight": (c,), "GroupNorm_0__bias": (c,)}
        for n in range(4):
            shapes |= {f"NIN_{n}__W": (c, c), f"NIN_{n}__b": (c,)}
        self._add("attention", **shapes)

    def _build(self):
        self._add("linear", weight=(4 * WIDTH, WIDTH), bias=(4 * WIDTH,))
        self._add("linear", weight=(4 * WIDTH, 4 * WIDTH), bias=(4 * WIDTH,))
        self._add("conv", weight=(WIDTH, 1, 3, 3), bias=(WIDTH,))
        skips, c = [WIDTH], WIDTH
        last = len(MULTIPLIERS) - 1
        for i, m in enumerate(MULTIPLIERS):
            for _ in range(LAYERS):
                self._resnet(c, m * WIDTH)
                c = m * WIDTH
                if i == last:
                    self._attention(c)
                skips.append(c)
            if i != last:
                self._add("down", Conv_0__weight=(c, c, 3, 3), Conv_0__bias=(c,))
                skips.append(c)
        self._resnet(c, c)
        self._attention(c)
        self._resnet(c, c)
        for i, m in reversed(list(enumerate(MULTIPLIERS))):
            for _ in range(LAYERS + 1):
                self._resnet(c + skips.pop(), m * WIDTH)
                c = m * WIDTH
            if i == last:
                self._attention(c)
            if i:
                self._add("up", Conv_0__weight=(c, c, 3, 3), Conv_0__bias=(c,))
        self._add("norm", weight=(c,), bias=(c,))
        self._add("conv", weight=(1, c, 3, 3), bias=(1,))

    def __call__(self, x, labels):
        p = self.state
        steps = iter(self.plan)

        def get(name):
            return p[f"all_modules.{self.at}.{name}"]

        def norm(h, name=""):
            return F.group_norm(h, 32, get(f"{name}weight"), get(f"{name}bias"), eps=1e-6)

        def run(h, temb):
            kind, self.at = next(steps)
            if kind == "conv":
                return F.conv2d(h, get("weight"), get("bias"), padding=1)
            if kind == "norm":
                return F.silu(norm(h))
            if kind == "down":
                return F.conv2d(F.pad(h, (0, 1, 0, 1)), get("Conv_0.weight"), get("Conv_0.bias"), stride=2)
            if kind == "up":
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                return F.conv2d(h, get("Conv_0.weight"), get("Conv_0.bias"), padding=1)
            if kind == "attention":
                y = norm(h, "GroupNorm_0.")
                q, k, v = (
                    torch.einsum("bihw,io->bohw", y, get(f"NIN_{n}.W")) + get(f"NIN_{n}.b")[:, None, None]
                    for n in range(3)
                )
                w = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(h.shape[1])
                w = w.flatten(3).softmax(-1).reshape(w.shape)
                y = torch.einsum("bhwij,bcij->bchw", w, v)
                return h + torch.einsum("bihw,io->bohw", y, get("NIN_3.W")) + get("NIN_3.b")[:, None, None]
            y = F.conv2d(F.silu(norm(h, "GroupNorm_0.")), get("Conv_0.weight"), get("Conv_0.bias"), padding=1)
            y = y + F.linear(F.silu(temb), get("Dense_0.weight"), get("Dense_0.bias"))[:, :, None, None]
            y = F.conv2d(F.silu(norm(y, "GroupNorm_1.")), get("Conv_1.weight"), get("Conv_1.bias"), padding=1)
            if f"all_modules.{self.at}.NIN_0.W" in p:
                h = torch.einsum("bihw,io->bohw", h, get("NIN_0.W")) + get("NIN_0.b")[:, None, None]
            return h + y

        half = WIDTH // 2
        angles = labels.to(self.dtype)[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1))
        temb = torch.cat([angles.sin(), angles.cos()], 1)
        _, self.at = next(steps)
        temb = F.linear(temb, get("weight"), get("bias"))
        _, self.at = next(steps)
        temb = F.linear(F.silu(temb), get("weight"), get("bias"))
        h = run(x, temb)
        skips, last = [h], len(MULTIPLIERS) - 1
        for i in range(len(MULTIPLIERS)):
            for _ in range(LAYERS):
                h = run(h, temb)
                if i == last:
                    h = run(h, temb)
                skips.append(h)
            if i != last:
                h = run(h, temb)
                skips.append(h)
        for _ in range(3):
            h = run(h, temb)
        for i in reversed(range(len(MULTIPLIERS))):
            for _ in range(LAYERS + 1):
                h = run(torch.cat([h, skips.pop()], 1), temb)
            if i == last:
                h = run(h, temb)
            if i:
                h = run(h, temb)
        return run(run(h, temb), temb)


def save(path, network, averaged=None, extra=None):
    state = {f"module.{key}": value.float() for key, value in network.state.items()}
    averaged = [value.float() for value in (averaged or network).state.values()]
    ema = {"decay": 0.999, "num_updates": 10, "shadow_params": averaged}
    # Some versions of the official code register the noise levels as a buffer.
    torch.save({"model": {"module.sigmas": torch.ones(10), **state, **(extra or {})}, "ema": ema, "step": 10}, path)
    return path


@pytest.mark.parametrize("label", [0.3, 499.5, 999.0])
def test_a_checkpoint_is_the_same_function(tmp_path, label):
    network, averaged = OfficialNetwork(0), OfficialNetwork(1)
    path = save(tmp_path / "checkpoint.pth", network, averaged)
    # Small numbers, so that the constant inside the norms matters.
    x = 0.01 * torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.full((2,), label, dtype=torch.float64)
    for use_ema, official in ((True, averaged), (False, network)):
        unet = convert_checkpoint(path, SIZE, use_ema=use_ema).unet
        with torch.no_grad():
            ours = unet(x.float(), labels.float()).sample
        theirs = official(x, labels)
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=5e-6 * float(theirs.abs().max()))


def test_a_checkpoint_is_fed_the_time_that_it_was_trained_with(tmp_path):
    path = save(tmp_path / "checkpoint.pth", OfficialNetwork())
    vp = convert_checkpoint(path, SIZE).scheduler
    assert type(vp) is VPSDEScheduler
    assert float(vp.conditioning.timestep(vp.sde, torch.tensor(0.5))) == pytest.approx(499.5)  # 999 t
    assert float(vp.sde.g2(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(0.1 + 0.5 * 19.9)
    sub_vp = convert_checkpoint(path, SIZE, "sub_vp").scheduler
    assert type(sub_vp) is SubVPSDEScheduler
    table = convert_checkpoint(path, SIZE, discrete=True).scheduler
    torch.testing.assert_close(table.betas, torch.linspace(1e-4, 0.02, 1000))
    assert table.config.time_conditioning == "discrete"


def test_what_is_another_network_is_refused(tmp_path):
    network = OfficialNetwork()
    biggan = {"module.all_modules.3.Conv_2.weight": torch.zeros(1), "module.all_modules.3.Conv_2.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"DDPM\+\+ or ddpm network: resolution 0 has 0 residual blocks"):
        convert_checkpoint(save(tmp_path / "a.pth", network, extra=biggan), SIZE, use_ema=False)
    with pytest.raises(ValueError, match="do not fit"):
        convert_checkpoint(save(tmp_path / "b.pth", network, extra=biggan), SIZE)
    with pytest.raises(ValueError, match="no decreasing geometric sequence"):
        convert_checkpoint(save(tmp_path / "c.pth", network), SIZE, "ve")
    torch.save({"step": 1}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match="has no 'model'"):
        convert_checkpoint(tmp_path / "d.pth", SIZE)


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_with_code_in_it_does_not_run(tmp_path, capsys):
    torch.save({"model": {}, "extra": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        convert_checkpoint(tmp_path / "evil.pth", SIZE)
    assert "code ran" not in capsys.readouterr().out


def test_a_stock_repository_keeps_its_network_and_its_table(tmp_path):
    stock = diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    stock.save_pretrained(tmp_path / "stock")
    convert_main(["--source", str(tmp_path / "stock"), "--output_dir", str(tmp_path / "ours")])
    pipe = SDEPipeline.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, stock.scheduler.alphas_cumprod)
    assert pipe.scheduler.config.clip_sample  # as the stock class does by default
    direct = SDEPipeline(tiny_unet(), VPSDEScheduler.from_config(stock.scheduler.config))
    assert fingerprint(pipe) == fingerprint(direct)


def test_a_legacy_repository_keeps_its_range_and_sampler(tmp_path):
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
    diffusers.ScoreSdeVePipeline(tiny_unet(time_embedding_type="fourier"), scheduler).save_pretrained(tmp_path)
    pipe = convert_repository(str(tmp_path))
    assert type(pipe.scheduler) is VESDEScheduler
    assert (pipe.scheduler.config.predictor, pipe.scheduler.config.corrector) == ("reverse_diffusion", "langevin")
    assert (pipe.config.data_min, pipe.config.data_max) == (0.0, 1.0)


def test_other_pipelines_are_sent_elsewhere(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"], '
        '"scheduler": ["diffusers", "DDIMScheduler"]}'
    )
    with pytest.raises(SystemExit):
        convert_main(["--source", str(tmp_path), "--output_dir", str(tmp_path / "ours")])
    assert "pipe.scheduler = VPSDEScheduler.from_config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "saved",
    [
        {"model": {"all_modules.0.weight": 1.0}},
        {"model": {"all_modules.0.weight": torch.tensor(1.0), "all_modules.0.bias": torch.tensor(1.0)}},
        {"model": {0: torch.zeros(2)}},
        {"model": {"all_modules.0.weight": torch.zeros(2, 2)}, "ema": [torch.zeros(2, 2)]},
        {"model": {"all_modules.0.weight": torch.zeros(2, 2)}, "ema": {"shadow_params": 5}},
        {"model": {"all_modules.0.weight": torch.zeros(2, 2)}, "ema": {"shadow_params": [1.0]}},
        {"model": {}},
        {"model": [torch.zeros(2)]},
        [1, 2],
        None,
    ],
)
def test_files_of_another_form_end_in_one_line(tmp_path, capsys, saved):
    torch.save(saved, tmp_path / "other.pth")
    for more in ([], ["--no-use_ema"]):
        with pytest.raises(SystemExit) as stop:
            convert_main(
                [
                    "--source",
                    str(tmp_path / "other.pth"),
                    "--image_size",
                    "8",
                    "--output_dir",
                    str(tmp_path / "o"),
                    *more,
                ]
            )
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("convert.py: error:") and not (tmp_path / "o").exists()


def test_shapes_that_no_such_network_has_are_refused(tmp_path, capsys):
    """Every parameter in turn as a single number, and as an empty tensor."""
    state = OfficialNetwork(dtype=torch.float32).state
    for name in list(state)[::7]:
        for wrong in (torch.tensor(1.0), torch.zeros(0)):
            torch.save({"model": state | {name: wrong}}, tmp_path / "other.pth")
            with pytest.raises(ValueError, match="ddpm network"):
                convert_checkpoint(tmp_path / "other.pth", SIZE, use_ema=False)
    torch.save({"model": state}, tmp_path / "right.pth")
    for size in (0, -8, 2.5, "8"):
        with pytest.raises(ValueError, match="image_size must be an integer at least 1"):
            convert_checkpoint(tmp_path / "right.pth", size, use_ema=False)


def test_a_network_with_words_for_numbers_is_refused(tmp_path, capsys):
    import json

    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "stock")
    config = tmp_path / "stock" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": "3"}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        convert_main(["--source", str(tmp_path / "stock"), "--output_dir", str(tmp_path / "o")])
    assert stop.value.code == 2
    assert "its network cannot be loaded" in capsys.readouterr().err.strip().splitlines()[-1]
