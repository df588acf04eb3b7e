"""Pairs in a spreadsheet, by openpyxl (the extra ``sheets``): one sheet with two columns.

Words are what the cells show. Where that is not in the file (formulas without a stored value) or depends on how a cell
is formatted (dates, fractions, padded numbers), the cell is named and nothing is guessed.
"""

import io
import warnings
import zipfile
from typing import Any

from fvlens.relations._tables import is_blank, two_columns, without_heading
from fvlens.relations._words import MOST_PAIRS, shortened

_MOST_UNPACKED = 400_000_000
"""Bytes of an unpacked workbook that are accepted."""
_AS_TEXT = "format the column as text and write what should stand in a prompt"


def read_sheet(data: bytes, name: str, sheet: str | None = None) -> tuple[list[tuple[str, Any, Any]], list[str], str]:
    """The rows of a sheet: place, input, output; what must be said of them; and the sheet's name.

    Args:
        data: the file's bytes.
        name: the file, for messages.
        sheet: which one; by default the only one that is not empty.

    Raises:
        ValueError: openpyxl is not installed; no workbook; no such sheet, or several; more columns than two; a cell
            whose text cannot be told. The message names sheet and cell.
    """
    values, formulas = (_workbook(data, name, data_only=only) for only in (True, False))
    filled = [one for one in values.worksheets if any(not is_blank(v) for row in one.values for v in row)]
    names = [one.title for one in filled]
    if sheet is not None:
        if sheet not in names:
            raise ValueError(f"{name}: no sheet {sheet!r} with anything in it; there are {_listed(names)}.")
        filled = [values[sheet]]
    if not filled:
        if any(not is_blank(v) for one in formulas.worksheets for row in one.values for v in row):
            raise ValueError(f"{name}: its formulas have no stored values; open it in a spreadsheet program and save.")
        raise ValueError(f"{name}: expected rows of two words, got an empty workbook.")
    if len(filled) > 1:
        raise ValueError(
            f"{name}: expected one sheet with pairs, got {len(names)}: {_listed(names)}; keep one in the file "
            f"(in Python, read_pairs({name!r}, sheet={names[0]!r}) takes one of them)."
        )
    (chosen,) = filled
    if chosen.max_row > MOST_PAIRS:
        raise ValueError(f"{name}: expected at most {MOST_PAIRS:,} rows, got {chosen.max_row:,}; delete empty ones.")
    where = f"sheet {chosen.title!r}"
    rows: list[tuple[Any, list[Any]]] = []
    for cells, written in zip(chosen.iter_rows(), formulas[chosen.title].iter_rows(), strict=True):
        found = [_shown(cell, one, f"{name}, {where}") for cell, one in zip(cells, written, strict=True)]
        if any(not is_blank(value) for _, value in found):
            rows.append(([place for place, _ in found], [value for _, value in found]))
    pairs, notes = _pairs(rows, name, where)
    pairs, told = without_heading(pairs, name, lambda key: key)
    return pairs, [*notes, *told], chosen.title


def _pairs(rows: list[tuple[Any, list[Any]]], name: str, where: str) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    """Rows of two cells; places are of the first cell that is not blank."""
    kept, notes = two_columns(rows)
    pairs = []
    for places, cells in kept:
        if len(cells) != 2:
            at = next((place for place, value in zip(places, cells, strict=False) if not is_blank(value)), places[0])
            words = [value for value in cells if not is_blank(value)]
            raise ValueError(
                f"{name}, {where}, cell {at}: expected a sheet of two columns, input and output, got a row with "
                f"{shortened(words)}; keep the two columns that are meant."
            )
        pairs.append((f"{where}, row {''.join(c for c in places[0] if c.isdigit())}", *cells))
    return pairs, notes


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _workbook(data: bytes, name: str, *, data_only: bool) -> Any:
    """The workbook, with stored values or with what was written."""
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{name}: spreadsheets are read by openpyxl, which is not installed: pip install 'fvlens[sheets]', or save "
            "the sheet as CSV."
        ) from None
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise ValueError(f"{name}: an old or encrypted spreadsheet; save it as .xlsx without a password, or as CSV.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size <= _MOST_UNPACKED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of parts that play no role here, such as styles and validations
                return openpyxl.load_workbook(io.BytesIO(data), data_only=data_only)
    except Exception as error:  # whatever a damaged file brings about
        raise ValueError(f"{name}: not an .xlsx spreadsheet, or a damaged one ({error}).") from error
    raise ValueError(f"{name}: expected a spreadsheet of at most {_MOST_UNPACKED:,} bytes unpacked, got {size:,}.")


def _shown(cell: Any, written: Any, where: str) -> tuple[str, Any]:
    """A cell's place and the text that it shows, or a whole number.

    Raises:
        ValueError: it cannot be told.
    """
    place, value = written.coordinate, cell.value

    def refused(what: str) -> ValueError:
        return ValueError(f"{where}, cell {place}: expected a word, got {what}; {_AS_TEXT}.")

    if written.data_type == "f" and value is None:
        raise ValueError(
            f"{where}, cell {place}: holds a formula without a stored value; open the file in a spreadsheet program "
            "and save it, or put the values in its place."
        )
    if value is None or (isinstance(value, str) and cell.data_type != "e"):
        return place, value
    if cell.data_type == "e":
        raise refused(f"the error {value}")
    if isinstance(value, bool):
        raise refused(f"the truth value {str(value).upper()}, which programs show in their own language")
    if isinstance(value, int):
        if cell.number_format not in ("General", "0", "@"):
            raise refused(f"the number {value} in the format {cell.number_format!r}")
        return place, value
    if isinstance(value, float):
        raise refused(f"the number {value}")
    raise refused(f"a {type(value).__name__}: {value}")
