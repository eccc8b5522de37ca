"""To the Hub and back, through the real client: what is pushed, and in which ways it loads again.

Loading is tested in fresh processes with an empty cache, with the package and without it (hidden from import, as on a
machine that never had it). They are slow to start, so each does all that there is to do in its kind of environment.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_models import fingerprint, tiny_pipeline, use_hub
from loopback_hub import TOKEN, LoopbackHub

import diffusers_sde

RESULTS = {
    "license": "apache-2.0",
    "dataset": {"name": "Nothing", "id": "user/nothing", "split": "test"},
    "metrics": [{"name": "FID, 50 images", "type": "fid", "value": 12.34567, "on": "4 calls"}],
    "recipes": [{"options": {"predictor": "ancestral", "corrector": None}, "num_inference_steps": 4}],
    "training_command": "accelerate launch scripts/train.py --sde vp",
}
KINDS = ("vp", "ve", "classes", "inpaint", "restore")


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.S)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(autouse=True)
def _client(monkeypatch, hub):
    use_hub(monkeypatch, hub, TOKEN)
    hub.failures.clear()


@pytest.fixture(scope="module")
def pushed(hub):
    """All pipelines, pushed once from this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(monkeypatch, hub, TOKEN)
        for kind in KINDS:
            assert tiny_pipeline(kind).push_to_hub(kind, results=RESULTS) == f"{hub.url}/user/{kind}"
        tiny_pipeline().to(dtype=torch.bfloat16).push_to_hub("vp", variant="bf16")
        pipe = tiny_pipeline()
        pipe.push_to_hub("sharded", max_shard_size="20KB")
    return hub


def in_fresh_process(program, hub, home, package):
    """Run a program; the JSON that it prints last."""
    source = Path(diffusers_sde.__file__).parents[1]
    paths = [str(Path(__file__).parent), *([str(source)] if package else [])]
    hide = "" if package else "import sys; sys.modules['diffusers_sde'] = None\n"
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", hide + program], env=environment, capture_output=True, text=True, timeout=240, cwd=home
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


COMMON = """
import hashlib, json, sys, warnings
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
logging.disable_progress_bar()

def fingerprint(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    x = pipe(**{"batch_size": 2, **arguments}, num_inference_steps=4, generator=torch.manual_seed(1), output_type="pt")
    return hashlib.sha256(x.images.numpy().tobytes()).hexdigest()

def run(code):
    namespace = {}
    exec(code, namespace)
    return namespace["image"].size
"""

WITH_PACKAGE = """
import diffusers_sde
from diffusers import UNet2DModel
from diffusers_sde import InpaintSDEPipeline, SDEPipeline, VPSDEScheduler
found = {}
pipe = DiffusionPipeline.from_pretrained("user/vp")
found["vp"] = fingerprint(pipe)
found["own"] = type(pipe) is SDEPipeline and type(pipe.scheduler) is VPSDEScheduler
pipe.save_pretrained("again")
found["again"] = fingerprint(SDEPipeline.from_pretrained("again"))
found["class"] = fingerprint(SDEPipeline.from_pretrained("user/vp"))
found["other class"] = type(InpaintSDEPipeline.from_pretrained("user/vp")).__name__
found["sharded"] = fingerprint(DiffusionPipeline.from_pretrained("user/sharded"))
found["ve"] = fingerprint(DiffusionPipeline.from_pretrained("user/ve"))
scheduler = VPSDEScheduler.from_pretrained("user/vp", subfolder="scheduler")
unet = UNet2DModel.from_pretrained("user/vp", subfolder="unet")
found["parts"] = fingerprint(SDEPipeline(unet, scheduler))
bf16 = DiffusionPipeline.from_pretrained("user/vp", variant="bf16", torch_dtype=torch.bfloat16)
found["bf16"] = str(bf16.unet.dtype)
found["cards"] = {name: run(block) for name, block in json.loads(BLOCKS).items()}
found["remote"] = sorted(name for name in sys.modules if name.startswith("diffusers_modules."))
print(json.dumps(found))
"""

WITHOUT_PACKAGE = """
found = {}
pipe = DiffusionPipeline.from_pretrained("user/vp", trust_remote_code=True)
found["vp"] = fingerprint(pipe)
pipe.save_pretrained("again")
found["again"] = fingerprint(DiffusionPipeline.from_pretrained("again", trust_remote_code=True))
found["theirs"] = fingerprint(DiffusionPipeline.from_pretrained(THEIRS, trust_remote_code=True))
found["ve"] = fingerprint(DiffusionPipeline.from_pretrained("user/ve", trust_remote_code=True))
found["sharded"] = fingerprint(DiffusionPipeline.from_pretrained("user/sharded", trust_remote_code=True))
pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, corrector=None)
found["swapped"] = pipe(num_inference_steps=4).images[0].size
found["url"] = pipe.push_to_hub("from-remote-code")
found["bits"] = float(pipe.bits_per_dim(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), rtol=1e-1, atol=1e-1).mean) > 0
try:
    DiffusionPipeline.from_pretrained("user/vp")
except ValueError as error:
    found["refused"] = str(error)
found["cards"] = {name: run(block) for name, block in json.loads(BLOCKS).items()}
found["package"] = sys.modules.get("diffusers_sde") is not None
print(json.dumps(found))
"""


def blocks(hub, number, kinds=KINDS):
    """The code of the cards, as a Python literal; 0 is with the package, 1 without, 2 stock diffusers."""
    chosen = {kind: code_blocks(hub.files(f"user/{kind}")["README.md"].decode())[number] for kind in kinds}
    return f"BLOCKS = {json.dumps(chosen)!r}\n"


@pytest.fixture(scope="module")
def with_package(pushed, tmp_path_factory):
    home = tmp_path_factory.mktemp("with_package")
    program = COMMON + blocks(pushed, 0) + WITH_PACKAGE
    return home, in_fresh_process(program, pushed, home, package=True)


@pytest.fixture(scope="module")
def without_package(pushed, with_package, tmp_path_factory):
    home = tmp_path_factory.mktemp("without_package")
    program = COMMON + f"THEIRS = {str(with_package[0] / 'again')!r}\n" + blocks(pushed, 1) + WITHOUT_PACKAGE
    stock = code_blocks(pushed.files("user/vp")["README.md"].decode())[2]
    program = program.replace("print(json", f"found['stock'] = run({stock!r})\nprint(json")
    return home, in_fresh_process(program, pushed, home, package=False)


def test_with_the_package_a_repository_loads_without_a_flag(with_package):
    _, found = with_package
    expected = fingerprint(tiny_pipeline())
    assert {found[name] for name in ("vp", "class", "parts", "again", "sharded")} == {expected}
    assert found["ve"] == fingerprint(tiny_pipeline("ve"))
    assert found["own"]
    assert found["other class"] == "InpaintSDEPipeline"
    assert found["bf16"] == "torch.bfloat16"
    assert found["remote"] == []  # nothing of the repository ran


def test_without_the_package_a_repository_loads_with_trust(pushed, without_package):
    _, found = without_package
    assert not found["package"]
    expected = fingerprint(tiny_pipeline())
    assert {found[name] for name in ("vp", "again", "theirs", "sharded")} == {expected}
    assert found["ve"] == fingerprint(tiny_pipeline("ve"))
    assert found["swapped"] == [8, 8]
    assert found["bits"]
    assert found["url"].endswith("user/from-remote-code")
    assert set(pushed.files("user/vp")) == {
        *pushed.files("user/from-remote-code"),
        *(name for name in pushed.files("user/vp") if "bf16" in name),
    }


def test_code_of_a_repository_needs_trust(without_package):
    assert "trust_remote_code=True" in without_package[1]["refused"]


def test_the_code_of_the_cards_runs_as_it_stands(with_package, without_package):
    assert with_package[1]["cards"] == {kind: [8, 8] for kind in KINDS}
    assert without_package[1]["cards"] == {kind: [8, 8] for kind in KINDS}
    assert without_package[1]["stock"] == [8, 8]
