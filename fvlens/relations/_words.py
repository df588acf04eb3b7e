"""What is a word, and what becomes of many pairs of them: read, trimmed with a word about it, or refused with a place.

:func:`word_of` decides about one word, :func:`gathered` about all pairs of one source, whatever its shape was. Nothing
is left out in silence: what was trimmed or dropped is in :attr:`Gathered.notes` and :attr:`Gathered.dropped`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

MOST_PAIRS = 1_000_000
"""Pairs that are read at most, so that an endless generator is an error."""

_INVISIBLE = "\ufeff\u200b\u2060\u00ad"
"""Signs without width that carry no meaning in a word: byte-order mark, zero-width space, word joiner, soft hyphen."""
_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks of direction, which spreadsheets and web pages put around words."""
_AWAY = str.maketrans("", "", _INVISIBLE)
_SHOWN = 60
_MAYBE_MISSING = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "#N/A", "NA"})
"""Texts that programs write for a missing word; they can be words, so they are kept and said."""


class Unusable(ValueError):
    """Why something is no word."""


def word_of(value: Any) -> tuple[str, bool]:
    """A word as it stands in prompts, and whether it had to be trimmed for that.

    Texts lose white space and invisible signs around them; tabs and more blanks inside are one blank. A whole number is
    written in digits, which can be meant in one way only.

    Raises:
        Unusable: missing or blank; a number with a fraction, which could be written in several ways; no text at all; a
            text with line breaks, control characters or traces of a wrong encoding.
    """
    if isinstance(value, str):
        text = str.__str__(value)
    elif _is_missing(value):
        raise Unusable(f"is missing ({value!r}); fill it in, or leave the pair out")
    elif isinstance(value, Integral) and type(value).__name__ not in ("bool", "bool_"):
        return str(int(value)), False
    elif isinstance(value, Real) and type(value).__name__ not in ("bool", "bool_"):
        raise Unusable(f"is the number {value}; give it as text, written as it should stand in a prompt")
    elif isinstance(value, bytes):
        raise Unusable("is bytes; decode them first, as with .decode('utf-8')")
    else:
        raise Unusable(f"is {_article(type(value).__name__)}, not a word ({shortened(value)}); give one text")
    if text.isprintable() and "  " not in text and text[:1] != " " != text[-1:] and "\ufffd" not in text:
        if not text:
            raise Unusable("is blank; fill it in, or leave the pair out")
        if not (set(text) & set(_INVISIBLE)):
            return text, False
    return _trimmed(text)


def _trimmed(text: str) -> tuple[str, bool]:
    lines = text.translate(_AWAY).strip().splitlines()
    if len(lines) > 1:
        raise Unusable(f"holds a line break ({shortened(text)}); write it in one line")
    trimmed = " ".join(" ".join(lines).split())
    while trimmed and (trimmed[0] in _DIRECTIONS or trimmed[-1] in _DIRECTIONS):
        trimmed = trimmed.strip(_DIRECTIONS).strip()
    if not trimmed:
        raise Unusable("is blank; fill it in, or leave the pair out")
    for sign in trimmed:
        kind = unicodedata.category(sign)
        if kind in ("Cc", "Cs"):
            raise Unusable(f"holds the control character {sign!r} ({shortened(text)}); take it out")
        if sign == "\ufffd":
            raise Unusable(
                f"holds the sign {sign} of text that was read in a wrong encoding ({shortened(text)}); correct it"
            )
    return trimmed, trimmed != text


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and bool(value != value)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def shortened(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class Entry(NamedTuple):
    """What stands in the place of a pair.

    Attributes:
        key: where it stands; the source makes a place of it.
        input, output: what should be words.
    """

    key: Any
    input: Any
    output: Any


@dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that is not used.

    Attributes:
        place: where it stands.
        pair: its words.
        why: the reason.
    """

    place: str
    pair: tuple[str, str]
    why: str


@dataclass(frozen=True, slots=True)
class Gathered:
    """The pairs of one source.

    Attributes:
        pairs: those that are used.
        dropped: those that are not.
        notes: what must be said of both, a sentence each, without the final point; empty if nothing.
    """

    pairs: tuple[tuple[str, str], ...]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()


def gathered(
    entries: Iterable[Entry],
    where: Callable[[Any], str],
    what: str,
    *,
    may_be_empty: bool = False,
    repeats: bool = False,
) -> Gathered:
    """The pairs of a source: words trimmed, pairs that stand twice kept once, the first output of each input kept.

    Args:
        entries: what stands in the place of pairs.
        where: the place in the source, in words, out of the key of an entry.
        what: the source, for messages.
        may_be_empty: no pair at all is no error.
        repeats: keep every pair, for queries that are asked as often as they stand there.

    Raises:
        ValueError: no pair at all, too many, or a word that cannot be used; the message names the place of the first
            and how many there are.
    """
    first: dict[str, str] = {}
    kept: list[tuple[str, str]] = []
    fault = ""
    trimmed: list[Any] = []
    doubtful: list[tuple[Any, str]] = []
    dropped: list[Dropped] = []
    n_faults = n_entries = 0
    for entry in entries:
        n_entries += 1
        if n_entries > MOST_PAIRS:
            raise ValueError(f"{what}: expected at most {MOST_PAIRS:,} pairs, got more; give a part of them.")
        words = []
        for side in ("input", "output"):
            try:
                word, was_trimmed = word_of(getattr(entry, side))
            except Unusable as error:
                fault = fault or f"{where(entry.key)}: expected two words, but the {side} {error}"
                n_faults += 1
                break
            words.append(word)
            if was_trimmed:
                trimmed.append(entry.key)
            if word in _MAYBE_MISSING:
                doubtful.append((entry.key, word))
        if len(words) < 2:
            continue
        source, target = words
        if repeats or source not in first:
            first[source] = target
            kept.append((source, target))
        else:
            before = first[source]
            why = "stands twice" if before == target else f"another output, {before!r}, stands before it"
            dropped.append(Dropped(where(entry.key), (source, target), why))
    if n_faults:
        more = f" {_number(n_faults - 1, 'more pair')} cannot be used either." if n_faults > 1 else ""
        raise ValueError(f"{what}, {fault}.{more}")
    if not kept and not may_be_empty:
        raise ValueError(f"{what}: expected at least one pair, got none.")
    notes = _notes(trimmed, dropped, where)
    if doubtful:
        key, word = doubtful[0]
        notes.append(f"{_number(len(doubtful), 'word')} may stand for a missing one (first at {where(key)}: {word!r})")
    return Gathered(tuple(kept), tuple(dropped), tuple(notes))


def _notes(trimmed: list[Any], dropped: list[Dropped], where: Callable[[Any], str]) -> list[str]:
    notes = []
    if trimmed:
        n = len(trimmed)
        notes.append(
            f"{_number(n, 'word')} had white space or invisible signs, which {'was' if n == 1 else 'were'} trimmed "
            f"(first at {where(trimmed[0])})"
        )
    twice = [one for one in dropped if one.why == "stands twice"]
    other = [one for one in dropped if one.why != "stands twice"]
    if twice:
        notes.append(f"{_number(len(twice), 'pair')} dropped that stood before already ({_told(twice[0])})")
    if other:
        notes.append(
            f"{_number(len(other), 'pair')} dropped whose input stood before with another output, which is kept "
            f"({_told(other[0])}: {other[0].why})"
        )
    return notes


def _told(one: Dropped) -> str:
    return f"first at {one.place}, {' -> '.join(one.pair)}"


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def words_of(values: Any, what: str) -> tuple[str, ...]:
    """Words out of a list of them, such as answers to choose among; a single text is not taken apart into letters.

    Raises:
        ValueError: a text, a table or nothing that can be gone through; an entry that is no word.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or isinstance(values, set | frozenset):
        raise ValueError(f"{what}: expected a list of words, got {shortened(values)}; put them into a list.")
    found = []
    for i, value in enumerate(values, start=1):
        if i > MOST_PAIRS:
            raise ValueError(f"{what}: expected at most {MOST_PAIRS:,} words, got more; give a part of them.")
        try:
            found.append(word_of(value)[0])
        except Unusable as error:
            raise ValueError(f"{what}: word {i} {error}.") from None
    return tuple(found)


def plain_name(name: str) -> str:
    """A name that can be part of a file's name."""
    return re.sub(r"[^\w.\-]+", "-", name).strip("-.")[:80] or "pairs"
