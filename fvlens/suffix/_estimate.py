"""What a model's activations take, in bytes: one estimate for everything that runs prompts.

It counts what is alive at the worst moment: copies of weights that a pass makes, what is kept of a prompt, one block's
activations (the larger of attention and MLP), the keys and values that patched copies need, and logits. Its factors are
measured on the allocations of both classes of model (``tests/test_memory.py``).
"""

from dataclasses import dataclass
from typing import Any

import torch

from fvlens.suffix._layout import WEIGHT_SLICE
from fvlens.suffix._routes import Route
from fvlens.types import is_bridge


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
