"""Shared by the tests of training: random models of several architectures, in double precision where they can."""

import pytest
import torch
from architectures import build
from checkpoints import save
from conftest import HAS_HOOKED

import fvlens
from fvlens.suffix import has_hooks
from training.plain_loops import with_words


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Random models by name, float64 where the class computes in it; ``bridge-*`` from tiny checkpoints."""
    made = {}

    def get(name):
        if name not in made:
            if name.startswith("bridge-"):
                folder = with_words(save(name.removeprefix("bridge-"), tmp_path_factory.mktemp(name)))
                # the others have parts in single precision
                dtype = torch.float64 if name == "bridge-gpt2" else torch.float32
                made[name] = fvlens.load_model(folder, device="cpu", backend="bridge", dtype=dtype)
            else:
                made[name] = build(name, dtype=torch.float64)
        return made[name]

    yield get
    for model in made.values():
        assert not has_hooks(model)


@pytest.fixture
def small(models):
    """The random model that most tests train on."""
    return models("gpt2" if HAS_HOOKED else "bridge-gpt2")
