"""``fvlens models``: what there is."""

from typing import Annotated

import typer

from fvlens.cli._app import say
from fvlens.models import EMBEDDED_MODELS, PACKAGED_MODELS, official_names


def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that contain this.")] = "",
) -> None:
    """Models that can be loaded by name."""
    here = EMBEDDED_MODELS | {name: f"{one.text}: {one.install}" for name, one in PACKAGED_MODELS.items()}
    for name, text in here.items():
        if filter.lower() in name.lower():
            say(f"{name}  ({text})")
    for name in official_names():
        if filter.lower() in name.lower():
            say(name)
