"""Methods that train nothing: demonstrations in the prompt, and activation addition."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

from fvlens.activations import mean_residuals
from fvlens.evaluation import layer_scale_sweep
from fvlens.find import finished
from fvlens.models import fingerprint
from fvlens.prompts import Template, build_prompts, template_for
from fvlens.relations import Pairs
from fvlens.training._adaptations import Demonstrations, Steered
from fvlens.training._adapted import Baseline, drawn_seed, given_pairs, valid_pairs
from fvlens.vectors import FunctionVector

ADDED_SCALES = (0.5, 1.0, 2.0, 4.0)
"""Factors on the difference of means that :func:`act_add` tries."""


def few_shot(pairs: Pairs, *, n_shots: int = 10, relation: str | None = None, generator: torch.Generator) -> Baseline:
    """Prompting: demonstrations in front of each query, drawn from the pairs and never the query's own input.

    Args:
        pairs: the pairs to draw from.
        n_shots: demonstrations in each prompt.
        relation: name of the relation; by default that of ``pairs``.
        generator: draws the seed of the demonstrations.

    Returns:
        :class:`Baseline`.

    Raises:
        ValueError: ``n_shots`` below 1, or more than there are pairs.

    Example:
        >>> import torch, fvlens
        >>> pairs = fvlens.load_relation("antonym").pairs[:20]
        >>> few_shot(pairs, generator=torch.Generator().manual_seed(0)).method
        '10-shot prompting'

    References:
        Brown et al. 2020, arXiv:2005.14165, section 2.
    """
    began = time.monotonic()
    own, name = given_pairs("few_shot", pairs, relation)
    if not 1 <= n_shots <= len(own):
        raise ValueError(f"few_shot: expected n_shots in 1..{len(own)}, the number of pairs, got {n_shots}.")
    seed = drawn_seed(generator)
    return Baseline(
        method=f"{n_shots}-shot prompting",
        relation=name,
        change=Demonstrations(own, n_shots, seed),
        n_trainable=0,
        seconds=time.monotonic() - began,
        seed=seed,
    )


def act_add(
    model: Any,
    pairs: Pairs,
    *,
    layer: int | Sequence[int] | None = None,
    scales: Sequence[float | int] | None = None,
    valid: Pairs | None = None,
    n_shots: int = 10,
    template: Template | str = "qa",
    relation: str | None = None,
    batch_size: int | None = None,
    generator: torch.Generator,
) -> Baseline:
    """Activation addition: the difference of mean residual streams, with demonstrations and without.

    ``v = scale * (mean over pairs of resid_l[-1] after clean demonstrations - mean of it at the bare query)``, of the
    same queries. The source adds the difference of two prompts, from the front of the text on; the mean over prompts
    and the last token are our choice, so that it acts where a function vector does. Task vectors (arXiv:2310.15916)
    overwrite the residual stream with its mean after demonstrations instead of adding to it.

    Args:
        model: the model.
        pairs: the pairs; each is asked once, after ``n_shots`` of the others.
        layer: the vector is added after this layer; by default each of the model's. Of several, the best on ``valid``.
        scales: factors; by default 0.5, 1, 2 and 4, or 1 without ``valid``. Of several, the best on ``valid``.
        valid: validation pairs; for the choice among them see :attr:`~fvlens.evaluation.LayerScaleSweep.best_place`.
        n_shots: demonstrations in each prompt.
        template: how prompts are written.
        relation: name of the relation; by default that of ``pairs``.
        batch_size: prompts run together; by default chosen from what memory is free.
        generator: draws the demonstrations.

    Returns:
        :class:`Baseline`; its ``.vector`` is a ``FunctionVector`` with the scale in it.

    Raises:
        ValueError: no pairs, or too few for ``n_shots``; a layer outside the model; a scale that is not finite; several
            layers or scales without ``valid``; ``batch_size`` below 1.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> added = act_add(model, split.train[:20], layer=1, valid=split.valid, generator=g)
        >>> added.vector.kind, len(added.choices)
        ('difference of means', 4)

    References:
        Turner et al. 2023, arXiv:2308.10248, section 3; Hendel et al. 2023, arXiv:2310.15916, section 3.
    """
    began = time.monotonic()
    template = template_for(model, template)
    own, name = given_pairs("act_add", pairs, relation)
    asked = valid_pairs("act_add", valid)
    n_layers = model.cfg.n_layers
    layers = list(range(n_layers)) if layer is None else [layer] if isinstance(layer, int) else sorted(set(layer))
    outside = [one for one in layers if not 0 <= one < n_layers]
    if not layers or outside:
        raise ValueError(f"act_add: expected layers in 0..{n_layers - 1}, got {outside or layers}.")
    factors = [float(one) for one in ((ADDED_SCALES if asked else (1.0,)) if scales is None else scales)]
    if not factors or not all(map(torch.isfinite, torch.tensor(factors))):
        raise ValueError(f"act_add: expected finite scales, got {factors}.")
    if len(layers) * len(factors) > 1 and not asked:
        raise ValueError(
            f"act_add: {len(layers)} layers and {len(factors)} scales, but no validation pairs to choose by; give "
            "valid=, or one of each."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"act_add: expected batch_size of at least 1, got {batch_size}.")
    build = functools.partial(build_prompts, model, own, template=template, relation=name, generator=generator)
    clean, bare = build(n_shots=n_shots), build(n_shots=0)
    mean = functools.partial(mean_residuals, model, layers=layers, batch_size=batch_size, what="act_add")
    means = [mean(prompts) for prompts in (clean, bare)]
    mark = fingerprint(model)
    vectors = {
        one: FunctionVector(
            vector=difference,
            layer=one,
            heads=(),
            relation=name,
            fingerprint=mark,
            kind="difference of means",
            template=template,
            data_hash=clean.data_hash,
        )
        for one, difference in zip(layers, means[0] - means[1], strict=True)
    }
    best, factor, tried = layers[0], factors[0], []
    if asked:
        sweep = layer_scale_sweep(
            model, asked, vectors, scales=factors, template=template, relation=name, batch_size=batch_size,
            generator=torch.Generator(), progress=False,
        )  # fmt: skip
        best, factor = finished(sweep).best_place
        places = [(one, scale, sweep.at(one, scale)) for one in sweep.layers for scale in sweep.scales]
        tried = [(one, scale, found.top1, -found.answer_log_probability) for one, scale, found in places]
    return Baseline(
        method="activation addition",
        relation=name,
        change=Steered(vectors[best] * factor),
        n_trainable=0,
        seconds=time.monotonic() - began,
        choices=tuple(tried),
    )
