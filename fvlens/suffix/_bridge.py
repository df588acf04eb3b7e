"""The fast path over ``TransformerBridge``, which leaves the walk over the layers to the Hugging Face model inside.

Nothing of that model is written again here. A suffix is run by the model's own forward, with a cache that hands out the
prefix and keeps nothing, while every block below the start hands on what it is given; the residual stream is set at the
first block that runs, and read behind the last. Masks, positions, windows and soft caps are thus the model's own.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fvlens.interventions import acting, hooked, resid_hook, resid_pre_hook, z_hook
from fvlens.suffix._edits import Edit, SiteEdits, Variant
from fvlens.suffix._layout import is_half, wide_logits
from fvlens.suffix._run import SuffixRun, row_edits
from fvlens.suffix._scratch import Scratch


class _FrozenLayer(DynamicLayer):
    """Keys and values of a prefix, shared by all variants of a prompt: new ones are joined to them, not kept."""

    def __init__(
        self,
        keys: Float[Tensor, "prompt kv_head prefix d_head"],
        values: Float[Tensor, "prompt kv_head prefix d_head"],
        n_variants: int,
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.prefix = keys, values
        self.n_variants = n_variants

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([old.repeat_interleave(self.n_variants, dim=0).to(new.device), new], dim=-2)
            for old, new in zip(self.prefix, (key_states, value_states), strict=True)
        )
        return keys, values


class _Enough(Exception):
    """Raised behind a block, where everything wanted is known: the rest would be wasted."""


@dataclass(frozen=True, slots=True)
class BridgeRun(SuffixRun):
    """The wrapped model's own forward, one block after another.

    Attributes:
        keys, values: of the prefix, one tensor a layer, rotated.
    """

    keys: tuple[Float[Tensor, "prompt kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "prompt kv_head prefix d_head"], ...]

    def _cache(self, take: Any) -> dict[str, Any]:
        return {name: tuple(take(tensor) for tensor in getattr(self, name)) for name in ("keys", "values")}

    def _block(
        self, layer: int, active: Tensor | None, n_fresh: int, edits: SiteEdits, scratch: Scratch | None = None
    ) -> Tensor:
        model = self.model
        resid = self.resid_in_block(layer, active, n_fresh)
        n_prompts, n_variants = resid.shape[:2]
        cache = Cache(layers=[_FrozenLayer(*kv, n_variants) for kv in zip(self.keys, self.values, strict=True)])
        hooks = {resid_pre_hook(layer): lambda old: resid.flatten(0, 1).to(old), **row_edits(edits, layer, n_prompts)}
        with _skipping(model, range(layer)), hooked(model, hooks):
            after = _behind_block(
                model,
                layer,
                self.suffix_tokens.repeat_interleave(n_variants, dim=0),
                attention_mask=self.attention_mask.repeat_interleave(n_variants, dim=0),
                past_key_values=cache,
                use_cache=True,
            )
        return after.to(resid.device).unflatten(0, (n_prompts, n_variants))

    def logits(
        self, resid: Float[Tensor, "*rows d_model"], scratch: Scratch | None = None
    ) -> Float[Tensor, "*rows d_vocab"]:
        return bridge_logits(self.model, resid)


def bridge_logits(model: Any, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Whatever the wrapped model does behind its last block, of any residual streams."""
    if any(block not in _lengths for block in model.blocks):  # no prefix was run yet
        with torch.no_grad(), acting(methods=_notes(model)):
            model(torch.zeros(1, 1, dtype=torch.long, device=resid.device))
    flat = resid.reshape(-1, 1, resid.shape[-1])
    last = resid_hook(model.cfg.n_layers - 1)
    tokens = torch.zeros(flat.shape[:2], dtype=torch.long, device=resid.device)
    edits = {last: lambda old: flat.to(old)}
    with _skipping(model, range(model.cfg.n_layers)), wide_unembedding(model), hooked(model, edits):
        logits = model(tokens)
    return logits.to(resid.device).reshape(*resid.shape[:-1], -1)


def _replaced(forwards: Mapping[Any, Callable[..., Any]]) -> contextlib.AbstractContextManager[None]:
    """While open, these modules compute something else, in this thread and task."""
    return acting(methods={(module, "forward"): _instead(forward) for module, forward in forwards.items()})


def _instead(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda own, *args, **kwargs: forward(*args, **kwargs)


def _skipping(model: Any, layers: range) -> contextlib.AbstractContextManager[None]:
    """While open, these blocks hand on their input."""
    return _replaced({model.blocks[layer]: _hand_on(model.blocks[layer]) for layer in layers})


def wide_unembedding(model: Any) -> contextlib.AbstractContextManager[None]:
    """While open, a model in half precision gives float32 logits, if its unembedding is a plain linear map."""
    linear = model.unembed.original_component
    if type(linear) is not torch.nn.Linear or not is_half(linear.weight.dtype):
        return contextlib.nullcontext()
    return _replaced({linear: lambda hidden_states: wide_logits(hidden_states, linear.weight.T, linear.bias)})


def _hand_on(block: Any) -> Any:
    length = _lengths[block]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = block.hook_out(hidden_states)  # where the residual stream behind the block is set
        return hidden_states if length is None else (hidden_states, *[None] * (length - 1))

    return forward


_lengths: "weakref.WeakKeyDictionary[Any, int | None]" = weakref.WeakKeyDictionary()
"""Block -> how many things it gives its model, as seen when a prefix was run; None for a bare tensor."""


def _notes(model: Any) -> dict[tuple[Any, str], Callable[..., Any]]:
    """Methods that note what each block gives its model."""

    def noting(block: Any) -> Callable[..., Any]:
        def forward(own: Any, *args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            _lengths[block] = len(output) if isinstance(output, tuple) else None
            return output

        return forward

    return {(block, "forward"): noting(block) for block in model.blocks}


def _behind_block(model: Any, layer: int, tokens: Tensor, **options: Any) -> Tensor:
    """The residual stream behind a block; the rest of the forward is not run."""
    found: list[Tensor] = []

    def stop(resid: Tensor) -> None:
        found.append(resid)
        raise _Enough

    with hooked(model, {resid_hook(layer): stop}), contextlib.suppress(_Enough):
        model(tokens, **options)
    return found[0]


def run_bridge(
    model: Any, tokens: Int[Tensor, "prompt pos"], attention_mask: Int[Tensor, "prompt pos"], n_suffix: int
) -> BridgeRun:
    """Run prompts once through the bridge and keep what patched suffixes need."""
    n_layers = model.cfg.n_layers
    n_prefix = tokens.shape[1] - n_suffix
    cache = DynamicCache()
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def see(value: Tensor) -> None:
            kept[name] = value[:, -n_suffix:].detach().clone()

        return see

    final = resid_hook(n_layers - 1)
    names = [final, *(name(layer) for layer in range(n_layers) for name in (resid_pre_hook, z_hook))]
    with torch.no_grad(), acting(methods=_notes(model)), hooked(model, {name: keep(name) for name in names}):
        last_only = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}
        model(tokens, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **last_only)
    kept_layers: list[Any] = cache.layers
    device = tokens.device  # a model split over devices leaves each layer's on its own
    return BridgeRun(
        model=model,
        path="kv",
        from_layer=0,
        keys=tuple(layer.keys[:, :, :n_prefix].contiguous() for layer in kept_layers),
        values=tuple(layer.values[:, :, :n_prefix].contiguous() for layer in kept_layers),
        resid_pre=torch.stack([kept[resid_pre_hook(layer)].to(device) for layer in range(n_layers)]),
        z=torch.stack([kept[z_hook(layer)].to(device) for layer in range(n_layers)]),
        resid_final=kept[final].to(device),
        attention_mask=attention_mask,
        suffix_tokens=tokens[:, -n_suffix:],
    )


_verdicts: "weakref.WeakKeyDictionary[Any, str | None]" = weakref.WeakKeyDictionary()


def why_not_exact(model: Any) -> str | None:
    """Why suffixes over this bridge's cache differ from whole passes, or None; tried out once a model."""
    if model not in _verdicts:
        with torch.no_grad():
            _verdicts[model] = _try_out(model)
    return _verdicts[model]


def _try_out(model: Any) -> str | None:
    """Whole passes against suffixes on a short random batch, padding included.

    Suffixes alone, and variants that join the batch at three layers: there a head is replaced, or the residual stream
    behind the block moved, each at one prompt's own places, and all of them go up together.
    """
    cfg = model.cfg
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    n_pos, n_suffix = min(12, cfg.n_ctx), 2
    tokens = torch.randint(cfg.d_vocab, (2, n_pos), generator=generator).to(device)
    mask = torch.ones_like(tokens)
    mask[1, : n_pos // 3] = 0
    layers = sorted({0, cfg.n_layers // 2, cfg.n_layers - 1})
    try:
        whole = model(tokens, attention_mask=mask)[:, -n_suffix:]
        run = run_bridge(model, tokens, mask, n_suffix)
        if len(run.keys) != cfg.n_layers:
            return f"{len(run.keys)} of {cfg.n_layers} layers keep keys and values"
        pairs = [(run.logits(run.resid_final), whole)]
        for layer in layers:
            pairs.append((run.continue_from(layer, run.resid_before(layer)[:, None])[:, 0], run.resid_final))
        variants = [variant for layer in layers for variant in _trial_edits(run, layer, generator)]
        together = run.logits(run.under(variants))
        for i, variant in enumerate(variants):
            pairs.append((together[:, i], _whole_pass(model, tokens, mask, n_suffix, variant)))
    except Exception as error:  # whatever a stranger's forward may raise: the naive path still works
        return f"its blocks cannot be run over a cache ({type(error).__name__}: {error})"
    bound = max(1e-3, 8 * torch.finfo(whole.dtype).eps)
    differences = [float((ours - theirs).float().norm() / theirs.float().norm()) for ours, theirs in pairs]
    bad = [difference for difference in differences if not difference <= bound]  # NaN is bad, too
    return f"a suffix over its cache differs from a whole pass by {max(bad):.1e}" if bad else None


def _trial_edits(run: BridgeRun, layer: int, generator: torch.Generator) -> list[Variant]:
    """A head put to another head's number, and a residual stream moved by about its own size, from this layer on."""
    z, after = run.kept_z(layer), run.resid_after(layer)
    head = torch.randn(z.shape[-1], generator=generator).to(z) * z.float().std().to(z)
    moved = torch.randn(after.shape[-1], generator=generator).to(after) * after.float().std().to(after)
    return [
        (Edit(layer, "z", head, head=run.model.cfg.n_heads - 1, op="replace"),),
        (Edit(layer, "resid_post", moved), Edit(layer, "z", head, head=0, op="add")),
    ]


def _whole_pass(
    model: Any,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    n_suffix: int,
    variant: Variant,
) -> Float[Tensor, "prompt suffix d_vocab"]:
    """Logits of a whole pass under a variant's edits, at the suffix."""

    def hook(edit: Edit) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            place = (slice(None), x.shape[1] - n_suffix, *([] if edit.head is None else [edit.head]))
            x[place] = edit.value if edit.op == "replace" else x[place] + edit.value
            return x

        return change

    hooks = {(z_hook if edit.site == "z" else resid_hook)(edit.layer): hook(edit) for edit in variant}
    with hooked(model, hooks), wide_unembedding(model):
        return model(tokens, attention_mask=mask)[:, -n_suffix:]


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the wrapped model can be told to unembed the last positions only."""
    return "logits_to_keep" in inspect.signature(model.original_model.forward).parameters
