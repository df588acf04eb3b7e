"""The rules of AttnLRP, by which a backward pass goes as if the model were linear."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fvlens.interventions import lock
from fvlens.screens._batch import wide
from fvlens.types import is_bridge


@dataclass(frozen=True, slots=True)
class Rules:
    """Hooks that leave every activation as it is and change its backward pass.

    Attributes:
        edits: hook name -> function.
        expected: rule -> the hooks it stands on.
        applied: the hooks at which a rule was applied so far.
    """

    edits: dict[str, Callable[[Tensor], Tensor | None]] = field(default_factory=dict)
    expected: dict[str, list[str]] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)

    def add(self, rule: str, name: str, edit: Callable[[Tensor], Tensor | None]) -> None:
        """Apply a rule at a hook."""

        def apply(activation: Tensor) -> Tensor | None:
            result = edit(activation)
            if result is not None:
                self.applied.add(name)
            return result

        self.expected.setdefault(rule, []).append(name)
        self.edits[name] = apply

    def missing(self) -> str:
        """Rules that were not applied everywhere, and where; empty if all were."""
        lacks = []
        for rule, names in self.expected.items():
            missed = [name for name in names if name not in self.applied]
            if missed:
                lacks.append(f"{rule} at {missed[0]}" + (f" and {len(missed) - 1} more" if len(missed) > 1 else ""))
        return "; ".join(lacks)


def relevance_rules(model: Any) -> Rules:
    """The rules of AttnLRP as hooks: a backward pass in which the model is linear, its activations unchanged.

    1. *Norms*: the scale of a LayerNorm or RMSNorm is a constant (``hook_scale`` detached).
    2. *Activation functions*: ``a = f(x)`` counts as ``(f(x) / x) x`` with the ratio constant; 0 where x is 0.
    3. *Products*: both factors get half the gradient: gate and up-projection of a gated MLP (after rule 2), attention
       pattern and values, queries and keys.
    4. *Softmax*: its plain gradient, which is AttnLRP's rule for it. Soft caps too keep their plain gradient [choice].

    What is not found in a model (a router and the experts it picks, an MLP that shows no hooks) keeps its plain
    gradient; :meth:`Rules.missing` says so after a pass.

    References:
        Achtibat et al. 2024, arXiv:2402.05602, section 3 (AttnLRP); arXiv:2606.05079 (relevance of attention heads).
    """
    cfg = model.cfg
    points = model.hook_dict
    rules = Rules()
    norms = [name for name in points if name.endswith(".hook_scale")]
    if cfg.normalization_type is not None:
        wanted = [*(f"blocks.{layer}.ln1.hook_scale" for layer in range(cfg.n_layers)), "ln_final.hook_scale"]
        rules.expected["norm scales"] = [name for name in wanted if name not in points]
    for name in norms:
        rules.add("norm scales", name, Tensor.detach)
    for layer in range(cfg.n_layers):
        for end in ("q", "k", "v", "pattern"):
            name = f"blocks.{layer}.attn.hook_{end}"
            if name in points:
                rules.add("attention products", name, _halved)
            else:
                rules.expected.setdefault("attention products", []).append(name)
        if not getattr(cfg, "attn_only", False):
            _add_activation_rule(rules, model, layer)
    return rules


def _halved(x: Tensor) -> Tensor:
    """The same values with half the gradient."""
    half = x * 0.5
    return half + half.detach()


def _add_activation_rule(rules: Rules, model: Any, layer: int) -> None:
    """Rules 2 and 3 at one MLP, between its hooks before and behind the activation function."""
    points, bridge = model.hook_dict, is_bridge(model)
    start = f"blocks.{layer}.mlp."
    behind = "hook_mid" if start + "hook_mid" in points else "hook_post"  # hook_post then lies behind one more norm
    seen: dict[str, Tensor] = {}

    def see(end: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            seen[end] = activation

        return keep

    fronts = [end for end in ("hook_pre", "hook_pre_linear") if start + end in points]
    gated = bool(getattr(model.cfg, "gated_mlp", False))
    # a bridge may call an MLP's own input and output by these names, where it cannot look inside (routed experts)
    inside = not bridge or getattr(points.get(start + behind), "name", "") == start + "out.hook_in"
    if start + behind not in points or len(fronts) != 1 + gated or not inside:
        rules.expected.setdefault("activation functions", []).append(start + behind)
        return
    # HookedTransformer adds the bias b_in of a gated MLP behind the product
    bias = getattr(model.blocks[layer].mlp, "b_in", None) if gated and not bridge else None

    def linear(post: Tensor) -> Tensor | None:
        factors = [seen.pop(end) for end in fronts if end in seen]
        if len(factors) != len(fronts):
            return None
        out = post.detach()
        product = wide(out if bias is None else out - bias.detach())
        for x in factors:
            own = wide(x.detach())
            ratio = torch.where(own == 0, torch.zeros_like(own), product / torch.where(own == 0, 1, own))
            out = out + (x - x.detach()) * (ratio / len(factors)).to(x.dtype)
        return out

    for end in fronts:
        rules.edits[start + end] = see(end)
    rules.add("activation functions", start + behind, linear)


_norm_notice = "A forward hook edited hook_scale(?#fvlens)"  # a pattern of our own: the user's filters stay

_quiet_users = 0


@contextlib.contextmanager
def quiet_norms() -> Iterator[None]:
    """Hide TransformerBridge's notice that a norm is computed from its edited scale.

    Filters of warnings belong to the process, and ``warnings.catch_warnings`` puts back a whole list, another thread's
    filters included. So one filter goes in with the first block that is open and out with the last.
    """
    global _quiet_users
    with lock:
        _quiet_users += 1
        warnings.filterwarnings("ignore", message=_norm_notice)
    try:
        yield
    finally:
        with lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                filters: Any = warnings.filters
                filters[:] = [entry for entry in filters if not _is_norm_notice(entry)]


def _is_norm_notice(entry: tuple[Any, ...]) -> bool:
    return getattr(entry[1], "pattern", None) == _norm_notice
