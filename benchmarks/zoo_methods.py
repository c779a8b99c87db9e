"""Every method on twenty models of the zoo, `placement="auto"`: how many attentions merge, and why others do not.

Each model, small and with random weights, is traced once in a process of its own; its graph is rewritten for every
method and run. A row says for each method how many sites merge of how many, the commonest reasons where some do not,
and whether outputs keep shape and dtype and are finite. Writes results/zoo_methods.json, which docs/methods.md shows
(`methods_page.py`).

    python benchmarks/zoo_methods.py [FILTER ...] [--r 8] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

import harness
from tome_fx import timing

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "zoo_methods.json"
MODELS = (
    "timm/vit_tiny_patch16_dinov3_qkvb", "timm/deit_tiny_patch16_224", "timm/beit_base_patch16_224", "timm/convit_tiny",
    "timm/cait_s24_224", "timm/davit_tiny", "timm/hiera_tiny_224", "timm/swin_s3_tiny_224", "timm/mvitv2_tiny",
    "timm/naflexvit_so150m2_patch16_reg1_gap", "torchvision/vit_b_16", "transformers/dinov2_registers:sdpa",
    "transformers/clip_vision:sdpa", "transformers/siglip_vision:eager", "transformers/videomae:sdpa",
    "transformers/timesformer:eager", "transformers/ast:sdpa", "transformers/whisper:sdpa", "diffusers/dit",
    "diffusers/sd3",
)  # fmt: skip
Row = dict[str, Any]


def one(name: str, r: int) -> Row:
    """What every method does with one model. Raises what the model or the pass raises."""
    import torch

    import zoo
    import zoo_models
    from tests import laws, palette
    from tome_fx.methods import METHODS

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = zoo_models.build(name)
    model, args, kwargs = palette.in_float64(made.model, made.args, made.kwargs)
    with torch.no_grad():
        want = model(*args, **kwargs)
        configs = {method: {"r": r, "method": method} for method in METHODS}
        traced, found = laws.Traced(model, configs, dynamic=None), {}
        outputs = {method: palette.leaves(traced(method, *args, **kwargs)) for method in METHODS}
        for method in METHODS:
            report = traced.reports[method]
            reasons = Counter(f"{skip.kind}: {skip.detail}" for skip in report.skipped)
            found[method] = {
                "sites": report.attention_sites, "merged": report.merged_sites, "reasons": dict(reasons.most_common(2)),
                "shapes": zoo._alike(outputs[method], want),
                "finite": all(bool(t.isfinite().all()) for t in outputs[method] if t.is_floating_point()),
            }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="*", help="only models whose name holds one of these")
    parser.add_argument("--r", type=int, default=8, help="tokens merged in each block (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the rows there are")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not args.fresh else {}
    for name in MODELS:
        if (args.filter and not any(part in name for part in args.filter)) or (name in rows and not args.filter):
            continue
        found = harness.alone(one, name, args.r)
        rows[name] = found if "failed" in found else {"methods": found}
        row = rows[name]
        merged = {method: f"{told['merged']}/{told['sites']}" for method, told in row.get("methods", {}).items()}
        Console().print(name, row.get("failed") or merged, highlight=False)
        held = {"r": args.r, "machine": timing.machine_info("cpu"), "rows": {n: rows[n] for n in MODELS if n in rows}}
        RESULTS.write_text(json.dumps(held, indent=1) + "\n")
    return int(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
