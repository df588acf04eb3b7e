"""The word-pair library: one TSV file a relation, a loader, and deterministic splits.

A relation is a set of pairs (input, output), for example ``country-capital``: (France, Paris). Files live in
``fvlens/relations/data``; each starts with ``# key: value`` lines (name, category, family, domain, direction, compiled)
and then holds one ``input<TAB>output`` pair a line. Inputs are shared by many relations on purpose: a bare input must
not betray which relation is meant.
"""

from fvlens.relations._analogies import (
    READERS,
    Analogy,
    analogies_within,
    guess_format,
    make_analogies,
    read_analogies,
    read_bats,
    read_google,
    read_sat,
    read_scan,
    read_semeval,
    read_tsv,
    read_vat,
)
from fvlens.relations._held_out import HeldOut, draw_held_out, held_out, recurring_families
from fvlens.relations._library import (
    CATEGORIES,
    Pair,
    Pairs,
    Relation,
    Split,
    as_pair,
    disjoint_relations,
    library_words,
    list_relations,
    load_relation,
    read_relation,
)
from fvlens.relations._pairs import read_pairs

__all__ = [
    "CATEGORIES",
    "READERS",
    "Analogy",
    "HeldOut",
    "Pair",
    "Pairs",
    "Relation",
    "Split",
    "analogies_within",
    "as_pair",
    "disjoint_relations",
    "draw_held_out",
    "guess_format",
    "held_out",
    "library_words",
    "list_relations",
    "load_relation",
    "make_analogies",
    "read_analogies",
    "read_bats",
    "read_google",
    "read_pairs",
    "read_relation",
    "read_sat",
    "read_scan",
    "read_semeval",
    "read_tsv",
    "read_vat",
    "recurring_families",
]
