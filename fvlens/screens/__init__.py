"""Gradient screens: scores of all heads from a few backward passes, to choose which heads are worth patching exactly.

Three scores, all of a prompt p~, an answer y and a head (l, h). ``z~`` is the head's output on the prompt, ``mean z``
its task mean.

``atp`` (attribution patching)
    ``(mean z - z~) . dP(y) / dz~``, the linear part of the causal indirect effect: one forward and one backward pass
    for all heads.
``ig`` (integrated gradients)
    ``(mean z - z~) . (1/m) sum_i dP(y) / dz`` at m points of the straight line from z~ to mean z, all heads of ONE
    layer moved along it together: a backward pass a layer and point. The points are the midpoints ``(i - 1/2) / m`` of
    m equal steps [choice], whose error falls with the square of m. Summed over the heads of a layer, the score goes to
    the effect of replacing the whole layer (completeness). That is not the effect of one head alone.
``lrp`` (relevance of attention to the demonstrations' labels)
    ``R = A * dlogit_y / dA`` of the attention pattern A, ``sum_k max(0, R[last, k])`` over the label tokens k. The
    backward pass is made linear by the rules of AttnLRP, see :func:`relevance_rules`. Unit: logits, not probability.

All three need the gradient at the patched positions only, which do not reach earlier positions. So a prompt runs once
without a gradient, and only its suffix again with one, through the model's own blocks (``kv``); where the model cannot
do that, whole prompts are run with gradients (``naive``).

Gradients are taken of added zeros at the hooks, never of parameters: no ``.grad`` and no ``requires_grad`` changes.
What is differentiated is ``log P``, times P afterwards, so that small probabilities survive half precision.
"""

from fvlens.screens._batch import Screening
from fvlens.screens._patching import attribution_patching, integrated_gradients
from fvlens.screens._relevance import pattern_hook, relevance
from fvlens.screens._rules import Rules, relevance_rules
from fvlens.screens._table import SCREENS, Request, Scored, Screen

__all__ = [
    "SCREENS",
    "Request",
    "Rules",
    "Scored",
    "Screen",
    "Screening",
    "attribution_patching",
    "integrated_gradients",
    "pattern_hook",
    "relevance",
    "relevance_rules",
]
