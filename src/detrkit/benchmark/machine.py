"""What a measurement was made on: versions, processor, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino")
# Instructions that decide how fast arithmetic can be.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "sve")
_MATRIX = 2048
# Seconds after which no further product begins: a CPU without instructions for a type takes many for each.
_RATE_SECONDS = 10.0
# A share of the threads' time, or of a median, above which a measurement says little.
_DISTURBED = 0.1
_SPREAD = 0.25


def columns(threads: int, device: str = "cpu") -> dict[str, str | int]:
    """The configuration, as columns of a CSV file: date, versions, processor or card, threads."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu_flags": " ".join(cpu_flags()),
        "threads": threads,
    }


def processor() -> str:
    """The processor's name."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those of the processor's instruction sets that matter here; none are known outside of Linux."""
    known = (_cpu_info("flags") or _cpu_info("Features")).split()
    return [flag for flag in _FLAGS if flag in known]


def matrix_rate(
    threads: int, device: str = "cpu", dtype: str = "float32", runs: int = 10, *, cpu_time: bool = False
) -> float:
    """How fast this machine multiplies large matrices: the limit for convolutions and linear layers.

    On a CPU the faster of PyTorch's two libraries counts: MKL reaches 92 GFLOP/s on a core of an AMD EPYC
    where oneDNN, which runs the convolutions, reaches 111.

    Args:
        threads: How many of the processor's are used.
        device: Where.
        dtype: Type of the matrices.
        runs: How many products; the fastest counts, as what disturbs a machine makes it slower.
        cpu_time: Count the processor's seconds, which other programs do not lengthen, not those that pass.

    Returns:
        10^9 operations a second, two for each multiply-add.
    """
    from detrkit.engines import fused  # not where a side of a comparison only asks for its memory

    size = _MATRIX if device == "cpu" else 4 * _MATRIX
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    products = [lambda: a @ b]
    if device == "cpu" and fused.available(a.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        clock = time.process_time if cpu_time else time.perf_counter
        best = min(_fastest(product, runs, clock) for product in products)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best / 1e9


def _fastest(product: Callable[[], torch.Tensor], runs: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest run, after two that also fetch libraries and memory."""
    best, end = float("inf"), clock() + _RATE_SECONDS
    for run in range(runs + 2):
        begin = clock()
        if run and begin > end:
            break
        float(product()[0, 0])  # reading a number waits for the card
        best = min(best, clock() - begin)
    return best


class Watch:
    """How many processors other programs keep busy while something is measured.

    Args:
        threads: How many the measurement itself uses.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._begin = time.monotonic()
        self._busy = _busy_seconds()

    def others(self) -> float:
        """Processors that others used since the beginning, less those that the measurement left free.

        This process and the children it has waited for are not others. 0 outside of Linux.
        """
        wall = max(time.monotonic() - self._begin, 1e-3)
        free = max(0, (os.cpu_count() or 1) - self._threads)
        return max(0.0, (_busy_seconds() - self._busy) / wall - free)


def disturbances(others: float, threads: int, rates: tuple[float, float], spread: float) -> list[str]:
    """Why a measurement says little; nothing if it is good.

    Args:
        others: Of :meth:`Watch.others`.
        threads: How many the measurement used.
        rates: :func:`matrix_rate` before and after it.
        spread: The largest of the sides' (slowest - fastest) / median.
    """
    found = []
    if others > _DISTURBED * threads:
        found.append(
            f"other programs took {others:.1f} of the {threads} processor{'s' * (threads > 1)} it needs"
        )
    if min(rates) < (1 - _DISTURBED) * max(rates):
        found.append(f"the processor's speed changed from {rates[0]:.0f} to {rates[1]:.0f} GFLOP/s meanwhile")
    if spread > _SPREAD:
        found.append(f"runs of one engine differ by {spread:.0%} of their median")
    return found


def peak_memory(device: str = "cpu") -> float:
    """The most memory that this process has held so far: of the card, or else resident, in 10^6 bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        # What getrusage says would count the process that started this one too.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return float("nan")


def _busy_seconds() -> float:
    """Processor time used on this machine since it started, without this process's and its children's."""
    try:
        # user nice system idle iowait irq softirq steal: what the host of a virtual machine takes counts.
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return 0.0
    ticks = sum(int(value) for index, value in enumerate(fields) if index not in (3, 4))
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_info(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
