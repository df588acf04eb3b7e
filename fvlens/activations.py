"""Task-mean head outputs: what each head writes, on average, over clean in-context prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.interventions import hooked, z_hook
from fvlens.models import Fingerprint, fingerprint, model_device
from fvlens.prompts import Prompts, Template, TokenClass, get_template
from fvlens.suffix import in_batches, open_reader, plan_batch

Positions = str
"""``"last"`` or the lower-case name of a :class:`~fvlens.prompts.TokenClass`, such as ``"demonstration_label"``."""


def position_names() -> tuple[str, ...]:
    """Names that ``positions=`` takes."""
    return ("last", *(kind.name.lower() for kind in TokenClass if kind is not TokenClass.PADDING))


def position_mask(prompts: Prompts, positions: Positions) -> Bool[Tensor, "prompt pos"]:
    """Which tokens ``positions`` names.

    Raises:
        ValueError: no such position name, or a prompt has no such token.
    """
    if positions not in position_names():
        raise ValueError(f"positions={positions!r}; expected one of {', '.join(position_names())}.")
    if positions == "last":
        mask = torch.zeros_like(prompts.tokens, dtype=torch.bool)
        mask[:, -1] = True
        return mask
    mask = prompts.token_classes == int(TokenClass[positions.upper()])
    empty = int((~mask.any(dim=1)).sum())
    if empty:
        raise ValueError(
            f"positions={positions!r}: {empty} of {len(prompts)} prompts have no such token "
            f"(they have {prompts.n_shots} demonstrations in template {prompts.template.name!r})."
        )
    return mask


@dataclass(frozen=True, slots=True)
class HeadMeans:
    """Mean head outputs over prompts, with where they come from.

    Attributes:
        z: mean of ``blocks.{l}.attn.hook_z`` at ``positions``, in float32 on the CPU.
        positions: ``"last"`` or a token class; the mean over a class is over all its tokens in all prompts.
        n_prompts: number of prompts averaged.
        fingerprint: the model.
        relation, template, n_shots, labels, data_hash: the prompts. A template's name gives the built-in one.
    """

    z: Float[Tensor, "layer head d_head"]
    positions: Positions
    n_prompts: int
    fingerprint: Fingerprint
    relation: str
    template: Template | str
    n_shots: int
    labels: str
    data_hash: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))


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
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"mean_head_activations: expected batch_size >= 1, got {batch_size}.")
    cfg = model.cfg
    mask = position_mask(prompts, positions)
    device = model_device(model)
    total = torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head)
    own = torch.zeros_like(total)  # of one batch; counts only when the batch is finished
    chosen = torch.empty(0)

    def add(layer: int) -> Callable[[Tensor], None]:
        def see(z: Tensor) -> None:
            picked = z[chosen.to(z.device)]  # [token head d_head]
            own[layer] = picked.float().sum(dim=0).cpu()

        return see

    def run(rows: slice) -> int:
        nonlocal chosen
        chosen = mask[rows]
        tokens, attention_mask = prompts.tokens[rows].to(device), prompts.attention_mask[rows].to(device)
        open_reader(model, len(tokens), keep=False).read(tokens, attention_mask, n_read=1)
        return len(tokens)

    sums = {z_hook(layer): add(layer) for layer in range(cfg.n_layers)}
    size = batch_size or plan_batch(model, n_pos=prompts.tokens.shape[1])
    with (
        torch.inference_mode(),
        hooked(model, sums),
        tqdm(total=len(prompts), desc="mean head outputs", disable=not progress, leave=False) as bar,
    ):
        for n_done in in_batches(run, len(prompts), size, what="mean_head_activations"):
            total += own
            bar.update(n_done)
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
    )
