"""The training loop: one relation or many in one batch, over suffixes of pairs that were run once.

The vector acts at the last token of the bare query, after layer l. What comes before that token, and the layers up to
l, do not depend on it. So (1) every pair runs once, (2) a step runs only the query's last token, and those of the
answer where it has several, through the layers above l, for the minibatches of all relations together, (3) after each
epoch the validation pairs are scored the same way. Each relation has its own loss, minibatches, learning
rate, best epoch and stop, so that training many gives what training each alone gives.
"""

import abc
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import hooked, resid_hook, z_hook
from fvlens.metrics import is_best
from fvlens.models import fingerprint, model_device
from fvlens.prompts import PAD_ANSWER, TEMPLATES, Prompts, Template, build_prompts, get_template, with_answers
from fvlens.relations import Pair
from fvlens.suffix import Route, SteeredPrompts, Weights, open_reader, plan_slices, portions, power_above
from fvlens.training._trainable import TrainableDistributedVector, TrainableVector, frozen

if TYPE_CHECKING:
    import pandas as pd

Loss = Literal["cross_entropy", "perplexity"]
Anchor = Literal["zero", "init"]
Schedule = Literal["cosine", "constant"]
LOSSES, ANCHORS, SCHEDULES = ("cross_entropy", "perplexity"), ("zero", "init"), ("cosine", "constant")
_MOST_ROWS = 512
"""Pairs that go through together at most: more is no faster, and what is free must not decide the rounding."""
RELATIVE_LR = 0.03
"""Default learning rate, as a share of the root mean square of the residual stream where the vector is added."""

STATE_FORMAT = "fvlens-training-1"
_VECTORS = ("value", "start", "best")
_CURVES = ("train_loss", "valid_loss", "valid_top1", "norm", "cosine")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a vector is trained.

    Attributes:
        loss: ``"cross_entropy"``, the mean over pairs of ``-log P(y | x)`` in nats, summed over the answer's tokens; or
            ``"perplexity"``, the exponential of the mean over pairs of its mean per token.
        l2: weight of ``||v - anchor||^2``.
        anchor: ``"zero"``, or ``"init"`` to stay near the start.
        lr: learning rate of Adam; by default 3% of the root mean square of the residual stream at the place of the
            vector, over the relation's training pairs, so that one number fits models of any scale.
        epochs: passes over the training pairs.
        batch_size: pairs in a step; None for all of them.
        schedule: of the learning rate over epochs, ``"cosine"`` down to zero or ``"constant"``.
        patience: stop after this many epochs without a better validation score; None to use all epochs.
        template: how the queries are written; a name gives the built-in template.
    """

    loss: Loss = "cross_entropy"
    l2: float = 0.0
    anchor: Anchor = "zero"
    lr: float | None = None
    epochs: int = 20
    batch_size: int | None = 5
    schedule: Schedule = "cosine"
    patience: int | None = None
    template: Template | str = "qa"

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("anchor", ANCHORS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"finetune: {name}={getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ValueError(f"finetune: expected l2 of 0 or more, got {self.l2}.")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"finetune: expected lr over 0, or None, got {self.lr}.")
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"finetune: expected {name} of at least 1, got {value}.")
        object.__setattr__(self, "template", get_template(self.template))


@dataclass(frozen=True, slots=True)
class History:
    """One entry an epoch; entry 0 is the start, before any step.

    Attributes:
        train_loss: the loss without its l2 term (nats for ``"cross_entropy"``) over the epoch's steps, of each pair
            before the step that it takes part in; of entry 0, over all training pairs at the start.
        valid_loss: the same over all validation pairs after the epoch, NaN without pairs.
        valid_top1: share of validation pairs whose answer's first token is the most likely one.
        norm: Euclidean norm of the vector.
        cosine: cosine similarity to the start; NaN if the start was zero.
    """

    train_loss: Float[Tensor, " epoch"]
    valid_loss: Float[Tensor, " epoch"]
    valid_top1: Float[Tensor, " epoch"]
    norm: Float[Tensor, " epoch"]
    cosine: Float[Tensor, " epoch"]

    def __len__(self) -> int:
        """Number of entries, one more than the epochs trained."""
        return len(self.train_loss)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an epoch: ``epoch`` and the curves."""
        import pandas as pd

        curves = {name: getattr(self, name).numpy() for name in _CURVES}
        return pd.DataFrame({"epoch": range(len(self)), **curves})


@dataclass(frozen=True, slots=True)
class Task:
    """One relation to train: its pairs, the start of its vector, and the order of its minibatches."""

    name: str
    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training one relation gave."""

    values: Tensor
    best_epoch: int
    history: History
    lr: float


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that training needs to go on as if it had never stopped.

    Attributes:
        tensors: parameters, Adam's moments, best vectors, curves, and the state of each generator.
        header: epoch, settings, and what was trained, on which model.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def save(self, path: str | FilePath) -> FilePath:
        """Write the state to one safetensors file, at once."""
        return write_tensors(FilePath(path), self.tensors, self.header, STATE_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath) -> "TrainingState":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: no such file, or not a training state.
        """
        return cls(*read_tensors(FilePath(path), STATE_FORMAT))


class Adapter(abc.ABC):
    """What is trained, and how pairs are scored under it; one set of parameters a relation.

    Args:
        model: the model.
        prompts: the bare queries of all pairs, with their answers.
        max_memory: bytes for activations; by default as by :func:`fvlens.suffix.plan_slices`.

    Attributes:
        costs: what each prompt counts in a batch.
        most_at_once: what the prompts of a batch count together at most.
    """

    path: Route = "naive"
    weights: Weights | None = None
    relative_lr = RELATIVE_LR
    """Default learning rate, as a share of :meth:`scale`."""

    def __init__(self, model: Any, prompts: Prompts, max_memory: int | None = None) -> None:
        self.model, self.prompts = model, prompts
        tokens, mask, _ = with_answers(prompts)
        device = model_device(model)
        self.tokens, self.mask = tokens.to(device), mask.to(device)
        self.targets = prompts.answer_tokens.to(device)
        self.n_suffix = self.targets.shape[1]
        self.costs, self.most_at_once = self._batching(max_memory)

    def portions(self, rows: Int[Tensor, " row"]) -> list[slice]:
        """Slices of ``rows`` that go through together."""
        return portions(self.costs[rows.cpu()].tolist(), self.most_at_once)

    def _batching(self, max_memory: int | None) -> tuple[Int[Tensor, " prompt"], int]:
        """Costs of the prompts, and their sum in a batch at most: each counts once where they go through whole."""
        n_pos = self.tokens.shape[1]
        plan = plan_slices(
            self.model, n_pos=n_pos, n_suffix=n_pos, n_variants=1, path="naive", max_memory=max_memory, gradients=True,
            n_prompts=power_above(len(self.tokens)),
        )  # fmt: skip
        return torch.ones(len(self.tokens), dtype=torch.long), min(_MOST_ROWS, 1 << (plan.prompts.bit_length() - 1))

    @abc.abstractmethod
    def parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each relation."""

    @abc.abstractmethod
    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Typical size of what the parameters stand beside, to which the default learning rate is relative."""

    @abc.abstractmethod
    def logits(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits at the query's last token and behind the answer's tokens, under each row's own parameters."""

    def identity(self) -> dict[str, Any]:
        """What else a saved training must have in common with this one."""
        return {"method": type(self).__name__, "path": self.path}

    def log_probs(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, "row answer_pos"]:
        """Log-probability of each answer token in nats, 0 behind the answer's end."""
        return self.of_answers(self.logits(rows, relation), rows)

    def scores(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row answer_pos"], Bool[Tensor, " row"]]:
        """The same, and whether the answer's first token is the best one (never where a logit is NaN)."""
        logits = self.logits(rows, relation)
        first = self.targets[rows.to(self.targets.device), 0]
        return self.of_answers(logits, rows), is_best(logits[:, 0], first)

    def of_answers(
        self, logits: Float[Tensor, "row answer_pos d_vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos"]:
        """Log-probability of each answer token in nats under such logits, 0 behind the answer's end."""
        targets = self.targets[rows.to(self.targets.device)]
        logs = -F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD_ANSWER, reduction="none"
        )
        return logs.view(targets.shape)

    def whole_passes(
        self, rows: Int[Tensor, " row"], edits: Mapping[str, Callable[[Tensor], Tensor | None]]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits of whole forward passes under edits (hook name -> new activation)."""
        rows = rows.to(self.tokens.device)
        with hooked(self.model, edits):
            reader = open_reader(self.model, len(rows), keep=False)
            return reader.read(self.tokens[rows], self.mask[rows], n_read=self.n_suffix)

    def at_last_token(self, value: Tensor) -> Callable[[Tensor], Tensor]:
        """An edit that adds ``value`` at the query's last token."""
        column = self.tokens.shape[1] - self.n_suffix

        def add(activation: Tensor) -> Tensor:
            result = activation.clone()
            # the sum is made in the wider of the two precisions and rounded once
            result[:, column] = (result[:, column] + value.to(activation.device)).to(activation.dtype)
            return result

        return add


class VectorAdapter(Adapter):
    """A vector of the residual stream a relation, over kept prompts where a fast path is exact."""

    def __init__(
        self, model: Any, prompts: Prompts, trainable: TrainableVector, path: Route, max_memory: int | None = None
    ) -> None:
        self.path, self.trainable = path, trainable
        self.kept: SteeredPrompts | None = None
        if path != "naive":
            self.kept = SteeredPrompts(
                model, prompts.tokens, prompts.attention_mask, prompts.answer_tokens, trainable.layer, path=path,
                max_memory=max_memory, most=_MOST_ROWS,
            )  # fmt: skip
            self.weights = self.kept.weights
        super().__init__(model, prompts, max_memory)

    def _batching(self, max_memory: int | None) -> tuple[Int[Tensor, " prompt"], int]:
        if self.kept is None:
            return super()._batching(max_memory)
        return self.kept.n_tokens, self.kept.tokens_at_once

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[row] for row in self.trainable.rows]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        layer = self.trainable.layer
        if self.kept is not None:
            there = self.kept.after(rows)
        else:
            found: list[Tensor] = []
            column = self.tokens.shape[1] - self.n_suffix
            with torch.no_grad():
                for part in self.portions(rows):
                    self.whole_passes(rows[part], {resid_hook(layer): lambda x: found.append(x[:, column].clone())})
            there = torch.cat(found)
        return float(there.float().square().mean().sqrt())

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"layer": self.trainable.layer}

    def _vectors(self, relation: Int[Tensor, " row"]) -> Float[Tensor, "*row d_model"]:
        """The vector of all rows, or of each."""
        own = self.trainable.rows
        return own[0] if len(own) == 1 else self.trainable.matrix[relation.to(own[0].device)]

    def logits(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        return self._whole(rows, self._vectors(relation))

    def _whole(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits by whole passes, with one vector for all rows or one for each."""
        return self.whole_passes(rows, {resid_hook(self.trainable.layer): self.at_last_token(vectors)})

    def log_probs(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, "row answer_pos"]:
        return self.steered_log_probs(rows, self._vectors(relation))

    def scores(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row answer_pos"], Bool[Tensor, " row"]]:
        logs, first = self.steered_scores(rows, self._vectors(relation))
        return logs, is_best(first, self.targets[rows.to(self.targets.device), 0].to(first.device))

    # -- the same with other vectors: one for all rows, or one for each -----------------------------------------------

    def steered_log_probs(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row answer_pos"]:
        """Log-probability of each answer token in nats, 0 behind the answer's end."""
        if self.kept is None:
            return self.of_answers(self._whole(rows, vectors), rows)
        return self.kept.read(rows, vectors)[0]

    def steered_scores(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> tuple[Float[Tensor, "row answer_pos"], Float[Tensor, "row d_vocab"]]:
        """The same, and the logits at the queries' last tokens."""
        if self.kept is None:
            logits = self._whole(rows, vectors)
            return self.of_answers(logits, rows), logits[:, 0]
        logs, first = self.kept.read(rows, vectors, first=True)
        assert first is not None
        return logs, first

    def steered_first_logits(
        self, rows: Int[Tensor, " row"], vectors: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at the queries' last tokens."""
        if self.kept is None:
            return self._whole(rows, vectors)[:, 0]
        return self.kept.first_logits(rows, vectors)


class DistributedAdapter(Adapter):
    """Numbers of their own for chosen heads, by whole forward passes."""

    def __init__(
        self, model: Any, prompts: Prompts, trainable: TrainableDistributedVector, max_memory: int | None = None
    ) -> None:
        super().__init__(model, prompts, max_memory)
        self.trainable = trainable

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.trainable.values]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        found: list[Tensor] = []
        column = self.tokens.shape[1] - self.n_suffix
        heads = self.trainable.heads

        def see(layer: int) -> Callable[[Tensor], None]:
            own = [head.head for head in heads if head.layer == layer]
            return lambda z: found.append(z[:, column, own].float().square().flatten().cpu())

        with torch.no_grad():
            for part in self.portions(rows):
                self.whole_passes(rows[part], {z_hook(layer): see(layer) for layer in {head.layer for head in heads}})
        return float(torch.cat(found).mean().sqrt())

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"heads": [list(head) for head in self.trainable.heads]}

    def logits(
        self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        edits = {name: self.at_last_token(value) for name, value in self.trainable.additions().items()}
        return self.whole_passes(rows, edits)


def _batches(tasks: Sequence[Task], orders: Sequence[Tensor], size: int | None) -> Iterator[list[Tensor]]:
    """The k-th minibatch of every relation, for k = 0, 1, ...; empty where a relation has no more pairs."""
    sizes = [size or len(task.train) for task in tasks]
    n_steps = max(math.ceil(len(order) / own) for order, own in zip(orders, sizes, strict=True))
    for step in range(n_steps):
        yield [order[step * own : (step + 1) * own] for order, own in zip(orders, sizes, strict=True)]


def _relation_of(counts: Sequence[int]) -> Int[Tensor, " row"]:
    """The relation of each row, where relation i has ``counts[i]`` of them."""
    if len(counts) == 1:
        return torch.zeros(counts[0], dtype=torch.long)
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def prompts_of(model: Any, tasks: Sequence[Task], template: Template | str) -> Prompts:
    """The bare queries of all pairs of all relations: of each its training pairs, then its validation pairs."""
    pairs = [pair for task in tasks for pair in (*task.train, *task.valid)]
    return build_prompts(model, pairs, n_shots=0, template=template, generator=torch.Generator())


class Training:
    """Relations trained together: one epoch at a time, scored after each, with copies of the best.

    Args:
        tasks: the relations.
        adapter: what is trained, over the prompts of :func:`prompts_of`.
        settings: how.
    """

    def __init__(self, tasks: Sequence[Task], adapter: Adapter, settings: Settings) -> None:
        self.tasks, self.adapter, self.settings = tuple(tasks), adapter, settings
        self.train_rows: list[Tensor] = []
        self.valid_rows: list[Tensor] = []
        at = 0
        for task in tasks:
            for store, part in ((self.train_rows, task.train), (self.valid_rows, task.valid)):
                store.append(torch.arange(at, at + len(part)))
                at += len(part)
        self.parameters = adapter.parameters()
        self.starts = [self._values(i) for i in range(len(tasks))]
        self.lrs = [settings.lr or adapter.relative_lr * adapter.scale(rows) for rows in self.train_rows]
        groups = [{"params": own, "lr": lr} for own, lr in zip(self.parameters, self.lrs, strict=True)]
        self.optimiser = torch.optim.Adam(groups)
        self.generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
        self.curves: list[list[list[float]]] = [[] for _ in tasks]
        self.best = [start.clone() for start in self.starts]
        self.best_epochs = [0] * len(tasks)
        self.stopped = [False] * len(tasks)
        self._seen: list[tuple[Tensor, Tensor]] = []
        """What each pair added to the loss in the epoch's steps, and its relation."""
        self._identity_now: dict[str, Any] | None = None

    def _values(self, i: int) -> Float[Tensor, " number"]:
        """A copy of all numbers of a relation."""
        return nn.utils.parameters_to_vector(self.parameters[i]).detach().clone()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return max(map(len, self.curves)) - 1

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs or all(self.stopped)

    def _per_pair(self, logs: Float[Tensor, "row answer_pos"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """What each row adds to the mean of its relation, in nats."""
        per_pair = -logs.sum(dim=1)
        if self.settings.loss == "perplexity":
            per_pair = per_pair / (self.adapter.targets[rows.to(logs.device)] >= 0).sum(dim=1)
        return per_pair

    def _losses(self, per_pair: Float[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, " relation"]:
        """Loss of each relation over its rows; 0 for relations without any."""
        n, device = len(self.tasks), per_pair.device
        if n == 1:
            mean = per_pair.mean()[None]
            return mean.exp() if self.settings.loss == "perplexity" else mean
        relation = relation.to(device)
        counts = torch.zeros(n, device=device).index_add(0, relation, torch.ones_like(per_pair))
        mean = torch.zeros(n, device=device).index_add(0, relation, per_pair) / counts.clamp(min=1)
        if self.settings.loss == "perplexity":
            mean = torch.where(counts > 0, mean.exp(), mean)
        return mean

    def _score(self, rows: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Loss and top-1 of each relation over its own rows, without gradient."""
        counts = [len(own) for own in rows]
        if not sum(counts):
            return [math.nan] * len(rows), [math.nan] * len(rows)
        flat = torch.cat(list(rows))
        relation = _relation_of(counts)
        logs, right = [], []
        with torch.no_grad():
            for part in self.adapter.portions(flat):
                found, ok = self.adapter.scores(flat[part], relation[part])
                logs.append(found)
                right.append(ok)
            losses = self._losses(self._per_pair(torch.cat(logs), flat), relation).tolist()
        hits = torch.cat(right).cpu().double().split(counts)
        top1 = [float(part.mean()) if len(part) else math.nan for part in hits]
        return [loss if n else math.nan for loss, n in zip(losses, counts, strict=True)], top1

    def record(self) -> None:
        """Score the relations that have not stopped, keep those that are better than ever, and stop others.

        A relation whose loss is no longer a finite number stops with a warning; its best epoch so far stands.
        """
        going = [not stopped for stopped in self.stopped]
        train = self._loss_of_steps() if self._seen else self._score(self.train_rows)[0]
        valid, top1 = self._score([rows[: len(rows) * on] for rows, on in zip(self.valid_rows, going, strict=True)])
        for i, task in enumerate(self.tasks):
            if self.stopped[i]:
                continue
            now, start = self._values(i), self.starts[i]
            norm = float(now.norm())
            product = norm * float(start.norm())
            cosine = float((now * start).sum()) / product if product else math.nan
            curve = [train[i], valid[i], top1[i], norm, cosine]
            self.curves[i].append(curve)
            epoch = len(self.curves[i]) - 1
            if not all(map(math.isfinite, [train[i], norm, *([valid[i]] if task.valid else [])])):
                self.stopped[i] = True
                name = task.name or "this relation"
                warnings.warn(f"the loss of {name} is not finite after epoch {epoch}; try a lower lr.", stacklevel=2)
                continue
            best = self.curves[i][self.best_epochs[i]]
            if not task.valid or epoch == 0 or (curve[2], -curve[1]) > (best[2], -best[1]):
                self.best[i], self.best_epochs[i] = now, epoch
            patience = self.settings.patience
            self.stopped[i] = patience is not None and epoch - self.best_epochs[i] >= patience

    def _loss_of_steps(self) -> list[float]:
        """Loss of each relation over the steps of the epoch."""
        per_pair, relation = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        return self._losses(per_pair, relation).tolist()

    def one_epoch(self) -> None:
        """Every training pair once."""
        self._seen.clear()
        factor = 1.0
        if self.settings.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * self.epoch / self.settings.epochs))
        for group, lr in zip(self.optimiser.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        orders = [
            torch.empty(0, dtype=torch.long) if stopped else rows[torch.randperm(len(rows), generator=generator)]
            for rows, generator, stopped in zip(self.train_rows, self.generators, self.stopped, strict=True)
        ]
        for batch in _batches(self.tasks, orders, self.settings.batch_size):
            self._step(batch)

    def _step(self, batch: Sequence[Tensor]) -> None:
        relation = _relation_of([len(rows) for rows in batch])
        self.optimiser.zero_grad(set_to_none=True)
        flat = batch[0] if len(batch) == 1 else torch.cat(list(batch))
        for part in self._groups(batch):  # relations do not touch each other, so their gradients may come in turns
            logs = self.adapter.log_probs(flat[part], relation[part])
            per_pair = self._per_pair(logs, flat[part])
            self._losses(per_pair, relation[part]).sum().backward()
            self._seen.append((per_pair.detach(), relation[part]))
        if self.settings.l2:
            values = torch.stack([nn.utils.parameters_to_vector(own) for own in self.parameters])
            if self.settings.anchor == "init":
                values = values - torch.stack(self.starts)
            (self.settings.l2 * values.square().sum()).backward()
        for own, rows in zip(self.parameters, batch, strict=True):
            if not len(rows):
                for parameter in own:
                    parameter.grad = None  # Adam leaves it alone, memory and all
        self.optimiser.step()

    def _groups(self, batch: Sequence[Tensor]) -> Iterator[slice]:
        """Slices of the step's rows that hold whole relations and fit the memory."""
        most = self.adapter.most_at_once
        costs = [int(self.adapter.costs[rows].sum()) for rows in batch]
        for task, rows, cost in zip(self.tasks, batch, costs, strict=True):
            if cost > most and len(rows) > 1:
                raise ValueError(
                    f"finetune: a step of {len(rows)} pairs of {task.name or 'this relation'} does not fit the memory, "
                    f"which holds about {max(1, most * len(rows) // cost)} of these prompts; give a smaller batch_size."
                )
        ends = list(itertools.accumulate(len(rows) for rows in batch))
        for part in portions(costs, most):
            start = ends[part.start] - len(batch[part.start])
            if ends[part.stop - 1] > start:
                yield slice(start, ends[part.stop - 1])

    def outcomes(self) -> list[Outcome]:
        """Best vector, its epoch and the curves of each relation."""
        found = []
        for i, curve in enumerate(self.curves):
            columns = torch.tensor(curve, dtype=torch.float64).T.float()
            history = History(**dict(zip(_CURVES, columns, strict=True)))
            found.append(Outcome(self.best[i].cpu(), self.best_epochs[i], history, self.lrs[i]))
        return found

    # -- stopping and going on ----------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a state to fit."""
        if self._identity_now is None:
            self._identity_now = {
                "settings": dataclasses.asdict(self.settings),
                "relations": [task.name for task in self.tasks],
                "n_train": [len(task.train) for task in self.tasks],
                "data_hash": self.adapter.prompts.data_hash,
                "seeds": [task.seed for task in self.tasks],
                "fingerprint": dataclasses.asdict(fingerprint(self.adapter.model)),
                **self.adapter.identity(),
            }
        return self._identity_now

    def state(self) -> TrainingState:
        """A copy of everything, as it is after the last finished epoch."""
        tensors: dict[str, Tensor] = {}
        for i, own in enumerate(self.parameters):
            tensors[f"{i}.value"] = self._values(i).cpu()
            tensors[f"{i}.start"] = self.starts[i].cpu().clone()
            tensors[f"{i}.best"] = self.best[i].cpu().clone()
            tensors[f"{i}.curve"] = torch.tensor(self.curves[i], dtype=torch.float64)
            tensors[f"{i}.generator"] = self.generators[i].get_state()
            for k, parameter in enumerate(own):
                for name, value in self.optimiser.state.get(parameter, {}).items():
                    tensors[f"{i}.adam.{k}.{name}"] = value.detach().cpu().clone()
        header = {"best_epochs": self.best_epochs[:], "stopped": self.stopped[:], "lrs": self.lrs[:]}
        return TrainingState(tensors, header | self._identity())

    def restore(self, state: TrainingState) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of other settings, pairs, layer or model, or is damaged.
        """
        for name, ours in self._identity().items():
            theirs = state.header.get(name)
            if name == "settings" and isinstance(theirs, dict) and isinstance(theirs.get("template"), str):
                # fvlens 0.1 wrote the name alone
                known = TEMPLATES.get(theirs["template"])
                theirs = theirs | ({} if known is None else {"template": known.to_json()})
            if theirs != ours and not (name == "fingerprint" and _same_model(ours, theirs)):
                raise ValueError(f"finetune: the saved training has {name} {theirs!r}, this one {ours!r}.")
        try:
            for i, parameters in enumerate(self.parameters):
                own = {name.split(".", 1)[1]: t for name, t in state.tensors.items() if name.startswith(f"{i}.")}
                vectors = [own[name].to(self.starts[i], copy=True).view_as(self.starts[i]) for name in _VECTORS]
                value, self.starts[i], self.best[i] = vectors
                nn.utils.vector_to_parameters(value, parameters)
                self.curves[i] = own["curve"].tolist()
                self.generators[i].set_state(own["generator"])
                for k, parameter in enumerate(parameters):
                    prefix = f"adam.{k}."
                    moments = {n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)}
                    self.optimiser.state.pop(parameter, None)
                    if moments:
                        self.optimiser.state[parameter] = {
                            name: tensor.clone() if name == "step" else tensor.to(parameter, copy=True)
                            for name, tensor in moments.items()
                        }
            self.best_epochs, self.stopped = list(state.header["best_epochs"]), list(state.header["stopped"])
            self.lrs = list(state.header["lrs"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"finetune: the saved training is damaged ({type(error).__name__}: {error}).") from error


def _same_model(ours: Mapping[str, Any], theirs: Any) -> bool:
    informative = ("name", "revision")
    return isinstance(theirs, Mapping) and all(theirs.get(k) == v for k, v in ours.items() if k not in informative)


def run_training(
    training: Training, *, progress: bool, what: str, checkpoint: FilePath | None
) -> tuple[TrainingState, bool, float]:
    """Train to the end, or until interrupted; the last whole epoch's state, whether it was the end, and seconds."""
    began = time.monotonic()
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise ValueError(f"finetune: folder {checkpoint.parent} of the checkpoint does not exist; create it first.")
    n_epochs = training.settings.epochs
    with frozen(training.adapter.model), torch.enable_grad():
        if training.epoch < 0:
            training.record()
        state = training.state()
        with tqdm(total=n_epochs, initial=training.epoch, desc=what, disable=not progress, leave=False) as bar:
            try:
                while not training.finished:
                    training.one_epoch()
                    training.record()
                    state = training.state()
                    if checkpoint is not None:
                        state.save(checkpoint)
                    bar.update()
            except KeyboardInterrupt:
                training.restore(state)
                done = f"{training.epoch} of {n_epochs} epochs are finished"
                warnings.warn(f"{what} was interrupted: {done}.", stacklevel=6)
                return state, False, time.monotonic() - began
    return state, True, time.monotonic() - began
