"""Files of tensors: written whole or not at all, read without running anything.

One format serves everything that is saved: a safetensors file whose header holds JSON metadata. What is written goes to
a temporary name in the same folder, made by this call alone, and is renamed when it is on the disk; a reader never sees
half a file, and a failed write leaves the old file as it was. Tensors may be given in pieces and read in parts, so that
a file can be larger than memory.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

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

_MOST_TEXT = 50_000_000
"""Bytes of a text file that is read whole."""

_BUFFER = 1024 * 1024


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


# --- writing ---


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends, and vanishes if it fails.

    Raises:
        ValueError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"save: folder {path.parent} does not exist; create it first.")
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    # exclusively: a name that somebody else made (a link, say) is never followed; the mode is left to the umask
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb", buffering=_BUFFER) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Shaped[Tensor, "..."] | Pieces], header: dict[str, Any], format: str
) -> Path:
    """Write tensors with a JSON header to a temporary name, then rename.

    Raises:
        ValueError: the folder does not exist; a precision that files do not hold; a header of more than 100 MB; pieces
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
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise ValueError(f"save: the header of {path.name} would take {len(text)} bytes; {_MOST_HEADER} are allowed.")
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            written = 0
            for piece in given[name].parts():
                data = piece.detach().to("cpu", given[name].dtype).contiguous().flatten().view(torch.uint8)
                file.write(data.numpy().data)
                written += data.numel()
            if written != given[name].n_bytes:
                raise ValueError(f"save: {name!r} takes {given[name].n_bytes} bytes, but its pieces have {written}.")
    return path


def _one_piece(tensor: Shaped[Tensor, "..."]) -> Pieces:
    return Pieces(tuple(tensor.shape), tensor.dtype, lambda: (tensor,))


# --- reading ---


def read_text(path: Path, what: str, *, most: int = _MOST_TEXT) -> str:
    """A small text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        what: what it should be, for messages.
        most: bytes that are accepted.

    Raises:
        ValueError: no such file, a pipe or a device; larger than ``most``; not UTF-8; no permission.
    """
    _check_regular(path, what)
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"{path.name}: expected a {what} of at most {most} bytes, got {size}.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: expected UTF-8 text, but byte {error.start} is none.") from None
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror or error}).") from None


def _check_regular(path: Path, what: str) -> None:
    """Refuse what is no regular file: opening a pipe would wait for somebody to write to it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a null byte in the path
        mode = 0
    if not mode or stat.S_ISDIR(mode):
        raise ValueError(f"no {what} at {path}.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path.name}: expected a regular file, got a pipe, a socket or a device.")


@contextlib.contextmanager
def _opened(path: Path, format: str, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file of this format, checked by the library, and its JSON header."""
    _check_regular(path, what)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file, or a truncated one ({error}).") from error
        if metadata.get("format") != format:
            raise ValueError(
                f"{path.name}: not written by fvlens (format {metadata.get('format')!r}, expected {format!r})."
            )
        try:
            header = json.loads(metadata["fvlens"])
            if not isinstance(header, dict):
                raise TypeError(f"expected an object, got {type(header).__name__}")
        except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path.name}: damaged metadata ({type(error).__name__}: {error}).") from error
        yield file, header


def read_tensors(
    path: Path, format: str, what: str = "vector file"
) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
    """Tensors and JSON header of a file that :func:`write_tensors` wrote. Nothing in it is executed.

    Raises:
        ValueError: no such file, or not a regular one; not a safetensors file, a truncated one, or one of another
            format; a damaged header.
    """
    with _opened(path, format, what) as (file, header):
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file, or a truncated one ({error}).") from error
    return tensors, header


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
        identity: what tells whether the file is still the one that was opened.
    """

    path: Path
    header: dict[str, Any]
    entries: dict[str, _Entry]
    identity: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, format: str, what: str) -> "TensorFile":
        """Look into a file that :func:`write_tensors` wrote.

        Raises:
            ValueError: as for :func:`read_tensors`.
        """
        with _opened(path, format, what) as (_, header), open(path, "rb") as raw:
            # the library has checked that the tensors lie one behind the other and fill the file
            n_header = int.from_bytes(raw.read(8), "little")
            try:
                layout = json.loads(raw.read(n_header))
                layout.pop("__metadata__", None)
                dtypes = {name: dtype for dtype, name in DTYPES.items()}
                entries = {
                    name: _Entry(dtypes[some["dtype"]], tuple(some["shape"]), 8 + n_header + some["data_offsets"][0])
                    for name, some in layout.items()
                }
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path.name}: unexpected tensors ({type(error).__name__}: {error}).") from error
            return cls(path, header, entries, _identity(raw))

    def read_into(self, out: Shaped[Tensor, "..."], name: str, first: int = 0) -> None:
        """Fill ``out``, contiguous and of the tensor's precision, with its numbers from the ``first`` one on.

        Raises:
            ValueError: the file is gone, or is no longer the one that was opened.
        """
        entry = self.entries[name]
        assert out.is_contiguous()
        assert out.dtype == entry.dtype
        _check_regular(self.path, "file")
        with open(self.path, "rb", buffering=0) as raw:
            if _identity(raw) != self.identity:
                raise ValueError(f"{self.path.name}: the file was replaced or changed since it was opened.")
            raw.seek(entry.start + first * entry.dtype.itemsize)
            rest = out.flatten().view(torch.uint8).numpy().data
            while rest:
                n_read = raw.readinto(rest) or 0
                if not n_read:
                    raise ValueError(f"{self.path.name}: the file ends before its tensors do.")
                rest = rest[n_read:]

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """A whole tensor."""
        out = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self.read_into(out, name)
        return out


def _identity(raw: Any) -> tuple[int, ...]:
    status = os.fstat(raw.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
