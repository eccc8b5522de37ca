"""The program diffusers-sde, and the demo that it runs."""

import importlib
import inspect
import re
from pathlib import Path

import processes
import pytest
from PIL import Image
from tiny_networks import tiny_unet

from diffusers_sde import ClassConditionalSDEPipeline, SDEPipeline, VPSDEScheduler, commands
from diffusers_sde.basics.options import in_option_words, names_of, parser_of
from diffusers_sde.commands import COMMANDS, demo, main
from diffusers_sde.shipping.version import __version__
from diffusers_sde.training import TrainingConfig
from diffusers_sde.training.cli import build_parser, parse_args


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_its_name_in_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: diffusers-sde {name} ")


def test_the_program_lists_its_commands(capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +{re.escape(c.summary)}$", out, re.M) for name, c in COMMANDS.items())
    with pytest.raises(SystemExit) as end:
        main(["evalute"])
    assert end.value.code == 2 and "no command 'evalute' (did you mean 'evaluate'?)" in capsys.readouterr().err


def test_python_runs_the_program_as_a_module(tmp_path):
    program = "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module({!r}, run_name='__main__')"
    done = processes.run(program.format("diffusers_sde.commands"), tmp_path)
    assert done.stdout == f"diffusers-sde {__version__}\n", done.stderr


def test_pip_installs_the_program():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    module, _, function = re.search(r'^diffusers-sde = "(.*)"$', text, re.M)[1].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_a_command_without_its_packages_says_which_extra_has_them(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(commands.importlib, "import_module", missing)
    with pytest.raises(SystemExit) as end:
        main(["train"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("diffusers-sde train: error: datasets is not installed")
    assert "pip install 'diffusers-sde[training]'" in line


def test_a_mistake_is_answered_with_the_option(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--dataset_name", "digits", "--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path)])
    expected = (
        f"diffusers-sde train: error: --dataset_name digits and --train_data_dir {tmp_path} exclude each other.\n"
    )
    assert end.value.code == 2 and capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "message, line",
    [
        ("delete it with overwrite_output_dir, or choose", "delete it with --overwrite_output_dir, or choose"),
        ("resume_from_checkpoint='latest' goes on", "--resume_from_checkpoint latest goes on"),
        ("it needs continuous time, got discrete=True.", "it needs continuous time, got --discrete."),
        ("use_ema=False", "--no-use_ema"),
        ("seed must be an integer", "--seed must be an integer"),
        # Words and paths that are no options.
        ("the discrete levels of a seed must fit", "the discrete levels of a seed must fit"),
        ("'/home/output_dir/x' is a file", "'/home/output_dir/x' is a file"),
        ("--output_dir is one already", "--output_dir is one already"),
    ],
)
def test_messages_are_spelled_as_on_a_command_line(message, line):
    assert in_option_words(message, names_of(TrainingConfig)) == line


def test_options_stand_in_groups_of_one_subject():
    groups = {group.title: group._group_actions for group in build_parser()._action_groups}
    of = {action.dest: title for title, actions in groups.items() for action in actions}
    assert of["learning_rate"] == of["adam_beta1"] != of["push_to_hub"] == of["hub_token"]
    assert set(of) >= set(names_of(TrainingConfig))
    plain = parser_of(type("Plain", (), {"__doc__": "Nothing.", "__dataclass_fields__": {}}))
    assert [group.title for group in plain._action_groups[2:]] == []


def test_commands_take_their_name():
    for name, command in COMMANDS.items():
        function = commands._function(name)
        assert list(inspect.signature(function).parameters) == ["argv", "prog"], command


# ---------------------------------------------------------------------- the demo


def test_the_demo_trains_by_a_command_line_that_exists(monkeypatch, tmp_path):
    words = []
    monkeypatch.setattr(demo, "run", lambda *command: words.extend(command))
    demo.train(tmp_path, 5)
    start = words.index("diffusers_sde.commands")
    assert words[start - 1] == "-m" and words[start + 1] == "train"
    config = parse_args(words[start + 2 :])
    assert config.max_train_steps == 5 and config.class_conditional and config.output_dir == str(tmp_path)


@pytest.mark.parametrize("classes", [None, 11])
def test_the_last_lines_of_the_demo_show_images(classes, monkeypatch, tmp_path, capsys):
    options = {"null_class": 10} if classes else {}
    cls = ClassConditionalSDEPipeline if classes else SDEPipeline
    cls(tiny_unet(num_class_embeds=classes), VPSDEScheduler(), **options).save_pretrained(tmp_path)
    for name in ("train", "draw_samples", "draw_conditional"):
        monkeypatch.setattr(demo, name, lambda *arguments: None)
    demo.run_demo(tmp_path, 1)
    load, show = capsys.readouterr().out.splitlines()[-2:]
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
    exec(f"{load}\npipe.set_progress_bar_config(disable=True)\n{show}", {})
    assert [picture.size for picture in shown] == [(1024, 256)]
    between = [shown[0].crop((128 * i - 4, 0, 128 * i + 4, 256)).getextrema() for i in range(1, 8)]
    assert set(between) <= {(255, 255), ((255, 255),) * 3}  # a white gap beside each image
