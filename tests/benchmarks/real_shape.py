"""fvlens against plain loops on the shape of SmolLM2-135M: one function a row of the table.

Both sides run in turns in one process, with the threads that PyTorch takes; medians count. Slow sides are timed on a
sample, which each row names, and extrapolated; ``--full`` times all of it. The plain Hugging Face side takes the faster
of its two ways to attend (``sdpa``, ``eager``), tried out on the row's own job.

    python tests/benchmarks/real_shape.py [effects sweep controls epoch epoch-whole step step-whole many run]

Without names: every row but ``run``. Options: ``--full``, ``--runs N``, and ``--processor`` for a machine that others
use too (one thread, seconds of the processor). Steps and epochs of a training are seen from outside: PyTorch tells
when any of its optimisers has made a step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # as a script: the folder of the tests, where pytest finds everything
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from oracle import loops, loops_01
from real_shapes import ANSWER_LENGTHS, QUERY_LENGTHS, likely_pairs, real_shape, word_pairs
from torch.optim.optimizer import register_optimizer_step_post_hook

import fvlens
from benchmarks.machine import (
    Comparison,
    Count,
    Side,
    changes_by_passes,
    controls_by_suffix,
    count_processor_time,
    effects_by_passes,
    effects_by_suffix,
    in_turns,
    measure_machine,
    median,
    now,
    seconds,
    sweep_by_suffix,
    training_by_passes,
    training_by_suffix,
)
from fvlens.relations import Split

LAYER = 10
"""The block that trained vectors are added behind."""
BATCH_SIZE, N_TRAIN, N_VALID = 5, 20, 8
N_STEPS = N_TRAIN // BATCH_SIZE
"""Steps in an epoch."""
BARS = {"effects": 75, "sweep, 0.1": 15, "sweep, plain": 5, "controls": 10, "epoch": 4.5, "epoch-whole": 5}
BARS |= {"step": 1.6, "step-whole": 1.6}
MANY_SECONDS, RUN_SECONDS = 300, 100


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row measured, and how far both sides agree.

    Attributes:
        comparisons: the ratios.
        differences: what -> (largest difference found, bound).
        movements: what -> (largest change that the job made, least change for the comparison to mean something).
    """

    comparisons: list[Comparison]
    differences: dict[str, tuple[float, float]]
    movements: dict[str, tuple[float, float]]

    def report(self, machine):
        lines = [comparison.report(machine) for comparison in self.comparisons]
        lines += [f"  {what}: {found:.1e} (at most {bound:g})" for what, (found, bound) in self.differences.items()]
        lines += [f"  {what}: {found:.2g} (at least {bound:g})" for what, (found, bound) in self.movements.items()]
        return "\n".join(lines)


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


def spread(n, whole):
    """``n`` of ``range(whole)``, evenly, the first and the last among them."""
    return sorted({round(i * (whole - 1) / max(1, n - 1)) for i in range(n)})


def faster_attention(plain, job):
    """Set the plain model to whichever of its ways to attend is faster at this job, and name it."""
    times = {}
    for name in ("sdpa", "eager"):
        plain.set_attn_implementation(name)
        job()  # warm-up
        times[name] = min(seconds(job)[0] for _ in range(2))
    best = min(times, key=times.__getitem__)
    plain.set_attn_implementation(best)
    return f"{best} ({', '.join(f'{name} {1000 * spent:.0f} ms' for name, spent in times.items())})"


@contextlib.contextmanager
def step_times():
    """Moments at which an optimiser of PyTorch has made a step inside the block."""
    moments = []
    handle = register_optimizer_step_post_hook(lambda *_: moments.append(now()))
    try:
        yield moments
    finally:
        handle.remove()


def bare_prompts(real, pairs):
    """The bare query of each pair, in order."""
    return fvlens.build_prompts(real.model, [], queries=pairs, n_shots=0, generator=seeded())


def real_vector(real, pairs, *, layer, scale=4.0):
    """A function vector of ten heads spread over the model, large enough to move answers, and the means behind it."""
    clean = fvlens.build_prompts(real.model, pairs, n_prompts=4, n_shots=2, generator=seeded())
    means = fvlens.mean_head_activations(real.model, clean, progress=False)
    heads = [(one, one % real.shape.n_heads) for one in spread(10, real.shape.n_layers)]
    return scale * fvlens.function_vector(real.model, means, heads=heads, layer=layer), means


# --- attribution ---


def effects(real, *, full=False, n_turns=2, n_cells=4):
    """Exact effects of all heads, 25 prompts of 97 tokens, over one hooked pass a head."""
    model, plain, shape = real.model, real.plain, real.shape
    pairs = word_pairs(model, 60, query_lengths=[1], answer_lengths=[2], seed=0)
    g = seeded()
    clean = fvlens.build_prompts(model, pairs, n_prompts=8, n_shots=10, generator=g)
    prompts = fvlens.build_prompts(model, pairs, n_prompts=25, n_shots=10, labels="permuted", generator=g)
    tokens, mask = prompts.tokens, prompts.attention_mask
    with torch.no_grad():
        probabilities = loops.last_logits(plain, tokens, mask).softmax(dim=-1)
    baseline, likely = probabilities.max(dim=-1)
    prompts = dataclasses.replace(prompts, answer_tokens=likely[:, None])
    means = fvlens.mean_head_activations(model, clean, progress=False)
    means = dataclasses.replace(means, z=8 * means.z)  # far from what the heads say
    cells = [(layer, (5 * layer + 1) % shape.n_heads) for layer in spread(n_cells, shape.n_layers)]
    if full:
        cells = [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    few = slice(0, 5)
    attention = faster_attention(plain, lambda: loops.answer_probability(plain, tokens[few], mask[few], likely[few]))
    fvlens.indirect_effects(model, prompts.select([0, 1]), means, progress=False)  # warm-up
    found, times = {}, []

    def slow(turn):
        for cell in cells[turn::n_turns]:
            spent, found[cell] = seconds(
                lambda cell=cell: loops.patched_probability(plain, tokens, mask, likely, means.z, *cell)
            )
            times.append(spent)

    sides, results = in_turns(
        n_turns, fast=lambda _: fvlens.indirect_effects(model, prompts, means, progress=False), slow=slow
    )
    ours = results["fast"][-1]
    n_pos, n_all = tokens.shape[1], shape.n_layers * shape.n_heads
    comparison = Comparison(
        f"effects of {n_all} heads, {len(prompts)} prompts of {n_pos} tokens",
        Side(
            "fvlens.indirect_effects",
            median(sides["fast"]),
            f"median of {n_turns} calls, path {getattr(ours, 'path', '?')}",
            effects_by_suffix(shape, len(prompts), n_pos),
        ),
        Side(
            "plain Hugging Face, a pass a head",
            (1 + n_all) * median(times),
            f"{median(times):.2f} s a pass, from {len(times)} of {1 + n_all} passes; {attention}",
            effects_by_passes(shape, len(prompts), n_pos),
        ),
        BARS["effects"],
    )
    differences = [
        float((ours.baseline + ours.cie[:, layer, head] - patched).abs().max())
        for (layer, head), patched in found.items()
    ]
    return Row(
        [comparison],
        {
            "difference of a patched probability": (max(differences), 1e-5),
            "difference of an unpatched probability": (float((ours.baseline - baseline).abs().max()), 1e-5),
        },
        {"largest effect": (max(float((patched - baseline).abs().max()) for patched in found.values()), 0.01)},
    )


# --- sweeps and controls ---


def sweep(real, *, full=False, n_turns=3, n_sample=5):
    """A vector behind each layer, 9 bare queries with one-token answers, over 0.1's loop and over plain passes."""
    model, plain, shape = real.model, real.plain, real.shape
    given = word_pairs(model, 9, query_lengths=[1, 1, 2], answer_lengths=[1], seed=1)
    pairs = likely_pairs(real, given)
    vector, _ = real_vector(real, given, layer=0)
    prompts = bare_prompts(real, pairs)
    own = (prompts.tokens, prompts.attention_mask)
    first = prompts.answer_tokens[:, 0]
    layers = list(range(shape.n_layers)) if full else spread(n_sample, shape.n_layers)
    attention = faster_attention(plain, lambda: loops.layer_sweep(plain, *own, first, vector.vector, layers[:2]))

    def fast(_):
        return fvlens.layer_sweep(model, pairs, vector, generator=seeded(), progress=False)

    def old(_):
        return loops_01.layer_sweep(model, *own, prompts.answer_tokens, vector.vector, layers)

    def passes(_):
        return loops.layer_sweep(plain, *own, first, vector.vector, layers)

    fast(0)  # warm-up
    times, results = in_turns(n_turns, fast=fast, old=old, passes=passes)
    n_all, n_pos = shape.n_layers, own[0].shape[1]
    fast_side = Side(
        "fvlens.layer_sweep",
        median(times["fast"]),
        f"median of {n_turns} calls",
        sweep_by_suffix(shape, len(pairs), n_pos),
    )
    old_side = Side(
        "loop of 0.1",
        median(times["old"]) * (1 + n_all) / (1 + len(layers)),
        f"from {len(layers)} of {n_all} layers and no vector, {n_turns} times",
        changes_by_passes(shape, len(pairs), n_pos, 1 + n_all),
    )
    plain_side = Side(
        f"{n_all} plain Hugging Face passes",
        median(times["passes"]) * n_all / len(layers),
        f"from {len(layers)} of {n_all} layers, {n_turns} times; {attention}",
        changes_by_passes(shape, len(pairs), n_pos, n_all),
    )
    title = f"layer sweep, {len(pairs)} queries of {n_pos} tokens x {n_all} layers, over"
    swept, before = results["fast"][-1], results["old"][-1]
    moved, apart, misranked, apart_01 = [], [], 0, []
    for layer in layers:
        ours = swept.evaluations[swept.layers.index(layer)]
        _, log_probability, logits = loops.steered_scores(plain, *own, first, vector.vector, layer)
        apart.append(float((ours.probabilities - log_probability.exp()).abs().max()))
        apart_01.append(float((ours.log_probabilities - before[layer].whole).abs().max()))
        moved.append(float((ours.probabilities - swept.baseline.probabilities).abs().max()))
        wanted = logits.gather(1, first[:, None])
        # logits differ by about 1e-5 of their size between the two classes, and so near to another's a rank may change
        low, high = ((logits > wanted + 1e-3).sum(dim=1), (logits > wanted - 1e-3).sum(dim=1))
        misranked += int(((ours.ranks < low) | (ours.ranks > high)).sum())
    return Row(
        [
            Comparison(f"{title} 0.1's loop", fast_side, old_side, BARS["sweep, 0.1"]),
            Comparison(f"{title} plain passes", fast_side, plain_side, BARS["sweep, plain"]),
        ],
        {
            "difference of a probability to Hugging Face": (max(apart), 1e-5),
            "difference of a log-probability to 0.1's loop": (max(apart_01), 1e-3),
            "ranks that are not Hugging Face's": (float(misranked), 0),
        },
        {"largest change of a probability": (max(moved), 0.01)},
    )


def control_table(real, *, full=False, n_turns=2, n_sample=3, n_random=10, n_others=8, layer=15):
    """30 changes behind one layer, 24 queries with whole answers, over 0.1's loop.

    The table has two rows with demonstrations, which are not what is measured: they show one, and the time of the two
    evaluations alone is taken off.
    """
    model, shape = real.model, real.shape
    pairs = word_pairs(model, 24, query_lengths=QUERY_LENGTHS, answer_lengths=ANSWER_LENGTHS, seed=2)
    shown = word_pairs(model, 12, query_lengths=[1], answer_lengths=[1], seed=3)
    vector, means = real_vector(real, shown, layer=layer)
    others = [
        dataclasses.replace(fvlens.random_vector_like(vector, seeded(i)), relation=f"other {i}")
        for i in range(n_others)
    ]
    prompts = bare_prompts(real, pairs)
    own = (prompts.tokens, prompts.attention_mask, prompts.answer_tokens)
    n_changes = 2 + 2 * n_random + n_others
    sample = [None, vector.vector, *(other.vector for other in others)]
    sample = sample + [vector.vector] * (n_changes - len(sample)) if full else sample[:n_sample]
    settings = dict(demonstrations=shown, n_shots=1)
    spent = []

    def fast(_):
        whole, table = seconds(
            lambda: fvlens.controls(
                model, pairs, vector, others=others, means=means, n_random=n_random, **settings,
                generator=seeded(), progress=False,
            )
        )  # fmt: skip
        aside = [
            seconds(lambda name=name: fvlens.evaluate(model, pairs, setting=name, **settings, generator=seeded()))[0]
            for name in ("icl", "shuffled")
        ]
        spent.append((whole - sum(aside), sum(aside)))
        return table

    fvlens.evaluate(model, pairs[:2], vector=vector, generator=seeded())  # warm-up
    times, results = in_turns(n_turns, fast=fast, old=lambda _: loops_01.controls(model, *own, sample, layer))
    n_suffix = float(prompts.answer_mask.sum(dim=1).float().mean())
    n_pos = own[0].shape[1]
    comparison = Comparison(
        f"controls, {len(pairs)} queries of {n_pos} tokens x {n_changes} changes behind layer {layer}",
        Side(
            "fvlens.controls",
            median([rest for rest, _ in spent]),
            f"median of {n_turns} calls, less {median([aside for _, aside in spent]):.2f} s of the in-context rows",
            controls_by_suffix(shape, len(pairs), n_pos, layer, n_changes, n_suffix),
        ),
        Side(
            "loop of 0.1",
            median(times["old"]) * n_changes / len(sample),
            f"from {len(sample)} of {n_changes} changes, {n_turns} times",
            changes_by_passes(shape, len(pairs), n_pos + n_suffix - 1, n_changes)
            + Count(n_changes * len(pairs) * (n_suffix - 1) * shape.unembedding, 0),
        ),
        BARS["controls"],
        (f"answers of {n_suffix:.2f} tokens on average, up to {own[2].shape[1]}",),
    )
    table, before = results["fast"][-1], results["old"][-1]
    by_kind = {row.kind: row.evaluations[0] for row in table.rows if row.kind in ("no_vector", "vector")}
    apart = [
        float((by_kind[kind].log_probabilities - scores.whole).abs().max())
        for kind, scores in zip(("no_vector", "vector"), before, strict=False)
    ]
    moved = (by_kind["vector"].log_probabilities - by_kind["no_vector"].log_probabilities).abs().max()
    return Row(
        [comparison],
        {"difference of a log-probability to 0.1's loop": (max(apart), 1e-3)},
        {"largest change of a log-probability": (float(moved), 0.1)},
    )


# --- training ---


class Pairs:
    """Relations of random pairs, for both sides: splits, the rows of each part, and the bare prompts of all rows."""

    def __init__(self, real, n_relations, *, whole, n_train=N_TRAIN, n_valid=N_VALID):
        lengths = ANSWER_LENGTHS if whole else [1]
        self.splits, every = {}, []
        self.train, self.valid = [], []
        for i in range(n_relations):
            pairs = word_pairs(
                real.model, n_train + n_valid, query_lengths=QUERY_LENGTHS, answer_lengths=lengths, seed=100 + i
            )
            made = [fvlens.relations.Pair(*pair) for pair in pairs]
            self.splits[f"relation {i}"] = Split(tuple(made[:n_train]), tuple(made[n_train:]), (), "input")
            self.train.append(torch.arange(len(every), len(every) + n_train))
            self.valid.append(torch.arange(len(every) + n_train, len(every) + n_train + n_valid))
            every += pairs
        self.prompts = bare_prompts(real, every)
        self.n_answer = self.prompts.answer_mask.sum(dim=1)
        self.n_pos = self.prompts.tokens.shape[1]

    def plain(self, real, lr=0.1):
        """The training over the plain model, from zero."""
        prompts = self.prompts
        start = torch.zeros(len(self.splits), real.shape.d_model)
        own = (prompts.tokens, prompts.attention_mask, prompts.answer_tokens)
        return loops.VectorTraining(real.plain, *own, start, LAYER, lr)

    def minibatch(self, step):
        """The minibatches of one step: rows, and the relation of each."""
        return loops.joined([rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE] for rows in self.train])

    def counted(self, rows):
        """Rows, positions with the padding and answers read, of so many rows at once; answers of average length."""
        mean = float(self.n_answer.float().mean())
        return rows, self.n_pos + int(self.n_answer.max()) - 1, rows * mean

    def describe(self):
        mean = float(self.n_answer.float().mean())
        return (
            f"answers of {mean:.2f} tokens on average, up to {int(self.n_answer.max())}; queries padded to "
            f"{self.n_pos} tokens"
        )


def training_agrees(real, *, whole, n_relations=4, n_pairs=5, lr=0.1):
    """Two steps of a few relations on both sides: relative differences of losses and of vectors."""
    data = Pairs(real, n_relations, whole=whole, n_train=n_pairs, n_valid=0)
    runs = fvlens.finetune_many(
        real.model, data.splits, init="zero", layer=LAYER, epochs=2, batch_size=None, lr=lr, schedule="constant",
        generator=seeded(), progress=False,
    )  # fmt: skip
    plain = data.plain(real, lr)
    everything = loops.joined(data.train)
    losses = [plain.score(*everything)]
    for _ in range(2):
        losses.append(plain.score(*everything))  # an epoch's loss is that of its steps, before each
        plain.step(*everything)
    expected, vectors = torch.stack(losses, dim=1), plain.vectors.detach()
    ours = torch.stack([run.history.train_loss for run in runs])
    matrix = torch.stack([run.vector.vector for run in runs])
    return (
        {
            "relative difference of losses": (float(((ours - expected) / expected).abs().max()), 1e-4),
            "relative difference of vectors after two steps": (
                float((matrix - vectors).norm() / vectors.norm()),
                1e-3,
            ),
        },
        {"largest fall of a loss, in nats": (float((expected[:, 1] - expected[:, 2]).max()), 0.01)},
    )


def _moments_checked(moments, n):
    if len(moments) != n:
        raise RuntimeError(f"expected {n} steps of an optimiser of PyTorch, got {len(moments)}.")
    return moments


def epoch(real, *, whole=False, full=False, n_turns=2, n_relations=14):
    """An epoch of one vector a relation: 4 steps, then the losses of the validation pairs."""
    data = Pairs(real, n_relations, whole=whole)
    plain, shape = data.plain(real), real.shape
    attention = faster_attention(real.plain, lambda: plain.score(data.train[0], torch.zeros(N_TRAIN, dtype=torch.long)))
    n_epochs = 4 if full else 2
    some = range(N_STEPS) if full else range(2)
    steps, scores = [], []

    def fast(_):
        with step_times() as moments:
            fvlens.finetune_many(
                real.model, data.splits, init="zero", layer=LAYER, epochs=n_epochs, batch_size=BATCH_SIZE,
                generator=seeded(), progress=False,
            )  # fmt: skip
        _moments_checked(moments, n_epochs * N_STEPS)
        return (moments[-1] - moments[N_STEPS - 1]) / (n_epochs - 1)

    def slow(_):
        steps.extend(seconds(lambda step=step: plain.step(*data.minibatch(step)))[0] for step in some)
        scores.append(seconds(lambda: plain.score(*loops.joined(data.valid)))[0])

    _, results = in_turns(n_turns, fast=fast, slow=slow)
    row = [data.counted(n_relations * BATCH_SIZE)] * N_STEPS
    scored = [data.counted(n_relations * N_VALID)]
    name = "epoch-whole" if whole else "epoch"
    comparison = Comparison(
        f"training epoch, {n_relations} relations x {N_TRAIN} pairs behind layer {LAYER}, minibatch {BATCH_SIZE}",
        Side(
            "fvlens.finetune_many",
            median(results["fast"]),
            f"from the last step of one epoch to that of the next, {n_turns} trainings",
            training_by_suffix(shape, LAYER, row, scored),
        ),
        Side(
            "the loop over plain Hugging Face",
            N_STEPS * median(steps) + median(scores),
            f"from {len(some)} of {N_STEPS} steps and the whole scoring, {n_turns} times; {attention}",
            training_by_passes(shape, LAYER, row, scored),
        ),
        BARS[name],
        (f"{data.describe()}; {n_relations * N_VALID} validation pairs",),
    )
    return Row([comparison], *training_agrees(real, whole=whole))


def step(real, *, whole=False, full=False, n_turns=3, n_epochs=3):
    """One step of 5 pairs of one relation."""
    data = Pairs(real, 1, whole=whole, n_valid=0)
    plain, shape = data.plain(real), real.shape
    attention = faster_attention(real.plain, lambda: plain.step(*data.minibatch(0)))
    (split,) = data.splits.values()
    n_epochs = 3 * n_epochs if full else n_epochs

    def fast(_):
        with step_times() as moments:
            fvlens.finetune(
                real.model, split.train, init="zero", layer=LAYER, epochs=n_epochs, batch_size=BATCH_SIZE,
                generator=seeded(), progress=False,
            )  # fmt: skip
        _moments_checked(moments, n_epochs * N_STEPS)
        # within an epoch: nothing is scored between two steps
        return [moments[i] - moments[i - 1] for i in range(len(moments)) if i % N_STEPS]

    def slow(_):
        return [
            seconds(lambda i=i: plain.step(*data.minibatch(i % N_STEPS)))[0] for i in range(n_epochs * (N_STEPS - 1))
        ]

    _, results = in_turns(n_turns, fast=fast, slow=slow)
    times = {name: [spent for turn in turns for spent in turn] for name, turns in results.items()}
    row = [data.counted(BATCH_SIZE)]
    name = "step-whole" if whole else "step"
    comparison = Comparison(
        f"one step of {BATCH_SIZE} pairs of one relation behind layer {LAYER}",
        Side(
            "fvlens.finetune",
            median(times["fast"]),
            f"between two steps of an epoch, median of {len(times['fast'])}",
            training_by_suffix(shape, LAYER, row, []),
        ),
        Side(
            "plain Hugging Face",
            median(times["slow"]),
            f"median of {len(times['slow'])} steps; {attention}",
            training_by_passes(shape, LAYER, row, []),
        ),
        BARS[name],
        (data.describe(),),
    )
    return Row([comparison], *training_agrees(real, whole=whole, n_relations=1))


ROWS = {
    "effects": effects,
    "sweep": sweep,
    "controls": control_table,
    "epoch": epoch,
    "epoch-whole": lambda real, **options: epoch(real, whole=True, **options),
    "step": step,
    "step-whole": lambda real, **options: step(real, whole=True, **options),
}
"""What the tests assert."""


# --- too long for a test ---


def many(real, machine, *, full=False, n_relations=145, n_epochs=20):
    """Seconds of a whole ``finetune_many``, in words."""
    data = Pairs(real, n_relations, whole=True)
    run_epochs = n_epochs if full else 2
    with step_times() as moments:
        spent, _ = seconds(
            lambda: fvlens.finetune_many(
                real.model, data.splits, init="zero", layer=LAYER, epochs=run_epochs, batch_size=BATCH_SIZE,
                generator=seeded(), progress=False,
            )
        )  # fmt: skip
    _moments_checked(moments, run_epochs * N_STEPS)
    one = (moments[-1] - moments[N_STEPS - 1]) / (run_epochs - 1)
    total = spent + (n_epochs - run_epochs) * one
    row, scored = data.counted(n_relations * BATCH_SIZE), data.counted(n_relations * N_VALID)
    counted = n_epochs * training_by_suffix(real.shape, LAYER, [row] * N_STEPS, [scored])
    share, _ = counted.shares(machine, total)
    return (
        f"\nfinetune_many, {n_relations} relations x {N_TRAIN} pairs x {n_epochs} epochs: {total:.0f} s "
        f"(bar {MANY_SECONDS} s)\n  {one:.2f} s an epoch, from {run_epochs} epochs; {data.describe()}\n"
        f"  counted {counted.operations / 1e9:.0f} GFLOP without the prefixes ({share:.0%} of the matmul rate)"
    )


STAGES = {
    ("fvlens.report._settings", "load_model"): "load the model",
    ("fvlens.find", "mean_head_activations"): "task means, four relations",
    ("fvlens.find", "indirect_effects"): "effects of all heads, four relations",
    ("fvlens.find", "layer_scale_sweep"): "layer and scale",
    ("fvlens.report._run", "finetune_many"): "training, four relations",
    ("fvlens.report._run", "controls"): "controls, in-context rows among them",
    ("fvlens.report._run", "evaluate"): "other scores",
    ("fvlens.report", "write_run"): "files and page",
}
"""Where the command looks each stage up -> what it is called."""


def stages_of_run(folder, out, counted):
    """Run the command in this process and print, as JSON, seconds and counted operations of each stage."""
    import importlib

    from torch.utils.flop_counter import FlopCounterMode

    spent = {name: [0.0, 0] for name in STAGES.values()}

    def timed(function, name):
        def call(*args, **kwargs):
            counter = FlopCounterMode(display=False) if counted else contextlib.nullcontext()
            with counter:
                taken, value = seconds(lambda: function(*args, **kwargs))
            spent[name][0] += taken
            spent[name][1] += counter.get_total_flops() if counted else 0
            return value

        return call

    for (module, function), name in STAGES.items():
        place = importlib.import_module(module)
        setattr(place, function, timed(getattr(place, function), name))
    from fvlens.cli import main

    arguments = ["run", "verb-past", "--model", str(folder), "--device", "cpu", "--out", str(out), "--quiet"]

    def command():
        with contextlib.suppress(SystemExit):
            main(arguments)

    whole, _ = seconds(command)
    print("stages:" + json.dumps({"whole": whole, "stages": spent}))


def run(folder, machine, *, full=False):
    """Seconds of ``fvlens run verb-past`` with default options on a checkpoint, stage by stage, in words.

    With ``full`` it runs a second time to count the operations of each stage, which is slower; the seconds are those of
    the first.
    """
    found = []
    with tempfile.TemporaryDirectory() as out:
        for counted in (False, True)[: 1 + full]:
            code = (
                f"import sys; sys.path[0] = {str(Path(__file__).parents[1])!r}; "
                f"from benchmarks.real_shape import stages_of_run; stages_of_run({str(folder)!r}, {out!r}, {counted})"
            )
            spent, done = seconds(
                lambda code=code: subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
                )
            )
            told = [line for line in done.stdout.splitlines() if line.startswith("stages:")]
            if done.returncode or not told:
                raise RuntimeError(f"fvlens run ended with {done.returncode}: {done.stderr[-2000:]}")
            found.append((spent, json.loads(told[0].removeprefix("stages:"))))
    spent, times = found[0]
    rest = spent - sum(taken for taken, _ in times["stages"].values())
    lines = [f"\nfvlens run verb-past: {spent:.0f} s (bar {RUN_SECONDS} s)"]
    for name, (taken, _) in times["stages"].items():
        line = f"  {name}: {taken:.1f} s"
        operations = found[-1][1]["stages"][name][1]
        if operations:
            share = operations / 1e9 / taken / machine.matmul
            line += f", {operations / 1e9:.0f} GFLOP counted, {share:.0%} of the matmul rate"
        lines.append(line)
    return "\n".join([*lines, f"  imports and all else: {rest:.1f} s"])


def main():
    names = [*ROWS, "many", "run"]
    parser = argparse.ArgumentParser(description="Rows of the table of speeds on the shape of SmolLM2-135M.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}; all but run by default")
    parser.add_argument("--full", action="store_true", help="time whole slow sides and all epochs; takes long")
    parser.add_argument("--runs", type=int, default=1, help="times to measure each row")
    parser.add_argument("--checkpoint", type=Path, help="a folder for `run` instead of random weights")
    parser.add_argument("--processor", action="store_true", help="one thread, seconds of the processor (busy machines)")
    given = parser.parse_args()
    unknown = [name for name in given.rows if name not in names]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; expected {', '.join(names)}")
    if given.processor:
        count_processor_time()
    with real_shape() as real:
        for _ in range(given.runs):
            for name in given.rows or names[:-1]:
                machine = measure_machine()
                if name == "run":
                    text = run(given.checkpoint or real.folder, machine, full=given.full)
                elif name == "many":
                    text = many(real, machine, full=given.full)
                else:
                    row = ROWS[name](real, full=given.full)
                    machine = machine.averaged(measure_machine())
                    text = row.report(machine)
                print(f"{text}\n  {machine}", flush=True)


if __name__ == "__main__":
    main()
