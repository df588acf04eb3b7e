"""How much goes through a model at once: estimates in bytes, slices that fit them, and what to do when they do not.

One estimate serves everything that runs prompts. It counts what is alive at the worst moment: copies of weights that a
pass makes, what is kept of a prompt, one block's activations (the larger of attention and MLP), the keys and values
that patched copies need, and logits. Its factors are measured on the allocations of both classes of model.
"""

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from fvlens.models import free_memory
from fvlens.suffix._layout import WEIGHT_SLICE, is_laid_out
from fvlens.suffix._routes import Route
from fvlens.types import is_bridge

_T = TypeVar("_T")

Weights = Literal["copied", "laid out at each call"]
"""How the engine holds a model's weights: in a second copy, or where that does not fit the memory, without one."""

_MOST_ROWS = 128
"""Rows of an automatic batch at most: more is no faster (see tests/benchmarks/test_cost.py)."""
_WIDEST = 32 * 1024 * 1024
"""Bytes of a block's widest activation in an automatic batch of plain passes, on a CPU: wider ones leave its caches and
are taken from the system anew at each operation."""
_MOST_LOGITS = 16 * 1024 * 1024
"""Numbers in one slice of logits at most."""


# --- the estimate ---


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a model's activations take.

    Attributes:
        size: bytes of a number.
        n_layers, n_heads, n_kv_heads, d_head, d_model, d_mlp, d_vocab: the model's shape.
        bridge: the model is a ``TransformerBridge``.
        holds_patterns: every layer holds on to its attention pattern, as a bridge's joint attention does.
        unembeds_all: a pass cannot be told to unembed its last positions only.
        gated: the MLP has a gate.
    """

    size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    bridge: bool
    holds_patterns: bool
    unembeds_all: bool
    gated: bool

    @classmethod
    def of(cls, model: Any) -> "Estimate":
        """The estimate for a model."""
        cfg, bridge = model.cfg, is_bridge(model)
        unembeds_all = False
        if bridge:
            from fvlens.suffix._bridge import accepts_logits_to_keep

            unembeds_all = not accepts_logits_to_keep(model)
        attn_only = bool(getattr(cfg, "attn_only", False))
        return cls(
            size=cfg.dtype.itemsize,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_head=cfg.d_head,
            d_model=cfg.d_model,
            d_mlp=0 if attn_only else cfg.d_mlp or 4 * cfg.d_model,
            d_vocab=cfg.d_vocab,
            bridge=bridge,
            holds_patterns=bridge and hasattr(getattr(model.blocks[0], "attn", None), "_pattern"),
            unembeds_all=unembeds_all,
            gated=bool(getattr(cfg, "gated_mlp", False)),
        )

    @property
    def weights(self) -> int:
        """Copies of weights that a pass makes in a block: HookedTransformer spreads out grouped heads, a bridge splits
        a joint projection of queries, keys and values.
        """
        copies = 3 if self.bridge else 4 if self.n_kv_heads < self.n_heads else 1
        return copies * self.size * self.d_model * self.n_heads * self.d_head

    @property
    def one_weight(self) -> int:
        """The largest weight that the engine lays out when it comes to it, where no copy is kept: queries, keys and
        values together, or gate and input of a gated MLP. Others are multiplied with as they are.
        """
        together = self.d_head * (self.n_heads + 2 * self.n_kv_heads)
        return self.size * self.d_model * max(together, 2 * self.d_mlp if self.gated else 0)

    @property
    def unembedding(self) -> int:
        """What unembedding takes besides its logits: the slice in single precision of a model in half precision."""
        return 0 if self.size >= 4 else 4 * min(WEIGHT_SLICE, self.d_model * self.d_vocab)

    @property
    def copy(self) -> int:
        """A second copy of the weights, laid out for the engine; of a model in half precision without unembedding."""
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + (3 if self.gated else 2) * self.d_model * self.d_mlp
        unembedding = self.d_model * self.d_vocab if self.size >= 4 else 0
        return self.size * (self.n_layers * block + unembedding)

    def copied(self, compute: torch.dtype | None) -> int:
        """The same with products in another precision."""
        return self.copy if compute is None else self.copy * compute.itemsize // self.size

    @property
    def logits(self) -> int:
        """One row of logits, in single precision too, and what its normalisation takes."""
        return (self.size + 8) * self.d_vocab

    def activations(self, n_tokens: int, n_keys: int, *, path: Route = "kv", held_blocks: int = 0) -> int:
        """What is alive in one block for tokens that attend to so many keys each; with gradients, in all blocks held.

        The engine over the weights still holds its heads while it runs the MLP.
        """
        scores = 17 * self.n_heads * n_keys  # four copies in single precision, one mask
        attention = self.size * 8 * max(self.d_model, self.n_heads * self.d_head) + scores
        if path == "weights":
            width = max(self.d_model, self.n_heads * self.d_head)
            mlp = self.size * ((4 if self.gated else 3) * self.d_mlp + 10 * width)
        else:
            mlp = self.size * (4 * self.d_mlp + 6 * self.d_model)
        held = self.n_layers * self.size * self.n_heads * n_keys if self.holds_patterns else 0
        block = held_blocks * (attention + mlp) if held_blocks else max(attention, mlp)
        return n_tokens * (block + held)

    def cache(self, n_tokens: int) -> int:
        """Keys and values of all layers."""
        return 2 * self.size * n_tokens * self.n_layers * self.n_kv_heads * self.d_head

    def forward(self, n_pos: int, *, n_read: int, keep: bool) -> int:
        """A prompt that runs once, ``n_read`` of its positions unembedded, its keys and values kept or not."""
        kept = self.cache(n_pos) if keep else 0
        return self.activations(n_pos, n_pos) + kept + self.logits * (n_pos if self.unembeds_all else n_read)

    def kept(self, n_pos: int, n_suffix: int, *, from_layer: int = 0, keep_z: bool = True) -> int:
        """What remains of a prompt's run: keys, values, residual streams and heads' outputs, from a layer on."""
        width = self.d_model + (self.n_heads * self.d_head if keep_z else 0)
        share = (self.n_layers - from_layer) / self.n_layers
        return int(share * (self.cache(n_pos) + n_suffix * self.size * self.n_layers * width)) + 1

    def steps(self, n_pos: int, n_suffix: int, from_layer: int) -> int:
        """What remains of it for steps that start at one layer: keys and values from there on, two residual streams."""
        return (
            self.cache(n_pos) * (self.n_layers - from_layer) // self.n_layers + 2 * n_suffix * self.size * self.d_model
        )

    def prefix(self, n_pos: int, n_suffix: int, path: Route, *, from_layer: int = 0, keep_z: bool = True) -> int:
        """A prompt's run, with what is kept of it; on the kv path that is copied out of the run's cache."""
        kept = self.kept(n_pos, n_suffix, from_layer=from_layer, keep_z=keep_z)
        if path == "weights":
            return self.activations(n_pos, n_pos, path=path) + kept
        running = self.forward(n_pos, n_read=1 if self.bridge else 0, keep=True)
        return max(running + kept - self.cache(n_pos), self.cache(n_pos) + kept)

    def variant(self, n_pos: int, n_suffix: int, path: Route, *, gradients: bool = False, from_layer: int = 0) -> int:
        """A patched copy on its way through a block, and on the kv path its copies of the prefix; with gradients, what
        stays of all blocks from a layer on.
        """
        above = max(1, self.n_layers - from_layer) if gradients else 0
        needed = self.activations(n_suffix, n_pos, path=path, held_blocks=above) + (self.logits if gradients else 0)
        if path == "kv":
            width = (3 * self.n_heads + 2 * self.n_kv_heads) * max(1, above)
            needed += self.size * n_pos * width * self.d_head
        return needed

    def result(self, n_suffix: int) -> int:
        """A patched copy's residual stream after the last layer, twice while they are joined."""
        return 2 * n_suffix * self.size * self.d_model


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
        return _slices(n, self.prompts)

    def over_variants(self, n: int) -> Iterator[slice]:
        """Slices that cover ``n`` variants."""
        return _slices(n, self.variants)


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


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
        logits = min(rest // estimate.logits, _MOST_LOGITS // estimate.d_vocab, prompts * variants * n_suffix)
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


# --- when memory runs out all the same ---

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def halving(work: Callable[[slice, int], _T], slices: Iterable[slice], *, variants: int = 1, what: str) -> Iterator[_T]:
    """Results of ``work`` for slices of prompts; smaller slices from where memory runs out.

    First the number of prompts is halved, then the number of variants. What did not fit is done again from its start,
    so ``work`` must leave nothing behind that counts unless it returns. On Linux the CPU's memory seldom runs out by an
    error (the kernel ends the process instead): there, what helps is the plan.

    Args:
        work: called with a slice of prompts and the number of variants that may go through together.
        slices: slices of prompts, one behind the other.
        variants: patched copies of each prompt that go through together.
        what: the function that the user called, for messages.

    Raises:
        MemoryError: a single prompt with a single variant is too much.
    """
    waiting = deque(slices)
    most: int | None = None
    while waiting:
        rows = waiting.popleft()
        n = rows.stop - rows.start
        if most is not None and n > most:
            waiting.appendleft(slice(rows.start + most, rows.stop))
            rows, n = slice(rows.start, rows.start + most), most
        try:
            result = work(rows, variants)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if n == 1 and variants == 1:
                raise MemoryError(
                    f"{what}: out of memory with a single prompt; use shorter prompts (fewer demonstrations), a "
                    "smaller dtype, or a device with more memory."
                ) from error
        else:
            yield result
            continue
        # only here, behind the except clause, nothing holds what the failed attempt had made
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        waiting.appendleft(rows)
        if n > 1:
            most = n // 2
            text = f"{n} prompts together; going on with {most}"
        else:
            text = f"{variants} edited copies of a prompt together; going on with {variants // 2}"
            variants //= 2
        warnings.warn(f"{what}: out of memory with {text}.", stacklevel=2)


def in_batches(work: Callable[[slice], _T], n: int, size: int, *, what: str) -> Iterator[_T]:
    """:func:`halving` over ``n`` prompts in batches of ``size``."""
    return halving(lambda rows, _: work(rows), _slices(n, size), what=what)
