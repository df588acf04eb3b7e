"""How much goes through a model at once: what memory there is, and the slices of prompts and variants that fit it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fvlens.models import free_memory
from fvlens.suffix._estimate import Estimate
from fvlens.suffix._halving import slices_of
from fvlens.suffix._layout import is_laid_out
from fvlens.suffix._routes import Route

Weights = Literal["copied", "laid out at each call"]
"""How the engine holds a model's weights: in a second copy, or where that does not fit the memory, without one."""

_MOST_ROWS = 128
"""Rows of an automatic batch at most: more is no faster (see tests/benchmarks/test_cost.py)."""
_WIDEST = 32 * 1024 * 1024
"""Bytes of a block's widest activation in an automatic batch of plain passes, on a CPU: wider ones leave its caches and
are taken from the system anew at each operation."""
MOST_LOGITS = 16 * 1024 * 1024
"""Numbers in one slice of logits at most."""

_CEILING = {"cuda": 8 * 1024**3}
_USUAL_CEILING = 1024**3
"""Bytes for activations where the user names none: of a GPU, and of anything else."""


def bound(model: Any, max_memory: int | None = None) -> int:
    """Bytes that activations may take.

    By default 1 GiB on a CPU and 8 GiB on a GPU, so that the size of a batch, and with it the rounding, follows from
    the model and the prompts alone; a quarter of what is free where that is less (of a model that is split, on the
    fullest of its devices).
    """
    if max_memory is not None:
        return max_memory
    found = []
    for device in _devices(model):
        free = free_memory(device)
        found.append(_usual(device) if free is None else min(free // 4, _usual(device)))
    return min(found)


def _usual(device: torch.device) -> int:
    return _CEILING.get(device.type, _USUAL_CEILING)


def _devices(model: Any) -> set[torch.device]:
    devices = {parameter.device for parameter in model.parameters()}
    assert devices, "a model without parameters"
    return devices


def _planned(model: Any, max_memory: int | None, plan: Callable[[int], tuple[int, ...]], warn: bool) -> tuple[int, ...]:
    """What a plan gives under the bound; with a warning, if that is less than with enough memory free."""
    available = bound(model, max_memory)
    found = plan(available)
    usual = min(map(_usual, _devices(model)))
    if max_memory is not None or available >= usual or not warn:
        return found
    wide = plan(usual)
    for own, more, what in zip(found, wide, ("prompts", "edited copies of a prompt"), strict=False):
        if own != more:
            warnings.warn(
                f"little memory is free: activations may take {available / 2**20:.0f} MiB instead of "
                f"{usual / 2**20:.0f}, so {own} {what} run together instead of {more}, which can move the rounding; "
                "the result records it.",
                stacklevel=4,
            )
            break
    return found


def copy_fits(model: Any, max_memory: int | None = None, *, compute: torch.dtype | None = None) -> bool:
    """Whether the weights may be laid out in a second copy: it is there already, or there is room for it.

    Within a bound that was given, it may take half; otherwise it must fit what is free beside the activations.
    """
    if is_laid_out(model, compute):
        return True
    size = Estimate.of(model).copied(compute)
    if max_memory is not None:
        return size <= max_memory // 2
    device = next(iter(model.parameters())).device
    free = free_memory(device)
    return free is None or size + _usual(device) <= free


# --- slices ---


@dataclass(frozen=True, slots=True)
class Slices:
    """How work is cut to stay inside a memory bound.

    Attributes:
        prompts: prompts that go through together.
        variants: patched copies of each that go through together.
        logits: rows that are unembedded together.
        copied: the weights are laid out in a second copy (``"weights"`` only).
    """

    prompts: int
    variants: int
    logits: int = 1
    copied: bool = True

    @property
    def weights(self) -> Weights:
        """How the weights are held, as results of the ``"weights"`` path say it."""
        return "copied" if self.copied else "laid out at each call"

    def over_prompts(self, n: int) -> Iterator[slice]:
        """Slices that cover ``n`` prompts."""
        return slices_of(n, self.prompts)

    def over_variants(self, n: int) -> Iterator[slice]:
        """Slices that cover ``n`` variants."""
        return slices_of(n, self.variants)


def plan_slices(
    model: Any,
    *,
    n_pos: int,
    n_suffix: int,
    n_variants: int,
    path: Route,
    max_memory: int | None,
    gradients: bool = False,
    from_layer: int = 0,
    keep_z: bool = True,
    compute: torch.dtype | None = None,
    n_prompts: int | None = None,
    shares: int = 1,
    warn: bool = True,
) -> Slices:
    """How many prompts and variants go through together.

    By default this follows from the model and the prompts; where so little memory is free that it must be less, a
    warning says so.

    Args:
        model: the model.
        n_pos, n_suffix: positions of a prompt, and of its suffix.
        n_variants: copies of a prompt that are edited.
        path: the path taken.
        max_memory: bytes for activations, and for the second copy of the weights where this call would make it; by
            default 1 GiB for activations on a CPU and 8 GiB on a GPU, or a quarter of what is free if that is less.
        gradients: the variants run with gradients, all of them through the same blocks.
        from_layer, keep_z, compute: what is kept of a prompt, and the precision of products, as of
            :func:`run_prefix`.
        n_prompts: prompts that there are; by default any number.
        shares: into so many equal parts ``max_memory`` is divided, of which this is one.
        warn: say where free memory makes slices smaller.

    Raises:
        ValueError: ``max_memory`` is too small for a single prompt with a single variant.
    """
    estimate = Estimate.of(model)
    whole = max_memory
    max_memory = None if whole is None else whole // shares
    copied = path == "weights" and copy_fits(model, max_memory, compute=compute)
    taken = estimate.copied(compute) if copied and max_memory is not None and not is_laid_out(model, compute) else 0
    # what lays out its weights once copies none on the way, the other paths copy those of one block at a time
    weights = 0 if copied else estimate.one_weight if path == "weights" else estimate.weights
    unembedding = estimate.unembedding
    kept = estimate.kept(n_pos, n_suffix, from_layer=from_layer, keep_z=keep_z)
    prefix = estimate.prefix(n_pos, n_suffix, path, from_layer=from_layer, keep_z=keep_z)
    variant = estimate.variant(n_pos, n_suffix, path, gradients=gradients, from_layer=from_layer)
    result = estimate.result(n_suffix)

    def need(prompts: int, variants: int) -> int:
        alive = prompts * (kept + variants * result)
        return max(
            weights + prompts * prefix,
            weights + alive + prompts * variants * variant,
            unembedding + alive + estimate.logits,
        )

    def plan(available: int) -> tuple[int, int, int]:
        available -= taken
        least = need(1, 1)
        if least > available:
            raise ValueError(
                _too_small(
                    available if whole is None else whole - shares * taken,
                    n_pos,
                    " with one edited copy",
                    shares * least,
                )
            )
        variants = _largest(n_variants, lambda n: need(1, n) <= available)
        prompts = 1
        if variants == n_variants:
            most = available // kept if n_prompts is None else min(n_prompts, available // kept)
            prompts = _largest(most, lambda n: need(n, variants) <= available)
        rest = available - unembedding - prompts * (kept + variants * result)
        logits = min(rest // estimate.logits, MOST_LOGITS // estimate.d_vocab, prompts * variants * n_suffix)
        return prompts, variants, max(1, logits)

    prompts, variants, logits = _planned(model, max_memory, plan, warn)
    return Slices(prompts=prompts, variants=variants, logits=logits, copied=copied)


def _too_small(available: int, n_pos: int, what: str, least: int) -> str:
    return (
        f"max_memory={available} bytes is too small: one prompt of {n_pos} tokens{what} needs about {least} bytes; "
        "give more memory or shorter prompts."
    )


def room_for_kept(model: Any) -> int:
    """Bytes that may be kept of prompts between runs where no bound is given: a third of what is free.

    It changes how often prompts run again and the order of rows in products, so numbers move by rounding alone.
    """
    free = [free_memory(device) for device in _devices(model)]
    known = [own // 3 for own in free if own is not None]
    return min(known, default=_CEILING["cuda"])


def portions(costs: Sequence[int], most: int) -> list[slice]:
    """Slices of consecutive items that cost ``most`` at most together, an item that costs more by itself."""
    found, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        if total + cost > most and i > start:
            found.append(slice(start, i))
            start, total = i, 0
        total += cost
    return [*found, slice(start, len(costs))] if costs else []


def power_above(n: int) -> int:
    """The smallest power of 2 that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits; 1 fits, and so does whatever is below one that does."""
    low, high = 1, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def plan_batch(
    model: Any,
    *,
    n_pos: int,
    n_read: int = 1,
    keep: bool = False,
    max_memory: int | None = None,
    n_prompts: int | None = None,
) -> int:
    """How many prompts run together in plain forward passes: a power of 2; as by :func:`plan_slices`.

    Args:
        model: the model.
        n_pos: positions of a prompt, with whatever follows it.
        n_read: positions whose logits are read.
        keep: keys and values are kept.
        max_memory: bytes for activations; by default as by :func:`plan_slices`.
        n_prompts: prompts that there are; by default any number.

    Raises:
        ValueError: ``max_memory`` was given and is too small for a single prompt.
    """
    estimate = Estimate.of(model)
    fixed = max(estimate.weights, estimate.unembedding)
    row = estimate.forward(n_pos, n_read=n_read, keep=keep)
    if max_memory is not None and fixed + row > max_memory:
        raise ValueError(_too_small(max_memory, n_pos, "", fixed + row))

    most = _MOST_ROWS
    if all(device.type == "cpu" for device in _devices(model)):
        widest = estimate.size * max(estimate.d_model, (2 if estimate.gated else 1) * estimate.d_mlp)
        most = min(most, max(1, _WIDEST // (widest * n_pos)))

    def plan(available: int) -> tuple[int]:
        rows = max(1, min(most, (available - fixed) // row))
        power = 1 << (rows.bit_length() - 1)
        return (power if n_prompts is None else min(power, n_prompts),)

    (rows,) = _planned(model, max_memory, plan, warn=True)
    return rows
