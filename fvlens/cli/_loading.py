"""The model that a file was made on: loaded as the file says, unless an option says otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fvlens.cli._app import note
from fvlens.cli._options import Fields, made, option_name
from fvlens.models import Fingerprint, fingerprint, is_known, refuse_retrained
from fvlens.report import Loading

_OF_FILES = ("model", "dtype", "revision", "backend")
_NOTE = "A file of vectors or heads says it itself."
GivenLoading = Annotated[dict[str, Any], Fields(Loading, notes=dict.fromkeys(_OF_FILES, _NOTE))]
"""The options of :class:`fvlens.report.Loading` that stand on the line, of a command that reads a file."""


def recorded_loading(mark: Fingerprint, given: Mapping[str, Any]) -> Loading:
    """How to load the model of a file: options first, then what the file says.

    A model that is named on the line has revisions of its own, so the file's is left out. So is the backend
    ``"hooked"``: it is the default where it is there, and a bridge has the same weights where it is not.
    """
    said = {
        "model": mark.source or mark.name,
        "dtype": mark.dtype,
        "backend": "bridge" if mark.backend == "bridge" else None,
        "revision": None if "model" in given or mark.revision == "local" else mark.revision,
    }
    return made(Loading, {**said, **given})


def allowed_loading(name: str, mark: Fingerprint, given: Mapping[str, Any]) -> Loading:
    """How to load the model of a file of this name, if the file may choose it.

    Raises:
        ValueError: nobody on the line named the model, and it does not come with fvlens or by its hash.
    """
    loading = recorded_loading(mark, given)
    if "model" in given or is_known(loading.model):
        return loading
    if not loading.trust:
        raise ValueError(
            f"{name} names the model {loading.model!r}, and a file does not choose what is loaded; say --model "
            f"{loading.model} if you mean that one, or --trust to load what files name."
        )
    note(f"{name} names the model {loading.model}")
    return loading


def load_recorded(
    file: Path, mark: Fingerprint, given: Mapping[str, Any], *, check: bool | None = None
) -> tuple[Loading, Any]:
    """The model of a file, and how it was loaded.

    Args:
        file, mark, given: the file, what it was made on, and what stands on the line.
        check: whether another model is refused, or only said; None where the command has no option for that.

    Raises:
        ValueError: as for :func:`allowed_loading`; it cannot be loaded, or is not the model that the file was made on;
            with what to do.
    """
    loading = allowed_loading(file.name, mark, given)
    try:
        network = loading.load()
    except ValueError as error:
        if "model" in given:
            raise
        raise ValueError(
            f"{file.name} was made on model {mark.name!r}, which cannot be loaded as {loading.model!r} ({error}) "
            "Say with --model where it is."
        ) from error
    refuse_retrained(mark, fingerprint(network), file.name, again="the command that wrote it")
    differences = mark.differences(fingerprint(network))
    if differences and check is False:
        note(
            f"{file.name} was made on model {mark.name!r}, not on this one (file / model: {'; '.join(differences)}); "
            "it is used all the same."
        )
    elif differences:
        asked = [option_name(name) for name in _OF_FILES if name in given]
        remedy = (
            f"leave out {' and '.join(asked)}: the file says how its model is loaded"
            if asked
            else "the model has changed since, so make the file again, or say with --model where the old one is"
        )
        raise ValueError(
            f"{file.name} was made on model {mark.name!r}, not on this one (file / model: {'; '.join(differences)}); "
            f"{remedy}{', or use it all the same with --no-check' if check else ''}."
        )
    if "model" not in given and is_known(loading.model):
        note(f"{file.name} names the model {loading.model}")
    return loading, network
