"""scripts/evaluate.py --bpd: the picture, and mistakes on the command line."""

import pytest
from PIL import Image
from tiny_networks import tiny_unet

from diffusers_sde import FlowSDEScheduler, SDEPipeline
from diffusers_sde.evaluation import EvaluationConfig, evaluate
from diffusers_sde.evaluation.cli import evaluate_main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    unet = tiny_unet()
    folder = tmp_path_factory.mktemp("model")
    SDEPipeline(unet=unet, scheduler=FlowSDEScheduler()).save_pretrained(folder)
    return str(folder)


def test_the_picture_has_images_and_their_reconstructions(model, tmp_path):
    path = tmp_path / "codes.png"
    report = evaluate(EvaluationConfig(model=model, figure=str(path), num_images=4))
    assert report["figure"]["round_trip_rms"] < 1e-2
    picture = Image.open(path)
    assert picture.size[0] > picture.size[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", "0"], "nothing to do"),
        (["--bpd", "--num_images", "0"], "num_images"),
        (["--bpd", "--num_probes", "0"], "num_probes"),
        (["--bpd", "--rtol", "-1"], "rtol"),
        (["--bpd", "--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(model, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate_main(["--model", model, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("evaluate.py: error:")
