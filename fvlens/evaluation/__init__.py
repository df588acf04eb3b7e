"""Does a vector do the task? Scores, sweeps over layers and head counts, and the controls that a score needs.

Every function here takes the same steps:

1. *Prompts*: one for each pair, in one of three settings. ``zero_shot`` shows the bare query, ``icl`` clean
   demonstrations before it, ``shuffled`` demonstrations with corrupted labels. Or prompts that were built before.
2. *Scores*: :func:`fvlens.scoring.score` of all vectors together: rank and probability of the answer's first token,
   teacher-forced log-probability of the whole answer. The vector is added at the prompt's last token.
3. *Interval*: percentile bootstrap of top-1 accuracy over prompts.

Randomness: prompts are drawn first, the interval after them. A sweep or a table of controls draws its prompts once, and
each of its intervals starts from the same state of the generator. So the rows of a table can be compared prompt by
prompt, and a row equals what :func:`evaluate` alone gives with a generator of the same seed.
"""

from fvlens.evaluation._answered import Answered
from fvlens.evaluation._controls import CONTROL_KINDS, Control, ControlKind, Controls, controls
from fvlens.evaluation._evaluate import Evaluation, evaluate, evaluations
from fvlens.evaluation._filter import filter_correct
from fvlens.evaluation._generate import GeneratedAnswers, generate_answers
from fvlens.evaluation._layer_scale import SCALES, LayerScaleSweep, layer_scale_sweep
from fvlens.evaluation._prompting import (
    SETTINGS,
    Asked,
    Options,
    Pairs,
    Prompting,
    Running,
    Setting,
    asked_prompts,
    copied,
    setting_of,
)
from fvlens.evaluation._sweeps import COUNTS, HeadCountSweep, LayerSweep, best_of, head_count_sweep, layer_sweep

__all__ = [
    "CONTROL_KINDS",
    "COUNTS",
    "SCALES",
    "SETTINGS",
    "Answered",
    "Asked",
    "Control",
    "ControlKind",
    "Controls",
    "Evaluation",
    "GeneratedAnswers",
    "HeadCountSweep",
    "LayerScaleSweep",
    "LayerSweep",
    "Options",
    "Pairs",
    "Prompting",
    "Running",
    "Setting",
    "asked_prompts",
    "best_of",
    "controls",
    "copied",
    "evaluate",
    "evaluations",
    "filter_correct",
    "generate_answers",
    "head_count_sweep",
    "layer_scale_sweep",
    "layer_sweep",
    "setting_of",
]
