"""Prompts that are kept while vectors change: the same numbers inside any bound, and the bound holds."""

import itertools

import pytest
import torch
from conftest import needs_hooked, random_model

import fvlens
from fvlens.suffix import SteeredPrompts, _kept
from fvlens.suffix._estimate import Estimate

pytestmark = needs_hooked


@pytest.fixture(scope="module")
def model():
    return random_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(model):
    """2,000 bare queries with answers of one token and of several."""
    pairs = [pair for name in fvlens.list_relations() for pair in fvlens.load_relation(name).pairs]
    generator = torch.Generator().manual_seed(0)
    return fvlens.build_prompts(model, [], queries=pairs[:2000], n_shots=0, generator=generator)


def kept_prompts(model, prompts, path, max_memory=None):
    given = prompts.tokens, prompts.attention_mask, prompts.answer_tokens
    return SteeredPrompts(model, *given, 0, path=path, max_memory=max_memory)


def held(kept):
    """Bytes of the tensors that are kept of prompts."""
    found = {}
    for steps, _ in kept._steps.values():
        run = steps.run
        own = [run.kept] if kept.path == "weights" else [*run.keys, *run.values]
        for tensor in [*own, run.resid_pre, run.resid_final, *([] if run.z is None else [run.z])]:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def read_all(kept, rows, vectors, size):
    """Log-probabilities, first logits and residual streams of all rows, so many at a time, and the most bytes held."""
    logs, first, after, most = [], [], [], 0
    with torch.no_grad():
        for part in rows.split(size):
            own = vectors if vectors.ndim == 1 else vectors[part]
            found, logits = kept.read(part, own, first=True)
            most = max(most, held(kept))
            logs.append(found)
            first.append(logits[:, ::997])
            after.append(kept.after(part))
            torch.testing.assert_close(logits, kept.first_logits(part, own))
    return [torch.cat(part) for part in (logs, first, after)], most


@pytest.mark.parametrize("path", ["weights", "kv"])
def test_thousands_of_queries_go_in_slices_inside_the_bound(model, prompts, path, monkeypatch):
    g = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(prompts), model.cfg.d_model, generator=g, dtype=torch.float64)
    rows = torch.randperm(len(prompts), generator=g)[:300]
    plain = kept_prompts(model, prompts, path)
    expected, everything = read_all(plain, rows, vectors, 200)
    assert plain._all_fit
    runs = []
    original = _kept.run_prefix
    monkeypatch.setattr(_kept, "run_prefix", lambda *a, **k: runs.append(len(a[1])) or original(*a, **k))
    bound = everything // 2  # half of it for what is kept
    kept = kept_prompts(model, prompts, path, bound)
    assert not kept._all_fit
    found, most = read_all(kept, rows, vectors, 200)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert bound // 8 < most <= bound // 2
    assert max(runs) <= kept.tokens_at_once
    assert len(runs) > len(kept._slices)  # some went and were run again


@pytest.mark.parametrize("path", ["weights", "kv"])
def test_rows_of_many_slices_are_held_without_them(model, prompts, path, monkeypatch):
    """Rows from everywhere in one call: of slices that have gone only these rows stay."""
    plain = kept_prompts(model, prompts, path)
    rows = torch.arange(0, len(prompts), 100)
    vector = torch.zeros(model.cfg.d_model, dtype=torch.float64)
    expected, everything = read_all(plain, rows, vector, len(rows))
    kept = kept_prompts(model, prompts, path, everything // 4)
    alive = []
    original = SteeredPrompts._steps_of

    def watched(self, i):
        steps = original(self, i)
        alive.append(held(self))
        return steps

    monkeypatch.setattr(SteeredPrompts, "_steps_of", watched)
    (parts, most) = read_all(kept, rows, vector, len(rows))
    for ours, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert max(alive) <= everything // 8
    assert most <= everything // 8
    for steps, place, where in kept._parts(rows):
        assert steps.run.n_prompts == len(place) == len(where)


@pytest.mark.parametrize("path", ["weights", "kv"])
def test_what_is_planned_for_a_slice_is_what_it_takes(model, prompts, path):
    kept = kept_prompts(model, prompts, path)
    for i in itertools.islice(range(len(kept._slices)), 0, None, 5):
        kept._steps.clear()
        kept._steps_of(i)
        assert held(kept) <= kept._bytes(kept._slices[i]) <= 1.25 * held(kept)


def test_gradients_are_those_of_unbounded_prompts(model, prompts):
    rows = torch.arange(0, len(prompts), 60)
    found = []
    for max_memory in (None, 60 * Estimate.of(model).kept(16, 4)):
        vector = torch.full((model.cfg.d_model,), 0.1, dtype=torch.float64, requires_grad=True)
        kept = kept_prompts(model, prompts, "weights", max_memory)
        logs, _ = kept.read(rows, vector)
        found.append(torch.autograd.grad(logs.sum(), vector)[0])
        assert kept._all_fit == (max_memory is None)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert found[0].abs().max() > 1
