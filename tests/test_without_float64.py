"""Nothing needs float64 on the device: Apple's GPUs have none."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_device_without_float64():
    """In a process of its own: torch counts devices once, at the first backward pass."""
    file = Path(__file__).with_name("on_pretended_device.py")
    options = "-q --tb=short -p no:cacheprovider -p no:xdist".split()
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip("this torch knows no devices written in Python")
