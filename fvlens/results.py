"""What results of long work have in common: ``save`` and ``load``, one line of text, a small table.

A result is a frozen dataclass of plain values, tensors and other such values. :class:`Result` writes all of its fields
to one safetensors file: tensors under the names of the fields that hold them (``cie``, ``evaluations.3.ranks``), and
everything else as JSON in the header, beside the class, whether it is complete, the model's fingerprint and the
versions that it was made with. What several parts share (a template, the queries of a sweep) is written once.

Reading goes by the annotations of the fields: each value must be of the kind that its field says, tensors of its
precision and of the shape that the other tensors of the value leave it, and the class's own checks run as for values
that are given. Nothing is executed; a class is only ever one that the field allows, or one of those that the result
itself names in ``_kinds``.
"""

import dataclasses
import importlib.metadata
import json
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from fvlens.files import read_tensors, write_tensors
from fvlens.models import Fingerprint, check_model
from fvlens.showing import Shown
from fvlens.types import as_flag, as_list, as_text, as_texts, as_whole

PACKAGES = ("fvlens", "torch", "transformer-lens")
"""Packages whose versions stand in the files."""
_LONG = 80
"""Characters of JSON from which on a tuple is written once, however often it occurs."""


_R = TypeVar("_R")


class Result(Shown):
    """A result of long work: it can be saved and loaded.

    Attributes:
        FORMAT: name and version of what its files hold.
    """

    __slots__ = ()
    FORMAT: ClassVar[str] = ""

    @classmethod
    def _kinds(cls) -> Iterable[type]:
        """Classes that fields may hold whose annotation is a protocol or an abstract class."""
        return ()

    def _made_on(self) -> Fingerprint | None:
        """The model; None if the result does not say."""
        return getattr(self, "fingerprint", None)

    def _is_complete(self) -> bool:
        return bool(getattr(self, "complete", True))

    def _check_loaded(self) -> None:
        """Raise ``ValueError`` if the parts of a result that was read do not fit each other."""

    def save(self, path: str | Path) -> Path:
        """Write all of it to one safetensors file, metadata in its header. Replaces an existing file at once.

        Raises:
            ValueError: the folder does not exist, or takes no file; it holds something of the user's own that files
                cannot hold.
        """
        return self._write(Path(path))

    def _write(self, path: Path) -> Path:
        writing = _Writing()
        value = writing.plain(self, "")
        mark = self._made_on()
        header = {
            "class": type(self).__name__,
            "complete": self._is_complete(),
            "fingerprint": None if mark is None else dataclasses.asdict(mark),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "value": value,
            "parts": writing.parts,
        }
        return write_tensors(path, writing.tensors, header, self.FORMAT)

    @classmethod
    def load(cls: type[_R], path: str | Path, *, model: Any = None) -> _R:
        """Read what :meth:`save` wrote, with a warning if the work was interrupted. Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, the result must have been made on this model.

        Raises:
            ValueError: no such file; not a file of this class, or a damaged one; or a result of another model than
                ``model``, or of one that it does not name.
        """
        return read_result(cls, Path(path), model)


def read_result(cls: Any, path: Path, model: Any) -> Any:
    """What :meth:`Result.load` gives."""
    what = f"file of {cls.__name__}"
    tensors, header = read_tensors(path, cls.FORMAT, what)
    try:
        reading = _Reading(tensors, as_list(header["parts"], "parts"), cls._kinds())
        loaded = reading.value(cls, header["value"], "")
        reading.finish()
        loaded._check_loaded()
        complete, mark = as_flag(header["complete"], "complete"), header["fingerprint"]
        made_on = None if mark is None else Fingerprint.from_fields(mark)
        if complete != loaded._is_complete() or made_on != loaded._made_on():
            raise ValueError("complete and fingerprint are not those of the result beside them")
        versions = header["versions"]
        as_texts([*versions, *versions.values()], "versions")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path.name}: damaged {what} ({type(error).__name__}: {error}).") from error
    if model is not None:
        if made_on is None:
            raise ValueError(
                f"{path.name}: the {cls.__name__} does not say which model it was made on; load it without model=."
            )
        check_model(made_on, model, f"the {cls.__name__} in {path.name}")
    if not complete:
        warnings.warn(f"{path.name}: a part of the whole, since the work was interrupted.", stacklevel=3)
    return loaded


def check_counts(value: Any, n: int) -> None:
    """Refuse a value whose columns are not of ``n`` entries each: its tensors, and its tuples without names.

    Raises:
        ValueError: a column is longer or shorter.
    """
    for field in dataclasses.fields(value):
        column = getattr(value, field.name)
        if (isinstance(column, Tensor) or type(column) is tuple) and len(column) != n:
            raise ValueError(f"{field.name}: expected {n} entries, got {len(column)}.")


# --- writing ---


class _Writing:
    """Values as plain JSON; their tensors, by name, and their parts that may be shared go aside."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.parts: list[Any] = []
        self._known: dict[str, int] = {}
        self._written: dict[int, tuple[Any, dict[str, int]]] = {}  # by identity; held, so that it stays its own

    def plain(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            return value
        if isinstance(value, Tensor):
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            # as pairs: their order is the result's, and a header is written in the order of the alphabet
            return [[key, self.plain(inner, _joined(name, key))] for key, inner in value.items()]
        if isinstance(value, tuple | list):
            inner = [self.plain(one, _joined(name, i)) for i, one in enumerate(value)]
            return self._part(inner) if len(inner) > 1 and len(json.dumps(inner)) >= _LONG else inner
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if id(value) not in self._written:
                self._written[id(value)] = value, self._part(self._fields(value, name))
            return self._written[id(value)][1]
        raise self._foreign(value, name)

    def _fields(self, value: Any, name: str) -> dict[str, Any]:
        own = type(value)
        if not own.__module__.startswith("fvlens."):
            raise self._foreign(value, name)
        hints = typing.get_type_hints(own)
        fields: dict[str, Any] = {"class": own.__name__}
        for field in dataclasses.fields(value):
            if field.init:
                inner = getattr(value, field.name)
                kept = _is_any(hints[field.name])
                fields[field.name] = inner if kept else self.plain(inner, _joined(name, field.name))
        return fields

    def _part(self, content: Any) -> dict[str, int]:
        text = json.dumps(content, sort_keys=True)
        if text not in self._known:
            self._known[text] = len(self.parts)
            self.parts.append(content)
        return {"part": self._known[text]}

    def _foreign(self, value: Any, name: str) -> ValueError:
        return ValueError(
            f"save: {name or 'the result'} is a {type(value).__name__}, which files of fvlens cannot hold; save the "
            "other parts of the result by themselves."
        )


def _joined(name: str, inner: object) -> str:
    return f"{name}.{inner}" if name else str(inner)


def _is_any(hint: Any) -> bool:
    """Whether a field holds plain JSON values of any kind."""
    return hint is Any or (get_origin(hint) is dict and get_args(hint)[1] is Any)


# --- reading ---


class _Reading:
    """Values of plain JSON and tensors, each checked against what its field says."""

    def __init__(self, tensors: Mapping[str, Tensor], parts: list[Any], kinds: Iterable[type]) -> None:
        self._tensors, self._parts = tensors, parts
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._made: dict[tuple[int, Any], Any] = {}
        self._used: set[str] = set()
        self._seen: set[int] = set()
        self._inside = len(parts)

    def finish(self) -> None:
        """Raise if the file holds more than the result."""
        if self._used != set(self._tensors) or self._seen != set(range(len(self._parts))):
            raise ValueError(f"there is more in it than the result: {sorted(set(self._tensors) - self._used)[:5]}")

    def value(self, hint: Any, plain: Any, name: str) -> Any:
        """The value that ``plain`` stands for, of the kind ``hint``."""
        if isinstance(plain, dict) and set(plain) == {"part"} and not _is_any(hint):
            return self._part(hint, plain["part"], name)
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            return self._tensor(hint, plain, name)
        if hint is Tensor:
            return self._tensor(Tensor, plain, name)
        origin, inner = get_origin(hint), get_args(hint)
        if _is_any(hint):
            if hint is not Any and not isinstance(plain, dict):
                raise TypeError(f"{name}: expected an object, got {type(plain).__name__}")
            return plain
        if origin is Literal:
            if not isinstance(plain, str | int) or plain not in inner:
                raise ValueError(f"{name}={plain!r}; expected one of {', '.join(map(str, inner))}")
            return plain
        if origin in (typing.Union, UnionType):
            return self._one_of(inner, plain, name)
        if origin is tuple:
            return self._tuple(inner, plain, name)
        if origin in (dict, Mapping):
            pairs = [as_list(pair, name) for pair in as_list(plain, name)]
            made = {self.value(inner[0], key, name): self.value(inner[1], one, f"{name}.{key}") for key, one in pairs}
            if len(made) != len(pairs):
                raise ValueError(f"{name}: a key comes twice")
            return made
        return self._single(hint, plain, name)

    def _single(self, hint: Any, plain: Any, name: str) -> Any:
        if hint in (NoneType, None):
            if plain is not None:
                raise ValueError(f"{name}: expected nothing, got {plain!r}")
            return None
        if hint is bool:
            return as_flag(plain, name)
        if hint is int:
            return as_whole(plain, name, -(2**63))
        if hint is float:
            if isinstance(plain, bool) or not isinstance(plain, int | float):
                raise ValueError(f"{name}: expected a number, got {plain!r}")
            return float(plain)
        if hint is str:
            return as_text(plain, name)
        named = getattr(hint, "_fields", None)  # of a named tuple
        if isinstance(hint, type) and issubclass(hint, tuple) and named is not None:
            hints = typing.get_type_hints(hint)
            return hint(*self._tuple(tuple(hints[field] for field in named), plain, name))
        return self._object(hint, plain, name)

    def _part(self, hint: Any, place: Any, name: str) -> Any:
        index = as_whole(place, f"{name}: part", 0, self._inside - 1)  # of what stands before it alone: no circles
        if (index, hint) not in self._made:
            outside, self._inside = self._inside, index
            self._made[index, hint] = self.value(hint, self._parts[index], name)
            self._inside = outside
        self._seen.add(index)
        return self._made[index, hint]

    def _tensor(self, hint: Any, plain: Any, name: str) -> Tensor:
        if not isinstance(plain, dict) or set(plain) != {"tensor"}:
            raise TypeError(f"{name}: expected a tensor, got {json.dumps(plain)[:60]}")
        found = self._tensors[as_text(plain["tensor"], name)]
        self._used.add(plain["tensor"])
        if not isinstance(found, hint):
            raise ValueError(f"{name}: expected {hint.__name__}, got {found.dtype} {list(found.shape)}")
        return found

    def _one_of(self, hints: tuple[Any, ...], plain: Any, name: str) -> Any:
        """By what stands there: nothing, an object of one of the classes, or the first kind that takes it."""
        if plain is None and NoneType in hints:
            return None
        errors = []
        for hint in hints:
            if hint is NoneType:
                continue
            used, seen, inside = set(self._used), set(self._seen), self._inside
            try:
                return self.value(hint, plain, name)
            except (TypeError, ValueError, KeyError) as error:
                self._used, self._seen, self._inside = used, seen, inside
                errors.append(str(error))
        raise ValueError(errors[0] if len(errors) == 1 else f"{name}: none of its kinds ({'; '.join(errors)})")

    def _tuple(self, hints: tuple[Any, ...], plain: Any, name: str) -> tuple[Any, ...]:
        values = as_list(plain, name)
        if len(hints) == 2 and hints[1] is Ellipsis:
            hints = (hints[0],) * len(values)
        if len(values) != len(hints):
            raise ValueError(f"{name}: expected {len(hints)} values, got {len(values)}")
        return tuple(self.value(h, one, f"{name}.{i}") for i, (h, one) in enumerate(zip(hints, values, strict=True)))

    def _object(self, hint: Any, plain: Any, name: str) -> Any:
        if not isinstance(plain, dict):
            raise TypeError(f"{name}: expected a {getattr(hint, '__name__', hint)}, got {json.dumps(plain)[:60]}")
        said = plain["class"]
        own: Any = hint if getattr(hint, "__name__", None) == said else self._kinds.get(said)
        if own is None or not dataclasses.is_dataclass(own):
            raise ValueError(f"{name}: expected a {getattr(hint, '__name__', hint)}, got a {said!r}")
        hints = typing.get_type_hints(own)
        fields = {field.name: field for field in dataclasses.fields(own) if field.init}
        needed = {
            field.name
            for field in fields.values()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        given = set(plain) - {"class"}
        if not needed <= given <= set(fields):
            raise ValueError(f"{name or said}: expected the fields {', '.join(fields)}, got {', '.join(sorted(given))}")
        values = {key: self.value(hints[key], plain[key], _joined(name, key)) for key in fields if key in given}
        with jaxtyped("context"):  # the axes' sizes agree between the tensors of one value
            for key, value in values.items():
                if isinstance(value, Tensor) and not isinstance(value, hints[key]):
                    raise ValueError(
                        f"{_joined(name, key)}: expected {hints[key].__name__} beside the others, got shape "
                        f"{list(value.shape)}"
                    )
        kind: Any = own
        made = kind(**values)
        if isinstance(hint, type) and not isinstance(made, hint):
            raise ValueError(f"{name}: expected a {hint.__name__}, got a {said}")
        return made
