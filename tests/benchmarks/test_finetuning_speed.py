"""Fine-tuning: the suffix against plain whole forward passes, side by side in one process.

Plain: as anyone would write it. The model's parameters take no gradient; its forward runs on the whole batch under a
hook that adds the vector at the last token; the loss is the cross-entropy of the last logits; Adam steps on the vector.
Suffix: one step of ``fvlens.training``'s training, prefixes kept from before. Both take the same pairs.

Steps are measured in turns on one thread, in seconds of the processor, so that a busy machine changes little; the
medians count. Whole trainings are measured by the clock, with the threads that the machine has.

Run with ``pytest -m benchmark -s tests/benchmarks/test_finetuning_speed.py``.
"""

import statistics
import time

import pytest
import torch
from conftest import needs_hooked, random_model
from torch.nn import functional as F

import fvlens
from fvlens.interventions import resid_hook
from fvlens.models import fingerprint
from fvlens.training import (
    Settings,
    SteerablePrompts,
    Task,
    TrainableVector,
    Training,
    VectorChange,
    finetune,
    finetune_many,
    frozen,
)

N_TURNS, N_STEPS, N_SECONDS = 4, 5, 6
"""Turns of each side at least, steps in a turn, and seconds that all turns take at least; the median step counts.

A few turns of steps of 7 ms are over in a second, and on a shared machine the ratio of such a second lies anywhere from
4.3 to 5.7. So short steps get more turns.
"""


def seconds(function, clock=time.perf_counter):
    """Time of one call, and what it gives."""
    start = clock()
    result = function()
    return clock() - start, result


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relations_with(n_pairs, n):
    """The first library relations of at least so many pairs."""
    names = [name for name in fvlens.list_relations() if len(fvlens.load_relation(name)) >= n_pairs]
    assert len(names) >= n
    return names[:n]


def splits_of(n_relations):
    g = torch.Generator().manual_seed(0)
    return {name: fvlens.load_relation(name).split(g) for name in relations_with(40, n_relations)}


class Plain:
    """One vector a relation, trained by whole forward passes over all relations' minibatches."""

    def __init__(self, model, tasks, layer, lr):
        self.model, self.layer = model, layer
        self.vectors = torch.zeros(len(tasks), model.cfg.d_model, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.vectors], lr=lr)
        self.prompts = SteerablePrompts.of(model, tasks, layer=layer).prompts

    def loss(self, rows, relation):
        vectors = self.vectors[relation]

        def add(resid, hook):
            resid = resid.clone()
            resid[:, -1] += vectors
            return resid

        with self.model.hooks(fwd_hooks=[(resid_hook(self.layer), add)]):
            logits = self.model(self.prompts.tokens[rows], attention_mask=self.prompts.attention_mask[rows])[:, -1]
        return F.cross_entropy(logits, self.prompts.first_answer_token[rows], reduction="none")

    def step(self, rows, relation, n):
        self.optimiser.zero_grad()
        (self.loss(rows, relation).sum() / n).backward()
        self.optimiser.step()


def measure_steps(model, *, n_relations, batch_size, layer):
    """Both sides' median time of one step over the same pairs, and the largest difference of the trained vectors."""
    tasks = [Task(name, split.train[:20], (), 0) for name, split in splits_of(n_relations).items()]
    trainable = TrainableVector(torch.zeros(n_relations, model.cfg.d_model), layer)
    prompts = SteerablePrompts.of(model, tasks, layer=layer, path="weights")
    training = Training(tasks, VectorChange(prompts, trainable), Settings(lr=0.05, batch_size=batch_size))
    plain = Plain(model, tasks, layer, lr=0.05)
    batch = [torch.arange(20 * i, 20 * i + batch_size) for i in range(n_relations)]
    rows, relation = torch.cat(batch), torch.arange(n_relations).repeat_interleave(batch_size)
    times = {"suffix": [], "plain": []}
    steps = {"suffix": lambda: training._step(batch), "plain": lambda: plain.step(rows, relation, batch_size)}

    def turn():
        """So many steps of each side in a row, as training takes them."""
        return {name: [seconds(step, time.process_time)[0] for _ in range(N_STEPS)] for name, step in steps.items()}

    with frozen(model):
        turn()  # warm-up
        while len(times["plain"]) < N_TURNS * N_STEPS or sum(map(sum, times.values())) < N_SECONDS:
            for name, spent in turn().items():
                times[name] += spent
    medians = {name: statistics.median(values) for name, values in times.items()}
    difference = (trainable.matrix - plain.vectors).detach()
    return dict(
        **medians,
        n_steps=len(times["plain"]),
        n_rows=len(rows),
        n_pos=prompts.tokens.shape[1],
        ratio=medians["plain"] / medians["suffix"],
        difference=float(difference.norm() / plain.vectors.detach().norm()),
    )


def show(capsys, title, m):
    with capsys.disabled():
        print(
            f"\n{title}: {m['n_rows']} pairs of {m['n_pos']} tokens in a step, {torch.get_num_threads()} threads\n"
            f"  plain forward and backward {1000 * m['plain']:9.1f} ms  (median of {m['n_steps']})\n"
            f"  suffix                     {1000 * m['suffix']:9.1f} ms\n"
            f"  ratio                      {m['ratio']:9.1f}\n"
            f"  relative difference of the vectors after {m['n_steps'] + N_STEPS} steps: {m['difference']:.1e}"
        )


@needs_hooked
@pytest.mark.benchmark
def test_a_step_on_the_embedded_model(model, capsys, one_thread, unchecked):
    """A step of one relation's 20 pairs, and one of ``finetune_many``. Minibatches of 5 pairs are shown beside them.

    Much of so small a step does not depend on its pairs (see this folder's README).
    """
    for n_relations, batch_size, bar in ((1, 5, 0), (1, 20, 4), (64, 5, 4)):
        m = measure_steps(model, n_relations=n_relations, batch_size=batch_size, layer=1)
        show(capsys, f"one training step of {n_relations} relations on rel-small, layer 1 of 4", m)
        assert m["difference"] < 1e-3
        assert m["ratio"] >= bar


@needs_hooked
@pytest.mark.benchmark
def test_a_step_on_a_model_of_twelve_layers(capsys, one_thread, unchecked):
    model = random_model(n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072, initializer_range=0.05)
    m = measure_steps(model, n_relations=1, batch_size=20, layer=4)
    show(capsys, "one training step on 12 layers of d_model 768, layer 4", m)
    assert m["difference"] < 1e-3
    assert m["ratio"] >= 4


@needs_hooked
@pytest.mark.benchmark
def test_64_relations_at_once(model, capsys):
    """Whole trainings with validation after each epoch: all in one run, one by one, and by plain whole passes."""
    splits, epochs, some = splits_of(64), 20, 3
    fingerprint(model)
    g = torch.Generator()
    spent_many, runs = seconds(
        lambda: finetune_many(model, splits, init="zero", layer=1, epochs=epochs, generator=g, progress=False)
    )

    def plainly(name, lr):
        """One relation by whole passes, validation after each epoch as in the batched run."""
        split = splits[name]
        task = Task(name, split.train[:20], split.valid, 0)
        plain = Plain(model, [task], 1, lr)
        everything = torch.arange(len(plain.prompts))
        train, valid = everything[:20], everything[20:]
        nobody = torch.zeros(len(everything), dtype=torch.long)
        with frozen(model):
            for _ in range(epochs):
                for rows in train[torch.randperm(20, generator=g)].split(5):
                    plain.step(rows, nobody[:5], 5)
                with torch.no_grad():
                    for part in (train, valid):
                        plain.loss(part, nobody[: len(part)])

    one_by_one, plain_times = [], []
    for name in list(splits)[:: 64 // some][:some]:
        split, lr = splits[name], runs[name].lr
        spent, _ = seconds(
            lambda split=split: finetune(
                model, split.train[:20], init="zero", layer=1, valid=split.valid, epochs=epochs, generator=g,
                progress=False,
            )
        )  # fmt: skip
        one_by_one.append(spent)
        spent, _ = seconds(lambda name=name, lr=lr: plainly(name, lr))
        plain_times.append(spent)
    suffix, plain = (64 * statistics.mean(times) for times in (one_by_one, plain_times))
    with capsys.disabled():
        print(
            f"\n64 relations x 20 pairs, {epochs} epochs on rel-small, {torch.get_num_threads()} threads\n"
            f"  one batched run              {spent_many:8.1f} s\n"
            f"  suffix runs one by one       {suffix:8.1f} s  (from {some} of them), ratio {suffix / spent_many:.1f}\n"
            f"  plain runs one by one        {plain:8.1f} s  (from {some} of them), ratio {plain / spent_many:.1f}"
        )
    assert all(len(run.history) == epochs + 1 for run in runs)
    assert spent_many < 180
    assert plain / spent_many >= 8
