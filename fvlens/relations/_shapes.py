"""Whatever people have their pairs in, as entries with a place: sequences, records, mappings, tables, arrays.

Each shape is told by what it is, never by what unpacking it would give: a record is not its keys, a text of two letters
not two words. Iterators are gone through once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvlens.relations._tables import FIELD_NAMES, swapped
from fvlens.relations._words import Entry, shortened

SHAPES = (
    "a Relation, the name of one, a file, a list of (input, output), of records with two fields, a dict, or a table of "
    "two columns"
)
"""What pairs can come in, for messages."""


@dataclass(frozen=True, slots=True)
class Source:
    """What stands in the place of pairs, and how its places are called.

    Attributes:
        entries: gone through once.
        where: a place, in words, out of an entry's key.
        notes: what must be said of how it was read.
    """

    entries: Iterable[Entry]
    where: Callable[[Any], str]
    notes: tuple[str, ...] = ()


def source_of(given: Any, what: str, *, keys: bool = False, entry: str = "pair") -> Source:
    """Entries out of anything that holds pairs.

    Args:
        given: sequence, iterator, mapping, frame, series or array.
        what: what is read, for messages.
        keys: ``given`` is an iterator of (number, pair) already.
        entry: how one of them is called in messages.

    Raises:
        ValueError: nothing of the kind; the message says what to give instead. Entries that are no pairs are refused
            when they are gone through.
    """

    def numbered(key: Any) -> str:
        return f"{entry} {key}"

    if keys:
        return Source(_pairs(given, what, numbered), numbered)
    if isinstance(given, Mapping):
        return _of_mapping(given, what)
    if hasattr(given, "itertuples") and hasattr(given, "columns"):
        return _of_table(list(given.columns), given.itertuples(index=False, name=None), what)
    if hasattr(given, "iter_rows") and hasattr(given, "columns"):
        return _of_table(list(given.columns), given.iter_rows(), what)
    if hasattr(given, "iloc") and hasattr(given, "items"):
        return _of_series(given, what, numbered)
    if hasattr(given, "ndim") and hasattr(given, "tolist"):
        given = _of_array(given, what)
    if isinstance(given, set | frozenset):
        raise ValueError(
            f"{what}: expected pairs in an order, got a set, whose order differs from run to run; give sorted(...)."
        )
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ValueError(f"{what}: expected word pairs ({SHAPES}), got {type(given).__name__}: {shortened(given)}.")
    if hasattr(given, "read"):
        raise ValueError(f"{what}: expected word pairs, got an open file; give its path.")
    return Source(_pairs(enumerate(given, start=1), what, numbered), numbered)


def _pairs(given: Iterable[tuple[Any, Any]], what: str, where: Callable[[Any], str]) -> Iterator[Entry]:
    """Entries out of numbered tuples, lists, rows of arrays and records."""
    fields: tuple[str, ...] | None = None
    order: Sequence[str] = ("", "")
    for key, one in given:
        record = _record(one)
        if record is not None:
            names = tuple(map(str, record))
            if len(names) != 2:
                raise ValueError(
                    f"{what}, {where(key)}: expected a record with two fields, input and output, got "
                    f"{len(names)}: {', '.join(map(repr, names)) or 'none'}; keep the two that are meant."
                )
            if fields is None:
                fields, order = names, names[::-1] if swapped(names) else names
            if {*names} != {*fields}:
                raise ValueError(
                    f"{what}, {where(key)}: expected the fields {' and '.join(map(repr, fields))} as in the first "
                    f"record, got {' and '.join(map(repr, names))}."
                )
            values = dict(zip(names, record.values(), strict=True))
            yield Entry(key, values[order[0]], values[order[1]])
            continue
        if isinstance(one, str):
            raise ValueError(
                f"{what}, {where(key)}: expected a pair of two words, got the text {shortened(one)}; give pairs as "
                "('hot', 'cold'), and a single one inside a list."
            )
        words = one.tolist() if getattr(one, "ndim", None) == 1 and hasattr(one, "tolist") else one
        if not isinstance(words, tuple | list) or len(words) != 2:
            got = f"{len(words)} things" if isinstance(words, tuple | list) else type(one).__name__
            raise ValueError(
                f"{what}, {where(key)}: expected a pair of two words, got {got}: {shortened(one)}; give pairs as "
                "('hot', 'cold')."
            )
        yield Entry(key, *words)


def _record(one: Any) -> Mapping[Any, Any] | None:
    """The fields of a record; None for anything else."""
    if isinstance(one, Mapping):
        return one
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return None


def _of_mapping(given: Mapping[Any, Any], what: str) -> Source:
    """Words and their answers, or two columns under names that say which is which."""
    names, values = list(given), list(given.values())
    turned = swapped(names) if len(names) == 2 else None
    if turned is not None:
        columns = values[::-1] if turned else values
        if all(_is_column(column) for column in columns):
            first, second = (list(column) for column in columns)
            if len(first) != len(second):
                raise ValueError(
                    f"{what}: expected as many inputs as outputs, got {len(first)} and {len(second)}; give pairs."
                )
            entries = (Entry(i, a, b) for i, (a, b) in enumerate(zip(first, second, strict=True), start=1))
            return Source(entries, lambda key: f"row {key}")
        if all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{what}: expected pairs, got one record with the fields {' and '.join(map(repr, names))}; put it into "
                "a list, or give a dict of words and their answers."
            )
    for name, value in given.items():
        if isinstance(value, Mapping) or _is_column(value):
            columns = " and ".join(map(repr, FIELD_NAMES[0]))
            raise ValueError(
                f"{what}, entry {name!r}: expected a word and its answer, got {type(value).__name__}: "
                f"{shortened(value)}; give pairs, one answer each, or two columns under the names {columns}."
            )
    return Source((Entry(name, name, value) for name, value in given.items()), lambda key: f"entry {key!r}")


def _is_column(value: Any) -> bool:
    """Whether a value is a list of values."""
    if isinstance(value, str | bytes | Mapping):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)


def _of_table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], what: str) -> Source:
    """Rows of a frame with two columns."""
    if len(columns) != 2:
        raise ValueError(
            f"{what}: expected a table of two columns, input and output, got {len(columns)}: "
            f"{shortened([str(name) for name in columns])}; keep the two that are meant, as in frame[['input', "
            "'output']]."
        )
    turned = swapped(columns)
    notes = (f"by their names ({columns[0]}, {columns[1]}) the second column holds the inputs",) if turned else ()
    numbered = enumerate(rows, start=1)
    entries = (Entry(i, *(row[::-1] if turned else row)) for i, row in numbered)
    return Source(entries, lambda key: f"row {key}", notes)


def _of_series(given: Any, what: str, numbered: Callable[[Any], str]) -> Source:
    """A series of pairs, or of answers whose index holds the words."""
    values = list(given)
    if values and all(_record(one) is not None or isinstance(one, tuple | list) for one in values):
        return Source(_pairs(enumerate(values, start=1), what, numbered), numbered)
    index = list(given.index)
    if not all(isinstance(word, str) for word in index):
        raise ValueError(
            f"{what}: expected word pairs, got a series of {type(values[0]).__name__ if values else 'nothing'} without "
            "words in its index; give a table of two columns, or zip(inputs, outputs)."
        )
    rows = enumerate(zip(index, values, strict=True), start=1)
    return Source((Entry(i, a, b) for i, (a, b) in rows), lambda key: f"row {key}")


def _of_array(given: Any, what: str) -> Any:
    """The rows of an array with two columns."""
    names = getattr(getattr(given, "dtype", None), "names", None)
    if names:
        return [dict(zip(names, row, strict=True)) for row in given.tolist()]
    shape = list(given.shape)
    values = given.tolist()
    of_pairs = given.ndim == 1 and all(isinstance(one, tuple | list | Mapping) for one in values)
    if not of_pairs and (given.ndim != 2 or shape[1] != 2):
        raise ValueError(
            f"{what}: expected an array of two columns, [n 2], got the shape {shape}; give zip(inputs, outputs), or "
            "the array's transpose."
        )
    return values
