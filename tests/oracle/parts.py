"""What each part of a plain Hugging Face model writes to a logit difference, prompt by prompt, in float64.

The final norm is written out by its kind, with its scale held at the prompt's own value; a part goes through it and the
unembedding by itself. Nothing is tried out, and nothing is divided up: every part is what its module put out.
"""

import contextlib
import copy

import torch

from oracle.hf import blocks, heads_seen, only_child, output_projections, projection_weight

FINAL = ("ln_f", "final_layer_norm", "final_layernorm", "norm")


def double(model):
    """The model in float64."""
    return copy.deepcopy(model).double()


def body(model):
    """What holds embeddings, blocks and final norm."""
    return next(getattr(model, name) for name in ("transformer", "gpt_neox", "model") if hasattr(model, name))


def frozen(norm, x):
    """How a part of x goes through the norm of x with its scale held; and what the norm adds by itself."""
    kind, weight = type(norm).__name__, getattr(norm, "weight", None)
    if "RMSNorm" in kind:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        scale = (x.square().mean() + eps).sqrt()
        gain = 1 + weight if kind.startswith("Gemma") else weight
        return lambda part: part / scale * gain, torch.zeros_like(x)
    eps = norm.eps if hasattr(norm, "eps") else 1e-5  # OLMo's has no parameters at all
    scale = ((x - x.mean()).square().mean() + eps).sqrt()
    gain = torch.ones_like(x) if weight is None else weight
    bias = torch.zeros_like(x) if getattr(norm, "bias", None) is None else norm.bias
    return lambda part: (part - part.mean()) / scale * gain, bias


@contextlib.contextmanager
def outputs(modules, kept):
    """Keep what modules put out at the last token, under their names."""

    def keeping(name):
        def hook(module, args, output):
            kept[name] = (output if isinstance(output, torch.Tensor) else output[0])[0, -1].detach()

        return hook

    handles = [module.register_forward_hook(keeping(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def direct_effects(model, row, answer, foils):
    """Effects of heads [layer head], of MLPs [layer], the others by name, and the logit difference before any cap.

    ``model`` is one of :func:`double`. The difference is that of the answer's logit and the mean of the foils'.
    """
    layers, top, final = blocks(model), body(model), only_child(body(model), FINAL)
    post = [getattr(block, "post_feedforward_layernorm", None) for block in layers]  # Gemma 2
    norms = [block.post_attention_layernorm if p is not None else None for block, p in zip(layers, post, strict=True)]
    modules = {("mlp", i): p or block.mlp for i, (block, p) in enumerate(zip(layers, post, strict=True))}
    modules |= {("out", i): projection for i, projection in enumerate(output_projections(model))}
    if hasattr(top, "wpe"):
        modules["positions"] = top.wpe
    kept, zs, last = {}, {}, {}
    see_final = final.register_forward_pre_hook(lambda module, args: last.update(x=args[0][0, -1]))
    first = layers[0].register_forward_pre_hook(lambda module, args: last.update(start=args[0][0, -1]))
    try:
        with outputs(modules, kept), heads_seen(model, range(len(layers)), lambda i, z: zs.update({i: z[-1]})):
            logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
    finally:
        see_final.remove()
        first.remove()
    through, final_bias = frozen(final, last["x"])
    unembed = model.get_output_embeddings()
    weights = torch.zeros(len(logits), dtype=torch.float64)
    weights[answer] += 1
    weights[foils] -= 1 / len(foils)
    direction = weights @ unembed.weight
    heads = torch.zeros(len(layers), len(zs[0]), dtype=torch.float64)
    biases = torch.zeros((), dtype=torch.float64)
    for i, norm in enumerate(norms):
        after, extra = (lambda part: part, 0.0) if norm is None else frozen(norm, kept["out", i])
        for j, z in enumerate(zs[i]):
            heads[i, j] = through(after(z @ projection_weight(model, i)[j])) @ direction
        bias = output_projections(model)[i].bias
        added = torch.zeros_like(last["x"]) + extra + (0 if bias is None else after(bias))
        biases += through(added) @ direction
    mlps = torch.stack([through(kept["mlp", i]) @ direction for i in range(len(layers))])
    positions = kept.get("positions", torch.zeros_like(last["x"]))
    others = {
        "embedding": through(last["start"] - positions) @ direction,
        "positions": through(positions) @ direction,
        "attention biases": biases,
        "final norm's bias": final_bias @ direction,
        "unembedding's bias": weights @ (unembed.bias if unembed.bias is not None else torch.zeros_like(logits)),
    }
    cap = getattr(model.config, "final_logit_softcapping", None)
    uncapped = logits if cap is None else cap * torch.atanh(logits / cap)
    return heads, mlps, others, uncapped[answer] - uncapped[foils].mean()


@torch.no_grad()
def lens(model, row):
    """Probabilities [layer pos d_vocab] by the final norm and unembedding on the output of every block."""
    final, kept = only_child(body(model), FINAL), {}

    def keeping(i):
        return lambda module, args, output: kept.update({i: output if isinstance(output, torch.Tensor) else output[0]})

    handles = [block.register_forward_hook(keeping(i)) for i, block in enumerate(blocks(model))]
    try:
        model(torch.tensor([row]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = [model.get_output_embeddings()(final(kept[i][0])) for i in range(len(kept))]
    return torch.stack([x if cap is None else cap * torch.tanh(x / cap) for x in logits]).softmax(dim=-1)


@torch.no_grad()
def attention(model, row):
    """Attention [layer head query key] of one prompt."""
    return torch.stack([a[0] for a in model(torch.tensor([row]), use_cache=False, output_attentions=True).attentions])
