"""Means of activations over prompts: of what each head writes, and of the residual stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations._positions import Positions, position_mask, position_names
from fvlens.activations._run import See, batches_within, watch
from fvlens.arguments import check_arguments
from fvlens.interventions import resid_hook, z_hook
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import Prompts, Template, get_template
from fvlens.results import Result
from fvlens.showing import named
from fvlens.suffix import plan_batch
from fvlens.types import as_whole


@dataclass(frozen=True, slots=True, repr=False)
class HeadMeans(Result):
    """Mean head outputs over prompts, with where they come from.

    Attributes:
        z: mean of ``blocks.{l}.attn.hook_z`` at ``positions``, in float32 on the CPU.
        positions: ``"last"`` or a token class; the mean over a class is over all its tokens in all prompts.
        n_prompts: number of prompts averaged.
        fingerprint: the model.
        relation, template, n_shots, labels, data_hash: the prompts. A template's name gives the built-in one.
        batch_size: prompts that ran together at most; None where that is not known.
    """

    FORMAT: ClassVar[str] = "fvlens-head-means-1"

    z: Float[Tensor, "layer head d_head"]
    positions: Positions
    n_prompts: int
    fingerprint: Fingerprint
    relation: str
    template: Template | str
    n_shots: int
    labels: str
    data_hash: str
    batch_size: int | None = None

    def __post_init__(self) -> None:
        mark = self.fingerprint
        expected = (mark.n_layers, mark.n_heads, mark.d_head)
        if self.z.shape != expected:
            raise ValueError(f"HeadMeans: expected z of shape {expected}, the model's, got {tuple(self.z.shape)}.")
        if self.positions not in position_names():
            raise ValueError(f"positions={self.positions!r}; expected one of {', '.join(position_names())}.")
        as_whole(self.n_prompts, "HeadMeans: n_prompts", 1)
        object.__setattr__(self, "template", get_template(self.template))

    def _line(self) -> str:
        return (
            f"{named(self.relation)}: {self.z.shape[0]} layers x {self.z.shape[1]} heads x {self.z.shape[2]}, mean "
            f"over {self.n_prompts} prompts at {self.positions}, model {self.fingerprint.name!r}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        norms = self.z.norm(dim=-1)
        rows = [(f"{layer}", f"{row.mean():.3f}", f"{row.max():.3f}") for layer, row in enumerate(norms)]
        return [("layer", "mean norm of heads", "largest"), *rows]


def mean_head_activations(
    model: Any,
    prompts: Prompts,
    *,
    positions: Positions = "last",
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadMeans:
    """Mean output of every head over prompts (the task mean of Todd et al.).

    ``mean z_{l,h} = (1 / N) sum_p z_{l,h}(p)``, with z the head's mixed value before the output projection. The mean is
    a running sum in float32, so that memory does not grow with the number of prompts.

    Args:
        model: the model.
        prompts: usually clean prompts (``labels="true"``), about 100 of them.
        positions: ``"last"`` (the paper's choice) or a token class, whose tokens are averaged.
        batch_size: prompts run together; by default chosen from what memory is free. It changes nothing but speed,
            memory and rounding, and is halved, with a warning, where memory runs out.
        progress: show a progress bar.

    Returns:
        :class:`HeadMeans`, ``.z [layer head d_head]`` on the CPU.

    Raises:
        ValueError: unknown ``positions``, or a prompt without such a token; ``batch_size`` below 1.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small")
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> means.z.shape == (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3, equation 3.
    """
    check_arguments(mean_head_activations, locals(), runs=True)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"mean_head_activations: expected batch_size >= 1, got {batch_size}.")
    cfg = model.cfg
    mask = position_mask(prompts, positions)

    def summed(z: Tensor, rows: slice) -> Tensor:
        return z[mask[rows].to(z.device)].float().sum(dim=0)  # of [token head d_head]

    total, most = _totals(
        model,
        prompts,
        {z_hook(layer): summed for layer in range(cfg.n_layers)},
        torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head),
        batch_size=batch_size,
        what="mean_head_activations",
        progress=progress,
    )
    return HeadMeans(
        z=total / mask.sum(),
        positions=positions,
        n_prompts=len(prompts),
        fingerprint=fingerprint(model),
        relation=prompts.relation,
        template=prompts.template,
        n_shots=prompts.n_shots,
        labels=prompts.labels,
        data_hash=prompts.data_hash,
        batch_size=most,
    )


def mean_residuals(
    model: Any,
    prompts: Prompts,
    *,
    layers: Sequence[int],
    batch_size: int | None = None,
    what: str = "mean_residuals",
) -> Float[Tensor, "layer d_model"]:
    """Mean residual stream after each of some layers, at the last token of the prompts; sums are in float64.

    Args:
        model: the model.
        prompts: the prompts.
        layers: the layers.
        batch_size: prompts run together; by default chosen from what memory is free.
        what: the function that the user called, for messages.

    Raises:
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.activations import mean_residuals
        >>> model = fvlens.load_model("rel-small")
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> mean_residuals(model, clean, layers=[1, 2]).shape == (2, model.cfg.d_model)
        True
    """
    different = list(dict.fromkeys(layers))
    total, _ = _totals(
        model,
        prompts,
        {resid_hook(layer): lambda resid, rows: resid[:, -1].double().sum(dim=0) for layer in different},
        torch.zeros(len(different), model.cfg.d_model, dtype=torch.float64),
        batch_size=batch_size,
        what=what,
        progress=False,
    )
    return (total / len(prompts)).float()[[different.index(layer) for layer in layers]]


def _totals(
    model: Any,
    prompts: Prompts,
    summed: dict[str, Callable[[Tensor, slice], Tensor]],
    total: Float[Tensor, "*axes"],
    *,
    batch_size: int | None,
    what: str,
    progress: bool,
) -> tuple[Float[Tensor, "*axes"], int]:
    """Sums over all prompts of what the functions, one a hook name, give for a batch; and the largest batch."""
    own = torch.zeros_like(total)  # of one batch; counts only when the batch is finished

    def kept(index: int, function: Callable[[Tensor, slice], Tensor]) -> See:
        def see(activation: Tensor, rows: slice) -> None:
            own[index] = function(activation, rows).cpu()

        return see

    most = 0

    def done(rows: slice) -> None:
        nonlocal most
        total.add_(own)
        most = max(most, rows.stop - rows.start)

    size = batch_size or plan_batch(model, n_pos=prompts.tokens.shape[1], n_prompts=len(prompts))
    seers = {name: kept(i, function) for i, (name, function) in enumerate(summed.items())}
    n = len(prompts)
    watch(model, prompts, seers, batches_within(n, size, n), done, what=what, progress=progress)
    return total, most
