"""Sweeps and controls as fvlens 0.1 made them: one whole evaluation for each change, through TransformerLens alone.

Kept to compare later versions with, in speed and in numbers. No fvlens. An evaluation is: the prompts once through the
whole ``HookedTransformer`` under a hook that adds the vector at the last token, the vocabulary at the last position
only; the tokens of longer answers, padded to the longest, in a second forward over kept keys and values; rank,
log-probabilities, the prediction as text, and a bootstrap interval of top-1.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

N_RESAMPLES = 2000


@dataclass(frozen=True)
class Scores:
    """Of each prompt: the rank of the answer's first token, its log-probability, and that of the whole answer."""

    ranks: torch.Tensor
    first: torch.Tensor
    whole: torch.Tensor
    predictions: list
    interval: tuple


def unembedded(model, resid):
    """Logits of the read positions only."""
    return F.linear(model.ln_final(resid), model.unembed.W_U.T, model.unembed.b_U)


def log_probability(logits, tokens):
    """Log-probability of a token at each place."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def bootstrap_interval(hits, generator):
    """95% percentile bootstrap of the mean."""
    hits = hits.double()
    index = torch.randint(len(hits), (N_RESAMPLES, len(hits)), generator=generator)
    ends = hits[index].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return tuple(ends.tolist())


@torch.no_grad()
def evaluate(model, tokens, mask, answers, vector=None, layer=None, seed=0):
    """One whole evaluation of left-padded prompts.

    Args:
        model: a ``HookedTransformer`` with a BOS token in the prompts.
        tokens, mask: the prompts [row pos].
        answers: their answers [row answer_pos], padded on the right with -1.
        vector: what is added at the last token behind block ``layer``; None for nothing.
    """
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    def add(resid, hook):
        resid = resid.clone()
        resid[:, -1] += vector
        return resid

    n_layers, n_answer = model.cfg.n_layers, int((answers >= 0).sum(dim=1).max())
    cache = None
    if n_answer > 1:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, len(tokens))
    settings = dict(past_kv_cache=cache, stop_at_layer=n_layers, return_type=None)
    hooks = [] if vector is None else [(f"blocks.{layer}.hook_resid_post", add)]
    resid = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks, **settings)
    logits = unembedded(model, resid[:, -1:])[:, 0]
    wanted = answers[:, 0]
    first = log_probability(logits, wanted)
    ranks = (logits > logits.gather(1, wanted[:, None])).sum(dim=1)
    whole = first
    if n_answer > 1:
        given, wanted = answers[:, : n_answer - 1], answers[:, 1:n_answer]
        resid = model(given.clamp(min=0), attention_mask=(given >= 0).to(mask.dtype), **settings)
        later = log_probability(unembedded(model, resid), wanted.clamp(min=0)) * (wanted >= 0)
        whole = first + later.sum(dim=1)
    predictions = model.tokenizer.batch_decode([[token] for token in logits.argmax(-1).tolist()])
    interval = bootstrap_interval(ranks == 0, torch.Generator().manual_seed(seed))
    return Scores(ranks, first, whole, predictions, interval)


def layer_sweep(model, tokens, mask, answers, vector, layers):
    """The evaluation with the vector behind each of some layers, and one without it (None)."""
    found = {layer: evaluate(model, tokens, mask, answers, vector, layer) for layer in layers}
    return found | {None: evaluate(model, tokens, mask, answers)}


def controls(model, tokens, mask, answers, vectors, layer):
    """The evaluation under each of many changes behind one layer; None among the vectors is no change."""
    return [evaluate(model, tokens, mask, answers, vector, layer) for vector in vectors]
