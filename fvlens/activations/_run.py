"""Running prompts to look at activations: the one loop that means and caches share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.models import model_device
from fvlens.progress import tqdm
from fvlens.prompts import Prompts
from fvlens.suffix import halving, watch_prompts

See = Callable[[Float[Tensor, "*axes"], slice], None]
"""Takes an activation of some prompts, and which prompts they are."""


def watch(
    model: Any,
    prompts: Prompts,
    seers: Mapping[str, See],
    batches: Iterable[slice],
    done: Callable[[slice], None],
    *,
    what: str,
    progress: bool,
) -> None:
    """Run prompts, and show the activations of each batch to functions, one a hook name.

    What a function keeps of a batch counts once ``done`` is called with it: where memory runs out, the batch is run
    again in halves.

    Args:
        model: the model.
        prompts: the prompts.
        seers: hook name -> function. It must not change the activation, nor keep it.
        batches: slices of the prompts, one behind the other.
        done: called after each batch that went through.
        what: the function that the user called, for messages.
        progress: show a progress bar.

    Raises:
        KeyError: the model has no hook of that name.
        MemoryError: out of memory with a single prompt.
    """
    device = model_device(model)
    now = slice(0, 0)

    def run(rows: slice, _: int) -> slice:
        nonlocal now
        now = rows
        tokens, attention_mask = prompts.tokens[rows].to(device), prompts.attention_mask[rows].to(device)
        with torch.inference_mode():
            watch_prompts(model, tokens, attention_mask, {name: shown(see) for name, see in seers.items()})
        return rows

    def shown(see: See) -> Callable[[Tensor], None]:
        return lambda activation: see(activation, now)

    with tqdm(total=len(prompts), desc=what, disable=not progress, leave=False) as bar:
        for rows in halving(run, batches, what=what):
            done(rows)
            bar.update(rows.stop - rows.start)


def batches_within(n: int, size: int, part: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``n`` prompts, none of which reaches over a multiple of ``part``."""
    for first in range(0, n, part):
        last = min(n, first + part)
        yield from (slice(start, min(last, start + size)) for start in range(first, last, size))
