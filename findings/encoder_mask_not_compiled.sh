#!/usr/bin/env bash
# torch 2.14.1 (CPU, Python 3.10 or later): nn.TransformerEncoder called with a mask and no is_causal, under torch.compile.
#
# Expected from memory: a mask that is a buffer is one more tensor in the graph. Were there a graph break, the layers
#   would be in a graph on one side of it or the other.
# Seen: no layer of the encoder reaches the backend: there is a graph for the Linear before it and one for the Linear
#   after it. The encoder runs uncompiled, with no error and no Python warning (a line in the log says "Graph break from
#   `Tensor.item()`"). With is_causal=False, which says the same of this mask, all of it is one graph.
# Why: is_causal=None makes the encoder compare the values of the mask with those of a causal mask and take bool() of it
#   (`_detect_is_causal_mask`, torch/nn/modules/transformer.py). Dynamo breaks the graph there, inside torch.nn, whose
#   frames it inlines but does not compile on their own: the whole call of the encoder is left to Python.
# Output (ops in each graph):
#   no hint: ['linear'] ['linear']
#   is_causal=False: ['linear', 'zeros_like', 'masked_fill_', 'view', 'expand', '_transformer_encoder_layer_fwd',
#     'view', 'expand', '_transformer_encoder_layer_fwd', 'linear']
# Exit: 0 if that is still so, 1 if it is not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, **hint):
        super().__init__()
        self.hint = hint
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.register_buffer("mask", torch.eye(5, dtype=torch.bool))

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens), mask=self.mask, **self.hint))


def graphs_of(model):
    def backend(graph, _):
        ops = [node for node in graph.graph.nodes if node.op.startswith("call")]
        graphs.append([getattr(node.target, "__name__", str(node.target)) for node in ops])
        return graph.forward

    graphs, tokens = [], torch.randn(2, 5, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(tokens), model(tokens))
    return graphs


with warnings.catch_warnings(record=True) as raised:
    warnings.simplefilter("always")
    plain = graphs_of(Model().eval())
hinted = graphs_of(Model(is_causal=False).eval())
print("no hint:", *plain)
print("is_causal=False:", *hinted)
told = [str(warning.message) for warning in raised if "break" in str(warning.message).lower()]
layers = [graph.count("_transformer_encoder_layer_fwd") for graph in hinted]
sys.exit(not (plain == [["linear"], ["linear"]] and layers == [2] and not told))
PYTHON
