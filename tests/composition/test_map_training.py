"""Whole trainings of maps and gates against plain loops, and interrupted ones."""

import math

import pytest
import torch
from conftest import seeded

from composition.whole_passes import LAYER, NAMES, naive_log_prob
from fvlens.composition import (
    SIGNALS,
    CompositeMap,
    fit_composite,
    fit_gate,
    gate_signals,
)
from fvlens.prompts import render_prompts
from fvlens.relations import load_relation
from fvlens.training import Training

# Whole trainings against plain loops


def plain_log_probs(model, analogies, shown, vectors):
    """Log-probability of each target's whole answer, one whole pass an analogy, differentiable in the vectors."""
    found = []
    for one, vector in zip(analogies, vectors, strict=True):
        demonstrations = [one.source_pair] if shown else []
        prompts = render_prompts(model, [one.target_pair], [demonstrations], n_shots=len(demonstrations))
        answer = prompts.answer_tokens[0]
        last = prompts.tokens.shape[1] - 1

        def add(resid, hook, vector=vector, last=last):
            resid = resid.clone()
            resid[:, last] += vector
            return resid

        tokens = torch.cat([prompts.tokens, answer[None, :-1]], dim=1)
        with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", add)]):
            logs = model(tokens)[0, last:].log_softmax(dim=-1)
        found.append((logs.gather(1, answer[:, None]).sum(), bool(logs[0].argmax() == answer[0])))
    logs, right = zip(*found, strict=True)
    return torch.stack(logs), torch.tensor(right)


def plain_adam(parameters, vectors, penalty, model, train, valid, shown, *, lr, l2, epochs, batch_size):
    """Adam with a learning rate that falls as a cosine, as anyone would write it; the best epoch, and the curves."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    order, n_train = seeded(), len(train)
    every = [*train, *valid]

    def look(first, last):
        with torch.no_grad():
            logs, right = plain_log_probs(model, every[first:last], shown, vectors(list(range(first, last))))
        return -float(logs.mean()), float(right.double().mean())

    curves = [(look(0, n_train)[0], *(look(n_train, len(every)) if valid else (0.0, 0.0)))]
    kept = [[parameter.detach().clone() for parameter in parameters]]
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        shuffled, seen = torch.randperm(n_train, generator=order).tolist(), []
        for at in range(0, n_train, batch_size):
            rows = shuffled[at : at + batch_size]
            optimiser.zero_grad()
            logs, _ = plain_log_probs(model, [train[i] for i in rows], shown, vectors(rows))
            (-logs.mean() + l2 * penalty(rows)).backward()
            optimiser.step()
            seen += (-logs.detach()).tolist()
        curves.append((sum(seen) / n_train, *(look(n_train, len(every)) if valid else (0.0, 0.0))))
        kept.append([parameter.detach().clone() for parameter in parameters])
    model.zero_grad(set_to_none=True)  # the model is shared
    best = max(range(len(curves)), key=lambda i: (curves[i][2], -curves[i][1])) if valid else epochs
    return kept[best], curves


@pytest.mark.parametrize("setting", ["zero_shot", "one_shot"])
@pytest.mark.parametrize("map", ["diagonal", "full", "transfer"])
def test_a_map_is_what_a_plain_loop_trains(tiny, basis, train, test_set, map, setting):
    """With the defaults of every map: its learning rate, its l2, their schedule, and the choice of the epoch."""
    how = dict(map=map, setting=setting, epochs=3, batch_size=8, progress=False)
    made = fit_composite(tiny, basis, train, valid=test_set, generator=seeded(), **how)
    every, n = [*train, *test_set], len(basis)
    plain = [[naive_log_prob(tiny, one.source_pair, [], vector)[0] for vector in basis.matrix] for one in every]
    scores = torch.tensor(plain, dtype=torch.float32)
    if map == "transfer":  # what recognises is fitted before, and tested by itself
        families = [load_relation(name).family for name in NAMES]
        groups = sorted(set(families))
        members = torch.tensor([[float(family == group) for family in families] for group in groups])
        shown = (scores @ made.matrix.T + made.shift).softmax(dim=-1)
        same, shared, own = (torch.zeros(shape, requires_grad=True) for shape in ((), (n, len(groups)), (n, n)))
        parameters, lr, l2 = [same, shared, own], 0.02, 3e-3

        def weights(rows):
            return shown[rows] @ (same * torch.eye(n) + shared @ members + own).T

        def penalty(rows):
            return (shown[rows] @ own.T @ basis.matrix).square().sum(dim=1).mean()

    else:
        scale = (torch.ones(n) if map == "diagonal" else torch.eye(n)).requires_grad_()
        shift = torch.zeros(n, requires_grad=True)
        parameters, lr, l2 = [scale, shift], 0.05 if map == "diagonal" else 0.02, 1e-4

        def weights(rows):
            matrix = torch.diag(scale) if map == "diagonal" else scale
            return (scores[rows] @ matrix.T + shift).softmax(dim=-1)

        def penalty(rows):
            start = torch.ones(n) if map == "diagonal" else torch.eye(n)
            return (scale - start).square().sum() + shift.square().sum()

    best, curves = plain_adam(
        parameters, lambda rows: weights(rows) @ basis.matrix, penalty, tiny, train, test_set, setting == "one_shot",
        lr=lr, l2=l2, epochs=3, batch_size=8,
    )  # fmt: skip
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
        rows = list(range(len(every)))
        torch.testing.assert_close(made.weights_of(scores), weights(rows), rtol=0, atol=3e-5)
    theirs = torch.tensor(curves).T
    ours = torch.tensor([made.history.train_loss, made.history.valid_loss, made.history.valid_top1])
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    if map == "transfer":
        expected = same * torch.eye(n) + shared @ members + own
        torch.testing.assert_close(made.transfer, expected.detach(), rtol=0, atol=2e-5)
    else:
        matrix = torch.diag(scale) if map == "diagonal" else scale
        torch.testing.assert_close(made.matrix, matrix.detach(), rtol=0, atol=2e-5)
        torch.testing.assert_close(made.shift, shift.detach(), rtol=0, atol=2e-5)


def test_a_learned_gate_is_what_a_plain_loop_trains(tiny, fitted, for_gate):
    """With its defaults: learning rate, l2 and schedule; nothing is lowered where nothing is protected."""
    how = dict(kind="learned", protect=False, epochs=3, batch_size=8, progress=False)
    gate = fit_gate(tiny, fitted, for_gate, generator=seeded(), **how).gate("one_shot")
    signals = gate_signals(tiny, fitted, for_gate)
    vectors = torch.stack([fitted.vector_for(tiny, one.a, one.b).vector for one in for_gate])
    centre, spread = signals.mean(dim=0), signals.std(dim=0, correction=0).clamp(min=1e-3)
    scaled = (signals - centre) / spread
    slope, offset = torch.zeros(len(SIGNALS), requires_grad=True), torch.zeros((), requires_grad=True)

    def steered(rows):
        return (scaled[rows] @ slope + offset).sigmoid()[:, None] * vectors[rows]

    (slope, offset), _ = plain_adam(
        [slope, offset], steered, lambda rows: slope.square().sum(), tiny, for_gate, [], True,
        lr=0.1, l2=1e-3, epochs=3, batch_size=8,
    )  # fmt: skip
    plain = slope / spread
    torch.testing.assert_close(torch.tensor(gate.slopes), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(gate.offset), offset - plain @ centre, rtol=1e-3, atol=1e-3)


def interrupted(monkeypatch, fit, what):
    """What is left of a fit that Ctrl-C stopped in its second epoch."""
    own = Training._step

    def step(self, batch):
        own(self, batch)
        if self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.warns(UserWarning, match=f"{what} was interrupted: 1 of 3 epochs are finished"):
            return fit()


@pytest.mark.parametrize("map", ["diagonal", "lowrank", "transfer"])
def test_an_interrupted_map_goes_on_to_the_same_bits(tiny, basis, train, test_set, map, monkeypatch, tmp_path):
    def fit(**more):
        how = dict(valid=test_set, map=map, l2=1e-3, epochs=3, batch_size=8, generator=seeded(), progress=False)
        return fit_composite(tiny, basis, train, **(how | more))

    file = tmp_path / "state.safetensors"
    whole = fit()
    part = interrupted(monkeypatch, lambda: fit(checkpoint=file), "composite map")
    assert whole.complete and not part.complete
    assert part.history.train_loss == whole.history.train_loss[:2]
    for state in (part.state, file):
        resumed = fit(resume=state)
        assert resumed.complete and resumed.history == whole.history
        for name in ("matrix", "shift", "transfer"):
            ours, theirs = getattr(resumed, name), getattr(whole, name)
            assert ours is theirs is None or torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="fit_composite: the saved training has map "):
        fit(map="full", resume=file)
    with pytest.warns(UserWarning, match="part.safetensors: a training that was interrupted, the best of the epochs"):
        assert not CompositeMap.load(part.save(tmp_path / "part.safetensors")).complete


def test_an_interrupted_gate_goes_on_to_the_same_bits(tiny, fitted, for_gate, monkeypatch, tmp_path):
    def fit(**more):
        how = dict(kind="learned", epochs=3, batch_size=8, generator=seeded(), progress=False)
        return fit_gate(tiny, fitted, for_gate, **how, **more)

    file = tmp_path / "state.safetensors"
    whole = fit()
    part = interrupted(monkeypatch, lambda: fit(checkpoint=file), "gate")
    assert whole.complete and not part.complete
    for state in (part.state, file):
        assert fit(resume=state).gates == whole.gates


def test_a_map_whose_loss_is_not_finite_keeps_its_start(tiny, basis, train):
    with pytest.warns(UserWarning, match="the loss of the composite map is not finite after epoch 1; try a lower lr"):
        made = fit_composite(tiny, basis, train, map="full", lr=1e30, epochs=3, generator=seeded(), progress=False)
    assert torch.equal(made.matrix, torch.eye(len(basis))) and len(made.history.train_loss) == 2
