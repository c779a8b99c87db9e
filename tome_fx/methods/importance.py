"""importance: how much a token matters, float32 `[batch, N]`, the larger the more."""

from __future__ import annotations

from torch import Tensor

from tome_fx.kernels import cpu

from .tokens import Tokens, mean_of, piece, with_all


@piece("importance", "attention", needs=("attention",))
def attention(tokens: Tokens) -> Tensor:
    """Attention that the class token pays to each, mean over heads (EViT, arXiv 2202.07800, section 3.2; DiffRate,
    arXiv 2305.17997); without a special token, the attention received. The class token is the first special one: of a
    model that has registers alone, a register."""
    assert tokens.attention is not None
    return tokens.attention


@piece("importance", "received", needs=("received",))
def received(tokens: Tokens) -> Tensor:
    """Attention that each receives, mean over heads and queries (MCTF, arXiv 2403.10030, equation 3)."""
    assert tokens.attention is not None
    return tokens.attention


@piece("importance", "change", needs=("change",))
def change(tokens: Tokens) -> Tensor:
    """How much the block changed the token: the length of what its attention added, over that of the residual stream
    before (no one paper's: they compare a token across layers each in its own way). What merged before counts as one
    token."""
    assert tokens.change is not None
    return tokens.change


@piece("importance", "norm")
def norm(tokens: Tokens) -> Tensor:
    """Length of what the token is compared by: its key, or the residual stream."""
    return tokens.metric.norm(dim=-1)


@piece("importance", "energy", all_pairs=True)
def energy(tokens: Tokens) -> Tensor:
    """Minus PiToMe's energy (arXiv 2405.16148, equation 4): E_i is the mean over j of f(cos(k_i, k_j)), f(x) = x where
    x >= margin and exp(x - margin) - 1 below it. The public code averages ELU(cos - margin) instead; here is the
    paper's. At block l of L (the first is 0) margin is (1 - l / L) times what it is at the first."""
    margin = tokens.numbers["margin"]
    all_count = tokens.seen is None and tokens.live is None
    plain = type(tokens.metric) is Tensor and tokens.metric.device.type == "cpu"  # not while it is traced
    if all_count and plain and (kernels := cpu.library()) is not None:  # each pair once, none of them written
        return -kernels.energy(tokens.metric, margin)
    alike, kin = with_all(tokens)
    return -mean_of(alike.where(alike >= margin, (alike - margin).exp() - 1), kin)  # expm1 takes four times as long


@piece("importance", "rare", all_pairs=True)
def rare(tokens: Tokens) -> Tensor:
    """Minus the mean similarity to all tokens: what is like nothing else is important (SAINT's rule at the end of a
    tower, arXiv 2503.11549, without repeating)."""
    return -mean_of(*with_all(tokens))


@piece("importance", "size")
def size(tokens: Tokens) -> Tensor:
    """Original tokens behind each."""
    return tokens.size
