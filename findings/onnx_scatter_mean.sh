#!/usr/bin/env bash
# torch 2.14.1, onnxscript 0.7.2, onnxruntime 1.32.0 (CPU, Python 3.10 or later): scatter_reduce with reduce="mean" to ONNX.
#
# Expected from memory: ONNX's ScatterElements adds, multiplies, takes the least or the greatest, but has no mean; so
#   torch.onnx.export refuses reduce="mean", or spells it as a sum and a count.
# Seen: it exports without an error or a warning. In onnxruntime the last element written to a place stands there alone.
# Why: onnxscript's table for aten::scatter_reduce maps "mean" to reduction="none", which overwrites
#   (onnxscript/function_libs/torch_lib/ops/core.py, aten_scatter_reduce).
# Output:
#   sum: torch [3.0, 7.0], onnxruntime [3.0, 7.0], reduction add
#   mean: torch [1.0, 2.3333332538604736], onnxruntime [2.0, 4.0], reduction none
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import onnxruntime
import torch


class Scatter(torch.nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def forward(self, x, index):
        return torch.zeros(2).scatter_reduce(0, index, x, self.reduce)


x, index, same = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), True
for reduce, plainly in (("sum", "add"), ("mean", "none")):
    model = Scatter(reduce)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = torch.onnx.export(model, (x, index), dynamo=True, verbose=False)
    about = [w for w in told if "scatter" in str(w.message) or "mean" in str(w.message)]
    made.save("model.onnx")
    (node,) = [n for n in made.model.graph if n.op_type == "ScatterElements"]
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (got,) = session.run(None, {names[0]: x.numpy(), names[1]: index.numpy()})
    want, how = model(x, index).tolist(), node.attributes["reduction"].value
    print(f"{reduce}: torch {want}, onnxruntime {got.tolist()}, reduction {how}")
    same &= how == plainly and not about and (got.tolist() == want) is (reduce == "sum")
sys.exit(not same)
PYTHON
