"""Analogies a : b :: c : d, one by one or made from relations."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

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
