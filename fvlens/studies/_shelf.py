"""What one cell makes and others need: trained vectors, say. Made once, and kept in the study's folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from fvlens.studies._study import Cell


@runtime_checkable
class Part(Protocol):
    """Something with a file of its own."""

    def save(self, path: Path) -> Path:
        """Write it, at once or not at all."""
        ...


_Part = TypeVar("_Part", bound=Part)


class Shelf:
    """Parts that the cells of a study share.

    A part is named by a cell, the one that would make nothing else: its file has that cell's hash, so that it is never
    taken for a part of another model, seed or library. Whoever needs a part first makes it. What is made depends on the
    cell alone; so do the numbers, whichever cell ran first, and in whichever process.

    Attributes:
        folder: where the files lie.
        key: hash of a cell.
    """

    def __init__(self, folder: Path, key: Callable[[Cell], str]) -> None:
        self.folder, self.key = folder, key

    def get(
        self,
        cell: Cell,
        names: Sequence[str],
        load: Callable[[Path], _Part],
        make: Callable[[], Mapping[str, _Part]],
    ) -> dict[str, _Part]:
        """The parts of a cell, by name.

        Args:
            cell: what they depend on.
            names: of the parts.
            load: reads a file of one; a ValueError says that it is not there, or damaged.
            make: makes all of them.
        """
        try:
            return self._load(cell, names, load)
        except ValueError:
            self.put(cell, make())
        # also those just made are read, so that they are the same to the bit
        return self._load(cell, names, load)

    def put(self, cell: Cell, parts: Mapping[str, Part]) -> None:
        """Keep the parts of a cell."""
        self.folder.mkdir(exist_ok=True)
        for name, part in parts.items():
            part.save(self._path(cell, name))

    def _load(self, cell: Cell, names: Sequence[str], load: Callable[[Path], _Part]) -> dict[str, _Part]:
        return {name: load(self._path(cell, name)) for name in names}

    def _path(self, cell: Cell, name: str) -> Path:
        return self.folder / f"{self.key(cell)}-{name.replace(' ', '-')}.safetensors"
