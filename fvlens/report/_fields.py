"""Fields of a JSON file, checked: there, and of the type that is declared. Messages name file and field."""

import dataclasses
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True, slots=True)
class Fields:
    """An object in a JSON file.

    Attributes:
        path: the file.
        content: the object.
        place: where in the file it is, empty for the whole.
    """

    path: Path
    content: dict[str, Any]
    place: str = ""

    def get(self, name: str, expected: Any) -> Any:
        """A field of the expected type: a class, ``X | None``, or a ``Literal`` of texts.

        Raises:
            ValueError: the field is missing or of another type.
        """
        if name not in self.content:
            raise self.error(name, "the field is missing.")
        value = self.content[name]
        if not _fits(value, expected):
            raise self.error(name, f"expected {_type_text(expected)}, got {value!r}.")
        return value

    def inside(self, name: str) -> "Fields":
        """The object that a field holds."""
        return Fields(self.path, self.get(name, dict), self._place_of(name))

    def made(self, kind: Any) -> Any:
        """A dataclass of these fields: each of its declared type, none too many, through its own checks.

        Raises:
            ValueError: a field is missing, of another type, not one of the class, or refused by it.
        """
        expected = {field.name: field.type for field in dataclasses.fields(kind)}
        for name in self.content:
            if name not in expected:
                raise self.error(name, f"not a field of this schema; expected {', '.join(expected)}.")
        values = {name: self.get(name, type_) for name, type_ in expected.items()}
        try:
            return kind(**values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {self.place}: {error}") from error

    def error(self, name: str, text: object) -> ValueError:
        """What is wrong with a field."""
        return ValueError(f"{self.path}: {self._place_of(name)}: {text}")

    def _place_of(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def _fits(value: Any, expected: Any) -> bool:
    if get_origin(expected) is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if _is_union(expected):
        return any(_fits(value, kind) for kind in get_args(expected))
    return type(value) is expected


def _type_text(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    if _is_union(expected):
        return " or ".join(map(_type_text, get_args(expected)))
    return "null" if expected is types.NoneType else expected.__name__


def _is_union(expected: Any) -> bool:
    return isinstance(expected, types.UnionType) or get_origin(expected) is Union
