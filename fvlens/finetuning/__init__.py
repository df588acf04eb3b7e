"""Fine-tuned function vectors: train the vector, one relation or all of them at once.

What a notebook needs first is on the front too: ``fvlens.finetune``, ``finetune_many``, ``TrainableVector`` and
``VectorSet``. Baselines, the comparison and the studies are here.
"""

from fvlens.finetuning._baselines import Adapted, Baseline, act_add, few_shot, lora, soft_prompt
from fvlens.finetuning._changes import LoRA, SoftPrompt
from fvlens.finetuning._compare import (
    Collateral,
    Comparison,
    collateral_change,
    compare,
    evaluate_adapted,
    unrelated_prompts,
)
from fvlens.finetuning._finetune import FineTuned, FineTunedSet, finetune, finetune_many
from fvlens.finetuning._set import VectorSet
from fvlens.finetuning._studies import (
    STUDIES,
    Point,
    Study,
    init_study,
    l2_study,
    layer_study,
    scale_study,
    training_size_study,
)
from fvlens.finetuning._trainable import TrainableDistributedVector, TrainableVector, frozen
from fvlens.finetuning._training import History, Settings, TrainingState, VectorAdapter

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
