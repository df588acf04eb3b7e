"""What the files of a checkpoint name is read only if it lies inside its folder."""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fvlens.files import read_json

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def lies_inside(name: Any) -> bool:
    """Whether a name that a file gives is that of a file below its folder, on any system."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    windows = PureWindowsPath(name)
    return not (windows.drive or windows.root or ".." in windows.parts or PurePosixPath(name).is_absolute())


def check_named_files(folder: Path) -> None:
    """Refuse a folder whose files name files outside it.

    Raises:
        ValueError: an index of weights or the tokenizer's configuration does, or is not what it should be.
    """
    for index in INDEXES:
        if (folder / index).is_file():
            content = read_json(folder / index, "index of weight files")
            weights = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weights, dict):
                raise ValueError(f"load_model: {folder / index} has no weight_map; expected an index of weight files.")
            _check(folder / index, list(weights.values()))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(settings, "configuration of a tokenizer")
        named = content.get("fast_tokenizer_files", []) if isinstance(content, dict) else []
        _check(settings, named if isinstance(named, list) else [named])


def _check(file: Path, names: list[Any]) -> None:
    for name in names:
        if not lies_inside(name):
            raise ValueError(
                f"load_model: {file} names {name!r}; expected a file inside its folder. Nothing outside it is read."
            )
