"""Reading on: logits behind the last tokens of a batch, with keys and values kept so that more tokens can follow."""

import abc
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.interventions import acts_on, part_threads
from fvlens.suffix._memory import MOST_LOGITS
from fvlens.types import is_bridge


class Reader(abc.ABC):
    """A batch of left-padded rows that is read once, or piece by piece."""

    @abc.abstractmethod
    def read(
        self, tokens: Int[Tensor, "batch new"], mask: Int[Tensor, "batch new"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits behind the last ``n_read`` of these tokens, which follow those read before."""


class _HookedReader(Reader):
    def __init__(self, model: Any, n_rows: int, keep: bool) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self.model = model
        device = next(model.parameters()).device
        self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, n_rows) if keep else None

    def read(self, tokens: Tensor, mask: Tensor, *, n_read: int) -> Tensor:
        from fvlens.suffix._hooked import unembedded

        resid = self.model(
            tokens,
            attention_mask=mask,
            past_kv_cache=self.cache,
            stop_at_layer=self.model.cfg.n_layers,
            return_type=None,
        )
        return unembedded(self.model, resid[:, -n_read:])


class _BridgeReader(Reader):
    def __init__(self, model: Any, keep: bool) -> None:
        from transformers import DynamicCache

        from fvlens.suffix._bridge import accepts_logits_to_keep, wide_unembedding

        part_threads(model)
        self.model = model
        self.wide_unembedding = wide_unembedding
        self.cache = DynamicCache() if keep else None
        self.mask: Tensor | None = None
        self.only_last = accepts_logits_to_keep(model)

    def read(self, tokens: Tensor, mask: Tensor, *, n_read: int) -> Tensor:
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        options: dict[str, Any] = {"logits_to_keep": n_read} if self.only_last else {}
        if self.cache is not None:
            options |= {"use_cache": True, "past_key_values": self.cache}
        with self.wide_unembedding(self.model):
            return self.model(tokens, attention_mask=self.mask, **options)[:, -n_read:]


def open_reader(model: Any, n_rows: int, *, keep: bool) -> Reader:
    """A reader of ``n_rows`` rows; with ``keep``, more tokens may follow the first ones."""
    return _BridgeReader(model, keep) if is_bridge(model) else _HookedReader(model, n_rows, keep)


def read_out(model: Any, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Logits that a model gives to residual streams after its last block: final norm, unembedding, soft cap.

    Those of a model in half precision are float32.

    Raises:
        ValueError: a TransformerBridge under hooks, which would act on these residual streams again.
    """
    if is_bridge(model):
        from fvlens.suffix._bridge import bridge_logits

        if acts_on(model):
            raise ValueError(
                "something acts on this TransformerBridge (an open inject or ablate block, or a hook), which would act "
                "on residual streams again when they are read out; leave the block, or use a HookedTransformer."
            )
        return bridge_logits(model, resid)
    from fvlens.suffix._hooked import unembedded

    return unembedded(model, resid.to(next(model.parameters()).dtype))


def read_out_slices(
    model: Any, resid: Float[Tensor, "row d_model"]
) -> Iterator[tuple[slice, Float[Tensor, "_some d_vocab"]]]:
    """:func:`read_out` of many rows, in slices whose logits take little memory; each with its rows."""
    size = max(1, MOST_LOGITS // model.cfg.d_vocab)
    for start in range(0, len(resid), size):
        rows = slice(start, min(len(resid), start + size))
        yield rows, read_out(model, resid[rows])
