"""Backends by name with their settings in it: `tome_r8`, `tome_flops50`, and what the environment says.

Programs that take nothing but a backend's name (timm's scripts, a launcher's configuration) reach the schedule by it:

    torch.compile(model, backend="tome_r8")              # r=8
    torch.compile(model, backend="tome_flops50")         # flops=0.5
    TOME_R=8 python serve.py                             # backend="tome"

What is said nearest to the call holds: `options={"tome.r": ...}`, then the name, then TOME_R or TOME_FLOPS, then r=16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from tome_fx.backend import ToMeBackend
from tome_fx.config import config_from


def named(name: str) -> Callable[..., Any]:
    """The backend that a name `tome_r<count>` or `tome_flops<percent>` stands for. Raises ValueError for others."""
    kind, count = name.removeprefix("tome_").rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    if not name.startswith("tome_") or kind not in ("r", "flops") or not count:
        raise ValueError(f"{name!r} is no backend of tome_fx: those are tome_r<tokens> and tome_flops<percent>")
    config = config_from({"r": int(count)} if kind == "r" else {"flops": int(count) / 100})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return ToMeBackend(config)(gm, example_inputs, **kwargs)

    backend.__name__ = backend.__qualname__ = name
    return backend


def __getattr__(name: str) -> Any:
    """Any of these names, as entry points look them up."""
    if name.startswith(("tome_r", "tome_flops")):
        try:
            return named(name)
        except ValueError as error:
            raise AttributeError(str(error)) from None
    raise AttributeError(name)


__all__ = ["named"]
