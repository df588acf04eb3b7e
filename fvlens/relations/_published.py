"""Readers of published sets of analogies.

They are plain text parsers: nothing in a file is executed, and a bad row is refused with file, line and what was
expected. Words are kept as they are written, apart from the underscores that stand for blanks in some sets.
"""

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fvlens.files import as_path, read_text
from fvlens.relations._analogies import Analogy, analogies_within
from fvlens.relations._relation import Pair, Relation


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines of a file, without their ends."""
    yield from enumerate(read_text(path, "set of analogies").splitlines(), start=1)


def _complain(path: Path, number: int, expected: str, got: object) -> ValueError:
    return ValueError(f"{path.name}, line {number}: expected {expected}, got {got!r}.")


def _some(path: Path, made: list, what: str) -> list:
    if not made:
        raise ValueError(f"{path.name}: no {what} in it.")
    return made


def _word(text: str) -> str:
    return text.strip().replace("_", " ")


def _row(path: Path, number: int, **fields: object) -> Analogy:
    """An analogy whose complaints name the line."""
    try:
        return Analogy(**fields)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"{path.name}, line {number}: {error}") from None


def read_google(path: str | Path) -> list[Analogy]:
    """Mikolov et al.'s ``questions-words.txt``: a line ``: category``, then four words a line.

    Raises:
        ValueError: a line that is neither; a question before any category; no question.
    """
    path = as_path(path)
    made, category = [], ""
    for number, line in _lines(path):
        if line.startswith(":"):
            category = line[1:].strip()
            if not category:
                raise _complain(path, number, "': category'", line)
        elif line.strip():
            words = line.split()
            if len(words) != 4 or not category:
                raise _complain(path, number, "four words below a ': category' line", line)
            a, b, c, d = map(_word, words)
            made.append(
                _row(path, number, a=a, b=b, c=c, d=d, source=path.name, source_relation=category,
                     target_relation=category)
            )  # fmt: skip
    return _some(path, made, "questions")


def read_bats(folder: str | Path) -> list[Relation]:
    """BATS (Gladkova et al. 2016): files ``Lnn [name].txt`` in a folder or below it, ``word<TAB>answer1/answer2``.

    Returns:
        A relation a file, a pair for every answer in the file's order; :func:`analogies_within` makes analogies of
        them.

    Raises:
        ValueError: no such folder or no such files in it; a line that is not a word, a tab and answers.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder.name}; expected BATS files 'Lnn [name].txt' in it or its subfolders.")
    made = []
    for path in sorted(folder.rglob("[A-Z][0-9][0-9] [[]*[]].txt")):
        pairs = []
        for number, line in _lines(path):
            if not line.strip():
                continue
            word, tab, answers = line.partition("\t")
            given = [_word(answer) for answer in answers.split("/")]
            if not tab or not word.strip() or not all(given):
                raise _complain(path, number, "'word<TAB>answer1/answer2'", line)
            pairs += [Pair(_word(word), answer) for answer in dict.fromkeys(given)]
        _some(path, pairs, "pairs")
        code, _, name = path.stem.partition(" ")
        made.append(Relation(f"{code} {name.strip('[]')}", tuple(pairs), category=path.parent.name, source=path.name))
    return _some(folder, made, "BATS files 'Lnn [name].txt'")


def read_sat(path: str | Path) -> list[Analogy]:
    """Turney's blocks of SAT questions: a source line, the stem pair, five choice pairs, the letter of the right one.

    Pairs are written ``word word pos:pos``. Blocks are set apart by blank lines; lines that begin with ``#`` are
    comments.

    Returns:
        ``c : d`` is the right choice, ``foils`` are the other four pairs.

    Raises:
        ValueError: a block of another number of lines, a pair without its parts of speech, a letter out of a to e.
    """
    path = as_path(path)
    made: list[Analogy] = []
    block: list[tuple[int, str]] = []
    for number, line in [*_lines(path), (0, "")]:
        if line.startswith("#"):
            continue
        if line.strip():
            block.append((number, line.strip()))
        elif block:
            made.append(_sat_block(path, block))
            block = []
    return _some(path, made, "questions")


def _sat_block(path: Path, block: Sequence[tuple[int, str]]) -> Analogy:
    start = block[0][0]
    if len(block) != 8:
        raise _complain(path, start, "a block of 8 lines (source, stem, five choices, letter)", f"{len(block)} lines")
    pairs = []
    for number, line in block[1:7]:
        parts = line.split()
        if len(parts) != 3 or ":" not in parts[2]:
            raise _complain(path, number, "'word word pos:pos'", line)
        pairs.append(Pair(_word(parts[0]), _word(parts[1])))
    number, letter = block[7]
    if letter not in tuple("abcde"):
        raise _complain(path, number, "the letter of the right choice, a to e", letter)
    stem, choices = pairs[0], pairs[1:]
    right = choices.pop("abcde".index(letter))
    return _row(
        path, start, a=stem.input, b=stem.output, c=right.input, d=right.output, foils=tuple(choices),
        source=f"{path.name}: {block[0][1]}",
    )  # fmt: skip


def _table(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a delimited file with a header, as dictionaries, with their line numbers."""
    lines = list(_lines(path))
    if not lines:
        raise ValueError(f"{path.name}: expected a header with {', '.join(columns)}, got an empty file.")
    reader = csv.reader(io.StringIO("\n".join(line for _, line in lines)), delimiter=delimiter)
    try:
        header = [cell.strip() for cell in next(reader)]
        missing = [name for name in columns if name not in header]
        if missing:
            raise _complain(path, 1, f"a header with {', '.join(columns)}", delimiter.join(header))
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise _complain(path, reader.line_num, f"{len(header)} cells", delimiter.join(cells))
            yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: {error}.") from None


def read_semeval(path: str | Path, *, min_rating: float = 0.0) -> list[Relation]:
    """SemEval-2012 task 2, ``derived_gold.tsv``: graded pairs of 79 relations (Jurgens et al. 2012).

    The set holds reversed foils and weak pairs on purpose, with low ratings.

    Args:
        path: the file; columns subcat, class, subclass, split, word1, word2, gold_maxdiff.
        min_rating: only pairs rated above this are kept (the rating is the share of "best" minus "worst" votes, in
            percent).

    Returns:
        A relation a subcategory, best pairs first; relations without any pair above ``min_rating`` are left out.

    Raises:
        ValueError: a column is missing; a row of another length or without a number for its rating; nothing is left.
    """
    path = as_path(path)
    rated: dict[tuple[str, str, str], list[tuple[float, Pair]]] = defaultdict(list)
    columns = ("subcat", "class", "subclass", "word1", "word2", "gold_maxdiff")
    for number, row in _table(path, "\t", columns):
        try:
            rating = float(row["gold_maxdiff"])
        except ValueError:
            raise _complain(path, number, "a number in gold_maxdiff", row["gold_maxdiff"]) from None
        if not row["word1"] or not row["word2"]:
            raise _complain(path, number, "two words", f"{row['word1']}\t{row['word2']}")
        if rating > min_rating:
            key = (row["subcat"], row["class"], row["subclass"])
            rated[key].append((rating, Pair(_word(row["word1"]), _word(row["word2"]))))
    made = [
        Relation(f"{code} {subclass}", tuple(pair for _, pair in sorted(pairs, key=lambda p: -p[0])),
                 category=main, source=path.name)
        for (code, main, subclass), pairs in rated.items()
    ]  # fmt: skip
    return _some(path, made, f"pairs rated above {min_rating:g}")


def read_scan(path: str | Path) -> list[Analogy]:
    """SCAN (Czinczoll et al. 2022): mappings between two domains, ``source : src_word :: target : targ_word``.

    All are far. ``alternatives`` are the set's own, separated by commas in one cell.

    Raises:
        ValueError: a column is missing; a row of another length or with a blank word.
    """
    path = as_path(path)
    columns = ("target", "source", "targ_word", "src_word", "alternatives", "analogy_type")
    made = [
        _row(
            path, number, a=row["source"], b=row["src_word"], c=row["target"], d=row["targ_word"], kind="far",
            alternatives=tuple(_word(word) for word in row["alternatives"].split(",") if word.strip()),
            source=f"{path.name}: {row['analogy_type']}",
        )
        for number, row in _table(path, ",", columns)
    ]  # fmt: skip
    return _some(path, made, "mappings")


def read_vat(path: str | Path) -> list[Analogy]:
    """A sheet in the manner of the UCLA Verbal Analogy Test: CSV with relation, A, B, C, D and D' (the foil).

    Raises:
        ValueError: a column is missing; a row of another length or with a blank word.
    """
    path = as_path(path)
    made = [
        _row(
            path, number, a=row["A"], b=row["B"], c=row["C"], d=row["D"], foils=(row["D'"],) if row["D'"] else (),
            source=path.name, source_relation=row["relation"], target_relation=row["relation"],
        )
        for number, row in _table(path, ",", ("relation", "A", "B", "C", "D", "D'"))
    ]  # fmt: skip
    return _some(path, made, "analogies")


def read_tsv(path: str | Path) -> list[Analogy]:
    """Plain text: four words a line, set apart by tabs; then, if wanted, foils set apart by ``|``, then the kind.

    Lines that begin with ``#`` are comments.

    Raises:
        ValueError: a line of another number of cells, with a blank word, or of another kind than near and far.
    """
    path = as_path(path)
    made = []
    for number, line in _lines(path):
        if line.startswith("#") or not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if not 4 <= len(cells) <= 6:
            raise _complain(path, number, "'a<TAB>b<TAB>c<TAB>d', then perhaps foils and kind", line)
        cells += [""] * (6 - len(cells))
        foils = tuple(word.strip() for word in cells[4].split("|") if word.strip())
        a, b, c, d = cells[:4]
        made.append(_row(path, number, a=a, b=b, c=c, d=d, foils=foils, kind=cells[5] or None, source=path.name))
    return _some(path, made, "analogies")


READERS: dict[str, Callable[[Path], list[Analogy] | list[Relation]]] = {
    "google": read_google,
    "bats": read_bats,
    "sat": read_sat,
    "semeval": read_semeval,
    "scan": read_scan,
    "vat": read_vat,
    "tsv": read_tsv,
}
"""Readers by the name of the format."""


def guess_format(path: str | Path) -> str:
    """The format of a file or folder, by its name and first lines.

    Raises:
        ValueError: it looks like none of them.
    """
    path = as_path(path)
    if path.is_dir():
        return "bats"
    lines = [line for _, line in itertools.islice(_lines(path), 200) if line.strip() and not line.startswith("#")]
    first = lines[0] if lines else ""
    if first.startswith(":"):
        return "google"
    if first.startswith("subcat\t"):
        return "semeval"
    cells = [cell.strip() for cell in first.split(",")]
    if {"targ_word", "src_word"} <= {*cells}:
        return "scan"
    if {"A", "B", "C", "D"} <= {*cells}:
        return "vat"
    if 4 <= len(first.split("\t")) <= 6:
        return "tsv"
    if len(lines) >= 8 and lines[7].strip() in tuple("abcde"):
        return "sat"
    known = ", ".join(READERS)
    raise ValueError(
        f"{path.name}: not a format that is known by its looks; say with --format (in Python, format=) which it is of "
        f"{known}."
    )


def read_analogies(
    path: str | Path, *, format: str | None = None, n: int | None = None, generator: torch.Generator
) -> list[Analogy]:
    """Analogies of a file or folder in any of the formats of :data:`READERS`.

    Args:
        path: the file; a folder for BATS.
        format: a key of :data:`READERS`; guessed by default.
        n: how many at most, drawn at random; all by default.
        generator: draws them, and combines the pairs of BATS and SemEval relations.

    Raises:
        ValueError: an unknown format; whatever the reader finds wrong.
    """
    path = as_path(path)
    format = format or guess_format(path)
    if format not in READERS:
        raise ValueError(f"read_analogies: format={format!r}; expected one of {', '.join(READERS)}.")
    found = READERS[format](path)
    relations = [item for item in found if isinstance(item, Relation)]
    if relations:
        return analogies_within(relations, n=n, generator=generator)
    analogies = [item for item in found if isinstance(item, Analogy)]
    if n is None or n >= len(analogies):
        return analogies
    keep = torch.randperm(len(analogies), generator=generator)[:n].sort().values
    return [analogies[i] for i in keep.tolist()]
