"""What composite vectors do, by whole passes under hooks."""

import dataclasses

import torch

from fvlens.prompts import render_prompts
from fvlens.relations import load_relation

NAMES = ("body-part", "tool-part", "vehicle-part", "animal-french", "tool-french")
LAYER = 0


def parts(start, end):
    return [dataclasses.replace(load_relation(name), pairs=load_relation(name).pairs[start:end]) for name in NAMES]


def naive_log_prob(model, query, shown, vector, layer=LAYER):
    """Mean log-probability per token of the answer by whole passes under hooks, one token after another."""
    prompts = render_prompts(model, [query], [shown], n_shots=len(shown))
    answer = prompts.answer_tokens[0].tolist()
    tokens, total, last = prompts.tokens, 0.0, prompts.tokens.shape[1] - 1
    logits = []
    for token in answer:

        def add(resid, hook):
            resid = resid.clone()
            resid[:, last] += vector
            return resid

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            logits.append(model(tokens)[0, -1])
        total += logits[-1].log_softmax(-1)[token].item()
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    return total / len(answer), logits[0]
