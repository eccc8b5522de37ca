"""Options: every one is reachable, explained and checked before anything is done."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import processes
import pytest
import torch
from PIL import Image

from diffusers_sde.training import Trainer, TrainingConfig, parse_args
from diffusers_sde.training.cli import build_parser, main
from diffusers_sde.training.recipes import RECIPES

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


def test_the_empty_command_line_is_the_default_configuration():
    assert parse_args([]) == TrainingConfig()


def test_every_field_is_an_option_with_help():
    options = {action.dest: action for action in build_parser()._actions}
    for f in fields(TrainingConfig):
        assert len(options[f.name].help) > 5
        assert f"--{f.name}" in options[f.name].option_strings


def test_values_reach_the_fields_with_their_types():
    config = parse_args(
        "--sde sub_vp --block_out_channels 16 32 --no-use_ema --random_flip --learning_rate 3e-4 --resolution 16 "
        "--ddpm_num_steps 500 --resume_from_checkpoint latest".split()
    )
    assert config.sde == "sub_vp"
    assert config.block_out_channels == (16, 32)
    assert (config.use_ema, config.random_flip) == (False, True)
    assert config.learning_rate == 3e-4
    assert config.resolution == 16
    assert config.num_train_timesteps == 500
    assert config.resume_from_checkpoint == "latest"


def pasted(config):
    """What a shell and the parser make of the command of a card."""
    launcher, *arguments = re.fullmatch(r"accelerate launch scripts/train.py ?(.*)", config.command()).groups()
    return parse_args(shlex.split(launcher)), arguments


OPTIONS = [
    {},
    {"sde": "ve", "use_ema": False, "random_flip": True, "block_out_channels": (16, 32), "cache_images": False},
    {"log_normal_mean": -1e-5, "time_sampling": "log_normal", "data_min": 0.0, "learning_rate": 3.3333e-05},
    {"dataset_name": "user/some-images", "dataset_config_name": "a b", "image_column": "it's"},
    {"dataset_name": "digits", "label_column": "-label", "dataset_split": "train[:10%]"},
    {"image_column": '$(rm -rf ~); `id` && echo "x" | cat > y', "dataset_name": "user/x"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_command_of_a_card_can_be_pasted(options):
    config = TrainingConfig(**options)
    assert pasted(config)[0] == config


@pytest.mark.parametrize(
    "option", ["dataset_name", "train_data_dir", "model_config_name_or_path", "dataset_config_name"]
)
@pytest.mark.parametrize(
    "path",
    [
        "{here}/my data",
        "{here}/my data/",
        "/srv/not/here",
        "~/pictures",
        "../pictures",
        "file:///srv/x",
        r"C:\Users\me",
    ],
)
def test_the_command_of_a_card_holds_no_path_of_this_machine(tmp_path, option, path):
    (tmp_path / "my data").mkdir()
    config = TrainingConfig(**{option: path.format(here=tmp_path)})
    word = getattr(pasted(config)[0], option)
    assert re.fullmatch(r"path/to/(my data|here|pictures|x|me)", word)
    assert not any(part in config.command() for part in (str(tmp_path), "srv", "~", "..", "Users"))


def test_a_folder_under_the_name_of_a_data_set_is_a_path(tmp_path, monkeypatch):
    """The datasets library takes a folder for a name, and so does the option."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "digits"):
        (tmp_path / name).mkdir()
    assert pasted(TrainingConfig(dataset_name="mine"))[0].dataset_name == "path/to/mine"
    assert pasted(TrainingConfig(train_data_dir="mine"))[0].train_data_dir == "path/to/mine"
    assert pasted(TrainingConfig(dataset_name="digits"))[0].dataset_name == "digits"
    assert "mine" not in TrainingConfig(output_dir="mine", cache_dir="mine", logging_dir="mine").command()


def test_the_command_of_a_card_is_one_line():
    assert "\n" not in TrainingConfig(image_column="a\n```\n# b", dataset_name="user/x").command()


def test_options_of_diffusers_train_unconditional_are_known():
    parse_args(
        "--dataset_name a --dataset_config_name b --output_dir o --overwrite_output_dir --cache_dir c --resolution 64 "
        "--center_crop --random_flip --train_batch_size 16 --eval_batch_size 16 --dataloader_num_workers 0 "
        "--num_epochs 100 --save_images_epochs 10 --save_model_epochs 10 --gradient_accumulation_steps 1 "
        "--learning_rate 1e-4 --lr_scheduler cosine --lr_warmup_steps 500 --adam_beta1 0.95 --adam_beta2 0.999 "
        "--adam_weight_decay 1e-6 --adam_epsilon 1e-08 --use_ema --ema_inv_gamma 1.0 --ema_power 0.75 "
        "--ema_max_decay 0.9999 --logger tensorboard --logging_dir logs --mixed_precision no "
        "--prediction_type epsilon --ddpm_num_steps 1000 --ddpm_num_inference_steps 1000 "
        "--checkpointing_steps 500 --checkpoints_total_limit 3 --resume_from_checkpoint latest "
        "--model_config_name_or_path m".split()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sde": "vpsde"}, ["sde", "'vpsde'", "sub_vp"]),
        ({"prediction_type": "eps"}, ["prediction_type", "'eps'", "epsilon"]),
        ({"weighting": "g2"}, ["weighting", "'g2'", "likelihood"]),
        ({"time_conditioning": "t"}, ["time_conditioning", "log_sigma"]),
        ({"train_batch_size": 0}, ["train_batch_size", "at least 1", "0"]),
        ({"max_train_steps": -5}, ["max_train_steps", "-5"]),
        ({"learning_rate": 0.0}, ["learning_rate", "greater than 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"sigma_max": -1.0}, ["sigma_max", "-1.0"]),
        ({"ema_max_decay": 1.5}, ["ema_max_decay", "at most 1"]),
        ({"train_eps": 1.0}, ["train_eps", "(0, 1)"]),
        ({"channels": 2}, ["channels", "1 or 3"]),
        ({"block_out_channels": (32, 0)}, ["block_out_channels", "at least 1"]),
        ({"dataset_name": "digits", "train_data_dir": "x"}, ["dataset_name", "train_data_dir"]),
        ({"max_train_steps": 10, "lr_warmup_steps": 10}, ["lr_warmup_steps", "max_train_steps"]),
        ({"time_embedding_type": "fourier"}, ["fourier", "score", "sigma"]),
        ({"beta_schedule": "squaredcos_cap_v2"}, ["beta_schedule", "discrete"]),
        ({"time_sampling": "importance"}, ["time_sampling", "likelihood"]),
        ({"time_sampling": "log_normal", "discrete": True}, ["time_sampling", "continuous"]),
        ({"data_min": 0.5}, ["data_min", "at most 0"]),
        ({"ema_relative_std": 0.3}, ["ema_relative_std", "0.28"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision", "bf16"]),
        ({"resolution": 100_000}, ["resolution", "at most 16384"]),
        ({"resolution": 8.0}, ["resolution", "an integer"]),
        ({"resolution": "8"}, ["resolution", "an integer", "'8'"]),
        ({"seed": 2**70}, ["seed", "at most 4294901760"]),
        ({"use_ema": 1}, ["use_ema", "True or False"]),
        ({"learning_rate": True}, ["learning_rate", "a finite number"]),
        ({"log_normal_mean": float("nan")}, ["log_normal_mean", "a finite number", "nan"]),
        ({"dataset_split": None}, ["dataset_split", "text"]),
        ({"block_out_channels": 32}, ["block_out_channels", "a list"]),
        ({"block_out_channels": (32, 2**40)}, ["block_out_channels", "at most 65536"]),
        ({"attention_resolutions": "8"}, ["attention_resolutions", "a list"]),
        ({"white_level": 0}, ["white_level", "at least 1"]),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(ValueError) as error:
        TrainingConfig(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", str(tmp_path / "o"), "--train_data_dir", str(tmp_path / "missing")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: --train_data_dir")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_name": "/home/me/my pictures"}, ["--dataset_name", "path/to/my pictures"]),
        ({"dataset_name": "~/pictures"}, ["--dataset_name", "path/to/pictures"]),
        ({"dataset_name": "C:\\Users\\me\\pictures"}, ["--dataset_name", "path/to/pictures"]),
        ({"train_data_dir": "gone/pictures"}, ["--train_data_dir", "path/to/pictures"]),
        ({"train_data_dir": "."}, ["--train_data_dir", "path/to/data"]),
        ({"model_config_name_or_path": "/home/me/net"}, ["--model_config_name_or_path", "path/to/net"]),
        ({"dataset_name": "uoft-cs/cifar10"}, ["--dataset_name", "uoft-cs/cifar10"]),
        ({"dataset_name": "digits"}, ["--dataset_name", "digits"]),
        ({"image_column": "my column; rm -r ~"}, ["--image_column", "my column; rm -r ~"]),
        ({"block_out_channels": (4, 8), "use_ema": False}, ["--block_out_channels", "4", "8", "--no-use_ema"]),
    ],
)
def test_the_command_of_a_run_runs_elsewhere_and_tells_no_paths(options, words):
    command = TrainingConfig(**options).command()
    assert shlex.split(command) == ["accelerate", "launch", "scripts/train.py", *words]
    assert "me" not in re.split(r"[^a-z]", command)


def test_a_repeated_option_overrides():
    """A wrapper script has its defaults, and its user the last word."""
    config = parse_args("--block_out_channels 4 8 --block_out_channels 5 7".split())
    assert config.block_out_channels == (5, 7)
    config = parse_args("--attention_resolutions 4 --attention_resolutions 8 16 --seed 1 --seed 2".split())
    assert (config.attention_resolutions, config.seed) == ((8, 16), 2)


def test_numbers_and_paths_of_other_libraries_are_taken():
    config = TrainingConfig(seed=np.int64(3), learning_rate=np.float32(0.5), output_dir=Path("a"))
    assert (config.seed, config.learning_rate, config.output_dir) == (3, 0.5, "a")
    assert (type(config.seed), type(config.learning_rate)) == (int, float)
    assert TrainingConfig(attention_resolutions=[]).attention_resolutions == ()


def folder_with_strange_metadata(folder):
    """A picture, and a list of pictures that names a file outside of the folder."""
    Image.new("L", (8, 8)).save(folder / "0.png")
    (folder / "metadata.csv").write_text("file_name,text\n../../../../etc/hostname,x\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resolution 100000", "resolution must be an integer at least 2 and at most 16384, got 100000"),
        (
            "--resolution 16384 --block_out_channels 4 --train_batch_size 100000",
            "do not fit into .* of free memory",
        ),
        ("--block_out_channels 60000 60000 --layers_per_block 100", "do not fit into .* of free memory"),
        (f"--seed {2**70}", "seed must be"),
        ("--train_data_dir METADATA", "train_data_dir .* cannot be read"),
        ("--model_config_name_or_path CONFIG", "model_config_name_or_path .* is no config of a UNet2DModel"),
        ("--logging_dir ../x", "logging_dir must"),
        ("--output_dir LINK", "is a link to"),
        ("--dataset_split test", "split of the digits must be train or a slice"),
    ],
)
def test_what_used_to_be_a_traceback_is_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "METADATA").mkdir()
    folder_with_strange_metadata(tmp_path / "METADATA")
    (tmp_path / "CONFIG").mkdir()
    tiny = {"sample_size": 8, "in_channels": "3", "out_channels": 1, "block_out_channels": [4, 4]}
    (tmp_path / "CONFIG" / "config.json").write_text(json.dumps(tiny | {"_class_name": "UNet2DModel"}))
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    words = [str(tmp_path / word) if word.isupper() else word for word in arguments.split()]
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", str(tmp_path / "o"), "--cache_dir", str(tmp_path / "cache"), *words])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error:") and re.search(message, line), line
    assert not (tmp_path / "o").exists() and not (tmp_path / "nowhere").exists()


def test_the_script_answers_help(tmp_path):
    program = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = processes.run(program, tmp_path)
    assert done.returncode == 0 and "--gradient_accumulation_steps" in done.stdout, done.stderr


def test_recipes_are_complete_and_explicit_options_count_first():
    for name in RECIPES:
        config = parse_args(["--recipe", name])
        assert config == TrainingConfig.from_recipe(name)
        assert (config.learning_rate, config.lr_warmup_steps, config.train_batch_size) == (2e-4, 5000, 128)
    config = parse_args("--recipe paper_ve_continuous --sigma_max 90 --no-random_flip --learning_rate 2e-4".split())
    assert (config.sigma_max, config.sigma_min, config.random_flip) == (90.0, 0.01, False)
    assert config.max_train_steps == 1_300_000
    assert parse_args("--recipe paper_vp --num_epochs 3".split()).max_train_steps is None
    with pytest.raises(ValueError, match="recipe must be one of paper_ve, .*, got 'paper'"):
        TrainingConfig.from_recipe("paper")


def test_recipes_train_the_papers_sdes(tmp_path):
    """The quantities of the paper's equations 30 to 33 and the time that its networks are fed."""
    data = datasets.Dataset.from_dict({"image": [np.full((32, 32, 3), v, dtype=np.uint8) for v in (0, 255)]})
    small = {"model_type": "unet", "block_out_channels": (8, 8), "layers_per_block": 1, "logger": "none"}
    small["output_dir"] = str(tmp_path)
    built = {name: Trainer(TrainingConfig.from_recipe(name, **small), data) for name in RECIPES}
    t = torch.tensor([1e-5, 0.3, 1.0], dtype=torch.float64)
    variance = 1 - torch.exp(-0.1 * t - 9.95 * t**2)
    sigma = 0.01 * 5000**t
    for name in ("paper_ve", "paper_ve_continuous"):
        torch.testing.assert_close(built[name].sde.sigma(t), sigma)
    torch.testing.assert_close(built["paper_vp_continuous"].sde.sigma(t), variance.sqrt())
    torch.testing.assert_close(built["paper_sub_vp_continuous"].sde.sigma(t), variance)
    fed = {name: run.scheduler.conditioning.timestep(run.sde, t[1:]) for name, run in built.items()}
    torch.testing.assert_close(fed["paper_ve_continuous"], sigma[1:])
    for name in ("paper_vp_continuous", "paper_sub_vp_continuous", "paper_ve"):
        torch.testing.assert_close(fed[name], 999 * t[1:])
    assert built["paper_vp"].discrete_steps == built["paper_ve"].discrete_steps == 1000
    assert {name: run.config.ema_max_decay for name, run in built.items() if "_ve" in name} == {
        "paper_ve": 0.999,
        "paper_ve_continuous": 0.999,
    }
