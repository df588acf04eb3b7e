"""What fvlens does in batches, as loops over a plain Hugging Face model: the way a competent user would write them.

No fvlens, no TransformerLens. One batch of left-padded rows, hooks of PyTorch, the vocabulary only at the positions
that are read, no gradient where none is asked for, inference mode where nothing is trained. What is *not* done is
keeping prefixes: every pass takes whole prompts through all layers, whatever is changed in them.

The model is a Llama (``model.model.layers``, ``self_attn.o_proj``, ``model.lm_head``). Rotary positions are relative,
so padding on the left needs no position ids.
"""

import contextlib

import torch
from torch.nn import functional as F

PAD_ANSWER = -1
"""What answers are padded with on the right."""


@contextlib.contextmanager
def hook(handle):
    """Take a hook away at the end of the block."""
    try:
        yield
    finally:
        handle.remove()


def steered(model, layer, column, vectors):
    """Vectors, one for all rows or one a row, added behind a block at one column."""

    def add(module, args, output):
        is_tensor = isinstance(output, torch.Tensor)
        hidden = (output if is_tensor else output[0]).clone()
        hidden[:, column] += vectors
        return hidden if is_tensor else (hidden, *output[1:])

    return hook(model.model.layers[layer].register_forward_hook(add))


def head_replaced(model, layer, head, value):
    """The output of a head replaced by a value at the last token, before the output projection."""
    d_head = value.shape[-1]

    def replace(module, args):
        z = args[0].clone()
        z[:, -1, head * d_head : (head + 1) * d_head] = value
        return (z, *args[1:])

    return hook(model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(replace))


def last_logits(model, tokens, mask):
    """Logits [row d_vocab] behind the prompts."""
    return model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]


# --- causal mediation over heads: one pass a head ---


@torch.inference_mode()
def answer_probability(model, tokens, mask, answers):
    """Probability [row] of a one-token answer."""
    return last_logits(model, tokens, mask).softmax(dim=-1).gather(1, answers[:, None])[:, 0]


@torch.inference_mode()
def patched_probability(model, tokens, mask, answers, means, layer, head):
    """The same with one head's output at the last token replaced by its mean over clean prompts."""
    with head_replaced(model, layer, head, means[layer, head]):
        return answer_probability(model, tokens, mask, answers)


def indirect_effects(model, tokens, mask, answers, means):
    """Effects [row layer head] on the probability of the answer, and the probability without a patch [row]."""
    n_layers, n_heads, _ = means.shape
    baseline = answer_probability(model, tokens, mask, answers)
    effects = [
        patched_probability(model, tokens, mask, answers, means, layer, head) - baseline
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    return torch.stack(effects, dim=1).unflatten(1, (n_layers, n_heads)), baseline


# --- where a vector works: one pass a layer ---


@torch.inference_mode()
def steered_scores(model, tokens, mask, answers, vector, layer):
    """One-token answers [row] under a vector behind a block at the last token: rank, log-probability, all logits."""
    with steered(model, layer, -1, vector):
        logits = last_logits(model, tokens, mask)
    wanted = logits.gather(1, answers[:, None])
    return (logits > wanted).sum(dim=1), wanted[:, 0] - logits.logsumexp(dim=1), logits


def layer_sweep(model, tokens, mask, answers, vector, layers):
    """Ranks and log-probabilities with the vector behind each of some layers."""
    return {layer: steered_scores(model, tokens, mask, answers, vector, layer)[:2] for layer in layers}


# --- a trained vector a relation ---


class VectorTraining:
    """One vector a relation behind one block at the last token of bare queries, trained on whole answers.

    The loss is the sum over relations of the mean over their pairs of ``-log P(answer)``, so relations do not touch
    each other. Rows are cut to the longest prompt and the longest answer among them. Only the blocks above the vector
    have a backward pass, since nothing below needs a gradient.

    Args:
        model: a Llama of Hugging Face; its parameters must not require gradients.
        tokens, mask: the bare queries of all pairs [row pos], left-padded.
        answers: their answers [row answer_pos], padded on the right with -1.
        vectors: the starts [relation d_model].
        layer: the block that the vectors are added behind.
        lr: learning rate of Adam.
    """

    def __init__(self, model, tokens, mask, answers, vectors, layer, lr):
        self.model, self.layer = model, layer
        self.tokens, self.mask, self.answers = tokens, mask, answers
        self.vectors = vectors.detach().clone().requires_grad_()
        self.optimiser = torch.optim.Adam([self.vectors], lr=lr)

    def answer_losses(self, rows, relation):
        """``-log P(answer)`` [row] in nats, summed over the answer's tokens."""
        mask, answers = self.mask[rows], self.answers[rows]
        n_pos, n_answer = int(mask.sum(dim=1).max()), int((answers >= 0).sum(dim=1).max())
        answers, given = answers[:, :n_answer], answers[:, : n_answer - 1]
        tokens = torch.cat([self.tokens[rows, -n_pos:], given.clamp(min=0)], dim=1)
        mask = torch.cat([mask[:, -n_pos:], (given >= 0).to(mask.dtype)], dim=1)
        with steered(self.model, self.layer, n_pos - 1, self.vectors[relation]):
            hidden = self.model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        read = answers >= 0
        logits = self.model.lm_head(hidden[:, n_pos - 1 :][read])
        losses = F.cross_entropy(logits, answers[read], reduction="none")
        row = read.nonzero()[:, 0]
        return torch.zeros(len(rows)).index_add(0, row, losses)

    def step(self, rows, relation):
        """One step of Adam on the minibatches of all relations together."""
        self.optimiser.zero_grad()
        n_pairs = relation.bincount(minlength=len(self.vectors))
        (self.answer_losses(rows, relation) / n_pairs[relation]).sum().backward()
        self.optimiser.step()

    def score(self, rows, relation, rows_at_once=70):
        """Mean loss of each relation [relation] over its rows, without gradient."""
        with torch.inference_mode():
            parts = zip(rows.split(rows_at_once), relation.split(rows_at_once), strict=True)
            losses = torch.cat([self.answer_losses(*part) for part in parts])
            total = torch.zeros(len(self.vectors)).index_add(0, relation, losses)
            return total / relation.bincount(minlength=len(self.vectors))

    def epoch(self, train, valid, batch_size, generator):
        """Every training pair once, then the losses of the validation pairs [relation].

        ``train`` and ``valid`` are the rows of each relation.
        """
        orders = [rows[torch.randperm(len(rows), generator=generator)] for rows in train]
        for minibatches in zip(*(order.split(batch_size) for order in orders), strict=True):
            self.step(*joined(minibatches))
        return self.score(*joined(valid))


def joined(rows_of):
    """Rows of each relation -> all rows, and the relation of each."""
    counts = torch.tensor([len(rows) for rows in rows_of])
    return torch.cat(list(rows_of)), torch.arange(len(counts)).repeat_interleave(counts)
