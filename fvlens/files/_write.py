"""Text, JSON and tables, whole or not at all.

What is written goes to a temporary name in the same folder and is renamed when it is on the disk.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fvlens.files._paths import as_path, target

if TYPE_CHECKING:
    import pandas as pd

_BUFFER = 1024 * 1024


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends, and vanishes if it fails.

    Where ``path`` is a link, the file that it leads to is replaced.

    Raises:
        ValueError: the folder does not exist or takes no file; ``path`` is a folder, a pipe, a socket or a device; or a
            link that leads in a circle.
    """
    try:
        path, mode = target(as_path(path))
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
