"""What the tests of evaluation, sweeps and controls share: pairs, vectors, and when two evaluations are the same."""

import dataclasses
from types import SimpleNamespace

import torch
from architectures import WORDS
from conftest import seeded

from fvlens import scoring
from fvlens.models import fingerprint
from fvlens.relations import Pair
from fvlens.types import Head
from fvlens.vectors import FunctionVector

PAIRS = tuple(Pair(*pair) for pair in WORDS)
"""Inputs and answers of one token and of several."""

DEMONSTRATIONS = tuple(
    Pair(*pair)
    for pair in [
        ("hot", "cold"),
        ("day", "night"),
        ("left", "right"),
        ("young", "old"),
        ("rich", "poor"),
        ("up", "down"),
    ]
)


def steering(model, tensors, **attributes):
    """A Steering with given tensors that fits any model."""
    return SimpleNamespace(additions=lambda: tensors, check=lambda model: None, **attributes)


def made_vector(model, layer=1, seed=0, norm=6.0, heads=((0, 1), (1, 2), (2, 0)), relation="made"):
    direction = torch.randn(model.cfg.d_model, generator=seeded(seed))
    return FunctionVector(
        vector=norm * direction / direction.norm(),
        layer=layer,
        heads=tuple(Head(*head) for head in heads),
        relation=relation,
        fingerprint=fingerprint(model),
    )


def same(one, other):
    """Whether two evaluations agree in every field; probabilities to float rounding, since other rows ran beside."""
    for field in dataclasses.fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor) and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        elif field.name == "ranks":  # far down, where logits lie close, neighbours may change places
            assert bool(((ours - theirs).abs() <= theirs // 1000).all()), f"ranks: {ours} and {theirs}"
        else:
            equal = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert equal, f"{field.name}: {ours} and {theirs}"
    return True


def interrupted_after(n, monkeypatch):
    """The n + 1st run of prompts is interrupted."""
    real, calls = scoring._suffix.run_prefix, []

    def counting(*args, **kwargs):
        calls.append(args)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(scoring._suffix, "run_prefix", counting)


def says_that_it_is_a_part(result):
    """In its table and in its figure."""
    assert not result.to_dataframe().complete.any()
    assert "interrupted" in result.plot().layout.title.text
