"""The result: effects of every head on many relations, the strongest heads over all, their file and their figure."""

import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.files import read_json, write_json
from fvlens.find import RANKINGS
from fvlens.interruption import marked, titled
from fvlens.models import Fingerprint, fingerprint, told_apart
from fvlens.prompts import Template, get_template, template_from, template_header, template_or
from fvlens.showing import Shown
from fvlens.types import Head, as_number, as_texts, as_whole

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

FORMAT = "fvlens-heads-1"
WHAT = "file of heads"
MOST_COLUMNS = 48
"""Heads that :meth:`UniversalHeads.plot` shows at most, unless told otherwise."""


@dataclass(frozen=True, slots=True, repr=False)
class UniversalHeads(Shown):
    """Average indirect effects of every head on many relations, and the heads that are strongest over all of them.

    Attributes:
        n: number of heads in the set.
        relations: names of the relations, in the order of the rows.
        data_hashes: hash of each relation's pairs.
        aie: average indirect effect, a difference of probabilities; positive where the head's task mean helps.
        prompt_stderr: standard error of :attr:`aie` over the corrupted prompts of one relation.
        icl_top1: top-1 on the validation queries with ``n_shots`` clean demonstrations.
        icl_interval: 95% bootstrap interval of :attr:`icl_top1`, low and high.
        majority: accuracy of the commonest answer of the train pairs on the same queries.
        labels, n_shots, n_prompts, n_corrupted, template: the prompts.
        path: how the effects were computed.
        complete: False if the computation was interrupted; ``relations`` then holds those that were finished.
        fingerprint: the model.
    """

    n: int
    relations: tuple[str, ...]
    data_hashes: tuple[str, ...]
    aie: Float[Tensor, "relation layer head"]
    prompt_stderr: Float[Tensor, "relation layer head"]
    icl_top1: Float[Tensor, " relation"]
    icl_interval: Float[Tensor, "relation 2"]
    majority: Float[Tensor, " relation"]
    labels: str
    n_shots: int
    n_prompts: int
    n_corrupted: int
    template: Template | str
    path: str
    complete: bool
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))
        shape = (len(self.relations), self.fingerprint.n_layers, self.fingerprint.n_heads)
        shapes = dict(
            aie=shape, prompt_stderr=shape, icl_top1=shape[:1], icl_interval=(shape[0], 2), majority=shape[:1]
        )
        for name, expected in shapes.items():
            value = getattr(self, name)
            if value.shape != expected:
                raise ValueError(f"UniversalHeads: {name}: expected shape {expected}, got {tuple(value.shape)}.")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"UniversalHeads: {name} holds NaN or infinite values.")
            if name != "aie" and not bool((value >= 0).all()):
                raise ValueError(f"UniversalHeads: {name}: expected numbers of at least 0, got {float(value.min()):g}.")
            if name not in ("aie", "prompt_stderr") and not bool((value <= 1).all()):
                raise ValueError(f"UniversalHeads: {name}: expected shares of at most 1, got {float(value.max()):g}.")
        if len(self.data_hashes) != len(self.relations):
            raise ValueError(
                f"UniversalHeads: expected one data hash a relation, got {len(self.data_hashes)} for "
                f"{len(self.relations)} relations."
            )
        for name in ("relations", "data_hashes"):
            as_texts(getattr(self, name), f"UniversalHeads: {name}")
        if len(set(self.relations)) < len(self.relations):
            raise ValueError(f"UniversalHeads: expected each relation once, got {', '.join(self.relations)}.")
        if self.labels not in RANKINGS:
            raise ValueError(f"UniversalHeads: labels={self.labels!r}; expected one of {', '.join(RANKINGS)}.")
        for name, least in (("n", -sys.maxsize), ("n_shots", 1), ("n_prompts", 1), ("n_corrupted", 2)):
            as_whole(getattr(self, name), f"UniversalHeads: {name}", least)
        check_number(self.n, self.fingerprint.n_layers * self.fingerprint.n_heads)
        if not bool(self.kept.any()):
            shown = ", ".join(
                f"{name} ({top1:.2f} against {majority:.2f})"
                for name, top1, majority in list(zip(self.relations, self.icl_top1, self.majority, strict=True))[:5]
            )
            raise ValueError(
                f"universal_heads: with {self.n_shots} demonstrations the model beats the majority label on none of "
                f"the {len(self.relations)} relations, among them {shown}; use a model that can do them, or more shots."
            )

    @property
    def kept(self) -> Bool[Tensor, " relation"]:
        """True for the relations that count: :attr:`icl_top1` above :attr:`majority`."""
        return self.icl_top1 > self.majority

    @property
    def mean(self) -> Float[Tensor, "layer head"]:
        """AIE averaged over the relations that count."""
        return self.aie[self.kept].mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "layer head"]:
        """Standard error of :attr:`mean` over the relations that count (NaN for a single relation)."""
        chosen = self.aie[self.kept]
        if len(chosen) < 2:
            return torch.full_like(chosen[0], torch.nan)
        return chosen.std(dim=0) / len(chosen) ** 0.5

    @property
    def heads(self) -> list[Head]:
        """The n heads with the largest :attr:`mean`, best first."""
        return self._top(self.n)

    @property
    def caution(self) -> str:
        """What must be said of the heads: how many of them do not help on average; empty if all do."""
        hurting = [head for head in self.heads if not float(self.mean[head]) > 0]
        if not hurting:
            return ""
        shown = ", ".join(map(str, hurting[:5])) + (", ..." if len(hurting) > 5 else "")
        return (
            f"{len(hurting)} of the {self.n} heads have a mean AIE of 0 or less ({shown}), as only "
            f"{int((self.mean > 0).sum())} heads have a positive one; take fewer heads."
        )

    @property
    def remark(self) -> str:
        """What must be said of heads that are of a part of the relations; empty if they are of all."""
        if self.complete:
            return ""
        return (
            f"the search for these heads was interrupted after {len(self.relations)} relations, so they are not those "
            "of all that were asked for; find them again with `fvlens universal`"
        )

    def _top(self, n: int) -> list[Head]:
        order = self.mean.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [Head(*divmod(i, self.fingerprint.n_heads)) for i in order]

    def _line(self) -> str:
        heads = ", ".join(map(str, self.heads[:5])) + (", ..." if self.n > 5 else "")
        return (
            f"{self.n} heads: {heads}; {int(self.kept.sum())} of {len(self.relations)} relations, {self.labels} labels"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [("head", "mean AIE"), *((str(head), f"{float(self.mean[head]):+.4f}") for head in self.heads)]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a relation and head: ``relation, layer, head, aie, stderr, kept, icl_top1, majority``."""
        import pandas as pd

        relation, layer, head = (
            axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in self.aie.shape), indexing="ij")
        )
        table = pd.DataFrame(
            {
                "relation": [self.relations[i] for i in relation.tolist()],
                "layer": layer.numpy(),
                "head": head.numpy(),
                "aie": self.aie.flatten().numpy(),
                "stderr": self.prompt_stderr.flatten().numpy(),
                "kept": self.kept[relation].numpy(),
                "icl_top1": self.icl_top1[relation].numpy(),
                "majority": self.majority[relation].numpy(),
            }
        )
        return marked(table, self.complete)

    def plot(self, *, n_columns: int | None = None) -> "Figure":
        """Heatmap of the AIE, relations by heads.

        Heads stand in the order of :attr:`mean`, best first. Relations are clustered (average linkage of their rows
        of shown values, leaves in the order that puts like next to like), so that relations that use the same heads
        stand together.

        Args:
            n_columns: heads shown; by default three times as many as are in the set, at most :data:`MOST_COLUMNS`.

        Raises:
            ValueError: ``n_columns`` is not between 1 and the number of heads.
        """
        from fvlens import plots

        total = self.fingerprint.n_layers * self.fingerprint.n_heads
        n_columns = min(3 * self.n, max(self.n, MOST_COLUMNS), total) if n_columns is None else n_columns
        check_number(n_columns, total, "plot: n_columns")
        heads = self._top(n_columns)
        places = [head.layer * self.fingerprint.n_heads + head.head for head in heads]
        values, errors = (whole.flatten(1)[:, places] for whole in (self.aie, self.prompt_stderr))
        order = leaf_order(values)
        kept = self.kept.tolist()
        return plots.relation_map(
            values[order],
            [self.relations[i] for i in order],
            list(map(str, heads)),
            stderr=errors[order],
            excluded=[not kept[i] for i in order],
            notes=[
                f"{self.n_shots}-shot top-1 {self.icl_top1[i]:.2f}, majority label {self.majority[i]:.2f}"
                for i in order
            ],
            n_chosen=min(self.n, n_columns),
            title=titled(
                f"Average indirect effect by relation ({self.labels} labels, {self.fingerprint.name})", self.complete
            ),
            colorbar_title="AIE",
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to one JSON file. Replaces an existing file at once.

        Raises:
            ValueError: the file's folder does not exist.
        """
        content: dict[str, Any] = {"format": FORMAT, "heads": [list(head) for head in self.heads]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            content[field.name] = value.tolist() if isinstance(value, Tensor) else value
        content["fingerprint"] = dataclasses.asdict(self.fingerprint)
        content |= template_header(self.template)
        return write_json(Path(path), content)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None) -> "UniversalHeads":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, the heads must have been found on this model.

        Warns:
            UserWarning: the heads are of a computation that was interrupted.

        Raises:
            ValueError: no such file; not JSON; not written by fvlens; a field that is missing, of the wrong kind or
                shape, or not finite; heads that do not follow from the effects; or heads of another model than
                ``model``.
        """
        path = Path(path)
        loaded = cls.from_json(read_json(path, WHAT), path.name)
        if model is not None:
            loaded.check(model, path.name)
        return loaded

    @classmethod
    def from_json(cls, content: Any, name: str) -> "UniversalHeads":
        """What a file's JSON says, ``name`` being that of the file; as :meth:`load`."""
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"{name}: not written by fvlens (format {found!r}, expected {FORMAT!r}).")
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in content:
                raise ValueError(f"{name}: the field {field.name!r} is missing.")
            value = content[field.name]
            try:
                if field.name in ("relations", "data_hashes"):
                    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                        raise TypeError("expected a list of texts")
                    value = tuple(value)
                elif field.name == "fingerprint":
                    value = Fingerprint.from_fields(value)
                elif field.name == "template":
                    if not isinstance(value, str):
                        raise TypeError(f"expected str, got {type(value).__name__}")
                    value = template_or(template_from(content))
                elif field.type in (int, str, bool):
                    if type(value) is not field.type:
                        raise TypeError(f"expected {field.type.__name__}, got {type(value).__name__}")
                else:
                    value = _numbers(value)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(f"{name}: damaged field {field.name!r} ({error}).") from error
            fields[field.name] = value
        try:
            loaded = cls(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if json.dumps(content.get("heads")) != json.dumps(loaded.heads):  # as text, in which 1 and true are two things
            raise ValueError(
                f"{name}: the heads do not follow from the effects beside them; to use heads of your own, write a file "
                "with nothing but the list of [layer, head] pairs."
            )
        if not loaded.complete:
            warnings.warn(f"{name}: {loaded.remark}.", stacklevel=3)
        return loaded

    def check(self, model: Any, name: str) -> None:
        """Refuse another model than the one that the heads were found on.

        Raises:
            ValueError: its fingerprint differs; ``name`` is that of the file, for the message.
        """
        differences = told_apart(self.fingerprint, fingerprint(model), f"{name}", again="`fvlens universal`")
        if differences:
            raise ValueError(
                f"{name}: the heads were found on model {self.fingerprint.name!r}, not on this one (file / model: "
                f"{'; '.join(differences)}); find them again with `fvlens universal`, or write a file with nothing but "
                "the list of [layer, head] pairs."
            )


def leaf_order(rows: Float[Tensor, "row column"]) -> list[int]:
    """Order of the rows that puts like next to like: leaves of their average-linkage tree, optimally ordered.

    Args:
        rows: one row of values for each leaf.

    Returns:
        A permutation of the row numbers. Equal rows are neighbours.

    References:
        Bar-Joseph et al. 2001, "Fast optimal leaf ordering for hierarchical clustering".
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(rows) < 2:
        return list(range(len(rows)))
    tree = linkage(rows.double().numpy(), method="average", metric="euclidean", optimal_ordering=True)
    return leaves_list(tree).tolist()


def check_number(n: int, total: int, name: str = "universal_heads: n") -> None:
    """Refuse a number of heads that the model does not have.

    Raises:
        ValueError: ``n`` is not between 1 and ``total``.
    """
    if not 1 <= n <= total:
        raise ValueError(f"{name}: expected 1 to {total} (all heads), got {n}.")


def _numbers(value: Any) -> Float[Tensor, "*axes"]:
    """Nested lists of numbers as a tensor.

    Raises:
        TypeError, ValueError, OverflowError: something else than numbers is among them, or they are of no one shape.
    """

    def check(inner: Any) -> None:
        if isinstance(inner, list):
            for one in inner:
                check(one)
        else:
            as_number(inner, "numbers")

    check(value)
    return torch.tensor(value, dtype=torch.float32)
