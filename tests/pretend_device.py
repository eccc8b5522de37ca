"""A device without float64, as Apple's GPUs are, for machines that have none.

Tensors on it compute on the CPU. What such a device refuses is refused: tensors in float64, also while they are copied
to the host, and operations of its tensors with those of the host, numbers apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "pretended"


class OnDevice(Tensor):
    """A tensor on the device, whose numbers another tensor holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held.dtype == torch.float64:
            raise TypeError("float64 on a device that has none")
        result = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{DEVICE}:0",
        )
        result.held = held
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


COPIES = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_", "aten::index_put")


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation, on the CPU."""
    given = kwargs.get("device")
    ours = [a for a in tree_leaves((args, kwargs)) if isinstance(a, OnDevice)]
    there = torch.device(given).type == DEVICE if given is not None else bool(ours)
    if there and given is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if ours and not func._schema.name.startswith(COPIES):
        others = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and not isinstance(a, OnDevice)]
        if any(a.ndim for a in others):
            raise RuntimeError(f"{func} of tensors of this device and of the host")
    if ours and not there and kwargs.get("dtype") == torch.float64:
        raise TypeError("float64 on a device that has none, on the way to the host")
    held = tree_map(lambda a: a.held if isinstance(a, OnDevice) else a, (args, kwargs))
    out = func(*held[0], **held[1])
    if func._schema.is_mutable:  # the result, if there is one, is an argument
        return None if out is None else kwargs.get("out", args[0])
    return tree_map(lambda o: OnDevice(o) if isinstance(o, Tensor) and there else o, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """What no dispatch sees: ``torch.tensor`` and ``torch.as_tensor`` of numbers, lists, and where numbers stand."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        name = getattr(func, "__name__", "")
        if name in ("tolist", "untyped_storage") and isinstance(args[0], OnDevice):
            return getattr(args[0].held, name)()
        return func(*args, **kwargs)


def register() -> bool:
    """Make the device known to torch, before it has computed a gradient; whether this torch can."""
    from torch.utils import backend_registration as backend

    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        return False

    class Module(backend._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    backend._setup_privateuseone_for_python_backend(DEVICE, Module())
    return True


@contextmanager
def pretended_device() -> Iterator[str]:
    """The name of the device, which exists meanwhile."""
    # The threads of the backward pass would see neither of the two.
    with torch.autograd.set_multithreading_enabled(False), _Operations(), _Constructors():
        yield DEVICE
