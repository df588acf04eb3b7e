"""Tables of two columns: text with any delimiter, and which line is a heading.

A text is read with each delimiter that could be meant; the one under which every line has two cells is taken. Where
several do, nothing is guessed.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}
"""Delimiters that are expected, and how messages call them."""
RARE = (":", "=", "^", "~", "\x1f")
"""Delimiters that are tried where none of the others fits."""

FIELD_NAMES = (
    ("input", "output"), ("inputs", "outputs"), ("subject", "object"), ("source", "target"), ("query", "answer"),
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("word", "answer"), ("word1", "word2"),
    ("word_1", "word_2"), ("word 1", "word 2"), ("key", "value"),
)  # fmt: skip
"""Names that say which of two columns or fields is the input."""
_CERTAIN = (("input", "output"), ("inputs", "outputs"), ("word1", "word2"), ("word_1", "word_2"), ("word 1", "word 2"))
"""Those that are no pair of words themselves, as question and answer could be."""
_COMMENT = re.compile(r"#+ ")

_HEADINGS = frozenset(
    "word term item name english french german spanish italian singular plural noun verb adjective adverb present past "
    "positive comparative superlative antonym synonym opposite translation country capital city language currency "
    "continent animal category class kind type label person company product colour color sound hypernym hyponym".split()
)
"""Single words that head columns more often than they are half of a pair, where both cells of a first line are such."""
_SAMPLE = 100_000
"""Signs of a long text by which its delimiter is found."""
_LEAST_ROWS = 3
"""Rows that must stand below a line for its letters alone to make it a heading."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of two cells each.

    Attributes:
        rows: key of the place, input, output.
        notes: what must be said of how they were read.
        header: what the file says of itself in lines ``# key: value``.
    """

    rows: tuple[tuple[Any, Any, Any], ...]
    notes: tuple[str, ...]
    header: dict[str, str]


def read_table(text: str, name: str, suffix: str) -> Table:
    """The table in a text.

    Args:
        text: the text, each line ending in a line feed.
        name: the file, for messages.
        suffix: the end of its name, which decides what a file of one column lacks.

    Raises:
        ValueError: a line that has not two cells under any delimiter; quotes that are not closed; several delimiters
            that fit. The message names the line.
    """
    header, n_top = _header(text)
    body = text.split("\n", n_top)[n_top] if n_top else text
    stated = re.match(r"sep=(.)\n", body)  # what spreadsheet programs write for each other
    if stated:
        body, n_top = body[stated.end() :], n_top + 1
    delimiter, rows = _rows(body, name, suffix, n_top, (stated[1],) if stated else (*DELIMITERS, *RARE))
    notes = [f"{delimiter!r} was taken for what sets words apart"] if delimiter in RARE else []
    comments = [line for line, cells in rows if _is_comment(cells, delimiter)]
    if comments:
        notes.append(f"{len(comments)} lines were left out as comments or rules (first: line {comments[0]})")
    kept = [(line, cells) for line, cells in rows if not _is_comment(cells, delimiter)]
    kept, told = two_columns(kept)
    notes += told
    for line, cells in kept:
        if len(cells) != 2:
            raise ValueError(
                f"{name}, line {line}: expected two words, input{delimiter!r}output, got {list(cells)}. "
                + ("Words that hold the delimiter need quotes around them." if len(cells) > 2 else "Add the other one.")
            )
    pairs = [(line, cells[0], cells[1]) for line, cells in kept]
    if not {"name", "category", "compiled"} <= set(header):  # our own files have no other heading
        pairs, told = without_heading(pairs, name, lambda line: f"line {line}")
        notes += told
    return Table(tuple(pairs), tuple(notes), header)


def _header(text: str) -> tuple[dict[str, str], int]:
    """What the lines before the first row say of the file, ``# key: value`` each, and how many lines that are."""
    header: dict[str, str] = {}
    for n_top, line in enumerate(text.split("\n")):
        if line.strip() and not _COMMENT.match(f"{line} "):
            return header, n_top
        key, colon, value = line.lstrip("#").partition(":")
        if colon:
            header[key.strip()] = value.strip()
    return header, 0  # nothing but comments: the message is that of a file without rows


def _is_comment(cells: Sequence[str], delimiter: str) -> bool:
    if _COMMENT.match(f"{cells[0]} " if len(cells) == 1 else cells[0]):
        return True
    # the line below the heading of a Markdown table
    return delimiter == "|" and all(re.fullmatch(r"(:?-+:?)?", cell.strip()) for cell in cells)


def _parsed(body: str, delimiter: str, n_top: int) -> tuple[list[tuple[int, list[str]]], str]:
    """Lines that are not blank, with their numbers, and what is wrong with the quotes."""
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    begins = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((n_top + begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        return rows, f"line {n_top + begins}: {error}"
    return rows, ""


def _rows(
    body: str, name: str, suffix: str, n_top: int, known: Sequence[str]
) -> tuple[str, list[tuple[int, list[str]]]]:
    """The delimiter, one of those known, and the lines' cells under it."""
    cut = body.rfind("\n", 0, _SAMPLE) + 1 if len(body) > _SAMPLE else 0
    sample = body[: cut or None]
    fitting, best = [], (-1, "")
    for delimiter in known:
        if delimiter in RARE and fitting:
            break
        rows, wrong = _parsed(sample, delimiter, n_top)
        n_two = sum(_is_two(cells, delimiter) for _, cells in rows)
        if rows and n_two == len(rows) and (not wrong or len(sample) < len(body)):
            fitting.append(delimiter)
        if delimiter in DELIMITERS and n_two > best[0]:
            best = (n_two, delimiter)
    if "\t" in fitting:
        fitting = ["\t"]  # words hardly hold tabs
    if len(fitting) > 1:
        names = " and ".join(DELIMITERS.get(one, repr(one)) for one in fitting)
        raise ValueError(
            f"{name}: every line has two words under {names}, so it cannot be told which sets them apart; put tabs "
            "between the words, or quotes around words that hold one of these."
        )
    usual = known[0] if len(known) == 1 else "\t" if suffix in (".tsv", ".tab") else ","
    delimiter = fitting[0] if fitting else best[1] if best[0] > 0 else usual
    rows, wrong = _parsed(body, delimiter, n_top)
    if not body.strip():
        raise ValueError(f"{name}: expected a line 'input,output' for each pair, got an empty file.")
    odd = next((line for line, cells in rows if not _is_two(cells, delimiter)), None)
    if wrong and (odd is None or best[0] > 0):
        raise ValueError(f"{name}, {wrong}. Close the quotes, or double those that are part of a word.")
    if best[0] <= 0 and not fitting and rows:
        expected = ", ".join(DELIMITERS.values())
        line, cells = rows[0]
        raise ValueError(
            f"{name}, line {line}: expected two words, input{delimiter!r}output, got {cells}. Set the words of each "
            f"pair apart by one of {expected}."
        )
    return delimiter, rows


def _is_two(cells: Sequence[str], delimiter: str) -> bool:
    """Whether a line could be a pair: two cells, or more of which two are not blank; comments are none."""
    if _is_comment(cells, delimiter):
        return True
    n_words = sum(bool(cell.strip()) for cell in cells)
    return n_words == 2 or (len(cells) == 2 and delimiter in DELIMITERS)


def two_columns(rows: Sequence[tuple[Any, Sequence[Any]]]) -> tuple[list[tuple[Any, list[Any]]], list[str]]:
    """Rows without columns that are blank throughout, and without the row numbers that pandas writes in front."""
    width = max((len(cells) for _, cells in rows), default=0)
    if width <= 2:
        return [(key, list(cells)) for key, cells in rows], []
    filled = [[*cells, *[""] * (width - len(cells))] for _, cells in rows]
    used = [i for i in range(width) if any(not is_blank(cells[i]) for cells in filled)]
    notes = []
    if len(used) == 3 and len(filled) > 1:
        first = [str(cells[used[0]]).strip() for cells in filled]
        numbers = [str(i) for i in range(len(filled) - 1)]
        is_index = is_blank(filled[0][used[0]]) or first[0].startswith("Unnamed: 0")
        if is_index and first[1:] == numbers:
            used = used[1:]
            notes.append("the first column holds row numbers and was left out")
    if len(used) > 2:
        return [(key, list(cells)) for key, cells in rows], notes
    return [(key, [cells[i] for i in used]) for (key, _), cells in zip(rows, filled, strict=True)], notes


def is_blank(cell: Any) -> bool:
    """Whether nothing stands in a cell."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


def swapped(names: Sequence[Any]) -> bool | None:
    """Whether two names say output first; False for input first, None where they say neither."""
    plain = tuple(str(name).strip().lower() for name in names)
    return False if plain in FIELD_NAMES else True if plain[::-1] in FIELD_NAMES else None


def without_heading(
    rows: list[tuple[Any, Any, Any]], name: str, where: Any
) -> tuple[list[tuple[Any, Any, Any]], list[str]]:
    """Rows without a first one that names the columns, which may also say that they stand the other way round.

    Raises:
        ValueError: a heading, and no row below it.
    """
    if not rows:
        return rows, []
    key, *cells = rows[0]
    if not all(isinstance(cell, str) for cell in cells):
        return rows, []
    turned = swapped(cells)
    told = ", ".join(repr(cell.strip()) for cell in cells)
    if turned is None and not _is_heading([cell.strip() for cell in cells], rows[1:], name):
        return rows, []
    if len(rows) == 1:
        if turned is None:
            return rows, []
        raise ValueError(f"{name}: expected a line 'input,output' for each pair, got a header alone.")
    note = f"{where(key)} ({told}) was taken for a heading; if it is a pair, put a line input, output above it"
    if turned is None:
        return rows[1:], [note]
    if not turned:
        told = [] if tuple(cell.strip().lower() for cell in cells) in _CERTAIN else [note]
        return rows[1:], told
    return [(key, b, a) for key, a, b in rows[1:]], [f"by the heading ({told}) the second column holds the inputs"]


def _is_heading(cells: Sequence[str], below: Sequence[tuple[Any, Any, Any]], name: str) -> bool:
    """Whether a first line looks like names of columns: by its words, the file's name, or letters unlike all below."""
    plain = [cell.lower() for cell in cells]
    if set(plain) <= _HEADINGS:
        return True
    stem = re.split(r"[\W_]+", name.rpartition(".")[0].lower() or name.lower())
    if all(set(re.split(r"[\W_]+", cell)) <= set(stem) for cell in plain):
        return True
    if len(below) < _LEAST_ROWS:
        return False
    sides = [[str(row[i]).strip() for row in below] for i in (1, 2)]
    for cell, side in zip(cells, sides, strict=True):
        if all(_is_number(word) for word in side) and not _is_number(cell) and cell.replace("_", "a").isalpha():
            return True
    for is_case, is_other in ((str.isupper, str.islower), (str.islower, str.isupper)):
        if all(is_case(cell[:1]) for cell in cells) and all(is_other(word[:1]) for side in sides for word in side):
            return True
    return False


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"[+-]?\d+([.,]\d+)?", word))


def header_fields(header: dict[str, str], keys: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What a header says, under the names of a relation's fields."""
    return {field: header[key] for key, field in keys if header.get(key)}
