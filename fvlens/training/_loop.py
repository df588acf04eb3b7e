"""The training loop: one relation or many in one batch, whatever is changed in the model and whatever is made small.

A vector acts at the last token of the bare query, after layer l. What comes before that token, and the layers up to
l, do not depend on it. So (1) every pair runs once, (2) a step runs only the query's last token, and those of the
answer where it has several, through the layers above l, for the minibatches of all relations together, (3) after each
epoch the validation pairs are scored the same way. Changes for which that is not exact take whole passes. Each relation
has its own loss, minibatches, learning rate, best epoch and stop, so that training many gives what training each alone
gives.
"""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.models import fingerprint
from fvlens.progress import tqdm
from fvlens.showing import Shown
from fvlens.suffix import portions
from fvlens.training._change import Change, fill, flat
from fvlens.training._objective import OBJECTIVES, Objective
from fvlens.training._settings import CURVES, History, Settings, Task
from fvlens.training._state import VECTORS, Moment, TrainingState, copies, memory_of, remember
from fvlens.training._trainable import frozen


@dataclass(frozen=True, slots=True, repr=False)
class Outcome(Shown):
    """What training one relation gave.

    Attributes:
        values: all its numbers at the best epoch.
        result: what the change makes of them.
        best_epoch: that epoch; 0 is the start.
        history: curves over epochs.
        lr: the learning rate used.
    """

    values: Float[Tensor, " number"]
    result: Any
    best_epoch: int
    history: History
    lr: float

    def _line(self) -> str:
        return f"{self.values.numel()} numbers, best epoch {self.best_epoch} of {len(self.history) - 1}"


@dataclass(frozen=True, slots=True, repr=False)
class Trained(Shown):
    """What a training gave.

    Attributes:
        outcomes: one a relation.
        state: to go on from.
        complete: False if the training was interrupted.
        seconds: time that it took; after a resume, from there on.
    """

    outcomes: tuple[Outcome, ...]
    state: TrainingState
    complete: bool
    seconds: float

    def _line(self) -> str:
        return f"{len(self.outcomes)} relations, {self.seconds:.1f} s{'' if self.complete else ', interrupted'}"


class Training:
    """The parameters of all relations, their optimiser, and where each relation stands.

    Args:
        tasks: the relations.
        change: what is trained, over the prompts of :meth:`PreparedPrompts.of`.
        settings: how.
        objective: what is made small; by default as ``settings.loss`` names it.
        whose: the function that the user called, for messages.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        change: Change,
        settings: Settings,
        objective: Objective | None = None,
        *,
        whose: str = "finetune",
    ) -> None:
        self.tasks, self.change, self.settings, self.whose = tuple(tasks), change, settings, whose
        self.objective = OBJECTIVES[settings.loss]() if objective is None else objective
        self._wants = self.objective.wants
        self._wants_of_scores = dataclasses.replace(self._wants, first=True)
        # one loss after another adds up to the whole step's only where it is a mean
        self._may_split = type(self.objective).of_mean is Objective.of_mean
        self.train_rows: list[Tensor] = []
        self.valid_rows: list[Tensor] = []
        at = 0
        for task in tasks:
            for store, part in ((self.train_rows, task.train), (self.valid_rows, task.valid)):
                store.append(torch.arange(at, at + len(part)))
                at += len(part)
        self.parameters = change.parameters()
        self.starts = [self._values(i) for i in range(len(tasks))]
        with frozen(change.model):
            self.lrs = [settings.lr or change.relative_lr * change.scale(rows) for rows in self.train_rows]
        groups = [{"params": own, "lr": lr} for own, lr in zip(self.parameters, self.lrs, strict=True)]
        self.optimiser = torch.optim.Adam(groups)
        self.orders = [torch.Generator().manual_seed(task.seed) if task.order is None else task.order for task in tasks]
        self.curves: list[list[list[float]]] = [[] for _ in tasks]
        self.best = [start.clone() for start in self.starts]
        self.best_epochs = [0] * len(tasks)
        self.stopped = [False] * len(tasks)
        self._seen: list[tuple[Tensor, Tensor]] = []
        """What each pair added to the loss in the epoch's steps, and its relation."""
        self._identity_now: dict[str, Any] | None = None

    def _values(self, i: int) -> Float[Tensor, " number"]:
        """A copy of all numbers of a relation."""
        return flat(self.parameters[i]).detach().clone()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return max(map(len, self.curves)) - 1

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs or all(self.stopped)

    # -- losses -------------------------------------------------------------------------------------------------------

    def _losses(self, per_pair: Float[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, " relation"]:
        """Loss of each relation over its rows; 0 for relations without any."""
        n, device = len(self.tasks), per_pair.device
        if n == 1:
            return self.objective.of_mean(per_pair.mean()[None])
        relation = relation.to(device)
        counts = torch.zeros(n, device=device).index_add(0, relation, torch.ones_like(per_pair))
        mean = torch.zeros(n, device=device).index_add(0, relation, per_pair) / counts.clamp(min=1)
        return mean if self._may_split else torch.where(counts > 0, self.objective.of_mean(mean), mean)

    def _score(self, rows: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Loss and top-1 of each relation over its own rows, without gradient."""
        counts = [len(own) for own in rows]
        if not sum(counts):
            return [math.nan] * len(rows), [math.nan] * len(rows)
        flat = torch.cat(list(rows))
        relation = _relation_of(counts)
        per_pair, right = [], []
        with torch.no_grad():
            for part in self.change.prompts.portions(flat):
                readout = self.change.read(flat[part], relation[part], self._wants_of_scores)
                per_pair.append(self.objective.per_pair(readout))
                right.append(self.objective.is_right(readout))
            losses = self._losses(torch.cat(per_pair), relation).tolist()
        hits = torch.cat(right).cpu().double().split(counts)
        top1 = [float(part.mean()) if len(part) else math.nan for part in hits]
        return [loss if n else math.nan for loss, n in zip(losses, counts, strict=True)], top1

    # -- epochs -------------------------------------------------------------------------------------------------------

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
                told = f"the loss of {task.known_as} is not finite after epoch {epoch}; try a lower lr."
                warnings.warn(told, stacklevel=2)
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
        factor = self.settings.factor(self.epoch)
        for group, lr in zip(self.optimiser.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        shuffled = [
            torch.empty(0, dtype=torch.long) if stopped else rows[torch.randperm(len(rows), generator=order)]
            for rows, order, stopped in zip(self.train_rows, self.orders, self.stopped, strict=True)
        ]
        for batch in _batches(self.tasks, shuffled, self.settings.batch_size):
            self._step(batch)

    def _step(self, batch: Sequence[Tensor]) -> None:
        relation = _relation_of([len(rows) for rows in batch])
        self.optimiser.zero_grad(set_to_none=True)
        flat = batch[0] if len(batch) == 1 else torch.cat(list(batch))
        # relations do not touch each other, so their gradients may come in turns
        for part, of_all in self._groups(batch):
            readout = self.change.read(flat[part], relation[part], self._wants)
            per_pair = self.objective.per_pair(readout)
            loss = self._losses(per_pair, relation[part]).sum() if of_all is None else per_pair.sum() / of_all
            loss.backward()
            self._seen.append((per_pair.detach(), relation[part]))
        if self.settings.l2:
            anchors = self.starts if self.settings.anchor == "init" else None
            (self.settings.l2 * self.change.penalty(batch, anchors)).backward()
        for own, rows in zip(self.parameters, batch, strict=True):
            if not len(rows):
                for parameter in own:
                    parameter.grad = None  # Adam leaves it alone, memory and all
        self.optimiser.step()

    def _groups(self, batch: Sequence[Tensor]) -> Iterator[tuple[slice, int | None]]:
        """Slices of the step's rows that fit the memory: whole relations, or parts of one with its number of rows."""
        prompts = self.change.prompts
        most = prompts.most_at_once
        costs = [int(prompts.costs[rows].sum()) for rows in batch]
        for task, rows, cost in zip(self.tasks, batch, costs, strict=True):
            if cost > most and len(rows) > 1 and not self._may_split:
                raise ValueError(
                    f"{self.whose}: a step of {len(rows)} pairs of {task.known_as} does not fit the memory, "
                    f"which holds about {max(1, most * len(rows) // cost)} of these prompts; give a smaller batch_size."
                )
        ends = list(itertools.accumulate(len(rows) for rows in batch))
        for part in portions(costs, most):
            start, end = ends[part.start] - len(batch[part.start]), ends[part.stop - 1]
            if end == start:
                continue
            if part.stop == part.start + 1 and costs[part.start] > most:
                for inner in prompts.portions(batch[part.start]):
                    yield slice(start + inner.start, start + inner.stop), end - start
            else:
                yield slice(start, end), None

    def outcomes(self) -> tuple[Outcome, ...]:
        """Best vector, its epoch and the curves of each relation."""
        made = []
        for i, (task, curve) in enumerate(zip(self.tasks, self.curves, strict=True)):
            columns = torch.tensor(curve, dtype=torch.float64).T.float()
            history = History(**dict(zip(CURVES, columns, strict=True)))
            values = self.best[i].cpu()
            result = self.change.result(i, task, values)
            made.append(Outcome(values, result, self.best_epochs[i], history, self.lrs[i]))
        return tuple(made)

    # -- stopping and going on ----------------------------------------------------------------------------------------

    def moment(self) -> Moment:
        """What the next epoch will overwrite."""
        return Moment(
            values=[copies(own) for own in self.parameters],
            memory=[memory_of(self.optimiser, own) for own in self.parameters],
            orders=[order.get_state() for order in self.orders],
            lengths=[len(curve) for curve in self.curves],
            best=self.best[:],
            best_epochs=self.best_epochs[:],
            stopped=self.stopped[:],
        )

    def go_back(self, moment: Moment) -> None:
        """Be as at that moment."""
        for i, own in enumerate(self.parameters):
            for parameter, value, memory in zip(own, moment.values[i], moment.memory[i], strict=True):
                with torch.no_grad():
                    parameter.copy_(value)
                remember(self.optimiser, parameter, memory)
            self.orders[i].set_state(moment.orders[i])
            del self.curves[i][moment.lengths[i] :]
        self.best, self.best_epochs = moment.best[:], moment.best_epochs[:]
        self.stopped = moment.stopped[:]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a state to fit."""
        if self._identity_now is None:
            self._identity_now = {
                "settings": self.settings.to_json(),
                "relations": [task.name for task in self.tasks],
                "n_train": [len(task.train) for task in self.tasks],
                "data_hash": self.change.prompts.prompts.data_hash,
                "seeds": [task.seed for task in self.tasks],
                "fingerprint": dataclasses.asdict(fingerprint(self.change.model)),
                **self.change.identity(),
                **self.objective.identity(),
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
            tensors[f"{i}.generator"] = self.orders[i].get_state()
            for k, memory in enumerate(memory_of(self.optimiser, own)):
                for name, value in memory.items():
                    tensors[f"{i}.adam.{k}.{name}"] = value.cpu()
        header = {"best_epochs": self.best_epochs[:], "stopped": self.stopped[:], "lrs": self.lrs[:]}
        return TrainingState(tensors, header | self._identity())

    def restore(self, state: TrainingState) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of other settings, pairs, layer or model, or is damaged.
        """
        state.check(self._identity(), self.whose)
        try:
            state.check_parts()
            self._check_shapes(state)
            for i, parameters in enumerate(self.parameters):
                own = {name.split(".", 1)[1]: t for name, t in state.tensors.items() if name.startswith(f"{i}.")}
                vectors = [own[name].to(self.starts[i], copy=True).view_as(self.starts[i]) for name in VECTORS]
                value, self.starts[i], self.best[i] = vectors
                fill(parameters, value)
                self.curves[i] = own["curve"].tolist()
                self.orders[i].set_state(own["generator"])
                for k, parameter in enumerate(parameters):
                    prefix = f"adam.{k}."
                    memory = {name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)}
                    remember(self.optimiser, parameter, memory)
            self.best_epochs, self.stopped = list(state.header["best_epochs"]), list(state.header["stopped"])
            self.lrs = list(state.header["lrs"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.whose}: the saved training is damaged ({type(error).__name__}: {error})."
            ) from error

    def _check_shapes(self, state: TrainingState) -> None:
        """Refuse numbers and moments that are not of the shapes of the parameters.

        Raises:
            KeyError, ValueError: they are not.
        """
        for i, parameters in enumerate(self.parameters):
            expected = {f"{i}.value": self.starts[i].shape}
            for k, parameter in enumerate(parameters):
                if f"{i}.adam.{k}.exp_avg" in state.tensors:
                    expected[f"{i}.adam.{k}.exp_avg"] = parameter.shape
            known = len(f"{i}.adam.")
            strange = {name[known:].partition(".")[0] for name in state.tensors if name.startswith(f"{i}.adam.")}
            if not strange <= {str(k) for k in range(len(parameters))}:
                raise ValueError(f"moments of {len(strange)} parameters, but there are {len(parameters)}")
            for name, shape in expected.items():
                if state.tensors[name].shape != shape:
                    raise ValueError(f"{name}: expected shape {list(shape)}, got {list(state.tensors[name].shape)}")


def train(
    training: Training,
    *,
    epochs: int | None = None,
    progress: bool = True,
    what: str = "training",
    resume: TrainingState | str | FilePath | None = None,
    checkpoint: str | FilePath | None = None,
    stacklevel: int = 2,
) -> Trained:
    """Train to the end, or until interrupted: then what is there is that of the last whole epoch.

    Args:
        training: what to train, on what, and how.
        epochs: stop after so many; by default those of the settings. The schedule is that of the settings.
        progress: show a bar over epochs.
        what: its text.
        resume: a state, or a file of one, to go on from.
        checkpoint: write the state to this file after every epoch.
        stacklevel: of the warning about an interruption, counted from here.

    Returns:
        :class:`Trained`.

    Raises:
        ValueError: the folder of the checkpoint does not exist; the state does not fit; a minibatch does not fit the
            memory.
    """
    began = time.monotonic()
    if resume is not None:
        training.restore(resume if isinstance(resume, TrainingState) else TrainingState.load(resume))
    file = None if checkpoint is None else FilePath(checkpoint)
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{training.whose}: folder {file.parent} of the checkpoint does not exist; create it first.")
    n_epochs = training.settings.epochs if epochs is None else epochs
    complete = True
    with frozen(training.change.model), torch.enable_grad():
        if training.epoch < 0:
            training.record()
        moment = training.moment()
        with tqdm(total=n_epochs, initial=training.epoch, desc=what, disable=not progress, leave=False) as bar:
            try:
                while not training.finished and training.epoch < n_epochs:
                    training.one_epoch()
                    training.record()
                    moment = training.moment()
                    if file is not None:
                        training.state().save(file)
                    bar.update()
            except KeyboardInterrupt:
                training.go_back(moment)
                complete = False
                done = f"{training.epoch} of {n_epochs} epochs are finished"
                warnings.warn(f"{what} was interrupted: {done}.", stacklevel=stacklevel)
    return Trained(training.outcomes(), training.state(), complete, time.monotonic() - began)


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
