"""To the Hub and back, through the real client: what is pushed, and in which ways it loads again.

Loading is tested in fresh processes with an empty cache, with the package and without it (hidden from import, as on a
machine that never had it). They are slow to start, so each does all that there is to do in its kind of environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from code_blocks import code_blocks
from diffusers import DDPMPipeline, DiffusionPipeline
from hub_models import fingerprint, tiny_pipeline, use_hub
from loopback_hub import TOKEN, LoopbackHub
from tiny_parts import HAS_TRANSFORMERS

import diffusers_sde
from diffusers_sde import SDEPipeline, VPSDEScheduler
from diffusers_sde.pipelines.base import own_index
from diffusers_sde.shipping.flattening import self_contained_source
from diffusers_sde.shipping.uploads import upload

RESULTS = {
    "license": "apache-2.0",
    "dataset": {"name": "Nothing", "id": "user/nothing", "split": "test"},
    "metrics": [{"name": "FID, 50 images", "type": "fid", "value": 12.34567, "on": "4 calls"}],
    "recipes": [{"options": {"predictor": "ancestral", "corrector": None}, "num_inference_steps": 4}],
    "training_command": "accelerate launch scripts/train.py --sde vp",
}
KINDS = ("vp", "ve", "classes", *(["text", "pixart"] if HAS_TRANSFORMERS else []), "inpaint", "restore")


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
    hide = "" if package else "import sys; sys.modules['diffusers_sde'] = None\n"
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(source) if package else ""}
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
from io import StringIO
from logging import StreamHandler
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
log = StringIO()
logging.add_handler(StreamHandler(log))
guided = DiffusionPipeline.from_pretrained("guided", trust_remote_code=True)
found["guided"] = guided(1, num_inference_steps=4).images[0].size
found["warned"] = log.getvalue()
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
    tiny_pipeline("guided").save_pretrained(home / "guided")
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
    assert found["guided"] == [8, 8]
    assert "Expected types" not in found["warned"]
    assert found["url"].endswith("user/from-remote-code")
    assert set(pushed.files("user/vp")) == {
        *pushed.files("user/from-remote-code"),
        *(name for name in pushed.files("user/vp") if "bf16" in name),
        "images/samples.png",  # the code that travels draws no pictures
        "images/trajectories.png",
    }


def test_code_of_a_repository_needs_trust(without_package):
    assert "trust_remote_code=True" in without_package[1]["refused"]


def test_the_code_of_the_cards_runs_as_it_stands(with_package, without_package):
    assert with_package[1]["cards"] == {kind: [8, 8] for kind in KINDS}
    assert without_package[1]["cards"] == {kind: [8, 8] for kind in KINDS}
    assert without_package[1]["stock"] == [8, 8]


def test_an_unchanged_push_makes_no_commit(pushed):
    titles = pushed.titles("user/ve")
    tiny_pipeline("ve").push_to_hub("user/ve", results=RESULTS)
    assert pushed.titles("user/ve") == titles


def test_a_card_edited_on_the_hub_stays(pushed):
    tiny_pipeline().push_to_hub("edited")
    huggingface_hub.HfApi().upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\nMine.", path_in_repo="README.md", repo_id="user/edited"
    )
    pipe = tiny_pipeline()
    pipe.scheduler = VPSDEScheduler()
    pipe.push_to_hub("edited")
    assert pushed.files("user/edited")["README.md"].endswith(b"Mine.")
    assert b'"corrector": null' in pushed.files("user/edited")["scheduler/scheduler_config.json"]


def test_saving_pushes_too(hub, tmp_path):
    tiny_pipeline("ve").save_pretrained(str(tmp_path / "model"), push_to_hub=True, repo_id="user/saved")
    assert "diffusers_sde_pipeline.py" in hub.files("user/saved")
    assert b"## Samplers" in hub.files("user/saved")["README.md"]


def test_the_shards_of_an_earlier_push_are_deleted(hub):
    tiny_pipeline().push_to_hub("shrinking", max_shard_size="20KB")
    tiny_pipeline().to(dtype=torch.bfloat16).push_to_hub("shrinking", variant="bf16")
    tiny_pipeline().push_to_hub("shrinking")
    weights = {name for name in hub.files("user/shrinking") if name.startswith("unet/diffusion")}
    assert weights == {f"unet/diffusion_pytorch_model{infix}.safetensors" for infix in ("", ".bf16")}


def test_no_path_of_this_machine_is_pushed(hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "somewhere")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "somewhere")
    loaded.push_to_hub("clean")
    for name, data in hub.files("user/clean").items():
        assert b"somewhere" not in data, name
        assert str(Path.home()).encode() not in data or str(Path.home()) == "/", name
        assert b"_name_or_path" not in data or name.endswith(".py"), name


# ---------------------------------------------------------------------- what goes wrong


def test_a_wrong_token_is_named_and_not_shown(hub):
    with pytest.raises(OSError, match=r"token is not valid.*hf auth login") as error:
        tiny_pipeline().push_to_hub("user/nothing", token="hf_wrong_secret")
    assert "hf_wrong_secret" not in str(error.value)


def test_a_missing_token_is_named(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match="hf auth login"):
        tiny_pipeline().push_to_hub("user/nothing")


def test_a_missing_repository_is_named(hub, tmp_path):
    with pytest.raises(OSError, match=r"user/absent.*check the name"):
        upload(tmp_path, "user/absent")


def test_an_interrupted_upload_can_be_repeated(hub):
    hub.failures.append(("POST .*/commit/", 500))
    pipe = tiny_pipeline()
    with pytest.raises(OSError, match=r"user/interrupted: .*try again"):
        pipe.push_to_hub("interrupted")
    assert len(hub.titles("user/interrupted")) == 1  # nothing half done
    sent = len([r for r in hub.requests if r[0] == "PUT"])
    pipe.push_to_hub("interrupted")
    assert len([r for r in hub.requests if r[0] == "PUT"]) == sent  # the weights were there already
    assert "model_index.json" in hub.files("user/interrupted")


@pytest.mark.parametrize("request_of", ["POST .*objects/batch", "PUT /_lfs/", "POST .*/commit/"])
@pytest.mark.parametrize(
    "status, message",
    [(401, "token is not valid"), (403, "may not write"), (409, "at the same time"), (413, "max_shard_size")],
)
def test_an_answer_of_the_hub_is_named_wherever_it_comes(hub, request_of, status, message):
    """The client wraps those of large files: they were called an unreachable Hub."""
    hub.objects.clear()
    hub.failures.append((request_of, status))
    with pytest.raises(OSError, match=message) as error:
        tiny_pipeline().push_to_hub(f"refused-{status}-{len(request_of)}")
    assert "cannot be reached" not in str(error.value)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be reached"):
        tiny_pipeline().push_to_hub("user/nothing")


def test_damaged_weights_are_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"diffusion_pytorch_model.safetensors.*force_download=True"):
        SDEPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "model_index.json"])
def test_the_config_of_a_newer_version_asks_for_an_upgrade(tmp_path, file):
    tiny_pipeline().save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    config["colour_of_noise"] = "pink"
    (tmp_path / file).write_text(json.dumps(config))
    DiffusionPipeline.from_pretrained(tmp_path)  # of this version: diffusers' business
    (tmp_path / file).write_text(json.dumps({**config, "_diffusers_sde_version": "99.0"}))
    with pytest.raises(ValueError, match=r"diffusers_sde 99.0 with colour_of_noise.*pip install -U"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_class_of_a_newer_version_asks_for_an_upgrade():
    with pytest.raises(ValueError, match=r"Tomorrow.*99.0.*pip install -U"):
        own_index({"_class_name": ["diffusers_sde_pipeline", "Tomorrow"], "_diffusers_sde_version": "99.0"})


def test_a_newer_version_that_adds_nothing_is_welcome(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        config = json.loads((tmp_path / file).read_text())
        # A key of a stock scheduler that was swapped out is not a new one of ours.
        extra = {"steps_offset": 1, "set_alpha_to_one": True} if "scheduler" in file else {}
        (tmp_path / file).write_text(json.dumps({**config, **extra, "_diffusers_sde_version": "99.0"}))
    DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": []},
        {"_class_name": [[]]},
        {"_class_name": ["diffusers_sde_pipeline"]},
        {"_class_name": [{}, 3]},
        {"_class_name": 5, "_ignore_files": 5},
        {"_class_name": "DDPMPipeline", "_ignore_files": 5, "_diffusers_sde_version": "zzz"},
        {"unet": [], "scheduler": [[], {}], "x": {"diffusers_sde": 1}},
        [],
        "x",
        None,
    ],
    ids=repr,
)
def test_a_malformed_index_of_others_is_left_alone(index):
    assert own_index(index) == index


def test_a_malformed_entry_does_not_keep_our_code_from_being_ignored():
    index = {"_class_name": "DDPMPipeline", "_ignore_files": 5, "scheduler": ["diffusers_sde", "VPSDEScheduler"]}
    assert own_index(index)["_ignore_files"] == ["scheduler/diffusers_sde.py"]


@pytest.mark.parametrize("version", ["zzz", 5, [], {}, ""])
def test_a_version_that_is_none_says_nothing(tmp_path, version):
    tiny_pipeline().save_pretrained(tmp_path)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        config = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**config, "_diffusers_sde_version": version}))
    DiffusionPipeline.from_pretrained(tmp_path)


def test_the_index_of_others_is_left_alone():
    index = {"_class_name": ["pipeline", "SDEPipeline"], "unet": ["diffusers", "UNet2DModel"]}
    assert own_index(index) == index


# ---------------------------------------------------------------------- stock pipelines with our scheduler


def test_a_stock_pipeline_with_our_scheduler_carries_its_code(tmp_path):
    pipe = DDPMPipeline(tiny_pipeline().unet, VPSDEScheduler(clip_sample=True))
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "diffusers_sde.py").read_text() == self_contained_source("schedulers")
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is VPSDEScheduler


class OwnPipeline(SDEPipeline):
    pass


def test_a_class_derived_from_ours_is_saved_without_our_code(tmp_path):
    OwnPipeline(tiny_pipeline().unet, VPSDEScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "OwnPipeline"
    assert not list(tmp_path.glob("*.py"))
    assert type(OwnPipeline.from_pretrained(tmp_path)) is OwnPipeline
