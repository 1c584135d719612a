"""Counters of what a training step does: network passes, operations, and waits for the device."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from training.loop.run import Run

FETCHES = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}
"""Methods of a tensor that need its values in Python: on a GPU they wait for all that was queued before."""
WAITING_KERNELS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
"""Operations whose result, or its size, is needed in main memory; what `FETCHES` does not see because C++ calls it."""


@dataclass
class Work:
    """passes: (rows, with gradient, which network) of each forward pass, in order. operations: floating-point ones."""

    passes: list[tuple[int, bool, str]] = field(default_factory=list)
    operations: int = 0

    def rows(self, network: str) -> int:
        return sum(rows for rows, _, which in self.passes if which == network)


class _Fetches(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in FETCHES:
            self.waits.append(function.__name__)
            with torch._C.DisableTorchFunction(), _unseen():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indexed = args[1] if name in ("index", "index_put", "index_put_") else []
        masked = any(index is not None and index.dtype == torch.bool for index in indexed)
        if not _fetching and (name in WAITING_KERNELS or masked):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


_fetching: list[bool] = []


@contextmanager
def _unseen() -> Iterator[None]:
    """The kernel of a fetch that is counted already."""
    _fetching.append(True)
    try:
        yield
    finally:
        _fetching.pop()


@contextmanager
def counted(run: Run) -> Iterator[Work]:
    """Count while inside. The policy's network and, in a full training, the frozen copy of it."""
    work, counter = Work(), FlopCounterMode(display=False)
    networks = {"policy": run.policy.network}
    copy = getattr(run.policy, "_reference", None)
    if copy is not None:
        networks["reference"] = copy

    def note(name: str, network: torch.nn.Module, args: Sequence) -> None:
        off = any(_as_reference(layer) for layer in network.modules())
        work.passes.append((len(args[0]), torch.is_grad_enabled(), "reference" if off else name))

    with ExitStack() as stack:
        for name, network in networks.items():
            handle = network.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
            stack.callback(handle.remove)
        stack.enter_context(counter)
        yield work
    work.operations = int(counter.get_total_flops())


def _as_reference(layer: torch.nn.Module) -> bool:
    """An adapter layer that is switched off, or to the reference's adapter."""
    off, active = getattr(layer, "disable_adapters", False), getattr(layer, "_active_adapter", [])
    return off is True or active == ["reference"]


@contextmanager
def waits() -> Iterator[list[str]]:
    """What has to wait for the device inside, by name."""
    found: list[str] = []
    with _Fetches(found), _Kernels(found):
        yield found


@contextmanager
def built() -> Iterator[list[type]]:
    """The classes of all modules that are made inside."""
    classes: list[type] = []
    make = torch.nn.Module.__init__

    def noting(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        classes.append(type(self))
        make(self, *args, **kwargs)

    with mock.patch.object(torch.nn.Module, "__init__", noting):
        yield classes
