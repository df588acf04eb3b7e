"""Norms that are frozen: what is left of them is linear, so that parts of their input can be followed through them.

A LayerNorm or RMSNorm is ``norm(x) = gain * C x / s(x) + bias``, where C takes the mean away (LayerNorm) or nothing
(RMSNorm) and the scale s(x) is a number a token. With s held at its value on one input, parts of that input have parts
of the output that add up. Gain, bias and kind are found by trying the module out, since every library keeps them in its
own way (Gemma's gain is one more than its weight); what cannot be written like this is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_PROBE = 64.0
"""Size of the input that a norm is tried out on: so large that what is added under the root does not matter."""


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """A norm with its scale held, a token a row.

    Attributes:
        gain, bias: of the norm.
        centred: whether it takes the mean away first.
        scale: what it divides each row by.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    scale: Float[Tensor, " row"]

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The frozen norm of its own input."""
        return self._centre(x) * self.gain / self.scale[:, None] + self.bias

    def back(self, direction: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The direction of the input along which the output moves along ``direction``: the transpose."""
        return self._centre(direction * self.gain) / self.scale[:, None]

    def _centre(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


def freeze(norm: Any, x: Float[Tensor, "row d_model"]) -> FrozenNorm:
    """A norm, frozen at its values on the rows of ``x``; all in float64.

    ``FrozenNorm(x)`` equals the norm of ``x`` if it is a LayerNorm or an RMSNorm; for the caller to check.
    """
    n = x.shape[-1]
    x = x.double()
    if isinstance(norm, torch.nn.Identity):
        return FrozenNorm(x.new_ones(n), x.new_zeros(n), False, x.new_ones(len(x)))
    probe = torch.where(torch.arange(n) % 2 == 0, _PROBE, -_PROBE).double()
    probe -= probe.mean()
    above, below, moved, *outputs = applied(norm, torch.cat([probe[None], -probe[None], probe[None] + _PROBE, x]))
    bias = (above + below) / 2  # the norm is odd but for its bias
    gain = (above - bias) * probe.square().mean().sqrt() / probe
    centred = bool((moved - above).abs().max() < 1e-2 * (above - bias).abs().max())
    plain = FrozenNorm(gain, bias, centred, x.new_ones(len(x)))(x) - bias
    scale = plain.square().sum(dim=-1) / (plain * (torch.stack(outputs) - bias)).sum(dim=-1)
    return FrozenNorm(gain, bias, centred, scale)


def applied(norm: Callable[[Tensor], Tensor], x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """A module of the model on rows, in the module's own precision; float64 on the CPU."""
    parameter = next(iter(getattr(norm, "parameters", list)()), None)
    own = x if parameter is None else x.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        return norm(own[None])[0].double().cpu()
