"""Word pairs from a plain file: two columns, set apart by commas or tabs."""

import csv
import io
from pathlib import Path

from fvlens.files import read_text
from fvlens.relations._library import Pair, Relation, read_relation

_HEADER = ("input", "output")


def read_pairs(path: str | Path) -> Relation:
    """A relation from a table of two columns, input and output, one pair a line; named after the file.

    Cells are set apart by tabs in a file whose name ends in ``.tsv`` or whose first line has a tab, else by commas,
    with quotes as in CSV. A first line ``input,output`` is a header. A file in the library's own format, which begins
    with ``# name: ...``, is read with all that its header says.

    Args:
        path: the file, in UTF-8.

    Returns:
        :class:`Relation`.

    Raises:
        ValueError: no such file, or one that is not UTF-8 text; a line without exactly two words; no pair at all. The
            message names file and line.
    """
    path = Path(path)
    text = read_text(path, "file of word pairs")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path.name}: expected a line 'input,output' for each pair, got an empty file.")
    if lines[0].startswith("# "):
        return read_relation(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in lines[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    pairs: list[Pair] = []
    first = True
    try:
        for cells in reader:
            words = [cell.strip() for cell in cells]
            if not any(words):
                continue
            if len(words) != 2 or not all(words):
                raise ValueError(
                    f"{path.name}, line {reader.line_num}: expected two words, input{delimiter!r}output, got {cells}."
                )
            if not (first and tuple(word.lower() for word in words) == _HEADER):
                pairs.append(Pair(*words))
            first = False
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: {error}.") from None
    if not pairs:
        raise ValueError(f"{path.name}: expected a line 'input,output' for each pair, got a header alone.")
    return Relation(name=path.stem, pairs=tuple(pairs), source=path.name)
