"""Fair timing: interleaved rounds in one process, cold compiles each in a fresh one.

Two habits keep the numbers honest on a shared machine. Rounds are interleaved (A B C A B C ...), so that a slow
minute hits every candidate, and ratios are taken within a round before their median. Cold compile times come from a
fresh Python process with empty caches, where the one-off cost of the toolchain (imports, the probe of the CPU's
vector instructions, the precompiled C++ header: about 10 s) is paid first by a one-line function and kept apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
"""One call of the thing that is timed."""

Progress = Callable[[str, float], None]
"""Called after each call of `interleaved`, warm-up included, with the candidate's name and its seconds."""

_CHILD = "from tome_fx.timing import _child; _child()"
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class ChildError(RuntimeError):
    """The process of a cold compile failed; the message ends with what it last wrote to stderr."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds per call over the rounds."""

    min: float
    median: float


@dataclasses.dataclass(frozen=True)
class Case:
    """What a fresh process builds and times: `target(**kwargs)` returns a `Step` that compiles when first called.

    `target` is "package.module:function", importable from the parent's `sys.path`; `kwargs` must survive JSON.
    """

    target: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ColdCompile:
    """A cold compile, in seconds and bytes.

    `seconds`: first call less one warm call. `setup`: what a one-line function cost before it (imports and toolchain).
    `call`: the warm call. `passes`: seconds of each tome_fx pass over all graphs of the process, empty without one.
    `peak_bytes`: peak memory of the warm call. On CUDA what the allocator handed out; on Linux the resident set of
    the process, Python and torch included; elsewhere the peak of the whole process, compilation included.
    """

    seconds: float
    setup: float
    call: float
    peak_bytes: int
    passes: dict[str, float]


def load_object(path: str) -> Any:
    """Return what "package.module:name" names.

    Raises ValueError when there is no colon, ModuleNotFoundError and AttributeError when a side of it is missing.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{path!r} is not of the form package.module:function")
    return getattr(importlib.import_module(module), name)


def synchronize(device: torch.device | str | None) -> None:
    """Wait for the work queued on a CUDA `device`; every other device, and None, needs no waiting."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(fn: Step, device: torch.device | str | None = None) -> float:
    """Wall-clock seconds of one call of `fn`, with `device` synchronised before and after."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    fns: Mapping[str, Step],
    rounds: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one call a round, rounds interleaved A B C A B C.

    The `warmup` rounds come first, in the same order, and are not in the result.
    Raises ValueError when `rounds` is below 1, `warmup` below 0 or `fns` empty.
    """
    if rounds < 1 or warmup < 0 or not fns:
        raise ValueError(f"need rounds >= 1, warmup >= 0 and a function: got {rounds}, {warmup}, {len(fns)}")
    times: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(warmup + rounds):
        for name, fn in fns.items():
            seconds = seconds_of(fn, device)
            if turn >= warmup:
                times[name].append(seconds)
            if progress is not None:
                progress(name, seconds)
    return times


def summary(times: Sequence[float]) -> Summary:
    """Minimum and median of seconds per call. Raises ValueError when there are none."""
    if not times:
        raise ValueError("no times to summarise")
    return Summary(min(times), statistics.median(times))


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """How many times faster than `baseline` (above 1: faster): the median over rounds of baseline / time.

    Both lists come from one `interleaved` call, so that the entries of a round saw the same machine.
    Raises ValueError when the lengths differ or are 0.
    """
    if not times or len(times) != len(baseline):
        raise ValueError(f"need two lists of one length, got {len(times)} and {len(baseline)}")
    return statistics.median(base / mine for mine, base in zip(times, baseline, strict=True))


def machine_info(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a reader must know to judge a number: processor, threads, device, versions, dtype, date (UTC, ISO 8601).

    `load` is the system's load average of the last minute (null where there is none): taken before a measurement,
    anything near the number of cores says that the machine was not quiet.
    """
    where = torch.device(device)
    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if where.type == "cuda":
        info["cuda"] = torch.version.cuda or ""
    return info


def cold_compile(
    case: Case, device: torch.device | str = "cpu", cache_dir: Path | None = None, timeout: float = 900.0
) -> ColdCompile:
    """Build `case` in a fresh Python process with empty Inductor and Triton caches and measure its first calls.

    `cache_dir`, a new or empty directory, keeps the caches it fills for whoever comes next; otherwise they are
    thrown away. `timeout` is in seconds.
    Raises ValueError when `cache_dir` holds something, ChildError when the process fails or runs out of time.
    """
    if cache_dir is not None and cache_dir.is_dir() and any(cache_dir.iterdir()):
        raise ValueError("the cache directory of a cold compile must be empty")
    with tempfile.TemporaryDirectory(prefix="tome_fx_cold_") as scratch:
        result = Path(scratch) / "result.json"
        job = {"case": dataclasses.asdict(case), "device": str(device), "result": str(result)}
        env = _child_environment(cache_dir or Path(scratch) / "cache")
        _run_child(json.dumps(job), env, timeout)
        return ColdCompile(**json.loads(result.read_text()))


def _cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _child_environment(cache: Path) -> dict[str, str]:
    """The parent's environment and import path, with both compiler caches under `cache`."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def _run_child(job: str, env: Mapping[str, str], timeout: float) -> None:
    """Run `_child` on `job`; ChildError when it does not end well."""
    command = [sys.executable, "-c", _CHILD, job]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"a cold compile took longer than {timeout:g} s") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise ChildError(f"a cold compile failed with status {done.returncode}:\n{tail}")


def _child() -> None:
    """Entry point of the fresh process: the job is its first argument, as JSON; the result goes to a file."""
    job = json.loads(sys.argv[1])
    measured = _measure_cold(Case(**job["case"]), torch.device(job["device"]))
    Path(job["result"]).write_text(json.dumps(dataclasses.asdict(measured)))


def _measure_cold(case: Case, device: torch.device) -> ColdCompile:
    """Time the toolchain's set-up, the first call and a warm one, in that order."""
    step: Step = load_object(case.target)(**case.kwargs)
    setup = seconds_of(lambda: torch.compile(_one_line)(torch.ones(4096, device=device)), device)
    first = seconds_of(step, device)
    _reset_peak_memory(device)
    call = seconds_of(step, device)
    return ColdCompile(max(first - call, 0.0), setup, call, _peak_memory(device), pass_seconds())


def _one_line(x: torch.Tensor) -> torch.Tensor:
    """The smallest function that makes Inductor start all of its toolchain."""
    return x.sin() + 1


def pass_seconds() -> dict[str, float]:
    """Seconds of each tome_fx pass, summed over the graphs this process has compiled."""
    from tome_fx import reports  # late: the rest of this module needs none of the package

    total: dict[str, float] = {}
    for report in reports():
        for name, seconds in report.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def extra_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that one call of `fn` holds at most above what was held before it."""
    where = torch.device(device)
    _reset_peak_memory(where)
    before = _peak_memory(where)
    fn()
    synchronize(where)
    return max(_peak_memory(where) - before, 0)


def _reset_peak_memory(device: torch.device) -> None:
    """Start the peak afresh; where the system cannot (no /proc/self/clear_refs), the old peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()  # what compiling left behind is no part of a call
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None) is not None:
        trim(0)
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Peak bytes since `_reset_peak_memory`: the CUDA allocator's, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # not ru_maxrss: Linux carries it over from the parent, which is larger than the child when it spawns it
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # late: there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
