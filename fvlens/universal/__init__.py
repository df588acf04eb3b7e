"""Heads that carry many tasks: average indirect effects over relations, and files of heads.

1. *Per relation*: split the pairs, ask the validation queries with clean demonstrations, and compute every head's
   average indirect effect (AIE), as for a single task (:func:`fvlens.find.relation_effects`).
2. *Which relations count*: those that the model does from demonstrations, that is, better than by always giving the
   commonest answer (:func:`majority_baseline`).
3. *The set*: the n heads with the largest AIE averaged over the relations that count.

A set is saved as JSON (:meth:`UniversalHeads.save`); :func:`read_heads` reads it, or a plain list of heads, for
``fvlens run --heads``.
"""

from fvlens.universal._files import GivenHeads, file_hash, made_on, name_heads, read_heads
from fvlens.universal._find import Carried, carried, heads_of, majority_baseline, universal_heads
from fvlens.universal._set import FORMAT, MOST_COLUMNS, UniversalHeads, leaf_order

__all__ = [
    "FORMAT",
    "MOST_COLUMNS",
    "Carried",
    "GivenHeads",
    "UniversalHeads",
    "carried",
    "file_hash",
    "heads_of",
    "leaf_order",
    "made_on",
    "majority_baseline",
    "name_heads",
    "read_heads",
    "universal_heads",
]
