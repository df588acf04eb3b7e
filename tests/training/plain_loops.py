"""The oracle of training: one prompt at a time, no padding, whole forward passes; and what tests of it share."""

import dataclasses
import math

import pytest
import torch
from architectures import WORDS
from conftest import needs_hooked, seeded
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.interventions import resid_hook
from fvlens.models import embedded_folder, fingerprint
from fvlens.relations import Pair, Split
from fvlens.training import (
    SteerablePrompts,
    VectorChange,
)
from fvlens.vectors import DistributedVector, FunctionVector

PAIRS = tuple(Pair(*pair) for pair in WORDS)
TRAIN, VALID = PAIRS[:5], PAIRS[5:]
MORE = tuple(
    Pair(*pair) for pair in [("king", "queen"), ("cat", "dog"), ("one", "two"), ("red", "blue"), ("day", "night")]
)
SHORT = dict(init="zero", layer=1, valid=VALID, lr=0.3, epochs=4, batch_size=2, progress=False)
"""A training that is over soon."""


def with_words(folder):
    """A checkpoint with the embedded model's tokenizer, which knows the library's words, and an embedding for each."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def distributed(model, seed=0, heads=((0, 2), (2, 1), (2, 3))):
    values = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
    for head in heads:
        values[head] = 0.1 * torch.randn(model.cfg.d_head, generator=seeded(seed + sum(head)))
    return DistributedVector(values, tuple(fvlens.Head(*head) for head in heads), "r", fingerprint(model))


def vector_of(model, layer=1, seed=0, relation="r", scale=1.0, **fields):
    values = scale * torch.randn(model.cfg.d_model, generator=seeded(seed))
    return FunctionVector(values, layer, (), relation, fingerprint(model), **fields)


def vector_change(model, tasks, trainable, path):
    prompts = SteerablePrompts.of(model, tasks, "qa", layer=trainable.layer, path=path)
    return VectorChange(prompts, trainable)


def split_of(train, valid=(), test=()):
    return Split(*(tuple(Pair(*pair) for pair in part) for part in (train, valid, test)), "input")


def tokenised(model, pair):
    """Tokens of the bare query, and of the answer."""
    tokenizer = model.tokenizer
    query = tokenizer(f"Q: {pair[0]}\nA:", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"Q: {pair[0]}\nA: {pair[1]}", add_special_tokens=False)["input_ids"]
    assert whole[: len(query)] == query
    return [tokenizer.bos_token_id, *query], whole[len(query) :]


def plain_logits(model, pair, layer, vector):
    """Logits behind the query and behind each answer token, the vector added at the query's last token alone."""
    query, answer = tokenised(model, pair)
    tokens = torch.tensor([[*query, *answer[:-1]]])

    def add(resid, hook):
        steered = resid.clone()
        steered[0, len(query) - 1] = steered[0, len(query) - 1] + vector
        return steered

    with model.hooks(fwd_hooks=[(resid_hook(layer), add)]):
        return model(tokens)[0, len(query) - 1 :], torch.tensor(answer)


def plain_log_probs(model, pair, layer, vector):
    logits, answer = plain_logits(model, pair, layer, vector)
    return logits.double().log_softmax(dim=-1)[torch.arange(len(answer)), answer]


def plain_loss(model, pairs, layer, vector, loss="cross_entropy"):
    found = [plain_log_probs(model, pair, layer, vector) for pair in pairs]
    if loss == "cross_entropy":
        return -sum(one.sum() for one in found) / len(found)
    return (-sum(one.mean() for one in found) / len(found)).exp()


def plain_top1(model, pairs, layer, vector):
    hits = 0
    for pair in pairs:
        logits, answer = plain_logits(model, pair, layer, vector)
        hits += int(logits[0].argmax() == answer[0])
    return hits / len(pairs)


def plain_training(model, train, valid, init, layer, *, seed, lr, epochs, batch_size, l2=0.0, anchor="zero",
                   loss="cross_entropy", schedule="cosine"):  # fmt: skip
    """Adam on a vector, as anyone would write it; the vector, the curves, and every epoch's vector."""
    vector = init.clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=lr)
    order = torch.Generator().manual_seed(seed)
    centre = init if anchor == "init" else torch.zeros_like(init)
    curves, vectors = [], []

    def look(train_loss):
        with torch.no_grad():
            curves.append(
                [
                    train_loss,
                    plain_loss(model, valid, layer, vector, loss),
                    plain_top1(model, valid, layer, vector),
                    vector.norm(),
                    torch.cosine_similarity(vector, init, dim=0),
                ]
            )
            vectors.append(vector.detach().clone())

    with torch.no_grad():
        look(plain_loss(model, train, layer, vector, loss))
    for epoch in range(epochs):
        seen = []  # of each pair the mean or the sum of its log-probabilities, before its step
        for group in optimiser.param_groups:
            group["lr"] = lr * (0.5 * (1 + math.cos(math.pi * epoch / epochs)) if schedule == "cosine" else 1)
        shuffled = torch.randperm(len(train), generator=order).tolist()
        for at in range(0, len(train), batch_size):
            batch = [train[i] for i in shuffled[at : at + batch_size]]
            optimiser.zero_grad()
            with torch.no_grad():
                own = [plain_log_probs(model, pair, layer, vector) for pair in batch]
                seen += [-float(one.sum() if loss == "cross_entropy" else one.mean()) for one in own]
            (plain_loss(model, batch, layer, vector, loss) + l2 * (vector - centre).square().sum()).backward()
            optimiser.step()
        mean = sum(seen) / len(seen)
        look(mean if loss == "cross_entropy" else math.exp(mean))
    best = max(range(len(curves)), key=lambda i: (curves[i][2], -curves[i][1]))
    return vectors[best], torch.tensor(curves).T, best


def curves_of(history):
    return torch.stack([getattr(history, field.name) for field in dataclasses.fields(history)])


def close(ours, theirs, tolerance=1e-5):
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


CASES = [
    *(pytest.param(name, path, marks=needs_hooked) for name, path in [
        ("gpt2", "weights"), ("gpt2", "kv"), ("gpt2", "naive"), ("grouped-query", "weights"), ("grouped-query", "kv"),
        ("local", "weights"), ("soft-caps", "weights"), ("parallel", "weights"), ("alibi", "kv"),
        ("shortformer", "naive"),
    ]),
    ("bridge-gpt2", "kv"), ("bridge-gpt2", "naive"), ("bridge-llama", "kv"), ("bridge-gemma2", "kv"),
]  # fmt: skip
