"""The head of a GGUF file, checked: what the file says of its model, and which tensors lie in it, none of them read.

A number in a file is believed only as far as the file reaches: no text, array or tensor may end behind its last byte.
"""

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 2**20
"""Metadata keys, and tensors, that a file may have."""
_MOST_AXES = 4


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in the file.

    Attributes:
        name: its name, as llama.cpp writes it.
        shape: its axes, the fastest one last.
        kind: number of its ggml type.
    """

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHead:
    """What a GGUF file says before its numbers begin.

    Attributes:
        path: the file.
        metadata: single values by key; of an array of texts only its length.
        tensors: what lies in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as ``llama``."""
        return str(self.metadata["general.architecture"])

    def said(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, such as ``context_length``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def quantization(self) -> str:
        """Types of its tensors and how many have each, the most frequent first: ``GGUF Q4_1 210, F32 61``."""
        counted = Counter(type_name(tensor.kind) for tensor in self.tensors)
        ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        return f"GGUF {', '.join(f'{name} {count}' for name, count in ordered)}"


def type_name(kind: int) -> str:
    """Name of a ggml type, such as ``Q4_1``."""
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF file does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_head(path: Path) -> GgufHead:
    """The head of a GGUF file.

    Raises:
        ValueError: no GGUF file, of another version, one that ends too early, or one that contradicts itself.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reading(path, data).head()
    except (OSError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(error).startswith("load_model"):
            raise
        raise _broken(path, str(error)) from error  # an empty file cannot be mapped


def _broken(path: Path, text: str) -> ValueError:
    return ValueError(
        f"load_model: {path} is no GGUF file that can be read ({text}); expected one of version "
        f"{' or '.join(map(str, VERSIONS))}, whole."
    )


class _Reading:
    """A position in the file that moves on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0
        self.end = len(data)

    def head(self) -> GgufHead:
        if self.data[:4] != MAGIC:
            raise _broken(self.path, "it does not begin with GGUF")
        self.place = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise _broken(self.path, f"version {version}")
        n_tensors, n_keys = self.count("tensors"), self.count("metadata keys")
        metadata = {}
        for _ in range(n_keys):
            key = self.text()
            metadata[key] = self.value(self.number("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise _broken(self.path, "it names no architecture")
        entries = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise _broken(self.path, f"alignment {alignment!r}")
        begin = -(-self.place // alignment) * alignment
        for tensor, offset in entries:
            if begin + offset + _stored_bytes(tensor, self.path) > self.end:
                raise _broken(self.path, f"tensor {tensor.name} lies behind its end; the file is cut off")
        return GgufHead(self.path, metadata, tuple(tensor for tensor, _ in entries))

    def number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.skip(size))
        return value

    def skip(self, size: int) -> int:
        """Move on by this many bytes; where they begin."""
        begin = self.place
        if size > self.end - begin:
            raise _broken(self.path, "it ends too early")
        self.place += size
        return begin

    def count(self, what: str) -> int:
        number = self.number("Q")
        if number > _MOST_ENTRIES:
            raise _broken(self.path, f"{number} {what}")
        return number

    def text(self) -> str:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self.number(_FIXED[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _broken(self.path, f"a value of type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _FIXED:
            size = struct.calcsize(f"<{_FIXED[inner]}")
            begin = self.skip(size * length)
            return list(struct.unpack_from(f"<{length}{_FIXED[inner]}", self.data, begin)) if length <= 4096 else length
        if inner != _STRING:
            raise _broken(self.path, f"an array of type {inner}")
        for _ in range(length):
            self.skip(self.number("Q"))
        return length

    def tensor(self) -> tuple[StoredTensor, int]:
        name, n_axes = self.text(), self.number("I")
        if not 1 <= n_axes <= _MOST_AXES:
            raise _broken(self.path, f"tensor {name} has {n_axes} axes")
        axes = [self.number("Q") for _ in range(n_axes)]
        kind, offset = self.number("I"), self.number("Q")
        return StoredTensor(name, tuple(reversed(axes)), kind), offset


def _stored_bytes(tensor: StoredTensor, path: Path) -> int:
    """How many bytes a tensor takes in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (KeyError, ValueError):
        raise _broken(
            path, f"tensor {tensor.name} is of {type_name(tensor.kind)}, which the gguf package lacks"
        ) from None
    if tensor.shape[-1] % block or tensor.size > 2**48:
        raise _broken(path, f"tensor {tensor.name} of shape {tensor.shape} in blocks of {block}")
    return tensor.size // block * size
