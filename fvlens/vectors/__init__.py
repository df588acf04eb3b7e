"""Function vectors: the task as one vector of the residual stream.

``v_t = sum over the chosen heads of mean z_{l,h} @ W_O[l,h]``, added after one layer at the last token of a prompt.
Vectors are plain values: they add, scale, compare, decode to words, and travel in one safetensors file whose header
holds where they come from.
"""

from fvlens.vectors._distributed import DISTRIBUTED_FORMAT, DistributedVector, distributed_vector
from fvlens.vectors._function import (
    FORMAT,
    FunctionVector,
    function_vector,
    random_vector_like,
    vector_from,
    vector_header,
)
from fvlens.vectors._parts import INTERRUPTED, as_float32

__all__ = [
    "DISTRIBUTED_FORMAT",
    "FORMAT",
    "INTERRUPTED",
    "DistributedVector",
    "FunctionVector",
    "as_float32",
    "distributed_vector",
    "function_vector",
    "random_vector_like",
    "vector_from",
    "vector_header",
]
