"""Heads that carry many tasks: average indirect effects over relations, and files of heads.

1. *Per relation*: split the pairs, ask the validation queries with clean demonstrations, and compute every head's
   average indirect effect (AIE), as for a single task (:func:`fvlens.find.relation_effects`).
2. *Which relations count*: those that the model does from demonstrations, that is, better than by always giving the
   commonest answer (:func:`majority_baseline`).
3. *The set*: the n heads with the largest AIE averaged over the relations that count.

A set is saved as JSON (:meth:`UniversalHeads.save`); :func:`read_heads` reads it, or a plain list of heads, for
``fvlens run --heads``.
"""

import dataclasses
import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.evaluation import evaluate
from fvlens.files import MOST_JSON, parse_json, read_bytes, read_json, write_json
from fvlens.find import RANKINGS, Ranking, relation_effects
from fvlens.interruption import keeping, marked, titled
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import (
    Template,
    get_template,
    render_prompts,
    template_from,
    template_header,
    template_or,
)
from fvlens.relations import Relation, load_relation
from fvlens.types import Head, as_heads, as_number, as_texts, as_whole

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = "fvlens-heads-1"
WHAT = "file of heads"
MOST_COLUMNS = 48
"""Heads that :meth:`UniversalHeads.plot` shows at most, unless told otherwise."""


def majority_baseline(pool: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Accuracy of always giving the commonest answer of a pool.

    ``max over y among the commonest of pool of [share of wanted equal to y]``. Where several answers are equally
    common, the one that scores best counts, so the baseline does not depend on their order and is never too low
    [our choice].

    Args:
        pool: the answers that demonstrations show.
        wanted: the answers of the queries.

    Returns:
        A share, 0..1.

    Raises:
        ValueError: one of the two is empty.

    Example:
        >>> majority_baseline(["dog", "dog", "cat"], ["dog", "cat", "cow", "dog"])
        0.5
    """
    if not pool or not wanted:
        raise ValueError(
            f"majority_baseline: expected at least one answer in each, got {len(pool)} in pool, {len(wanted)} wanted."
        )
    counts = Counter(pool)
    most = max(counts.values())
    asked = Counter(wanted)
    return max(asked[answer] for answer, count in counts.items() if count == most) / len(wanted)


@dataclass(frozen=True, slots=True, repr=False)
class UniversalHeads:
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
        _check_number(self.n, self.fingerprint.n_layers * self.fingerprint.n_heads)
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

    def __repr__(self) -> str:
        heads = ", ".join(map(str, self.heads[:5])) + (", ..." if self.n > 5 else "")
        return (
            f"UniversalHeads({self.n} heads: {heads}; {int(self.kept.sum())} of {len(self.relations)} relations, "
            f"{self.labels} labels)"
        )

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

    def plot(self, *, n_columns: int | None = None) -> "go.Figure":
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
        _check_number(n_columns, total, "plot: n_columns")
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
        loaded = cls._from_json(read_json(path, WHAT), path.name)
        if model is not None:
            loaded._check(model, path.name)
        return loaded

    @classmethod
    def _from_json(cls, content: Any, name: str) -> "UniversalHeads":
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

    def _check(self, model: Any, name: str) -> None:
        differences = self.fingerprint.differences(fingerprint(model))
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


def universal_heads(
    model: Any,
    relations: Sequence[str | Relation],
    n: int,
    *,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    labels: Ranking = "permuted",
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> UniversalHeads:
    """The heads with the largest indirect effect on average over relations that the model can do.

    ``mean(l, h) = mean over relations t that count of AIE_t(l, h)``; a relation counts if the model's top-1 with
    ``n_shots`` clean demonstrations is above the majority-label baseline [paper]. Both are measured on the validation
    queries by the answer's first token; the baseline is the commonest first token among the train pairs' answers, see
    :func:`majority_baseline` [our choice]. Above means a larger number; the interval of the top-1 is kept beside it.

    Args:
        model: the model.
        relations: names of library relations, or ``Relation``s.
        n: number of heads in the set.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind each relation's task means.
        n_corrupted: corrupted prompts behind each relation's effects.
        labels: how they are corrupted, ``"permuted"`` or ``"random"``.
        template: how prompts are written.
        generator: draws all splits first, then the prompts of one relation after the other.
        progress: show progress bars. Interrupting returns the relations that are finished, with a warning.

    Returns:
        :class:`UniversalHeads`; ``.heads`` is the set, best first. Relations that do not count have their effects too.

    Raises:
        ValueError: no relations, an unknown one or one given twice; a relation too small to split or for ``n_shots``;
            ``n`` outside the model; ``n_corrupted`` below 2; unknown ``labels`` or ``template``; or no relation on
            which the model beats the baseline.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> found = fvlens.universal_heads(
        ...     model, ["antonym", "plural"], 3, n_prompts=8, n_corrupted=4, generator=g, progress=False
        ... )
        >>> len(found.heads), found.kept.tolist()
        (3, [True, True])

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3 (universal set of causal heads).
    """
    _check_number(n, model.cfg.n_layers * model.cfg.n_heads)
    if labels not in RANKINGS:
        raise ValueError(f"universal_heads: labels={labels!r}; expected one of {', '.join(RANKINGS)}.")
    for name, value, least in (("n_shots", n_shots, 1), ("n_prompts", n_prompts, 1), ("n_corrupted", n_corrupted, 2)):
        if value < least:
            raise ValueError(f"universal_heads: {name}: expected at least {least}, got {value}.")
    get_template(template)
    chosen = _relations(relations)
    splits = [relation.split(generator) for relation in chosen]
    for relation, split in zip(chosen, splits, strict=True):
        if len(split.train) < n_shots:
            raise ValueError(
                f"universal_heads: relation {relation.name!r} is too small: {n_shots} demonstrations wanted, but only "
                f"{len(split.train)} of its {len(relation)} pairs are for training; leave it out or use fewer shots."
            )
    settings: dict[str, Any] = {"n_shots": n_shots, "template": template}
    rows: list[dict[str, Any]] = []
    with keeping(lambda: len(rows), len(chosen), "universal_heads", "relations are finished", stacklevel=2) as loop:
        for relation, split in zip(
            tqdm(chosen, desc="relations", disable=not progress, leave=False), splits, strict=True
        ):
            common: dict[str, Any] = {**settings, "relation": relation.name, "generator": generator}
            icl = evaluate(model, split.valid, setting="icl", demonstrations=split.train, **common)
            _, found = relation_effects(
                model,
                split,
                n_prompts=n_prompts,
                n_corrupted=n_corrupted,
                labels=labels,
                progress=progress,
                **common,
            )
            pool, wanted = (
                render_prompts(model, part, [()] * len(part), template=template, n_shots=0).first_answer_token.tolist()
                for part in (split.train, split.valid)
            )
            row = dict(
                aie=found.aie,
                prompt_stderr=found.stderr,
                icl_top1=torch.tensor(icl.top1),
                icl_interval=torch.tensor(icl.interval[:2]),
                majority=torch.tensor(majority_baseline(pool, wanted)),
                path=found.path,
            )
            rows.append(row)
    tensors = ("aie", "prompt_stderr", "icl_top1", "icl_interval", "majority")
    return UniversalHeads(
        n=n,
        relations=tuple(relation.name for relation in chosen[: len(rows)]),
        data_hashes=tuple(relation.data_hash for relation in chosen[: len(rows)]),
        **{name: torch.stack([row[name] for row in rows]) for name in tensors},
        labels=labels,
        n_prompts=n_prompts,
        n_corrupted=n_corrupted,
        **settings,
        path=", ".join(sorted({row["path"] for row in rows})),
        complete=loop.complete,
        fingerprint=fingerprint(model),
    )


def _check_number(n: int, total: int, name: str = "universal_heads: n") -> None:
    if not 1 <= n <= total:
        raise ValueError(f"{name}: expected 1 to {total} (all heads), got {n}.")


def _relations(relations: Sequence[str | Relation]) -> list[Relation]:
    if isinstance(relations, str | Relation):
        raise ValueError("universal_heads: expected a sequence of relations, got a single one; put it into a list.")
    found = [load_relation(item) if isinstance(item, str) else item for item in relations]
    if not found:
        raise ValueError("universal_heads: expected at least one relation, got none; see fvlens.list_relations().")
    name, count = Counter(relation.name for relation in found).most_common(1)[0]
    if count > 1:
        raise ValueError(f"universal_heads: relation {name!r} is given {count} times; give each once.")
    return found


# --- heads from a file ---


@dataclass(frozen=True, slots=True)
class GivenHeads:
    """Heads that were read from a file.

    Attributes:
        heads: the heads, in the file's order.
        path: the file, as it was named.
        hash: first 16 hex digits of the SHA-256 of the file.
        note: whether the file says which model its heads are of.
    """

    heads: tuple[Head, ...]
    path: str
    hash: str
    note: str


def read_heads(path: str | Path, model: Any) -> GivenHeads:
    """Heads for a model from a JSON file: one that :meth:`UniversalHeads.save` wrote, or a plain list.

    A plain list is ``[[layer, head], ...]`` or ``{"heads": [[layer, head], ...]}``, such as a published set. It names
    no model, so nothing but the range of the numbers can be checked; the note says so.

    Raises:
        ValueError: no such file; not JSON; no list of pairs in it, or an empty one; a head that the model does not have
            or that is listed twice; or a saved set of another model.
    """
    name = Path(path).name
    data = read_bytes(Path(path), WHAT, most=MOST_JSON)
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name}: not a JSON file, or a truncated one ({error}).") from error
    digest = hashlib.sha256(data).hexdigest()[:16]
    if isinstance(content, dict) and "format" in content:
        saved = UniversalHeads._from_json(content, name)
        saved._check(model, name)
        note = f"universal heads of this model, {int(saved.kept.sum())} relations, {saved.labels} labels" + (
            f"; {saved.remark}" if saved.remark else ""
        )
        return GivenHeads(tuple(saved.heads), str(path), digest, note)
    listed = content.get("heads") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not listed:
        raise ValueError(
            f'{name}: expected [[layer, head], ...], an object with such a list under "heads", or a file written by '
            f"`fvlens universal`; got {json.dumps(content)[:60]}."
        )
    try:
        heads = as_heads(listed, model.cfg.n_layers, model.cfg.n_heads)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return GivenHeads(tuple(heads), str(path), digest, "a plain list; it does not say which model the heads are of")


def made_on(path: str | Path) -> Fingerprint | None:
    """The model that a file of heads was made on; None for a plain list, which does not say.

    Raises:
        ValueError: no such file; not JSON; or a damaged fingerprint. All else is for :func:`read_heads`.
    """
    content = read_json(Path(path), WHAT)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    try:
        return Fingerprint.from_fields(content.get("fingerprint"))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: damaged field 'fingerprint' ({error}).") from error


def file_hash(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a file.

    Raises:
        ValueError: the file cannot be read.
    """
    return hashlib.sha256(read_bytes(Path(path), WHAT, most=MOST_JSON)).hexdigest()[:16]


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
