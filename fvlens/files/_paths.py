"""Names of files, as somebody wrote them, and whether a result can go there."""

import os
import re
import secrets
import stat
from pathlib import Path


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
            place = target(path)[0].parent
        probe = place / f".fvlens.{secrets.token_hex(8)}.part"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{what} {given} cannot be written ({error.strerror or error}); choose another place."
        ) from error
    return path


def target(path: Path) -> tuple[Path, int | None]:
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
