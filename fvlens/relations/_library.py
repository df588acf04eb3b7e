"""Loader of the word-pair library."""

import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fvlens.files import read_text
from fvlens.relations._relation import Pair, Relation

HEADER_KEYS = ("name", "category", "family", "domain", "direction", "compiled")


def read_relation(path: str | Path) -> Relation:
    """Read one relation from a TSV file in the library's format.

    Raises:
        ValueError: the file cannot be read; a header key is missing, or a line is not ``input<TAB>output``; the message
            names file and line.
    """
    path = Path(path)
    header: dict[str, str] = {}
    pairs: list[Pair] = []
    for number, line in enumerate(read_text(path, "relation").splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            header[key.strip()] = value.strip()
        elif line.strip():
            cells = line.split("\t")
            if len(cells) != 2 or not all(cell.strip() for cell in cells):
                raise ValueError(f"{path.name}, line {number}: expected 'input<TAB>output', got {line!r}.")
            pairs.append(Pair(*cells))
    missing = [key for key in HEADER_KEYS if not header.get(key)]
    if missing:
        raise ValueError(f"{path.name}: header lines '# key: value' missing for {', '.join(missing)}.")
    return Relation(
        name=header["name"],
        pairs=tuple(pairs),
        category=header["category"],
        source=header["compiled"],
        family=header["family"],
        domain=header["domain"],
        direction=header["direction"],
    )


@functools.cache
def _library() -> dict[str, Relation]:
    folder = resources.files("fvlens.relations") / "data"
    relations = [read_relation(Path(str(file))) for file in folder.iterdir() if file.name.endswith(".tsv")]
    return {relation.name: relation for relation in sorted(relations, key=lambda relation: relation.name)}


def library_relation(name: str) -> Relation:
    """A relation of the word-pair library by name.

    Raises:
        ValueError: no such relation; the message offers the nearest names.
    """
    library = _library()
    if name not in library:
        near = difflib.get_close_matches(name, library, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see fvlens.list_relations()."
        raise ValueError(f"no relation named {name!r} among the {len(library)} of the library; {hint}")
    return library[name]


def list_relations(category: str | None = None, *, family: str | None = None, domain: str | None = None) -> list[str]:
    """Names of the library's relations, sorted, optionally of one category, family or domain.

    Raises:
        ValueError: nothing in the library has that category, family or domain.

    Example:
        >>> import fvlens
        >>> "country-capital" in fvlens.list_relations(category="encyclopedic")
        True
    """
    names = list(_library())
    for key, wanted in (("category", category), ("family", family), ("domain", domain)):
        if wanted is None:
            continue
        known = Counter(getattr(relation, key) for relation in _library().values())
        if wanted not in known:
            raise ValueError(f"no relation has {key} {wanted!r}; expected one of {', '.join(sorted(known))}.")
        names = [name for name in names if getattr(_library()[name], key) == wanted]
    return names


def library_words(names: Sequence[str] | None = None) -> list[str]:
    """All distinct words (inputs and outputs) of the library or of the named relations, sorted."""
    relations = [library_relation(name) for name in (list(_library()) if names is None else names)]
    return sorted({word for relation in relations for pair in relation.pairs for word in pair})


def disjoint_relations(relation: Relation) -> list[str]:
    """Names of the library's relations of other families that share no output with this one, sorted.

    A vector of one of them cannot be right about this relation because the two have answers in common.

    Example:
        >>> import fvlens
        >>> names = fvlens.relations.disjoint_relations(fvlens.load_relation("country-capital"))
        >>> "antonym" in names, "city-capital" in names
        (True, False)
    """
    outputs = set(relation.outputs)
    return [
        name
        for name, other in _library().items()
        if name != relation.name and other.family != relation.family and outputs.isdisjoint(other.outputs)
    ]
