"""Causal mediation over heads: which heads carry the task.

For each prompt p~ with corrupted demonstrations and each head (l, h), the head's output is replaced by its task mean
and the change of the answer's probability is the causal indirect effect (CIE). Its mean over prompts is the average
indirect effect (AIE), by which heads are ranked. All heads and prompts are computed exactly; see :mod:`fvlens.suffix`
for why this costs little more than running the prompts once.

Gradient screens (:mod:`fvlens.screens`) estimate or replace the effect of every head by a few backward passes. They can
miss heads, so the best heads of a screen can be run again exactly (``recheck``), and a screen can be measured against
the exact map (:meth:`IndirectEffects.compare`).
"""

from fvlens.attribution._effects import METHODS, IndirectEffects, Method, Recheck, ScreenQuality
from fvlens.attribution._mediation import indirect_effects

__all__ = ["METHODS", "IndirectEffects", "Method", "Recheck", "ScreenQuality", "indirect_effects"]
