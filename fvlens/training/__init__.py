"""Training on a few pairs with the model frozen: one loop, whatever is changed and whatever is made small.

What a notebook needs first is on the front too: ``fvlens.finetune``, ``finetune_many``, ``TrainableVector`` and
``VectorSet``. The seams (:class:`Change`, :class:`Objective`), baselines and the comparison are here.
"""

from fvlens.training._adaptations import Adaptation, AdaptationChange
from fvlens.training._adapted import Adapted, Baseline
from fvlens.training._change import Change, Readout, Wants, fill, filled
from fvlens.training._collateral import Collateral, collateral_change, evaluate_adapted, unrelated_prompts
from fvlens.training._compare import Comparison, compare
from fvlens.training._fine_tuned import FineTuned, FineTunedSet
from fvlens.training._finetune import finetune, finetune_many
from fvlens.training._loop import Outcome, Trained, Training, train
from fvlens.training._lora import LoRA, lora
from fvlens.training._methods import METHODS, Budget, Planned
from fvlens.training._objective import OBJECTIVES, CrossEntropy, Objective, Perplexity
from fvlens.training._options import Execution, ExecutionOptions, TrainingOptions
from fvlens.training._prepared import PreparedPrompts, SteerablePrompts
from fvlens.training._set import VectorSet
from fvlens.training._settings import History, Settings, Task
from fvlens.training._soft_prompt import SoftPrompt, soft_prompt
from fvlens.training._state import TrainingState
from fvlens.training._trainable import TrainableDistributedVector, TrainableVector, frozen
from fvlens.training._untrained import act_add, few_shot
from fvlens.training._vector_changes import DistributedChange, SteeringChange, VectorChange

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "Adaptation",
    "AdaptationChange",
    "Adapted",
    "Baseline",
    "Budget",
    "Change",
    "Collateral",
    "Comparison",
    "CrossEntropy",
    "DistributedChange",
    "Execution",
    "ExecutionOptions",
    "FineTuned",
    "FineTunedSet",
    "History",
    "LoRA",
    "Objective",
    "Outcome",
    "Perplexity",
    "Planned",
    "PreparedPrompts",
    "Readout",
    "Settings",
    "SoftPrompt",
    "SteerablePrompts",
    "SteeringChange",
    "Task",
    "TrainableDistributedVector",
    "TrainableVector",
    "Trained",
    "Training",
    "TrainingOptions",
    "TrainingState",
    "VectorChange",
    "VectorSet",
    "Wants",
    "act_add",
    "collateral_change",
    "compare",
    "evaluate_adapted",
    "few_shot",
    "fill",
    "filled",
    "finetune",
    "finetune_many",
    "frozen",
    "lora",
    "soft_prompt",
    "train",
    "unrelated_prompts",
]
