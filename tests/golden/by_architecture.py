"""Exact effects, scores and one training step on every architecture of the support matrix."""

import torch
from architectures import WORDS
from matrix import LAYER, Trained, effects, label_positions, loaded, means_of, prompts, seeded

import fvlens
from fvlens.types import Head
from golden.values import Values, curves, flat, heads, scores

OPTIONS = dict(prompts="matrix.prompts", layer=LAYER, n_heads=4, epochs=1, seed=1)


def made_heads(name: str, backend: str) -> list[Head]:
    found = fvlens.indirect_effects(
        loaded(name, backend), prompts(name).shuffled, means_of(name, backend), progress=False
    )
    return list(found.ranking[: OPTIONS["n_heads"]])


def effects_found(name: str, backend: str) -> Values:
    """At the last token of the answer's first token; at the demonstrations' labels of the whole answer."""
    cie, baseline, _ = effects(name, backend)
    labels = means_of(name, backend, positions="demonstration_label")
    label_cie, label_baseline, _ = effects(name, backend, means=labels, answer="whole")
    return {
        "answers": flat(prompts(name).shuffled.answer_tokens),
        "label positions": [place for row in label_positions(prompts(name).shuffled) for place in row],
        "top heads": heads(made_heads(name, backend)),
        "cie": flat(cie),
        "baseline": flat(baseline),
        "label cie": flat(label_cie),
        "label baseline": flat(label_baseline),
    }


def scored(name: str, backend: str) -> Values:
    """Bare queries under the vector after each layer."""
    model = loaded(name, backend)
    chosen = made_heads(name, backend)
    vector = fvlens.function_vector(model, means_of(name, backend), heads=chosen, layer=LAYER)
    sweep = fvlens.layer_sweep(model, WORDS, vector, generator=seeded(), progress=False)
    values: Values = {"vector": flat(vector.vector)} | scores("no vector", sweep.baseline)
    for layer, found in zip(sweep.layers, sweep.evaluations, strict=True):
        values |= scores(f"layer {layer}", found)
    return values


def trained(name: str, backend: str) -> Values:
    """Loss and gradient at a random vector; the losses before and after one step of Adam from there, and the vector."""
    model, made = loaded(name, backend), prompts(name).shuffled
    direction = torch.randn(model.cfg.d_model, generator=seeded(OPTIONS["seed"]))
    leaf = direction.clone().requires_grad_()
    with fvlens.inject(model, Trained(leaf, LAYER)):
        logits = model(made.tokens, attention_mask=made.attention_mask)[:, -1]
    losses = -logits.log_softmax(dim=-1).gather(1, made.answer_tokens[:, :1])[:, 0]
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    start = fvlens.function_vector(model, means_of(name, backend), heads=[(0, 0)], layer=LAYER)
    tuned = fvlens.finetune(
        model, WORDS[:5], init=start, valid=WORDS[5:], epochs=OPTIONS["epochs"], batch_size=None, generator=seeded(),
        progress=False,
    )  # fmt: skip
    return {"losses": flat(losses.detach()), "gradient": flat(gradient)} | curves("step", tuned)
