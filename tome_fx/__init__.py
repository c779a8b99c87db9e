"""tome_fx: Token Merging for any traced transformer, as a torch.compile backend.

model = torch.compile(model, backend=tome_backend(r=16))
"""

from tome_fx.across import reuse_across_calls
from tome_fx.backend import ToMeBackend, ToMeError, ToMeWarning, tome_backend
from tome_fx.calibrate import calibrate
from tome_fx.check import Approximation, Check, CheckedMerge, CheckedOutput, NoLawError, check
from tome_fx.config import ToMeConfig
from tome_fx.explain import MergeStep, TokenTrace, explain, kept_tokens, rewrite, trace_tokens
from tome_fx.export import export
from tome_fx.matching import register_matcher
from tome_fx.methods import METHODS, Method, Order, Sides, Tokens, register_method, register_piece
from tome_fx.register import RuleError, register_attention, register_rule
from tome_fx.report import SiteReport, SkipReason, ToMeReport, Unmerge, clear_reports, reports
from tome_fx.side import WithSide
from tome_fx.tokens import MergedTokens, merge_tokens
from tome_fx.tuning import Flops, Loss, MetricError, Speed, Tried, Tuned, TunedBlock, TuneFileError, tune

# The function takes the name of its module: once imported, a module is not bound to its package again.
from tome_fx.visualize import visualize

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Approximation",
    "Check",
    "CheckedMerge",
    "CheckedOutput",
    "Flops",
    "Loss",
    "MergeStep",
    "MergedTokens",
    "Method",
    "MetricError",
    "NoLawError",
    "Order",
    "RuleError",
    "Sides",
    "SiteReport",
    "SkipReason",
    "Speed",
    "ToMeBackend",
    "ToMeConfig",
    "ToMeError",
    "ToMeReport",
    "ToMeWarning",
    "TokenTrace",
    "Tokens",
    "Tried",
    "TuneFileError",
    "Tuned",
    "TunedBlock",
    "Unmerge",
    "WithSide",
    "calibrate",
    "check",
    "clear_reports",
    "explain",
    "export",
    "kept_tokens",
    "merge_tokens",
    "register_attention",
    "register_matcher",
    "register_method",
    "register_piece",
    "register_rule",
    "reports",
    "reuse_across_calls",
    "rewrite",
    "tome_backend",
    "trace_tokens",
    "tune",
    "visualize",
]
