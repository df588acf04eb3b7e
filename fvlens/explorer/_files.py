"""The one folder that an explorer saves into and loads from."""

import re
from pathlib import Path

from fvlens.files import as_path

_NAME = re.compile(r"\w[\w .+-]{0,80}")


def check_folder(folder: str | Path) -> Path:
    """The folder, as a whole path.

    Raises:
        ValueError: it is no folder.
    """
    path = as_path(folder)
    if not path.is_dir():
        raise ValueError(f"folder: {path} is no folder; make it first, or give another one.")
    return path.resolve()


def inside(folder: Path, name: str, suffix: str) -> Path:
    """The file of this name in the folder, which a name alone cannot leave.

    Raises:
        ValueError: a name with a path in it, or with other signs than letters, digits and ``_ . + -``; a link that
            leads out of the folder.
    """
    stem = name.strip().removesuffix(suffix)
    if not _NAME.fullmatch(stem):
        raise ValueError(
            f"expected a name of letters, digits and _ . + - alone (files lie in {folder}), got {name.strip()[:60]!r}."
        )
    path = folder / f"{stem}{suffix}"
    if path.resolve().parent != folder:
        raise ValueError(f"{path.name} is a link that leads out of {folder}; give another name.")
    return path


def names(folder: Path, suffix: str) -> list[str]:
    """Names of the files in the folder that end so, in order; without the end."""
    found = (path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}") if path.is_file())
    return sorted(name for name in found if _NAME.fullmatch(name))
