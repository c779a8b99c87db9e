#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.11 or later): a custom operator that is defined again under its name (a notebook's cell
# that runs twice, a module that is reloaded).
#
# Expected from memory: the second definition replaces the first, so that `torch.ops.NAME.default` is the operator that
#   `torch.library.custom_op` returned, and a traced graph's node has it as its target.
# Seen: so it is until the first definition is collected. Then `torch.ops.NAME.default` and the target of a graph that
#   make_fx traces are another OpOverload, unequal to the one that the definition holds. It computes the same. A table
#   of rules or decompositions that is keyed by the operator no longer finds it, at a time that depends on the garbage
#   collector.
# Why: the Library of the old definition takes its names out of `torch.ops` when it dies, those of the new one with them.
# Output:
#   defined once: the same object
#   defined again: the same object
#   after the first one is collected: another object
#   the target in a traced graph: another object, of the same name
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import gc
import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx


def define():
    @torch.library.custom_op("notebook::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    return scaled


def which(op, own):
    if op is own and op == own:
        return "the same object"
    return "another object" if op != own else "an equal object"


def current():
    return torch.ops.notebook.scaled.default


gc.disable()
first = define()
found = [which(current(), first._opoverload)]
second = define()
found.append(which(current(), second._opoverload))
del first
gc.collect()
found.append(which(current(), second._opoverload))
graph = make_fx(second)(torch.ones(2)).graph
(node,) = graph.find_nodes(op="call_function", target=current()) or graph.find_nodes(
    op="call_function", target=second._opoverload
)
named = node.target.name() == second._opoverload.name()
found.append(which(node.target, second._opoverload) + (", of the same name" if named else ""))
whens = ["defined once", "defined again", "after the first one is collected", "the target in a traced graph"]
print(*(f"{when}: {what}" for when, what in zip(whens, found)), sep="\n")
sys.exit(found != ["the same object"] * 2 + ["another object", "another object, of the same name"])
PYTHON
