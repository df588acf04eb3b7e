"""Caches in files: one safetensors file each, with everything but the numbers and the tokens in its header."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from fvlens.activations._cache import ActivationCache
from fvlens.activations._positions import Places, find_places
from fvlens.activations._sites import SITES, as_layers, as_sites
from fvlens.activations._store import Store, memory_bound
from fvlens.files import Pieces, TensorFile, write_tensors
from fvlens.models import Fingerprint
from fvlens.prompts import LABELS, PAD_ANSWER, Prompts, Template, TokenClass
from fvlens.relations import as_pair
from fvlens.types import as_list, as_text, as_texts, as_whole

FORMAT = "fvlens-activations-1"
WHAT = "activation cache"
_PROMPT_TENSORS = ("tokens", "attention_mask", "answer_tokens", "token_classes")


def save(cache: ActivationCache, path: Path) -> Path:
    """Write a cache; a part of it at a time is in memory."""
    tensors: dict[str, Tensor | Pieces] = {
        f"prompts.{name}": getattr(cache.prompts, name).to("cpu", torch.int64) for name in _PROMPT_TENSORS
    }
    for site in cache.sites:
        tensors[site] = Pieces(cache.shape(site), cache.dtype, lambda site=site: _pieces(cache, site))
    positions = cache.positions
    header = {
        "sites": list(cache.sites),
        "layers": list(cache.layers),
        "positions": list(positions) if isinstance(positions, tuple) else positions,
        "n_places": cache.columns.shape[1],
        "fingerprint": dataclasses.asdict(cache.fingerprint),
        "words": {str(token): text for token, text in cache.words.items()},
        "prompts": _prompts_header(cache.prompts),
        "data_hash": cache.prompts.data_hash,
    }
    if cache.part is not None:
        header["part"] = list(cache.part)
    return write_tensors(path, tensors, header, FORMAT)


def _pieces(cache: ActivationCache, site: str) -> Iterator[Shaped[Tensor, "..."]]:
    for layer in cache.layers:
        for _, block in cache.blocks(site, layer):
            yield block


def load(path: Path, max_memory: int | None) -> ActivationCache:
    """Read what :func:`save` wrote: the numbers too if they fit half of the bound, else when they are asked for."""
    bound = memory_bound(max_memory)
    file = TensorFile.open(path, FORMAT, WHAT)
    try:
        cache = _cache_of(file, bound)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: damaged metadata ({type(error).__name__}: {error}).") from error
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(path.name) else f"{path.name}: {text}") from error
    if cache.n_bytes > bound // 2:
        return cache
    numbers = {site: file.read(site) for site in cache.sites}
    store = Store(cache.layers, cache.store.shapes, cache.dtype, [(len(cache), numbers)])
    return dataclasses.replace(cache, store=store)


def _cache_of(file: TensorFile, bound: int) -> ActivationCache:
    header = file.header
    sites = as_sites(as_texts(header["sites"], "sites"))
    mark = Fingerprint.from_fields(header["fingerprint"])
    listed = [as_whole(layer, "layers", -sys.maxsize) for layer in as_list(header["layers"], "layers")]
    layers = as_layers(listed, range(mark.n_layers))
    expected = {*sites, *(f"prompts.{name}" for name in _PROMPT_TENSORS)}
    if set(file.entries) != expected:
        raise ValueError(f"expected the tensors {', '.join(sorted(expected))}, got {sorted(file.entries)}.")
    prompts = _prompts_of(file, header["prompts"], mark.d_vocab)
    if prompts.data_hash != header["data_hash"]:
        raise ValueError(f"the prompts hash to {prompts.data_hash}, but {header['data_hash']} were cached.")
    asked = header["positions"]
    if asked is not None and not isinstance(asked, str):
        asked = [as_whole(i, "positions", -sys.maxsize) for i in as_list(asked, "positions")]
    places = find_places(prompts, asked, as_whole(header["n_places"], "n_places", 1))
    dtypes = {file.entries[site].dtype for site in sites}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"expected activations of one floating dtype, got {', '.join(map(str, dtypes))}.")
    shapes = {site: _shape_of(file, site, len(layers), len(prompts), places, prompts, mark) for site in sites}
    if places.columns.shape[1] != header["n_places"]:
        raise ValueError(f"n_places: expected {places.columns.shape[1]}, got {header['n_places']}.")
    return ActivationCache(
        sites=sites,
        layers=layers,
        positions=places.name,
        prompts=prompts,
        columns=places.columns,
        mask=places.mask,
        fingerprint=mark,
        words={_token(token): as_text(text, "words") for token, text in header["words"].items()},
        max_memory=bound,
        store=Store(layers, shapes, dtypes.pop(), [(len(prompts), file)]),
        rows=tuple(range(len(prompts))),
        part=_part_of(header.get("part"), len(prompts)),
    )


def _token(text: str) -> int:
    token = int(text)
    if str(token) != text:
        raise ValueError(f"words: expected ids of tokens, got {text!r}.")
    return token


def _part_of(given: Any, n_prompts: int) -> tuple[int, int] | None:
    if given is None:
        return None
    first, total = (as_whole(number, "part") for number in as_list(given, "part"))
    if first + n_prompts > total:
        raise ValueError(f"part: {n_prompts} prompts from prompt {first} on are not a part of {total}.")
    return first, total


def _shape_of(
    file: TensorFile, site: str, n_layers: int, n_prompts: int, places: Places, prompts: Prompts, mark: Fingerprint
) -> tuple[int, ...]:
    """A site's shape behind layer and prompt, checked against everything else in the file."""
    n_places = places.columns.shape[1]
    sizes: dict[str, int | None] = {
        "pos": n_places,
        "query_pos": n_places,
        "key_pos": prompts.tokens.shape[1],
        "head": mark.n_heads,
        "kv_head": None,  # the model's own; the fingerprint does not tell
        "d_head": mark.d_head,
        "d_model": mark.d_model,
    }
    expected = (n_layers, n_prompts, *(sizes[axis] for axis in SITES[site].axes))
    shape = file.entries[site].shape
    if len(shape) != len(expected) or any(b not in (None, a) for a, b in zip(shape, expected, strict=True)):
        raise ValueError(f"{site!r} has shape {list(shape)}; expected {list(expected)}.")
    return shape[2:]


# --- prompts ---


def _prompts_header(prompts: Prompts) -> dict[str, Any]:
    return {
        "queries": [list(pair) for pair in prompts.queries],
        "demonstrations": [[list(pair) for pair in shown] for shown in prompts.demonstrations],
        "labels": prompts.labels,
        "n_shots": prompts.n_shots,
        "template": prompts.template.to_json(),
        "relation": prompts.relation,
        "texts": list(prompts.texts),
    }


def _prompts_of(file: TensorFile, header: dict[str, Any], d_vocab: int) -> Prompts:
    tensors = {}
    for name in _PROMPT_TENSORS:
        entry = file.entries[f"prompts.{name}"]
        if entry.dtype != torch.int64 or len(entry.shape) != 2:
            raise ValueError(f"expected prompts.{name} as a matrix of integers, got {entry.dtype} {list(entry.shape)}.")
        tensors[name] = file.read(f"prompts.{name}")
    n = len(tensors["tokens"])
    lengths = {len(header[name]) for name in ("queries", "demonstrations", "texts")} | {len(tensors["answer_tokens"])}
    if n == 0 or tensors["tokens"].numel() == 0 or lengths != {n}:
        raise ValueError(f"expected as many queries, demonstrations, texts and answers as prompts ({n}).")
    if len({tensors[name].shape for name in ("tokens", "attention_mask", "token_classes")}) > 1:
        raise ValueError("expected tokens, their mask and their classes of one shape.")
    classes = {int(kind) for kind in tensors["token_classes"].unique()}
    if not {int(bit) for bit in tensors["attention_mask"].unique()} <= {0, 1} or not classes <= set(TokenClass):
        raise ValueError("expected a mask of 0 and 1, and known classes of tokens.")
    for name, least in (("tokens", 0), ("answer_tokens", PAD_ANSWER)):
        ids = tensors[name]
        # as Python's whole numbers: a damaged d_vocab may be larger than any that a tensor holds
        if ids.numel() and not least <= int(ids.min()) <= int(ids.max()) < d_vocab:
            raise ValueError(f"expected prompts.{name} as ids of {d_vocab} tokens, got {int(ids.min())}..{ids.max()}.")
    if as_text(header["labels"], "labels") not in LABELS:
        raise ValueError(f"labels={header['labels']!r}; expected one of {', '.join(LABELS)}.")
    return Prompts(
        **tensors,
        queries=tuple(as_pair(pair, "queries") for pair in as_list(header["queries"], "queries")),
        demonstrations=tuple(
            tuple(as_pair(pair, "demonstrations") for pair in as_list(shown, "demonstrations"))
            for shown in as_list(header["demonstrations"], "demonstrations")
        ),
        labels=header["labels"],
        n_shots=as_whole(header["n_shots"], "n_shots"),
        template=Template.from_json(header["template"], "one"),  # as it was before files said so
        relation=as_text(header["relation"], "relation"),
        texts=as_texts(header["texts"], "texts"),
    )
