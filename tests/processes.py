"""Processes for tests, forked from one that has imported the libraries, which takes seconds, and nothing of ours."""

import multiprocessing
import os
import socket
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

LIBRARIES = ["accelerate", "datasets", "sklearn.datasets", "diffusers.pipelines.pipeline_utils"]
LIBRARIES += ["diffusers.models.unets.unet_2d"]


def context():
    """Where ``Process`` is such a child. What it runs must be importable; it has started no threads."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(LIBRARIES)
    return forkserver


def run(code, folder, *paths):
    """Run a program that finds only the libraries imported, in a folder and with further paths for its modules.

    Returns:
        What ``subprocess.run`` would: ``returncode``, ``stdout`` and ``stderr``.
    """
    pipes = [context().Pipe(duplex=False) for _ in range(2)]
    child = context().Process(target=_run, args=(code, str(folder), [str(p) for p in paths], [w for _, w in pipes]))
    child.start()
    for _, writer in pipes:
        writer.close()
    with ThreadPoolExecutor() as readers:
        out, err = readers.map(_everything, [reader for reader, _ in pipes])
    child.join()
    return SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err)


def _everything(reader):
    with open(os.dup(reader.fileno()), encoding="utf-8") as stream:
        return stream.read()


def _run(code, folder, paths, writers):
    for descriptor, writer in zip((1, 2), writers, strict=True):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    os.chdir(folder)
    sys.path[:0] = paths
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except Exception:  # as the interpreter reports it
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def side_by_side(function, *arguments, timeout=None):
    """Run ``function(*arguments, rank)`` in two processes on the CPU that a launcher would start; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        context().Process(target=_as_rank, args=(function, arguments, rank, port), daemon=True) for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)  # one that hangs is killed with this process
    return [child.exitcode for child in children]


def _as_rank(function, arguments, rank, port):
    import torch

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    function(*arguments, rank)
