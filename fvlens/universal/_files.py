"""Heads from a file: a set of universal heads, or a plain list."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlens.files import MOST_JSON, parse_json, read_bytes, read_json
from fvlens.models import Fingerprint
from fvlens.types import Head, HeadLike, as_heads
from fvlens.universal._set import FORMAT, WHAT, UniversalHeads


@dataclass(frozen=True, slots=True)
class GivenHeads:
    """Heads that were not ranked: read from a file, or named.

    Attributes:
        heads: the heads, in the order in which they were given.
        path: the file, as it was named; empty without one.
        hash: first 16 hex digits of the SHA-256 of the file; empty without one.
        note: whether the file says which model its heads are of, or that they were named.
    """

    heads: tuple[Head, ...]
    path: str
    hash: str
    note: str

    @property
    def described(self) -> str:
        """Where they come from, as tables say it."""
        return f"heads from {Path(self.path).name}" if self.path else "heads that were named"


def name_heads(heads: Iterable[HeadLike], model: Any) -> GivenHeads:
    """Heads for a model that somebody names one by one, such as ``"L1H2,L3H4"``.

    Raises:
        ValueError: none, or what :func:`fvlens.types.as_heads` refuses.
    """
    found = as_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    if not found:
        raise ValueError("heads: expected at least one head, such as L1H2, got none.")
    return GivenHeads(tuple(found), "", "", "named one by one")


def read_heads(path: str | Path, model: Any) -> GivenHeads:
    """Heads for a model from a JSON file: one that :meth:`UniversalHeads.save` wrote, or a plain list.

    A plain list is ``[[layer, head], ...]`` or ``{"heads": [[layer, head], ...]}``, such as a published set. It names
    no model, so nothing but the range of the numbers can be checked; the note says so.

    Raises:
        ValueError: no such file; not JSON; no list of pairs in it, or an empty one; a head that the model does not have
            or that is listed twice; or a saved set of another model.
    """
    name = Path(path).name
    data = read_bytes(Path(path), WHAT, most=MOST_JSON)
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name}: not a JSON file, or a truncated one ({error}).") from error
    digest = hashlib.sha256(data).hexdigest()[:16]
    if isinstance(content, dict) and "format" in content:
        saved = UniversalHeads.from_json(content, name)
        saved.check(model, name)
        note = f"universal heads of this model, {int(saved.kept.sum())} relations, {saved.labels} labels" + (
            f"; {saved.remark}" if saved.remark else ""
        )
        return GivenHeads(tuple(saved.heads), str(path), digest, note)
    listed = content.get("heads") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not listed:
        raise ValueError(
            f'{name}: expected [[layer, head], ...], an object with such a list under "heads", or a file written by '
            f"`fvlens universal`; got {json.dumps(content)[:60]}."
        )
    try:
        heads = as_heads(listed, model.cfg.n_layers, model.cfg.n_heads)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return GivenHeads(tuple(heads), str(path), digest, "a plain list; it does not say which model the heads are of")


def made_on(path: str | Path) -> Fingerprint | None:
    """The model that a file of heads was made on; None for a plain list, which does not say.

    Raises:
        ValueError: no such file; not JSON; or a damaged fingerprint. All else is for :func:`read_heads`.
    """
    content = read_json(Path(path), WHAT)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    try:
        return Fingerprint.from_fields(content.get("fingerprint"))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: damaged field 'fingerprint' ({error}).") from error


def file_hash(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a file.

    Raises:
        ValueError: the file cannot be read.
    """
    return hashlib.sha256(read_bytes(Path(path), WHAT, most=MOST_JSON)).hexdigest()[:16]
