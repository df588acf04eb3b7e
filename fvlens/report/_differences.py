"""What is not the same in two runs, number by number."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fvlens.vectors import FunctionVector

PROVENANCE = {
    "fingerprint": "model",
    "data_hash": "data",
    "data": "data",
    "versions": "version",
    "code_hash": "version",
    "platform": "platform",
}
"""Fields of ``results.json`` that say what the numbers depend on, and what kind of thing each is."""

ABSENT = "(absent)"
"""Stands for the value of a field that one of two files does not have."""

SETTINGS = ("schema", "relation", "model", "seed", "options", "loading", "heads_source", "heads_note", "pairs")
"""Fields that say what was asked for."""
_NOT_COMPARED = ("seconds", "ffv_seconds", "command", "cautions", "loaded", "tables")
"""Times, what follows from the numbers (files of fvlens 0.1 have no ``cautions``), what loading found, other files."""
_LATER = ("exact", "n_first_tokens")
"""Results that earlier files of this schema do not have; compared where both have them."""
_KINDS = PROVENANCE | {"path": "setting", "ffv_path": "setting"}


class RunDifference(NamedTuple):
    """One thing that is not the same in two runs.

    Attributes:
        kind: ``"model"``, ``"data"``, ``"version"``, ``"platform"`` and ``"setting"``: what the numbers depend on;
            ``"number"``; or ``"result"``: a word or an entry that is not the same.
        name: the field of ``results.json``, such as ``versions.torch`` or ``heads[0][2]``.
        old, new: its values.
        size: for numbers, ``|old - new| / max(1, |old|, |new|)``: absolute below 1, relative above.
    """

    kind: str
    name: str
    old: Any
    new: Any
    size: float | None = None


def outcomes(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` that a run finds out, without what goes into it."""
    left_out = (*PROVENANCE, *SETTINGS, *_NOT_COMPARED)
    return {name: value for name, value in content.items() if name not in left_out}


def comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcomes of two files, without those that only a later version writes."""
    left_out = [name for name in _LATER if name not in old]
    return outcomes(old), {name: value for name, value in outcomes(new).items() if name not in left_out}


def count_numbers(content: Any) -> int:
    """How many numbers a part of ``results.json`` holds."""
    return sum(_is_number(value) for _, value in _leaves(content))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[RunDifference]:
    """What is not the same in two parts of ``results.json``, in the order of the first."""
    before, after = dict(_leaves(dict(old))), dict(_leaves(dict(new)))
    differing = []
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name, ABSENT), after.get(name, ABSENT)
        if a == b and type(a) is type(b):
            continue
        field = name.replace("[", ".").partition(".")[0]
        # among the outcomes numbers are compared as numbers, 1 and 1.0 too; in the provenance everything as it is
        if field not in _KINDS and _is_number(a) and _is_number(b):
            if a != b:
                differing.append(RunDifference("number", name, a, b, abs(a - b) / max(1.0, abs(a), abs(b))))
        else:
            differing.append(RunDifference(_KINDS.get(field, "result"), name, a, b))
    return differing


def vector_differences(name: str, old: FunctionVector | None, new: FunctionVector) -> list[RunDifference]:
    """What differs in two vector files of this name, one row for all numbers of the vector."""
    if old is None:
        return [RunDifference("data", name, ABSENT, "written")]
    if old.vector.shape != new.vector.shape:
        return [RunDifference("result", f"{name}: length", len(old.vector), len(new.vector))]
    if torch.equal(old.vector, new.vector):
        return []
    a, b = old.vector.double(), new.vector.double()
    size = (a - b).abs() / torch.stack([a.abs(), b.abs(), torch.ones_like(a)]).amax(dim=0)
    return [RunDifference("number", f"{name}: norm", old.norm(), new.norm(), float(size.max()))]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text, truth value or null of a JSON value, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{i}]")
    else:
        yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
