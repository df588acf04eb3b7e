"""What analogy evaluations keep from the basis, the map and the gate; fixed in ``held_out.json`` before any result.

Three levels: (i) new word pairs of domain pairs that were fitted, (ii) pairs of domains that no fitted analogy
connects, (iii) whole families that take part in nothing.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from fvlens.files import read_json
from fvlens.relations._library import library_relation, list_relations
from fvlens.relations._relation import Relation, Split, as_pair
from fvlens.showing import Shown
from fvlens.types import as_text, as_texts, as_whole

MIN_DOMAINS = 4
"""A family recurs if it covers at least so many domains; only those take part in far analogies."""
_MIN_FAMILIES, _MIN_RELATIONS, _SHARE_OF_PAIRS = 4, 20, 0.25


@dataclass(frozen=True, slots=True, repr=False)
class HeldOut(Shown):
    """The library's division for analogies.

    Attributes:
        seed: of the draw, and of the relations' splits.
        families: level (iii): families that take part in no basis, map or gate.
        domain_pairs: level (ii): of the other recurring families, ordered pairs of domains (both orders of each) that
            no fitted analogy connects.
    """

    seed: int
    families: tuple[str, ...]
    domain_pairs: dict[str, tuple[tuple[str, str], ...]]

    def _line(self) -> str:
        n = sum(map(len, self.domain_pairs.values()))
        return f"seed {self.seed}: {len(self.families)} families, {n} pairs of domains"

    def __post_init__(self) -> None:
        as_whole(self.seed, "HeldOut: seed")
        as_texts(self.families, "HeldOut: families")
        for family, pairs in self.domain_pairs.items():
            as_text(family, "HeldOut: family of domain pairs")
            for pair in pairs:
                as_pair(pair, f"HeldOut: domains of {family!r}")

    def split(self, relation: Relation) -> Split:
        """Level (i): the relation's split; fitting takes train and validation pairs, evaluation takes test pairs."""
        return relation.split(torch.Generator().manual_seed(self.seed))

    def relations(self, *, unseen: bool = False) -> list[str]:
        """Names of the library's relations outside the held-out families, or in them."""
        return [name for name in list_relations() if (library_relation(name).family in self.families) == unseen]

    def fitted_domain_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """The ordered pairs of domains that fitting may connect, of each recurring family outside the held-out ones."""
        return {
            family: [pair for pair in itertools.permutations(domains, 2) if pair not in self.domain_pairs[family]]
            for family, domains in recurring_families().items()
            if family not in self.families
        }


def recurring_families() -> dict[str, list[str]]:
    """Families that cover at least :data:`MIN_DOMAINS` domains, with these domains, sorted."""
    domains: dict[str, set[str]] = defaultdict(set)
    for name in list_relations():
        relation = library_relation(name)
        domains[relation.family].add(relation.domain)
    return {family: sorted(found) for family, found in sorted(domains.items()) if len(found) >= MIN_DOMAINS}


def draw_held_out(seed: int) -> HeldOut:
    """The division by its rule; ``held_out.json`` is what this gave for the seed in it.

    Families: in random order, translations aside (they are too many relations), until there are at least 4 with at
    least 20 relations. Pairs of domains: of each other recurring family a quarter of the unordered pairs, at random,
    leaving every domain at least one pair.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(items: Sequence) -> list:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    recurring = recurring_families()
    families: list[str] = []
    n_relations = 0
    for family in shuffled([family for family in recurring if not family.startswith("translation")]):
        if len(families) >= _MIN_FAMILIES and n_relations >= _MIN_RELATIONS:
            break
        families.append(family)
        n_relations += len(list_relations(family=family))
    pairs: dict[str, tuple[tuple[str, str], ...]] = {}
    for family, domains in recurring.items():
        if family in families:
            continue
        every = shuffled(list(itertools.combinations(domains, 2)))
        left = {domain: len(domains) - 1 for domain in domains}
        held: list[tuple[str, str]] = []
        for one, two in every:
            if len(held) // 2 == round(_SHARE_OF_PAIRS * len(every)):
                break
            if min(left[one], left[two]) > 1:
                held += [(one, two), (two, one)]
                left[one], left[two] = left[one] - 1, left[two] - 1
        pairs[family] = tuple(sorted(held))
    return HeldOut(seed, tuple(sorted(families)), pairs)


def held_out() -> HeldOut:
    """The division in ``held_out.json``.

    Example:
        >>> from fvlens.relations import held_out
        >>> division = held_out()
        >>> len(division.families) >= 4, len(division.relations(unseen=True)) >= 20
        (True, True)
    """
    file = resources.files("fvlens.relations") / "held_out.json"
    stored = read_json(Path(str(file)), "division for analogies")
    pairs = {family: tuple((a, b) for a, b in found) for family, found in stored["domain_pairs"].items()}
    return HeldOut(stored["seed"], tuple(stored["families"]), pairs)
