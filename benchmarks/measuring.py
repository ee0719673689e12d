"""Measuring time and memory, shared by the benchmarks."""

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


# Option of glibc's mallopt: blocks of at least this size are mapped separately and unmapped when freed.
M_MMAP_THRESHOLD = -3


def resident_megabytes(field: str) -> float:
    """Returns `VmRSS`, the current memory of this process, or `VmHWM`, its peak, in 10⁶ bytes. (The peak in getrusage
    includes that of the parent process.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: CPU memory can only be measured on Linux.")


def peak_megabytes(step: Callable[[], Any], device: str) -> float:
    """Returns the peak memory of a step above the memory before it, in 10⁶ bytes. On CPU the step must be the first
    large one of its process."""
    if device == "cuda":
        step()  # Compiles kernels and allocates persistent workspaces.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Like CUDA's counter, measure memory in use, without freed memory that malloc keeps.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before = resident_megabytes("VmRSS")
    step()
    return resident_megabytes("VmHWM") - before


def measure_memory(function: Callable[..., float], arguments: tuple[Any, ...], device: str) -> float:
    """Calls a function that measures memory, on CPU in a new forked process. On CUDA one process can measure many
    steps, because the allocator counts bytes in use, and so compiles each kernel only once."""
    if device == "cuda":
        return function(*arguments)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def alternating_milliseconds(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Returns the times of steps that run in turn, so that other load on the machine affects all of them equally. With
    one CPU thread it measures process time, which excludes other processes."""
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
            if repeat > 0:  # The first round is warm-up.
                times[name].append(1e3 * (clock() - start))
    return times


def ratio_to(times: Mapping[str, list[float]], name: str, reference: str) -> dict[str, float]:
    """Returns the median and quartiles of the per-round time ratios, and the median time."""
    ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "low": low, "high": high, "median_ms": statistics.median(times[name])}


def hardware(device: str) -> str:
    """Returns the name of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
