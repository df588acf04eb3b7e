"""``finetune`` for one relation, ``finetune_many`` for all of them in one batch."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from fvlens.arguments import check_arguments
from fvlens.interruption import keeping
from fvlens.models import model_device
from fvlens.prompts import Prompts, Template
from fvlens.relations import Pairs, Relation, Split, as_pairs, as_relation, as_relations, named_pairs
from fvlens.scoring import note_other_bos
from fvlens.suffix import named_precision
from fvlens.training._fine_tuned import FineTuned, FineTunedSet
from fvlens.training._loop import Outcome, Trained, Training, train
from fvlens.training._options import Execution, TrainingOptions, settled
from fvlens.training._prepared import SteerablePrompts, prompts_of
from fvlens.training._settings import Settings, Task
from fvlens.training._state import TrainingState
from fvlens.training._trainable import TrainableDistributedVector, TrainableVector, frozen
from fvlens.training._vector_changes import DistributedChange, VectorChange
from fvlens.vectors import DistributedVector, FunctionVector

Init = FunctionVector | DistributedVector | Literal["zero"]


def finetune(
    model: Any,
    pairs: Pairs,
    *,
    init: Init,
    layer: int | Sequence[int] | None = None,
    valid: Pairs | None = None,
    relation: str | None = None,
    settings: Settings | None = None,
    generator: torch.Generator,
    **options: Unpack[TrainingOptions],
) -> FineTuned:
    """Train a function vector on a few word pairs, with the model frozen.

    ``L(v) = mean over pairs (x, y) of -log P(y | x; resid_l[-1] += v) + l2 ||v - anchor||^2`` over bare queries, by
    Adam on v alone [digest]. Multi-token answers are trained whole, teacher-forced, with v at the query's last token.
    The epoch, and the layer if several are given, are chosen on ``valid``: best top-1, then lowest loss [our choice;
    the paper's is not known].

    Args:
        model: the model; its parameters, gradient flags and mode are as before afterwards.
        pairs: training pairs, about 20, in any shape (:func:`fvlens.relations.as_relation`); so for ``valid``.
        init: what training starts from: a ``FunctionVector``, ``"zero"``, or a ``DistributedVector`` (each chosen head
            then has numbers of its own). For noise of the same norm give
            ``fvlens.random_vector_like(vector, generator)``.
        layer: the vector is added after this layer; by default that of ``init``. Of several, the best on ``valid``.
        valid: validation pairs. Without them the last epoch is taken, and one layer must be given.
        relation: name of the result; by default that of ``pairs`` or ``init``.
        settings: how it is trained; by default the defaults of :class:`Settings`, with the template of ``init``.
        generator: draws the seed of the minibatches' order.
        options: fields of :class:`Settings`, which go before ``settings``, and of :class:`Execution`:
        loss: ``"cross_entropy"`` or ``"perplexity"``.
        l2: weight of ``||v - anchor||^2``.
        anchor: ``"zero"``, or ``"init"``.
        lr: learning rate; by default 3% of the residual stream's root mean square at that place.
        epochs: passes over the pairs.
        batch_size: pairs in a step; None for all.
        schedule: ``"cosine"`` (down to zero over all epochs) or ``"constant"``.
        patience: stop after this many epochs without a better validation score.
        template: how queries are written; by default as the prompts behind ``init`` were, else ``"qa"``.
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest exact one.
        max_memory: bytes for activations; by default chosen from what is free.
        compute: precision of products of the frozen model, such as ``torch.bfloat16`` for a float32 one on the path
            ``"weights"``; residual stream, sums and gradients stay float32. By default the model's own. ``fvlens study
            compute`` measures the error.
        resume: a state, or a file of one, to go on from; all settings must be those it was saved under.
        checkpoint: write the state to this file after every epoch.
        check: ask ``init`` whether it was made on this model.
        progress: show a progress bar. Interrupting gives the best vector so far, with a warning.

    Returns:
        :class:`FineTuned`. A training whose loss is no longer a finite number stops with a warning; its best epoch
        before that stands.

    Raises:
        ValueError: no pairs, or such as cannot be read; a setting out of range; no layer; several layers without
            ``valid``, or with ``resume`` or ``checkpoint``; a layer outside the model, or given with a distributed
            vector; ``init`` of another model; a minibatch that does not fit the memory; ``compute`` where it is not to
            be had; a state that does not fit; a
            checkpoint in no folder.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> tuned = fvlens.finetune(
        ...     model, split.train[:20], init="zero", layer=1, valid=split.valid, epochs=5, generator=g, progress=False
        ... )
        >>> bool(tuned.history.train_loss[-1] < tuned.history.train_loss[0])
        True

    References:
        Kang, Wu, Lu 2026, arXiv:2601.08169 (from digests of it).
    """
    check_arguments(finetune, locals(), trains=True)
    own, name = named_pairs(pairs, what="finetune: pairs", may_be_empty=True)
    if relation is None:
        relation = name or ("" if isinstance(init, str) else init.relation)
    seed = _seeds(1, generator)[0]
    task = Task(relation, own, as_pairs(valid, what="finetune: valid", may_be_empty=True), seed)
    how, running = settled("finetune", model, settings, options, getattr(init, "template", None))
    if isinstance(init, DistributedVector):
        if layer is not None:
            raise ValueError("finetune: a distributed vector acts at its heads' own layers; leave layer= out.")
        return _finetune_distributed(model, task, init, how, running)
    if isinstance(init, str) and init != "zero":
        raise ValueError(f"finetune: init={init!r}; expected a vector or 'zero'.")
    return _finetune_over(model, [task], [init], layer, how, running).runs[0]


def finetune_many(
    model: Any,
    relations: Mapping[str, Split | Pairs] | Sequence[str | Path | Relation] | str | Path,
    *,
    init: Mapping[str, FunctionVector] | Sequence[FunctionVector] | Literal["zero"],
    layer: int | Sequence[int] | None = None,
    n_train: int | None = 20,
    settings: Settings | None = None,
    generator: torch.Generator,
    **options: Unpack[TrainingOptions],
) -> FineTunedSet:
    """Train the vectors of many relations in one batched run.

    Each relation has its own loss, minibatches, learning rate, best epoch and stop, so the vectors are those that
    :func:`finetune` gives for one relation after another with the same generator, up to float rounding.

    Args:
        model: the model.
        relations: names, files, ``Relation``s (split here by ``generator``), a folder of files, or name ->
            ``Split`` or pairs.
        init: the start of each vector: by name, in the order of ``relations``, or ``"zero"``.
        layer: the layer of all vectors; by default that of ``init``. Of several, the best in mean validation top-1.
        n_train: training pairs of each relation, the first of its train part; None for all.
        settings, generator, options: as for :func:`finetune`.

    Returns:
        :class:`FineTunedSet`; ``.vectors`` is a :class:`VectorSet`.

    Raises:
        ValueError: as for :func:`finetune`; no relations; two of one name; a relation without a start; ``n_train``
            below 1.
    """
    check_arguments(finetune_many, locals(), trains=True)
    if isinstance(relations, Mapping):
        splits = {
            name: one if isinstance(one, Split) else as_relation(one, what=f"finetune_many: {name}").split(generator)
            for name, one in relations.items()
        }
    else:
        found = as_relations(relations, what="finetune_many", may_be_empty=True)
        splits = {one.name: one.split(generator) for one in found}
    if not splits:
        raise ValueError("finetune_many: expected at least one relation, got none.")
    if n_train is not None and n_train < 1:
        raise ValueError(f"finetune_many: expected n_train of at least 1, or None for all pairs, got {n_train}.")
    starts = _starts(init, list(splits))
    seeds = _seeds(len(splits), generator)
    tasks = [
        Task(
            name,
            as_pairs(split.train[:n_train], what=f"finetune_many: {name}", may_be_empty=True),
            as_pairs(split.valid, what=f"finetune_many: {name}", may_be_empty=True),
            seed,
        )
        for (name, split), seed in zip(splits.items(), seeds, strict=True)
    ]
    is_said = settings is not None or options.get("template") is not None
    template = None if is_said else _shared_template(starts)
    how, running = settled("finetune_many", model, settings, options, template)
    return _finetune_over(model, tasks, starts, layer, how, running)


def _seeds(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2**31, (n,), generator=generator).tolist()


def _starts(
    init: Mapping[str, FunctionVector] | Sequence[FunctionVector] | Literal["zero"], names: list[str]
) -> list[FunctionVector | Literal["zero"]]:
    if isinstance(init, str):
        if init != "zero":
            raise ValueError(f"finetune_many: init={init!r}; expected 'zero' or function vectors.")
        return ["zero"] * len(names)
    if isinstance(init, Mapping):
        missing = [name for name in names if name not in init]
        if missing:
            raise ValueError(f"finetune_many: init has no vector of {', '.join(missing)}.")
        return [init[name] for name in names]
    if len(init) != len(names):
        raise ValueError(f"finetune_many: {len(names)} relations, but {len(init)} vectors to start from.")
    return list(init)


def _shared_template(starts: Sequence[FunctionVector | Literal["zero"]]) -> Template | str | None:
    """The template of the starts; None if none of them knows its own."""
    found = {start.template for start in starts if isinstance(start, FunctionVector) and start.template}
    if len(found) > 1:
        raise ValueError(
            f"finetune_many: the starts are of {len(found)} templates ({', '.join(sorted(map(str, found)))}); give "
            "template=."
        )
    return next(iter(found), None)


def _layers(
    model: Any, layer: int | Sequence[int] | None, starts: Sequence[FunctionVector | Literal["zero"]], has_valid: bool
) -> list[int]:
    """The layers to try."""
    if layer is None:
        found = {start.layer for start in starts if isinstance(start, FunctionVector)}
        if len(found) != 1:
            said = f"the starts are of layers {sorted(found)}" if found else "init='zero' does not say where"
            raise ValueError(f"finetune: {said}; give layer=.")
        return list(found)
    layers = [layer] if isinstance(layer, int) else list(layer)
    outside = [one for one in layers if not 0 <= one < model.cfg.n_layers]
    if not layers or outside:
        raise ValueError(f"finetune: expected layers in 0..{model.cfg.n_layers - 1}, got {outside or layers}.")
    if len(layers) > 1 and not has_valid:
        raise ValueError("finetune: several layers, but no validation pairs to choose by; give valid= or one layer.")
    return layers


def _finetune_over(
    model: Any,
    tasks: Sequence[Task],
    starts: Sequence[FunctionVector | Literal["zero"]],
    layer: int | Sequence[int] | None,
    settings: Settings,
    running: Execution,
) -> FineTunedSet:
    """The best layer's training: best mean top-1 on the validation pairs, then lowest mean loss."""
    layers = _layers(model, layer, starts, all(task.valid for task in tasks))
    if len(layers) == 1:
        return _finetune_at(model, tasks, starts, layers[0], settings, running)
    if running.resume is not None or running.checkpoint is not None:
        raise ValueError(f"finetune: resume and checkpoint are for the training of one layer, got layers {layers}.")
    results: list[FineTunedSet] = []
    scores: list[tuple[int, float, float]] = []
    # a training keeps its finished epochs itself: what comes through here is an interruption before the first one
    with keeping(lambda: len(scores), len(layers), "finetune", "layers are done", stacklevel=3):
        for tried in layers:
            result = _finetune_at(model, tasks, starts, tried, settings, running)
            top1 = [float(run.history.valid_top1[run.best_epoch]) for run in result]
            losses = [float(run.history.valid_loss[run.best_epoch]) for run in result]
            results.append(result)
            scores.append((tried, sum(top1) / len(top1), sum(losses) / len(losses)))
            if not result.complete:
                break
    best = max(range(len(scores)), key=lambda i: (scores[i][1], -scores[i][2]))
    complete = len(results) == len(layers) and results[-1].complete
    seconds = sum(result.seconds for result in results)
    runs = (
        dataclasses.replace(
            run, vector=dataclasses.replace(run.vector, complete=complete), layer_scores=tuple(scores),
            complete=complete, seconds=seconds,
        )
        for run in results[best]
    )  # fmt: skip
    return FineTunedSet(tuple(runs), seconds)


def _finetune_at(
    model: Any,
    tasks: Sequence[Task],
    starts: Sequence[FunctionVector | Literal["zero"]],
    layer: int,
    settings: Settings,
    running: Execution,
) -> FineTunedSet:
    """All relations at one layer."""
    _want_pairs(tasks)
    known = [start if isinstance(start, FunctionVector) else None for start in starts]
    if running.check:
        for start in known:
            if start is not None:
                start.check(model)
    rows = [torch.zeros(model.cfg.d_model) if start is None else start.vector for start in known]
    trainable = TrainableVector(torch.stack(rows), layer, device=model_device(model))
    what = f"fine-tuning {tasks[0].name or 'a vector'}" if len(tasks) == 1 else f"fine-tuning {len(tasks)} relations"
    prompts = prompts_of(model, tasks, settings.template)
    note_other_bos(model, prompts, known, stacklevel=5)
    with frozen(model):
        kept = _kept(model, prompts, layer, running, stacklevel=5)
        training = Training(tasks, VectorChange(kept, trainable), settings)
        trained = _trained(training, running, what)
    runs = []
    at = 0
    for task, start, outcome in zip(tasks, known, trained.outcomes, strict=True):
        n_pairs = len(task.train) + len(task.valid)
        heads = () if start is None else start.heads
        data_hash = prompts.select(range(at, at + n_pairs)).data_hash
        vector = dataclasses.replace(outcome.result, heads=heads, data_hash=data_hash, complete=trained.complete)
        at += n_pairs
        runs.append(_fine_tuned(vector, task, outcome, settings, trained, kept))
    return FineTunedSet(tuple(runs), trained.seconds)


def _finetune_distributed(
    model: Any, task: Task, init: DistributedVector, settings: Settings, running: Execution
) -> FineTuned:
    """One relation's numbers of chosen heads."""
    _want_pairs([task])
    if running.check:
        init.check(model)
    if running.resume is not None and not isinstance(running.resume, TrainingState):
        running = dataclasses.replace(running, resume=TrainingState.load(running.resume))
    state = running.resume
    if isinstance(state, TrainingState) and running.path is None and state.header.get("path") == "naive":
        running = dataclasses.replace(running, path="naive")  # version 0.1 knew no other path
    trainable = TrainableDistributedVector(init).to(model_device(model))
    with frozen(model):
        prompts = prompts_of(model, [task], settings.template)
        note_other_bos(model, prompts, [init], stacklevel=4)
        kept = _kept(model, prompts, trainable.joins_after, running, stacklevel=4)
        training = Training([task], DistributedChange(kept, trainable), settings)
        trained = _trained(training, running, f"fine-tuning {task.name or 'heads'}")
    outcome = trained.outcomes[0]
    vector = dataclasses.replace(outcome.result, complete=trained.complete)
    return _fine_tuned(vector, task, outcome, settings, trained, kept)


def _kept(model: Any, prompts: Prompts, layer: int, running: Execution, *, stacklevel: int) -> SteerablePrompts:
    """The prompts, kept up to the layer; with a warning where that has to be whole passes."""
    kept = SteerablePrompts(
        model, prompts, layer, path=running.path, max_memory=running.max_memory, compute=running.compute
    )
    if kept.path == "naive" and running.path is None:
        told = f"finetune takes whole forward passes, which is slow ({kept.why_slow})."
        warnings.warn(told, stacklevel=stacklevel)
    return kept


def _want_pairs(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if not task.train:
            raise ValueError(f"finetune: no training pairs of {task.known_as}.")


def _trained(training: Training, running: Execution, what: str) -> Trained:
    return train(
        training, progress=running.progress, what=what, resume=running.resume, checkpoint=running.checkpoint,
        stacklevel=6,
    )  # fmt: skip


def _fine_tuned(
    vector: FunctionVector | DistributedVector,
    task: Task,
    outcome: Outcome,
    settings: Settings,
    trained: Trained,
    prompts: SteerablePrompts,
) -> FineTuned:
    return FineTuned(
        vector=vector,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        layer_scores=(),
        settings=settings,
        lr=outcome.lr,
        seed=task.seed,
        seconds=trained.seconds,
        path=prompts.path,
        batch_size=min(prompts.most_at_once, len(prompts)),
        compute=named_precision(prompts.compute),
        weights=prompts.weights,
        complete=trained.complete,
        state=trained.state,
    )
