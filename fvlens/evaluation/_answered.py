"""What was asked, of which model, under which vector: what results over prompts have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlens.evaluation._prompting import setting_of
from fvlens.models import Fingerprint
from fvlens.prompts import Prompts, Template
from fvlens.relations import Pair
from fvlens.results import Result, check_counts
from fvlens.types import Steering

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Answered(Result):
    """Queries that a model was asked; results over them add what it answered.

    Attributes:
        setting: ``"zero_shot"``, ``"icl"`` or ``"shuffled"``.
        relation: name of the relation, if known.
        queries: the pairs asked.
        template: how the prompts were written.
        n_shots: demonstrations in each prompt.
        labels: how the demonstrations' labels were chosen.
        scale: factor on the vector.
        vector_kind, vector_relation, vector_layer: what was injected; None without a vector, or where it does not say.
        model_name: the model's name in its configuration.
        fingerprint: the model's fingerprint as the vector records it; None without one (hashing takes time; call
            ``fvlens.fingerprint(model)`` where it is needed).
        data_hash: hash of the prompts and their answers.
    """

    setting: str
    relation: str
    queries: tuple[Pair, ...]
    template: Template
    n_shots: int
    labels: str
    scale: float
    vector_kind: str | None
    vector_relation: str | None
    vector_layer: int | None
    model_name: str
    fingerprint: Fingerprint | None
    data_hash: str

    @property
    def n(self) -> int:
        """Number of queries."""
        return len(self.queries)

    @property
    def name(self) -> str:
        """The relation, for titles."""
        return self.relation or "custom pairs"

    def _check_loaded(self) -> None:
        check_counts(self, self.n)

    def _table(self, **answers: Any) -> "pd.DataFrame":
        """One row a query: what was asked, then these columns."""
        import pandas as pd

        return pd.DataFrame(
            {
                "relation": self.relation,
                "setting": self.setting,
                "vector": self.vector_kind or "none",
                "query": [pair.input for pair in self.queries],
                "answer": [pair.output for pair in self.queries],
                **answers,
            }
        )


def asked(model: Any, prompts: Prompts, vector: Steering | None, scale: float | int) -> dict[str, Any]:
    """The fields of :class:`Answered` for these prompts under this vector."""
    layer = getattr(vector, "layer", None)
    return {
        "setting": setting_of(prompts),
        "relation": prompts.relation,
        "queries": prompts.queries,
        "template": prompts.template,
        "n_shots": prompts.n_shots,
        "labels": prompts.labels,
        "scale": float(scale),
        "vector_kind": None if vector is None else str(getattr(vector, "kind", type(vector).__name__)),
        "vector_relation": getattr(vector, "relation", None),
        "vector_layer": layer if isinstance(layer, int) else None,
        "model_name": str(model.cfg.model_name),
        "fingerprint": getattr(vector, "fingerprint", None),
        "data_hash": prompts.data_hash,
    }
