"""What every test shares: one torch thread, and a fixed seed."""

import os
import sys

import numpy as np
import pytest
import torch

# Models here are tiny and xdist's workers fill the cores: threads that wait for each other cost ten times what they
# gain. The variable reaches the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that draw from the global generator


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state per process, and a run must not find that of the test before it."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
