"""Function vectors over a plain Hugging Face model, as naively as possible: no fvlens, no TransformerLens.

One prompt at a time, without padding, so positions are the natural ones; one whole forward pass for each patched head,
and the whole sequence anew for each generated token. Heads are read and replaced at the INPUT of the output projection
(GPT-2 ``attn.c_proj``, Llama ``self_attn.o_proj``, GPT-NeoX ``attention.dense``), where the outputs of all heads lie
side by side. Vectors are added to the output of a decoder block.
"""

import contextlib

import torch

ATTENTIONS = ("attn", "attention", "self_attn")
PROJECTIONS = ("c_proj", "out_proj", "dense", "o_proj")


def blocks(model):
    """The decoder blocks."""
    if hasattr(model, "transformer"):
        return list(model.transformer.h)
    if hasattr(model, "gpt_neox"):
        return list(model.gpt_neox.layers)
    return list(model.model.layers)


def only_child(module, names):
    """The one submodule that has one of these names."""
    (found,) = [getattr(module, name) for name in names if hasattr(module, name)]
    return found


def output_projections(model):
    """The output projection of each layer's attention."""
    attentions = [only_child(block, ATTENTIONS) for block in blocks(model)]
    # GPT-Neo wraps its attention once more
    return [only_child(getattr(attention, "attention", attention), PROJECTIONS) for attention in attentions]


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


@contextlib.contextmanager
def steered(model, vector, layer, position):
    """A vector added to the output of a block at one position."""

    def hook(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden.clone()
        hidden[:, position] += vector
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = blocks(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(model, row):
    """Logits [pos d_vocab] of one prompt, a list of token ids."""
    return model(torch.tensor([row]), use_cache=False).logits[0]


def mean_head_outputs(model, rows, positions=None):
    """Mean of every head's output [layer head d_head] over last tokens, or over listed positions of each row."""
    n_layers = len(blocks(model))
    total = {}
    positions = [[len(row) - 1] for row in rows] if positions is None else positions
    for row, where in zip(rows, positions, strict=True):

        def see(layer, z, where=where):
            total[layer] = total.get(layer, 0) + z[where].sum(dim=0)

        with heads_seen(model, range(n_layers), see):
            logits(model, row)
    return torch.stack([total[layer] for layer in range(n_layers)]) / sum(map(len, positions))


def answer_log_probability(logits_after, answer):
    """Log-probability of an answer, from the logits at the prompt's end and at the answer's tokens but the last."""
    logs = logits_after.log_softmax(dim=-1)
    return sum(logs[i, token] for i, token in enumerate(answer))


def answer_probability(model, row, answer):
    """Probability of an answer, a list of token ids, after a prompt: the product over its tokens."""
    return float(answer_log_probability(logits(model, row + answer[:-1])[len(row) - 1 :], answer).exp())


def indirect_effects(model, rows, answers, means, positions=None):
    """CIE [prompt layer head] and the unpatched answer probability [prompt].

    Each head is patched at the prompt's end, or at the listed positions of each row.
    """
    n_layers, n_heads, _ = means.shape
    effects = torch.zeros(len(rows), n_layers, n_heads, dtype=means.dtype)
    baseline = torch.zeros(len(rows), dtype=means.dtype)
    positions = [[len(row) - 1] for row in rows] if positions is None else positions
    for p, (row, answer, places) in enumerate(zip(rows, answers, positions, strict=True)):
        baseline[p] = answer_probability(model, row, answer)
        for layer in range(n_layers):
            for head in range(n_heads):

                def patch(where, z, head=head, places=places):
                    z[places, head] = means[where, head]
                    return z

                with heads_seen(model, [layer], patch):
                    effects[p, layer, head] = answer_probability(model, row, answer) - baseline[p]
    return effects, baseline


def function_vector(model, means, heads):
    """Sum over (layer, head) pairs of the head's mean output through its slice of the projection, without bias."""
    return sum(means[layer, head] @ projection_weight(model, layer)[head] for layer, head in heads)


def steered_logits(model, row, vector, layer):
    """Logits [pos d_vocab] of one prompt with a vector added to the output of a block at the last token."""
    with steered(model, vector, layer, -1):
        return logits(model, row)


def loss_and_gradient(model, row, answer, vector, layer):
    """``-log P(answer)`` and its gradient [d_model] in a vector added after a block at the prompt's last token."""
    vector = vector.detach().clone().requires_grad_()
    with torch.enable_grad(), steered(model, vector, layer, len(row) - 1):
        after = model(torch.tensor([row + answer[:-1]]), use_cache=False).logits[0, len(row) - 1 :]
        loss = -answer_log_probability(after, answer)
        return loss.detach(), torch.autograd.grad(loss, vector)[0]


def distributed_logits(model, row, values):
    """Logits [pos d_vocab] of one prompt with values [layer head d_head] added to every head's z at the last token."""

    def add(layer, z):
        z[-1] += values[layer]
        return z

    with heads_seen(model, range(len(values)), add):
        return logits(model, row)


def greedy(model, row, n_new, vector, layer):
    """The most likely token ids, one after the other, a vector being added at the PROMPT's last token."""
    tokens = list(row)
    for _ in range(n_new):
        with steered(model, vector, layer, len(row) - 1):
            tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(row) :]
