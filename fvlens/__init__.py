"""fvlens: find, train and combine function vectors in transformer language models.

The chain, in the order of the modules: word pairs, prompts, activations, head attribution, function vector, evaluation,
fine-tuned vector, composite vector, figures. Everything a notebook needs is in this namespace; the README has a dozen
lines that use it.
"""

from typing import TYPE_CHECKING, Any

from fvlens.activations import ActivationCache, activation_cache, mean_head_activations
from fvlens.attribution import indirect_effects
from fvlens.composition import evaluate_analogies, fit_composite
from fvlens.evaluation import (
    controls,
    evaluate,
    filter_correct,
    generate_answers,
    head_count_sweep,
    layer_sweep,
)
from fvlens.find import find_vector
from fvlens.interventions import ablate, inject
from fvlens.models import fingerprint, load_model
from fvlens.prompts import build_prompts
from fvlens.relations import Analogy, Relation, list_relations, load_relation
from fvlens.training import TrainableVector, VectorSet, finetune, finetune_many
from fvlens.types import Head
from fvlens.universal import universal_heads
from fvlens.vectors import (
    DistributedVector,
    FunctionVector,
    distributed_vector,
    function_vector,
    random_vector_like,
)

if TYPE_CHECKING:
    from fvlens.explorer import explore

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "Analogy",
    "DistributedVector",
    "FunctionVector",
    "Head",
    "Relation",
    "TrainableVector",
    "VectorSet",
    "ablate",
    "activation_cache",
    "build_prompts",
    "controls",
    "distributed_vector",
    "evaluate",
    "evaluate_analogies",
    "explore",
    "filter_correct",
    "find_vector",
    "finetune",
    "finetune_many",
    "fingerprint",
    "fit_composite",
    "function_vector",
    "generate_answers",
    "head_count_sweep",
    "indirect_effects",
    "inject",
    "layer_sweep",
    "list_relations",
    "load_model",
    "load_relation",
    "mean_head_activations",
    "random_vector_like",
    "universal_heads",
]


def __getattr__(name: str) -> Any:
    """The explorer, which stands above what the front is made of, and is not imported before it is wanted."""
    if name == "explore":
        from fvlens.explorer import explore

        return explore
    raise AttributeError(f"module 'fvlens' has no attribute {name!r}")
