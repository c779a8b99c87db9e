"""The fallback ladder: never a wrong answer, never a silent no-op. One test or more for every rung."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_fx
from tests.models import Block, Spec, build, expected_tokens
from tests.palette import compiled, distance, equalize, levels, palette_input, run, said

R = 4
TOKENS = Spec(stem="tokens", prefix="none", readout="tokens")


class Between(nn.Module):
    """Blocks with a function of the tokens [B, N, D] after each."""

    def __init__(self, between: Callable[[Tensor], Tensor], spec: Spec = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.blocks = nn.ModuleList(Block(spec, first=True) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x, None, x.shape[0]))
        return self.norm(x)


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


def grid(x: Tensor) -> Tensor:
    """Through the image and back: a pointwise convolution."""
    b, _, d = x.shape
    image = x.transpose(1, 2).reshape(b, d, 6, 6)
    return nn.functional.conv2d(image, torch.eye(d)[:, :, None, None] * 1.5).flatten(2).transpose(1, 2)


def windows(x: Tensor) -> Tensor:
    """Swin's partition and its reverse."""
    b, _, d = x.shape
    w = x.view(b, 2, 3, 2, 3, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, d)
    return (w * 1.1).view(b, 2, 2, 3, 3, d).permute(0, 1, 3, 2, 4, 5).reshape(b, 36, d)


NEEDS_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(3, dims=1),
    "index": lambda x: x[:, torch.arange(35, -1, -1)],
    "grid": grid,
    "windows": windows,
    "split_cat": lambda x: torch.cat([x[:, 20:], x[:, :20]], dim=1),
    "pad": lambda x: nn.functional.pad(x, (0, 0, 1, 1))[:, 1:-1],
    "interleave": lambda x: torch.stack([x[:, ::2], x[:, 1::2]], dim=2).flatten(1, 2),
}


@pytest.mark.parametrize("name", NEEDS_POSITIONS)
def test_op_that_needs_positions_between_blocks(name: str) -> None:
    """Rung 1: the value is unmerged before the op (and reported); the result is right; blocks merge again after it."""
    model = Between(NEEDS_POSITIONS[name]).eval()
    args = palette_input(TOKENS)
    # So small a model would not gain by merging before each MLP alone.
    got, report = run(model, args, None, R, placement="stream")
    with torch.no_grad():
        assert distance(got, model(*args)) < 2e-5
    assert report.merged_sites > 0
    assert report.unmerges, f"nothing reported as unmerged:\n{report}"


@pytest.mark.parametrize(("readout", "op"), [("cumsum", "cumsum"), ("grid", ""), ("flatten", "")])
def test_unmerge_is_reported_with_its_op(readout: str, op: str) -> None:
    """The report names the op that forced full length, and where."""
    spec = Spec(readout=readout)
    model, _ = build(spec)
    _, report = run(equalize(model), palette_input(spec), None, R)
    assert report.unmerges
    assert any(op in u.op for u in report.unmerges), report
    assert all(u.op and u.detail for u in report.unmerges)


def test_class_token_readout_needs_no_unmerge() -> None:
    """The counterpart: nothing is unmerged where only the class token or a mean is read."""
    for readout in ("cls", "mean", "attn_pool", "max"):
        spec = Spec(readout=readout)
        model, _ = build(spec)
        _, report = run(model, palette_input(spec), None, R)
        assert not report.unmerges, report


def test_model_without_attention() -> None:
    """Rung 3: nothing to merge. Right result, exactly one warning that says why."""
    model, x = Mlp().eval(), torch.randn(4, 32)
    with pytest.warns(tome_fx.ToMeWarning, match="(?i)attention") as seen:
        out = compiled(model, 16)(x)
    assert len(said(seen)) == 1
    torch.testing.assert_close(out, model(x))
    report = tome_fx.reports()[-1]
    assert (report.attention_sites, report.merged_sites) == (0, 0)


def test_warning_names_the_nearest_miss() -> None:
    """A single query has nothing to merge: the warning tells what was found and why it did not do."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attn(x[:, :1], y, y, need_weights=False)[0]

    model, args = Cross().eval(), (torch.randn(2, 20, 32), torch.randn(2, 30, 32))
    with pytest.warns(tome_fx.ToMeWarning, match=r"(?i)attention") as seen:
        out = compiled(model, 4)(*args)
    assert len(said(seen)) == 1
    torch.testing.assert_close(out, model(*args))
    assert tome_fx.reports()[-1].skipped


def test_r_zero_is_not_worth_a_warning() -> None:
    """r=0 asks for nothing; nobody needs to be warned that nothing was done."""
    spec = Spec()
    model, args = build(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tome_fx.ToMeWarning)
        run(model, args, None, 0)


@pytest.mark.parametrize(("last", "placement"), [(R, "branch"), (1, "")])
def test_merge_that_saves_nothing_is_dropped(last: int, placement: str) -> None:
    """Rung 2: no product reads the tokens of the last parallel block, so its merge on the stream has nothing to save.
    Under "auto" it merges around its attention, or is skipped where that does not pay, strict or not."""
    model, args = build(Spec(parallel=True, **({} if placement else {"dim": 128, "heads": 2, "grid": (16, 16)})))
    r = [R, R, last] if placement else [64, 64, last]
    for strict in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", tome_fx.ToMeWarning)
            _, report = run(model, args, None, r, strict=strict)
        merged = [site.placement for site in report.sites if site.merged]
        assert merged == ["stream", "stream", *([placement] if placement else [])]
        assert [reason.kind for reason in report.skipped] == ["nothing to save"] * (last == 1)
    assert run(model, args, None, r, placement="stream", drop_unread=False)[1].merged_sites == 3


def test_merge_that_does_not_pay_is_an_error_if_strict() -> None:
    """Rung 2: a later block's merge that costs more than it saves."""
    with pytest.raises(Exception, match=r"(?s)ToMeError.*does not pay"):
        run(*build(Spec(grid=(8, 8), dim=96, heads=2, readout="mean", prefix="none")), None, 1, strict=True)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_very_short_axis_is_left_alone(count: int) -> None:
    """A handful of tokens (frames, latents) is not merged like an image: skipped with a reason, one warning."""
    spec = TOKENS.replace(grid=(count, 1))
    model, args = build(spec)
    with pytest.warns(tome_fx.ToMeWarning, match="(?i)merge"):
        got, report = run(model, args, None, 1)
    with torch.no_grad():
        torch.testing.assert_close(got, model(*args))
    assert report.merged_sites == 0
    assert report.skipped


@pytest.mark.parametrize("case", ["no attention", "short"])
def test_strict_raises(case: str) -> None:
    """strict=True turns the warning into an exception."""
    if case == "short":
        model, args = build(TOKENS.replace(grid=(4, 1)))
    else:
        model, args = Mlp(), (torch.randn(4, 32),)
    with pytest.raises(Exception, match=r"(?i)ToMeError.*(merge|attention)"):
        compiled(model, 16, strict=True)(*args)


@pytest.mark.parametrize("spec", [Spec(), Spec(prefix="none", readout="mean"), Spec(prefix="cls_reg")], ids=str)
def test_r_too_large_is_capped(spec: Spec) -> None:
    """r=1000: half of the unprotected tokens a block, as in the paper; every block still right in shape."""
    model, args = build(spec.replace(grid=(8, 8)))
    got, report = run(model, args, None, 1000)
    first = expected_tokens(spec.replace(grid=(8, 8)), 1000)[0]
    assert tuple(report.tokens[0]) == first
    assert got.shape == (2, 10)
    assert got.isfinite().all()


PASSES = "capture", "fuse_attention", "infer_axes", "find_attention", "find_blocks", "make_plan", "rewrite", "verify"


@pytest.fixture(params=PASSES)
def broken_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the passes raises."""

    def boom(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{request.param} is broken on purpose")

    monkeypatch.setattr(tome_fx.passes, request.param, boom)
    return request.param


def test_internal_error_falls_back_with_the_traceback(broken_pass: str) -> None:
    """Rung 4: a bug of ours costs the speed-up, not the result; one warning carries the traceback."""
    model, args = build(Spec(depth=2))
    with pytest.warns(tome_fx.ToMeWarning, match=r"(?s)Traceback.*broken on purpose") as seen, torch.no_grad():
        got = compiled(model, R)(*args)
    assert len(said(seen)) == 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(*args))
    (reason,) = tome_fx.reports()[-1].skipped
    assert reason.detail == f"RuntimeError: {broken_pass} is broken on purpose"
    assert torch._dynamo.utils.counters["tome_fx"]["internal_errors"] == 1


def test_internal_error_is_raised_when_strict(broken_pass: str) -> None:
    model, args = build(Spec(depth=2))
    with pytest.raises(Exception, match=r"(?s)ToMeError.*broken on purpose"):
        compiled(model, R, strict=True)(*args)


@pytest.mark.parametrize("strict", [False, True])
def test_a_rewritten_graph_that_does_not_compile_falls_back(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner compiler refuses our graph and takes the original one: the same rung."""
    model, args = build(Spec(depth=2))
    inner = tome_fx.backend.compile_inner

    def picky(gm: torch.fx.GraphModule, *rest: Any, **kwargs: Any) -> Any:
        if any("tome" in str(n.target) for n in gm.graph.nodes):
            raise RuntimeError("refused on purpose")
        return inner(gm, *rest, **kwargs)

    monkeypatch.setattr(tome_fx.backend, "compile_inner", picky)
    if strict:
        with pytest.raises(Exception, match=r"(?s)ToMeError.*refused on purpose"):
            compiled(model, R, strict=True)(*args)
        return
    with pytest.warns(tome_fx.ToMeWarning, match=r"(?s)Traceback.*refused on purpose"), torch.no_grad():
        got = compiled(model, R)(*args)
    with torch.no_grad():
        torch.testing.assert_close(got, model(*args))


class Broken(Between):
    """A graph break in the middle of four blocks."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, TOKENS.replace(depth=4))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.blocks
        x = b(a(x, None, x.shape[0]), None, x.shape[0])
        torch._dynamo.graph_break()
        x = d(c(x, None, x.shape[0]), None, x.shape[0])
        return self.norm(x).mean(1)


class BrokenLoop(Between):
    """A break in every turn of the loop: each block becomes a graph of its own, or shares its neighbour's."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None, x.shape[0])
            torch._dynamo.graph_break()
        return self.norm(x).mean(1)


def test_graph_break() -> None:
    """No merged value crosses a break: both graphs are right alone, start at full length, and are reported."""
    model = Broken().eval()
    args, start = palette_input(TOKENS), len(tome_fx.reports())
    with torch.no_grad():
        got = compiled(model, R, protect=0)(*args)
        assert distance(got, model(*args)) < 2e-5
    made = tome_fx.reports()[start:]
    assert sum(report.graphs for report in made) == 2
    assert [tuple(t) for report in made for t in report.tokens] == [(36, 32), (32, 28)] * 2


def test_graph_break_in_every_block() -> None:
    """Right, whatever Dynamo makes of it; a graph of one block merges before its MLP and unmerges after."""
    model = BrokenLoop(lambda x: x).eval()
    got, report = run(model, palette_input(TOKENS), None, R, placement="stream", protect=0)
    with torch.no_grad():
        assert distance(got, model(*palette_input(TOKENS))) < 2e-5
    assert report.graphs == 1


def test_explain_counts_graphs() -> None:
    """explain() sums over the graphs of a model with a break."""
    model = Broken().eval()
    report = tome_fx.explain(model, palette_input(TOKENS), r=R, protect=0)
    assert report.graphs == 2
    assert report.merged_sites == 4


def test_report_of_a_whole_model() -> None:
    """Fields, totals, table and JSON of a plain model's report."""
    import json

    spec = Spec(grid=(8, 8), dim=48, heads=2)
    model, args = build(spec)
    report = tome_fx.explain(model, args, r=8, drop_unread=False)
    assert report.graphs == 1
    assert report.attention_sites == report.merged_sites == spec.depth
    assert [tuple(t) for t in report.tokens] == expected_tokens(spec, 8)
    assert 0 < report.flops_after < report.flops_before
    assert json.loads(json.dumps(report.to_dict()))["merged_sites"] == spec.depth
    text = str(report)
    assert "blocks.0.attn" in text
    assert "65 -> 57" in text


def test_explain_leaves_the_model_alone() -> None:
    """No weights touched, no buffers changed, mode and random numbers as before."""
    spec = Spec(drop=0.1)
    model, args = build(spec)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    tome_fx.explain(model, args, r=R)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def _in_autocast(f: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (f(x),))


def _without_grad(f: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (f(x),))


TRANSFORMED: dict[str, Any] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(lambda y: f(y).sum())(x)[0],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f, x: torch.func.jacrev(lambda y: f(y).sum((0, 1))[:2])(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda y: f(y[None]).square().sum()))(x),
    "vmap": lambda f, x: torch.vmap(lambda y: f(y[None]))(x),
    "autocast, then cond": _in_autocast,
    "no_grad, then cond": _without_grad,
}


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "spelled out"])
@pytest.mark.parametrize("way", TRANSFORMED, ids=str)
def test_function_transforms(way: str, spelled: bool) -> None:
    """torch.func around a model: it merges or it says why; levels and modes are as they were, and no internal error."""
    spec = TOKENS.replace(depth=1, attention="matmul" if spelled else "sdpa")
    model, _ = build(spec)
    model, (x,) = equalize(model), palette_input(spec)
    before, want = levels(), TRANSFORMED[way](model, x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast = torch.compile(lambda x: TRANSFORMED[way](model, x), backend=tome_fx.tome_backend(r=R, inner="eager"))
        got = fast(x)
    assert levels() == before
    assert distance(got, want) < 1e-3
    assert not torch._dynamo.utils.counters["tome_fx"]["internal_errors"]
    texts = said(told)
    assert tome_fx.reports()[-1].merged_sites or len(texts) == 1
    assert not any("report this" in text for text in texts)


def test_distributed_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """Tensor parallelism on a mesh of one process: the model runs as it is."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(2, 8)
    want = model(x)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        with pytest.warns(tome_fx.ToMeWarning, match="distributed tensors") as told:
            got = torch.compile(model, backend=tome_fx.tome_backend(r=R, inner="eager"))(x)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(got, want)
    (message,) = said(told)
    assert "\n" not in message
