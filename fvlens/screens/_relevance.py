"""Relevance of attention to the demonstrations' labels."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.interventions import hooked
from fvlens.models import model_device
from fvlens.screens._batch import Batch, Screening, gradients_of, gradients_on, wide
from fvlens.screens._rules import Rules, quiet_norms, relevance_rules


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
    with gradients_on():
        batch = Batch(screening, rows)
        chosen = keys[rows].clone()[:, None].to(model_device(model))
        found = relevance_rules(model) if rules else Rules()
        looks = {pattern_hook(layer): _Look() for layer in range(model.cfg.n_layers)}
        edits = dict(found.edits)
        for name, look in looks.items():
            edits[name] = _chained(look, edits[name]) if name in edits else look
        with quiet_norms(), hooked(model, edits):
            logits = batch.logits(0)
        index = batch.wanted[:, -1, None]
        logit = logits[:, -1].gather(-1, index)
        gradient = gradients_of(logit, {name: look.zeros for name, look in looks.items()})
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
        self.pattern = wide(pattern[:, :, -1].detach())
        self.zeros = torch.zeros_like(self.pattern, requires_grad=True)
        last = pattern[:, :, -1:] + self.zeros[:, :, None].to(pattern.dtype)
        return torch.cat([pattern[:, :, :-1], last], dim=2)


def _chained(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor | None]) -> Any:
    return lambda activation: second(first(activation))
