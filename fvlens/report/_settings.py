"""The settings of a run, and how its model is loaded."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fvlens.find import RANKINGS, Ranking
from fvlens.models import Backend, Bos, check_bos, load_model
from fvlens.prompts import Template, get_template

Precision = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, slots=True)
class Loading:
    """How the model was loaded: the arguments of :func:`fvlens.load_model`, as given.

    Attributes:
        model: the model: rel-small, a name that TransformerLens or the hub knows, or a folder as it was written.
        device: where the model goes, such as cpu or cuda; by default CUDA if there is one.
        dtype: precision of the model; by default float32.
        revision: revision of the model on the hub; by default its main branch.
        backend: class of the model, HookedTransformer or TransformerBridge; by default as load_model chooses.
        base: base of a model that is a PEFT adapter; by default the one beside it.
        trust: also load what files name: an adapter's base, the model of a file of vectors or results; never recorded.
    """

    model: str = "rel-small"
    device: str | None = None
    dtype: Precision | None = None
    revision: str | None = None
    backend: Backend | None = None
    base: str | None = None
    trust: bool = False

    def recorded(self) -> dict[str, Any]:
        """What ``results.json`` keeps: a file's own word that it is to be trusted would be none."""
        return {key: value for key, value in asdict(self).items() if key != "trust"}

    def load(self) -> Any:
        """The model."""
        given = {key: value for key, value in asdict(self).items() if key != "model" and value not in (None, False)}
        if "dtype" in given:
            given["dtype"] = getattr(torch, given["dtype"])
        return load_model(self.model, **given)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What of :func:`fvlens.find.find_vector` a user chooses, wherever there is a function vector to begin with.

    Attributes:
        n_shots: demonstrations in an in-context prompt.
        n_prompts: clean prompts behind the task means.
        n_corrupted: corrupted prompts behind each indirect effect.
        n_heads: heads in the function vector.
        labels: the corruption on which the saved vector's heads are ranked.
        template: how prompts are written: the name of a built-in template, or a template itself.
        bos: what stands in front of prompts: what the tokenizer puts there, exactly one BOS, or none; by default as the
            template says.
    """

    n_shots: int = 10
    n_prompts: int = 100
    n_corrupted: int = 25
    n_heads: int = 10
    labels: Ranking = "permuted"
    template: str | Template = "qa"
    bos: Bos | None = None

    def __post_init__(self) -> None:
        if self.labels not in RANKINGS:
            raise ValueError(f"labels={self.labels!r}; expected one of {', '.join(RANKINGS)}.")
        at_least_one(self, "n_shots", "n_prompts", "n_heads")
        if self.n_corrupted < 2:
            raise ValueError(
                f"n_corrupted: expected at least 2, got {self.n_corrupted}; a standard error needs two prompts."
            )
        template = get_template(self.template)
        if self.bos is not None:
            object.__setattr__(self, "template", template.with_bos(check_bos(self.bos)))


@dataclass(frozen=True, slots=True)
class RunOptions(RecipeOptions):
    """Settings of a run.

    Attributes:
        seed: seed of everything random.
        both_labels: also rank heads on the other corruption, for comparison; it moves no other number.
        layer: inject after this layer; by default the best one on the validation pairs.
        scale: factor on the vector; by default the best one on the validation pairs, chosen with the layer.
        n_random: random vectors of the same norm, and random sets of heads, among the controls.
        n_others: vectors of other relations (with disjoint outputs) among the controls.
        n_train: pairs that the fine-tuned vector is trained on, the first of the train part.
        epochs: passes over these pairs; 0 leaves the training out.
    """

    seed: int = 0
    both_labels: bool = False
    layer: int | None = None
    scale: float | None = None
    n_random: int = 10
    n_others: int = 3
    n_train: int = 20
    epochs: int = 20

    def __post_init__(self) -> None:
        RecipeOptions.__post_init__(self)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}.")
        at_least_one(self, "n_random", "n_train")
        if self.n_others < 0:
            raise ValueError(f"n_others: expected 0 or more, got {self.n_others}.")
        if self.epochs < 0:
            raise ValueError(f"epochs: expected 0 or more, got {self.epochs}; 0 leaves the training out.")
        if self.scale is not None:
            if not math.isfinite(self.scale):
                raise ValueError(f"scale: expected a finite number, got {self.scale}.")
            object.__setattr__(self, "scale", float(self.scale))


def at_least_one(options: Any, *names: str) -> None:
    """Refuse whole numbers below 1.

    Raises:
        ValueError: one of these fields is below 1.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}.")
