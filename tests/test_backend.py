"""tome_backend as a backend of torch.compile: entry point, options, sharing of compiled code, Inductor, caches."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tome_fx
from tests.models import Spec, build, expected_tokens
from tests.palette import assert_lossless, compiled, distance, equalize, palette_input, run
from tome_fx import tome_backend
from tome_fx.backend import tome

R = 4
ROOT = Path(__file__).parent.parent


def installed() -> bool:
    return any(e.name == "tome" for e in importlib.metadata.entry_points(group="torch_dynamo_backends"))


needs_install = pytest.mark.skipif(
    not installed(), reason="tome-fx is not installed: no entry point (pip install -e .)"
)


def prepared(spec: Spec) -> tuple[Any, tuple[Any, ...], Any]:
    """(model, palette inputs, eager output)."""
    model, _ = build(spec)
    model, args = equalize(model), palette_input(spec)
    with torch.no_grad():
        return model, args, model(*args)


@needs_install
def test_by_name_without_an_import() -> None:
    """backend="tome", options={"tome.r": 4}, in a process that never imports tome_fx itself."""
    code = (
        "import torch; from torch import nn\n"
        "m = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()\n"
        "f = torch.compile(m, backend='tome', options={'tome.r': 4, 'tome.inner': 'eager'})\n"
        "with torch.no_grad(): out = f(torch.randn(2, 40, 32))\n"
        "import tome_fx; print(out.shape, tome_fx.reports()[-1].tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("torch.Size([2, 40, 32]) [(40, 36), (36, 32)]")


@needs_install
def test_is_listed() -> None:
    assert "tome" in torch.compiler.list_backends()


def test_options_reach_the_config_and_the_inner_compiler() -> None:
    """tome.* keys are ours, the rest is Inductor's."""
    model, args, want = prepared(Spec(depth=2))
    fast = torch.compile(model, backend=tome, options={"tome.r": 5, "max_autotune": False})
    with torch.no_grad():
        assert distance(fast(*args), want) < 2e-5
    assert [tuple(t) for t in tome_fx.reports()[-1].tokens] == [(37, 32)]  # nobody reads the second merge


@pytest.mark.parametrize("key", ["placement", "tome_placement"])
def test_an_option_of_ours_without_its_prefix_is_named(key: str) -> None:
    model, args, _ = prepared(Spec(depth=2))
    with pytest.raises(Exception, match=rf"say tome\.placement instead of {key}\b"):
        torch.compile(model, backend=tome_backend(2), options={key: "branch"})(*args)


def test_unknown_inductor_option_is_refused() -> None:
    """A key that is neither ours nor Inductor's is an error and not dropped."""
    model, args, _ = prepared(Spec(depth=2))
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(model, backend=tome_backend(2), options={"no_such_option": 1})(*args)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(depth=2, readout="multi"),
        Spec(depth=2, attention="matmul", mask="bool", prefix="none", readout="mean", layout="nbd"),
    ],
    ids=str,
)
def test_inductor(spec: Spec) -> None:
    """The lossless law through Inductor."""
    model, args, _ = prepared(spec)
    assert_lossless(model, args, R, tokens=expected_tokens(spec, R), inner="inductor", tol=5e-5)


def test_mode_reaches_inductor() -> None:
    """mode= of torch.compile is accepted and maps to Inductor's options."""
    model, args, want = prepared(Spec(depth=2))
    fast = torch.compile(model, backend=tome_backend(R), mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        assert distance(fast(*args), want) < 5e-5


def test_two_r_values_on_one_model() -> None:
    """Each keeps its own code, whatever the order of calls; no reset between."""
    model, args, want = prepared(Spec())
    torch.manual_seed(5)
    noise = tuple(torch.randn_like(a) for a in args)
    alone = {r: run(model, noise, None, r)[0] for r in (2, 6)}
    torch._dynamo.reset()
    two, six = (torch.compile(model, backend=tome_backend(r, inner="eager")) for r in (2, 6))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(two(*noise), alone[2])
            assert torch.equal(six(*noise), alone[6])
        assert not torch.equal(alone[2], alone[6])
        assert distance(two(*args), want) < 2e-5


def test_equal_configs_share_compiled_code() -> None:
    """Two backends of equal config: one compilation. Another r: one more."""
    model, args, _ = prepared(Spec())
    start = len(tome_fx.reports())
    counters = torch._dynamo.utils.counters
    with torch.no_grad():
        for _ in range(3):
            torch.compile(model, backend=tome_backend(R, inner="eager"))(*args)
        assert counters["stats"]["unique_graphs"] == 1
        assert len(tome_fx.reports()) - start == 1
        torch.compile(model, backend=tome_backend(R + 1, inner="eager"))(*args)
    assert counters["stats"]["unique_graphs"] == 2
    assert len(tome_fx.reports()) - start == 2


def test_backends_are_equal_values() -> None:
    assert tome_backend(8) == tome_backend(8)
    assert hash(tome_backend([1, 2])) == hash(tome_backend([1, 2]))
    assert tome_backend(8) != tome_backend(8, metric="input")


def test_counters() -> None:
    """torch._dynamo.utils.counters["tome_fx"] counts what was done."""
    model, args, _ = prepared(Spec())
    run(model, args, None, R)
    counts = torch._dynamo.utils.counters["tome_fx"]
    assert counts["merged_sites"] == 2  # nobody reads the third
    assert counts["attention_sites"] == 3


def test_report_is_logged_at_info(caplog: pytest.LogCaptureFixture) -> None:
    model, args, _ = prepared(Spec())
    with caplog.at_level("INFO", logger="tome_fx"):
        run(model, args, None, R)
    assert any("2 of 3" in record.getMessage() for record in caplog.records)


def test_dynamo_reset() -> None:
    """After torch._dynamo.reset() the model compiles again and is right again."""
    model, args, want = prepared(Spec())
    for _ in range(2):
        start = len(tome_fx.reports())
        with torch.no_grad():
            assert distance(compiled(model, R)(*args), want) < 2e-5
        assert len(tome_fx.reports()) - start == 1


def test_weights_stay_live() -> None:
    """The compiled model sees weights that are changed in place after compilation."""
    model, args, _ = prepared(Spec(readout="mean"))
    fast = compiled(model, R)
    with torch.no_grad():
        fast(*args)
        for param in model.parameters():
            param.mul_(0.9)
        assert distance(fast(*args), model(*args)) < 2e-5


CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, tome_fx
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    def forward(self, x):
        return self.layer(x).mean(1)
model = Net().eval()
for p in model.parameters(): p.requires_grad_(sys.argv[2] == "train")
fast = torch.compile(model, backend=tome_fx.tome_backend(int(sys.argv[1])))
out = fast(torch.randn(2, 32, 16))
if out.requires_grad: out.sum().backward()
c = torch._dynamo.utils.counters
names = {"fx_hit": ("inductor", "fxgraph_cache_hit"), "fx_miss": ("inductor", "fxgraph_cache_miss"),
         "aot_hit": ("aot_autograd", "autograd_cache_hit"), "aot_miss": ("aot_autograd", "autograd_cache_miss"),
         "aot_bypass": ("aot_autograd", "autograd_cache_bypass"), "fx_bypass": ("inductor", "fxgraph_cache_bypass")}
print(json.dumps({k: c[a][b] for k, (a, b) in names.items()}
                 | {"merged": tome_fx.reports()[-1].merged_sites, "file": tome_fx.__file__, "sum": out.sum().item()}))
"""


def child(site: Path, cache: Path, mode: str = "eval") -> dict[str, Any]:
    """Compile a small model in a process of its own, with the package at `site` and caches at `cache`."""
    env = {**os.environ, "PYTHONPATH": str(site), "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", CHILD, "4", mode]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cache, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["file"].startswith(str(site)), "the child did not use the copy of the package"
    return result


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the package, laid out as the wheel does."""
    target = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "passes")
    shutil.copytree(ROOT / "tome_fx", target / "tome_fx", ignore=ignore, symlinks=False)
    shutil.copytree(ROOT / "passes", target / "tome_fx" / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.mark.slow
def test_caches(site: Path, tmp_path: Path) -> None:
    """Cold: misses. Second process: hits FxGraphCache and AOTAutogradCache, and still reports. A changed source of
    ours: misses (the AOT key alone knows only the names of our ops)."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cold = child(site, cache)
    assert (cold["aot_hit"], cold["aot_miss"], cold["aot_bypass"], cold["fx_bypass"]) == (0, 1, 0, 0)
    warm = child(site, cache)
    assert (warm["aot_hit"], warm["aot_miss"], warm["fx_hit"], warm["fx_miss"]) == (1, 0, 1, 0)
    assert warm["merged"] == cold["merged"] == 1
    assert warm["sum"] == cold["sum"]
    with (site / "tome_fx" / "ops" / "merging.py").open("a") as source:
        source.write("\n# changed\n")
    changed = child(site, cache)
    assert (changed["aot_hit"], changed["fx_hit"]) == (0, 0)


@pytest.mark.slow
def test_caches_in_training(site: Path, tmp_path: Path) -> None:
    """The same for a graph with a backward."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cold = child(site, cache, mode="train")
    warm = child(site, cache, mode="train")
    assert (cold["aot_miss"], warm["aot_hit"], warm["aot_miss"]) == (1, 1, 0)


@pytest.mark.slow
def test_layers_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that merges leave are inputs of the compiled graph: layers of one kind have one kernel. The same result
    comes out without that, a second call compiles nothing, and Dynamo gets no guard on them."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    model, args, want = prepared(Spec(depth=5))
    sources = {}
    for shared in (True, False):
        torch._dynamo.reset()
        with monkeypatch.context() as patch, torch.no_grad(), fresh_cache():
            if not shared:
                patch.setattr("tome_fx.backend._shares_kernels", lambda *_: False)
            before = len(tome_fx.reports())
            fast = torch.compile(model, backend=tome_backend(R), fullgraph=True)
            got, (code,) = run_and_get_code(fast, *args)
            assert distance(got, want) < 5e-5
            assert distance(fast(*args), want) < 5e-5
            assert len(tome_fx.reports()) == before + 1
        assert ("ks0" in code) is shared
        sources[shared] = code
    counts = {shared: code.count("async_compile.cpp") for shared, code in sources.items()}
    assert counts[True] < counts[False] - 4, counts


def test_reports_are_bounded() -> None:
    """A server that compiles for months does not grow by them: the oldest go."""
    for i in range(tome_fx.report.KEPT + 5):
        tome_fx.report.record(tome_fx.ToMeReport(graphs=i))
    kept = tome_fx.reports()
    assert (len(kept), kept[0].graphs) == (tome_fx.report.KEPT, 5)
