"""The merged model with marks on what its merges did, and the unmerged one at full length with tied groups.

From the passes come the *places* of merges (which node, which dim holds the tokens, along which axes samples stand);
from a run of the rewritten graph the groups that its matches found. The tied run knows nothing of layouts, sizes or
rules: it computes the captured graph, and at every merge replaces each token by the mean of its group.

    x_1 = add(x, attention(...))     [2, 197, 384]
    x_1 = tied(x_1)                  [2, 197, 384], each row the mean of its group's rows

Where a value that still differs within a group meets merged tokens (`Join`), the merge averages it; the tied run does
so only at those joins that it is told to.
"""

from tome_fx.tied.groups import Groups, given_back
from tome_fx.tied.marks import Join, Marked, steps_between
from tome_fx.tied.runs import MergedRun, Mode, PlainRun, dropped, is_random, makes_whole
from tome_fx.tied.whole import TiedRun, is_merge, relative

__all__ = ["Groups", "Join", "Marked", "MergedRun", "Mode", "PlainRun", "TiedRun", "dropped", "given_back", "is_merge",
           "is_random", "makes_whole", "relative", "steps_between"]  # fmt: skip
