"""The activation cache: what a model computed on prompts, with a name for every axis."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.activations._means import HeadMeans
from fvlens.activations._positions import Positions, position_mask
from fvlens.activations._sites import SITES, as_layers, as_sites
from fvlens.activations._store import Store
from fvlens.models import Fingerprint, fingerprint, told_apart
from fvlens.prompts import Prompts
from fvlens.showing import Shown

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ActivationCache(Shown):
    """Activations of prompts, with their coordinates and where they come from.

    ``cache["z"]`` is ``[layer prompt pos head d_head]``, ``cache["z", 5]`` that of layer 5 without the first axis, and
    ``cache.axes("z")`` names the axes. Prompts are left-padded: index -1 of ``pos`` is the last kept token. Where
    :attr:`mask` is False (padding) the numbers are 0; means leave those places out.

    The numbers lie in memory, or above the bound of memory in files, from which only what is asked for is read.
    Iterating gives caches of consecutive prompts, each of which fits the bound.

    Attributes:
        sites: names of the sites.
        layers: the layers, in increasing order.
        positions: which tokens were kept: None for all, ``"last"``, a token class, or indices from the right.
        prompts: the prompts: tokens, mask, token classes, texts, relation, template, labels.
        columns: index into ``prompts.tokens`` of each kept token.
        mask: whether a kept token is one: False where a prompt is shorter, or has fewer tokens of the class.
        fingerprint: the model.
        words: text of each token id that occurs in the prompts; empty if the model had no tokenizer.
        max_memory: bytes that reading may take.
        store: the numbers.
        rows: which prompts of the store these are.
        part: of a file that holds a slice of the prompts that ran, the slice's first prompt and how many ran; else
            None.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: Positions | tuple[int, ...] | None
    prompts: Prompts
    columns: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    fingerprint: Fingerprint
    words: Mapping[int, str]
    max_memory: int
    store: Store
    rows: tuple[int, ...]
    part: tuple[int, int] | None = None

    # -- shape --------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def _line(self) -> str:
        shapes = ", ".join(f"{site} {list(self.shape(site))}" for site in self.sites)
        place = f"in {len(self.store.files)} files" if self.store.files else "in memory"
        whole = "" if self.part is None else f", from prompt {self.part[0]} on of {self.part[1]} that ran"
        return f"{shapes}, {self.dtype}, {self.n_bytes} bytes {place}, model {self.fingerprint.name!r}{whole}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("site", "axes", "shape"), *((s, " ".join(self.axes(s)), str(list(self.shape(s)))) for s in self.sites)]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the numbers."""
        return self.store.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of all numbers."""
        return self.dtype.itemsize * sum(math.prod(self.shape(site)) for site in self.sites)

    def axes(self, site: str) -> tuple[str, ...]:
        """Names of a site's axes.

        Raises:
            ValueError: the cache has no such site.
        """
        return ("layer", "prompt", *SITES[self._known(site)].axes)

    def shape(self, site: str) -> tuple[int, ...]:
        """Lengths of a site's axes.

        Raises:
            ValueError: the cache has no such site.
        """
        return (len(self.layers), len(self), *self.store.shapes[self._known(site)])

    def _known(self, site: str) -> str:
        if site not in self.sites:
            raise ValueError(f"the cache holds no site {site!r}; it holds {', '.join(self.sites)}.")
        return site

    def _known_layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"the cache holds no layer {layer!r}; it holds {list(self.layers)}.")
        return layer

    # -- reading ------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[str, int]) -> Float[Tensor, "*axes"]:
        """All numbers of a site, or those of one layer.

        Raises:
            ValueError: the cache has no such site or layer, or the numbers take more than :attr:`max_memory`.
        """
        site, layer = (key, None) if isinstance(key, str) else key
        shape = self.shape(site)
        layers = self.layers if layer is None else (self._known_layer(layer),)
        whole = self.store.whole(site)
        if whole is not None and self.rows == tuple(range(self.store.n_prompts)) and self.layers == self.store.layers:
            return whole if layer is None else whole[self.layers.index(layer)]
        needed = self.dtype.itemsize * len(layers) * math.prod(shape[1:])
        if needed > self.max_memory:
            raise ValueError(
                f"{site!r} takes {needed} bytes, above max_memory={self.max_memory}; read one layer, as "
                f"cache[{site!r}, {layers[0]}], select prompts, or iterate over the cache."
            )
        result = torch.empty(len(layers), *shape[1:], dtype=self.dtype)
        for i, one in enumerate(layers):
            self.store.read(site, one, self.rows, result[i])
        return result if layer is None else result[0]

    def blocks(self, site: str, layer: int) -> Iterator[tuple[slice, Float[Tensor, " row *axes"]]]:
        """The prompts of one layer in slices that take an eighth of :attr:`max_memory`, each with its numbers."""
        width = self.dtype.itemsize * self.store.numbers(self._known(site))
        size = max(1, self.max_memory // 8 // max(1, width))
        for start in range(0, len(self), size):
            rows = self.rows[start : start + size]
            out = torch.empty(len(rows), *self.store.shapes[site], dtype=self.dtype)
            self.store.read(site, self._known_layer(layer), rows, out)
            yield slice(start, start + len(rows)), out

    def __iter__(self) -> Iterator["ActivationCache"]:
        size = max(1, self.max_memory // 2 // max(1, self.n_bytes // len(self)))
        for start in range(0, len(self), size):
            yield self.select(prompts=range(start, min(len(self), start + size)))

    def select(
        self,
        *,
        prompts: Bool[Tensor, " prompt"] | Sequence[int] | slice | None = None,
        layers: Sequence[int] | int | None = None,
        sites: str | Sequence[str] | None = None,
    ) -> "ActivationCache":
        """Some prompts, layers and sites. Nothing is copied or read.

        Raises:
            ValueError: there is no such prompt, layer or site, or none is left.
        """
        names = self.sites if sites is None else as_sites(sites)
        for name in names:
            self._known(name)
        if prompts is None:
            index = range(len(self))
        elif isinstance(prompts, slice):
            index = range(len(self))[prompts]
        elif isinstance(prompts, Tensor):
            index = prompts.nonzero().flatten().tolist() if prompts.shape == (len(self),) else None
            if index is None:
                raise ValueError(f"select: expected {len(self)} flags, one a prompt, got {tuple(prompts.shape)}.")
        else:
            index = [int(i) for i in prompts]
        outside = [i for i in index if not -len(self) <= i < len(self)]
        if outside:
            raise ValueError(f"select: expected prompts in 0..{len(self) - 1}, got {outside}.")
        index = [i % len(self) for i in index]
        chosen = self.prompts.select(index)
        return dataclasses.replace(
            self,
            sites=names,
            layers=as_layers(layers, self.layers),
            prompts=chosen,
            columns=self.columns[index],
            mask=self.mask[index],
            rows=tuple(self.rows[i] for i in index),
            part=self.part if len(index) == len(self) else None,
        )

    def value(
        self, site: str, layer: int, head: int | None = None, *, prompt: int | None = None, position: int = -1
    ) -> Float[Tensor, "*axes"]:
        """What an activation is at one token: what patching puts in the place of another.

        Args:
            site: a site with a value a token, so not ``"pattern"``.
            layer: the layer.
            head: of a site with heads, one of them; by default all.
            prompt: index of a prompt; by default all.
            position: the token, counted from the right of the prompt: -1 is the last.

        Returns:
            ``[d_model]``, ``[d_head]`` for one head, or ``[head d_head]``; for all prompts with a ``prompt`` axis in
            front.

        Raises:
            ValueError: there is no such site, layer, head or prompt, or the token was not kept or is padding.
        """
        kind = SITES[self._known(site)]
        if kind.axes[0] != "pos":
            raise ValueError(f"value: {site!r} has no value at one token; its axes are {', '.join(self.axes(site))}.")
        if head is not None and (kind.head_axis is None or not 0 <= head < self.store.shapes[site][1]):
            what = "no heads" if kind.head_axis is None else f"heads 0..{self.store.shapes[site][1] - 1}"
            raise ValueError(f"value: {site!r} has {what}, got head={head}.")
        if prompt is not None and not 0 <= prompt < len(self):
            raise ValueError(f"value: expected a prompt in 0..{len(self) - 1}, got {prompt}.")
        index = range(len(self)) if prompt is None else range(prompt, prompt + 1)
        here = (self.columns == self.prompts.tokens.shape[1] + position) & self.mask
        missing = [i for i in index if not bool(here[i].any())]
        if missing:
            raise ValueError(
                f"value: position {position} was not kept, or is padding, in prompts {missing} (kept: positions="
                f"{self.positions!r}; -1 is the last token)."
            )
        place = here.int().argmax(dim=1)
        picked = [
            block[torch.arange(len(block)), place[list(index)][rows]]
            for rows, block in self.select(prompts=index).blocks(site, layer)
        ]
        result = torch.cat(picked)
        result = result if head is None else result[:, head]
        return result if prompt is None else result[0]

    # -- means --------------------------------------------------------------------------------------------------------

    @overload
    def mean(self, site: str, *, over: Sequence[str] = ("prompt",)) -> Float[Tensor, "*axes"]: ...

    @overload
    def mean(self, site: None = None, *, over: Sequence[str] = ("prompt",)) -> dict[str, Float[Tensor, "*axes"]]: ...

    def mean(
        self, site: str | None = None, *, over: Sequence[str] = ("prompt",)
    ) -> Float[Tensor, "*axes"] | dict[str, Float[Tensor, "*axes"]]:
        """Mean over prompts, over the kept tokens, or over both; padding is left out.

        Sums run in float32, slice by slice. Tokens are aligned at the right; where no prompt has a token, the mean over
        prompts is NaN.

        Args:
            site: the site; by default each of the cache's, in a dictionary.
            over: the axes that go away: ``"prompt"``, ``"pos"`` (``"query_pos"`` of a pattern), or both.

        Raises:
            ValueError: no such site, or axes that no mean is taken over.
        """
        if site is None:
            return {name: self.mean(name, over=over) for name in self.sites}
        pos = SITES[self._known(site)].pos_axis
        gone = {"pos" if axis == "query_pos" else axis for axis in over}
        if not gone or not gone <= {"prompt", "pos"}:
            raise ValueError(f"mean: over={tuple(over)}; expected 'prompt', 'pos' or both.")
        means = []
        for layer in self.layers:
            sums = []
            for _, block in self.blocks(site, layer):
                some = block.float()  # 0 at padding
                some = some.sum(dim=1 + pos, keepdim=True) if "pos" in gone else some
                sums.append(some.sum(dim=0, keepdim=True) if "prompt" in gone else some)
                if "prompt" in gone:
                    sums = [sum(sums[1:], sums[0])]
            count = self.mask.float()
            count = count.sum(dim=1, keepdim=True) if "pos" in gone else count
            count = count.sum(dim=0, keepdim=True) if "prompt" in gone else count
            total = torch.cat(sums)
            shape = [1] * total.ndim
            shape[0], shape[1 + pos] = count.shape
            mean = total / count.reshape(shape)
            mean = mean.squeeze(1 + pos) if "pos" in gone else mean
            means.append(mean.squeeze(0) if "prompt" in gone else mean)
        return torch.stack(means)

    def mean_heads(self, positions: Positions | None = None) -> HeadMeans:
        """Mean output of every head, as :func:`~fvlens.mean_head_activations` gives it for the same prompts.

        Args:
            positions: ``"last"`` or a token class; by default what the cache was made for, or else ``"last"``.

        Raises:
            ValueError: the cache has not z of all layers, no such position name, a prompt has no such token, or the
                tokens were not kept.
        """
        if "z" not in self.sites or self.layers != tuple(range(self.fingerprint.n_layers)):
            raise ValueError(
                f"mean_heads: expected a cache of 'z' in all {self.fingerprint.n_layers} layers, got "
                f"{', '.join(self.sites)} in {list(self.layers)}."
            )
        name = positions or (self.positions if isinstance(self.positions, str) else "last")
        wanted = position_mask(self.prompts, name)
        kept = wanted.gather(1, self.columns) & self.mask
        if int(kept.sum()) != int(wanted.sum()):
            raise ValueError(
                f"mean_heads: positions={name!r}: {int(wanted.sum() - kept.sum())} of these tokens were not kept (the "
                f"cache has positions={self.positions!r})."
            )
        total = torch.zeros(len(self.layers), *self.store.shapes["z"][1:])
        for i, layer in enumerate(self.layers):
            for rows, block in self.blocks("z", layer):
                total[i] += block[kept[rows]].float().sum(dim=0)
        prompts = self.prompts
        return HeadMeans(
            z=total / wanted.sum(),
            positions=name,
            n_prompts=len(self),
            fingerprint=self.fingerprint,
            relation=prompts.relation,
            template=prompts.template,
            n_shots=prompts.n_shots,
            labels=prompts.labels,
            data_hash=prompts.data_hash,
        )

    # -- what a reader sees -------------------------------------------------------------------------------------------

    def to_dataframe(self, site: str | None = None) -> "pd.DataFrame":
        """One row a number, padding left out: ``site``, the site's axes, ``token``, ``token_class``, ``value``.

        ``pos`` (``query_pos``, ``key_pos``) counts from the right of the prompt: -1 is the last token.

        Args:
            site: the site; by default all of them, with NaN where a site has no such axis.

        Raises:
            ValueError: no such site, or the table would take more than :attr:`max_memory`.
        """
        from fvlens.activations._views import table

        return table(self, self.sites if site is None else (self._known(site),))

    def plot(
        self, site: str | None = None, *, layer: int | None = None, head: int | None = None, prompt: int | None = None
    ) -> "Figure":
        """A figure of one site: attention of a head, or the norms of what is kept.

        Of ``"pattern"``: one head's attention on one prompt, with its tokens. Of sites with heads: the mean norm of
        each head, layer by head. Of the others: the mean norm by layer, or for one prompt by layer and token.

        Args:
            site: the site; by default the first of the cache.
            layer: of a pattern, the layer; by default the first.
            head: of a pattern, the head; by default 0.
            prompt: index of one prompt; by default the first for a pattern, else the mean over all.

        Raises:
            ValueError: no such site, layer, head or prompt; ``layer`` or ``head`` for another site than ``"pattern"``.
        """
        from fvlens.activations._views import figure

        return figure(self, self.sites[0] if site is None else self._known(site), layer, head, prompt)

    # -- files --------------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if the cache was made on another model."""
        differences = told_apart(self.fingerprint, fingerprint(model), "the cache of activations")
        if differences:
            raise ValueError(
                f"the activations were cached on model {self.fingerprint.name!r}, not on this one (cache / model: "
                f"{'; '.join(differences)})."
            )

    def save(self, path: str | Path) -> Path:
        """Write the cache to one safetensors file, its metadata in the header. Replaces an existing file at once.

        Raises:
            ValueError: the folder does not exist.
        """
        from fvlens.activations._file import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None, max_memory: int | None = None) -> "ActivationCache":
        """Read a cache that :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file. If it is larger than half of ``max_memory``, its numbers stay there until they are asked
                for; so leave it where it is.
            model: if given, the cache must have been made on this model.
            max_memory: bytes that the cache may take; by default half of what is free, at most 2 GiB.

        Raises:
            ValueError: no such file, or not a regular one; not a safetensors file, or a truncated one; not written by
                fvlens; damaged metadata; tensors that do not fit it; or a cache of another model than ``model``.
        """
        from fvlens.activations._file import load

        loaded = load(Path(path), max_memory)
        if model is not None:
            loaded.check(model)
        return loaded
