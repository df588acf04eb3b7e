"""Gradients of the answer's probability along the step from a head's output to its mean: AtP and IG."""

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.interventions import hooked, z_hook
from fvlens.screens._batch import Batch, Screening, gradients_of, gradients_on, wide


class Nudge:
    """A hook that moves z of one layer towards its means by a share, and adds zeros whose gradient is taken."""

    def __init__(self, batch: Batch, layer: int, shares: Float[Tensor, " copy"]) -> None:
        self.batch, self.layer, self.shares = batch, layer, shares
        self.zeros: Tensor | None = None

    def __call__(self, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos head d_head"]:
        n = self.batch.n_suffix
        own = z[:, -n:].unflatten(0, (len(self.batch), -1))  # [prompt copy suffix head d_head]
        where = self.batch.where[:, None].to(z.device)
        gap = self.batch.means[self.layer].to(z) - own.detach()
        gap = wide(torch.where(where, gap, torch.zeros_like(gap)))
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


def attribution_patching(
    screening: Screening, rows: slice
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """``(mean z - z~) . dP(y) / dz~`` of the prompts in ``rows``, and the answer's probability (see the module).

    Raises:
        RuntimeError: the hook of a layer never ran, or what it changes has no effect.
    """
    with gradients_on():
        batch = Batch(screening, rows)
        nudges = [Nudge(batch, layer, torch.zeros(1)) for layer in range(screening.model.cfg.n_layers)]
        with hooked(screening.model, {z_hook(nudge.layer): nudge for nudge in nudges}):
            logs = batch.log_prob(batch.logits(0))
        found = gradients_of(logs, {z_hook(nudge.layer): nudge.zeros for nudge in nudges})
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
    with gradients_on():
        batch = Batch(screening, rows)
        for layer in range(screening.model.cfg.n_layers):
            total = torch.zeros(len(batch), screening.model.cfg.n_heads)
            for part in shares.split(at_once):
                nudge = Nudge(batch, layer, part)
                with hooked(screening.model, {z_hook(layer): nudge}):
                    logs = batch.log_prob(batch.logits(layer, len(part)))
                (g,) = gradients_of(logs, {z_hook(layer): nudge.zeros})
                scale = logs.detach().exp().unflatten(0, (len(batch), -1)) / n_steps
                total += nudge.score(g, scale).float().cpu()
            scores.append(total)
        base = batch.base()
    return torch.stack(scores, dim=1), base.float().cpu()
