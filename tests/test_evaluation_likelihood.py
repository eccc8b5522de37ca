"""scripts/evaluate.py --bpd: one process and two, the picture, and mistakes on the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from diffusers_sde import FlowSDEScheduler, SDEPipeline
from diffusers_sde.evaluation import EvaluationConfig, evaluate, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.02)
    folder = tmp_path_factory.mktemp("model")
    SDEPipeline(unet=unet, scheduler=FlowSDEScheduler()).save_pretrained(folder)
    return str(folder)


def test_numbers_do_not_depend_on_the_number_of_processes(model, tmp_path):
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    arguments = ["--model", model, "--bpd", "--num_images", "5", "--rtol", "1e-3", "--atol", "1e-3", "--output"]
    main([*arguments, str(outputs[0])])
    code = f"from diffusers_sde.evaluation import main; main({[*arguments, str(outputs[1])]!r})"
    script = tmp_path / "evaluate.py"
    script.write_text(code)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads(path.read_text()) for path in outputs)
    assert one["images"] == 5 and len(one["bits_per_dim"]["per_image"]) == 5
    torch.testing.assert_close(
        torch.tensor(one["bits_per_dim"]["per_image"]),
        torch.tensor(two["bits_per_dim"]["per_image"]),
        rtol=0,
        atol=1e-4,
    )


def test_the_picture_has_images_and_their_reconstructions(model, tmp_path):
    path = tmp_path / "codes.png"
    report = evaluate(EvaluationConfig(model=model, figure=str(path), num_images=4))
    assert report["figure"]["round_trip_rms"] < 1e-2
    picture = Image.open(path)
    assert picture.size[0] > picture.size[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--bpd", "--num_images", "0"], "num_images"),
        (["--bpd", "--num_probes", "0"], "num_probes"),
        (["--bpd", "--rtol", "-1"], "rtol"),
        (["--bpd", "--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(model, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", model, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("evaluate.py: error:")
