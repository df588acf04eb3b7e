"""One function for all answers under changes: against whole passes under hooks, change by change."""

import re
from types import SimpleNamespace

import matrix
import pytest
import torch
from architectures import ARCHITECTURES, FASTEST, build, word_prompts
from conftest import needs_hooked

import fvlens
from fvlens.interventions import resid_hook, resid_pre_hook, z_hook
from fvlens.scoring import ablation, by_answer_length, score
from fvlens.suffix import Edit, has_hooks


def steering(tensors):
    return SimpleNamespace(additions=lambda: tensors, check=lambda model: None)


def changes_of(model, n_prompts, generator, dtype=torch.float32):
    """One of each kind: nothing, a vector, one a prompt, before a block, heads' own, edits, an ablation."""
    cfg = model.cfg

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    return [
        None,
        steering({resid_hook(1): drawn(cfg.d_model)}),
        steering({resid_hook(0): drawn(n_prompts, cfg.d_model)}),
        steering({resid_pre_hook(2): drawn(cfg.d_model), z_hook(0): drawn(cfg.n_heads, cfg.d_head)}),
        (
            Edit(0, "z", drawn(cfg.d_head), head=1, op="add"),
            Edit(2, "resid_post", torch.tensor(0.5, dtype=dtype), op="scale"),
        ),
        ablation(model, [(0, 0), (0, 3), (2, 1)]),
        ablation(model, [(1, 2)], value=drawn(cfg.n_layers, cfg.n_heads, cfg.d_head)),
    ]


def agree(ours, oracle, prompts, tolerance):
    assert torch.equal(ours.prompts, oracle.prompts)
    for name in ("first", "rest"):
        torch.testing.assert_close(getattr(ours, name), getattr(oracle, name), rtol=tolerance, atol=tolerance)
    near = oracle.ranks < 200
    assert torch.equal(ours.ranks[near], oracle.ranks[near])
    assert torch.equal(ours.best, oracle.best)
    assert torch.equal(ours.ranks == 0, ours.best == prompts.first_answer_token)  # one definition of right


@needs_hooked
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if FASTEST[name] != "naive"])
def test_every_kind_of_change_equals_whole_passes(generator, name):
    model = build(name, dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=1)
    assert len(by_answer_length(prompts)) > 1
    changes = changes_of(model, len(prompts), generator, torch.float64)
    oracle = score(model, prompts, changes, path="naive")
    assert oracle.path == "naive"
    assert len({tuple(row) for row in oracle.first.round(decimals=6).tolist()}) == len(changes)  # each does something
    for path in {FASTEST[name], "kv"}:
        for batch_size in (None, 3):
            found = score(model, prompts, changes, path=path, batch_size=batch_size)
            assert (found.path, found.complete) == (path, True)
            agree(found, oracle, prompts, 1e-8)
    assert not has_hooks(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_bridges_too(generator, name):
    model, prompts = matrix.loaded(name, "bridge"), matrix.prompts(name).shuffled
    changes = changes_of(model, len(prompts), generator)
    agree(score(model, prompts, changes), score(model, prompts, changes, path="naive"), prompts, 2e-4)


def test_an_ablation_is_that_of_the_hooks(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=1)
    heads = [(0, 1), (2, 2), (2, 3)]
    values = torch.randn(3, 4, 8, generator=generator)
    for value in ("zero", values):
        (row,) = score(tiny, prompts, [ablation(tiny, heads, value=value)]).first
        with torch.no_grad(), fvlens.ablate(tiny, heads, value=value):
            logits = tiny(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        expected = logits.log_softmax(dim=-1)[torch.arange(len(prompts)), prompts.first_answer_token]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_scales_may_differ(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    push = steering({resid_hook(1): torch.randn(32, generator=generator)})
    together = score(tiny, prompts, [push, push, None], scales=[0.5, 2, 1])
    for i, scale in enumerate((0.5, 2)):
        torch.testing.assert_close(together.whole[i], score(tiny, prompts, [push], scales=scale).whole[0])


def test_a_hook_without_a_site_takes_whole_passes(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    push = steering({"blocks.1.hook_attn_out": torch.randn(32, generator=generator)})
    assert score(tiny, prompts, [None, push]).path == "naive"
    with pytest.raises(ValueError, match="path='kv' has no site for a hook that a change steers; use path=None or"):
        score(tiny, prompts, [push], path="kv")


def test_what_is_wrong_is_said(tiny, generator, unchecked):
    prompts = word_prompts(tiny, generator, n_shots=0)
    n = len(prompts)
    value = torch.zeros(32)
    cases = [
        (dict(changes=[]), "score: expected at least one change (None for the model as it is), got none."),
        (dict(changes=[None], batch_size=0), "score: expected batch_size of at least 1, got 0."),
        (dict(changes=[None], scales=[1, 2]), "score: 2 scales for 1 changes; give one each, or one for all."),
        (dict(changes=[(Edit(0, "resid_post", value),)], scales=2), "a change given as edits takes scale=1"),
        (
            dict(changes=[(Edit(0, "resid_post", value, where=torch.ones(n, 1).bool()),)]),
            "acts at the prompt's last token",
        ),
        (dict(changes=[steering({resid_hook(0): torch.zeros(3, 32)})]), f"batch axis of 3, but there are {n} pairs"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            score(tiny, prompts, **given)
    for heads, value, message in [
        ([], "zero", "ablation: expected at least one head, got none."),
        ([(0, 1)], torch.zeros(2, 2), "ablation: value has shape [2, 2]; expected [layer head d_head] = [3, 4, 8]."),
        ([(9, 1)], "zero", "L9H1 does not exist"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            ablation(tiny, heads, value=value)
