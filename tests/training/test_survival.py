"""A run that is killed at any moment and resumed ends with the weights of the uninterrupted run, bit for bit."""

import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import context, side_by_side
from safetensors.torch import load_file

from diffusers_sde import SDEPipeline
from diffusers_sde.basics.files import SaveError
from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig
from diffusers_sde.training import checkpoints as checkpoints_module
from diffusers_sde.training.checkpoints import DISCARDED, UNFINISHED, list_checkpoints, read_state
from diffusers_sde.training.signals import EXIT_CODE

OPTIONS = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 14,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "dropout": 0.2,
    "sample_every": 0,
    "logger": "none",
    "mixed_precision": "no",
    "resume_from_checkpoint": "latest",
}


def trainer(output_dir, **options):
    return Trainer(TrainingConfig(output_dir=str(output_dir), **(OPTIONS | options)), load_digits().select(range(30)))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(output_dir, at_event=None, after_seconds=None, events_file=None):
    """Train; die at an event (a loss, or a file operation in the output folder), or some time after the first one."""
    torch.set_num_threads(1)
    run, events = trainer(output_dir), []

    def count(event):
        if not events and after_seconds is not None:
            threading.Timer(after_seconds, die).start()
        events.append(event)
        if len(events) == at_event:
            die()

    def on_audit(event, arguments):
        operation = event.startswith(("os.", "shutil.")) or event == "open"
        if operation and any(str(output_dir) in str(argument) for argument in arguments[:2]):
            count(event)

    loss = run.loss
    run.loss = lambda batch: (count("loss"), loss(batch))[1]
    sys.addaudithook(on_audit)
    run.run()
    if events_file is not None:
        Path(events_file).write_text(json.dumps(events))


def in_a_child(*arguments):
    child = context().Process(target=run_and_die, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def final_weights(output_dir):
    network = load_file(output_dir / "checkpoint-14" / "model.safetensors")
    averaged = load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    return [network[name] for name in sorted(network)] + [averaged[name] for name in sorted(averaged)]


def test_sigkill_at_any_moment_and_resume_is_the_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_child(whole, None, None, tmp_path / "events.json") == 0
    events = json.loads((tmp_path / "events.json").read_text())
    assert events.count("loss") == 28 and {"os.rename", "os.mkdir", "shutil.rmtree"} <= set(events)
    per_checkpoint = len(events) // 7
    draw = random.Random(0)
    deaths, unfinished, discarded = 0, 0, 0
    for attempt in range(12):
        # A death by the clock may fall into the middle of a file, one by count into every part of a checkpoint.
        by_clock = attempt % 3 == 2
        at_event = None if by_clock else draw.randrange(1, 2 * per_checkpoint)
        seconds = draw.uniform(0.0, 0.3) if by_clock else None
        deaths += in_a_child(killed, at_event, seconds) == -signal.SIGKILL
        unfinished += (killed / UNFINISHED).exists()
        discarded += (killed / DISCARDED).exists()
        for checkpoint in list_checkpoints(killed):
            read_state(checkpoint)  # whatever carries the name is whole
    assert deaths >= 10 and unfinished >= 1
    assert in_a_child(killed) == 0
    assert all(torch.equal(a, b) for a, b in zip(final_weights(whole), final_weights(killed), strict=True))
    assert [path.name for path in list_checkpoints(killed)] == ["checkpoint-12", "checkpoint-14"]


@pytest.mark.parametrize("leftover", [None, UNFINISHED, DISCARDED])
def test_a_run_killed_after_its_last_checkpoint_is_cleared_up_by_the_next(tmp_path, leftover):
    """It has nothing left to save: what a kill has left after the last checkpoint must go without another."""
    run, options = tmp_path / "run", {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": None}
    trainer(run, **options).run()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    if leftover is not None:
        shutil.copytree(run / "checkpoint-2", run / leftover)
    trainer(run, **(options | {"checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"})).run()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_sigkill_while_the_pipeline_is_saved_over_an_earlier_one(tmp_path):
    """At every file operation of the last save: what carries a name is whole, and the next run completes it."""
    options = {"max_train_steps": 2, "checkpoints_total_limit": None}
    trainer(tmp_path / "run", **options).run()
    whole = {path.relative_to(tmp_path / "run"): path.read_bytes() for path in (tmp_path / "run" / "unet").iterdir()}
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    child = context().Process(target=resume_and_die, args=(again, None, tmp_path / "events.json", options))
    child.start()
    child.join()
    events = json.loads((tmp_path / "events.json").read_text())
    saves = [number for number, event in enumerate(events, 1) if event == "os.rename"]
    assert child.exitcode == 0 and len(saves) >= 6
    seen = set()
    for at_event in (saves[0] - 3, saves[0], saves[2], saves[-1], len(events)):
        child = context().Process(target=resume_and_die, args=(again, at_event, None, options))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        seen |= {path.name for path in again.iterdir() if path.name.startswith(".")}
        assert {path.relative_to(again): path.read_bytes() for path in (again / "unet").iterdir()} == whole
        SDEPipeline.from_pretrained(again)
    assert ".unfinished-pipeline" in seen
    trainer(again, **options).run()
    assert not [path.name for path in again.iterdir() if path.name.startswith(".")]


def resume_and_die(output_dir, at_event, events_file, options):
    """Go on with a run that is over, which saves its pipeline again; die at an event of that."""
    torch.set_num_threads(1)
    run, events = trainer(output_dir, **options), []
    save = run._save_result

    def on_audit(event, arguments):
        operation = event.startswith(("os.", "shutil.")) or event == "open"
        if operation and any(str(output_dir) in str(argument) for argument in arguments[:2]):
            events.append(event)
            if len(events) == at_event:
                die()

    run._save_result = lambda: (sys.addaudithook(on_audit), save())[1]
    run.run()
    if events_file is not None:
        Path(events_file).write_text(json.dumps(events))


def test_sigterm_saves_and_exits(tmp_path):
    whole = trainer(tmp_path / "whole").run()
    run, calls = trainer(tmp_path / "stopped", checkpointing_steps=0), iter(range(100))
    loss, before = run.loss, signal.getsignal(signal.SIGTERM)

    def preempted(batch):
        if next(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch)

    run.loss = preempted
    with pytest.raises(SystemExit) as stop:
        run.run()
    assert stop.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-6"]
    resumed = trainer(tmp_path / "stopped").run()
    pairs = zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def run_rank(output_dir, terminated_at, options, rank):
    """One of two processes, of which only the second one hears SIGTERM, at a micro-batch."""
    run, calls = trainer(output_dir, **options), iter(range(1000))
    loss = run.loss

    def preempted(batch):
        if next(calls) == terminated_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch)

    run.loss = preempted
    run.run()


def test_sigterm_to_one_of_two_processes_stops_both_and_any_number_can_go_on(tmp_path):
    options = {"dropout": 0.0, "train_batch_size": 2, "checkpointing_steps": 0, "max_train_steps": 8}
    assert side_by_side(run_rank, tmp_path / "run", 7, options) == [EXIT_CODE, EXIT_CODE]
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    state = read_state(checkpoint)
    assert (checkpoint.name, state["processes"], state["samples_seen"]) == ("checkpoint-4", 2, 32)
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(state["files"])
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert side_by_side(run_rank, tmp_path / "run", None, options) == [0, 0]
    one = options | {"train_batch_size": 4}
    alone = trainer(tmp_path / "alone", **one).run()
    whole = trainer(tmp_path / "whole", **one).run()
    a, b, c = (
        torch.cat([p.detach().flatten() for p in unet.parameters()])
        for unet in (SDEPipeline.from_pretrained(tmp_path / "run").unet, alone.unet, whole.unet)
    )
    # Sums in another order, nothing else: the averaged weights have moved by far more.
    moved = torch.cat([p.detach().flatten() for p in trainer(tmp_path / "new", **one).network.parameters()])
    for other in (a, b):
        assert (other - c).norm() < 1e-3 * (moved - c).norm()


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["bit", "cut", "missing", "state", "list", "no step", "step is a word", "no text", "digit"]
)
def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog, how):
    trainer(tmp_path, max_train_steps=4).run()
    last = tmp_path / "checkpoint-4"
    if how == "bit":
        damage(last / "optimizer.bin")
    elif how == "cut":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-7])
    elif how == "missing":
        (last / "ema.safetensors").unlink()
    elif how == "state":
        (last / "training_state.json").write_text('{"step": 4')
    elif how == "list":
        (last / "training_state.json").write_text("[1, 2]")
    else:
        state = json.loads((last / "training_state.json").read_text())
        if how == "no step":
            del state["step"]
        elif how == "step is a word":
            state["step"] = "4"
        elif how == "no text":
            (last / "training_state.json").write_bytes(bytes(range(128, 256)))
        else:
            state["samples_seen"] += 1
        if how != "no text":
            (last / "training_state.json").write_text(json.dumps(state))
    resumed = trainer(tmp_path, max_train_steps=5, checkpoints_total_limit=1)
    assert resumed.step == 2
    assert "checkpoint-4" in caplog.text and "Trying the checkpoint before it" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-4.*is (damaged|not a checkpoint)"):
        trainer(tmp_path, resume_from_checkpoint="checkpoint-4")
    resumed.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    damage(tmp_path / "checkpoint-5" / "model.safetensors")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        trainer(tmp_path)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if "checkpoint-" in path.name)


def test_the_way_that_was_left_is_kept_and_never_taken_again(tmp_path, caplog):
    """Somebody goes back because what came later is bad: neither ``latest`` nor the limit may bring it back."""
    trainer(tmp_path, max_train_steps=6, checkpoints_total_limit=None).run()
    options = {"max_train_steps": 3, "checkpoints_total_limit": 1, "resume_from_checkpoint": "checkpoint-2"}
    trainer(tmp_path, **options).run()
    assert names(tmp_path) == ["abandoned-checkpoint-4", "abandoned-checkpoint-6", "checkpoint-3"]
    assert "checkpoint-6, which is later, is kept as abandoned-checkpoint-6" in caplog.text
    resumed = trainer(tmp_path, max_train_steps=6)
    assert resumed.step == 3
    resumed.run()
    # A second branch that was left finds its name taken, and can still be gone back to.
    trainer(tmp_path, max_train_steps=5, resume_from_checkpoint="abandoned-checkpoint-4").run()
    assert {"abandoned-checkpoint-6", "abandoned-checkpoint-6.2", "checkpoint-5"} <= set(names(tmp_path))
    trainer(tmp_path, max_train_steps=1, overwrite_output_dir=True, resume_from_checkpoint=None).run()
    assert names(tmp_path) == ["checkpoint-1"]


def run_with_limited_files(output_dir, limit, options):
    """Train where no file can be larger than a limit: what is written beyond it fails as on a full disk."""
    import resource

    torch.set_num_threads(1)
    run = trainer(output_dir, **options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run.run()
    except SaveError as error:
        Path(f"{output_dir}.message").write_text(str(error))


@pytest.mark.parametrize("what", ["checkpoint", "pipeline"])
def test_a_disk_that_is_really_full_gets_its_space_back(tmp_path, what):
    """Torch and safetensors have errors of their own for it, none of which is an OSError."""
    run = tmp_path / "run"
    trainer(run, max_train_steps=2).run()
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoint-2").iterdir()}
    weights = sizes["model.safetensors"]
    assert weights < sizes["optimizer.bin"]
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = {"max_train_steps": 4, "checkpointing_steps": 2 if what == "checkpoint" else 0}
    child = context().Process(
        target=run_with_limited_files, args=(run, weights * 3 // (2 if what[0] == "c" else 4), options)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    message = Path(f"{run}.message").read_text()
    assert len(message.splitlines()) == 1 and f"output_dir {str(run)!r}" in message and "MiB free" in message, message
    after = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {name for name in after if after[name] != before.get(name)} <= {Path("training_config.json")}
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    trainer(run, max_train_steps=4).run()
    assert "checkpoint-4" in names(run)


def test_nothing_in_a_checkpoint_is_unpickled_freely(tmp_path):
    """Tensors and plain values only: torch.load with weights_only reads all that is no JSON and no safetensors."""
    trainer(tmp_path, max_train_steps=2).run()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not any(name.startswith("custom_checkpoint") for name in files)
    torch.load(tmp_path / "checkpoint-2" / "optimizer.bin", weights_only=True)


def test_another_folder_can_be_resumed_from(tmp_path):
    trainer(tmp_path / "a", max_train_steps=2).run()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "elsewhere")
    assert trainer(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "elsewhere")).step == 2


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(ValueError, match="output_dir .* has 0 MiB free, but a checkpoint .* of this network need"):
        trainer(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    trainer(tmp_path / "new" / "folder")


def test_an_unwritable_folder_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir '.*file/run' cannot be written"):
        trainer(tmp_path / "file" / "run")

    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(checkpoints_module.tempfile, "TemporaryFile", refused)  # root may write anywhere
    with pytest.raises(ValueError, match="output_dir .* cannot be written: .*Permission denied"):
        trainer(tmp_path / "run")
