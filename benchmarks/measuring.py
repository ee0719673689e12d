"""What the benchmarks of time and memory share."""

import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


# Of glibc: blocks of this size and more come from the system, and go back to it when they are freed.
M_MMAP_THRESHOLD = -3


def resident_megabytes(field: str) -> float:
    """`VmRSS`, what this process holds now, or `VmHWM`, the most it ever held. (The maximum of getrusage counts the
    process that started this one as well.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: memory of processors is measured on Linux only.")


def peak_megabytes(step: Callable[[], Any], device: str) -> float:
    """How far memory rises during a step above what was held before, in 10⁶ bytes. On the CPU the step must be the
    first large one of its process."""
    if device == "cuda":
        step()  # Compiles kernels and allocates workspaces, which stay.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # As CUDA's figure does, this is to show what is in use, and not what malloc keeps of what was freed.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before = resident_megabytes("VmRSS")
    step()
    return resident_megabytes("VmHWM") - before


def measure_memory(function: Callable[..., float], arguments: tuple[Any, ...], device: str) -> float:
    """Calls a function that measures memory, on the CPU in a forked process of its own. CUDA counts the bytes in use,
    so one process can measure many steps there, and compiles each kernel once."""
    if device == "cuda":
        return function(*arguments)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def alternating_milliseconds(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Times of steps that take turns, so that whatever else the machine does meets all of them alike; on one thread
    the time of the processor, which leaves out what others had of it."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:  # The first turn warms up.
                times[name].append(1e3 * (clock() - start))
    return times


def ratio_to(times: Mapping[str, list[float]], name: str, reference: str) -> dict[str, float]:
    """Median of the ratios of times turn by turn, with their quartiles."""
    ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "low": low, "high": high, "median_ms": statistics.median(times[name])}


def hardware(device: str) -> str:
    """What the benchmark ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
