"""scripts/push_to_hub.py: a saved model becomes a repository, on the Hub or in a folder."""

import json
import re

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from hub_models import fingerprint, tiny_pipeline, use_hub
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image
from tiny_networks import tiny_unet

from diffusers_sde import InpaintSDEPipeline
from diffusers_sde.hub.cli import export_main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.bin").write_bytes(b"private")
    config = {"sde": "vp", "train_data_dir": str(folder), "output_dir": str(folder), "max_train_steps": 3}
    (folder / "training_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_gets_what_a_repository_gets(model, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "grid.png"
    Image.new("L", (4, 4)).save(picture)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    metric = {"name": "FID", "type": "fid", "value": 3.0}
    first.write_text(json.dumps({"metrics": [metric], "pictures": {"Samples": str(picture)}, "limitations": "a"}))
    second.write_text(json.dumps({"metrics": [{**metric, "name": "KID"}], "limitations": "b"}))
    arguments = ["--model", str(model), "--license", "mit", "--results", str(first), str(second)]
    folder = tmp_path / "export"
    export_main([*arguments, "--hub_model_id", "user/model", "--output_dir", str(folder)])
    exported = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = ModelCard(exported["README.md"].decode())
    assert card.data.license == "mit"
    assert [result.metric_name for result in card.data.eval_results] == ["FID", "KID"]
    assert card.text.count("## Limits\n\nb\n") == 1
    assert f"--train_data_dir path/to/{model.name} --max_train_steps 3" in card.text
    assert str(model) not in card.text
    assert fingerprint(DiffusionPipeline.from_pretrained(folder)) == fingerprint(tiny_pipeline())
    with LoopbackHub() as hub:
        use_hub(monkeypatch, hub, TOKEN)
        export_main([*arguments, "--hub_model_id", "user/model"])
        assert {k: v for k, v in hub.files("user/model").items() if k != ".gitattributes"} == exported
        assert capsys.readouterr().out.splitlines() == [str(folder), f"{hub.url}/user/model"]

        # A second time: nothing; with --update_card only the card.
        export_main([*arguments, "--hub_model_id", "user/model", "--license", "cc0-1.0"])
        assert len(hub.titles("user/model")) == 2
        export_main([*arguments, "--hub_model_id", "user/model", "--license", "cc0-1.0", "--update_card"])
        assert ModelCard(hub.files("user/model")["README.md"].decode()).data.license == "cc0-1.0"


def test_a_model_can_be_exported_as_another_pipeline_and_in_half_precision(model, tmp_path):
    export_main(
        ["--model", str(model), "--hub_model_id", "user/x", "--output_dir", str(tmp_path)]
        + ["--pipeline", "InpaintSDEPipeline", "--variant", "fp16"]
    )
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16").to(dtype=torch.float16)
    assert type(pipe) is InpaintSDEPipeline
    assert pipe.unet.dtype == torch.float16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--results", "absent.json"], "absent.json.*cannot be read"),
        (["--model", "{stock}"], "convert it first"),
        (["--hub_token", "hf_secret"], "hf auth login"),
    ],
)
def test_mistakes_end_in_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    arguments = [a.format(stock=tmp_path / "stock") for a in arguments]
    with LoopbackHub() as hub, pytest.raises(SystemExit):
        use_hub(monkeypatch, hub, TOKEN)
        export_main(["--model", str(model), "--hub_model_id", "user/x", *arguments])
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert "hf_secret" not in error
