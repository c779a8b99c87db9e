"""A block of a rewritten graph as a diagram, and token counts as bars: what ``python -m tome_fx show`` draws.

matplotlib is imported by whoever makes the axes: importing this module needs no extra package.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import fx

from tome_fx import ops  # noqa: F401  # defines torch.ops.tome

if TYPE_CHECKING:
    from tome_fx.explain import MergeStep

__all__ = ["block_graph", "draw_block", "draw_tokens"]

tome = torch.ops.tome

QUIET = {"dropout", "clone", "_to_copy"}
"""Ops that are not drawn beside views: they do nothing that a reader of the diagram looks for."""
FIRST_SIZE = 4
"""Results of a match from this one on are sizes; those before it say which token goes where."""
SHORT = {"scaled_dot_product_attention": "attention", "layer_norm": "norm", "group_norm": "norm", "match_size": "match"}
FILLS = {
    "match": "#f4a259",
    "merge": "#e4572e",
    "unmerge": "#8e6bbf",
    "size": "#7fb77e",
    "attention": "#8fb8de",
    "outside": "#ffffff",
    "": "#ececec",
}
EDGES = {"data": "#444444", "plan": "#e08a2e", "size": "#2e8b57"}
LEGEND = {"data": "tokens", "plan": "which token goes where", "size": "sizes of groups"}
OUT = "next"
"""The node that stands for everything after the block."""


def block_graph(graph: fx.Graph, place: str) -> nx.MultiDiGraph:
    """The block around the merge called ``place`` (as in a report): its ops, without views.

    A block is the module in which that attention lies; without such a name, all between the merge before and the one
    after.

    Returns:
        A graph with one edge of each kind between two nodes. Nodes have ``label``, ``kind`` (a key of ``FILLS``) and
        ``layer``, edges ``kind`` (a key of ``EDGES``). Nodes of kind "outside" are what the block takes from elsewhere.

    Raises:
        ValueError: there is no such merge in the graph.
    """
    inside = _inside(graph, place)
    found = nx.MultiDiGraph()
    for node in inside:
        if _is_quiet(node):
            continue
        found.add_node(node.name, label=_label(node), kind=_kind(node))
        for source, kind in _sources(node):
            if source not in inside:
                found.add_node(source.name, label=f"before:\n{_label(source)}", kind="outside")
            found.add_edge(source.name, node.name, kind, kind=kind)
    _lead_out(found, graph, inside)
    _set_layers(found)
    return found


def _inside(graph: fx.Graph, place: str) -> dict[fx.Node, None]:
    """The ops of the block, in order."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    at = [i for i, node in enumerate(calls) if "tome_merge" in node.meta]
    here = next((i for i in at if calls[i].meta["tome_merge"] == place), None)
    if here is None:
        raise ValueError(f"no merge is called {place!r}: there are {[calls[i].meta['tome_merge'] for i in at]}")
    block = place.rpartition(".")[0]
    if block:
        return dict.fromkeys(node for node in calls if f"{_module(node)}.".startswith(f"{block}."))
    first = max((i for i in at if i < here), default=-1) + 1
    last = min((i for i in at if i > here), default=len(calls))
    return dict.fromkeys(calls[first:last])


def _module(node: fx.Node) -> str:
    """Path of the innermost module that a node comes from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _name(node: fx.Node) -> str:
    """aten.linear.default: "linear"."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__) if packet is not None else getattr(node.target, "__name__", str(node.target))


def _is_quiet(node: fx.Node) -> bool:
    view = getattr(node.target, "is_view", False)
    return node.op == "call_function" and (node.target is operator.getitem or view or _name(node) in QUIET)


def _sources(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """What a node reads, through views and parts of results, with the kind of the edge. Weights are left out."""
    for source in node.all_input_nodes:
        kind = "data"
        while _is_quiet(source) and source.all_input_nodes:
            if source.target is operator.getitem and _kind(source.all_input_nodes[0]) == "match":
                kind = "size" if int(source.args[1]) >= FIRST_SIZE else "plan"  # type: ignore[arg-type]
            source = source.all_input_nodes[0]
        if source.op != "get_attr" and not _is_quiet(source):
            yield source, "size" if _kind(source) == "size" else kind


def _kind(node: fx.Node) -> str:
    name = _name(node)
    if getattr(node.target, "namespace", "") == "tome":
        kinds = {"match_size": "match", "merge_size": "size", "log_size": "size"}
        return kinds.get(name) or next((kind for kind in ("unmerge", "merge", "match") if kind in name), "")
    return "attention" if "attention" in name else ""


def _label(node: fx.Node) -> str:
    name = _name(node) if node.op == "call_function" else node.name
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    # Axes of one, the batch above all, only make the boxes wide.
    shape = " × ".join(str(n) for n in value.shape if n != 1) if isinstance(value, torch.Tensor) else ""
    return f"{SHORT.get(name, name)}\n{shape}"


def _lead_out(found: nx.MultiDiGraph, graph: fx.Graph, inside: dict[fx.Node, None]) -> None:
    """Edges from what later nodes read to one node more."""
    for node in graph.nodes:
        if node not in inside and not _is_quiet(node):
            for source, kind in _sources(node):
                if source in inside:
                    found.add_node(OUT, label="after it", kind="outside")
                    found.add_edge(source.name, OUT, kind, kind=kind)


def _set_layers(found: nx.MultiDiGraph) -> None:
    """`layer`: the longest path from a start; what comes from outside stands right before its first reader."""
    for layer, names in enumerate(nx.topological_generations(found)):
        for name in names:
            found.nodes[name]["layer"] = layer
    for name, node in found.nodes.items():
        if not list(found.predecessors(name)):
            node["layer"] = min((found.nodes[n]["layer"] for n in found.successors(name)), default=1) - 1


def _places(found: nx.MultiDiGraph) -> dict[str, tuple[float, float]]:
    """(x, y) of each node: its layer, and as near as the others of its layer allow to what it reads."""
    layers: dict[int, list[str]] = {}
    for name, layer in found.nodes(data="layer"):
        layers.setdefault(layer, []).append(name)
    places: dict[str, tuple[float, float]] = {}
    for layer in sorted(layers):
        wanted = {}
        for name in layers[layer]:
            near = [places[n][1] for n in found.predecessors(name) if n in places]
            wanted[name] = sum(near) / len(near) if near else 1.0
        order = sorted(layers[layer], key=lambda name: wanted[name])
        middle = sum(wanted.values()) / len(wanted) - (len(order) - 1) / 2
        places |= {name: (float(layer), middle + i) for i, name in enumerate(order)}
    return places


def draw_block(axes: Any, found: nx.MultiDiGraph, font: float = 6.5) -> None:
    """Draw what :func:`block_graph` returned, left to right, on matplotlib ``axes``."""
    places = _places(found)
    for source, target, kind in found.edges(data="kind"):
        far = found.nodes[target]["layer"] - found.nodes[source]["layer"] > 1
        bend = 0.0 if not far else 0.25 if kind == "size" else -0.25
        arrow = {"arrowstyle": "-|>", "color": EDGES[kind], "connectionstyle": f"arc3,rad={bend}", "shrinkA": 14}
        axes.annotate("", places[target], places[source], arrowprops={**arrow, "shrinkB": 20, "linewidth": 1.2})
    for name, (x, y) in places.items():
        node = found.nodes[name]
        box = {"boxstyle": "round,pad=0.35", "facecolor": FILLS[node["kind"]], "edgecolor": "#555555"}
        axes.text(x, y, node["label"].strip(), ha="center", va="center", fontsize=font, bbox=box)
    for kind, text in LEGEND.items():
        axes.plot([], [], color=EDGES[kind], label=text)
    axes.legend(loc="upper left", fontsize=font, frameon=False, ncols=len(LEGEND))
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    axes.set_ylim(min(ys) - 0.8, max(ys) + 1.2)
    axes.axis("off")


def draw_tokens(axes: Any, steps: Sequence[MergeStep], font: float = 7.0) -> None:
    """Bars on matplotlib ``axes``: how many tokens are left after each merge, the first bar before all."""
    counts = [steps[0].tokens_before, *(step.tokens_after for step in steps)]
    axes.bar_label(axes.bar(range(len(counts)), counts, color="#8fb8de"), fontsize=font)
    axes.set_xticks(range(len(counts)), ["input", *(step.name for step in steps)], rotation=60, ha="right")
    axes.tick_params(labelsize=font)
    axes.set_ylabel("tokens", fontsize=font)
    axes.spines[["top", "right"]].set_visible(False)
