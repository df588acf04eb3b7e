"""Tensors in the safetensors format, with a JSON header in its metadata and checksums of both."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Shaped
from torch import Tensor

from fvlens.files._read import parse_json, regular
from fvlens.files._write import replacing

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Precisions that files hold, and their names in the safetensors format."""

_MOST_HEADER = 100_000_000
"""Bytes of a header that readers of safetensors accept."""

_MOST_TENSORS = 16 * 1024**3
"""Bytes of a file of tensors that is read whole."""

_TENSORS, _SEAL = "sha256 of tensors", "sha256"
"""Keys of checksums in the metadata: JSON with that of each tensor, and that of all else in the header."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor that is written piece by piece and never held whole.

    Attributes:
        shape, dtype: of the whole tensor.
        parts: gives the pieces, in the order of the tensor's numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Shaped[Tensor, "*piece"]]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def write_tensors(
    path: Path, tensors: Mapping[str, Shaped[Tensor, "..."] | Pieces], header: dict[str, Any], format: str
) -> Path:
    """Write tensors with a JSON header.

    Raises:
        ValueError: as for :func:`replacing`; a precision that files do not hold; a header of more than 100 MB; pieces
            that do not add up to their tensor.
    """
    given = {name: value if isinstance(value, Pieces) else _one_piece(value) for name, value in tensors.items()}
    for name, pieces in given.items():
        if pieces.dtype not in DTYPES:
            raise ValueError(f"save: {name!r} has dtype {pieces.dtype}; expected one of {', '.join(map(str, DTYPES))}.")
    # wide numbers first, as the library's own writer does, so that each tensor starts where its numbers may
    order = sorted(given, key=lambda name: (-given[name].dtype.itemsize, name))
    metadata = {"format": format, "fvlens": json.dumps(header, sort_keys=True)}
    layout: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + given[name].n_bytes
        layout[name] = {
            "dtype": DTYPES[given[name].dtype],
            "shape": list(given[name].shape),
            "data_offsets": [start, end],
        }
    # as long as it will be with the checksums, which are known when the tensors are written
    digests = dict.fromkeys(order, "0" * 64)
    text = _sealed(layout, digests)
    if len(text) > _MOST_HEADER:
        raise ValueError(f"save: the header of {path.name} would take {len(text)} bytes; {_MOST_HEADER} are allowed.")
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            written, digest = 0, hashlib.sha256()
            for piece in given[name].parts():
                data = piece.detach().to("cpu", given[name].dtype).contiguous().flatten().view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
                written += data.nbytes
            digests[name] = digest.hexdigest()
            if written != given[name].n_bytes:
                raise ValueError(f"save: {name!r} takes {given[name].n_bytes} bytes, but its pieces have {written}.")
        file.seek(8)
        file.write(_sealed(layout, digests))
    return path


def _sealed(layout: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """The header of a file of tensors, with their checksums and its own."""
    metadata = layout["__metadata__"] | {_TENSORS: json.dumps(digests, sort_keys=True)}
    whole = {**layout, "__metadata__": metadata}
    whole["__metadata__"] = metadata | {_SEAL: _seal(whole)}
    text = json.dumps(whole, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _seal(layout: Mapping[str, Any]) -> str:
    """Checksum of all that a header says, but for itself, in whatever order."""
    metadata = {name: value for name, value in layout["__metadata__"].items() if name != _SEAL}
    said = json.dumps({**layout, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


def _one_piece(tensor: Shaped[Tensor, "..."]) -> Pieces:
    return Pieces(tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file whose tensors are read in parts, when they are asked for. Nothing is kept open between two reads.

    Attributes:
        path: the file.
        header: its JSON header.
        entries: tensor name -> precision, shape and place.
        digests: tensor name -> its checksum; empty for files of version 0.1, which have none.
        identity: what tells whether the file is still the one that was opened.
    """

    path: Path
    header: dict[str, Any]
    entries: dict[str, _Entry]
    digests: dict[str, str]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, format: str, what: str, *, most: int | None = None) -> "TensorFile":
        """Look into a file that :func:`write_tensors` wrote.

        Raises:
            ValueError: as for :func:`read_tensors`.
        """
        with regular(path, what) as raw:
            size = os.fstat(raw.fileno()).st_size
            if most is not None and size > most:
                raise ValueError(f"{path.name}: expected a {what} of at most {most} bytes, got {size}.")
            layout, first = _layout(raw, size, path)
            header = _header(layout.get("__metadata__"), path, format)
            digests = _digests(layout, path)
            del layout["__metadata__"]
            try:
                entries = _entries(layout, first, size)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path.name}: unexpected tensors ({type(error).__name__}: {error}).") from error
            except ValueError as error:
                raise ValueError(f"{path.name}: not a safetensors file, or a truncated one ({error}).") from error
            return cls(path, header, entries, digests, _identity(raw))

    def read_into(self, out: Shaped[Tensor, "..."], name: str, first: int = 0) -> None:
        """Fill ``out``, contiguous and of the tensor's precision, with its numbers from the ``first`` one on.

        Raises:
            ValueError: the file is gone, or is no longer the one that was opened.
        """
        entry = self.entries[name]
        assert out.is_contiguous()
        assert out.dtype == entry.dtype
        with regular(self.path, "file", buffering=0) as raw:
            if _identity(raw) != self.identity:
                raise ValueError(f"{self.path.name}: the file was replaced or changed since it was opened.")
            raw.seek(entry.start + first * entry.dtype.itemsize)
            rest = out.flatten().view(torch.uint8).numpy().data
            while rest:
                n_read = raw.readinto(rest) or 0  # pyright: ignore[reportAttributeAccessIssue]
                if not n_read:
                    raise ValueError(f"{self.path.name}: the file ends before its tensors do.")
                rest = rest[n_read:]

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """A whole tensor; its checksum is compared.

        Raises:
            ValueError: as for :meth:`read_into`; its numbers are not those that were saved.
        """
        out = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self.read_into(out, name)
        if (
            self.digests
            and hashlib.sha256(out.flatten().view(torch.uint8).numpy().data).hexdigest() != self.digests[name]
        ):
            raise _changed(self.path, f"the numbers of {name!r}")
        return out


def read_tensors(
    path: Path, format: str, what: str = "vector file", *, most: int = _MOST_TENSORS
) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
    """Tensors and JSON header of a file that :func:`write_tensors` wrote. Nothing in it is executed.

    A header may hold NaN, where a number may be missing; whoever takes a number out of it checks.

    Raises:
        ValueError: no such file, or not a regular one; larger than ``most`` bytes; not a safetensors file, a truncated
            one, or one of another format; a damaged header; a checksum that is not that of what the file holds.
    """
    file = TensorFile.open(path, format, what, most=most)
    return {name: file.read(name) for name in file.entries}, file.header


def _layout(raw: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and the byte at which they begin."""
    try:
        n_header = int.from_bytes(raw.read(8), "little")
        if size < 8 or n_header > min(_MOST_HEADER, size - 8):
            raise ValueError(f"a header of {n_header} bytes in a file of {size}; {_MOST_HEADER} are allowed")
        text = raw.read(n_header)
        if not text.startswith(b"{"):
            raise ValueError("the header is no JSON object")
        return parse_json(text.decode()), 8 + n_header
    except ValueError as error:
        raise ValueError(f"{path.name}: not a safetensors file, or a truncated one ({error}).") from error


def _header(metadata: Any, path: Path, format: str) -> dict[str, Any]:
    """Our own JSON header out of the metadata."""
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != format:
        raise ValueError(f"{path.name}: not written by fvlens (format {found!r}, expected {format!r}).")
    try:
        header = parse_json(metadata["fvlens"], nan=True)
        if not isinstance(header, dict):
            raise TypeError(f"expected an object, got {type(header).__name__}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: damaged metadata ({type(error).__name__}: {error}).") from error
    return header


def _digests(layout: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The checksums of the tensors; none in a file of version 0.1.

    Raises:
        ValueError: the header is not what was saved.
    """
    metadata = layout["__metadata__"]
    if _SEAL not in metadata and _TENSORS not in metadata:
        return {}
    if metadata.get(_SEAL) != _seal(layout) or _TENSORS not in metadata:
        raise _changed(path, "its metadata")
    return json.loads(metadata[_TENSORS])


def _changed(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path.name}: {what} changed after the file was saved (another checksum); take an undamaged copy, or make it "
        "again."
    )


def _entries(layout: dict[str, Any], first: int, size: int) -> dict[str, _Entry]:
    """Where each tensor lies. They must lie one behind the other and fill the file.

    Raises:
        KeyError, TypeError, ValueError: they do not, or are of a precision that files of ours do not hold.
    """
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    entries: dict[str, _Entry] = {}
    ends: list[tuple[int, int]] = []
    for name, some in layout.items():
        dtype, shape, offsets = dtypes[some["dtype"]], some["shape"], some["data_offsets"]
        numbers = [*shape, *offsets]
        if len(offsets) != 2 or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise TypeError(f"{name!r} has shape {shape} and data_offsets {offsets}")
        start, end = offsets
        if end - start != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name!r} of shape {shape} lies in {end - start} bytes")
        entries[name] = _Entry(dtype, tuple(shape), first + start)
        ends.append((start, end))
    reached = 0
    for start, end in sorted(ends):
        if start != reached:
            raise ValueError(f"a tensor begins at byte {start}, but the one before it ends at {reached}")
        reached = end
    if first + reached != size:
        raise ValueError(f"the tensors end at byte {first + reached}, the file at {size}")
    return entries


def _identity(raw: Any) -> tuple[int, ...]:
    status = os.fstat(raw.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
