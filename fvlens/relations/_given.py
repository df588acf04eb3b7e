"""The one way from whatever somebody has their pairs in to a :class:`Relation`.

Everything in fvlens that takes pairs calls :func:`as_relation`, :func:`as_pairs` or :func:`as_relations`, so that each
shape means the same everywhere and a bad one is refused with the same words.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fvlens.arguments import check_kinds
from fvlens.relations._library import library_relation, list_relations
from fvlens.relations._pairs import Reading, check_names, is_file_of_pairs, read_file, read_folder, warn
from fvlens.relations._relation import Pair, Part, Relation, Split
from fvlens.relations._shapes import source_of
from fvlens.relations._words import Entry, gathered, shortened

Pairs = Relation | str | Path | Mapping[Any, Any] | Iterable[Any]
"""Word pairs, as functions that ask them take them: see :func:`as_relation`."""


def as_relation(pairs: Pairs, *, what: str = "pairs", name: str | None = None) -> Relation:
    """A relation out of pairs in any shape.

    Shapes: a :class:`Relation`; the name of a library relation; a file (:func:`fvlens.relations.read_pairs`); a list,
    tuple, iterator or array of pairs, each a tuple or list of two, or a record of two fields; a dict of words and their
    answers; a table of two columns. Names such as ``input`` and ``output`` say which field is which, else their order
    does. Whole numbers are words in digits.

    Args:
        pairs: the pairs. Iterators are gone through once.
        what: what they are, for messages.
        name: of the relation; by default its own, that of the file, or none.

    Returns:
        :class:`Relation`, each input in it once. A warning says what was trimmed or dropped.

    Raises:
        ValueError: nothing of the kind; no pair; a pair that is none, or has a word that is missing, blank, a fraction
            or no text. The message names the place and what to do.

    Example:
        >>> from fvlens.relations import as_relation
        >>> as_relation([{"subject": "hot", "object": "cold"}, {"subject": "big", "object": "small"}]).outputs
        ('cold', 'small')
    """
    return reading_of(pairs, what=what, name=name).warn(what, stacklevel=4)


def as_pairs(pairs: Pairs | None, *, what: str = "pairs", may_be_empty: bool = False) -> tuple[Pair, ...]:
    """The pairs of :func:`as_relation`; none for None and for an empty list, where that is allowed.

    Raises:
        ValueError: as for :func:`as_relation`.
    """
    return named_pairs(pairs, what=what, may_be_empty=may_be_empty, stacklevel=6)[0]


def named_pairs(
    pairs: Pairs | None,
    *,
    what: str = "pairs",
    may_be_empty: bool = False,
    repeats: bool = False,
    stacklevel: int = 5,
) -> tuple[tuple[Pair, ...], str]:
    """The pairs of :func:`as_relation`, and its name, empty where they have none.

    Args:
        pairs: the pairs.
        what: what they are, for messages.
        may_be_empty: None and an empty list are no error.
        repeats: pairs that are given in Python are kept as often as they stand there.
        stacklevel: of the warning.

    Raises:
        ValueError: as for :func:`as_relation`.
    """
    if may_be_empty and pairs is None:
        return (), ""
    if isinstance(pairs, Relation) and repeats:
        return pairs.pairs, pairs.name
    if isinstance(pairs, str | Path | Relation | Split):
        relation = reading_of(pairs, what=what).warn(what, stacklevel=stacklevel)
        return relation.pairs, relation.name
    source = source_of(pairs, what)
    found = gathered(source.entries, source.where, what, may_be_empty=may_be_empty, repeats=repeats)
    warn(what, (*source.notes, *found.notes), stacklevel=stacklevel)
    own, name = tuple(Pair(*pair) for pair in found.pairs), _name_of(pairs)
    return (Part(own, name) if name else own), name


def _name_of(pairs: Any) -> str:
    """The name that pairs bring with them: those of a split do."""
    return pairs.relation if isinstance(pairs, Part) else ""


def reading_of(pairs: Any, *, what: str = "pairs", name: str | None = None) -> Reading:
    """What :func:`as_relation` gives, with what reading it left out or changed, and without a warning."""
    if isinstance(pairs, str | Path):
        reading = _named(pairs, what)
        if name is None or name == reading.relation.name:
            return reading
        return dataclasses.replace(reading, relation=dataclasses.replace(reading.relation, name=name))
    if isinstance(pairs, Relation):
        entries = (Entry(i, *pair) for i, pair in enumerate(pairs.pairs, start=1))
        found = gathered(entries, lambda i: f"pair {i}", what)
        changes: dict[str, Any] = {} if name is None or name == pairs.name else {"name": name}
        if found.dropped:
            changes["pairs"] = tuple(Pair(*pair) for pair in found.pairs)
        return Reading(dataclasses.replace(pairs, **changes) if changes else pairs, found.dropped, found.notes)
    if isinstance(pairs, Split):
        raise ValueError(f"{what}: expected word pairs, got a Split; give one of its parts, such as .train.")
    source = source_of(pairs, what)
    found = gathered(source.entries, source.where, what)
    relation = Relation(_name_of(pairs) if name is None else name, tuple(Pair(*pair) for pair in found.pairs))
    return Reading(relation, found.dropped, (*source.notes, *found.notes))


def load_relation(name: str | Path) -> Relation:
    """A relation of the word-pair library by name, or one of your own from a file.

    Args:
        name: the name of a library relation, or a file, see :func:`fvlens.relations.read_pairs`. A file that is named
            as a relation of the library is given with its folder, such as ``./antonym``.

    Raises:
        ValueError: neither; the message offers the nearest names. What is wrong with a file.

    Example:
        >>> import fvlens
        >>> dict(fvlens.load_relation("country-capital").pairs)["France"]
        'Paris'
    """
    check_kinds("load_relation", load_relation, {"name": name})
    return _named(name, "").warn(str(name), stacklevel=3)


def as_relations(given: Any, *, what: str = "relations", may_be_empty: bool = False) -> list[Relation]:
    """Relations out of a list of them, of names, files and folders of files; or one folder.

    Raises:
        ValueError: none, two of one name, or anything else that :func:`as_relation` refuses.
    """
    readings = readings_of(given, what=what, may_be_empty=may_be_empty)
    return [reading.warn(reading.relation.name, stacklevel=4) for reading in readings]


def readings_of(given: Any, *, what: str = "relations", may_be_empty: bool = False) -> list[Reading]:
    """What :func:`as_relations` gives, with what reading it left out or changed, and without a warning."""
    if isinstance(given, str | Path) and _is_folder(given):
        given = [given]
    elif isinstance(given, str | Path | Relation):
        raise ValueError(f"{what}: expected a sequence of relations, got a single one; put it into a list.")
    elif isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{what}: expected a list of relations, names, files or folders, got {shortened(given)}.")
    readings: list[Reading] = []
    for one in given:
        if isinstance(one, str | Path) and _is_folder(one):
            readings += read_folder(one)
        elif isinstance(one, str | Path | Relation):
            readings.append(reading_of(one, what=what))
        else:
            raise ValueError(f"{what}: expected relations, names, files or folders, got {shortened(one)}.")
    if not readings and not may_be_empty:
        raise ValueError(f"{what}: expected at least one relation, got none; see fvlens.list_relations().")
    check_names([reading.relation for reading in readings], what)
    return readings


def _is_folder(given: str | Path) -> bool:
    try:
        return given not in list_relations() and bool(str(given)) and Path(given).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def _named(given: str | Path, what: str) -> Reading:
    """The library relation of this name, or the pairs of a file; where there is neither, what it could have been."""
    if isinstance(given, str) and given in list_relations():
        return Reading(library_relation(given))
    begin = f"{what}: " if what else ""
    try:
        path = Path(given).expanduser()
        exists, is_folder = path.exists() or path.is_symlink(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{begin}no file of word pairs at {shortened(str(given))} ({why}).") from None
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{begin}{given} is a link that leads nowhere, or in a circle; give the file itself.")
    if isinstance(given, str) and not exists and not path.suffix and "/" not in given and "\\" not in given:
        try:
            return Reading(library_relation(given))
        except ValueError as error:
            raise ValueError(f"{begin}no file {shortened(given)}, and {error}") from None
    if is_folder and given != "":
        n = sum(map(is_file_of_pairs, path.iterdir()))
        raise ValueError(
            f"{begin}{given} is a folder with {n} files of word pairs; give one of them. Functions that take many "
            "relations take the folder itself."
        )
    return read_file(path if given != "" else "")
