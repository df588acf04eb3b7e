"""Filling a cache: what goes to memory, what goes to the disk, and the run over the prompts."""

import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from fvlens.activations._cache import ActivationCache
from fvlens.activations._file import FORMAT, WHAT, save
from fvlens.activations._positions import Positions, find_places
from fvlens.activations._run import See, batches_within, watch
from fvlens.activations._sites import SITES, as_layers, as_sites, axis_sizes, check_sites, hook_of
from fvlens.activations._store import Store, memory_bound
from fvlens.arguments import check_arguments
from fvlens.files import TensorFile
from fvlens.models import fingerprint
from fvlens.prompts import Prompts
from fvlens.suffix import plan_batch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def activation_cache(
    model: Any,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] = ("z", "resid_post"),
    layers: Sequence[int] | int | None = None,
    positions: Positions | slice | Sequence[int] | int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ActivationCache:
    """What a model computes on prompts, at some sites of its blocks.

    The numbers are those of TransformerLens' ``run_with_cache``, with the prompts' attention mask. They stay in memory
    if they take at most half of ``max_memory``; else they go to files, slice by slice of the prompts, and are read from
    there when they are asked for.

    Args:
        model: the model.
        prompts: the prompts.
        sites: some of ``"z"`` (each head's mixed value), ``"q"``, ``"k"``, ``"v"``, ``"pattern"``, ``"attn_out"``,
            ``"mlp_out"``, ``"resid_pre"``, ``"resid_mid"``, ``"resid_post"``.
        layers: the layers; by default all.
        positions: the tokens: None for all, ``"last"``, a token class such as ``"demonstration_label"``, or indices
            counted from the right (``-1``, ``[-2, -1]``, ``slice(-4, None)``). Of a pattern, the queries; its keys are
            always all tokens.
        dtype: precision of the numbers; by default float32.
        batch_size: prompts run together; by default chosen from what memory is free. It changes nothing but speed,
            memory and rounding, and is halved, with a warning, where memory runs out.
        max_memory: bytes, half of them for the numbers and half for running the model; by default half of what is free,
            at most 2 GiB, and for running what is usual elsewhere.
        folder: an existing folder for the files, which stay there; each is a cache of its own, for
            ``ActivationCache.load``. By default a temporary folder that goes with the cache.
        progress: show a progress bar.

    Returns:
        :class:`ActivationCache`, its numbers on the CPU.

    Raises:
        ValueError: a site, layer or position that there is not; a site that the model does not have, with the reason;
            an unsuitable dtype; ``batch_size`` below 1; ``max_memory`` too small for one prompt; a folder that does not
            exist, or a disk without the space.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> cache = fvlens.activation_cache(model, prompts, sites=("z", "pattern"), layers=[2], progress=False)
        >>> cache.axes("z")
        ('layer', 'prompt', 'pos', 'head', 'd_head')
        >>> cache["pattern", 2].shape == (4, model.cfg.n_heads, *2 * prompts.tokens.shape[1:])
        True
    """
    check_arguments(activation_cache, locals(), runs=True)
    names = as_sites(sites)
    chosen = as_layers(layers, range(model.cfg.n_layers))
    check_sites(model, names, chosen)
    precision = torch.float32 if dtype is None else dtype
    if precision not in _DTYPES:
        raise ValueError(f"activation_cache: dtype={dtype}; expected one of {', '.join(map(str, _DTYPES))}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"activation_cache: expected batch_size >= 1, got {batch_size}.")
    home = None if folder is None else Path(folder)
    if home is not None and not home.is_dir():
        raise ValueError(f"activation_cache: folder {home} does not exist; create it first.")
    places = find_places(prompts, positions)
    n, n_pos = prompts.tokens.shape
    sizes = axis_sizes(model.cfg, n_places=places.columns.shape[1], n_pos=n_pos)
    shapes = {site: tuple(sizes[axis] for axis in SITES[site].axes) for site in names}

    # memory: slices of prompts whose numbers take half of the bound at most
    bound = memory_bound(max_memory)
    one = precision.itemsize * len(chosen) * sum(torch.Size(shape).numel() for shape in shapes.values())
    if one > bound // 2:
        raise ValueError(
            f"activation_cache: max_memory={bound} bytes is too small: the activations of one prompt take {one}, and "
            "half of it is for them; ask for fewer sites, layers or positions, or give more memory."
        )
    part = min(n, bound // 2 // one)
    for_running = None if max_memory is None else bound - part * one
    size = batch_size or plan_batch(model, n_pos=n_pos, max_memory=for_running, n_prompts=n)

    def cache_of(store: Store, rows: Sequence[int], bound: int) -> ActivationCache:
        index = list(rows)
        return ActivationCache(
            sites=names,
            layers=chosen,
            positions=places.name,
            prompts=prompts if len(index) == n else prompts.select(index),
            columns=places.columns[index],
            mask=places.mask[index],
            fingerprint=fingerprint(model),
            words=words,
            max_memory=bound,
            store=store,
            rows=tuple(range(len(index))),
            part=None if len(index) == n else (index[0], n),
        )

    words = _words(model, prompts)
    gatherer = _Gatherer(names, chosen, shapes, precision, places.columns, places.mask)
    parts: list[tuple[int, dict[str, Tensor] | TensorFile]] = []
    made: list[Path] = []
    temporary: Path | None = None
    if part < n and home is None:
        temporary = home = Path(tempfile.mkdtemp(prefix="fvlens-activations-"))
    name = f"activations-{prompts.data_hash}-{secrets.token_hex(4)}"

    def finished(rows: slice) -> None:
        """After each batch; after the last one of a slice, its numbers go where they belong."""
        gatherer.check_all_seen()
        if rows.stop % part and rows.stop < n:
            return
        first, numbers = gatherer.take()
        n_rows = rows.stop - first
        if part == n:
            parts.append((n_rows, numbers))
            return
        assert home is not None
        path = home / f"{name}-{len(parts):05d}.safetensors"
        made.append(path)
        save(cache_of(Store(chosen, shapes, precision, [(n_rows, numbers)]), range(first, rows.stop), bound), path)
        parts.append((n_rows, TensorFile.open(path, FORMAT, WHAT)))
        del numbers  # else two slices would be held while the next is filled
        if rows.stop < n:
            gatherer.begin(rows.stop, min(part, n - rows.stop))

    try:
        if home is not None and part < n and shutil.disk_usage(home).free < n * one:
            raise ValueError(
                f"activation_cache: the activations take {n * one} bytes, but {home} has "
                f"{shutil.disk_usage(home).free} free; give another folder, or ask for less."
            )
        gatherer.begin(0, part)
        batches = batches_within(n, min(size, part), part)
        watch(model, prompts, gatherer.seers(), batches, finished, what="activation_cache", progress=progress)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return cache_of(Store(chosen, shapes, precision, parts, temporary), range(n), bound)


def _words(model: Any, prompts: Prompts) -> dict[int, str]:
    """Text of each token that occurs."""
    if model.tokenizer is None:
        return {}
    return {token: model.tokenizer.decode([token]) for token in prompts.tokens.unique().tolist()}


class _Gatherer:
    """Copies activations of batches into the tensors of the slice that is being filled."""

    def __init__(
        self,
        sites: Sequence[str],
        layers: Sequence[int],
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        columns: Int[Tensor, "prompt pos"],
        mask: Bool[Tensor, "prompt pos"],
    ) -> None:
        self.sites, self.layers, self.shapes, self.dtype = sites, layers, shapes, dtype
        self.columns, self.mask = columns, mask
        self.first = 0
        self.numbers: dict[str, Tensor] = {}
        self.unseen = {(site, layer) for site in sites for layer in layers}

    def begin(self, first: int, n: int) -> None:
        """Make room for a slice of prompts."""
        self.first = first
        self.numbers = {
            site: torch.empty(len(self.layers), n, *shape, dtype=self.dtype) for site, shape in self.shapes.items()
        }

    def take(self) -> tuple[int, dict[str, Shaped[Tensor, "layer prompt ..."]]]:
        """First prompt and numbers of the slice that is full, which are no longer held here."""
        numbers, self.numbers = self.numbers, {}
        return self.first, numbers

    def seers(self) -> dict[str, See]:
        return {hook_of(site, layer): self._see(site, i) for site in self.sites for i, layer in enumerate(self.layers)}

    def check_all_seen(self) -> None:
        if self.unseen:
            site, layer = min(self.unseen)
            raise ValueError(
                f"site {site!r}: {hook_of(site, layer)} never ran on these prompts, so that this model has no such "
                "activation."
            )

    def _see(self, site: str, index: int) -> See:
        kind, shape, layer = SITES[site], self.shapes[site], self.layers[index]

        def see(activation: Tensor, rows: slice) -> None:
            self.unseen.discard((site, layer))
            picked = _picked(activation, kind.pos_axis, self.columns[rows], site)
            if tuple(picked.shape[1:]) != shape:
                raise ValueError(
                    f"site {site!r}: {hook_of(site, layer)} gives {list(picked.shape[1:])} a prompt; expected "
                    f"{', '.join(kind.axes)} = {list(shape)}."
                )
            target = self.numbers[site][index, rows.start - self.first : rows.stop - self.first]
            target.copy_(picked)
            real = self.mask[rows]
            if not bool(real.all()):
                over = [1] * target.ndim
                over[0], over[1 + kind.pos_axis] = real.shape
                target.masked_fill_(~real.reshape(over), 0.0)

        return see


def _picked(
    activation: Float[Tensor, " batch *axes"], axis: int, columns: Int[Tensor, "batch pos"], site: str
) -> Float[Tensor, " batch *kept"]:
    """The kept tokens along an axis behind the first one, each prompt its own."""
    if activation.ndim <= 1 + axis or activation.shape[0] != columns.shape[0]:
        raise ValueError(f"site {site!r}: unexpected activation of shape {list(activation.shape)}.")
    n_pos = activation.shape[1 + axis]
    if columns.shape[1] == n_pos and bool((columns == torch.arange(n_pos)).all()):
        return activation
    rows = torch.arange(len(columns), device=activation.device)[:, None]
    kept = activation.movedim(1 + axis, 1)[rows, columns.to(activation.device)]
    return kept.movedim(1, 1 + axis)
