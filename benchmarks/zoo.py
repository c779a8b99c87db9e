"""The zoo: what tome_fx does with every attention family of timm, models of torchvision, transformers and diffusers,
all packed vision towers of transformers, and models of nineteen other libraries.

One process for each model, so that a failure costs one row; rows that are there already are kept (`--fresh` starts
over). For each model, small and with random weights, the process compares the rewritten graph with the original one:

- shapes and dtypes of all outputs at r, and the report: sites, placement, tokens, FLOPs, unmerges, reasons;
- r=0: bit-equal to Dynamo's own graph;
- where nothing pays at r: how many sites merge with `placement="branch"`, which asks no profit test;
- the lossless law (docs/design.md): positions out, convolutions wrapped around, palette input. "exact", or
  "not equal" with the lowest cosine at which tokens were merged where the input could not give each token an equal
  (overlapping stems, pooled grids), or "not traced" where torch.export gives a graph that does not merge as the
  compiled one does, so that nobody can look, or "n/a" where a convolution between two merges tells equal tokens apart:
  there the law says nothing;
- the tied law (`tome_fx.check`), on the ordinary input and with weights redrawn: the error in float64, and where
  ops average what still differs within a group, what is left once the tied model does so too, and which ops they are;
- the law of the batch: "apart" where a sample's result is the same whatever samples are beside it, in float64; "n/a"
  where the model does not run in it, or mixes its samples without merging too.

Writes benchmarks/results/zoo.json and docs/zoo.md.

    python benchmarks/zoo.py [FILTER ...] [--r 8] [--jobs 2] [--fresh] [--sweep]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "zoo.json"
SWEEP, FUZZ = RESULTS.with_name("zoo-sweep.json"), RESULTS.with_name("fuzz.json")
TABLE = ROOT / "docs" / "zoo.md"
LIMIT = 600
"""Seconds that one model may take."""
EXACT = 1e-4
"""Largest relative error at which the lossless law counts as kept: float32 through a few dozen layers."""
SAME = 1 - 1e-6
"""Cosine from which two merged tokens count as equal: their difference is then a thousandth of their length."""
APART = 1e-5
"""Largest relative difference, in float64, of a sample's result in a batch and alone."""
ROUNDING = 1e-12
"""What merging moves, in float64, where the outputs do not depend on the tokens."""
SILENT = "its output says nothing of its input"
Row = dict[str, Any]


# -- one model, in a process of its own --------------------------------------------------------------------------------


def one(name: str, r: int, sweep: bool = False) -> Row:
    """Everything there is to say of one model. Raises what the model or the pass raises."""
    import torch

    import zoo_models
    from tests import laws, palette

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    zoo = zoo_models.build(name, sweep)
    with torch.no_grad():
        torch.manual_seed(1)
        want = zoo.model(*zoo.args, **zoo.kwargs)
        # Before anything is compiled: some libraries' models do not run eagerly any more once they have been.
        law = _references(zoo_models.build(name, sweep))
        # One trace of Dynamo for all: it takes longer than the rest.
        configs = {"auto": {"r": r}, "branch": {"r": r, "placement": "branch"}, "zero": {"r": 0}}
        made = laws.Traced(zoo.model, configs, dynamic=None)

        def run(config: str) -> list[torch.Tensor]:
            torch.manual_seed(1)
            return palette.leaves(made(config, *zoo.args, **zoo.kwargs))

        got = run("auto")
        row = {"module": zoo_models.module_of(name), **_told(made.reports["auto"]), "shapes": _alike(got, want)}
        placement = "auto"
        if row["sites"] and not row["merged"]:
            placement = "branch"
            forced = run("branch")
            row |= {"forced": made.reports["branch"].merged_sites, "shapes": row["shapes"] and _alike(forced, want)}
        if row["graphs"]:
            row["identity"] = all(torch.equal(a, b) for a, b in zip(run("zero"), run(""), strict=True))
        if row["merged"] or row.get("forced"):
            convolved = [op for op in row["unmerges"] if "conv" in op]
            row.update(_lossless(law, r, bool(convolved), placement))
            row["tied"] = _tied(zoo_models.build(name, sweep), r, placement)
            row["batch"] = _apart(zoo_models.build(name, sweep), r, placement)
            if row["lossless"] == f"broken: {SILENT}" and row["tied"]["moved"] < ROUNDING:
                # With other weights and inputs merging moves nothing either: so is the model.
                row["lossless"] = f"n/a ({SILENT})"
            if row["lossless"] == "broken" and convolved:
                # Tokens equal when they merged, and no longer after their neighbours were mixed in.
                row["lossless"] = f"n/a ({convolved[0].removeprefix('aten.')} between merges)"
            if row["lossless"] == "broken" and row["tied"]["holds"] and row["tied"]["approximations"]:
                # Positions that could not be taken out of the model: tokens that are equal are not treated alike.
                row["lossless"] = f"n/a ({next(iter(row['tied']['approximations']))} tells equal tokens apart)"
    return row


def _alike(got: list[Any], want: Any) -> bool:
    from tests import palette

    return all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(got, palette.leaves(want), strict=True))


def _told(report: Any) -> Row:
    """What the report of all graphs says."""
    unmerges: Counter[str] = Counter(u.op for u in report.unmerges)
    reasons: Counter[str] = Counter(f"{s.kind}: {s.detail}" for s in report.skipped)
    tokens = report.tokens
    return {
        "graphs": report.graphs,
        "sites": report.attention_sites,
        "merged": report.merged_sites,
        "placement": sorted({s.placement for s in report.sites if s.merged}),
        "tokens": [tokens[0][0], tokens[-1][1]] if tokens else None,
        "flops": report.flops_after / report.flops_before if report.flops_before else None,
        "unmerges": dict(unmerges.most_common()),
        "reasons": dict(reasons.most_common(4)),
        "unknown": report.unknown_ops,
        "seconds": sum(report.seconds.values()),
    }


def _tied(zoo: Any, r: int, placement: str) -> Row:
    """What `tome_fx.check` finds; weights are redrawn, so that every part is felt at the output."""
    import torch

    import tome_fx
    from tests.models import redraw

    torch._dynamo.reset()
    found = tome_fx.check(redraw(zoo.model, 1), zoo.args, zoo.kwargs, r=r, placement=placement, effects=False)
    ops = Counter(a.op.removeprefix("aten.") for a in found.approximations)
    numbers = {name: getattr(found, name) for name in ("error", "explained", "spelling", "moved", "notes", "holds")}
    return {**numbers, "approximations": dict(ops.most_common()), "dtype": str(found.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class _Law:
    """A model whose tokens can be equal, its palettes, and what it makes of each (None: of its ordinary input)."""

    model: Any
    kwargs: dict[str, Any]
    palettes: Any
    wants: list[Any]
    other: Any


def _references(zoo: Any) -> _Law:
    import torch

    from tests import palette

    def run(args: Any) -> Any:
        torch.manual_seed(1)
        return model(*args, **zoo.kwargs)

    model = palette.wrap_convolutions(palette.equalize(zoo.model, seed=1))
    return _Law(model, dict(zoo.kwargs), zoo.palettes, [run(args) for args in zoo.palettes], run(zoo.args))


def _lossless(law: _Law, r: int, convolved: bool, placement: str) -> Row:
    """The law on each palette; the first on which it says something, or else the one with the highest cosine.

    convolved: a convolution between merges may tell tokens apart that were equal, so other palettes are tried.
    """
    from tests import palette

    if palette.distance(law.wants[0], law.other) < EXACT:
        return {"lossless": f"broken: {SILENT}"}
    found: list[Row] = []
    for args, want in zip(law.palettes, law.wants, strict=True):
        found.append(_held(law, args, want, r, placement))
        broken = found[-1]["lossless"].startswith("broken")
        if found[-1]["lossless"] == "exact" or (broken and not convolved):
            return found[-1]
    others = [row for row in found if row["lossless"] != "not equal"]
    return others[0] if others else max(found, key=lambda row: row["cosine"])


def _apart(zoo: Any, r: int, placement: str) -> str:
    """The law of the batch: "apart", how far off a sample is, or why it says nothing. Raises what merging raises."""
    import torch

    import zoo_models
    from tests import palette

    torch._dynamo.reset()
    exact, args, kwargs = palette.in_float64(zoo.model, zoo.args, zoo.kwargs)
    try:
        exact(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as problem:
        return f"n/a ({type(problem).__name__}: {str(problem)[:160]})"
    found, _ = palette.samples_apart(zoo.model, zoo.args, zoo.kwargs, r, zoo_models.BATCH, placement=placement)
    if found is None:
        return "n/a (its samples mix without merging too, or do not run alone)"
    return "apart" if found < APART else f"mixed: {found:.1e}"


def _held(law: _Law, args: Any, want: Any, r: int, placement: str) -> Row:
    import torch

    import tome_fx
    from tests import palette

    torch._dynamo.reset()
    torch.manual_seed(1)
    got = palette.compiled(law.model, r, placement=placement)(*args, **law.kwargs)
    try:
        error = palette.distance(got, want)
    except AssertionError as problem:
        return {"lossless": f"broken: {problem}"}
    if error <= EXACT:
        return {"lossless": "exact", "error": error}
    kwargs = {k: v for k, v in law.kwargs.items() if k != "return_dict"}
    try:
        trace = tome_fx.trace_tokens(law.model, args, kwargs, r=r, placement=placement)
    except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as problem:
        return {"lossless": "not traced", "error": error, "why": f"{type(problem).__name__}: {str(problem)[:200]}"}
    if not trace.merges:
        return {"lossless": "not traced", "error": error, "why": f"exported whole, {trace.report.summary()[:200]}"}
    lowest = palette.lowest_similarity(trace)
    # Equal keys need not be equal tokens: what merges as the tied law says on this very input is not broken.
    other = lowest < SAME or not palette.untied(law.model, args, kwargs, r, placement=placement)
    return {"lossless": "not equal" if other else "broken", "error": error, "cosine": lowest}


# -- all models --------------------------------------------------------------------------------------------------------


PRELOADED = ["torch._dynamo", "torch._inductor.config", "transformers", "tome_fx", "tests.laws", "zoo_models"]
"""What a process forks from, so that imports are paid once."""


def run(name: str, r: int, sweep: bool = False) -> Row:
    """`one` in a process of its own."""
    start = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, name, r, sweep))
    child.start()
    there.close()
    row: Row = {"name": name, "r": r}
    try:
        row.update(here.recv() if here.poll(LIMIT) else {"failed": f"took more than {LIMIT} s"})
    except EOFError:
        child.join()
        row["failed"] = f"its process ended with code {child.exitcode}"
    child.kill()
    row["wall"] = time.perf_counter() - start
    return row


def main() -> int:
    """Run what is missing, write the table; 1 where a row failed, changed a shape, r=0 or broke the law."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="*", help="only models whose name holds one of these")
    parser.add_argument("--r", type=int, default=8, help="tokens merged in each block (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the rows there are")
    parser.add_argument("--sweep", action="store_true", help="all variants of ViT, DeiT, EVA and BEiT in timm instead")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    import zoo_models

    console = Console()
    path = SWEEP if args.sweep else RESULTS
    names = zoo_models.names(args.sweep)
    wanted = [n for n in names if not args.filter or any(f in n for f in args.filter)]
    rows: dict[str, Row] = {}
    if path.exists():
        rows = {row["name"]: row for row in json.loads(path.read_text())["rows"] if row["name"] in names}
    again = [n for n in wanted if args.fresh or args.filter or not _whole(rows.get(n, {}), args.r)]
    again.sort(key=lambda n: n in rows)  # new ones first
    with Progress(console=console) as bar, ThreadPoolExecutor(args.jobs) as pool:
        task = bar.add_task("zoo", total=len(again))
        for row in pool.map(lambda n: run(n, args.r, args.sweep), again):
            rows[row["name"]] = row
            bar.update(task, advance=1, description=row["name"])
            _save(path, [rows[n] for n in names if n in rows], args.r)
    held = [rows[n] for n in names if n in rows]
    if RESULTS.exists():
        TABLE.write_text(table(json.loads(RESULTS.read_text())["rows"], args.r))
    for row in held:
        if bad(row):
            console.print(f"[red]{row['name']}[/]: {row.get('failed', '')[-300:] or verdict(row)}", highlight=False)
    return int(any(map(bad, held)))


def _whole(row: Row, r: int) -> bool:
    """Whether a stored row says all that a new one would."""
    return row.get("r") == r and ("tied" in row or not (row.get("merged") or row.get("forced")))


def _child(pipe: Any, name: str, r: int, sweep: bool) -> None:
    import zoo_models

    os.environ["TQDM_DISABLE"] = "1"
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        row = one(name, r, sweep)
    except zoo_models.NotOffered as error:
        row = {"absent": str(error)[:200]}
    except Exception:  # noqa: BLE001 - the row says what went wrong
        row = {"failed": traceback.format_exc()[-800:]}
    pipe.send(row)


def _save(path: Path, rows: list[Row], r: int) -> None:
    from tome_fx import timing

    info = timing.machine_info("cpu")
    path.write_text(json.dumps({"machine": info, "r": r, "rows": rows}, indent=1) + "\n")


# -- the table ---------------------------------------------------------------------------------------------------------


def bad(row: Row) -> bool:
    """Whether a row shows a defect of ours: a crash, a changed shape, r=0 not bit-equal, the law broken, silence."""
    if "absent" in row:
        return False
    silent = row.get("sites") and not row.get("merged") and not row.get("reasons")
    law = str(row.get("lossless", "")).startswith("broken") or str(row.get("batch", "")).startswith("mixed")
    law |= not row.get("tied", {}).get("holds", True)
    broken = any(reason.startswith("internal error") for reason in row.get("reasons", ()))
    return bool(broken or "failed" in row or not row["shapes"] or row.get("identity") is False or law or silent)


def verdict(row: Row) -> str:
    """The lossless law in one cell."""
    found = row.get("lossless", "")
    if found == "not equal":
        return f"n/a (cosine {row['cosine']:.3f})"
    return found


def tied(row: Row) -> str:
    """The tied law in one cell: the error, what is left of it, and the ops that are approximations."""
    found = row.get("tied")
    if not found:
        return ""
    cell = "" if found["holds"] else "BROKEN "
    cell += f"{found['error']:.0e}"
    if found["approximations"]:
        ops = ", ".join(f"{count} {op}" for op, count in found["approximations"].items())
        cell += f", {found['explained']:.0e} without {ops}"
    return cell if found["dtype"] == "float64" else f"{cell} ({found['dtype']})"


def _beside() -> list[str]:
    """What the sweep over all variants and the random graphs found."""
    lines = []
    if SWEEP.exists():
        rows = [row for row in json.loads(SWEEP.read_text())["rows"] if "absent" not in row]
        exact = sum(row.get("lossless") == "exact" for row in rows)
        merged = sum(bool(row.get("merged")) for row in rows)
        lines.append(
            f"- all variants of ViT, DeiT, EVA and BEiT in timm, four blocks each (`--sweep`): {len(rows)} built, "
            f"{merged} merge, {exact} with the law exact, {sum(map(bad, rows))} failures"
        )
    if FUZZ.exists():
        runs = json.loads(FUZZ.read_text())["runs"]
        graphs, merged = (sum(run[name] for run in runs) for name in ("graphs", "merged"))
        failures = sum(len(run["failures"]) for run in runs)
        lines.append(
            f"- random transformers (benchmarks/fuzz.py): {graphs} graphs, {merged} of them merged, {failures} failures"
        )
    return lines


def table(rows: list[Row], r: int) -> str:
    """docs/zoo.md."""
    shown = [row for row in rows if "absent" not in row and (row.get("sites") or "failed" in row or row["reasons"])]
    attention = [row for row in shown if "failed" in row or row["sites"]]
    merging = [row for row in attention if row.get("merged")]
    forced = [row for row in attention if row.get("forced")]
    timm_rows = [row for row in attention if row["name"].startswith("timm/")]
    timm_merging = [row for row in timm_rows if row.get("merged") or row.get("forced")]
    timm_paying = [row for row in timm_rows if row.get("merged")]
    files, merging_files, paying_files = (
        {row.get("module") for row in some} for some in (timm_rows, timm_merging, timm_paying)
    )
    slowest = max(attention, key=lambda row: row.get("seconds", 0.0))
    law = Counter(row.get("lossless") for row in rows)
    batch = Counter(row["batch"].split()[0] for row in rows if "batch" in row)

    def of(merged: Any, paying: Any) -> str:
        asked = len(merged) - len(paying)
        return f"{len(merged)} ({asked} only on request: by the estimate for a CPU they do not gain at this r)"

    checked = [row["tied"] for row in rows if "tied" in row]  # rows of older runs have none
    held, exact = sum(one["holds"] for one in checked), sum(not one["approximations"] for one in checked)
    head = "| model | graphs | sites | merged | placement | tokens | FLOPs | shapes | r=0 | lossless "
    head += "| tied | batch " if checked else "| batch "
    lines = [
        "# The zoo",
        "",
        "Made by `make zoo` (benchmarks/zoo.py says what each column means); no figure is typed by hand.",
        f"Random weights, batch of 2, float32, CPU, r={r}.",
        "",
        f"- models with attention: {len(attention)}; with merged sites: {of(merging + forced, merging)}",
        f"- of these in timm: {len(timm_rows)}; with merged sites: {of(timm_merging, timm_paying)}",
        f"- model files of timm with attention: {len(files)}; with merged sites: {of(merging_files, paying_files)}",
        f"- failures: {sum(map(bad, rows))}",
        f"- lossless law: {law['exact']} exact, {law['not equal']} where the input gives no equal tokens",
        *[f"- tied law: {held} of {len(checked)} hold, {exact} without any approximation"] * bool(checked),
        f"- samples stay apart: {batch['apart']} of {sum(batch.values())}; not to be said: {batch['n/a']}",
        f"- passes: at most {slowest.get('seconds', 0):.1f} s ({slowest['name']})",
        *_beside(),
        "",
        head + "| unmerged at | passes, s |",
        "|" + "---|" * (13 + bool(checked)),
    ]
    for row in attention:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed |" + " |" * (11 + bool(checked)))
            continue
        tokens = f"{row['tokens'][0]} → {row['tokens'][1]}" if row["tokens"] else ""
        flops = f"{row['flops']:.2f}" if row["merged"] else ""
        ops = ", ".join(op.removeprefix("aten.") for op in list(row["unmerges"])[:5])
        yes = {True: "same", False: "CHANGED", None: ""}
        count = f"0 (branch: {row['forced']})" if row.get("forced") else row["merged"]
        lines.append(
            f"| {row['name']} | {row['graphs']} | {row['sites']} | {count} | {', '.join(row['placement'])} "
            f"| {tokens} | {flops} | {yes[row['shapes']]} | {yes[row.get('identity')]} | {verdict(row)} "
            f"{f'| {tied(row)} ' * bool(checked)}| {row.get('batch', '').partition(' (')[0]} | {ops} "
            f"| {row['seconds']:.2f} |"
        )
    lines += ["", "## Models with attention in which nothing merges, and why", ""]
    lines += [f"- {row['name']}: {'; '.join(row['reasons'])}" for row in attention
              if "failed" not in row and not row["merged"]]  # fmt: skip
    none = "no softmax attention"
    rest = [(row["name"], next((why for why in row["reasons"] if not why.endswith(none)), none)) for row in shown
            if not row.get("sites", 1)]  # fmt: skip
    plain = [name for name, why in rest if why == none]
    lines += ["", "## Models in which no softmax attention was found", ""]
    lines += [f"- {name}: {why}" for name, why in rest if name not in plain]
    lines += [f"- no softmax at all that could be one: {', '.join(name.partition('/')[2] for name in plain)}"]
    unknown: Counter[str] = sum((Counter(row.get("unknown", {})) for row in rows), Counter())
    lines += ["", "## Ops without a rule (merged values are unmerged before them)", ""]
    lines += [f"- `{op}`: {count}" for op, count in unknown.most_common()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
