"""Does a vector do the task? Scores, sweeps over layers and head counts, and the controls that a score needs.

Every function here takes the same steps:

1. *Prompts*: one for each pair, in one of three settings. ``zero_shot`` shows the bare query, ``icl`` clean
   demonstrations before it, ``shuffled`` demonstrations with corrupted labels.
2. *Forward*: the prompt runs once, with the vector added at its last token. The tokens of a longer answer follow in a
   second forward over the kept keys and values, outside the injection: the steered position stays the prompt's last.
3. *Scores*: rank and probability of the answer's first token, teacher-forced log-probability of the whole answer.
4. *Interval*: percentile bootstrap of top-1 accuracy over prompts.

Randomness: prompts are drawn first, the interval after them. A sweep or a table of controls draws its prompts once, and
each of its intervals starts from the same state of the generator. So a row equals, to the bit, what :func:`evaluate`
alone gives with a generator of the same seed, and the rows of a table can be compared prompt by prompt.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.activations import HeadMeans
from fvlens.interventions import inject
from fvlens.metrics import (
    Difference,
    Interval,
    best_token,
    bootstrap_interval,
    exact_match,
    log_probability,
    paired_difference,
    rank,
    token_f1,
    top_k_accuracy,
)
from fvlens.models import Fingerprint, model_device
from fvlens.prompts import LABELS, Labels, Prompts, Template, build_prompts, template_or
from fvlens.relations import Pair, Relation
from fvlens.suffix import Reader, halving, open_reader, plan_batch
from fvlens.types import Head, HeadLike, Steering, as_heads
from fvlens.vectors import FunctionVector, function_vector, random_vector_like

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Setting = Literal["zero_shot", "icl", "shuffled"]
SETTINGS: tuple[Setting, ...] = ("zero_shot", "icl", "shuffled")
Pairs = Relation | Sequence[Pair | tuple[str, str]]
Kind = Literal["no_vector", "vector", "random_vector", "random_heads", "other_relation", "icl", "shuffled"]
KINDS: tuple[Kind, ...] = ("no_vector", "vector", "random_vector", "random_heads", "other_relation", "icl", "shuffled")
COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)
"""Head counts that :func:`head_count_sweep` visits by default, as far as the ranking goes."""

_T = TypeVar("_T")


# --- one evaluation ---


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """Scores of one setting, one entry a query, in the order of the pairs.

    Attributes:
        setting: ``"zero_shot"``, ``"icl"`` or ``"shuffled"``.
        relation: name of the relation, if known.
        queries: the pairs asked.
        predictions: the most likely next token of each prompt, as text without its leading space.
        ranks: number of tokens with a larger logit than the answer's first token; 0 means that it is on top.
        probabilities: probability of the answer's first token.
        log_probabilities: teacher-forced log-probability of the whole answer, in nats, summed over its tokens.
        interval: 95% bootstrap interval of :attr:`top1`.
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
    predictions: tuple[str, ...]
    ranks: Int[Tensor, " prompt"]
    probabilities: Float[Tensor, " prompt"]
    log_probabilities: Float[Tensor, " prompt"]
    interval: Interval
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
    def correct(self) -> Bool[Tensor, " prompt"]:
        """True where the answer's first token is the most likely one."""
        return self.ranks == 0

    @property
    def top1(self) -> float:
        """Share of queries whose answer's first token is the most likely one."""
        return top_k_accuracy(self.ranks, 1)

    @property
    def top5(self) -> float:
        """Share of queries whose answer's first token is among the five most likely."""
        return top_k_accuracy(self.ranks, 5)

    @property
    def mean_rank(self) -> float:
        """Mean rank of the answer's first token, 0 at best."""
        return self.ranks.double().mean().item()

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, ``mean of 1 / (rank + 1)``."""
        return (1 / (self.ranks.double() + 1)).mean().item()

    @property
    def probability(self) -> float:
        """Mean probability of the answer's first token."""
        return self.probabilities.double().mean().item()

    @property
    def answer_log_probability(self) -> float:
        """Mean log-probability of the whole answer, in nats."""
        return self.log_probabilities.double().mean().item()

    def __repr__(self) -> str:
        name, low, high = self.relation or "custom pairs", self.interval.low, self.interval.high
        vector = "no vector" if self.vector_kind is None else f"{self.vector_kind} vector x {self.scale:g}"
        return (
            f"Evaluation({name}, {self.setting}, {vector}, n={self.n}, top1={self.top1:.3f} [{low:.3f}, {high:.3f}], "
            f"probability={self.probability:.3f})"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a query: its words, ``prediction, correct, rank, probability, log_probability``, and the setting."""
        import pandas as pd

        return pd.DataFrame(
            {
                "relation": self.relation,
                "setting": self.setting,
                "vector": self.vector_kind or "none",
                "query": [pair.input for pair in self.queries],
                "answer": [pair.output for pair in self.queries],
                "prediction": list(self.predictions),
                "correct": self.correct.numpy(),
                "rank": self.ranks.numpy(),
                "probability": self.probabilities.numpy(),
                "log_probability": self.log_probabilities.numpy(),
            }
        )

    def plot(self, *, k: int = 10) -> "go.Figure":
        """Share of answers among the ``k`` most likely tokens, for 1 to ``k`` tokens."""
        from fvlens import plots

        counts = list(range(1, max(2, k) + 1))
        return plots.line_sweep(
            counts,
            [top_k_accuracy(self.ranks, count) for count in counts],
            x_title="Tokens counted",
            y_title="Share of answers among them",
            title=f"Rank of the answer, {self.relation or 'custom pairs'} ({self.setting}, {self.n} queries)",
            marked=1,
            marked_label="top-1",
            y_range=_SHARE_AXIS,
        )


_SHARE_AXIS = (0.0, 1.08)


def evaluate(
    model: Any,
    pairs: Pairs,
    *,
    vector: Steering | None = None,
    setting: Setting = "zero_shot",
    demonstrations: Pairs | None = None,
    n_shots: int = 10,
    template: str | Template | None = None,
    labels: Labels | None = None,
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    generator: torch.Generator,
) -> Evaluation:
    """How well the model answers word-pair queries, with or without an injected vector.

    ``top1 = mean over pairs (x, y) of [no token is more likely than the first token of y]`` after the prompt that asks
    for x [paper]. The whole answer is scored too: ``sum over its tokens of log P(y_i | prompt, y_<i)``, with the vector
    added at the prompt's last token only.

    Args:
        model: the model.
        pairs: the pairs asked, one query each.
        vector: what is injected, such as a ``FunctionVector``. A tensor in it may have a leading batch axis, one row a
            pair.
        setting: ``"zero_shot"``: the bare query. ``"icl"``: after clean demonstrations. ``"shuffled"``: after
            demonstrations with corrupted labels.
        demonstrations: pairs that ``icl`` and ``shuffled`` draw from, never the query's own input; not used by
            ``zero_shot``.
        n_shots: demonstrations in each prompt; not used by ``zero_shot``.
        template: name of a built-in template, or a ``Template``; by default that of ``vector``, else ``"qa"``.
        labels: how ``shuffled`` corrupts labels: ``"permuted"`` (the default), ``"deranged"`` or ``"random"``.
        pool: answers that random labels are drawn from; by default those of other library relations.
        relation: name recorded in the result; by default that of ``pairs`` or ``demonstrations`` if one is a relation.
        scale: factor on the vector.
        batch_size: prompts run together; by default chosen from what memory is free. It changes nothing but speed,
            memory and rounding, and is halved, with a warning, where memory runs out.
        generator: draws the demonstrations first, then the bootstrap.

    Returns:
        :class:`Evaluation`: rank, probability (0..1) and log-probability (nats, at most 0) of each query, and their
        means; tensors on the CPU.

    Raises:
        ValueError: unknown ``setting`` or ``labels``; ``icl`` or ``shuffled`` without ``demonstrations`` or with
            ``n_shots`` below 1; ``labels`` in another setting than ``shuffled``; ``batch_size`` below 1; a batch axis
            in the vector that is not one row a pair; whatever :func:`~fvlens.build_prompts` and :func:`~fvlens.inject`
            refuse, such as a vector of another model.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> bare = fvlens.evaluate(model, split.test, generator=g)
        >>> shown = fvlens.evaluate(model, split.test, setting="icl", demonstrations=split.train, generator=g)
        >>> shown.top1 > bare.top1
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (zero-shot and shuffled-label evaluation).
    """
    template = _asked(vector, template)
    prompts = _build(
        "evaluate", model, pairs, setting, demonstrations, n_shots, template, labels, pool, relation, generator
    )
    return _evaluate(model, prompts, setting, vector, scale, batch_size, generator)


def _asked(source: Any, template: str | Template | None) -> Template:
    """The template that was asked for, else that of a vector or of means, else ``qa``."""
    return template_or(template, getattr(source, "template", None))


def _build(
    function: str,
    model: Any,
    pairs: Pairs,
    setting: str,
    demonstrations: Pairs | None,
    n_shots: int,
    template: str | Template,
    labels: str | None,
    pool: Sequence[str] | None,
    relation: str | None,
    generator: torch.Generator,
) -> Prompts:
    """One prompt a pair, in a setting."""
    if setting not in SETTINGS:
        raise ValueError(f"{function}: setting={setting!r}; expected one of {', '.join(SETTINGS)}.")
    corruptions = [name for name in LABELS if name != "true"]
    if labels is not None and setting != "shuffled":
        raise ValueError(
            f"{function}: labels={labels!r} with setting={setting!r}; labels belong to setting='shuffled' only."
        )
    if labels is not None and labels not in corruptions:
        raise ValueError(f"{function}: labels={labels!r}; expected one of {', '.join(corruptions)}.")
    if setting == "zero_shot":
        demonstrations, n_shots = pairs, 0
    elif demonstrations is None:
        raise ValueError(
            f"{function}: setting={setting!r} needs demonstrations, got None; give the pairs to draw them from, such "
            "as demonstrations=split.train."
        )
    elif n_shots < 1:
        raise ValueError(
            f"{function}: setting={setting!r} needs n_shots of at least 1, got {n_shots}; without demonstrations the "
            "setting is 'zero_shot'."
        )
    chosen: Any = "true" if setting != "shuffled" else labels or "permuted"
    if relation is None:
        relation = next((given.name for given in (pairs, demonstrations) if isinstance(given, Relation)), None)
    return build_prompts(
        model,
        demonstrations,
        queries=pairs,
        n_shots=n_shots,
        labels=chosen,
        template=template,
        pool=pool,
        relation=relation,
        generator=generator,
    )


def _evaluate(
    model: Any,
    prompts: Prompts,
    setting: str,
    vector: Steering | None,
    scale: float | int,
    batch_size: int | None,
    generator: torch.Generator,
) -> Evaluation:
    """Score prompts that are already built."""
    scores = _score(model, prompts, vector, scale, batch_size)
    texts = model.tokenizer.batch_decode([[token] for token in scores.best.tolist()])
    return Evaluation(
        predictions=tuple(text.removeprefix(" ") for text in texts),
        ranks=scores.ranks,
        probabilities=scores.first.exp(),
        log_probabilities=scores.first + scores.rest,
        interval=bootstrap_interval(scores.ranks == 0, generator=generator),
        **_provenance(model, prompts, setting, vector, scale),
    )


def _provenance(
    model: Any, prompts: Prompts, setting: str, vector: Steering | None, scale: float | int
) -> dict[str, Any]:
    """What was asked, and of whom; the same fields for every kind of score."""
    layer = getattr(vector, "layer", None)
    return {
        "setting": setting,
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


@dataclass(frozen=True, slots=True)
class _Scores:
    """Rank of each answer, log-probability of its ``first`` token and the ``rest`` in nats, the ``best`` next token."""

    ranks: Int[Tensor, " prompt"]
    first: Float[Tensor, " prompt"]
    rest: Float[Tensor, " prompt"]
    best: Int[Tensor, " prompt"]


def _score(
    model: Any, prompts: Prompts, vector: Steering | None, scale: float | int, batch_size: int | None
) -> _Scores:
    """Run the prompts, then the given tokens of longer answers over the kept keys and values."""
    lengths = prompts.answer_mask.sum(dim=1)

    def run(rows: slice, _: int) -> _Scores:
        n_answer = int(lengths[rows].max())
        batch = _Batch.of(model, prompts, rows, keep=n_answer > 1)
        with _steered(model, vector, scale, rows, len(prompts)):
            logits = batch.first()
        answers = prompts.answer_tokens[rows].to(logits.device)
        first = log_probability(logits, answers[:, 0])
        rest = torch.zeros_like(first)
        if n_answer > 1:
            given, wanted = answers[:, : n_answer - 1], answers[:, 1:n_answer]
            counted = wanted >= 0
            # padding behind a short answer: masked, and read by nobody
            longer = batch.reader.read(given.clamp(min=0), (given >= 0).to(batch.mask.dtype), n_read=n_answer - 1)
            rest = (log_probability(longer, wanted.clamp(min=0)) * counted).sum(dim=1)
        return _Scores(rank(logits, answers[:, 0]).cpu(), first.cpu(), rest.cpu(), best_token(logits).cpu())

    with torch.no_grad():
        parts = list(halving(run, _batches(model, prompts, lengths - 1, batch_size), what="evaluate"))
    names = [field.name for field in dataclasses.fields(_Scores)]
    return _Scores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _batches(model: Any, prompts: Prompts, extra: Int[Tensor, " prompt"], batch_size: int | None) -> list[slice]:
    """Slices of the prompts. One whose longest prompt and longest answer do not fit the context together is halved."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}.")
    most = int(extra.max())
    if batch_size is None:
        n_pos = int(prompts.attention_mask.sum(dim=1).max()) + most
        batch_size = plan_batch(model, n_pos=n_pos, n_read=max(1, most), keep=most > 0)
    lengths = prompts.attention_mask.sum(dim=1)
    waiting = [slice(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)][::-1]
    found: list[slice] = []
    while waiting:
        rows = waiting.pop()
        n = rows.stop - rows.start
        if n > 1 and int(lengths[rows].max() + extra[rows].max()) > model.cfg.n_ctx:
            middle = rows.start + n // 2
            waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
        else:
            found.append(rows)
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts that run together, without needless padding; if kept, later tokens can follow."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    reader: Reader

    @classmethod
    def of(cls, model: Any, prompts: Prompts, rows: slice, *, keep: bool) -> "_Batch":
        """The prompts in ``rows``; ``keep`` their keys and values."""
        device = model_device(model)
        mask = prompts.attention_mask[rows]
        width = int(mask.sum(dim=1).max())
        tokens, mask = prompts.tokens[rows, -width:].to(device), mask[:, -width:].to(device)
        return cls(tokens, mask, open_reader(model, len(tokens), keep=keep))

    def first(self) -> Float[Tensor, "batch d_vocab"]:
        """Logits behind the prompts."""
        return self.reader.read(self.tokens, self.mask, n_read=1)[:, 0]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Those rows of a steering with a batch axis that belong to the prompts of one batch."""

    whole: Steering
    rows: slice
    n_prompts: int

    def additions(self) -> Mapping[str, Float[Tensor, "*axes"]]:
        return {name: self._own(name, value) for name, value in self.whole.additions().items()}

    def _own(self, name: str, value: Float[Tensor, "*axes"]) -> Float[Tensor, "*rows"]:
        if value.ndim <= (2 if name.endswith("hook_z") else 1):
            return value
        if value.shape[0] != self.n_prompts:
            raise ValueError(
                f"the tensor for {name} has a batch axis of {value.shape[0]}, but there are {self.n_prompts} pairs; "
                "give one row a pair, or one tensor without a batch axis for all."
            )
        return value[self.rows]

    def check(self, model: Any) -> None:
        self.whole.check(model)


def _steered(
    model: Any,
    vector: Steering | None,
    scale: float | int,
    rows: slice,
    n_prompts: int,
    every_new_token: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """Inject the vector's part for these prompts; ask only once whether it belongs to the model."""
    if vector is None:
        return contextlib.nullcontext()
    part = _Rows(vector, rows, n_prompts) if isinstance(vector, Steering) else vector
    return inject(model, part, scale=scale, every_new_token=every_new_token, check=rows.start == 0)


def _copy(generator: torch.Generator) -> torch.Generator:
    """A generator that will draw what this one draws."""
    return torch.Generator(device=generator.device).set_state(generator.get_state())


# --- generated answers ---


@dataclass(frozen=True, slots=True, repr=False)
class GeneratedAnswers:
    """Generated answers against the expected ones, one entry a query, in the order of the pairs.

    Attributes:
        setting: ``"zero_shot"``, ``"icl"`` or ``"shuffled"``.
        relation: name of the relation, if known.
        queries: the pairs asked.
        texts: the generated answers, cut where the template ends an answer, without white space around them.
        raw_texts: everything that was generated.
        matches: True where the answer equals the expected one (case, punctuation and articles aside).
        f1_scores: F1 of the words that both share.
        interval: 95% bootstrap interval of :attr:`exact_match`.
        f1_interval: 95% bootstrap interval of :attr:`f1`.
        max_new_tokens: tokens generated at most.
        template: how the prompts were written.
        n_shots: demonstrations in each prompt.
        labels: how the demonstrations' labels were chosen.
        scale: factor on the vector.
        vector_kind, vector_relation, vector_layer: what was injected; None without a vector, or where it does not say.
        model_name: the model's name in its configuration.
        fingerprint: the model's fingerprint as the vector records it; None without one.
        data_hash: hash of the prompts and their answers.
    """

    setting: str
    relation: str
    queries: tuple[Pair, ...]
    texts: tuple[str, ...]
    raw_texts: tuple[str, ...]
    matches: Bool[Tensor, " prompt"]
    f1_scores: Float[Tensor, " prompt"]
    interval: Interval
    f1_interval: Interval
    max_new_tokens: int
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
    def exact_match(self) -> float:
        """Share of queries whose generated answer equals the expected one."""
        return self.matches.double().mean().item()

    @property
    def f1(self) -> float:
        """Mean F1 of the words of generated and expected answer."""
        return self.f1_scores.double().mean().item()

    def __repr__(self) -> str:
        name, low, high = self.relation or "custom pairs", self.interval.low, self.interval.high
        return (
            f"GeneratedAnswers({name}, {self.setting}, n={self.n}, exact_match={self.exact_match:.3f} "
            f"[{low:.3f}, {high:.3f}], f1={self.f1:.3f})"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a query: ``query, answer, text, exact_match, f1`` and the setting."""
        import pandas as pd

        return pd.DataFrame(
            {
                "relation": self.relation,
                "setting": self.setting,
                "vector": self.vector_kind or "none",
                "query": [pair.input for pair in self.queries],
                "answer": [pair.output for pair in self.queries],
                "text": list(self.texts),
                "exact_match": self.matches.numpy(),
                "f1": self.f1_scores.numpy(),
            }
        )

    def plot(self) -> "go.Figure":
        """Exact match and F1 as bars with their intervals."""
        from fvlens import plots

        intervals = (self.interval, self.f1_interval)
        return plots.bars(
            ["exact match", "F1 of words"],
            [self.exact_match, self.f1],
            [interval.low for interval in intervals],
            [interval.high for interval in intervals],
            x_title="Mean over queries",
            title=f"Generated answers, {self.relation or 'custom pairs'} ({self.setting}, {self.n} queries)",
        )


def generate_answers(
    model: Any,
    pairs: Pairs,
    *,
    vector: Steering | None = None,
    setting: Setting = "zero_shot",
    demonstrations: Pairs | None = None,
    n_shots: int = 10,
    template: str | Template | None = None,
    labels: Labels | None = None,
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    max_new_tokens: int = 4,
    every_new_token: bool = False,
    generator: torch.Generator,
) -> GeneratedAnswers:
    """Whole answers: exact match and F1 of what the model writes, greedily, after the prompt.

    The answer is cut at the text that follows ``{output}`` in the template's demonstrations (for a line break: at the
    first one) and at the end-of-text token. The vector is added at the prompt's last token. The embedded model was
    trained on answers of one token and not on what follows them: give it ``max_new_tokens=1``.

    Args:
        model: the model.
        pairs, vector, setting, demonstrations, n_shots, template, labels, pool, relation, scale, batch_size: as for
            :func:`evaluate`.
        max_new_tokens: tokens generated at most; a longer expected answer cannot be matched.
        every_new_token: add the vector at each generated token too.
        generator: draws the demonstrations first, then the bootstrap. Generation itself is greedy.

    Returns:
        :class:`GeneratedAnswers`, scores in 0..1.

    Raises:
        ValueError: as for :func:`evaluate`; ``max_new_tokens`` below 1, or too many for the model's context.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> answers = fvlens.generate_answers(
        ...     model, split.test, setting="icl", demonstrations=split.train, max_new_tokens=1, generator=g
        ... )
        >>> answers.exact_match > 0.5
        True

    References:
        arXiv:1606.05250, section 6.1 (exact match and F1).
    """
    if max_new_tokens < 1:
        raise ValueError(f"generate_answers: expected max_new_tokens of at least 1, got {max_new_tokens}.")
    template = _asked(vector, template)
    prompts = _build(
        "generate_answers", model, pairs, setting, demonstrations, n_shots, template, labels, pool, relation, generator
    )
    longest = int(prompts.attention_mask.sum(dim=1).max())
    if longest + max_new_tokens - 1 > model.cfg.n_ctx:
        raise ValueError(
            f"generate_answers: a prompt is {longest} tokens long, and with max_new_tokens={max_new_tokens} it does "
            f"not fit the model's context of {model.cfg.n_ctx}; generate fewer tokens or use fewer shots."
        )
    ids = _generate(model, prompts, vector, scale, batch_size, max_new_tokens, every_new_token)
    end, eos = _end_of_answer(prompts.template), model.tokenizer.eos_token_id
    kept = [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]
    raw = tuple(model.tokenizer.batch_decode(kept))
    texts = tuple((text.split(end)[0] if end else text).strip() for text in raw)
    expected = [pair.output for pair in prompts.queries]
    matches = torch.tensor([exact_match(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    scores = torch.tensor([token_f1(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    return GeneratedAnswers(
        texts=texts,
        raw_texts=raw,
        matches=matches,
        f1_scores=scores,
        interval=bootstrap_interval(matches, generator=_copy(generator)),
        f1_interval=bootstrap_interval(scores, generator=generator),
        max_new_tokens=max_new_tokens,
        **_provenance(model, prompts, setting, vector, scale),
    )


def _generate(
    model: Any,
    prompts: Prompts,
    vector: Steering | None,
    scale: float | int,
    batch_size: int | None,
    max_new_tokens: int,
    every_new_token: bool,
) -> Int[Tensor, "prompt new"]:
    """Greedy continuation of each prompt. The model's own ``generate`` guesses where padding is; we know it."""
    extra = torch.full((len(prompts),), max_new_tokens - 1)

    def run(rows: slice, _: int) -> Tensor:
        batch = _Batch.of(model, prompts, rows, keep=max_new_tokens > 1)
        with contextlib.ExitStack() as block:
            block.enter_context(_steered(model, vector, scale, rows, len(prompts)))
            new = [best_token(batch.first())[:, None]]
            if not every_new_token:
                block.close()
            for _ in range(max_new_tokens - 1):
                logits = batch.reader.read(new[-1], torch.ones_like(new[-1]), n_read=1)[:, -1]
                new.append(best_token(logits)[:, None])
        return torch.cat(new, dim=1).cpu()

    with torch.no_grad():
        return torch.cat(list(halving(run, _batches(model, prompts, extra, batch_size), what="generate_answers")))


def _end_of_answer(template: Template) -> str | None:
    """Text that ends an answer in this template's demonstrations; None if nothing visible follows it."""
    after = template.demonstration.split("{output}")[1].split("{input}")[0]
    if after.startswith("\n"):
        return "\n"
    return after if after.strip() else None


# --- sweeps ---


def _sweep(
    model: Any,
    prompts: Prompts,
    setting: str,
    vectors: Iterable[Steering],
    total: int,
    scale: float | int,
    batch_size: int | None,
    generator: torch.Generator,
    what: str,
    progress: bool,
) -> tuple[tuple[Evaluation, ...], bool]:
    """Evaluate vectors on the same prompts, until interrupted; whether all are finished."""
    bar = tqdm(vectors, total=total, desc=what, disable=not progress, leave=False)
    found = (_evaluate(model, prompts, setting, vector, scale, batch_size, _copy(generator)) for vector in bar)
    return _until_interrupted(found, total, what)


def _until_interrupted(items: Iterator[_T], total: int, what: str) -> tuple[tuple[_T, ...], bool]:
    done: list[_T] = []
    try:
        for item in items:
            done.append(item)
    except KeyboardInterrupt:
        if not done:
            raise
        warnings.warn(f"{what} was interrupted: {len(done)} of {total} are finished.", stacklevel=4)
        return tuple(done), False
    return tuple(done), True


def _best(evaluations: Sequence[Evaluation]) -> int:
    """Index of the largest top-1; ties go to the larger mean probability of the answer, then to the first."""
    return max(range(len(evaluations)), key=lambda i: (evaluations[i].top1, evaluations[i].probability, -i))


def _sweep_dataframe(name: str, coordinates: Sequence[int], evaluations: Sequence[Evaluation]) -> "pd.DataFrame":
    import pandas as pd

    rows = [
        {
            name: coordinate,
            "top1": one.top1,
            "low": one.interval.low,
            "high": one.interval.high,
            "top5": one.top5,
            "mean_rank": one.mean_rank,
            "probability": one.probability,
            "log_probability": one.answer_log_probability,
            "n": one.n,
        }
        for coordinate, one in zip(coordinates, evaluations, strict=True)
    ]
    return pd.DataFrame(rows)


def _sweep_plot(
    coordinates: Sequence[int],
    evaluations: Sequence[Evaluation],
    baseline: Evaluation,
    best: int,
    x_title: str,
    what: str,
) -> "go.Figure":
    from fvlens import plots

    return plots.line_sweep(
        list(coordinates),
        [one.top1 for one in evaluations],
        [one.interval.low for one in evaluations],
        [one.interval.high for one in evaluations],
        x_title=x_title,
        y_title="Top-1",
        title=f"{what}, {baseline.relation or 'custom pairs'} ({baseline.setting}, {baseline.n} queries)",
        references={"no vector": baseline.top1},
        marked=best,
        y_range=_SHARE_AXIS,
    )


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Scores with a vector added after each of several layers, all on the same prompts.

    Attributes:
        layers: the layers, in increasing order.
        evaluations: the scores at each layer.
        baseline: the scores without a vector on the same prompts.
        complete: False if the sweep was interrupted; ``layers`` are then those that were finished.
    """

    layers: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    complete: bool

    @property
    def top1(self) -> Float[Tensor, " layer"]:
        """Top-1 accuracy at each layer."""
        return torch.tensor([one.top1 for one in self.evaluations])

    @property
    def probability(self) -> Float[Tensor, " layer"]:
        """Mean probability of the answer's first token at each layer."""
        return torch.tensor([one.probability for one in self.evaluations])

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """95% bootstrap interval of :attr:`top1` at each layer."""
        return tuple(one.interval for one in self.evaluations)

    @property
    def best_layer(self) -> int:
        """Layer of the largest top-1; ties go to the larger mean probability of the answer, then to the lower layer."""
        return self.layers[_best(self.evaluations)]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer: ``layer, top1, low, high, top5, mean_rank, probability, log_probability, n``."""
        return _sweep_dataframe("layer", self.layers, self.evaluations)

    def plot(self) -> "go.Figure":
        """Top-1 over layers with its interval, the best layer marked, and top-1 without a vector for comparison."""
        return _sweep_plot(
            self.layers, self.evaluations, self.baseline, self.best_layer, "Injected after layer", "Layer sweep"
        )


def layer_sweep(
    model: Any,
    pairs: Pairs,
    vector: FunctionVector | Mapping[int, Steering],
    *,
    layers: Sequence[int] | None = None,
    setting: Setting = "zero_shot",
    demonstrations: Pairs | None = None,
    n_shots: int = 10,
    template: str | Template | None = None,
    labels: Labels | None = None,
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> LayerSweep:
    """Where a vector works: scores with the vector added after each layer.

    Choose the layer on validation pairs and report it on test pairs. Every layer sees the same prompts, and its numbers
    are those of :func:`evaluate` with ``vector.at_layer(layer)`` and a generator of the same seed.

    Args:
        model: the model.
        pairs: the pairs asked.
        vector: one vector, moved from layer to layer, or one steering for each layer.
        layers: layers to visit; by default all of the model, or all that ``vector`` maps.
        setting, demonstrations, n_shots, template, labels, pool, relation, scale, batch_size: as for :func:`evaluate`.
        generator: draws the demonstrations first, then the bootstrap.
        progress: show a progress bar. Interrupting returns the layers that are finished, with a warning.

    Returns:
        :class:`LayerSweep`.

    Raises:
        ValueError: as for :func:`evaluate`; no layers; a layer that the model does not have or that ``vector`` does not
            map; a vector that cannot be moved (a distributed one), given without a map.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> sweep = fvlens.layer_sweep(model, split.valid, vec, generator=g, progress=False)
        >>> sweep.best_layer in sweep.layers
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (accuracy by layer of injection).
    """
    if isinstance(vector, Mapping):
        by_layer = {int(layer): steering for layer, steering in vector.items()}
    elif hasattr(vector, "at_layer"):
        by_layer = {layer: vector.at_layer(layer) for layer in range(model.cfg.n_layers)}
    else:
        raise ValueError(
            "layer_sweep: expected a vector with at_layer(), or a map from layer to vector, got "
            f"{type(vector).__name__}."
        )
    chosen = sorted(by_layer if layers is None else set(layers))
    if not chosen:
        raise ValueError("layer_sweep: expected at least one layer, got none.")
    outside = [layer for layer in chosen if layer not in by_layer or not 0 <= layer < model.cfg.n_layers]
    if outside:
        raise ValueError(
            f"layer_sweep: no vector for layer {outside[0]}; the model has layers 0..{model.cfg.n_layers - 1}, and "
            f"there are vectors for {sorted(by_layer)}."
        )
    template = _asked(by_layer[chosen[0]], template)
    prompts = _build(
        "layer_sweep", model, pairs, setting, demonstrations, n_shots, template, labels, pool, relation, generator
    )
    vectors = [by_layer[layer] for layer in chosen]
    found, complete = _sweep(
        model, prompts, setting, vectors, len(chosen), scale, batch_size, generator, "layer sweep", progress
    )
    baseline = _evaluate(model, prompts, setting, None, scale, batch_size, generator)
    return LayerSweep(layers=tuple(chosen[: len(found)]), evaluations=found, baseline=baseline, complete=complete)


@dataclass(frozen=True, slots=True)
class HeadCountSweep:
    """Scores with the vector of the first n heads of a ranking, for several n, all on the same prompts.

    Attributes:
        counts: the numbers of heads, in increasing order.
        evaluations: the scores with that many heads.
        baseline: the scores without a vector on the same prompts.
        ranking: the heads, best first.
        layer: the vectors were added after this layer.
        complete: False if the sweep was interrupted; ``counts`` are then those that were finished.
    """

    counts: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    ranking: tuple[Head, ...]
    layer: int
    complete: bool

    @property
    def top1(self) -> Float[Tensor, " count"]:
        """Top-1 accuracy at each number of heads."""
        return torch.tensor([one.top1 for one in self.evaluations])

    @property
    def probability(self) -> Float[Tensor, " count"]:
        """Mean probability of the answer's first token at each number of heads."""
        return torch.tensor([one.probability for one in self.evaluations])

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """95% bootstrap interval of :attr:`top1` at each number of heads."""
        return tuple(one.interval for one in self.evaluations)

    @property
    def best_count(self) -> int:
        """Number of heads with the largest top-1; ties go to the larger mean probability, then to fewer heads."""
        return self.counts[_best(self.evaluations)]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a count: ``n_heads, top1, low, high, top5, mean_rank, probability, log_probability, n``."""
        return _sweep_dataframe("n_heads", self.counts, self.evaluations)

    def plot(self) -> "go.Figure":
        """Top-1 over the number of heads with its interval, the best marked, and top-1 without a vector."""
        return _sweep_plot(
            self.counts, self.evaluations, self.baseline, self.best_count, "Heads in the vector", "Head-count sweep"
        )


def head_count_sweep(
    model: Any,
    pairs: Pairs,
    means: HeadMeans,
    ranking: Sequence[HeadLike],
    layer: int,
    *,
    counts: Sequence[int] | None = None,
    setting: Setting = "zero_shot",
    demonstrations: Pairs | None = None,
    n_shots: int = 10,
    template: str | Template | None = None,
    labels: Labels | None = None,
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> HeadCountSweep:
    """How many heads a vector needs: scores with the vector of the first n heads of a ranking.

    ``v_n = sum over the first n heads of mean z_{l,h} @ W_O[l,h]``, added after ``layer``.

    Args:
        model: the model.
        pairs: the pairs asked.
        means: task means at the last token.
        ranking: heads, best first, such as ``effects.top(20)``.
        layer: the vectors are added after this layer.
        counts: numbers of heads; by default 1, 2, 3, 5, 8, 10, 15, 20, 30, 50 as far as the ranking goes.
        setting, demonstrations, n_shots, template, labels, pool, relation, scale, batch_size: as for :func:`evaluate`.
        generator: draws the demonstrations first, then the bootstrap.
        progress: show a progress bar. Interrupting returns the counts that are finished, with a warning.

    Returns:
        :class:`HeadCountSweep`.

    Raises:
        ValueError: as for :func:`evaluate` and :func:`~fvlens.function_vector`; an empty ranking; no counts, or a count
            below 1 or beyond the ranking.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> ranking = [(1, 0), (1, 3), (2, 1)]
        >>> fvlens.head_count_sweep(model, split.valid, means, ranking, 1, generator=g, progress=False).counts
        (1, 2, 3)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3 (the number of heads in the set A).
    """
    heads = as_heads(ranking, model.cfg.n_layers, model.cfg.n_heads)
    if not heads:
        raise ValueError("head_count_sweep: expected a ranking of at least one head, got none.")
    chosen = sorted({count for count in COUNTS if count <= len(heads)} if counts is None else set(counts))
    if not chosen or chosen[0] < 1 or chosen[-1] > len(heads):
        raise ValueError(
            f"head_count_sweep: expected counts in 1..{len(heads)} (the ranking's length), got {list(counts or ())}."
        )
    vectors = [function_vector(model, means, heads=heads[:count], layer=layer) for count in chosen]
    template = _asked(means, template)
    prompts = _build(
        "head_count_sweep", model, pairs, setting, demonstrations, n_shots, template, labels, pool, relation, generator
    )
    found, complete = _sweep(
        model, prompts, setting, vectors, len(chosen), scale, batch_size, generator, "head-count sweep", progress
    )
    baseline = _evaluate(model, prompts, setting, None, scale, batch_size, generator)
    return HeadCountSweep(
        counts=tuple(chosen[: len(found)]),
        evaluations=found,
        baseline=baseline,
        ranking=tuple(heads),
        layer=layer,
        complete=complete,
    )


# --- controls ---


@dataclass(frozen=True, slots=True)
class Control:
    """One row of :class:`Controls`: one vector, or the mean over several of one kind.

    Attributes:
        name: the row's name.
        kind: ``"no_vector"``, ``"vector"``, ``"random_vector"``, ``"random_heads"``, ``"other_relation"``, ``"icl"`` or
            ``"shuffled"``.
        evaluations: the scores of each single vector.
        scores: for each query, the share of these vectors under which it is answered correctly.
        interval: 95% bootstrap interval of :attr:`top1`, over queries.
        difference: this row's top-1 minus the vector's on the same queries, with its interval; negative where the
            vector is better.
    """

    name: str
    kind: Kind
    evaluations: tuple[Evaluation, ...]
    scores: Float[Tensor, " prompt"]
    interval: Interval
    difference: Difference

    @property
    def top1(self) -> float:
        """Mean top-1 accuracy."""
        return self.scores.double().mean().item()

    @property
    def probability(self) -> float:
        """Mean probability of the answer's first token."""
        return sum(one.probability for one in self.evaluations) / len(self.evaluations)

    @property
    def mean_rank(self) -> float:
        """Mean rank of the answer's first token."""
        return sum(one.mean_rank for one in self.evaluations) / len(self.evaluations)


@dataclass(frozen=True, slots=True)
class Controls:
    """A vector against its controls, all on the same queries.

    Attributes:
        rows: the vector and each control; every other relation's vector has its own row.
        pooled: one row a kind. It differs from ``rows`` only in ``"other_relation"``, the mean over those vectors.
        complete: False if interrupted; the rows that were finished are there.
    """

    rows: tuple[Control, ...]
    pooled: tuple[Control, ...]
    complete: bool

    def summary(self, kind: Kind) -> tuple[float, Interval]:
        """Mean top-1 of one kind, and its interval.

        Raises:
            ValueError: the table has no such row.
        """
        for row in self.pooled:
            if row.kind == kind:
                return row.top1, row.interval
        raise ValueError(
            f"summary: no row of kind {kind!r}; this table has {', '.join(row.kind for row in self.pooled)}."
        )

    def to_dataframe(self, *, single: bool = False) -> "pd.DataFrame":
        """One row a control: name, kind, number of vectors, top-1 and difference to the vector with their intervals.

        Args:
            single: one row for each single vector instead: ``control, kind, run, top1, probability, mean_rank``.
        """
        import pandas as pd

        if single:
            return pd.DataFrame(
                [
                    {
                        "control": row.name,
                        "kind": row.kind,
                        "run": run,
                        "top1": one.top1,
                        "probability": one.probability,
                        "mean_rank": one.mean_rank,
                    }
                    for row in self.rows
                    for run, one in enumerate(row.evaluations)
                ]
            )
        return pd.DataFrame(
            [
                {
                    "control": row.name,
                    "kind": row.kind,
                    "n_vectors": len(row.evaluations),
                    "top1": row.top1,
                    "low": row.interval.low,
                    "high": row.interval.high,
                    "difference": row.difference.mean,
                    "difference_low": row.difference.interval.low,
                    "difference_high": row.difference.interval.high,
                    "probability": row.probability,
                    "mean_rank": row.mean_rank,
                }
                for row in self.rows
            ]
        )

    def plot(self) -> "go.Figure":
        """Top-1 of the vector and each control as bars with intervals."""
        from fvlens import plots

        vector = next(row for row in self.rows if row.kind == "vector")
        one = vector.evaluations[0]
        return plots.bars(
            [row.name for row in self.rows],
            [row.top1 for row in self.rows],
            [row.interval.low for row in self.rows],
            [row.interval.high for row in self.rows],
            x_title="Top-1",
            title=f"The vector and its controls, {one.relation or 'custom pairs'} ({one.setting}, {one.n} queries)",
            highlighted=[vector.name],
        )


def controls(
    model: Any,
    pairs: Pairs,
    vector: FunctionVector,
    *,
    demonstrations: Pairs | None,
    others: Sequence[FunctionVector] = (),
    means: HeadMeans | None = None,
    n_random: int = 10,
    n_shots: int = 10,
    setting: Setting = "zero_shot",
    template: str | Template | None = None,
    labels: Labels | None = None,
    pool: Sequence[str] | None = None,
    relation: str | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Controls:
    """A vector against what else might explain its score.

    Rows: no vector; the vector; ``n_random`` random vectors of the same norm (will any push do?); ``n_random`` vectors
    of random heads, as many as the vector has and none of its own (will any heads do?); each other relation's vector
    (will any task do?); clean and corrupted demonstrations instead of a vector. All vectors are added after the layer
    of ``vector``. Each row has its paired difference to the vector. A row of one vector, or of none, equals
    :func:`evaluate` with a generator of the same seed.

    Args:
        model: the model.
        pairs: the pairs asked, usually the test pairs.
        vector: the vector.
        demonstrations: pairs that the rows with demonstrations draw from.
        others: vectors of other relations, best ones with other outputs; they are moved to the vector's layer.
        means: task means for the vectors of random heads; None leaves that row out.
        n_random: number of random vectors, and of random sets of heads.
        n_shots: demonstrations in the rows that have some.
        setting: where the vectors are injected.
        template, relation, scale, batch_size: as for :func:`evaluate`.
        labels, pool: how the ``shuffled`` row (and setting) corrupts labels; as for :func:`evaluate`.
        generator: draws the prompts first, then the bootstrap and the random vectors and heads.
        progress: show a progress bar. Interrupting returns the rows that are finished, with a warning.

    Returns:
        :class:`Controls`.

    Raises:
        ValueError: as for :func:`evaluate`; no ``demonstrations``; ``n_random`` below 1; ``means`` given, but the
            vector names no heads or the model has too few others.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> table = fvlens.controls(
        ...     model, split.test, vec, demonstrations=split.train, means=means, n_random=2, generator=g, progress=False
        ... )
        >>> [row.kind for row in table.rows]
        ['no_vector', 'vector', 'random_vector', 'random_heads', 'icl', 'shuffled']

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (vectors of random heads as a baseline). The other rows are ours.
    """
    if n_random < 1:
        raise ValueError(f"controls: expected n_random of at least 1, got {n_random}; 10 is usual.")
    start = _copy(generator)

    template = _asked(vector, template)

    def prompts_of(asked: str, source: torch.Generator) -> Prompts:
        own_labels = labels if asked == "shuffled" else None
        return _build(
            "controls", model, pairs, asked, demonstrations, n_shots, template, own_labels, pool, relation, source
        )

    shown: list[tuple[Kind, Prompts, torch.Generator]] = []
    for name in ("icl", "shuffled"):
        own = _copy(start)
        shown.append((name, prompts_of(name, own), own))
    prompts = prompts_of(setting, generator)
    bootstrap = _copy(generator)
    steered: list[tuple[str, Kind, list[Steering]]] = [
        ("random vectors, same norm", "random_vector", [random_vector_like(vector, generator) for _ in range(n_random)])
    ]
    if means is not None:
        sets = _random_heads(model, vector, n_random, generator)
        built: list[Steering] = [function_vector(model, means, heads=heads, layer=vector.layer) for heads in sets]
        steered.append((f"{len(vector.heads)} random heads", "random_heads", built))
    for other in others:
        name = f"vector of {other.relation}" if other.relation else "vector of another relation"
        steered.append((name, "other_relation", [other.at_layer(vector.layer)]))

    def run(steering: Steering | None) -> Evaluation:
        return _evaluate(model, prompts, setting, steering, scale, batch_size, _copy(bootstrap))

    def row(name: str, kind: Kind, evaluations: Sequence[Evaluation], reference: Evaluation) -> Control:
        scores = torch.stack([one.correct.double() for one in evaluations]).mean(dim=0)
        single = len(evaluations) == 1
        return Control(
            name=name,
            kind=kind,
            evaluations=tuple(evaluations),
            scores=scores,
            interval=evaluations[0].interval if single else bootstrap_interval(scores, generator=_copy(bootstrap)),
            difference=paired_difference(scores, reference.correct, generator=_copy(bootstrap)),
        )

    def rows() -> Iterator[Control]:
        with tqdm(total=total, desc="controls", disable=not progress, leave=False) as bar:
            reference = run(vector)
            bar.update()
            bar.update()
            yield row("no vector", "no_vector", [run(None)], reference)
            yield row("the vector", "vector", [reference], reference)
            for name, kind, steerings in steered:
                found = []
                for steering in steerings:
                    found.append(run(steering))
                    bar.update()
                yield row(name, kind, found, reference)
            for kind, own_prompts, own in shown:
                found = [_evaluate(model, own_prompts, kind, None, scale, batch_size, own)]
                bar.update()
                yield row(f"{n_shots} demonstrations, {own_prompts.labels} labels", kind, found, reference)

    total = 4 + sum(len(steerings) for _, _, steerings in steered)
    found, complete = _until_interrupted(rows(), 4 + len(steered), "controls")
    pooled: list[Control] = []
    for kind in KINDS:
        same = [one for one in found if one.kind == kind]
        if len(same) > 1:
            reference = next(one for one in found if one.kind == "vector").evaluations[0]
            every = [evaluation for one in same for evaluation in one.evaluations]
            pooled.append(row("vectors of other relations", kind, every, reference))
        else:
            pooled += same
    return Controls(rows=found, pooled=tuple(pooled), complete=complete)


def _random_heads(model: Any, vector: FunctionVector, n_sets: int, generator: torch.Generator) -> list[list[Head]]:
    """Random sets of as many heads as the vector has, without its own."""
    cfg = model.cfg
    n = len(vector.heads)
    every = (Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads))
    rest = [head for head in every if head not in vector.heads]
    if not 1 <= n <= len(rest):
        raise ValueError(
            f"controls: cannot draw random heads: the vector names {n} heads, and the model has {len(rest)} others; "
            "pass means=None to leave that row out."
        )
    return [[rest[i] for i in torch.randperm(len(rest), generator=generator)[:n].tolist()] for _ in range(n_sets)]
