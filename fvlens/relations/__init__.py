"""The word-pair library: one TSV file a relation, a loader, and deterministic splits.

A relation is a set of pairs (input, output), for example ``country-capital``: (France, Paris). Files live in
``fvlens/relations/data``; each starts with ``# key: value`` lines (name, category, family, domain, direction, compiled)
and then holds one ``input<TAB>output`` pair a line. Inputs are shared by many relations on purpose: a bare input must
not betray which relation is meant.
"""

from fvlens.relations._analogies import Analogy, analogies_within, as_analogies, make_analogies
from fvlens.relations._given import (
    Pairs,
    as_pairs,
    as_relation,
    as_relations,
    load_relation,
    named_pairs,
    reading_of,
    readings_of,
)
from fvlens.relations._held_out import HeldOut, draw_held_out, held_out, recurring_families
from fvlens.relations._library import disjoint_relations, library_relation, library_words, list_relations, read_relation
from fvlens.relations._pairs import FORMATS, Reading, from_recorded, read_folder, read_pairs
from fvlens.relations._published import (
    READERS,
    guess_format,
    read_analogies,
    read_bats,
    read_google,
    read_sat,
    read_scan,
    read_semeval,
    read_tsv,
    read_vat,
)
from fvlens.relations._relation import CATEGORIES, Pair, Part, Relation, Split, as_pair
from fvlens.relations._words import Dropped, plain_name, words_of

__all__ = [
    "CATEGORIES",
    "FORMATS",
    "READERS",
    "Analogy",
    "Dropped",
    "HeldOut",
    "Pair",
    "Pairs",
    "Part",
    "Reading",
    "Relation",
    "Split",
    "analogies_within",
    "as_analogies",
    "as_pair",
    "as_pairs",
    "as_relation",
    "as_relations",
    "disjoint_relations",
    "draw_held_out",
    "from_recorded",
    "guess_format",
    "held_out",
    "library_relation",
    "library_words",
    "list_relations",
    "load_relation",
    "make_analogies",
    "named_pairs",
    "plain_name",
    "read_analogies",
    "read_bats",
    "read_folder",
    "read_google",
    "read_pairs",
    "read_relation",
    "read_sat",
    "read_scan",
    "read_semeval",
    "read_tsv",
    "read_vat",
    "reading_of",
    "readings_of",
    "recurring_families",
    "words_of",
]
