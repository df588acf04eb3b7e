"""Gradient screens: scores of all heads from a few backward passes, to choose which heads are worth patching exactly.

Three scores, all of a prompt p~, an answer y and a head (l, h). ``z~`` is the head's output on the prompt, ``mean z``
its task mean.

``atp`` (attribution patching)
    ``(mean z - z~) . dP(y) / dz~``, the linear part of the causal indirect effect: one forward and one backward pass
    for all heads.
``ig`` (integrated gradients)
    ``(mean z - z~) . (1/m) sum_i dP(y) / dz`` at m points of the straight line from z~ to mean z, all heads of ONE
    layer moved along it together: a backward pass a layer and point. The points are the midpoints ``(i - 1/2) / m`` of
    m equal steps [choice], whose error falls with the square of m. Summed over the heads of a layer, the score goes to
    the effect of replacing the whole layer (completeness). That is not the effect of one head alone.
``lrp`` (relevance of attention to the demonstrations' labels)
    ``R = A * dlogit_y / dA`` of the attention pattern A, ``sum_k max(0, R[last, k])`` over the label tokens k. The
    backward pass is made linear by the rules of AttnLRP, see :func:`relevance_rules`. Unit: logits, not probability.

All three need the gradient at the patched positions only, which do not reach earlier positions. So a prompt runs once
without a gradient, and only its suffix again with one, through the model's own blocks (``kv``); where the model cannot
do that, whole prompts are run with gradients (``naive``).

Gradients are taken of added zeros at the hooks, never of parameters: no ``.grad`` and no ``requires_grad`` changes.
What is differentiated is ``log P``, times P afterwards, so that small probabilities survive half precision.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.interventions import hooked, lock, z_hook
from fvlens.metrics import log_probability
from fvlens.models import model_device
from fvlens.suffix import Route, Slices, open_reader, plan_slices, run_prefix
from fvlens.types import is_bridge


@dataclass(frozen=True, slots=True)
class Screening:
    """Prompts to be screened.

    Attributes:
        model: the model.
        tokens: prompts, left-padded, with the answer's tokens (all but the last) appended where several are scored.
        mask: 1 for real tokens, 0 for padding.
        targets: the next token wanted at each position, -1 where none is scored.
        patched: the positions at which a head's output would be replaced.
        means: the replacement of each head.
        path: ``"kv"`` (gradients of suffixes) or ``"naive"`` (of whole prompts).
    """

    model: Any
    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, "prompt pos"]
    patched: Bool[Tensor, "prompt pos"]
    means: Float[Tensor, "layer head d_head"]
    path: Route

    @property
    def n_suffix(self) -> int:
        """Positions from the first patched one on."""
        return self.tokens.shape[1] - int(self.patched.any(dim=0).nonzero()[0])

    def slices(self, n_copies: int, max_memory: int | None) -> Slices:
        """How many prompts, and copies of each, go through together."""
        n_pos = self.tokens.shape[1]
        n_run = self.n_suffix if self.path == "kv" else n_pos
        return plan_slices(
            self.model,
            n_pos=n_pos,
            n_suffix=n_run,
            n_variants=n_copies,
            path=self.path,
            max_memory=max_memory,
            gradients=True,
            n_prompts=len(self.tokens),
        )


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """Let gradients flow in this block, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class _Batch:
    """Some prompts of a screening, ready to be run with gradients."""

    def __init__(self, screening: Screening, rows: slice) -> None:
        self.model, self.path, self.n_suffix = screening.model, screening.path, screening.n_suffix
        device = model_device(self.model)
        # copies: tensors made under inference_mode cannot take part in a gradient
        self.tokens, self.mask = screening.tokens[rows].to(device).clone(), screening.mask[rows].to(device).clone()
        wanted = screening.targets[rows].to(device).clone()
        first = int((wanted >= 0).any(dim=0).nonzero()[0])
        self.wanted = wanted[:, first:]  # [prompt scored]
        self.where = screening.patched[rows, -self.n_suffix :].to(device).clone()[..., None, None]
        self.means = screening.means.to(device, self.model.cfg.dtype).clone()
        self.run = None
        if self.path == "kv":
            with torch.no_grad():
                self.run = run_prefix(self.model, self.tokens, self.mask, n_suffix=self.n_suffix, path="kv")

    def __len__(self) -> int:
        return len(self.tokens)

    def logits(self, layer: int, n_copies: int = 1) -> Float[Tensor, "row scored d_vocab"]:
        """Logits at the scored positions of ``n_copies`` of each prompt, run from ``layer`` (or further below)."""
        n_scored = self.wanted.shape[1]
        if self.run is None:
            tokens, mask = (x.repeat_interleave(n_copies, dim=0) for x in (self.tokens, self.mask))
            return open_reader(self.model, len(tokens), keep=False).read(tokens, mask, n_read=n_scored)
        resid = self.run.resid_before(layer)[:, None].expand(-1, n_copies, -1, -1)
        return self.run.logits(self.run.continue_from(layer, resid)[:, :, -n_scored:].flatten(0, 1))

    def log_prob(self, logits: Float[Tensor, "row scored d_vocab"]) -> Float[Tensor, " row"]:
        """Log-probability of each row's answer, in nats."""
        wanted = self.wanted.repeat_interleave(len(logits) // len(self), dim=0)
        logs = log_probability(logits, wanted.clamp(min=0))
        return torch.where(wanted < 0, torch.zeros_like(logs), logs).sum(dim=-1)

    def base(self) -> Float[Tensor, " batch"]:
        """The answer's probability without any patch."""
        with torch.no_grad():
            return self.log_prob(self.logits(self.model.cfg.n_layers - 1)).exp()


class _Nudge:
    """A hook that moves z of one layer towards its means by a share, and adds zeros whose gradient is taken."""

    def __init__(self, batch: _Batch, layer: int, shares: Float[Tensor, " copy"]) -> None:
        self.batch, self.layer, self.shares = batch, layer, shares
        self.zeros: Tensor | None = None

    def __call__(self, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos head d_head"]:
        n = self.batch.n_suffix
        own = z[:, -n:].unflatten(0, (len(self.batch), -1))  # [prompt copy suffix head d_head]
        where = self.batch.where[:, None].to(z.device)
        gap = self.batch.means[self.layer].to(z) - own.detach()
        gap = _wide(torch.where(where, gap, torch.zeros_like(gap)))
        self.gap = gap[:, 0]
        self.zeros = torch.zeros_like(gap, requires_grad=True)
        share = self.shares.to(gap)[:, None, None, None]
        moved = own + (share * gap + self.zeros).to(z.dtype)
        return torch.cat([z[:, :-n], moved.flatten(0, 1)], dim=1)

    def score(
        self, gradient: Float[Tensor, "batch copy suffix head d_head"], scale: Float[Tensor, "batch copy"]
    ) -> Float[Tensor, "batch head"]:
        """``gap . gradient`` with the gradient of P, summed over copies."""
        gradient = torch.where(self.batch.where[:, None].to(gradient.device), gradient, torch.zeros_like(gradient))
        total = torch.einsum("pcshe,pc->pshe", gradient, scale.to(gradient))
        return torch.einsum("pshe,pshe->ph", self.gap, total)


def _gradients(outcome: Tensor, zeros: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """Gradient of a sum over rows with respect to the zeros that were added at each hook."""
    silent = next((name for name, leaf in zeros.items() if leaf is None), None)
    if silent is not None:
        raise RuntimeError(
            f"indirect_effects: the hook {silent} never ran, so there is no gradient to take; use method='exact'."
        )
    leaves = [leaf for leaf in zeros.values() if leaf is not None]
    found = torch.autograd.grad(outcome.sum(), leaves, allow_unused=True)
    for name, gradient in zip(zeros, found, strict=True):
        if gradient is None:
            raise RuntimeError(
                f"indirect_effects: this model only shows the activation at {name}, what a hook changes there has no "
                "effect, so there is no gradient to take; use another method, or the model as a HookedTransformer."
            )
    return found


def attribution_patching(
    screening: Screening, rows: slice
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """``(mean z - z~) . dP(y) / dz~`` of the prompts in ``rows``, and the answer's probability (see the module).

    Raises:
        RuntimeError: the hook of a layer never ran, or what it changes has no effect.
    """
    with _gradients_on():
        batch = _Batch(screening, rows)
        nudges = [_Nudge(batch, layer, torch.zeros(1)) for layer in range(screening.model.cfg.n_layers)]
        with hooked(screening.model, {z_hook(nudge.layer): nudge for nudge in nudges}):
            logs = batch.log_prob(batch.logits(0))
        found = _gradients(logs, {z_hook(nudge.layer): nudge.zeros for nudge in nudges})
        base = logs.detach().exp()
        scores = [nudge.score(g, base[:, None]).cpu() for nudge, g in zip(nudges, found, strict=True)]
    return torch.stack(scores, dim=1).float(), base.float().cpu()


def integrated_gradients(
    screening: Screening, rows: slice, *, n_steps: int, at_once: int
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """The gradient averaged over ``n_steps`` midpoints between z~ and mean z, ``at_once`` of them in one batch.

    See the module for the formula.

    Raises:
        RuntimeError: the hook of a layer never ran, or what it changes has no effect.
    """
    shares = (torch.arange(n_steps) + 0.5) / n_steps
    scores = []
    with _gradients_on():
        batch = _Batch(screening, rows)
        for layer in range(screening.model.cfg.n_layers):
            total = torch.zeros(len(batch), screening.model.cfg.n_heads)
            for part in shares.split(at_once):
                nudge = _Nudge(batch, layer, part)
                with hooked(screening.model, {z_hook(layer): nudge}):
                    logs = batch.log_prob(batch.logits(layer, len(part)))
                (g,) = _gradients(logs, {z_hook(layer): nudge.zeros})
                scale = logs.detach().exp().unflatten(0, (len(batch), -1)) / n_steps
                total += nudge.score(g, scale).float().cpu()
            scores.append(total)
        base = batch.base()
    return torch.stack(scores, dim=1), base.float().cpu()


def relevance(
    screening: Screening, rows: slice, keys: Bool[Tensor, "prompt pos"], *, rules: bool = True
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"], str]:
    """``sum_k max(0, A * dlogit_y / dA)`` at the last query position over the key positions ``keys``.

    Args:
        screening: the prompts; one target each, at the last position.
        rows: which of them.
        keys: the key positions that are summed over.
        rules: make the backward pass linear by :func:`relevance_rules`; without it, the score is pattern times plain
            gradient.

    Returns:
        The scores in logits, the answer's probability, and which rules could not be applied (empty if all were).

    Raises:
        RuntimeError: the hook of a layer's attention pattern never ran, or what it changes has no effect, as where a
            TransformerBridge leaves attention to the model's own code.
    """
    model = screening.model
    with _gradients_on():
        batch = _Batch(screening, rows)
        chosen = keys[rows].clone()[:, None].to(model_device(model))
        found = relevance_rules(model) if rules else Rules()
        looks = {pattern_hook(layer): _Look() for layer in range(model.cfg.n_layers)}
        edits = dict(found.edits)
        for name, look in looks.items():
            edits[name] = _chained(look, edits[name]) if name in edits else look
        with _quiet_norms(), hooked(model, edits):
            logits = batch.logits(0)
        index = batch.wanted[:, -1, None]
        logit = logits[:, -1].gather(-1, index)
        gradient = _gradients(logit, {name: look.zeros for name, look in looks.items()})
        scores = []
        for look, g in zip(looks.values(), gradient, strict=True):
            where = chosen.to(g.device)
            scores.append(torch.where(where, look.pattern * g, torch.zeros_like(g)).clamp(min=0).sum(dim=-1).cpu())
        base = batch.log_prob(logits.detach()).exp()
    return torch.stack(scores, dim=1).float(), base.float().cpu(), found.missing()


def pattern_hook(layer: int) -> str:
    """Name of the attention pattern of all heads of a block."""
    return f"blocks.{layer}.attn.hook_pattern"


class _Look:
    """A hook that keeps the last query's attention pattern and adds zeros to it, whose gradient is taken."""

    zeros: Tensor | None = None

    def __call__(self, pattern: Float[Tensor, "row head query key"]) -> Float[Tensor, "row head query key"]:
        self.pattern = _wide(pattern[:, :, -1].detach())
        self.zeros = torch.zeros_like(self.pattern, requires_grad=True)
        last = pattern[:, :, -1:] + self.zeros[:, :, None].to(pattern.dtype)
        return torch.cat([pattern[:, :, :-1], last], dim=2)


def _chained(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor | None]) -> Any:
    return lambda activation: second(first(activation))


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
        product = _wide(out if bias is None else out - bias.detach())
        for x in factors:
            own = _wide(x.detach())
            ratio = torch.where(own == 0, torch.zeros_like(own), product / torch.where(own == 0, 1, own))
            out = out + (x - x.detach()) * (ratio / len(factors)).to(x.dtype)
        return out

    for end in fronts:
        rules.edits[start + end] = see(end)
    rules.add("activation functions", start + behind, linear)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_norm_notice = "A forward hook edited hook_scale(?#fvlens)"  # a pattern of our own: the user's filters stay
_quiet_users = 0


@contextlib.contextmanager
def _quiet_norms() -> Iterator[None]:
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


# --- the table ---


@dataclass(frozen=True, slots=True)
class Request:
    """What a screen is asked, beside the prompts.

    Attributes:
        n_steps: points of a path, for those that go along one.
        at_once: copies of each prompt that may go through together.
        keys: the demonstrations' label tokens, for those that look at them.
    """

    n_steps: int
    at_once: int
    keys: Bool[Tensor, "prompt pos"] | None


Scored = tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"], str]
"""Scores, the answer's probability, and what must be said about them (empty if nothing)."""


@dataclass(frozen=True, slots=True)
class Screen:
    """One way to score all heads by gradients.

    Attributes:
        title: name of its mean over prompts.
        short: the same beside a colour scale.
        score: scores the prompts of some rows.
        by_steps: whether it takes ``n_steps``, all of which may go through together.
        by_labels: whether it looks at the demonstrations' label tokens from the last token, in logits of the answer's
            first token.
        unit: of its scores.
    """

    title: str
    short: str
    score: Callable[[Screening, slice, Request], Scored]
    by_steps: bool = False
    by_labels: bool = False
    unit: str = "probability"


def _attribution_patching(screening: Screening, rows: slice, request: Request) -> Scored:
    return *attribution_patching(screening, rows), ""


def _integrated_gradients(screening: Screening, rows: slice, request: Request) -> Scored:
    return *integrated_gradients(screening, rows, n_steps=request.n_steps, at_once=request.at_once), ""


def _relevance(screening: Screening, rows: slice, request: Request) -> Scored:
    assert request.keys is not None
    scores, baseline, missing = relevance(screening, rows, request.keys)
    note = "AttnLRP rules for norms, activation functions, gates and attention products"
    return scores, baseline, note + (f"; plain gradient instead: {missing}" if missing else "")


SCREENS: dict[str, Screen] = {
    "atp": Screen("Attribution patching", "AtP", _attribution_patching),
    "ig": Screen("Integrated gradients", "IG", _integrated_gradients, by_steps=True),
    "lrp": Screen("Attention relevance (LRP, in logits)", "LRP relevance", _relevance, by_labels=True, unit="logits"),
}
"""The screens, by the name that ``method=`` gives them."""
