"""Preemption: SIGTERM asks a run to save and stop, and all of its processes stop after the same step.

``accelerate launch`` of one process dies of SIGTERM without a word to the process that trains. That one therefore looks
after every step whether its launcher is still there, and takes its end for SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM  # of a process that SIGTERM has ended, by the shell's convention
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
LAUNCHER_MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run")


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of a program that starts training processes and waits for them."""
    words = list(command[:4])
    programs = (os.path.splitext(os.path.basename(word))[0] for word in words[:2])
    modules = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return any(name in LAUNCHERS for name in programs) or any(name in LAUNCHER_MODULES for name in modules)


def _launcher() -> tuple[int, int | None]:
    """This process, and the launcher that started it; None where that is a shell or another program."""
    parent = os.getppid()
    try:
        launched = is_launcher(psutil.Process(parent).cmdline())
    except (psutil.Error, OSError):
        launched = False
    return os.getpid(), parent if launched else None


_AT_IMPORT = _launcher()  # as early as possible: a launcher that is gone can no longer be recognised


class StopSignal:
    """Remembers SIGTERM while it is entered, and asks all processes whether one has received it.

    A launcher that has ended counts as SIGTERM. So does no other parent: a shell may end before what it has started.

    The handler of before is put back at the end. Outside of a program's main thread, where Python allows no handlers,
    nothing is caught.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._received = False
        self._launcher = (_AT_IMPORT if _AT_IMPORT[0] == os.getpid() else _launcher())[1]
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
        if self._launcher is not None and os.getppid() != self._launcher:
            self._received = True
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)
