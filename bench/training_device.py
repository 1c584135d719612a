"""What a step costs in operations and bytes, and what the device could do of them. Only counting runs on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
         "detach", "split", "alias", "as_strided", "reshape", "chunk", "unbind", "empty", "empty_like"}  # fmt: skip


@dataclass
class Work:
    """operations: floating-point ones, two a multiplication with addition. kernels: (operations, bytes read or written)
    of each operator called, once for all tensors of it."""

    operations: int
    kernels: list[tuple[int, int]]

    def roofline(self, peak: float, bandwidth: float) -> float:
        """Seconds if every operator took what its operations or its bytes need, whichever is longer."""
        return sum(max(operations / peak, size / bandwidth) for operations, size in self.kernels)


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        result, packet = function(*args, **(kwargs or {})), function.overloadpacket
        if packet.__name__ not in VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            count = flop_registry.get(packet)
            operations = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.found.append((operations, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return result


def count(step: Callable[[], Any]) -> Work:
    """Of two calls, which must do the same work."""
    with FlopCounterMode(display=False) as counter:
        step()
    with _Kernels() as kernels:
        step()
    return Work(int(counter.get_total_flops()), kernels.found)


def shares(work: Work, seconds: float, step: Callable[[], Any]) -> dict[str, float]:
    """Of what the CUDA device reaches; peak memory in GiB, and how often a step waits for the device."""
    peak, bandwidth = matrix_peak(), copy_bandwidth()
    torch.cuda.reset_peak_memory_stats()
    return {
        "peak TFLOP/s": peak / 1e12, "bandwidth TB/s": bandwidth / 1e12,
        "share of matrix peak": work.operations / seconds / peak,
        "share of roofline": work.roofline(peak, bandwidth) / seconds,
        "waits": _waits(step), "GiB": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip


def _waits(step: Callable[[], Any]) -> int:
    """Synchronizing calls of one step, as torch reports them."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in found)


def matrix_peak() -> float:
    """Floating-point operations a second of a large bfloat16 product."""
    side = 8192
    matrix = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    return 20 * 2 * side**3 / _fastest(lambda: [matrix @ matrix for _ in range(20)])


def copy_bandwidth() -> float:
    """Bytes a second read and written by a large copy."""
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 10 * 2 * source.numel() * 2 / _fastest(lambda: [target.copy_(source) for _ in range(10)])


def _fastest(call: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds between two CUDA events around a call: the smallest, after one call to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)


def describe(device: str) -> str:
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return f"{device} ({where}), torch {torch.__version__}"
