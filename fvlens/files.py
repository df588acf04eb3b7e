"""The one way to write files and to read them: text, JSON, tables, and tensors with JSON metadata.

*Writing*: what is written goes to a temporary name in the same folder, made by this call alone, and is renamed when it
is on the disk; a reader never sees half a file, and a failed write leaves the old file as it was. A new file's mode is
left to the umask, an old one's is kept, and so is a link to it. The same content gives the same bytes.

*Reading*: regular files only, of a size that is expected; nothing in a file is executed. Whatever is wrong with a file
is a ``ValueError`` that names it. JSON is strict: a key that comes twice, NaN and infinity are refused.

Tensors lie in the safetensors format, with a JSON header in its metadata. They may be given in pieces and read in
parts, so that a file can be larger than memory. The metadata also holds checksums, of each tensor and of all that the
header says: what was changed after it was saved is refused. Files of version 0.1 have none and are read as they are.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch
from jaxtyping import Shaped
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

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

MOST_JSON = 500_000_000
"""Bytes of a JSON file: the effects of all heads of a large model on all relations take some 100 MB."""

_MOST_TENSORS = 16 * 1024**3
"""Bytes of a file of tensors that is read whole."""

_BUFFER = 1024 * 1024

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


# --- names of files ---


def as_path(given: str | Path) -> Path:
    """The path that somebody wrote; ``~`` at its beginning is the home folder.

    Raises:
        ValueError: ``~`` with the name of somebody who has no home folder here.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{given}: there is no such home folder; write the whole path, or ./~ for a file of that name."
        ) from None


def path_hint(given: str | Path) -> str:
    """What to say beside "no such file" of a path of Windows on another system; otherwise nothing.

    Example:
        >>> path_hint("pairs.csv")
        ''
    """
    text = str(given)
    if os.name == "nt" or not re.match(r"[A-Za-z]:(?!//)", text):
        return ""
    rest = text[2:].replace("\\", "/")
    where = f", or in quotes if a shell took its backslashes away; under WSL it begins with /mnt/{text[0].lower()}/"
    if rest.startswith("/"):
        where = f"; under WSL it is /mnt/{text[0].lower()}{rest}"
    return f" It is a path of Windows, and this system has other ones: write it as it is here{where}."


# --- writing ---


KINDS = (".json", ".safetensors", ".html", ".csv", ".md", ".svg", ".pdf", ".png")
"""Ends of the names of files that fvlens writes."""


def check_destination(given: str | Path, what: str = "--out", *, suffix: str | None = None) -> Path:
    """Where a result will go, checked before the work that leads to it: nothing is made, and nothing stays.

    Args:
        given: the file, or the folder, which need not exist.
        what: the option or argument that names it, for messages.
        suffix: of a file, such as ``".json"``; None for a folder. A name without any is taken for a file, too.

    Returns:
        The path, with ``~`` written out.

    Raises:
        ValueError: a file where a folder is to be, or the other way round; a name of another kind of file; a file in a
            folder that does not exist; a folder that takes no file. The message says what to do.
    """
    path = as_path(given)
    kind = path.suffix.lower()
    try:
        is_folder, exists = path.is_dir(), path.exists() or path.is_symlink()
        if suffix is None:
            if exists and not is_folder:
                raise ValueError(f"{what} {given} is a file; give a folder.")
            if not exists and kind in KINDS:
                raise ValueError(
                    f"{what} {given} is the name of a file, and a folder is written; give a name without {kind}."
                )
            place = next(one for one in (path, *path.absolute().parents) if one.exists() or one.is_symlink())
            if not place.is_dir():
                raise ValueError(f"{what} {given}: {place} is a file; choose another folder.")
        else:
            if is_folder or str(given)[-1:] in ("/", os.sep):
                raise ValueError(
                    f"{what} {given} is a folder; give the name of a file, such as {path / f'result{suffix}'}."
                )
            if kind in KINDS and kind != suffix:
                raise ValueError(f"{what} {given}: expected the name of a {suffix} file, such as {path.stem}{suffix}.")
            if not path.parent.is_dir():
                raise ValueError(f"{what} {given}: folder {path.parent} does not exist; create it first.")
            place = _target(path)[0].parent
        probe = place / f".fvlens.{secrets.token_hex(8)}.part"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{what} {given} cannot be written ({error.strerror or error}); choose another place."
        ) from error
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends, and vanishes if it fails.

    Where ``path`` is a link, the file that it leads to is replaced.

    Raises:
        ValueError: the folder does not exist or takes no file; ``path`` is a folder, a pipe, a socket or a device; or a
            link that leads in a circle.
    """
    try:
        path, mode = _target(as_path(path))
    except OSError as error:
        raise ValueError(f"save: {path} cannot be written ({error.strerror or error}); choose another name.") from error
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    ours = True
    try:
        try:
            # exclusively: a name that somebody else made (a link, say) is never followed; a new file's mode is left to
            # the umask
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(part, flags, 0o666 if mode is None else mode)
        except FileExistsError:
            ours = False
            raise
        except OSError as error:
            raise ValueError(
                f"save: {path} cannot be written ({error.strerror or error}); choose another folder or name."
            ) from error
        with open(descriptor, "wb", buffering=_BUFFER) as file:
            if mode is not None:
                part.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if ours:
            part.unlink(missing_ok=True)


def _target(path: Path) -> tuple[Path, int | None]:
    """The file that is to be written, links followed, and its mode if it exists."""
    given = path
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise ValueError(f"save: {given} is a link that leads in a circle; remove it or choose another name.")
    if not path.parent.is_dir():
        raise ValueError(f"save: folder {path.parent} does not exist; create it first.")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path, None
    if stat.S_ISDIR(mode):
        raise ValueError(f"save: {given} is a folder; give the name of a file in it.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"save: {given} is a pipe, a socket or a device; give the name of a file.")
    return path, stat.S_IMODE(mode) & 0o777


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8, its line ends as they are.

    Raises:
        ValueError: as for :func:`replacing`; text that UTF-8 cannot hold.
    """
    data = text.encode()
    with replacing(path) as file:
        file.write(data)
    return path


def write_json(path: Path, content: Any, *, indent: int | None = None, null_for_nan: bool = False) -> Path:
    """Write plain values as JSON, in their own order.

    Args:
        path: the file.
        content: the values.
        indent: spaces before an inner line; by default everything is one line.
        null_for_nan: write null for NaN, for a number that may be missing.

    Raises:
        ValueError: as for :func:`replacing`; a number that is not finite.
    """
    try:
        text = json.dumps(_with_null(content) if null_for_nan else content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"save: {path.name}: expected finite numbers ({error}).") from error
    return write_text(path, text + "\n")


def _with_null(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _with_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_null(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def table_text(frame: "pd.DataFrame") -> str:
    """A table as CSV with a line of headings; missing numbers are empty cells."""
    return frame.to_csv(index=False, lineterminator="\n")


def write_table(path: Path, frame: "pd.DataFrame") -> Path:
    """Write :func:`table_text`.

    Raises:
        ValueError: as for :func:`replacing`.
    """
    return write_text(path, table_text(frame))


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


# --- reading ---


@contextlib.contextmanager
def _regular(path: Path, what: str, *, buffering: int = -1) -> Iterator[BinaryIO]:
    """A regular file, open for reading: opening a pipe would wait for somebody to write to it."""
    path = as_path(path)
    try:
        kind = path.stat().st_mode  # first: opening a device can do something to it
    except PermissionError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror}).") from None
    except (OSError, ValueError):  # ValueError: a null byte in the path
        raise ValueError(f"no {what} at {path}.{path_hint(path)}") from None
    _check_kind(path, what, kind)
    waits_not = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | waits_not)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ValueError(f"no {what} at {path}.") from None
        raise ValueError(f"{path.name}: cannot be read ({error.strerror or error}).") from None
    with open(descriptor, "rb", buffering=buffering) as file:
        _check_kind(path, what, os.fstat(descriptor).st_mode)  # it may have been exchanged meanwhile
        try:
            yield file
        except OSError as error:
            raise ValueError(f"{path.name}: cannot be read ({error.strerror or error}).") from error


def _check_kind(path: Path, what: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise ValueError(f"no {what} at {path}. It is a folder; give the name of a file.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path.name}: expected a regular file, got a pipe, a socket or a device.")


def read_bytes(path: Path, what: str, *, most: int = _MOST_TEXT) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        what: what it should be, for messages.
        most: bytes that are accepted.

    Raises:
        ValueError: no such file; a folder, a pipe, a socket or a device; larger than ``most``; no permission.
    """
    with _regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most:
            data = file.read(most + 1)
            size = max(size, len(data))  # it may have grown
            if size <= most:
                return data
    raise ValueError(f"{path.name}: expected a {what} of at most {most} bytes, got {size}.")


def read_text(path: Path, what: str, *, most: int = _MOST_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark; every line ends in a line feed.

    Raises:
        ValueError: as for :func:`read_bytes`; not UTF-8.
    """
    data = read_bytes(path, what, most=most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name}: expected UTF-8 text, but byte {error.start} is none. Save the file again as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, what: str, *, most: int = MOST_JSON) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: as for :func:`read_bytes` and :func:`parse_json`; not UTF-8.
    """
    data = read_bytes(path, what, most=most)
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:  # text that is not UTF-8, too
        raise ValueError(f"{path.name}: not a JSON file, or a truncated one ({error}).") from error


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """What a JSON text says, if it can say only one thing.

    Args:
        text: the text.
        nan: accept NaN and infinities as numbers, which is for whoever reads them to check.

    Raises:
        ValueError: no JSON; a key that comes twice in an object; NaN, infinity, or a number too large to be another;
            values too deep inside others.

    Example:
        >>> parse_json('{"layer": 2, "layer": 3}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'layer' comes twice
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=float if nan else _refuse,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError("values lie too deep inside others") from None


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


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
        with _regular(path, what) as raw:
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
        with _regular(self.path, "file", buffering=0) as raw:
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
