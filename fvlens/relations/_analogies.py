"""Analogies a : b :: c : d, made from relations or read from published sets.

Readers are plain text parsers: nothing in a file is executed, and a bad row is refused with file, line and what was
expected. Words are kept as they are written, apart from the underscores that stand for blanks in some sets.
"""

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fvlens.files import as_path, read_text
from fvlens.relations._relation import Pair, Relation
from fvlens.relations._words import words_of
from fvlens.types import as_text, as_texts

AnalogyKind = Literal["near", "far"]
ANALOGY_KINDS = ("near", "far")


@dataclass(frozen=True, slots=True)
class Analogy:
    """``a`` is to ``b`` as ``c`` is to ``d``.

    Attributes:
        a, b: the source pair, which shows the relation.
        c, d: the target pair; ``d`` is what is asked for.
        foils: wrong answers to choose among: words in place of ``d``, or pairs in place of ``c`` and ``d``.
        kind: ``"near"`` if both pairs are of one semantic category, ``"far"`` if of two; None if not known.
        source: where it comes from: a file, or the name under which it was made.
        alternatives: answers that are right, too.
        source_relation, target_relation: what the pairs are pairs of, ``""`` where not known. A far analogy has two
            relations of one family.

    Raises:
        ValueError: a word is blank; ``kind`` is none of those; the answer, or another right one, is among the foils.
    """

    a: str
    b: str
    c: str
    d: str
    foils: tuple[str | Pair, ...] = ()
    kind: AnalogyKind | None = None
    source: str = ""
    alternatives: tuple[str, ...] = ()
    source_relation: str = ""
    target_relation: str = ""

    def __post_init__(self) -> None:
        for name in ("a", "b", "c", "d", "source", "source_relation", "target_relation"):
            as_text(getattr(self, name), f"analogy: {name}")
        as_texts(self.alternatives, "analogy: alternatives")
        blank = [name for name in "abcd" if not getattr(self, name).strip()]
        if blank:
            raise ValueError(f"analogy {self}: {', '.join(blank)} is blank.")
        if self.kind not in (None, *ANALOGY_KINDS):
            raise ValueError(f"analogy {self}: kind={self.kind!r}; expected near, far or None.")
        foils = tuple(Pair(*foil) if isinstance(foil, tuple) else foil for foil in self.foils)
        right = {self.d, *self.alternatives, (self.c, self.d)}
        wrong = [foil for foil in foils if foil in right]
        if wrong:
            raise ValueError(f"analogy {self}: {wrong[0]!r} is a right answer and among the foils.")
        object.__setattr__(self, "foils", foils)
        object.__setattr__(self, "alternatives", tuple(self.alternatives))

    def __str__(self) -> str:
        """The analogy as it is read aloud: ``hand : finger :: tree : branch``."""
        return f"{self.a} : {self.b} :: {self.c} : {self.d}"

    @property
    def source_pair(self) -> Pair:
        """a and b."""
        return Pair(self.a, self.b)

    @property
    def target_pair(self) -> Pair:
        """c and d."""
        return Pair(self.c, self.d)


def as_analogies(given: Any, what: str = "analogies") -> tuple[Analogy, ...]:
    """Analogies, out of a sequence of them or of four words each.

    Raises:
        ValueError: a text or a file's name; an entry that is neither; a blank word.
    """
    if isinstance(given, str | Path | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{what}: expected a list of analogies, got {given!r}; read files with read_analogies.")
    made = []
    for i, one in enumerate(given, start=1):
        if not isinstance(one, Analogy):
            if isinstance(one, str) or not isinstance(one, tuple | list) or len(one) != 4:
                raise ValueError(f"{what}: analogy {i}: expected an Analogy, or four words (a, b, c, d), got {one!r}.")
            a, b, c, d = words_of(one, f"{what}: analogy {i}")
            one = Analogy(a, b, c, d)
        made.append(one)
    return tuple(made)


def make_analogies(
    relations: Sequence[Relation],
    *,
    kind: AnalogyKind,
    n: int | None = None,
    generator: torch.Generator,
    n_foils: int = 3,
    domains: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    known: Sequence[Relation] = (),
) -> list[Analogy]:
    """Near or far analogies from relations, such as the library's or parts of their splits.

    A near analogy takes both pairs from one relation; a far one takes them from two relations of one family in two
    domains (``hand : finger :: tree : branch``). Relations (near) or ordered pairs of relations (far) take turns, so
    that each has as many analogies as the others where its words allow it. No analogy occurs twice.

    Foils are, in turns, answers that ``c`` has under another relation, which only the right relation rules out, and
    other answers of the target relation, which only the right word rules out.

    Args:
        relations: each with the pairs to use.
        kind: ``"near"`` or ``"far"``.
        n: how many at most; all that there are by default.
        generator: source of randomness; the same state gives the same analogies.
        n_foils: wrong answers for each, fewer where there are not as many.
        domains: of a far analogy, the ordered pairs of domains to use, by family; all pairs by default.
        known: relations whose answers to ``c`` may serve as foils; ``relations`` by default. An answer that the target
            relation in ``known`` gives to ``c`` is never a foil.

    Raises:
        ValueError: no such kind; ``n`` or ``n_foils`` is negative; nothing can be made of these relations.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.relations import make_analogies
        >>> parts = [fvlens.load_relation(name) for name in ("body-part", "tool-part")]
        >>> made = make_analogies(parts, kind="far", n=2, generator=torch.Generator().manual_seed(0))
        >>> [(analogy.source_relation, analogy.target_relation) for analogy in made]
        [('body-part', 'tool-part'), ('tool-part', 'body-part')]
    """
    if kind not in ANALOGY_KINDS:
        raise ValueError(f"make_analogies: kind={kind!r}; expected near or far.")
    if (n is not None and n < 1) or n_foils < 0:
        raise ValueError(f"make_analogies: expected n of at least 1 and n_foils of at least 0, got {n} and {n_foils}.")
    if kind == "near":
        between = [(relation, relation) for relation in relations]
    else:
        between = [
            (one, two)
            for one, two in itertools.permutations(relations, 2)
            if one.family and one.family == two.family and one.domain != two.domain
            and (domains is None or (one.domain, two.domain) in domains.get(one.family, ()))
        ]  # fmt: skip
    answers: dict[str, dict[str, None]] = defaultdict(dict)  # of each word under any relation, in order
    right: dict[tuple[str, str], set[str]] = defaultdict(set)
    for relation in (*relations, *known):
        for x, y in relation.pairs:
            answers[x][y] = None
            right[relation.name, x].add(y)
    turns = [_combinations(one, two, generator) for one, two in between]
    made: list[Analogy] = []
    while turns and (n is None or len(made) < n):
        going = []
        for (one, two), combinations in zip(between, turns, strict=True):
            combination = next(combinations, None)
            if combination is None or (n is not None and len(made) == n):
                continue
            going.append(((one, two), combinations))
            source, target = combination
            foils = _foils(target, two, list(answers[target.input]), right[two.name, target.input], n_foils, generator)
            others = tuple(sorted(right[two.name, target.input] - {target.output}))
            made.append(
                Analogy(
                    *source, *target, foils=foils, kind=kind, source="made of relations", alternatives=others,
                    source_relation=one.name, target_relation=two.name,
                )
            )  # fmt: skip
        between, turns = [pair for pair, _ in going], [combinations for _, combinations in going]
    if not made:
        what = "one with two pairs" if kind == "near" else "two of one family in two domains"
        raise ValueError(f"make_analogies: no {kind} analogy among {len(relations)} relations; it takes {what}.")
    return made


def _combinations(one: Relation, two: Relation, generator: torch.Generator) -> Iterator[tuple[Pair, Pair]]:
    """Source and target pairs in random order, each target once with some source before any comes again."""
    sources = [one.pairs[i] for i in torch.randperm(len(one), generator=generator).tolist()]
    targets = [two.pairs[i] for i in torch.randperm(len(two), generator=generator).tolist()]
    for shift in range(len(sources)):
        for i, target in enumerate(targets):
            source = sources[(i + shift) % len(sources)]
            if not {*source} & {*target}:
                yield source, target


def _foils(
    target: Pair, relation: Relation, elsewhere: Sequence[str], right: set[str], n: int, generator: torch.Generator
) -> tuple[str, ...]:
    def shuffled(words: Sequence[str]) -> list[str]:
        words = [word for word in dict.fromkeys(words) if word not in right and word != target.input]
        return [words[i] for i in torch.randperm(len(words), generator=generator).tolist()]

    turns = itertools.zip_longest(shuffled(elsewhere), shuffled(relation.outputs))
    return tuple(dict.fromkeys(word for turn in turns for word in turn if word is not None))[:n]


def analogies_within(
    relations: Sequence[Relation], *, n: int | None = None, generator: torch.Generator, n_foils: int = 3
) -> list[Analogy]:
    """Analogies between the pairs of each relation of a published set; ``kind`` stays open.

    Args:
        relations: such as those of :func:`read_bats` and :func:`read_semeval`. A word that occurs with several answers
            has the first as ``d`` and the others as ``alternatives``.
        n: how many at most, over all relations in turns; all ordered pairs by default.
        generator: source of randomness.
        n_foils: wrong answers for each.
    """
    from dataclasses import replace

    firsts = [replace(r, pairs=tuple({p.input: p for p in reversed(r.pairs)}.values())[::-1]) for r in relations]
    made = make_analogies(firsts, kind="near", n=n, generator=generator, n_foils=n_foils, known=relations)
    where = {relation.name: relation.source for relation in relations}
    return [replace(analogy, kind=None, source=where[analogy.source_relation]) for analogy in made]


# -- readers of published formats -------------------------------------------------------------------------------------


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
