"""Op rules: one file per family. `find(node)` is the only way in."""

from __future__ import annotations

from torch import fx

from . import base, contraction, joins, pointwise, reduce, slices, views
from .base import UNKNOWN, Call, Decision, Rule, Signature, op_name, tensors_of

__all__ = ["UNKNOWN", "Call", "Decision", "Rule", "Signature", "find", "op_name", "tensors_of"]

_ = (contraction, joins, reduce, slices, views)


def find(call: Call) -> Rule:
    """The rule of a node's op: registered, or the pointwise one by tag, or `UNKNOWN` (everything whole)."""
    if call.rule is None:
        call.rule = _found(call)
    return call.rule


def _found(call: Call) -> Rule:
    rule = base.rule_for(call.target)
    if rule is None and pointwise.is_pointwise(call.target):
        rule = pointwise.POINTWISE
    if isinstance(rule, pointwise.PointwiseRule) and not pointwise.covers(call):
        return UNKNOWN
    return rule or UNKNOWN


def has_rule(node: fx.Node) -> bool:
    return base.rule_for(node.target) is not None or pointwise.is_pointwise(node.target)
