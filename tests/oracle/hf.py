"""Function vectors over a plain Hugging Face model, as naively as possible: no fvlens, no TransformerLens.

One prompt at a time, without padding, so positions are the natural ones; one whole forward pass for each patched head.
Heads are read and replaced at the INPUT of the output projection (GPT-2 ``attn.c_proj``, Llama ``self_attn.o_proj``,
GPT-NeoX ``attention.dense``), where the outputs of all heads lie side by side.
"""

import contextlib

import torch


def blocks(model):
    """The decoder blocks."""
    if hasattr(model, "transformer"):
        return list(model.transformer.h)
    if hasattr(model, "gpt_neox"):
        return list(model.gpt_neox.layers)
    return list(model.model.layers)


def output_projections(model):
    """The output projection of each layer's attention."""
    names = {"transformer": ("attn", "c_proj"), "gpt_neox": ("attention", "dense"), "model": ("self_attn", "o_proj")}
    attention, projection = next(path for name, path in names.items() if hasattr(model, name))
    return [getattr(getattr(block, attention), projection) for block in blocks(model)]


def projection_weight(model, layer):
    """Weight of an output projection as [head d_head d_model], without its bias."""
    module = output_projections(model)[layer]
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    return weight.detach().reshape(model.config.num_attention_heads, -1, weight.shape[1])


@contextlib.contextmanager
def heads_seen(model, layers, see):
    """Call ``see(layer, z [pos head d_head])`` at each output projection; what it returns, if not None, replaces z."""

    def hook_of(layer):
        def pre_hook(module, args):
            x = args[0]
            new = see(layer, x[0].reshape(x.shape[1], model.config.num_attention_heads, -1).clone())
            return None if new is None else (new.reshape(x.shape), *args[1:])

        return pre_hook

    projections = output_projections(model)
    handles = [projections[layer].register_forward_pre_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model, row):
    """Logits [pos d_vocab] of one prompt, a list of token ids."""
    return model(torch.tensor([row])).logits[0]


def mean_head_outputs(model, rows):
    """Mean over prompts of every head's output at the last token: [layer head d_head]."""
    n_layers = len(blocks(model))
    total = {}

    def see(layer, z):
        total[layer] = total.get(layer, 0) + z[-1]

    with heads_seen(model, range(n_layers), see):
        for row in rows:
            logits(model, row)
    return torch.stack([total[layer] for layer in range(n_layers)]) / len(rows)


def answer_probability(model, row, answer):
    """Probability of an answer, a list of token ids, after a prompt: the product over its tokens."""
    logs = logits(model, row + answer[:-1]).log_softmax(dim=-1)[len(row) - 1 :]
    return float(sum(logs[i, token] for i, token in enumerate(answer)).exp())


def indirect_effects(model, rows, answers, means):
    """CIE [prompt layer head] and the unpatched answer probability [prompt], each head patched at the prompt's end."""
    n_layers, n_heads, _ = means.shape
    effects = torch.zeros(len(rows), n_layers, n_heads)
    baseline = torch.zeros(len(rows))
    for p, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        baseline[p] = answer_probability(model, row, answer)
        for layer in range(n_layers):
            for head in range(n_heads):

                def patch(where, z, head=head, row=row):
                    z[len(row) - 1, head] = means[where, head]
                    return z

                with heads_seen(model, [layer], patch):
                    effects[p, layer, head] = answer_probability(model, row, answer) - baseline[p]
    return effects, baseline


def function_vector(model, means, heads):
    """Sum over (layer, head) pairs of the head's mean output through its slice of the projection, without bias."""
    return sum(means[layer, head] @ projection_weight(model, layer)[head] for layer, head in heads)


def steered_logits(model, row, vector, layer):
    """Logits [pos d_vocab] of one prompt with a vector added to the output of a block at the last token."""

    def hook(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden.clone()
        hidden[:, -1] += vector
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = blocks(model)[layer].register_forward_hook(hook)
    try:
        return logits(model, row)
    finally:
        handle.remove()
