"""A steering of given tensors, and the same edits on a plain Hugging Face model by hand."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fvlens.interventions import resid_hook
from fvlens.interventions._context import _Dispatcher, _Shown
from fvlens.suffix import has_hooks
from fvlens.types import is_bridge

TEXTS = ("Q: dog\nA:", "Q: cold\nA: hot\n\nQ: big\nA:", "Q: France\nA: Paris\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:")
N_NEW = 4


@dataclass(frozen=True)
class Fixed:
    """A steering with given tensors, which records whom it was asked about."""

    tensors: dict[str, torch.Tensor]
    refusal: str = ""
    asked: list[Any] = field(default_factory=list)

    def additions(self):
        return self.tensors

    def check(self, model):
        self.asked.append(model)
        if self.refusal:
            raise ValueError(self.refusal)


# --- the oracle: plain Hugging Face, one unpadded prompt at a time, the whole sequence anew for each token ---


def adding(vector, where):
    """An edit that adds a vector at some positions of x [pos ...]."""

    def edit(x):
        return torch.cat([x[: where.start or 0], x[where] + vector, x[len(x) if where.stop is None else where.stop :]])

    return edit


def setting(head, new, where):
    """An edit that overwrites one head at some positions of z [pos head d_head]."""

    def edit(z):
        z = z.clone()
        z[where, head] = new
        return z

    return edit


def hf_logits(plain, tokens, edits):
    """Logits [pos d_vocab] of one prompt; ``edits`` are (``"resid"`` or ``"z"``, layer, function)."""
    with contextlib.ExitStack() as stack:
        for kind, layer, edit in edits:
            block = plain.transformer.h[layer]
            if kind == "resid":

                def after_block(module, args, output, edit=edit):
                    return (
                        (edit(output[0][0])[None], *output[1:]) if isinstance(output, tuple) else edit(output[0])[None]
                    )

                handle = block.register_forward_hook(after_block)
            else:

                def before_projection(module, args, edit=edit):
                    z = args[0][0].unflatten(-1, (plain.config.n_head, -1))
                    return (edit(z).flatten(-2)[None],)

                handle = block.attn.c_proj.register_forward_pre_hook(before_projection)
            stack.callback(handle.remove)
        return plain(torch.tensor([tokens]), use_cache=False).logits[0]


def hf_greedy(plain, tokens, edits, n_new=N_NEW):
    """New tokens and the logits that chose them, from the whole sequence run anew for each."""
    tokens, logits = list(tokens), []
    for _ in range(n_new):
        logits.append(hf_logits(plain, tokens, edits)[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[-n_new:], torch.stack(logits)


def pristine(model):
    """No hook is left but dispatchers that nobody uses, and no method is replaced."""
    waiting = all(
        isinstance(hook, _Dispatcher) and not hook.users
        for point in model.hook_points()
        for hook in point._forward_hooks.values()
    )
    listed = any(
        point.bwd_hooks or any(not isinstance(handle.hook, _Shown) for handle in point.fwd_hooks)
        for point in model.hook_points()
    )
    methods = {"forward", "generate", "generate_stream", "hf_generate"} & set(model.__dict__)
    return waiting and not listed and not methods and not has_hooks(model)


def rows_of(model, texts=TEXTS):
    return [[model.tokenizer.bos_token_id, *model.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]


def padded(model, rows):
    width = max(map(len, rows))
    pad = model.tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def normal(*shape, generator, size=1.0):
    return size * torch.randn(*shape, generator=generator)


def told_of_padding(model, tokens):
    """The mask for a bridge, which takes tokens for unpadded unless told; HookedTransformer looks for itself."""
    if not is_bridge(model):
        return {}
    mask = (tokens != model.tokenizer.pad_token_id).long()
    mask[:, :-1] |= mask[:, 1:].clone()  # the BOS is the same token
    return {"attention_mask": mask}


def generated(model, tokens, **options):
    """New tokens [prompt N_NEW] and the logits that chose them [prompt N_NEW d_vocab], greedily."""
    settings = dict(max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False, output_logits=True)
    out = model.generate(tokens, **{**settings, **told_of_padding(model, tokens), **options})
    return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1)


def last_logits(model, rows):
    tokens, mask = padded(model, rows)
    return model(tokens, attention_mask=mask)[:, -1]


def by_hand(tiny, tokens, vector, every, n_new=N_NEW):
    """Greedy loop over the whole sequence with a hand-written hook at absolute positions."""
    length = tokens.shape[1]
    stop = None if every else length

    def add(x, hook):
        x = x.clone()
        x[:, length - 1 : stop] += vector
        return x

    logits = []
    for _ in range(n_new):
        logits.append(tiny.run_with_hooks(tokens, fwd_hooks=[(resid_hook(1), add)])[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, length:], torch.stack(logits, dim=1)


# --- bad input ---


def opened(context):
    with context:
        pytest.fail("the block was entered")
