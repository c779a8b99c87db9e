"""How an operator is registered: opaque to the compiler, or spelled out before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tome_fx.kernels import cpu

LIB = torch.library.Library("tome", "DEF")
CPU = cpu.define(cpu.NAMESPACE)


def opaque(
    schema: str, fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator that the compiler calls and does not look into.

    A plain registration: `torch.library.custom_op` would add its own checks to each call, a tenth of a millisecond.
    """

    def wrap(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        LIB.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tome::{name}", fake, lib=LIB)
        if name in cpu.SCHEMAS:  # compiled code out of a cache may meet no kernels
            CPU.impl(name, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{cpu.NAMESPACE}::{name}", fake, lib=CPU)
        return kernel

    return wrap


def spelled_out(schema: str, form: Callable[..., Any]) -> None:
    """Register a function as an operator that is replaced by what it is made of before anything is compiled."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(schema.partition("(")[0], form, "CompositeImplicitAutograd")


def native(x: Tensor, dtype: torch.dtype | None = None) -> Any | None:
    """The compiled kernels, where they can work on the device of `x` and in a dtype (that of `x`)."""
    return cpu.library() if x.device.type == "cpu" and (dtype or x.dtype) in cpu.DTYPES else None
