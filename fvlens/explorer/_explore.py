"""``fvlens.explore``: the explorer in a notebook."""

import importlib.util
from pathlib import Path
from typing import Any

from fvlens.arguments import check_arguments
from fvlens.explorer._session import Session, Settings
from fvlens.relations import Pairs


def require_widgets() -> None:
    """Refuse to begin without the packages of the extra ``notebooks``.

    Raises:
        ValueError: one of them is missing.
    """
    missing = [name for name in ("ipywidgets", "anywidget") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the explorer needs {' and '.join(missing)}; install the extra: pip install 'fvlens[notebooks]'."
        )


def explore(
    model: Any,
    relation: Pairs | None = None,
    *,
    settings: Settings | None = None,
    folder: str | Path = ".",
) -> Any:
    """Heads, vectors and what they do, by hand: a map of heads to click on, sliders, and any prompt.

    Shows ``softmax(logits(x))`` of the next token without and with ``scale * sum of the chosen heads' mean z @ W_O``
    added after the chosen layer at the prompt's last token. Needs the extra ``notebooks``, and a notebook that shows
    widgets.

    Args:
        model: the model.
        relation: pairs to begin with, in any shape: the name of a library relation, a file, a list of pairs; by default
            they are chosen in the explorer.
        settings: how heads are found: :class:`fvlens.explorer.Settings`, with the defaults of
            :func:`fvlens.find_vector`.
        folder: vectors and states are saved into this folder and loaded from it, and nowhere else.

    Returns:
        The explorer, which a notebook shows when it is the last line of a cell. Its ``session`` does all this without
        widgets.

    Raises:
        ValueError: a package of the extra is missing; ``folder`` is no folder; pairs that cannot be read.

    Example:
        >>> import fvlens
        >>> from fvlens.explorer import Settings
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> small = Settings(n_prompts=8, n_corrupted=2)
        >>> explorer = fvlens.explore(model, "antonym", settings=small)
        >>> len(explorer.session.heads)
        10
    """
    check_arguments(explore, locals(), runs=True)
    require_widgets()
    from fvlens.explorer._view import Explorer

    return Explorer(Session(model, relation, settings=settings, folder=folder))
