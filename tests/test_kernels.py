"""The compiled CPU kernels against the ATen forms of the same operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tome_fx import ops
from tome_fx.kernels import cpu

OPS = torch.ops.tome
CPU = torch.ops.tome_cpu
# for the whole process: torch.export walks through all namespaces that there ever were
WIDE = {wide: cpu.define(f"tome_cpu_{wide}") for wide in (16, 32, 64)}


def test_they_are_built_here() -> None:
    """This machine has a compiler: all other tests run on the kernels, not on the forms that stand in for them."""
    assert cpu.library() is CPU
    names = [name for name in cpu.SCHEMAS if name != "product" or cpu.has_products()]
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"tome_cpu::{name}", "CPU") for name in names)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """(keys [batch, N, h, d], r, prefix, suffix): any lengths, head counts and widths, strided or not, both dtypes."""
    prefix, suffix = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    body, heads, width = draw(st.integers(2, 70)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 32, 48, 70]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    keys = torch.randn(2, prefix + body + suffix, 3, heads, width, generator=generator)
    keys = keys.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))[:, :, 1]
    keys = keys if draw(st.booleans()) else keys.contiguous()
    return keys, draw(st.integers(0, body // 2)), prefix, suffix


def narrowest_choice(keys: torch.Tensor, prefix: int, suffix: int) -> float:
    """The smallest difference that decides anything: between two sources' best cosines, or a source's best two."""
    unit = torch.nn.functional.normalize(keys[:, prefix : keys.shape[1] - suffix].float().sum(2), dim=-1)
    scores = unit[:, prefix % 2 :: 2] @ unit[:, 1 - prefix % 2 :: 2].mT
    best = scores.amax(-1).sort(-1).values.diff(dim=-1).abs()
    second = scores.topk(min(2, scores.shape[-1]), -1).values.diff(dim=-1).abs()
    return min((gap.amin().item() for gap in (best, second) if gap.numel()), default=1.0)


@given(cases())
def test_match_and_sizes(case: tuple[torch.Tensor, int, int, int]) -> None:
    """Same pairs, same similarity, same order; sizes from none and from sizes of an earlier merge."""
    keys, r, prefix, suffix = case
    got, want = CPU.match_size(keys, None, r, prefix, suffix, True), ops.match_aten(keys, r, prefix, suffix)
    torch.testing.assert_close(got[3], want[3])
    if narrowest_choice(keys, prefix, suffix) > 1e-5:  # near ties may go either way
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b)
    for size in (None, torch.randint(1, 9, keys.shape[:2]).float()):
        index = CPU.match_size(keys, size, r, prefix, suffix, True)
        expected = ops.merge_size_aten(size, *index[:3])
        assert torch.equal(index[4], expected)
        assert torch.equal(CPU.merge_size(size, *index[:3]), expected)
        torch.testing.assert_close(index[5], expected.log())


@pytest.mark.parametrize(("batch", "n", "width"), [(7, 901, 16), (40, 400, 96), (2, 1200, 1000)])
def test_long_sequences_and_many_samples(batch: int, n: int, width: int) -> None:
    """Over many tiles, in turns where the samples are many, and of more than a thread keeps: as each sample alone."""
    keys = torch.randn(batch, n, 1, width)
    whole = CPU.match_size(keys, None, n // 3, 1, 2, True)
    for b in range(0, batch, 13):
        alone = CPU.match_size(keys[b : b + 1], None, n // 3, 1, 2, True)
        assert all(torch.equal(x[b], y[0]) for x, y in zip(whole, alone, strict=True))
        torch.testing.assert_close(alone[3], ops.match_aten(keys[b : b + 1], n // 3, 1, 2)[3])
        assign, keep, moved, similarity = (x[0] for x in alone[:4])
        unit = torch.nn.functional.normalize(keys[b, :, 0], dim=-1)
        torch.testing.assert_close((unit[moved] * unit[keep[assign[moved]]]).sum(-1), similarity)


@pytest.mark.parametrize(("batch", "n", "prefix"), [(0, 20, 1), (2, 1, 1), (2, 2, 1), (2, 1, 0)])
def test_nothing_to_compare(batch: int, n: int, prefix: int) -> None:
    """No sample, no token that may merge, or one alone."""
    keys = torch.randn(batch, n, 1, 8)
    assign, keep, moved, similarity, size_out, _ = CPU.match_size(keys, None, 0, prefix, 0, True)
    assert moved.shape == similarity.shape == (batch, 0)
    assert torch.equal(keep.gather(1, assign), torch.arange(n).expand(batch, n))
    assert torch.equal(size_out, torch.ones(batch, n))
    assert torch.equal(
        CPU.merge(keys, None, size_out, assign, keep, moved),
        keys.gather(1, keep[..., None, None].expand_as(keys)),
    )


@pytest.mark.parametrize("wide", WIDE)
def test_vectors_of_other_processors(wide: int) -> None:
    """Tiles for registers of 16, 32 and 64 bytes compute the same."""
    held = cpu.build((*cpu._FLAGS, f"-DTOME_BYTES={wide}"), WIDE[wide].ns)
    assert held is not None
    for n in (5, 130, 403):
        keys = torch.randn(3, n, 2, 24)
        got, want = held.match_size(keys, None, n // 4, 1, 0, True), ops.match_aten(keys, n // 4, 1, 0)
        torch.testing.assert_close(got[3], want[3])
        if narrowest_choice(keys, 1, 0) > 1e-6:
            assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
        torch.testing.assert_close(held.energy(keys[:, :, 0], 0.5), energy_by_hand(keys[:, :, 0], 0.5))


def energy_by_hand(metric: torch.Tensor, margin: float) -> torch.Tensor:
    """PiToMe's equation 4, token by token, in float64; float32 [batch, N]."""
    rows = []
    for sample in metric.double():
        for x in sample:
            alike = torch.nn.functional.cosine_similarity(x[None], sample, dim=-1, eps=1e-12)
            alike[~sample.any(-1)] = float(not x.any())
            rows.append(alike.where(alike >= margin, torch.exp(alike - margin) - 1).mean())
    return torch.stack(rows).float().reshape(metric.shape[:2])


MARGINS = st.sampled_from([0.9, 0.45, 0.0, -0.3])


@given(st.integers(1, 150), st.sampled_from([1, 3, 32, 70]), MARGINS, st.integers(0, 99))
def test_energy(n: int, width: int, margin: float, seed: int) -> None:
    """Any number of tokens, equal ones and zeros among them; the same for a sample alone and on one thread."""
    metric = torch.randn(2, n, width, generator=torch.Generator().manual_seed(seed))
    metric[0, : n // 3] = metric[0, n // 2]
    metric[1, n // 4 : n // 3] = 0
    if width == 1:  # cosines of 1 and -1 alone
        metric = metric.abs() + 0.1
    got = CPU.energy(metric, margin)
    torch.testing.assert_close(got, energy_by_hand(metric, margin), rtol=1e-5, atol=1e-5)
    assert torch.equal(CPU.energy(metric[1:], margin)[0], got[1])


def test_destinations_unlike_all_are_chosen() -> None:
    """Negative similarities are no less than what fills a tile up."""
    keys = torch.ones(1, 41, 1, 4)
    keys[:, 1::2] = -1
    keys[:, 7] = torch.tensor([-1.0, -1.0, -1.0, 0.5])
    assign, keep, moved, similarity, *_ = CPU.match_size(keys, None, 20, 0, 0, True)
    assert keep[0, assign[0, moved[0]]].tolist() == [7] * 20
    torch.testing.assert_close(similarity, torch.full((1, 20), -2.5 / (2 * 3.25**0.5)))


@given(cases(), st.booleans())
def test_merge(case: tuple[torch.Tensor, int, int, int], sized: bool) -> None:
    """merge and merge_add for the dtype of the case."""
    keys, r, prefix, suffix = case
    x, y = keys.flatten(2), keys.flip(-1).flatten(2)
    size = torch.randint(1, 9, keys.shape[:2]).float() if sized else None
    assign, keep, moved, _, size_out, _ = CPU.match_size(keys, size, r, prefix, suffix, True)
    for other in (None, y):
        given = (size, size_out, assign, keep, moved)
        got = CPU.merge(x, *given) if other is None else CPU.merge_add(x, other, *given)
        want = ops.merge_aten(x if other is None else x + other, size, size_out, assign, keep, moved)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, want, rtol=1.6e-2 if x.dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@given(cases(), st.booleans())
def test_unmerge_and_gradients(case: tuple[torch.Tensor, int, int, int], sized: bool) -> None:
    """unmerge for the dtype of the case, and what goes back through it and through a merge."""
    keys, r, prefix, suffix = case
    size = torch.randint(1, 9, keys.shape[:2]).float() if sized else None
    assign, keep, moved, _, size_out, _ = CPU.match_size(keys, size, r, prefix, suffix, True)
    x = keys[:, r:]
    assert torch.equal(CPU.unmerge(x, assign), ops.unmerge_aten(x, assign))
    assert torch.equal(CPU.unmerge(keep, assign), keep.gather(1, assign))
    near = {"rtol": 1.6e-2 if x.dtype is torch.bfloat16 else 1e-5, "atol": 1e-5}
    groups = keys.shape[1] - r
    sums = CPU.unmerge_backward(keys, assign, groups)
    torch.testing.assert_close(sums, ops.unmerge_backward_aten(keys, assign, groups), **near)
    given = (size, size_out, assign, keep, moved)
    back = CPU.merge_backward(x, *given)
    assert sums.dtype == back.dtype == x.dtype
    torch.testing.assert_close(back, ops.merge_backward_aten(x.float(), *given).to(x.dtype), **near)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16, torch.float64, torch.complex64])
def test_unmerge_copies_any_dtype(dtype: torch.dtype) -> None:
    x, index = torch.randn(2, 3, 5).to(dtype), torch.randint(0, 3, (2, 8))
    assert torch.equal(CPU.unmerge(x, index), ops.unmerge_aten(x, index))
    assert torch.equal(CPU.unmerge(x.mT, index % 5 // 2), ops.unmerge_aten(x.mT, index % 5 // 2))


def test_groups_without_tokens_sum_to_zero() -> None:
    index = torch.tensor([[2, 0, 2, 2]])
    sums = CPU.unmerge_backward(torch.ones(1, 4, 2), index, 4)
    assert torch.equal(sums, torch.tensor([1.0, 0.0, 3.0, 0.0]).reshape(1, 4, 1).expand(-1, -1, 2))


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_index_out_of_range_is_refused(bad: int) -> None:
    """The kernels read and write there: anything else would be memory of others."""
    index = torch.tensor([[0, bad, 1, 2]])
    with pytest.raises(IndexError, match="out of range"):
        OPS.unmerge(torch.randn(1, 3, 2), index)
    with pytest.raises(IndexError, match="out of range"):
        OPS.unmerge_backward(torch.randn(1, 4, 2), index, 3)
    keep, moved = torch.tensor([[0, 2, 3]]), torch.tensor([[1]])
    with pytest.raises(IndexError, match="out of range"):
        OPS.merge(torch.randn(1, 4, 2), None, torch.ones(1, 3), index, keep, moved)


def test_an_index_of_other_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="sample axes"):
        OPS.unmerge(torch.randn(2, 3, 2), torch.zeros(1, 4, dtype=torch.int64))


@given(cases(), st.booleans(), st.sampled_from([1.0, 40.0, 300.0]), st.data())
def test_merge_bias(case: tuple[torch.Tensor, int, int, int], sized: bool, spread: float, data: st.DataObject) -> None:
    """Terms of two samples and several heads, in memory in any order, shared by the samples, some masked out."""
    keys, r, prefix, suffix = case
    size = torch.randint(1, 9, keys.shape[:2]).float() if sized else None
    assign, keep, moved, _, size_out, _ = CPU.match_size(keys, size, r, prefix, suffix, True)
    n = keys.shape[1]
    order = data.draw(st.permutations(range(4)))
    shape = [1 if data.draw(st.booleans()) else 2, n, 3, 5]
    x = (torch.randn([shape[d] for d in order]) * spread).permute([order.index(d) for d in range(4)]).to(keys.dtype)
    x = x.masked_fill(torch.rand(x.shape) < 0.2, -torch.inf).expand(2, -1, -1, -1)
    got = CPU.merge_bias(x, size, size_out, assign, keep, moved)
    want = ops.merge_bias_aten(x, size, size_out, assign, keep, moved)
    assert got.dtype == x.dtype
    lowest = torch.finfo(torch.float32).min / 2  # as good as -inf to a softmax
    near = 1.6e-2 if x.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(*(t.float().clamp_min(lowest) for t in (got, want)), rtol=near, atol=near)


def test_equal_similarities_take_the_earlier_source() -> None:
    """Equal keys everywhere: which tokens go, and to where, is settled, whatever the number of threads."""
    far = torch.ones(1, 400, 1, 8)
    assign, keep, moved, *_ = CPU.match_size(far, None, 100, 0, 0, True)
    assert moved.tolist() == [list(range(0, 200, 2))]
    assert keep[0, assign[0, moved[0]]].unique().tolist() == [1]
    keys = torch.ones(1, 20, 1, 8)
    assign, keep, moved, *_ = CPU.match_size(keys, None, 4, 0, 0, True)
    assert moved.tolist() == [[0, 2, 4, 6]]
    assert keep[0, :6].tolist() == [8, 10, 12, 14, 16, 18]
    assert assign[0, moved[0]].tolist() == [6] * 4


def test_threads_do_not_change_the_result() -> None:
    keys, threads = torch.randn(3, 130, 2, 32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            index = CPU.match_size(keys, None, 40, 1, 0, True)
            found.append((*index, CPU.merge(keys, None, index[4], *index[:3])))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sample", [(), (1,), (6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("heads", [False, True])
def test_sample_axes(sample: tuple[int, ...], heads: bool) -> None:
    """Any number of them, in memory one behind the other or not, and values that do not lie in their own order."""
    n, shape = 24, (*sample, 24, *(2,) * heads, 8)
    values = torch.randn(*shape[::-1]).permute(*reversed(range(len(shape))))
    sizes = torch.randint(1, 5, (n, *sample)).float().movedim(0, -1)
    for x, size in ((values, sizes), (values.contiguous(), None)):
        index = CPU.match_size(x, size, 7, 1, 0, heads)
        flat = x.reshape(-1, n, *shape[len(sample) + 1 :])
        plain = None if size is None else size.reshape(-1, n).contiguous()
        want = CPU.match_size(flat.contiguous(), plain, 7, 1, 0, heads)
        for got, expected in zip(index, want, strict=True):
            assert torch.equal(got, expected.reshape(*sample, -1))
        near = {"rtol": 1e-5, "atol": 1e-5}
        for name, args in (("merge", (x,)), ("merge_add", (x, x.cos())), ("merge_bias", (x,))):
            got = getattr(CPU, name)(*args, size, index[4], *index[:3])
            whole = x + x.cos() if len(args) == 2 else x
            form = ops.merge_bias_aten if name == "merge_bias" else ops.merge_aten
            assert got.is_contiguous()
            torch.testing.assert_close(got, form(whole, size, index[4], *index[:3]), **near)


def test_operators_are_good_citizens() -> None:
    """opcheck: schema, fake tensor, autograd registration, dynamic shapes."""
    x = torch.randn(2, 17, 8)
    index = CPU.match_size(x, None, 6, 1, 0)
    torch.library.opcheck(CPU.match_size.default, (x, None, 6, 1, 0))
    torch.library.opcheck(CPU.merge.default, (x, None, index[4], *index[:3]))
    torch.library.opcheck(CPU.merge_add.default, (x, x, None, index[4], *index[:3]))
    torch.library.opcheck(CPU.merge_bias.default, (x, None, index[4], *index[:3]))
    torch.library.opcheck(CPU.merge_size.default, (None, *index[:3]))
    torch.library.opcheck(CPU.merge_backward.default, (x[:, 6:], None, index[4], *index[:3]))
    torch.library.opcheck(CPU.unmerge.default, (x[:, 6:], index[0]))
    torch.library.opcheck(CPU.unmerge_backward.default, (x, index[0], 11))


def test_a_dtype_they_do_not_know() -> None:
    keys = torch.randn(1, 10, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="float32 or bfloat16 only"):
        CPU.match_size(keys, None, 2, 0, 0)


@pytest.mark.parametrize(("r", "prefix", "suffix"), [(6, 0, 0), (5, 1, 0), (-1, 0, 0), (1, -2, 0), (0, 6, 6)])
def test_more_than_can_merge_is_refused(r: int, prefix: int, suffix: int) -> None:
    """The kernels write by these numbers: anything else would be memory of others."""
    with pytest.raises(ValueError, match="r must be 0 to"):
        OPS.match(torch.randn(1, 10, 4), r, prefix, suffix)


def test_nan_keys_do_not_crash() -> None:
    """A model that overflowed merges something, and its output is NaN as it was."""
    keys = torch.randn(2, 30, 2, 8)
    keys[0, 5] = torch.nan
    keys[1] = torch.nan
    assign, keep, moved, _, size_out, _ = CPU.match_size(keys, None, 9, 1, 0, True)
    for b in range(2):
        assert sorted(keep[b].tolist() + moved[b].tolist()) == list(range(30))
    assert CPU.merge(keys, None, size_out, assign, keep, moved)[1].isnan().all()


def test_without_a_compiler_the_aten_forms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, x = torch.randn(2, 21, 8), torch.randn(2, 21, 5)
    want = OPS.match_size(keys, None, 6, 1, 0)
    merged = OPS.merge_add(x, x, None, want[4], *want[:3])
    monkeypatch.setattr(cpu, "library", lambda: None)
    got = OPS.match_size(keys, None, 6, 1, 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(OPS.merge_add(x, x, None, got[4], *got[:3]), merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_aten_form(dtype: torch.dtype) -> None:
    x = torch.randn(2, 21, 5, dtype=dtype)
    assign, keep, moved, *_ = OPS.match(x, 6, 1, 0)
    out = OPS.merge(x, None, OPS.merge_size(None, assign, keep, moved), assign, keep, moved)
    assert out.dtype == dtype
    assert out.shape == (2, 15, 5)


def operands() -> dict[str, torch.Tensor]:
    """Arguments of all operators, by name: two samples of 10 tokens, of which 4 go."""
    x = torch.randn(2, 10, 6)
    assign, keep, moved, _, size_out, _ = OPS.match_size(x, torch.ones(2, 10), 4, 0, 0)
    named = {"metric": x, "x": x, "y": x.cos(), "grad": x[:, 4:], "size": torch.ones(2, 10), "size_out": size_out}
    return {**named, "assign": assign, "keep": keep, "moved": moved, "index": assign}


CALLS = {
    "match_size": lambda o, t: o.match_size(t["metric"], t["size"], 4, 0, 0),
    "merge": lambda o, t: o.merge(t["x"], t["size"], t["size_out"], t["assign"], t["keep"], t["moved"]),
    "merge_add": lambda o, t: o.merge_add(t["x"], t["y"], t["size"], t["size_out"], t["assign"], t["keep"], t["moved"]),
    "merge_bias": lambda o, t: o.merge_bias(t["x"], t["size"], t["size_out"], t["assign"], t["keep"], t["moved"]),
    "merge_size": lambda o, t: o.merge_size(t["size"], t["assign"], t["keep"], t["moved"]),
    "merge_backward": lambda o, t: o.merge_backward(
        t["grad"], t["size"], t["size_out"], t["assign"], t["keep"], t["moved"]
    ),
    "unmerge": lambda o, t: o.unmerge(t["grad"], t["index"]),
    "unmerge_backward": lambda o, t: o.unmerge_backward(t["x"], t["index"], 6),
}
READ = {
    "match_size": ("size",), "merge": ("x", "size", "size_out", "assign", "keep", "moved"),
    "merge_add": ("x", "y", "size", "size_out", "assign", "keep", "moved"),
    "merge_bias": ("x", "size", "size_out", "assign", "keep", "moved"),
    "merge_size": ("size", "assign", "keep", "moved"),
    "merge_backward": ("grad", "size", "size_out", "assign", "keep", "moved"), "unmerge": ("grad", "index"),
    "unmerge_backward": ("x", "index"),
}  # fmt: skip
WRONG = {
    "a sample fewer": lambda t: t[:1],
    "a token fewer": lambda t: t[:, :-1],
    "another sample axis": lambda t: t[None],
    "no sample axis": lambda t: t[0],
    "no dims": lambda t: t.flatten()[0],
    "samples and tokens exchanged": lambda t: t.transpose(0, 1),
    "one token": lambda t: t[:, :1],
    "no token": lambda t: t[:, :0],
}


@pytest.mark.parametrize("compiled", [True, False], ids=["C++", "ATen"])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("name", CALLS, ids=str)
def test_operands_that_do_not_fit_are_refused(
    name: str, wrong: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operand alone in another shape: an error, never memory of others. Only `unmerge` has a result of any length:
    that of its index."""
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)
    held = operands()
    CALLS[name](OPS, held)
    for operand in READ[name]:
        changed = WRONG[wrong](held[operand])
        if name == "unmerge" and operand == "index" and changed.dim() == 2 and len(changed) == 2:
            continue
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            CALLS[name](OPS, {**held, operand: changed})


@pytest.mark.parametrize("name", CALLS, ids=str)
def test_operands_of_another_dtype_are_refused(name: str) -> None:
    """The kernels read sizes as float32 and indices as int64."""
    held = operands()
    for operand in {"size", "size_out", "assign", "keep", "moved", "index"} & set(READ[name]):
        for dtype in (torch.float16, torch.float64, torch.int32):
            with pytest.raises(ValueError, match=f"{operand} must be (float32|int64)"):
                CALLS[name](CPU, {**held, operand: held[operand].to(dtype)})
    if "y" in READ[name]:
        with pytest.raises(ValueError, match=r"y must be float32 \[2, 10, 6\].*is bfloat16 \[2, 10, 6\]"):
            CALLS[name](CPU, {**held, "y": held["y"].bfloat16()})


@given(st.integers(0, 40), st.integers(1, 140), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 99))
def test_product(rows: int, wide: int, pairs: int, biased: bool, strided: bool, seed: int) -> None:
    """Rounded once, for tiles that rows and columns do not fill; a row is the same whatever stands beside it."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16()
                       for shape in ((rows, 2 * pairs + 6), (wide, 2 * pairs), (wide,)))  # fmt: skip
    x = x[:, 2 : 2 * pairs + 2] if strided else x[:, : 2 * pairs].contiguous()
    given_bias = bias if biased else None
    got = CPU.product(x, weight.t(), given_bias)
    exact, bound = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if biased:
        exact, bound = exact + bias.double(), bound + bias.double().abs()
    assert got.shape == (rows, wide)
    assert got.dtype is torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + bound * 2**-20).all()
    assert torch.equal(CPU.product(x[rows // 2 :], weight.t(), given_bias), got[rows // 2 :])


@pytest.mark.skipif(not cpu.has_products(), reason="the products of ATen stand in")
def test_a_product_reads_what_it_can() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    for args, message in (
        ((x, weight.t().contiguous()), "transpose of a dense"),
        ((x[:, :6], weight.t()), r"weight must be bfloat16 \[6, 5\]"),
        ((x, weight.t(), torch.zeros(4).bfloat16()), r"bias must be bfloat16 \[5\]"),
        ((x.float(), weight.t()), "must be bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            CPU.product(*args)
