"""Pairs in JSON: published formats and plain lists.

- Todd et al. 2024 (arXiv:2310.15213): a list of ``{"input": ..., "output": ...}``.
- LRE, Hernandez et al. 2024 (arXiv:2308.09124): an object whose ``samples`` are ``{"subject": ..., "object": ...}``.
- A list of lists of two, or an object of words and their answers.
- JSON lines: one of these pairs a line.
"""

import json
from collections.abc import Iterator
from typing import Any

from fvlens.files import parse_json
from fvlens.relations._shapes import Source, source_of
from fvlens.relations._words import shortened

_LISTS = ("samples", "pairs", "data", "examples")
"""Names under which an object keeps its list of pairs."""


def read_json_pairs(text: str, name: str, suffix: str) -> tuple[Source, dict[str, str]]:
    """What stands in the place of pairs in a JSON text or in JSON lines, and what the file says of the relation.

    Args:
        text: the text.
        name: the file, for messages.
        suffix: ``.jsonl`` and ``.ndjson`` are JSON lines, unless all of it is one value.

    Raises:
        ValueError: no JSON; values of which it cannot be told what the pairs are.
    """
    as_lines = suffix in (".jsonl", ".ndjson")
    n_lines = sum(bool(line.strip()) for line in text.split("\n"))
    try:
        content = parse_json(text)
    except ValueError as error:
        if n_lines > 1 and (as_lines or "Extra data" in str(error)):
            return _from_lines(text, name), {}
        if isinstance(error, json.JSONDecodeError):
            raise ValueError(f"{name}, line {error.lineno}: not JSON, or cut off ({error.msg}).") from None
        raise ValueError(f"{name}: JSON that says more than one thing ({error}); give a list of pairs.") from None
    if as_lines and n_lines == 1 and not (isinstance(content, list) and content and not isinstance(content[0], str)):
        return _from_lines(text, name), {}
    said: dict[str, str] = {}
    if isinstance(content, dict):
        inner = next((key for key in _LISTS if isinstance(content.get(key), list)), None)
        if inner is not None:
            properties = content.get("properties")
            kind = properties.get("relation_type") if isinstance(properties, dict) else None
            said = {"category": kind} if isinstance(kind, str) else {}
            content = content[inner]
    if not isinstance(content, list | dict):
        raise ValueError(
            f"{name}: expected a list of pairs, or an object of words and answers, got {shortened(content)}."
        )
    return source_of(content, name, entry="entry"), said


def _from_lines(text: str, name: str) -> Source:
    return source_of(_values(text, name), name, keys=True, entry="line")


def _values(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Each line's number and value."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: not a line of JSON ({error}).") from None
