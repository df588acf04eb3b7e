"""Prompts that are run with gradients, from the first edited layer on."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.metrics import log_probability
from fvlens.models import model_device
from fvlens.suffix import Route, Slices, open_reader, plan_slices, run_prefix


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
def gradients_on() -> Iterator[None]:
    """Let gradients flow in this block, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class Batch:
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


def gradients_of(outcome: Tensor, zeros: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
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


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
