"""Fine-tuned function vectors: train the vector, one relation or all of them at once.

What a notebook needs first is on the front too: ``fvlens.finetune``, ``finetune_many``, ``TrainableVector`` and
``VectorSet``. Baselines, the comparison and the studies are here.
"""

from fvlens.training._adaptations import LoRA, SoftPrompt
from fvlens.training._baselines import Adapted, Baseline, act_add, few_shot, lora, soft_prompt
from fvlens.training._compare import (
    Collateral,
    Comparison,
    collateral_change,
    compare,
    evaluate_adapted,
    unrelated_prompts,
)
from fvlens.training._finetune import FineTuned, FineTunedSet, finetune, finetune_many
from fvlens.training._set import VectorSet
from fvlens.training._studies import (
    STUDIES,
    Point,
    Study,
    init_study,
    l2_study,
    layer_study,
    scale_study,
    training_size_study,
)
from fvlens.training._trainable import TrainableDistributedVector, TrainableVector, frozen
from fvlens.training._training import History, Settings, TrainingState, VectorAdapter

__all__ = [
    "STUDIES",
    "Adapted",
    "Baseline",
    "Collateral",
    "Comparison",
    "FineTuned",
    "FineTunedSet",
    "History",
    "LoRA",
    "Point",
    "Settings",
    "SoftPrompt",
    "Study",
    "TrainableDistributedVector",
    "TrainableVector",
    "TrainingState",
    "VectorAdapter",
    "VectorSet",
    "act_add",
    "collateral_change",
    "compare",
    "evaluate_adapted",
    "few_shot",
    "finetune",
    "finetune_many",
    "frozen",
    "init_study",
    "l2_study",
    "layer_study",
    "lora",
    "scale_study",
    "soft_prompt",
    "training_size_study",
    "unrelated_prompts",
]
