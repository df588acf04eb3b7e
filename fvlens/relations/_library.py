"""Loader and splits of the word-pair library."""

import difflib
import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fvlens.files import read_text
from fvlens.types import as_text

CATEGORIES = ("morphology", "meaning", "encyclopedic", "translation", "spelling")
HEADER_KEYS = ("name", "category", "family", "domain", "direction", "compiled")


class Pair(NamedTuple):
    """One word pair; unpacks as ``input, output``."""

    input: str
    output: str


def as_pair(given: Any, what: str) -> Pair:
    """A pair of two texts, out of a pair, a tuple or a list.

    Raises:
        ValueError: something else; a single text of two letters is no pair.
    """
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(word, str) for word in given):
        raise ValueError(f"{what}: expected a pair of two words, got {given!r}.")
    return Pair(*given)


@dataclass(frozen=True, slots=True)
class Split:
    """Train, validation and test pairs of one relation.

    Attributes:
        train, valid, test: the pairs, in shuffled order.
        disjoint: ``"both"`` if no word (input or output) of one part occurs in another part; ``"input"`` if only the
            inputs are kept apart, because the relation's outputs recur too often (continents, kinds, first letters).
    """

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]
    disjoint: Literal["both", "input"]


@dataclass(frozen=True, slots=True)
class Relation:
    """A named set of word pairs.

    Attributes:
        name: the relation's name, for example ``"animal-young"``.
        pairs: the pairs, each ``Pair(input, output)``.
        category: one of :data:`CATEGORIES` for library relations, free text otherwise.
        source: where the pairs come from.
        family: the abstract relation that recurs over domains (``part``, ``kind``, ``translation-french`` ...).
        domain: what the inputs are (``animal``, ``tool``, ``country`` ...).
        direction: for example ``"animal->young"``.
    """

    name: str
    pairs: tuple[Pair, ...]
    category: str = ""
    source: str = ""
    family: str = ""
    domain: str = ""
    direction: str = ""
    _hash: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("name", "category", "source", "family", "domain", "direction"):
            as_text(getattr(self, name), f"relation {self.name!r}: {name}")
        pairs = tuple(as_pair(pair, f"relation {self.name!r}") for pair in self.pairs)
        if not pairs:
            raise ValueError(f"relation {self.name!r}: expected at least one pair, got none.")
        for pair in pairs:
            if not pair.input.strip() or not pair.output.strip():
                raise ValueError(f"relation {self.name!r}: blank word in pair {tuple(pair)}.")
        object.__setattr__(self, "pairs", pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self):
        return iter(self.pairs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input words, in file order."""
        return tuple(pair.input for pair in self.pairs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output words, in file order (with repetitions)."""
        return tuple(pair.output for pair in self.pairs)

    @property
    def data_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the pairs in file order."""
        if self._hash is None:  # a run asks for that of the whole library
            text = "\n".join(f"{pair.input}\t{pair.output}" for pair in self.pairs)
            object.__setattr__(self, "_hash", hashlib.sha256(text.encode()).hexdigest()[:16])
        assert self._hash is not None
        return self._hash

    def split(
        self, generator: torch.Generator, *, train: float = 0.45, valid: float = 0.15, min_train: int = 20
    ) -> Split:
        """Split the pairs at random into train, validation and test parts that share no word.

        Pairs that share a word, on either side, are kept in one part where the relation allows it, that is, where no
        such group holds more than a fifth of the pairs. Elsewhere (many inputs with one output) only pairs with the
        same input are kept together, and ``Split.disjoint`` says so.

        Args:
            generator: source of randomness; the same state gives the same split.
            train, valid: fractions of the pairs, the rest is the test part.
            min_train: the train part gets at least this many pairs if the relation has at least twice as many.

        Returns:
            A :class:`Split`; every pair is in exactly one part and no part is empty.

        Raises:
            ValueError: the fractions leave nothing for a part, or the relation has fewer than 6 pairs.

        Example:
            >>> import torch, fvlens
            >>> split = fvlens.load_relation("country-capital").split(torch.Generator().manual_seed(0))
            >>> {p.input for p in split.train} & {p.input for p in split.test}
            set()
        """
        if not (0 < train < 1 and 0 < valid < 1 and train + valid < 1):
            raise ValueError(
                f"split: expected fractions with train > 0, valid > 0 and train + valid < 1, got {train} and {valid}."
            )
        n_pairs = len(self.pairs)
        if n_pairs < 6:
            raise ValueError(f"split: expected a relation of at least 6 pairs, got {n_pairs} in {self.name!r}.")
        groups, disjoint = self._groups()
        goal_train = max(round(train * n_pairs), min_train if n_pairs >= 2 * min_train else 1)
        goal_valid = max(round(valid * n_pairs), 1)
        goals = (goal_train, goal_valid, n_pairs - goal_train - goal_valid)
        parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
        order = torch.randperm(len(groups), generator=generator).tolist()
        # large groups first, each to the part that lacks most, so that the parts come out close to their sizes
        for group in sorted((groups[i] for i in order), key=len, reverse=True):
            lacking = [goal - len(part) for goal, part in zip(goals, parts, strict=True)]
            parts[lacking.index(max(lacking))].extend(group)
        for part in parts:
            shuffled = [part[i] for i in torch.randperm(len(part), generator=generator).tolist()]
            part[:] = shuffled
        if not all(parts):
            raise ValueError(
                f"split: {self.name!r} falls into {len(groups)} groups that share words, too few for three parts; "
                "use more pairs or a smaller train fraction."
            )
        return Split(*(tuple(part) for part in parts), disjoint=disjoint)

    def _groups(self) -> tuple[list[list[Pair]], Literal["both", "input"]]:
        """Groups of pairs that must stay together, and what that keeps apart."""
        parent: dict[str, str] = {}

        def find(word: str) -> str:
            parent.setdefault(word, word)
            while parent[word] != word:
                parent[word] = parent[parent[word]]
                word = parent[word]
            return word

        for pair in self.pairs:
            parent[find(pair.input)] = find(pair.output)
        by_root: dict[str, list[Pair]] = defaultdict(list)
        for pair in self.pairs:
            by_root[find(pair.input)].append(pair)
        if max(map(len, by_root.values())) <= max(2, len(self.pairs) // 5):
            return list(by_root.values()), "both"
        by_input: dict[str, list[Pair]] = defaultdict(list)
        for pair in self.pairs:
            by_input[pair.input].append(pair)
        return list(by_input.values()), "input"


Pairs = Relation | Sequence[Pair | tuple[str, str]]
"""Word pairs, as functions that ask them take them."""


def read_relation(path: str | Path) -> Relation:
    """Read one relation from a TSV file in the library's format.

    Raises:
        ValueError: the file cannot be read; a header key is missing, or a line is not ``input<TAB>output``; the message
            names file and line.
    """
    path = Path(path)
    header: dict[str, str] = {}
    pairs: list[Pair] = []
    for number, line in enumerate(read_text(path, "relation").splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            header[key.strip()] = value.strip()
        elif line.strip():
            cells = line.split("\t")
            if len(cells) != 2 or not all(cell.strip() for cell in cells):
                raise ValueError(f"{path.name}, line {number}: expected 'input<TAB>output', got {line!r}.")
            pairs.append(Pair(*cells))
    missing = [key for key in HEADER_KEYS if not header.get(key)]
    if missing:
        raise ValueError(f"{path.name}: header lines '# key: value' missing for {', '.join(missing)}.")
    return Relation(
        name=header["name"],
        pairs=tuple(pairs),
        category=header["category"],
        source=header["compiled"],
        family=header["family"],
        domain=header["domain"],
        direction=header["direction"],
    )


@functools.cache
def _library() -> dict[str, Relation]:
    folder = resources.files("fvlens.relations") / "data"
    relations = [read_relation(Path(str(file))) for file in folder.iterdir() if file.name.endswith(".tsv")]
    return {relation.name: relation for relation in sorted(relations, key=lambda relation: relation.name)}


def load_relation(name: str) -> Relation:
    """Load a relation of the word-pair library by name.

    Raises:
        ValueError: no such relation; the message offers the nearest names.

    Example:
        >>> import fvlens
        >>> dict(fvlens.load_relation("country-capital").pairs)["France"]
        'Paris'
    """
    library = _library()
    if name not in library:
        near = difflib.get_close_matches(name, library, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see fvlens.list_relations()."
        raise ValueError(f"no relation named {name!r} among the {len(library)} of the library; {hint}")
    return library[name]


def list_relations(category: str | None = None, *, family: str | None = None, domain: str | None = None) -> list[str]:
    """Names of the library's relations, sorted, optionally of one category, family or domain.

    Raises:
        ValueError: nothing in the library has that category, family or domain.

    Example:
        >>> import fvlens
        >>> "country-capital" in fvlens.list_relations(category="encyclopedic")
        True
    """
    names = list(_library())
    for key, wanted in (("category", category), ("family", family), ("domain", domain)):
        if wanted is None:
            continue
        known = Counter(getattr(relation, key) for relation in _library().values())
        if wanted not in known:
            raise ValueError(f"no relation has {key} {wanted!r}; expected one of {', '.join(sorted(known))}.")
        names = [name for name in names if getattr(_library()[name], key) == wanted]
    return names


def library_words(names: Sequence[str] | None = None) -> list[str]:
    """All distinct words (inputs and outputs) of the library or of the named relations, sorted."""
    relations = [load_relation(name) for name in (list(_library()) if names is None else names)]
    return sorted({word for relation in relations for pair in relation.pairs for word in pair})


def disjoint_relations(relation: Relation) -> list[str]:
    """Names of the library's relations of other families that share no output with this one, sorted.

    A vector of one of them cannot be right about this relation because the two have answers in common.

    Example:
        >>> import fvlens
        >>> names = fvlens.relations.disjoint_relations(fvlens.load_relation("country-capital"))
        >>> "antonym" in names, "city-capital" in names
        (True, False)
    """
    outputs = set(relation.outputs)
    return [
        name
        for name, other in _library().items()
        if name != relation.name and other.family != relation.family and outputs.isdisjoint(other.outputs)
    ]
