"""The word-pair library: one TSV file a relation, a loader, and deterministic splits.

A relation is a set of pairs (input, output), for example ``country-capital``: (France, Paris). Files live in
``fvlens/relations/data``; each starts with ``# key: value`` lines (name, category, family, domain, direction, compiled)
and then holds one ``input<TAB>output`` pair a line. Inputs are shared by many relations on purpose: a bare input must
not betray which relation is meant.
"""

from fvlens.relations._library import (
    CATEGORIES,
    Pair,
    Relation,
    Split,
    disjoint_relations,
    library_words,
    list_relations,
    load_relation,
    read_relation,
)

__all__ = [
    "CATEGORIES",
    "Pair",
    "Relation",
    "Split",
    "disjoint_relations",
    "library_words",
    "list_relations",
    "load_relation",
    "read_relation",
]
