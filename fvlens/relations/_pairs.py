"""Files of word pairs: told by their contents and their name, read with a place for whatever is wrong.

One row of :data:`FORMATS` a kind of file; :func:`read_file` reads any of them.
"""

import codecs
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fvlens.files import read_bytes
from fvlens.relations._json_pairs import read_json_pairs
from fvlens.relations._relation import Pair, Relation, as_pair
from fvlens.relations._shapes import Source
from fvlens.relations._sheets import read_sheet
from fvlens.relations._tables import read_table
from fvlens.relations._words import Dropped, Entry, gathered, shortened
from fvlens.showing import Shown, named

_WHAT = "file of word pairs"
_HEADER_FIELDS = ("name", "category", "family", "domain", "direction")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks and the encodings that they announce; longer ones first."""


@dataclass(frozen=True, slots=True, repr=False)
class Reading(Shown):
    """A relation, and what reading it left out or changed.

    Attributes:
        relation: the pairs that are used.
        dropped: pairs that are not, with place and reason.
        notes: what must be said, a sentence each without its point; empty if nothing.
    """

    relation: Relation
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()

    def _line(self) -> str:
        return f"{named(self.relation.name)}: {len(self.relation)} pairs, {len(self.dropped)} dropped"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("dropped", "where", "why"), *((" -> ".join(one.pair), one.place, one.why) for one in self.dropped)]

    def warn(self, what: str, stacklevel: int = 3) -> Relation:
        """The relation; a warning says what must be said."""
        warn(what, self.notes, stacklevel=stacklevel + 1)
        return self.relation


def warn(what: str, notes: Sequence[str], *, stacklevel: int) -> None:
    """A warning of what must be said, if there is anything."""
    if notes:
        warnings.warn(f"{what}: {'; '.join(notes)}.", stacklevel=stacklevel)


def _text_table(data: bytes, path: Path, sheet: str | None) -> tuple[Source, dict[str, str]]:
    table = read_table(_decoded(data, path.name), path.name, path.suffix.lower())
    entries = [Entry(*row) for row in table.rows]
    return Source(entries, lambda line: f"line {line}", table.notes), table.header


def _json(data: bytes, path: Path, sheet: str | None) -> tuple[Source, dict[str, str]]:
    return read_json_pairs(_decoded(data, path.name), path.name, path.suffix.lower())


def _spreadsheet(data: bytes, path: Path, sheet: str | None) -> tuple[Source, dict[str, str]]:
    rows, notes, _ = read_sheet(data, path.name, sheet)
    return Source([Entry(*row) for row in rows], lambda place: place, tuple(notes)), {}


@dataclass(frozen=True, slots=True)
class _Format:
    suffixes: tuple[str, ...]
    read: Callable[[bytes, Path, str | None], tuple[Source, dict[str, str]]]


FORMATS = {
    "text": _Format((".tsv", ".csv", ".txt", ".tab"), _text_table),
    "json": _Format((".json", ".jsonl", ".ndjson"), _json),
    "spreadsheet": _Format((".xlsx", ".xlsm"), _spreadsheet),
}
"""Kinds of files, with the ends of their names and their readers."""
SUFFIXES = tuple(suffix for one in FORMATS.values() for suffix in one.suffixes)


def read_file(path: str | Path, *, sheet: str | None = None) -> Reading:
    """A file of pairs, and what reading it left out or changed.

    Raises:
        ValueError: as for :func:`read_pairs`.
    """
    path = _expanded(path)
    data = read_bytes(path, _WHAT)
    kind = _kind(data, path)
    if sheet is not None and kind != "spreadsheet":
        raise ValueError(f"{path.name}: sheet={sheet!r}, but only a spreadsheet has sheets; leave it out.")
    source, said = FORMATS[kind].read(data, path, sheet)
    found = gathered(source.entries, source.where, path.name)
    relation = Relation(
        pairs=tuple(Pair(*pair) for pair in found.pairs),
        source=said.get("compiled") or path.name,
        path=str(path),
        **{"name": path.stem, **{field: said[field] for field in _HEADER_FIELDS if said.get(field)}},
    )
    return Reading(relation, found.dropped, (*source.notes, *found.notes))


def read_pairs(path: str | Path, *, sheet: str | None = None) -> Relation:
    """A relation from a file of word pairs, named after the file.

    - A text of two columns, set apart by tabs, commas, semicolons or bars, with quotes as in CSV. A first line that
      names the columns is left out; lines ``# key: value`` at the top, as in the library's own files, are read.
    - JSON or JSON lines: lists of two, records of two fields such as Todd et al.'s ``{"input": ..., "output": ...}``,
      LRE's ``samples``, or an object of words and their answers.
    - A spreadsheet, ``.xlsx``, with one sheet of two columns (``pip install 'fvlens[sheets]'``).

    Texts are UTF-8, or UTF-16 and UTF-32 with their mark. White space around words is trimmed, pairs that stand twice
    are kept once, and of several outputs of one input the first is kept; a warning says how often and where.

    Args:
        path: the file; ``~`` is the home folder.
        sheet: of a spreadsheet with several.

    Returns:
        :class:`Relation`, its ``path`` the file.

    Raises:
        ValueError: no such file, or none of these; a line, row, entry or cell that is no pair of two words; no pair at
            all. The message names file and place, and what to do.
    """
    return read_file(path, sheet=sheet).warn(Path(path).name)


def read_folder(folder: str | Path) -> list[Reading]:
    """Every file of pairs in a folder, by name; files of other kinds and hidden ones are left alone.

    Raises:
        ValueError: no such folder, no file of pairs in it, two of one name; whatever :func:`read_file` refuses.
    """
    folder = _expanded(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of word pairs at {folder}.")
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror or error}).") from None
    files = [one for one in inside if is_file_of_pairs(one)]
    if not files:
        below = [one.name for one in inside if one.is_dir() and any(map(is_file_of_pairs, one.iterdir()))]
        hint = f"; there are some in {', '.join(below)} below it" if below else ""
        raise ValueError(f"{folder}: no files of word pairs in this folder ({', '.join(SUFFIXES)}){hint}.")
    readings = [read_file(file) for file in files]
    check_names([one.relation for one in readings], str(folder))
    return readings


def is_file_of_pairs(path: Path) -> bool:
    """Whether a file in a folder is taken for one, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "~$")) and not path.is_dir()


def check_names(relations: Sequence[Relation], what: str) -> None:
    """Refuse two relations of one name."""
    seen: dict[str, Relation] = {}
    for one in relations:
        if one.name in seen:
            files = [str(each.path) for each in (seen[one.name], one) if each.path]
            where = f" ({' and '.join(files)})" if files else ""
            raise ValueError(f"{what}: two relations are named {one.name!r}; names must be unique{where}.")
        seen[one.name] = one


def from_recorded(name: str, pairs: Sequence[object], path: str = "", *, family: str = "") -> Relation:
    """The relation that a file of results keeps, pair by pair.

    Raises:
        ValueError: a damaged pair.
    """
    made = tuple(as_pair(one, f"pair {i}") for i, one in enumerate(pairs, start=1))
    return Relation(name, made, source=Path(path).name, path=path, family=family)


def _expanded(path: str | Path) -> Path:
    """The path, with the home folder for ``~``."""
    if not str(path).strip():
        raise ValueError(f"expected a {_WHAT}, got the path {str(path)!r}.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no {_WHAT} at {path} ({error}).") from None


def _kind(data: bytes, path: Path) -> str:
    """What a file holds, by its first bytes, then by its name."""
    suffix = path.suffix.lower()
    if (
        data.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\xd0\xcf\x11\xe0"))
        or suffix in FORMATS["spreadsheet"].suffixes
    ):
        if suffix in (".ods", ".zip", ".numbers"):
            raise ValueError(f"{path.name}: expected a text, JSON or .xlsx, got {suffix}; save it as .xlsx or CSV.")
        return "spreadsheet"
    if data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PAR1", b"\x80\x04", b"\x80\x05", b"%PDF")):
        raise ValueError(f"{path.name}: expected a text, JSON or .xlsx, got packed or binary data; unpack it first.")
    if suffix in FORMATS["json"].suffixes:
        return "json"
    if suffix not in FORMATS["text"].suffixes and _decoded(data, path.name).lstrip()[:1] in ("{", "["):
        return "json"
    return "text"


def _decoded(data: bytes, name: str) -> str:
    """The text of a file, every line ending in a line feed.

    Raises:
        ValueError: an encoding that cannot be told, with the place of the first byte that shows it.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        piece = data[error.start : error.start + 1]
        guess = "" if encoding != "utf-8" else f" (in Windows-1252 it would be {piece.decode('cp1252', 'replace')!r})"
        raise ValueError(
            f"{name}, line {line}: expected {encoding.removesuffix('-sig').upper()} text, but byte {error.start} is "
            f"none{guess}. Save the file again as UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{name}, line {line}: expected a text, got a NUL byte ({shortened(text[:20])}); it is binary, or UTF-16 "
            "without a mark. Save the file again as UTF-8."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
