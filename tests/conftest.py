"""Every test starts with a fresh Dynamo and seeds; hypothesis has no deadline and is repeatable in CI."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import tome_fx
from tests.palette import levels

settings.register_profile(
    "dev",
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(  # shrinking a model takes minutes: CI prints what it drew, `HYPOTHESIS_PROFILE=dev` shrinks
    "ci", settings.get_profile("dev"), derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, 15 times slower when the machine is busy
# pytest collects what loggers that do not propagate say, so torch would write its whole trace of every compile: where
# there is no handler it writes none.
logging.getLogger("torch.__trace").propagate = True
logging.getLogger("torch.__trace").handlers.clear()
# Dynamo times the guards of every frame for a line of its log, behind an emptied cache: 30 ms a compile.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish() -> None:
    """Modules stay until the end: the collector need not walk through them again and again, a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Seeds set and no compiled code left from the test before; no test leaves a mode or level behind."""
    random.seed(0)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tome_fx.clear_reports()
    before = levels()
    yield
    torch._dynamo.reset()
    torch._C._autograd._saved_tensors_hooks_enable()  # as torch's own tests of Dynamo do: it may leave them off
    assert levels() == before
