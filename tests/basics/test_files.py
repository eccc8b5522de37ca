"""Who may read what is written."""

import os
import stat

import pytest
from hub_models import tiny_pipeline

from diffusers_sde.basics.files import write_folder_whole, write_whole


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write_privately(path):
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def test_a_file_is_readable_as_the_umask_says(umask, tmp_path):
    (tmp_path / ".file.unfinished").touch(0o600)  # an interrupted run has left it
    write_whole(tmp_path / "file", write_privately)
    assert mode(tmp_path / "file") == 0o666 & ~umask


def test_the_files_of_a_folder_are_readable_as_the_umask_says(umask, tmp_path):
    write_folder_whole(tmp_path / "folder", tmp_path / "unfinished", lambda folder: write_privately(folder / "file"))
    assert mode(tmp_path / "folder" / "file") == 0o666 & ~umask


def test_weights_of_a_pipeline_are_readable_as_the_umask_says(umask, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {mode(path) for path in files} == {0o666 & ~umask}
