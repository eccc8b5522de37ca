"""The output folder: what is in it and was not written by a run stays, and one run at a time writes to it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

from diffusers_sde.basics.files import LOCK_FILE, FolderInUse, lock_folder, write_folder_whole, write_whole
from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig
from diffusers_sde.training.cli import main
from diffusers_sde.training.signals import is_launcher

TINY = {
    "block_out_channels": (4, 4),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "num_inference_steps": 2,
    "num_sample_images": 1,
    "mixed_precision": "no",
}
SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(20))


def trainer(output_dir, digits, **options):
    return Trainer(TrainingConfig(output_dir=str(output_dir), **(TINY | options)), digits)


@pytest.mark.parametrize(
    "logging_dir",
    ["/etc", "../victim", ".", "", "./", "a/../..", "..", "C:\\logs", "a\\..\\..\\b", "unet", "samples/x"],
)
def test_logs_are_inside_the_output_folder(logging_dir):
    with pytest.raises(ValueError, match="logging_dir must"):
        TrainingConfig(logging_dir=logging_dir)


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path, digits):
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("precious")
    trainer(run, digits, logging_dir="a/b", sample_every=1).run()
    (run / "notes.txt").write_text("mine")
    (run / "samples" / "notes.txt").write_text("mine")
    (run / "logs").mkdir()
    (run / "logs" / "notes.txt").write_text("mine")
    (run / "unet" / "notes.txt").write_text("mine")
    (run / "checkpoint-7").symlink_to(outside)
    written = {path.name for path in run.iterdir()}
    assert {"unet", "scheduler", "samples", "a", "checkpoint-1", "checkpoint-2", "model_index.json"} <= written
    # Another tracker's folder that exists in the output folder is no part of the run.
    again = trainer(run, digits, overwrite_output_dir=True, logging_dir="logs", checkpointing_steps=0, sample_every=0)
    again._prepare = lambda: sys.exit(0)  # as soon as the earlier run is gone
    with pytest.raises(SystemExit):
        again.run()
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "training_config.json", *(f"{n}/notes.txt" for n in ("logs", "samples", "unet"))}
    assert not (run / "checkpoint-7").is_symlink() and not (run / "a").exists()
    assert (outside / "thesis.txt").read_text() == "precious"


def test_links_in_a_run_go_and_what_they_lead_to_stays(tmp_path, digits):
    run = tmp_path / "run"
    trainer(run, digits, logger="none").run()
    for name in ("samples", "unet", "logs"):
        target = tmp_path / f"target of {name}"
        target.mkdir()
        for file in ("step-0000001.png", "config.json", "notes.txt"):
            (target / file).write_text("precious")
        (target / "diffusers-sde").mkdir()
        for file in (run / name).glob("*"):
            file.unlink()
        if (run / name).exists():
            (run / name).rmdir()
        (run / name).symlink_to(target)
    trainer(run, digits, overwrite_output_dir=True, logger="none").run()
    for name in ("samples", "unet", "logs"):
        target = tmp_path / f"target of {name}"
        assert {path.name for path in target.iterdir()} == {
            *("step-0000001.png", "config.json", "notes.txt", "diffusers-sde"),
        }
        assert (target / "config.json").read_text() == "precious"
        assert not (run / name).is_symlink()


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "checkpoint-500/model.safetensors"])
def test_a_folder_that_no_run_has_filled_is_not_overwritten(tmp_path, digits, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=r"overwrite_output_dir: .* was not written by a training run"):
        trainer(tmp_path, digits, overwrite_output_dir=True)
    for wanted in (None, "latest"):
        with pytest.raises(ValueError, match="already holds a run|no checkpoint in .* is whole"):
            trainer(tmp_path, digits, resume_from_checkpoint=wanted)
    assert (tmp_path / name).read_text() == "precious"


def test_a_link_to_nothing_is_named_before_the_data_are_read(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(ValueError, match="output_dir .* is a link to .*nowhere"):
            Trainer(TrainingConfig(output_dir=str(place), train_data_dir=str(tmp_path / "no data")))


# ------------------------------------------------------------------ one run at a time

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parents[1]))  # the rest of the package takes seconds to import
from basics import files
with files.lock_folder(Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another_run(tmp_path):
    """A process that holds the lock of a folder."""
    import diffusers_sde.basics.files

    command = [sys.executable, "-c", HOLD, diffusers_sde.basics.files.__file__, str(tmp_path / "run")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "locked\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, digits, another_run, capsys):
    run = tmp_path / "run"
    with pytest.raises(FolderInUse, match=rf"output_dir '{run}' is in use by process {another_run.pid} on "):
        trainer(run, digits)
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", str(run), "--max_train_steps", "1"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    another_run.send_signal(signal.SIGKILL)
    another_run.wait()
    trainer(run, digits).run()
    assert not (run / LOCK_FILE).exists()


def test_two_runs_that_start_together(tmp_path, digits):
    """Both have looked at the empty folder; the second one must not write to what the first one has begun."""
    first, second = trainer(tmp_path / "run", digits, seed=0), trainer(tmp_path / "run", digits, seed=7)
    inside = []

    def prepare():
        with pytest.raises(FolderInUse, match="in use by process .*, which is this one"):
            second.run()
        inside.append(True)
        Trainer._prepare(first)

    first._prepare = prepare
    first.run()
    assert inside
    with pytest.raises(FolderInUse, match="another run has saved checkpoints"):
        second.run()
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["seed"] == 0


def test_a_lock_ends_with_the_block_and_is_not_inherited(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path):
        with pytest.raises(FolderInUse), lock_folder(tmp_path):
            pass
        raise KeyError
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path):
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
    with lock_folder(tmp_path):
        pass
    child.kill()
    child.wait()


def test_the_package_can_be_imported_without_locks(tmp_path):
    hidden = "import sys; sys.modules['fcntl'] = None; from diffusers_sde.basics import files; "
    use = "from pathlib import Path; import contextlib\nwith files.lock_folder(Path('.')): print(files.fcntl)"
    done = processes.run(hidden + use, tmp_path)
    assert done.stdout == "None\n", done.stderr


# ------------------------------------------------------------------ whole or absent


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "file", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_nothing_gets_its_name_before_the_disk_has_it(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(("sync", os.fstat(d).st_ino)), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", os.stat(a).st_ino)), replace(a, b)))
    write_whole(tmp_path / "file", lambda path: path.write_text("new"))
    assert [event[0] for event in events] == ["sync", "name"] and events[0][1] == events[1][1]
    events.clear()

    def save(folder):
        (folder / "part").mkdir()
        for name in ("index.json", "a", "part/b"):
            (folder / name).write_text(name)
        assert not events and not (tmp_path / "model").exists()

    write_folder_whole(tmp_path / "model", tmp_path / ".unfinished", save)
    files = [inode for event, inode in events if event == "name"]
    assert len(files) == 3 and all(events.index(("sync", inode)) < events.index(("name", files[0])) for inode in files)
    assert files[-1] == (tmp_path / "model" / "index.json").stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_a_pipeline_that_is_saved_again_is_whole_at_every_moment(tmp_path, digits):
    run = trainer(tmp_path, digits, logger="none")
    run.run()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = weights.read_bytes()

    class Interrupted:
        def save_pretrained(self, folder):
            Path(folder, "unet").mkdir()
            Path(folder, "unet", weights.name).write_bytes(b"half of i")
            raise KeyboardInterrupt

    from diffusers_sde.training.checkpoints import save_model

    with pytest.raises(KeyboardInterrupt):
        save_model(Interrupted(), tmp_path)
    assert weights.read_bytes() == old and not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------ the launcher


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/env/bin/python /env/bin/accelerate launch scripts/train.py", True),
        ("python -m accelerate.commands.launch scripts/train.py", True),
        ("/usr/bin/python3 /usr/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("bash /home/me/accelerate/run.sh", False),
        ("bash", False),
        ("", False),
        ("/sbin/init", False),
    ],
)
def test_launchers_are_told_from_shells(command, expected):
    assert is_launcher(command.split()) is expected


def test_a_run_whose_launcher_dies_saves_and_stops(tmp_path):
    """``accelerate launch`` of one process dies of SIGTERM alone; what it has started must not go on for ever."""
    accelerate = Path(sys.executable).with_name("accelerate")
    if not accelerate.exists():
        pytest.skip("accelerate has no command here")
    out = tmp_path / "run"
    command = [sys.executable, accelerate, "launch", "--num_cpu_threads_per_process", "1", SCRIPT, "--output_dir", out]
    command += "--max_train_steps 1000000 --checkpointing_steps 0 --sample_every 0 --logger none".split()
    command += "--block_out_channels 4 4 --layers_per_block 1 --train_batch_size 4 --mixed_precision no".split()
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "ACCELERATE_USE_CPU": "true"}
        )
    deadline = time.monotonic() + 120
    while "Training:" not in (tmp_path / "log").read_text() or not (out / LOCK_FILE).exists():
        assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    worker = int((out / LOCK_FILE).read_text().split()[0])
    assert worker != launcher.pid
    launcher.terminate()
    launcher.wait()
    while (out / LOCK_FILE).exists():
        if time.monotonic() > deadline:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the training process goes on without its launcher")
        time.sleep(0.1)
    assert [path.name.partition("-")[0] for path in out.glob("checkpoint-*")] == ["checkpoint"]
