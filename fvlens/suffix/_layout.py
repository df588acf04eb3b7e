"""A HookedTransformer's weights, laid out once: what the engine multiplies with, shared by all its uses.

The class keeps every head's projection apart and its gated MLP lays its weights out anew at each call. Here queries,
keys and values are one product, gate and input of a gated MLP another, each weight a contiguous ``[out in]`` copy,
which a product of few rows reads two to three times as fast. The copies are made once a model, lazily, and go with it.

A stale copy would be wrong in silence. So at each run the parameters are looked at again; what this cannot see needs
:func:`fvlens.models.refresh`, which says what it is. Where a second copy does not fit the memory, each product lays its
weight out when it comes to it, as the class itself does, and the result says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.models import is_kept, of_weights
from fvlens.suffix._scratch import Scratch


def _reads_few_rows_fast() -> bool:
    """Whether this processor's plain products of few rows are as fast as those that are turned over."""
    described = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkl.is_available() and str(described.get("cpu_name", "")).startswith("Intel")


FEW_ROWS, WIDE = 16, 256
"""Up to so many rows, a product that reads rows of so many numbers or more runs as ``(weight @ x.T).T``. In narrower
models it would only change the rounding."""
TURNS_SINGLE_PRECISION = not _reads_few_rows_fast()
"""Whether float32 is among the precisions for that: MKL reads the weight so two to three times as fast on processors of
other makers, and more slowly on Intel's own. ``tests/benchmarks/few_rows.py`` measures it."""

Function = Callable[..., Tensor]
"""Of rows; those with wide results take a :class:`Scratch` as well."""


# --- products ---


class _FewRows(torch.autograd.Function):
    """``x @ weight.T`` of few rows, and its gradient to ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        ctx.weight, ctx.parts = weight, parts
        return (weight @ x.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if not ctx.parts:
            return gradient @ ctx.weight, None, None
        rows = gradient.T.contiguous().split([part.shape[1] for part in ctx.parts])
        total = ctx.parts[0] @ rows[0]
        for part, own in zip(ctx.parts[1:], rows[1:], strict=True):
            total = torch.addmm(total, part, own)
        return total.T, None, None


@dataclass(frozen=True, slots=True)
class Product:
    """``x @ weight.T + bias`` with weights that do not change, of rows ``[row in]``.

    Attributes:
        weight: ``[out in]``, or what makes it where no copy is kept.
        bias: None for none.
        parts: the model's own weights ``[in out]``, whose columns are the rows of ``weight``; they make gradients of
            few rows faster. Empty where they are not laid out so.
        compute: precision of the product, if not that of the weights.
    """

    weight: Float[Tensor, "out in"] | Callable[[], Tensor]
    bias: Float[Tensor, " out"] | None
    parts: tuple[Tensor, ...] = ()
    compute: torch.dtype | None = None

    def __call__(
        self, x: Float[Tensor, "row in"], scratch: Scratch | None = None, name: str = ""
    ) -> Float[Tensor, "row out"]:
        """The product, written to ``scratch`` by this name where one is given and nothing needs a gradient."""
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight()
        if scratch is not None and self.compute is None and scratch.takes(x):
            out = scratch.rows(name, len(x), len(weight), x)
            return torch.mm(x, weight.T, out=out) if self.bias is None else torch.addmm(self.bias, x, weight.T, out=out)
        if self.compute is not None:
            product = F.linear(x.to(self.compute), weight).to(x.dtype)
        elif (
            1 < len(x) <= FEW_ROWS
            and weight.shape[1] >= WIDE
            and weight.is_contiguous()
            and (TURNS_SINGLE_PRECISION or x.dtype != torch.float32)
        ):
            product = _FewRows.apply(x, weight, self.parts) if x.requires_grad else (weight @ x.T).T
            assert isinstance(product, Tensor)
        else:
            return F.linear(x, weight, self.bias)
        return product if self.bias is None else product + self.bias


# --- a block ---


@dataclass(frozen=True, slots=True)
class Block:
    """A block's functions over rows ``[row d_model]``.

    Attributes:
        ln1, ln2: the norms before attention and MLP; ``ln2`` is None without an MLP.
        qkv: queries, keys and values in one, heads in that order.
        qk_norm: the norm of queries ``[row head d_head]`` and keys, or None.
        out: the attention's output from the heads' mixed values ``[row head*d_head]``, its bias included.
        after_attention: the norm of the attention's output, or None.
        mlp: the MLP, with the norm of its output where there is one.
        rotary: number of the block's table of rotations in :attr:`Layout.tables`; None without.
        scale: factor on the scores.
        window: tokens that a query sees at most, itself included; None for all.
    """

    ln1: Function
    qkv: Product
    qk_norm: tuple[Function, Function] | None
    out: Product
    after_attention: Function | None
    ln2: Function | None
    mlp: Function | None
    rotary: int | None
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a model that the engine runs over.

    Attributes:
        blocks: one a layer.
        final: the norm before the unembedding.
        unembed: the unembedding; logits in float32 of a model in half precision.
        tables: the different rotation tables, as attention modules that own them.
        is_copied: whether the weights are kept in a second copy.
        n_bytes: what that copy takes.
        compute: precision of the products, None for the model's own.
    """

    blocks: tuple[Block, ...]
    final: Function
    unembed: Function
    tables: tuple[Any, ...]
    is_copied: bool
    n_bytes: int
    compute: torch.dtype | None

    def rotations(
        self, positions: Int[Tensor, "prompt pos"]
    ) -> list[tuple[Float[Tensor, "prompt pos 1 rotary_dim"], Float[Tensor, "prompt pos 1 rotary_dim"]]]:
        """Cosines and sines at these positions, for each of :attr:`tables`."""
        n_needed = int(positions.max()) + 1 if self.tables else 0
        found = []
        for attn in self.tables:
            if n_needed > attn.rotary_cos.shape[0]:
                attn._extend_rotary_embeddings(min(attn.cfg.n_ctx, max(n_needed, 2 * attn.rotary_cos.shape[0])))
            found.append((attn.rotary_cos[positions][:, :, None], attn.rotary_sin[positions][:, :, None]))
        return found


def rotated(
    x: Float[Tensor, "*rows head d_head"],
    cos: Float[Tensor, "*#rows 1 rotary_dim"],
    sin: Float[Tensor, "*#rows 1 rotary_dim"],
    adjacent: bool,
    scratch: Scratch | None = None,
) -> Float[Tensor, "*rows head d_head"]:
    """Queries or keys rotated by their positions; only the first ``rotary_dim`` numbers of a head are."""
    n = cos.shape[-1]
    turned = x[..., :n]
    if scratch is not None and scratch.takes(x) and not adjacent:  # the same without new tensors
        found = scratch.rows("rotated", x.shape[:-1].numel(), x.shape[-1], x).view(x.shape)
        half = n // 2
        torch.mul(turned, cos, out=found[..., :n])
        found[..., :half].addcmul_(turned[..., half:], sin[..., :half], value=-1)
        found[..., half:n].addcmul_(turned[..., :half], sin[..., half:])
        found[..., n:] = x[..., n:]
        return found
    if adjacent:
        flipped = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        flipped = torch.cat([-turned[..., n // 2 :], turned[..., : n // 2]], dim=-1)
    turned = torch.addcmul(turned * cos, flipped, sin)
    return turned if n == x.shape[-1] else torch.cat([turned, x[..., n:]], dim=-1)


# --- laying out ---


def is_half(dtype: torch.dtype) -> bool:
    """Whether logits of this precision would be rounded."""
    return dtype in (torch.bfloat16, torch.float16)


WEIGHT_SLICE = 4 * 1024 * 1024
"""Numbers of an unembedding that are copied to single precision at once."""


def wide_logits(
    resid: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None = None,
) -> Float[Tensor, "*rows d_vocab"]:
    """``resid @ weight + bias`` in float32 or wider, so that the logits of a model in half precision are not rounded.

    bfloat16 would round a logit between 16 and 32 to a multiple of 1/8: up to 6% of a probability, and ties for the
    best token.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    resid = resid.to(weight.device, dtype)
    columns = max(1, WEIGHT_SLICE // weight.shape[0])
    logits = torch.cat([resid @ some.to(dtype) for some in weight.split(columns, dim=1)], dim=-1)
    return logits if bias is None else logits + bias.to(dtype)


def laid_out(model: Any, *, compute: torch.dtype | None = None, copied: bool = True) -> Layout:
    """The model's layout, made at its first use and whenever the parameters have changed since.

    Args:
        model: a HookedTransformer for which the ``weights`` route is exact.
        compute: precision of the products; None for the model's own.
        copied: keep a second copy of the weights; without, products lay their weights out at each call.
    """
    name = _name(compute, copied)
    return of_weights(model, name, lambda: _lay_out(model, compute, copied), hold=True)


def _name(compute: torch.dtype | None, copied: bool) -> str:
    return f"layout, {'copied' if copied else 'not copied'}, {compute}"


def is_laid_out(model: Any, compute: torch.dtype | None = None) -> bool:
    """Whether a second copy of the model's weights is there already."""
    return is_kept(model, _name(compute, True))


def _lay_out(model: Any, compute: torch.dtype | None, copied: bool) -> Layout:
    cfg = model.cfg
    tables: list[Any] = []
    blocks = tuple(_block(block, tables, compute, copied) for block in model.blocks)
    unembed, size = _unembedding(model, compute, copied)
    products = [product for block in blocks for product in _products(block)]
    n_bytes = size + sum(p.weight.numel() * p.weight.element_size() for p in products if isinstance(p.weight, Tensor))
    return Layout(
        blocks=blocks,
        final=_norm(model.ln_final) if cfg.normalization_type is not None else _same,
        unembed=unembed,
        tables=tuple(tables),
        is_copied=copied,
        n_bytes=n_bytes if copied else 0,
        compute=compute,
    )


def _products(block: Block) -> list[Product]:
    return [block.qkv, block.out, *getattr(block.mlp, "products", ())]


def _same(x: Tensor, scratch: Scratch | None = None) -> Tensor:
    return x


def _product(
    parts: Sequence[Tensor],
    bias: Tensor | None,
    compute: torch.dtype | None,
    copied: bool,
    *,
    plain: bool = True,
) -> Product:
    """The product with weights ``[in out]``, side by side."""
    parts = [part.detach() for part in parts]

    def weight() -> Tensor:
        joined = torch.cat([part.T for part in parts]) if len(parts) > 1 else parts[0].T
        return joined.to(compute or joined.dtype)

    if bias is not None:
        bias = bias.detach()
        bias = bias if bool(bias.any()) else None
    made = weight().contiguous() if copied else weight
    ready = tuple(parts) if plain and copied and all(part.is_contiguous() for part in parts) else ()
    return Product(made, bias, ready, compute)


def _block(block: Any, tables: list[Any], compute: torch.dtype | None, copied: bool) -> Block:
    attn, cfg = block.attn, block.cfg
    own = "_" if attn.cfg.n_key_value_heads is not None else ""  # without it, a copy for each query head
    heads = [getattr(attn, name).detach() for name in ("W_Q", f"{own}W_K", f"{own}W_V")]
    biases = [getattr(attn, name).detach().flatten() for name in ("b_Q", f"{own}b_K", f"{own}b_V")]
    by_head = [w.transpose(0, 1).flatten(1) for w in heads] if copied else None
    if by_head is not None:
        qkv = _product([torch.cat(by_head, dim=1)], torch.cat(biases), compute, copied, plain=False)
    else:

        def together() -> Tensor:
            joined = torch.cat([w.transpose(1, 2).flatten(0, 1) for w in heads])
            return joined.to(compute or joined.dtype)

        qkv = Product(together, torch.cat(biases), (), compute)
    has_mlp = not cfg.attn_only
    post = cfg.use_normalization_before_and_after
    return Block(
        ln1=_norm(block.ln1),
        qkv=qkv,
        qk_norm=(_norm(attn.q_norm), _norm(attn.k_norm)) if cfg.use_qk_norm else None,
        out=_product([attn.W_O.flatten(0, 1)], attn.b_O, compute, copied),
        after_attention=_norm(block.ln1_post) if post else None,
        ln2=_norm(block.ln2) if has_mlp else None,
        mlp=_mlp(block, compute, copied) if has_mlp else None,
        rotary=_table(attn, tables) if cfg.positional_embedding_type == "rotary" else None,
        scale=1 / float(attn.attn_scale),
        window=cfg.window_size if attn.attn_type == "local" else None,
    )


def _table(attn: Any, tables: list[Any]) -> int:
    """Number of this module's rotation table among those seen, to which it is added if it is a new one."""
    for i, other in enumerate(tables):
        n = min(len(attn.rotary_cos), len(other.rotary_cos))
        if all(torch.equal(getattr(attn, k)[:n], getattr(other, k)[:n]) for k in ("rotary_cos", "rotary_sin")):
            return i
    tables.append(attn)
    return len(tables) - 1


def _norm(norm: Any) -> Function:
    """A norm over the last axis, in as few operations as give the same values."""
    from transformer_lens.components.layer_norm import LayerNorm
    from transformer_lens.components.rms_norm import RMSNorm

    if isinstance(norm, torch.nn.Identity):
        return _same
    if type(norm) not in (LayerNorm, RMSNorm):
        return lambda x, scratch=None: norm(x[None])[0]  # modules of the class's own take three axes
    weight, shape, eps = norm.w.detach(), norm.w.shape, norm.eps
    bias = norm.b.detach() if type(norm) is LayerNorm else None
    if is_half(weight.dtype):  # normalised in single precision, rounded, and only then scaled

        def rounded(x: Tensor, scratch: Scratch | None = None) -> Tensor:
            wide = x.float()
            plain = F.rms_norm(wide, shape, eps=eps) if bias is None else F.layer_norm(wide, shape, eps=eps)
            scaled = plain.to(weight.dtype) * weight
            return scaled if bias is None else scaled + bias

        return rounded
    if bias is not None:
        return lambda x, scratch=None: F.layer_norm(x, shape, weight, bias, eps)

    def rms_norm(x: Tensor, scratch: Scratch | None = None) -> Tensor:
        if scratch is None or not scratch.takes(x) or x.ndim != 2:
            return F.rms_norm(x, shape, weight, eps)
        found = scratch.rows("normed", x.shape[0], x.shape[1], x)  # PyTorch's own is the same in three new tensors
        scale = torch.mul(x, x, out=found).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        return torch.mul(x, scale, out=found).mul_(weight)

    return rms_norm


class _PlainMLP:
    """``act(x W_in + b_in) W_out + b_out``."""

    def __init__(self, mlp: Any, compute: torch.dtype | None, copied: bool) -> None:
        self.act = _activation(mlp)
        self.into = _product([mlp.W_in], mlp.b_in, compute, copied)
        self.out = _product([mlp.W_out], mlp.b_out, compute, copied)
        self.products = (self.into, self.out)

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return self.out(self.act(self.into(x, scratch, "hidden")), scratch, "mlp_out")


class _GatedMLP:
    """``(act(x W_gate) * (x W_in) + b_in) W_out + b_out``."""

    def __init__(self, mlp: Any, compute: torch.dtype | None, copied: bool) -> None:
        self.act = _activation(mlp)
        self.into = _product([mlp.W_gate, mlp.W_in], None, compute, copied)
        self.out = _product([mlp.W_out], mlp.b_out, compute, copied)
        self.bias = mlp.b_in.detach() if bool(mlp.b_in.any()) else None
        self.products = (self.into, self.out)

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        gate, up = self.into(x, scratch, "hidden").chunk(2, dim=1)
        if self.act is F.silu and not x.requires_grad:
            hidden = F.silu(gate, inplace=True).mul_(up)
        else:
            hidden = self.act(gate) * up
        return self.out(hidden if self.bias is None else hidden + self.bias, scratch, "mlp_out")


def _activation(mlp: Any) -> Function:
    from transformer_lens.utilities.activation_functions import gelu_new

    if mlp.act_fn is gelu_new and not is_half(mlp.W_in.dtype):
        return partial(F.gelu, approximate="tanh")  # the same in one operation
    return mlp.act_fn


def _mlp(block: Any, compute: torch.dtype | None, copied: bool) -> Function:
    from transformer_lens.components.mlps.gated_mlp import GatedMLP
    from transformer_lens.components.mlps.mlp import MLP

    kinds = {MLP: _PlainMLP, GatedMLP: _GatedMLP}
    mlp = block.mlp
    if type(mlp) not in kinds or getattr(mlp, "ln", None) is not None:
        return lambda x, scratch=None: block.apply_mlp(x[None])[0]
    made = kinds[type(mlp)](mlp, compute, copied)
    return _Normed(made, _norm(block.ln2_post)) if block.cfg.use_normalization_before_and_after else made


class _Normed:
    """An MLP with a norm of its output."""

    def __init__(self, mlp: Any, norm: Function) -> None:
        self.mlp, self.norm, self.products = mlp, norm, mlp.products

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return self.norm(self.mlp(x, scratch))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _unembedding(model: Any, compute: torch.dtype | None, copied: bool) -> tuple[Function, int]:
    """The unembedding with the soft cap of its logits, and the bytes of its copy."""
    weight, bias = model.unembed.W_U.detach(), model.unembed.b_U.detach()
    size = 0
    if is_half(weight.dtype):
        linear: Function = lambda x, scratch=None: wide_logits(x, weight, bias)  # noqa: E731 (one of two alternatives)
    else:
        embedding = model.embed.W_E.detach()
        if copied and compute is None and _equal(weight.T, embedding):  # tied: laid out already
            parts = (weight,) if weight.is_contiguous() else ()
            linear = replace(_product([weight], bias, None, False), weight=embedding, parts=parts)
        else:
            linear = product = _product([weight], bias, compute, copied)
            size = product.weight.numel() * product.weight.element_size() if isinstance(product.weight, Tensor) else 0
    cap = model.cfg.output_logits_soft_cap
    if cap is None or cap <= 0:
        return linear, size
    return lambda x, scratch=None: cap * torch.tanh(linear(x, scratch) / cap), size
