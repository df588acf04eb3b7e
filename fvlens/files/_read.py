"""Bytes, text and JSON of regular files of a size that is expected."""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from fvlens.files._paths import as_path, path_hint

_MOST_TEXT = 50_000_000
"""Bytes of a text file that is read whole."""

MOST_JSON = 500_000_000
"""Bytes of a JSON file: the effects of all heads of a large model on all relations take some 100 MB."""


@contextlib.contextmanager
def regular(path: Path, what: str, *, buffering: int = -1) -> Iterator[BinaryIO]:
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
    with regular(path, what) as file:
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
