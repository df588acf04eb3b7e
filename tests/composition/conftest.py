"""Shared by the tests of composite vectors: a model in double precision, a basis of random vectors, analogies."""

import pytest
import torch
from conftest import random_model, seeded

from composition.whole_passes import LAYER, NAMES, parts
from fvlens import VectorSet, fingerprint
from fvlens.composition import (
    fit_composite,
    library_analogies,
    library_composite,
)
from fvlens.relations import make_analogies
from fvlens.vectors import FunctionVector


@pytest.fixture(scope="session")
def tiny():
    """A random-weight model in double precision, in place of the one of single precision."""
    return random_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def basis(tiny):
    """Random vectors that are named like relations of two families."""
    g = seeded(3)
    mark = fingerprint(tiny)
    return VectorSet(
        tuple(FunctionVector(2 * torch.randn(tiny.cfg.d_model, generator=g), LAYER, (), name, mark) for name in NAMES)
    )


@pytest.fixture(scope="session")
def train():
    """Far analogies that maps are fitted on."""
    return make_analogies(parts(0, 10), kind="far", n=24, generator=seeded(1))


@pytest.fixture(scope="session")
def test_set():
    """Far analogies of other pairs, with foils."""
    return make_analogies(parts(10, 20), kind="far", n=10, generator=seeded(2), n_foils=2)


@pytest.fixture(scope="session")
def fitted(tiny, basis, train):
    """A full map."""
    return fit_composite(tiny, basis, train, map="full", epochs=3, generator=seeded(), progress=False)


@pytest.fixture(scope="session")
def for_gate():
    """Far analogies of other pairs again, that gates are fitted on."""
    return make_analogies(parts(20, 30), kind="far", n=16, generator=seeded(5))


@pytest.fixture(scope="session")
def real(model):
    """A small composite of the embedded model, and analogies that it solves in part: from zero it errs now and then."""
    made = library_composite(model, names=NAMES, start="zero", epochs=5, generator=seeded(), progress=False)
    return made, library_analogies("test", n=30, names=NAMES, generator=seeded(1))
