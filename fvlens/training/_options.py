"""The keywords that everything trainable takes, once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, TypedDict

import torch

from fvlens.prompts import Template, template_for, template_or
from fvlens.suffix import Route
from fvlens.training._settings import Anchor, Loss, Schedule, Settings
from fvlens.training._state import TrainingState


@dataclass(frozen=True, slots=True)
class Execution:
    """How a training runs, none of which changes its numbers beyond rounding, but for ``compute``.

    Attributes:
        path: insist on ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest exact one.
        max_memory: bytes for activations; by default chosen from what is free.
        compute: precision of products of the frozen model, such as ``torch.bfloat16`` for a float32 one, whose residual
            stream and sums stay float32; by default the model's own.
        resume: a state, or a file of one, to go on from; all settings must be those it was saved under.
        checkpoint: write the state to this file after every epoch.
        check: ask what the training starts from whether it was made on this model.
        progress: show a progress bar. Interrupting gives the best so far, with a warning.
    """

    path: Route | None = None
    max_memory: int | None = None
    compute: torch.dtype | None = None
    resume: TrainingState | str | FilePath | None = None
    checkpoint: str | FilePath | None = None
    check: bool = True
    progress: bool = True


class ExecutionOptions(TypedDict, total=False):
    """Fields of :class:`Execution` that whatever is trained takes as keywords, for type checkers."""

    path: Route | None
    max_memory: int | None
    resume: TrainingState | str | FilePath | None
    checkpoint: str | FilePath | None
    progress: bool


class TrainingOptions(ExecutionOptions, total=False):
    """Fields of :class:`Settings` and :class:`Execution` as keywords, for type checkers."""

    loss: Loss
    l2: float
    anchor: Anchor
    lr: float | None
    epochs: int
    batch_size: int | None
    schedule: Schedule
    patience: int | None
    template: Template | str | None
    compute: torch.dtype | None
    check: bool


def settled(
    function: str,
    model: Any,
    settings: Settings | None,
    options: TrainingOptions,
    template: Template | str | None = None,
) -> tuple[Settings, Execution]:
    """Settings and ways to run from keywords.

    Args:
        function: whose keywords they are.
        model: the model, whose chat format the template ``"chat"`` is.
        settings: what the keywords are changes of; by default the defaults.
        options: the keywords.
        template: the one to fall back on where neither says one.

    Raises:
        TypeError: a keyword is none of them.
        ValueError: a setting is out of range; the template is ``"chat"``, and the model has no chat format.
    """
    given: dict[str, Any] = dict(options)
    running = {field.name: given.pop(field.name) for field in dataclasses.fields(Execution) if field.name in given}
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown!r}")
    if given.get("template") is None:
        given["template"] = template_or(template) if settings is None else settings.template
    given["template"] = template_for(model, given["template"])
    return dataclasses.replace(settings or Settings(), **given), Execution(**running)
