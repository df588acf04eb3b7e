"""``fvlens doctor``: what this machine has of what fvlens uses."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.table import Column, Table

from fvlens.cli._app import out, say
from fvlens.models import EMBEDDED_MODELS, PACKAGED_MODELS, free_memory, packaged_file

EXTRAS = ("gguf", "peft", "bitsandbytes", "figures", "sheets", "notebooks")
"""Those that a user may want; ``test`` and ``dev`` are for work on fvlens itself."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that fvlens asks for.

    Attributes:
        name: as on PyPI.
        asked: the versions that fvlens takes.
        extra: the extra that it belongs to; empty for what is always needed.
        installed: its version here; empty if it is not installed.
        fits: whether that is one of the versions asked for.
    """

    name: str
    asked: str
    extra: str
    installed: str
    fits: bool

    @property
    def wrong(self) -> bool:
        """Needed and not there, or there in a version that fvlens does not take."""
        return not self.fits if self.installed else not self.extra


def packages() -> list[Package]:
    """What the installed fvlens asks for, for itself and for :data:`EXTRAS`."""
    from packaging.requirements import Requirement

    found: dict[str, Package] = {}
    for text in importlib.metadata.requires("fvlens") or ():
        asked = Requirement(text)
        extras = [extra for extra in EXTRAS if asked.marker is not None and asked.marker.evaluate({"extra": extra})]
        always = asked.marker is None or asked.marker.evaluate({"extra": ""})
        if asked.name == "fvlens" or not (always or extras):
            continue
        try:
            installed = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            installed = ""
        fits = bool(installed) and asked.specifier.contains(installed, prereleases=True)
        extra = "" if always else ", ".join(extras)
        bounds = ",".join(sorted(map(str, asked.specifier), reverse=True))  # the lower one first
        found.setdefault(asked.name, Package(asked.name, bounds, extra, installed, fits))
    return sorted(found.values(), key=lambda one: (bool(one.extra), one.extra, one.name))


def doctor() -> None:
    """What this machine has: versions, devices, memory, models, what draws pictures; and what is wrong."""
    say(f"fvlens {importlib.metadata.version('fvlens')}, Python {platform.python_version()}, {platform.platform()}")
    asked = packages()
    table = Table(Column("package", no_wrap=True), "installed", "asked for", "extra", "", box=None)
    for one in asked:
        state = "" if one.fits else "WRONG" if one.wrong else "not installed"
        table.add_row(one.name, one.installed, one.asked, one.extra, state)
    out.print(table)
    for name, text in [*_machine(), *_models(), *_hub(), *_pictures()]:
        say(f"{name}: {text}")
    wrong = [one for one in asked if one.wrong]
    for one in wrong:
        state = one.installed or "is not installed"
        say(f"WRONG: {one.name} {state}; expected {one.asked}: pip install '{one.name}{one.asked}'")
    if wrong:
        raise typer.Exit(1)
    say("Nothing is wrong. What is not installed belongs to an extra: pip install 'fvlens[EXTRA]'.")


def _gib(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.1f} GiB"


def _machine() -> list[tuple[str, str]]:
    """Devices, with their free memory."""
    cpu = torch.device("cpu")
    lines = [("cpu", f"{torch.get_num_threads()} threads, {_gib(free_memory(cpu))} of memory free")]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        free = _gib(free_memory(device))
        lines.append((str(device), f"{torch.cuda.get_device_name(device)}, {free} of memory free"))
    if torch.backends.mps.is_available():
        lines.append(("mps", "there"))
    return lines


def _models() -> list[tuple[str, str]]:
    """Which of the models that need no network are here."""
    lines = [("model " + name, "here, in fvlens itself") for name in EMBEDDED_MODELS]
    for name, model in PACKAGED_MODELS.items():
        try:
            packaged_file(name)
        except ValueError as error:
            lines.append((f"model {name}", str(error).removeprefix("load_model: ")))
        else:
            lines.append((f"model {name}", f"here, in {model.package} {model.version}"))
    return lines


def _hub() -> list[tuple[str, str]]:
    """The models of the Hugging Face hub that are kept here, and whether others are asked for."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = [name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    reach = f"not asked, by {' and '.join(offline)}" if offline else "asked for models that are not here"
    folder = Path(constants.HF_HUB_CACHE)
    try:
        kept = sorted(repo.repo_id for repo in scan_cache_dir(folder).repos if repo.repo_type == "model")
    except CacheNotFound:
        kept = []
    shown = ", ".join(kept) if kept else "no models"
    return [("hub", reach), ("hub models kept here", f"{shown} (in {folder})")]


def _pictures() -> list[tuple[str, str]]:
    from fvlens.plots import missing_for_pictures

    missing = missing_for_pictures()
    if missing is None:
        return [("pictures", "PNG, SVG and PDF can be drawn")]
    return [("pictures", f"only .html pages, as {missing} is missing: pip install 'fvlens[figures]' and a Chromium")]
