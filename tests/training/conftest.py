"""What tests of training share."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from shades import shades as shades  # a fixture


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state per process, and a run must not find that of the test before it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
