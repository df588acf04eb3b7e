"""Many vectors of one model and one layer, in order."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.arguments import check_kinds
from fvlens.files import read_tensors, write_tensors
from fvlens.metrics import mds
from fvlens.models import Fingerprint, check_model
from fvlens.prompts import Template
from fvlens.relations import list_relations, load_relation
from fvlens.showing import Shown, named, shortened
from fvlens.types import as_text, as_texts
from fvlens.vectors import INTERRUPTED, FunctionVector, vector_from, vector_header

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

SET_FORMAT = "fvlens-vector-set-1"


@dataclass(frozen=True, slots=True, repr=False)
class VectorSet(Shown):
    """An ordered collection of vectors of one model and layer, such as the basis of a composite vector.

    Attributes:
        vectors: the vectors; their relations' names are unique.
        categories: a category for each, ``""`` where unknown.

    Raises:
        ValueError: no vectors; vectors of several models or layers; a name that occurs twice; not one category each.

    Example:
        >>> import torch, fvlens
        >>> mark = fvlens.fingerprint(fvlens.load_model("rel-small", device="cpu"))
        >>> def make(name, seed):
        ...     values = torch.randn(mark.d_model, generator=torch.Generator().manual_seed(seed))
        ...     return fvlens.FunctionVector(values, 1, (), name, mark)
        >>> basis = fvlens.VectorSet((make("antonym", 0), make("synonym", 1)))
        >>> basis.matrix.shape == (2, mark.d_model), basis["synonym"].relation, basis.select(["antonym"]).names
        (True, 'synonym', ('antonym',))
    """

    vectors: tuple[FunctionVector, ...]
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_kinds("VectorSet", VectorSet, {"vectors": self.vectors})
        if not self.vectors:
            raise ValueError("VectorSet: expected at least one vector, got none.")
        object.__setattr__(self, "vectors", tuple(self.vectors))
        first = self.vectors[0]
        names = [vector.relation for vector in self.vectors]
        for vector in self.vectors:
            differences = first.fingerprint.differences(vector.fingerprint)
            if differences:
                raise ValueError(
                    f"VectorSet: {first.relation!r} and {vector.relation!r} are of two models "
                    f"({'; '.join(differences)})."
                )
            if vector.layer != first.layer:
                raise ValueError(
                    f"VectorSet: {first.relation!r} is of layer {first.layer}, {vector.relation!r} of {vector.layer}; "
                    "bring them together with at_layer()."
                )
            if names.count(vector.relation) > 1:
                raise ValueError(f"VectorSet: two vectors are named {vector.relation!r}; names must be unique.")
        categories = tuple(self.categories) or tuple(_category(name) for name in names)
        if len(categories) != len(names):
            raise ValueError(f"VectorSet: {len(names)} vectors, but {len(categories)} categories.")
        for category in categories:
            as_text(category, "VectorSet: category")
        object.__setattr__(self, "categories", categories)

    def _line(self) -> str:
        names = shortened(", ".join(map(named, self.names)))
        return f"{len(self)} vectors after layer {self.layer}: {names}, model {self.fingerprint.name!r}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(named(v.relation), c, v.kind, f"{v.norm():.3f}") for v, c in zip(self, self.categories, strict=True)]
        return [("relation", "category", "kind", "norm"), *rows]

    @property
    def names(self) -> tuple[str, ...]:
        """The relations' names, in order."""
        return tuple(vector.relation for vector in self.vectors)

    @property
    def layer(self) -> int:
        """All vectors are added after this layer."""
        return self.vectors[0].layer

    @property
    def fingerprint(self) -> Fingerprint:
        """The model."""
        return self.vectors[0].fingerprint

    @property
    def matrix(self) -> Float[Tensor, "relation d_model"]:
        """The vectors as rows."""
        return torch.stack([vector.vector for vector in self.vectors])

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.vectors)

    def __iter__(self) -> Iterator[FunctionVector]:
        """The vectors, in order."""
        return iter(self.vectors)

    def __getitem__(self, key: str | int) -> FunctionVector:
        """A vector by its relation's name, or by its place.

        Raises:
            ValueError: there is none of that name.
        """
        if isinstance(key, int):
            return self.vectors[key]
        if key not in self.names:
            raise ValueError(f"no vector of {key!r} in this set; it holds {', '.join(self.names)}.")
        return self.vectors[self.names.index(key)]

    def select(self, names: Iterable[str] | None = None, *, category: str | None = None) -> "VectorSet":
        """The vectors of these names, in the order given, or of one category.

        Raises:
            ValueError: no names, an unknown one, or nothing of that category.
        """
        chosen = list(self.names if names is None else names)
        if not chosen:
            raise ValueError("select: expected at least one name, got none.")
        index = [self.names.index(self[name].relation) for name in chosen]
        index = [i for i in index if category is None or self.categories[i] == category]
        if not index:
            raise ValueError(f"select: nothing of category {category!r} among {', '.join(chosen)}.")
        return VectorSet(tuple(self.vectors[i] for i in index), tuple(self.categories[i] for i in index))

    @property
    def template(self) -> Template | str | None:
        """The template of all vectors; None if it is unknown or not one."""
        found = {vector.template for vector in self.vectors}
        return found.pop() if len(found) == 1 else None

    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if the vectors were made on another model."""
        check_model(self.fingerprint, model, f"the set of {len(self)} vectors", again="`fvlens compose`")

    def similarity(self) -> Float[Tensor, "relation relation"]:
        """Cosine similarity of every pair of vectors."""
        rows = torch.nn.functional.normalize(self.matrix, dim=1)
        return rows @ rows.T

    def plot(self, *, kind: Literal["similarity", "map"] = "similarity") -> "Figure":
        """Similarity of every pair of vectors, or a map of all.

        Args:
            kind: ``"similarity"``, a matrix of cosines; ``"map"``, the vectors in the plane, near where they point the
                same way: multidimensional scaling (:func:`fvlens.metrics.mds`) of the distances between the vectors at
                length 1, ``sqrt(2 - 2 cosine)``, coloured by category. The note gives the stress.

        Raises:
            ValueError: an unknown kind.
        """
        from fvlens import plots

        if kind == "similarity":
            title = f"Cosine similarity of {len(self)} vectors"
            return plots.similarity(self.similarity(), list(self.names), title=title)
        if kind != "map":
            raise ValueError(f"plot: kind={kind!r}; expected 'similarity' or 'map'.")
        distances = (2 - 2 * self.similarity().double()).clamp(min=0).sqrt()
        places, stress = mds(distances.fill_diagonal_(0).float())
        return plots.place_map(
            places,
            list(self.names),
            groups=self.categories if any(self.categories) else None,
            title=f"Map of {len(self)} vectors after layer {self.layer}",
            note=f"Near: alike in direction (multidimensional scaling of cosine distances, stress {stress:.2f})",
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a vector and dimension: ``relation, category, kind, layer, dimension, value``."""
        import pandas as pd

        d_model = self.matrix.shape[1]
        return pd.DataFrame(
            {
                "relation": [name for name in self.names for _ in range(d_model)],
                "category": [category for category in self.categories for _ in range(d_model)],
                "kind": [vector.kind for vector in self.vectors for _ in range(d_model)],
                "layer": self.layer,
                "dimension": list(range(d_model)) * len(self),
                "value": self.matrix.flatten().numpy(),
            }
        )

    def save(self, path: str | FilePath) -> FilePath:
        """Write the set to one safetensors file, metadata in its header. Replaces an existing file at once."""
        return write_tensors(FilePath(path), {"matrix": self.matrix}, self.header(), SET_FORMAT)

    def header(self) -> dict[str, Any]:
        """All of the set but its numbers, as plain JSON values; the fingerprint that vectors share stands once."""
        shared = vector_header(self.vectors[0])["fingerprint"]
        entries = [vector_header(vector) for vector in self.vectors]
        for entry in entries:
            if entry["fingerprint"] == shared:
                del entry["fingerprint"]
        return {"categories": list(self.categories), "fingerprint": shared, "vectors": entries}

    @classmethod
    def from_header(
        cls,
        rows: Float[Tensor, "relation d_model"],
        header: Mapping[str, Any],
        template: Template | str | None = None,
    ) -> "VectorSet":
        """The set of these numbers and a header that :meth:`header` made; a ``template`` replaces the header's.

        Raises:
            KeyError, TypeError, ValueError: the header is damaged, or the numbers do not fit it.
        """
        entries = header["vectors"]
        if len(rows) != len(entries):
            raise ValueError(f"{len(rows)} rows, but {len(entries)} vectors in the header")
        # version 0.1 wrote the fingerprint beside every vector
        shared = {"fingerprint": header["fingerprint"]} if "fingerprint" in header else {}
        each = zip(rows, entries, strict=True)
        vectors = tuple(vector_from(row, {**shared, **entry}, template) for row, entry in each)
        categories = as_texts(header["categories"], "categories")
        if len(categories) != len(vectors):  # none at all would be looked up
            raise ValueError(f"{len(vectors)} vectors, but {len(categories)} categories")
        return cls(vectors, categories)

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None, template: Template | str | None = None) -> "VectorSet":
        """Read what :meth:`save` wrote, with a warning if the training of some vectors was interrupted.

        Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, the vectors must have been made on this model.
            template: taken instead of the file's, for all vectors; see :meth:`FunctionVector.load`.

        Raises:
            ValueError: no such file; not a vector set, or a damaged one; or vectors of another model than ``model``.
        """
        path = FilePath(path)
        tensors, header = read_tensors(path, SET_FORMAT)
        try:
            loaded = cls.from_header(tensors["matrix"], header, template)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged vector set ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.check(model)
        parts = [vector.relation for vector in loaded if not vector.complete]
        if parts:
            warnings.warn(f"{path.name}: {INTERRUPTED}: {', '.join(parts)}.", stacklevel=2)
        return loaded


def _category(name: str) -> str:
    return load_relation(name).category if name in list_relations() else ""
