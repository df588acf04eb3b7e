"""Which heads carry the task, and what parts of a model do.

Causal mediation (:func:`indirect_effects`): for each prompt p~ with corrupted demonstrations and each head (l, h), the
head's output is replaced by its task mean and the change of the answer's probability is the causal indirect effect
(CIE). Its mean over prompts is the average indirect effect (AIE), by which heads are ranked. All heads and prompts are
computed exactly; see :mod:`fvlens.suffix` for why this costs little more than running the prompts once.

Gradient screens (:mod:`fvlens.screens`) estimate or replace the effect of every head by a few backward passes. They can
miss heads, so the best heads of a screen can be run again exactly (``recheck``), and a screen can be measured against
the exact map (:meth:`IndirectEffects.compare`).

What parts do is read off activations, with nothing changed: what each writes to the answer's logit
(:func:`direct_effects`), where heads look (:func:`attention_patterns`), what each layer would say (:func:`logit_lens`).
"""

from fvlens.attribution._contrast import FOILS
from fvlens.attribution._direct import direct_effects
from fvlens.attribution._direct_effects import DirectEffects
from fvlens.attribution._effects import METHODS, IndirectEffects, Method, Recheck, ScreenQuality
from fvlens.attribution._groups import GROUPS
from fvlens.attribution._lens import LogitLens, logit_lens
from fvlens.attribution._mediation import indirect_effects
from fvlens.attribution._patterns import AttentionPatterns, attention_patterns

__all__ = [
    "FOILS",
    "GROUPS",
    "METHODS",
    "AttentionPatterns",
    "DirectEffects",
    "IndirectEffects",
    "LogitLens",
    "Method",
    "Recheck",
    "ScreenQuality",
    "attention_patterns",
    "direct_effects",
    "indirect_effects",
    "logit_lens",
]
