"""Where a cache's numbers are: in memory, or in files that are read when they are asked for."""

import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from fvlens.files import TensorFile
from fvlens.models import free_memory

_GIB = 1024**3
_ASSUMED = 4 * _GIB
"""Free bytes where the system does not tell."""


def memory_bound(max_memory: int | None) -> int:
    """Bytes that a cache may take; by default half of what is free, at most 2 GiB.

    Raises:
        ValueError: the bound is below 1.
    """
    if max_memory is None:
        free = free_memory(torch.device("cpu"))
        return min((_ASSUMED if free is None else free) // 2, 2 * _GIB)
    if max_memory < 1:
        raise ValueError(f"max_memory: expected at least 1 byte, got {max_memory}.")
    return max_memory


class Store:
    """Activations ``[layer prompt *axes]`` of some sites, in parts of consecutive prompts.

    Attributes:
        layers: the layers, in increasing order.
        shapes: site -> shape of one prompt's numbers in one layer.
        dtype: precision.
        n_prompts: prompts of all parts together.
    """

    def __init__(
        self,
        layers: Sequence[int],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        parts: Sequence[tuple[int, Mapping[str, Shaped[Tensor, "..."]] | TensorFile]],
        temporary: Path | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.n_prompts = sum(n for n, _ in parts)
        self._parts = [part for _, part in parts]
        self._lengths = [n for n, _ in parts]
        self._where = [(index, row) for index, (n, _) in enumerate(parts) for row in range(n)]
        if temporary is not None:  # removed with this object, and at the latest when the process ends
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the numbers; none if they are in memory."""
        return tuple(part.path for part in self._parts if isinstance(part, TensorFile))

    def numbers(self, site: str) -> int:
        """Numbers of one prompt in one layer."""
        return torch.Size(self.shapes[site]).numel()

    def read(self, site: str, layer: int, rows: Sequence[int], out: Shaped[Tensor, " row *axes"]) -> None:
        """Fill ``out``, contiguous, with the numbers of some prompts in one layer."""
        index, width = self.layers.index(layer), self.numbers(site)
        done = 0
        for part, first, n in self._runs(rows):
            own, target = self._parts[part], out[done : done + n]
            if isinstance(own, TensorFile):
                own.read_into(target, site, (index * self._lengths[part] + first) * width)
            else:
                target.copy_(own[site][index, first : first + n])
            done += n

    def whole(self, site: str) -> Shaped[Tensor, "layer prompt *axes"] | None:
        """All of a site, if it lies in memory in one piece."""
        only = self._parts[0] if len(self._parts) == 1 else None
        return None if only is None or isinstance(only, TensorFile) else only[site]

    def _runs(self, rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(part, first prompt in it, how many) for prompts that lie one behind the other."""
        places = [self._where[row] for row in rows]
        start = 0
        for i in range(1, len(places) + 1):
            part, first = places[start]
            if i == len(places) or places[i] != (part, first + i - start):
                yield part, first, i - start
                start = i
