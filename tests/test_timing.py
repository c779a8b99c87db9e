"""Timing: what is measured and in which order. No test asserts how fast anything is."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch

from tome_fx import timing


def step(fail: bool = False) -> timing.Step:
    """What the fresh process of a cold compile builds in these tests."""
    if fail:
        raise RuntimeError("no such model")
    run = torch.compile(lambda x: x * 2, backend="eager")
    return lambda: run(torch.ones(2))


def test_rounds_are_interleaved_and_warmup_is_left_out() -> None:
    calls: list[str] = []
    seen: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleaved(fns, rounds=2, warmup=1, progress=lambda name, _: seen.append(name))
    assert calls == list("abc" * 3)
    assert seen == calls
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(seconds >= 0 for each in times.values() for seconds in each)


@pytest.mark.parametrize(("rounds", "warmup", "fns"), [(0, 1, {"a": int}), (1, -1, {"a": int}), (1, 1, {})])
def test_impossible_rounds_are_refused(rounds: int, warmup: int, fns: dict[str, timing.Step]) -> None:
    with pytest.raises(ValueError, match="rounds >= 1"):
        timing.interleaved(fns, rounds, warmup)


def test_summary_and_ratio() -> None:
    assert timing.summary([3.0, 1.0, 2.0]) == timing.Summary(min=1.0, median=2.0)
    # the second round was slow for both: a ratio of medians or of minima would not be 2 in every round
    assert timing.ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 2.0
    with pytest.raises(ValueError, match="no times"):
        timing.summary([])
    with pytest.raises(ValueError, match="one length"):
        timing.ratio([1.0], [1.0, 2.0])


def test_machine_info_is_json_and_dated() -> None:
    info = json.loads(json.dumps(timing.machine_info("cpu", torch.bfloat16)))
    assert info["torch"] == torch.__version__
    assert (info["device"], info["dtype"], info["threads"]) == ("cpu", "bfloat16", torch.get_num_threads())
    assert info["cpu"]
    assert datetime.datetime.fromisoformat(info["date"]).tzinfo is not None


def test_synchronize_knows_devices_without_queues() -> None:
    timing.synchronize(None)
    timing.synchronize("cpu")


def test_load_object() -> None:
    assert timing.load_object("tome_fx.timing:Case") is timing.Case
    with pytest.raises(ValueError, match=r"package\.module:function"):
        timing.load_object("tome_fx.timing")
    with pytest.raises(AttributeError):
        timing.load_object("tome_fx.timing:nothing")
    with pytest.raises(ModuleNotFoundError):
        timing.load_object("tome_fx.nothing:at_all")


def test_peak_memory_starts_afresh_and_sees_an_allocation() -> None:
    """A process that once was large must not report that size for every later call."""
    cpu = torch.device("cpu")
    timing._reset_peak_memory(cpu)
    before = timing._peak_memory(cpu)
    size = 64 * 2**20
    torch.ones(size, dtype=torch.uint8)
    assert timing._peak_memory(cpu) >= before + size // 2


def test_cold_compile_runs_in_a_fresh_process_with_its_own_caches(tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    cold = timing.cold_compile(timing.Case("tests.test_timing:step"), cache_dir=caches)
    assert any(caches.iterdir())
    assert cold.setup > 0
    assert cold.seconds >= 0
    assert cold.peak_bytes > 2**20
    assert cold.passes == {}
    with pytest.raises(ValueError, match="must be empty"):
        timing.cold_compile(timing.Case("tests.test_timing:step"), cache_dir=caches)


def test_a_failing_cold_compile_says_why() -> None:
    with pytest.raises(timing.ChildError, match="no such model"):
        timing.cold_compile(timing.Case("tests.test_timing:step", {"fail": True}))


def test_a_cold_compile_that_never_ends_is_given_up() -> None:
    with pytest.raises(timing.ChildError, match="longer than"):
        timing.cold_compile(timing.Case("tests.test_timing:step"), timeout=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_synchronised_and_its_memory_counted() -> None:
    device = torch.device("cuda")
    timing._reset_peak_memory(device)
    times = timing.interleaved({"add": lambda: torch.ones(2**20, device=device) + 1}, rounds=2, device=device)
    assert len(times["add"]) == 2
    assert timing._peak_memory(device) >= 2 * 4 * 2**20
