"""Modules for training by hand, and distributed vectors, against plain loops."""

import re

import pytest
import torch
from conftest import needs_hooked, seeded
from torch.nn import functional as F

import fvlens
from fvlens.interventions import inject, resid_hook, z_hook
from fvlens.training import (
    DistributedChange,
    SteerablePrompts,
    Task,
    TrainableDistributedVector,
    TrainableVector,
    VectorChange,
    Wants,
    finetune,
    frozen,
)
from training.plain_loops import CASES, MORE, PAIRS, TRAIN, close, distributed, plain_logits, tokenised, vector_of


def by_hand(model, module, additions, targets, *, lr, epochs):
    """A notebook's loop: one inject around all steps."""
    prompts = fvlens.build_prompts(model, targets, n_shots=0, generator=seeded())
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    with frozen(model), inject(model, additions):
        for _ in range(epochs):
            logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
            losses = F.cross_entropy(logits.float(), prompts.first_answer_token, reduction="none")
            optimiser.zero_grad()
            losses.mean().backward()
            optimiser.step()
    return losses


HAND = dict(lr=0.05, epochs=4, batch_size=None, schedule="constant", progress=False)


def single(model, pairs):
    return [pair for pair in pairs if len(tokenised(model, pair)[1]) == 1]


def test_by_hand_reaches_what_finetune_reaches(small):
    pairs = single(small, [*PAIRS, *MORE])[:6]
    init = vector_of(small, scale=0.3)
    module = TrainableVector(init)
    by_hand(small, module, module, pairs, lr=0.05, epochs=4)
    tuned = finetune(small, pairs, init=init, generator=seeded(), **HAND)
    close(module.vector.detach(), tuned.vector.vector)
    found = module.to_vector(init)
    assert (found.kind, found.relation, found.layer) == ("fine-tuned", "r", 1)
    assert not found.vector.requires_grad and torch.equal(found.vector, module.vector.detach())
    tokens = torch.tensor([tokenised(small, pairs[0])[0]])
    with torch.no_grad():
        expected = plain_logits(small, pairs[0], 1, found.vector)[0][0]
        with inject(small, found):
            torch.testing.assert_close(small(tokens)[0, -1], expected)


@pytest.mark.parametrize("assigned", [False, True])
def test_several_rows_by_hand(small, assigned):
    """Row i goes to prompt i, or where it is assigned; one open ``inject`` sees the rows move."""
    pairs = single(small, [*PAIRS, *MORE])[:4]
    starts = [vector_of(small, seed=i, scale=0.3) for i in range(2 if assigned else 4)]
    module = TrainableVector(starts)
    rows = torch.tensor([0, 1, 1, 0]) if assigned else torch.arange(4)
    steering = module.of(rows) if assigned else module
    by_hand(small, module, steering, pairs, lr=0.05, epochs=4)
    for i, start in enumerate(starts):
        own = [pair for pair, row in zip(pairs, rows.tolist(), strict=True) if row == i]
        tuned = finetune(small, own, init=start, generator=seeded(), **HAND)
        close(module.rows[i].detach(), tuned.vector.vector)
    assert torch.equal(module.matrix, torch.stack(list(module.rows)))
    with pytest.raises(ValueError, match=re.escape(f"vector: there are {len(starts)} relations; use .matrix or .of(")):
        module.vector


def test_trainable_vectors_take_vectors_and_tensors(small):
    one, two = vector_of(small, 1), vector_of(small, 2)
    assert torch.equal(TrainableVector(one).vector, one.vector) and TrainableVector(one).layer == 1
    assert TrainableVector([one, two], 0).layer == 0
    assert TrainableVector(one, 2).layer == 2
    half = TrainableVector(one.vector.bfloat16(), 1)
    assert half.vector.dtype == torch.float32 and half.vector.requires_grad
    assert set(half.additions()) == {resid_hook(1)}
    source = one.vector.clone()
    module = TrainableVector(source, 1)
    with torch.no_grad():
        module.vector.add_(1)
    assert torch.equal(source, one.vector)  # a copy
    for init, message in [
        (torch.zeros(2, 2, 2), r"expected \[d_model\] or \[relation d_model\], got shape \[2, 2, 2\]"),
        ([], r"expected \[d_model\] or \[relation d_model\], got shape \[0\]"),
        (torch.zeros(4), "a tensor does not say its layer; give layer=."),
        ([one, two], r"the vectors are of layers \[1, 2\]; give layer=."),
    ]:
        with pytest.raises(ValueError, match=f"TrainableVector: {message}"):
            TrainableVector.__init__.__wrapped__(TrainableVector.__new__(TrainableVector), init)


def plain_distributed_log_probs(model, pair, numbers, heads):
    """Log-probability of each answer token with numbers added to heads, by hooks of our own."""
    query, answer = tokenised(model, pair)

    def add(z, hook):
        z = z.clone()
        for i, (layer, head) in enumerate(heads):
            if hook.name.startswith(f"blocks.{layer}."):
                z[0, len(query) - 1, head] = z[0, len(query) - 1, head] + numbers[i]
        return z

    hooks = [(z_hook(layer), add) for layer in sorted({layer for layer, _ in heads})]
    with model.hooks(fwd_hooks=hooks):
        logits = model(torch.tensor([[*query, *answer[:-1]]]))[0, len(query) - 1 :]
    return logits.double().log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]


def plain_distributed(model, pairs, numbers, heads, *, lr, epochs):
    """The same training, one prompt at a time."""
    parameter = torch.stack([numbers[head] for head in heads]).clone().requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr=lr)
    losses = []
    for _ in range(epochs):
        total = -sum(plain_distributed_log_probs(model, pair, parameter, heads).sum() for pair in pairs) / len(pairs)
        losses.append(float(total.detach()))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return parameter.detach(), losses


@pytest.mark.parametrize("heads", [((0, 2), (2, 1), (2, 3)), ((1, 1),)], ids=["several layers", "one head"])
@pytest.mark.parametrize("name, path", CASES)
def test_losses_and_gradients_of_heads_equal_a_plain_forward(models, name, path, heads):
    model = models(name)
    trainable = TrainableDistributedVector(distributed(model, heads=heads))
    prompts = SteerablePrompts.of(model, [Task("", PAIRS, (), 0)], "qa", layer=trainable.joins_after, path=path)
    assert (prompts.path, trainable.joins_after) == (path, heads[0][0] - 1)
    change = DistributedChange(prompts, trainable)
    plain = trainable.values.detach().clone().requires_grad_()
    with frozen(model):
        rows, relation = torch.arange(len(PAIRS)), torch.zeros(len(PAIRS), dtype=torch.long)
        readout = change.read(rows, relation, Wants(first=True))
        readout.log_probs.sum().backward()
        whole = change.read(rows, relation, Wants(hooks=(z_hook(2),)))  # what a hook sees is that of whole passes
        logits = change.read(rows, relation, Wants(logits=True)).logits
        expected = [plain_distributed_log_probs(model, pair, plain, heads) for pair in PAIRS]
        sum(one.sum() for one in expected).backward()
    tolerance = 1e-6 if next(model.parameters()).dtype == torch.float64 else 2e-5
    for row, own in zip(readout.log_probs, expected, strict=True):
        torch.testing.assert_close(row[: len(own)].double(), own, rtol=2 * tolerance, atol=0)
    close(trainable.values.grad, plain.grad, tolerance)
    assert plain.grad.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(whole.log_probs, readout.log_probs, rtol=2 * tolerance, atol=1e-6)
    torch.testing.assert_close(logits[:, 0], readout.first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, path",
    [*(pytest.param("gpt2", path, marks=needs_hooked) for path in ("weights", "kv")), ("bridge-llama", "kv")],
)
def test_distributed_training_equals_a_plain_loop(models, name, path):
    model = models(name)
    init = distributed(model)
    fastest = None if (name, path) != ("gpt2", "kv") else path
    tuned = finetune(model, TRAIN, init=init, path=fastest, generator=seeded(), **(HAND | dict(epochs=3)))
    with frozen(model):
        numbers, losses = plain_distributed(model, TRAIN, init.values, init.heads, lr=0.05, epochs=3)
    assert (tuned.path, tuned.relation, tuned.vector.kind) == (path, "r", "fine-tuned distributed")
    # entry 0 is the start, and each epoch's one step saw the numbers before it
    torch.testing.assert_close(tuned.history.train_loss, torch.tensor([losses[0], *losses]), rtol=1e-5, atol=0)
    assert tuned.best_epoch == 3
    close(torch.stack([tuned.vector.values[head] for head in init.heads]), numbers)
    others = tuned.vector.values.clone()
    for head in init.heads:
        others[head] = 0
    assert (others == 0).all()


def test_distributed_vector_by_hand(small):
    pairs = single(small, [*PAIRS, *MORE])[:5]
    init = distributed(small)
    module = TrainableDistributedVector(init)
    by_hand(small, module, module, pairs, lr=0.05, epochs=3)
    numbers, _ = plain_distributed(small, pairs, init.values, init.heads, lr=0.05, epochs=3)
    close(module.values.detach(), numbers)
    found = module.to_vector(small, relation="x")
    assert found.relation == "x" and found.heads == init.heads
    assert torch.equal(torch.stack([found.values[head] for head in init.heads]), module.values.detach())
    again = TrainableDistributedVector(
        module.values.detach(), heads=[(0, 2), (2, 1), (2, 3)], n_layers=small.cfg.n_layers, n_heads=small.cfg.n_heads
    )
    for hook, value in again.additions().items():
        assert torch.equal(value, module.additions()[hook])


@needs_hooked
def test_heads_of_a_model_without_a_fast_path_take_whole_passes(models):
    model = models("shortformer")
    with pytest.warns(UserWarning, match="finetune takes whole forward passes, which is slow \\(positions shortformer"):
        tuned = finetune(model, TRAIN, init=distributed(model), generator=seeded(), **HAND)
    assert tuned.path == "naive"


@needs_hooked
def test_a_training_of_heads_by_whole_passes_goes_on_so(small, tmp_path):
    """Version 0.1 trained heads by whole passes only, and its states say so."""
    file = tmp_path / "state"
    how = HAND | dict(epochs=3)
    naive = finetune(small, TRAIN, init=distributed(small), path="naive", checkpoint=file, generator=seeded(), **how)
    for state in (naive.state, file):
        resumed = finetune(small, TRAIN, init=distributed(small), resume=state, generator=seeded(), **how)
        assert resumed.path == "naive"
        assert torch.equal(resumed.vector.values, naive.vector.values)
    with pytest.raises(ValueError, match="finetune: the saved training has path 'naive', this one 'weights'"):
        finetune(small, TRAIN, init=distributed(small), resume=file, path="weights", generator=seeded(), **how)


def test_default_learning_rate_of_heads_is_a_share_of_their_z(small):
    init = distributed(small)
    seen = []
    for pair in TRAIN:
        query, _ = tokenised(small, pair)
        for layer, head in init.heads:
            see = lambda z, hook, head=head: seen.append(z[0, -1, head].detach()) or None  # noqa: E731
            with small.hooks(fwd_hooks=[(z_hook(layer), see)]):
                small(torch.tensor([query]))
    tuned = finetune(small, TRAIN, init=init, epochs=1, generator=seeded(), progress=False)
    assert tuned.lr == pytest.approx(
        VectorChange.relative_lr * float(torch.stack(seen).square().mean().sqrt()), rel=1e-5
    )


def test_distributed_errors(small, unchecked):
    init = distributed(small)
    values = torch.zeros(2, small.cfg.d_head)
    with pytest.raises(ValueError, match="a tensor needs heads=, n_layers= and n_heads= beside it"):
        TrainableDistributedVector(values)
    with pytest.raises(ValueError, match="TrainableDistributedVector: 1 heads, but 2 rows of numbers"):
        TrainableDistributedVector(values, heads=[(0, 0)], n_layers=3, n_heads=4)
    prompts = SteerablePrompts.of(small, [Task("", PAIRS, (), 0)], "qa", layer=0, path="naive")
    with pytest.raises(
        ValueError, match=r"first head is in layer 0, but .* kept up to layer 0; make them with layer=-1"
    ):
        DistributedChange(prompts, TrainableDistributedVector(init))
    with pytest.raises(ValueError, match="finetune: a distributed vector acts at its heads' own layers; leave layer="):
        finetune(small, TRAIN, init=init, layer=1, generator=seeded())
    with pytest.raises(ValueError, match="finetune: no training pairs of r"):
        finetune(small, [], init=init, generator=seeded())
