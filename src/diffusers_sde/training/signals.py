"""Preemption: SIGTERM asks a run to save and stop, and all of its processes stop after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM  # of a process that SIGTERM has ended, by the shell's convention


class StopSignal:
    """Remembers SIGTERM while it is entered, and asks all processes whether one has received it.

    The handler of before is put back at the end. Outside of a program's main thread, where Python allows no handlers,
    nothing is caught.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._received = False
        self._previous: Any = None
        self._catches = threading.current_thread() is threading.main_thread()
        # On the host, so that no step waits for the accelerator's device.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> StopSignal:
        if self._catches:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_any_process(self) -> bool:
        """Whether any process was asked to stop; all processes must call it after every step, and agree."""
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)
