"""Other ways to make a frozen model do a relation from the same few pairs, to compare a fine-tuned vector with.

Demonstrations in the prompt, activation addition, soft prompts and low-rank updates of the attention. Each takes pairs
and gives a :class:`Baseline`. What is trained, is trained by the loop that trains vectors: the same loss, minibatches,
schedule, and choice of the best epoch on validation pairs.

The low-rank updates are our own hooks, not the peft library's: peft 0.21 finds no linear modules in a
``HookedTransformer``, takes its three-dimensional weights for experts and cannot run them, and exchanges modules of
the model where it works (a ``TransformerBridge``), so that the model is no longer the one that was loaded.
"""

import abc
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.activations import mean_residuals
from fvlens.evaluation import evaluate
from fvlens.interventions import resid_pre_hook
from fvlens.models import fingerprint
from fvlens.prompts import Prompts, Template, build_prompts
from fvlens.relations import Pair, Relation
from fvlens.suffix import plan_slices
from fvlens.training._adaptations import (
    Adaptation,
    Demonstrations,
    LoRA,
    SoftPrompt,
    Steered,
    Unchanged,
    why_not_low_rank,
)
from fvlens.training._training import (
    Adapter,
    History,
    Loss,
    Outcome,
    Schedule,
    Settings,
    Task,
    Training,
    prompts_of,
    run_training,
)
from fvlens.types import Steering
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Pairs = Relation | Sequence[Pair | tuple[str, str]]
SCALES = (0.5, 1.0, 2.0, 4.0)
"""Factors on the difference of means that :func:`act_add` tries."""
SOFT_PROMPT_LR = 0.1
"""Default learning rate of a soft prompt, as a share of the root mean square of what the first block reads."""
LORA_LR = 0.1
"""Default learning rate of low-rank updates, as a share of the standard deviation that A is drawn with."""


@runtime_checkable
class Adapted(Protocol):
    """A model made to do a relation; :class:`Baseline` and :class:`~fvlens.training.FineTuned` are such.

    Attributes:
        method: name of the method.
        change: what it does to a forward pass.
        n_trainable: numbers that were trained.
        seconds: time that making it took.
        history: curves over epochs, None if nothing was trained.
    """

    @property
    def method(self) -> str: ...

    @property
    def change(self) -> Adaptation: ...

    @property
    def n_trainable(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def history(self) -> History | None: ...


@dataclass(frozen=True, slots=True)
class Baseline:
    """A model made to do a relation by another method than a fine-tuned vector.

    Attributes:
        method: name of the method.
        relation: name of the relation, if known.
        change: what it does to a forward pass.
        n_trainable: numbers that were trained.
        seconds: time that making it took.
        history: curves over epochs; None if nothing was trained.
        best_epoch: the epoch that ``change`` is of, chosen on the validation pairs; None if nothing was trained.
        settings: how it was trained; None if nothing was.
        lr: the learning rate used; None if nothing was trained.
        seed: seed of the minibatches' order, or of the demonstrations drawn.
        choices: of activation addition, (layer, scale, validation top-1, validation loss in nats) of all that were
            tried.
        complete: False if the training was interrupted.
    """

    method: str
    relation: str
    change: Adaptation
    n_trainable: int
    seconds: float
    history: History | None = None
    best_epoch: int | None = None
    settings: Settings | None = None
    lr: float | None = None
    seed: int | None = None
    choices: tuple[tuple[int, float, float, float], ...] = ()
    complete: bool = True

    @property
    def vector(self) -> Steering:
        """The vector, of a method that adds one.

        Raises:
            ValueError: it adds none.
        """
        if not isinstance(self.change, Steered):
            raise ValueError(f"vector: {self.method} adds no vector; use .change.")
        return self.change.steering

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an epoch: ``method, relation, epoch, train_loss, valid_loss, valid_top1, norm, cosine``.

        Raises:
            ValueError: nothing was trained.
        """
        frame = self._trained().to_dataframe()
        frame.insert(0, "relation", self.relation)
        frame.insert(0, "method", self.method)
        return frame

    def plot(self) -> "go.Figure":
        """Losses, validation top-1 and norm over epochs, the best epoch marked.

        Raises:
            ValueError: nothing was trained.
        """
        from fvlens import plots

        history = self._trained()
        return plots.training_curves(
            train_loss=history.train_loss,
            valid_loss=history.valid_loss,
            valid_top1=history.valid_top1,
            norm=history.norm,
            cosine=history.cosine,
            marked=self.best_epoch or 0,
            title=f"Training of {self.method}, {self.relation or 'custom pairs'}",
        )

    def _trained(self) -> History:
        if self.history is None:
            raise ValueError(f"{self.method}: nothing was trained, so there are no epochs to show.")
        return self.history


def as_adaptation(given: Adapted | Steering | Adaptation | None) -> Adaptation:
    """What a result of any method does to a forward pass; None is the model as it is.

    Raises:
        ValueError: ``given`` is nothing of the kind.
    """
    if given is None:
        return Unchanged()
    if isinstance(given, Adaptation):
        return given
    if isinstance(given, Steering):
        return Steered(given)
    if isinstance(given, Adapted):
        return given.change
    raise ValueError(
        f"expected what a baseline or finetune gives, a vector, or None, got {type(given).__name__}; see Adapted."
    )


# --- nothing is trained ---


def few_shot(pairs: Pairs, *, n_shots: int = 10, relation: str | None = None, generator: torch.Generator) -> Baseline:
    """Prompting: demonstrations in front of each query, drawn from the pairs and never the query's own input.

    Args:
        pairs: the pairs to draw from.
        n_shots: demonstrations in each prompt.
        relation: name of the relation; by default that of ``pairs``.
        generator: draws the seed of the demonstrations.

    Returns:
        :class:`Baseline`.

    Raises:
        ValueError: ``n_shots`` below 1, or more than there are pairs.

    Example:
        >>> import torch, fvlens
        >>> pairs = fvlens.load_relation("antonym").pairs[:20]
        >>> few_shot(pairs, generator=torch.Generator().manual_seed(0)).method
        '10-shot prompting'

    References:
        Brown et al. 2020, arXiv:2005.14165, section 2.
    """
    began = time.monotonic()
    own, name = _given("few_shot", pairs, relation)
    if not 1 <= n_shots <= len(own):
        raise ValueError(f"few_shot: expected n_shots in 1..{len(own)}, the number of pairs, got {n_shots}.")
    seed = _seed(generator)
    return Baseline(
        method=f"{n_shots}-shot prompting",
        relation=name,
        change=Demonstrations(own, n_shots, seed),
        n_trainable=0,
        seconds=time.monotonic() - began,
        seed=seed,
    )


def act_add(
    model: Any,
    pairs: Pairs,
    *,
    layer: int | Sequence[int] | None = None,
    scales: Sequence[float | int] | None = None,
    valid: Pairs | None = None,
    n_shots: int = 10,
    template: Template | str = "qa",
    relation: str | None = None,
    batch_size: int | None = None,
    generator: torch.Generator,
) -> Baseline:
    """Activation addition: the difference of mean residual streams, with demonstrations and without.

    ``v = scale * (mean over pairs of resid_l[-1] after clean demonstrations - mean of it at the bare query)``, of the
    same queries. The source adds the difference of two prompts, from the front of the text on; the mean over prompts
    and the last token are our choice, so that it acts where a function vector does. Task vectors (arXiv:2310.15916)
    overwrite the residual stream with its mean after demonstrations instead of adding to it.

    Args:
        model: the model.
        pairs: the pairs; each is asked once, after ``n_shots`` of the others.
        layer: the vector is added after this layer; by default each of the model's. Of several, the best on ``valid``.
        scales: factors; by default 0.5, 1, 2 and 4, or 1 without ``valid``. Of several, the best on ``valid``.
        valid: validation pairs; the best has the highest top-1, then the lowest loss, as in training.
        n_shots: demonstrations in each prompt.
        template: how prompts are written.
        relation: name of the relation; by default that of ``pairs``.
        batch_size: prompts run together; by default chosen from what memory is free.
        generator: draws the demonstrations.

    Returns:
        :class:`Baseline`; its ``.vector`` is a ``FunctionVector`` with the scale in it.

    Raises:
        ValueError: no pairs, or too few for ``n_shots``; a layer outside the model; a scale that is not finite; several
            layers or scales without ``valid``; ``batch_size`` below 1.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> added = act_add(model, split.train[:20], layer=1, valid=split.valid, generator=g)
        >>> added.vector.kind, len(added.choices)
        ('difference of means', 4)

    References:
        Turner et al. 2023, arXiv:2308.10248, section 3; Hendel et al. 2023, arXiv:2310.15916, section 3.
    """
    began = time.monotonic()
    own, name = _given("act_add", pairs, relation)
    asked = () if valid is None else tuple(Pair(*pair) for pair in valid)
    n_layers = model.cfg.n_layers
    layers = list(range(n_layers)) if layer is None else [layer] if isinstance(layer, int) else list(layer)
    outside = [one for one in layers if not 0 <= one < n_layers]
    if not layers or outside:
        raise ValueError(f"act_add: expected layers in 0..{n_layers - 1}, got {outside or layers}.")
    factors = [float(one) for one in ((SCALES if asked else (1.0,)) if scales is None else scales)]
    if not factors or not all(map(torch.isfinite, torch.tensor(factors))):
        raise ValueError(f"act_add: expected finite scales, got {factors}.")
    if len(layers) * len(factors) > 1 and not asked:
        raise ValueError(
            f"act_add: {len(layers)} layers and {len(factors)} scales, but no validation pairs to choose by; give "
            "valid=, or one of each."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"act_add: expected batch_size of at least 1, got {batch_size}.")
    build = functools.partial(build_prompts, model, own, template=template, relation=name, generator=generator)
    clean, bare = build(n_shots=n_shots), build(n_shots=0)
    mean = functools.partial(mean_residuals, model, layers=layers, batch_size=batch_size, what="act_add")
    means = [mean(prompts) for prompts in (clean, bare)]
    mark = fingerprint(model)
    candidates = [
        FunctionVector(
            vector=factor * difference,
            layer=one,
            heads=(),
            relation=name,
            fingerprint=mark,
            kind="difference of means",
            template=template,
            data_hash=clean.data_hash,
        )
        for one, difference in zip(layers, means[0] - means[1], strict=True)
        for factor in factors
    ]
    tried = []
    if asked:
        score = functools.partial(evaluate, model, asked, template=template, relation=name, batch_size=batch_size)
        for vector, factor in zip(candidates, factors * len(layers), strict=True):
            found = score(vector=vector, generator=torch.Generator())
            tried.append((vector.layer, factor, found.top1, -found.answer_log_probability))
    best = max(range(len(candidates)), key=lambda i: (tried[i][2], -tried[i][3], -i) if tried else 0)
    return Baseline(
        method="activation addition",
        relation=name,
        change=Steered(candidates[best]),
        n_trainable=0,
        seconds=time.monotonic() - began,
        choices=tuple(tried),
    )


# --- trained ---


class AdaptationAdapter(Adapter):
    """Trains the numbers of a change, by whole passes."""

    @abc.abstractmethod
    def change(self) -> Adaptation:
        """The change with the parameters as they are now."""

    def logits(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        rows = rows.to(self.tokens.device)
        return self.change().read(self.model, self.tokens[rows], self.mask[rows], n_read=self.n_suffix)


class SoftPromptAdapter(AdaptationAdapter):
    """Offsets of soft tokens."""

    relative_lr = SOFT_PROMPT_LR

    def __init__(self, model: Any, prompts: Prompts, tokens: Int[Tensor, " soft"]) -> None:
        super().__init__(model, prompts)
        self.soft, self.mark = tokens, fingerprint(model)
        self.offsets = nn.Parameter(torch.zeros(len(tokens), model.cfg.d_model, device=self.tokens.device))
        n_pos = self.tokens.shape[1] + len(tokens)
        self.plan = plan_slices(
            model, n_pos=n_pos, n_suffix=n_pos, n_variants=1, path="naive", max_memory=None, gradients=True
        )
        self.most_at_once = self.plan.prompts

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.offsets]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Root mean square of what the first block reads, over all tokens."""
        total, n = 0.0, 0
        with torch.no_grad():
            for portion in self.portions(rows):
                part, seen = rows[portion].to(self.tokens.device), list[Tensor]()
                self.whole_passes(part, {resid_pre_hook(0): seen.append})
                values = seen[0][self.mask[part].bool()].double()
                total, n = total + float(values.square().sum()), n + values.numel()
        return (total / n) ** 0.5

    def change(self) -> SoftPrompt:
        return SoftPrompt(self.soft, self.offsets, self.mark)


class LoRAAdapter(AdaptationAdapter):
    """Low-rank updates of query and value projections."""

    relative_lr = LORA_LR

    def __init__(
        self, model: Any, prompts: Prompts, layers: tuple[int, ...], rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(model, prompts)
        cfg, n = model.cfg, len(layers)
        n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        device = self.tokens.device
        self.layers, self.mark = layers, fingerprint(model)

        def first() -> nn.Parameter:
            drawn = torch.randn(n, cfg.d_model, rank, generator=generator) / cfg.d_model**0.5
            return nn.Parameter(drawn.to(device))

        def second(n_heads: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(n, rank, n_heads, cfg.d_head, device=device))

        self.a_q, self.b_q = first(), second(cfg.n_heads)
        self.a_v, self.b_v = first(), second(n_kv)

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.a_q, self.b_q, self.a_v, self.b_v]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Standard deviation that A is drawn with."""
        return float(self.model.cfg.d_model**-0.5)

    def change(self) -> LoRA:
        return LoRA(self.layers, self.a_q, self.b_q, self.a_v, self.b_v, self.mark)


def soft_prompt(
    model: Any,
    pairs: Pairs,
    *,
    n_tokens: int = 1,
    valid: Pairs | None = None,
    loss: Loss = "cross_entropy",
    lr: float | None = None,
    epochs: int = 20,
    batch_size: int | None = 5,
    schedule: Schedule = "cosine",
    patience: int | None = None,
    template: Template | str = "qa",
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Baseline:
    """A soft prompt: a few input embeddings behind BOS, trained with the model frozen.

    The embeddings start as those of random tokens of the vocabulary. One of them has as many numbers as a vector of the
    residual stream. See :class:`~fvlens.training.SoftPrompt` for what exactly is added where. All later tokens move
    by ``n_tokens`` positions, which a small model with learned positions may not bear: on the embedded one, 1 soft
    token fails, and 8 work, the length of a demonstration.

    Args:
        model: the model; its parameters, gradient flags and mode are as before afterwards.
        pairs: training pairs.
        n_tokens: soft tokens.
        valid, loss, epochs, batch_size, schedule, patience, template, relation, progress: as for
            :func:`~fvlens.training.finetune`.
        lr: learning rate; by default 10% of the root mean square of what the first block reads.
        generator: draws the seed of the minibatches' order, then the tokens.

    Returns:
        :class:`Baseline`. The norm in its history is that of the change from the first embeddings.

    Raises:
        ValueError: no pairs; ``n_tokens`` below 1, or too many for the model's context; a setting out of range.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> soft = soft_prompt(model, split.train[:20], valid=split.valid, epochs=5, generator=g, progress=False)
        >>> soft.n_trainable == model.cfg.d_model
        True

    References:
        Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2 (start from sampled vocabulary).
    """
    own, name = _given("soft_prompt", pairs, relation)
    if n_tokens < 1:
        raise ValueError(f"soft_prompt: expected n_tokens of at least 1, got {n_tokens}.")
    settings = Settings(
        loss=loss, lr=lr, epochs=epochs, batch_size=batch_size, schedule=schedule, patience=patience, template=template
    )
    seed = _seed(generator)
    tokens = _random_tokens(model, n_tokens, generator)
    task = Task(name, own, tuple(Pair(*pair) for pair in valid or ()), seed)
    adapter = SoftPromptAdapter(model, prompts_of(model, [task], template), tokens)
    what = f"{n_tokens} soft token{'s' if n_tokens > 1 else ''}"
    outcome, complete, seconds = _train(task, adapter, settings, what, progress)
    offsets = outcome.values.view(n_tokens, -1)
    change = SoftPrompt(tokens, offsets, adapter.mark)
    return _trained(what, task, change, outcome, settings, complete, seconds)


def lora(
    model: Any,
    pairs: Pairs,
    *,
    rank: int = 1,
    layers: Sequence[int] | None = None,
    valid: Pairs | None = None,
    loss: Loss = "cross_entropy",
    lr: float | None = None,
    epochs: int = 20,
    batch_size: int | None = 5,
    schedule: Schedule = "cosine",
    patience: int | None = None,
    template: Template | str = "qa",
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Baseline:
    """Low-rank updates of the query and value projections of attention, trained with the model frozen.

    ``W_Q + A_Q B_Q`` and ``W_V + A_V B_V`` at every token, with A random normal of variance ``1 / d_model`` and B zero
    at the start, so that training starts at the plain model. The factor ``alpha / rank`` of the source is 1.

    Args:
        model: the model; its parameters, gradient flags and mode are as before afterwards.
        pairs: training pairs.
        rank: rank of each update.
        layers: the layers that have them; by default all.
        valid, loss, epochs, batch_size, schedule, patience, template, relation, progress: as for
            :func:`~fvlens.training.finetune`.
        lr: learning rate; by default 10% of ``1 / sqrt(d_model)``, the root mean square of A at the start.
        generator: draws the seed of the minibatches' order, then A.

    Returns:
        :class:`Baseline`. The norm in its history is that of A and B together.

    Raises:
        ValueError: no pairs; ``rank`` below 1 or above ``d_head``; no layers, one twice, or one outside the model; a
            model whose projections cannot be reached; a setting out of range.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> updated = lora(model, split.train[:20], valid=split.valid, epochs=5, generator=g, progress=False)
        >>> updated.n_trainable == model.cfg.n_layers * 4 * model.cfg.d_model
        True

    References:
        Hu et al. 2021, arXiv:2106.09685, sections 4.1 and 4.2.
    """
    own, name = _given("lora", pairs, relation)
    n_layers = model.cfg.n_layers
    chosen = tuple(range(n_layers) if layers is None else layers)
    if not 1 <= rank <= model.cfg.d_head:
        raise ValueError(f"lora: expected rank in 1..{model.cfg.d_head}, the width of a head, got {rank}.")
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= one < n_layers for one in chosen):
        raise ValueError(f"lora: expected different layers in 0..{n_layers - 1}, got {list(chosen)}.")
    reason = why_not_low_rank(model, chosen)
    if reason is not None:
        raise ValueError(f"lora: cannot reach the query and value projections of this model: {reason}.")
    settings = Settings(
        loss=loss, lr=lr, epochs=epochs, batch_size=batch_size, schedule=schedule, patience=patience, template=template
    )
    seed = _seed(generator)
    task = Task(name, own, tuple(Pair(*pair) for pair in valid or ()), seed)
    adapter = LoRAAdapter(model, prompts_of(model, [task], template), chosen, rank, generator)
    what = f"LoRA, rank {rank}"
    outcome, complete, seconds = _train(task, adapter, settings, what, progress)
    with torch.no_grad():
        nn.utils.vector_to_parameters(outcome.values.to(adapter.a_q), adapter.parameters()[0])
    parts = (part.detach().cpu() for part in adapter.parameters()[0])
    change = LoRA(chosen, *parts, fingerprint=adapter.mark)
    return _trained(what, task, change, outcome, settings, complete, seconds)


def _given(function: str, pairs: Pairs, relation: str | None) -> tuple[tuple[Pair, ...], str]:
    """The pairs, and the relation's name."""
    own = tuple(Pair(*pair) for pair in pairs)
    if not own:
        raise ValueError(f"{function}: expected at least one pair, got none.")
    if relation is None:
        relation = pairs.name if isinstance(pairs, Relation) else ""
    return own, relation


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def _random_tokens(model: Any, n: int, generator: torch.Generator) -> Int[Tensor, " soft"]:
    """Random tokens of the vocabulary, no special ones."""
    special = set(model.tokenizer.all_special_ids)
    ordinary = [token for token in range(min(model.cfg.d_vocab, len(model.tokenizer))) if token not in special]
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (n,), generator=generator)]


def _train(task: Task, adapter: Adapter, settings: Settings, what: str, progress: bool) -> tuple[Outcome, bool, float]:
    training = Training([task], adapter, settings)
    name = f"{what}, {task.name}" if task.name else what
    _, complete, seconds = run_training(training, progress=progress, what=name, checkpoint=None)
    return training.outcomes()[0], complete, seconds


def _trained(
    method: str, task: Task, change: Adaptation, outcome: Outcome, settings: Settings, complete: bool, seconds: float
) -> Baseline:
    return Baseline(
        method=method,
        relation=task.name,
        change=change,
        n_trainable=outcome.values.numel(),
        seconds=seconds,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        settings=settings,
        lr=outcome.lr,
        seed=task.seed,
        complete=complete,
    )
