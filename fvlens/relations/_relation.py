"""The values that everything here is made of: a pair of words, a relation, its split."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from fvlens.arguments import check_kinds
from fvlens.relations._words import Unusable, word_of
from fvlens.showing import Shown, named, shortened
from fvlens.types import as_text

CATEGORIES = ("morphology", "meaning", "encyclopedic", "translation", "spelling")


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


def _checked(given: Any, what: str) -> tuple[tuple[Pair, ...], int]:
    """The pairs, each of two words, and how many words were trimmed."""
    pairs, n_trimmed = [], 0
    for i, one in enumerate(given, start=1):
        words = []
        for side, value in zip(Pair._fields, as_pair(one, what), strict=True):
            try:
                word, trimmed = word_of(value)
            except Unusable as error:
                blank = "blank word in pair" if not value.strip() else "pair"
                raise ValueError(f"{what}: {blank} {i}, {tuple(one)!r}: the {side} {error}.") from None
            words.append(word)
            n_trimmed += trimmed
        pairs.append(Pair(*words))
    return tuple(pairs), n_trimmed


class Part(tuple[Pair, ...]):
    """Some pairs of a relation: a tuple that keeps the relation's name, in slices too.

    Attributes:
        relation: the name.
    """

    relation: str

    def __new__(cls, pairs: Iterable[Pair], relation: str = "") -> "Part":
        made = super().__new__(cls, pairs)
        made.relation = relation
        return made

    def __getitem__(self, key: Any) -> Any:
        """A pair, or of a slice a part."""
        found = super().__getitem__(key)
        return Part(found, self.relation) if isinstance(key, slice) else found


@dataclass(frozen=True, slots=True, repr=False)
class Split(Shown):
    """Train, validation and test pairs of one relation.

    Attributes:
        train, valid, test: the pairs, in shuffled order. They keep the relation's name, and so do slices of them.
        disjoint: ``"both"`` if no word (input or output) of one part occurs in another part; ``"input"`` if only the
            inputs are kept apart, because the relation's outputs recur too often (continents, kinds, first letters).
        name: of the relation; empty where it has none.
    """

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]
    disjoint: Literal["both", "input"]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for part in ("train", "valid", "test") if self.name else ():
            object.__setattr__(self, part, Part(getattr(self, part), self.name))

    def _line(self) -> str:
        apart = "inputs and outputs" if self.disjoint == "both" else "inputs"
        sizes = f"{len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test pairs"
        return f"{named(self.name)}: {sizes}, {apart} kept apart"

    def _cells(self) -> list[tuple[str, ...]]:
        parts = (("train", self.train), ("valid", self.valid), ("test", self.test))
        rows = [(name, str(len(pairs)), ", ".join(" -> ".join(p) for p in pairs[:3])) for name, pairs in parts]
        return [("part", "pairs", "the first"), *rows]


@dataclass(frozen=True, slots=True, repr=False)
class Relation(Shown):
    """A named set of word pairs.

    Attributes:
        name: the relation's name, for example ``"animal-young"``.
        pairs: the pairs, each ``Pair(input, output)``.
        category: one of :data:`CATEGORIES` for library relations, free text otherwise.
        source: where the pairs come from.
        family: the abstract relation that recurs over domains (``part``, ``kind``, ``translation-french`` ...).
        domain: what the inputs are (``animal``, ``tool``, ``country`` ...).
        direction: for example ``"animal->young"``.
        path: the file that the pairs were read from; empty for the library's and for pairs that were given.

    Words lose white space around them, with a warning. Other shapes of pairs than tuples and lists are read by
    :func:`fvlens.relations.as_relation`.

    Raises:
        ValueError: no pair; what is no pair of two texts; a blank word, or one with control characters.
    """

    name: str
    pairs: tuple[Pair, ...]
    category: str = ""
    source: str = ""
    family: str = ""
    domain: str = ""
    direction: str = ""
    path: str = field(default="", compare=False)
    _hash: str | None = field(default=None, init=False, repr=False, compare=False)

    def _line(self) -> str:
        first = shortened(", ".join(" -> ".join(pair) for pair in self.pairs[:2]))
        return f"{named(self.name)}: {len(self.pairs)} pairs, {first}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("input", "output"), *self.pairs]

    def __post_init__(self) -> None:
        check_kinds("Relation", Relation, {"pairs": self.pairs})
        for name in ("name", "category", "source", "family", "domain", "direction"):
            as_text(getattr(self, name), f"relation {self.name!r}: {name}")
        pairs, n_trimmed = _checked(self.pairs, f"relation {self.name!r}")
        if not pairs:
            raise ValueError(f"relation {self.name!r}: expected at least one pair, got none.")
        if n_trimmed:
            warnings.warn(
                f"relation {self.name!r}: {n_trimmed} words had white space or invisible signs, which were trimmed.",
                stacklevel=3,
            )
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
        return Split(*(tuple(part) for part in parts), disjoint=disjoint, name=self.name)

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
