"""Exact AIE: the fast path against the naive loop over hooks, side by side in one process.

Naive: plain TransformerLens, one ``model.run_with_hooks(tokens, attention_mask=...)`` a head with all prompts in one
batch, logits at every position, as anyone would write it. It is measured on a few (layer, head) cells spread over
the layers and extrapolated to all; every pass costs the same, since the whole model runs whatever is patched.
Fast: one call of ``fvlens.indirect_effects``, everything in it counted.

The counted limit of ``fvlens.suffix.counted_gain`` counts the blocks alone. The naive side also unembeds every
position, the fast side only what is read, so the limit with the unembedding is printed beside it.

Run with ``pytest -m benchmark -s tests/benchmarks``. Threads are left as they are; both sides use the same.
"""

import copy
import dataclasses
import platform
import resource
import statistics
import time

import pytest
import torch
from conftest import random_model

import fvlens
from fvlens.interventions import z_hook
from fvlens.models import fingerprint
from fvlens.suffix import counted_gain
from fvlens.types import Head

N_FAST = 3
"""Runs of the fast path; the median counts."""
N_EXACT = 2
"""Heads, of those that the naive loop ran, whose probabilities are computed in double precision too."""


def peak_memory():
    """Most memory this process has held so far, in MiB (the kernel counts KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if platform.system() == "Darwin" else 1024)


def seconds(function):
    """Time of one call, and what it gives."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def spread_cells(n_layers, n_heads, n):
    """``n`` heads spread evenly over the layers, the first and the last layer among them."""
    layers = [round(i * (n_layers - 1) / (n - 1)) for i in range(n)]
    return [Head(layer, (5 * i + 1) % n_heads) for i, layer in enumerate(layers)]


def pairs_of_three_tokens(model, n):
    """Library pairs with a one-token input and, capitalised, a two-token output: 9 tokens as a demonstration."""

    def n_tokens(word):
        return len(model.tokenizer(" " + word, add_special_tokens=False)["input_ids"])

    found = {}
    for name in fvlens.list_relations():
        for word, answer in fvlens.load_relation(name):
            if len(found) < n and n_tokens(word) == 1 and n_tokens(answer.capitalize()) == 2:
                found.setdefault(word, answer.capitalize())
    return list(found.items())


def limit_with_unembedding(n_layers, n_heads, n_pos, d_model, d_vocab):
    """Multiplications of the naive loop over those of the fast path, with the unembedding; MLPs are 4 d_model wide."""
    cells, block, unembed = n_layers * n_heads, 12 * d_model**2, d_model * d_vocab
    naive = (1 + cells) * n_pos * (n_layers * block + unembed)
    return naive / (n_pos * n_layers * block + cells * n_layers / 2 * block + (1 + cells) * unembed)


def measure(*, n_layers=12, n_heads=12, d_model=768, n_prompts=25, n_shots=10, n_cells=6):
    """Both sides on one random-weight model: times, largest difference, memory."""
    model = random_model(
        n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_model // n_heads, d_mlp=4 * d_model,
        initializer_range=0.05,
    )  # fmt: skip
    with torch.no_grad():
        model.ln_final.w.mul_(3 / (0.05 * d_model**0.5))  # peaked predictions, so that patches move probabilities
    g = torch.Generator().manual_seed(0)
    pairs = pairs_of_three_tokens(model, 60)
    clean = fvlens.build_prompts(model, pairs, n_prompts=8, n_shots=n_shots, generator=g)
    prompts = fvlens.build_prompts(model, pairs, n_prompts=n_prompts, n_shots=n_shots, labels="permuted", generator=g)
    tokens, mask = prompts.tokens, prompts.attention_mask
    rows = zip(tokens, mask, strict=True)
    with torch.inference_mode():  # one by one, so that little memory is touched before the measurement
        likely = torch.cat([model(t[None], attention_mask=m[None])[:, -1].argmax(dim=-1) for t, m in rows])
    prompts = dataclasses.replace(prompts, answer_tokens=likely.clone()[:, None])
    means = fvlens.mean_head_activations(model, clean, progress=False)
    means = dataclasses.replace(means, z=8 * means.z)  # far from what the heads say
    fingerprint(model)
    index = torch.arange(n_prompts)

    def fast():
        return fvlens.indirect_effects(model, prompts, means, progress=False)

    def naive(head=None):
        def replace(z, hook):
            z[:, -1, head.head] = means.z[head.layer, head.head]
            return z

        hooks = [] if head is None else [(z_hook(head.layer), replace)]
        with torch.inference_mode():
            logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
            return logits[:, -1].softmax(dim=-1)[index, likely].clone()

    cells = spread_cells(n_layers, n_heads, n_cells)
    before = peak_memory()  # holds the model, and passes of single prompts
    fast_times, naive_times, found = [], [], {}
    effects = None
    fast()  # warm-up
    after_fast = peak_memory()
    naive()  # warm-up
    baseline_time, baseline = seconds(naive)
    # interleaved, so that a busy machine slows both sides
    for i, head in enumerate(cells):
        if i % max(1, n_cells // N_FAST) == 0 and len(fast_times) < N_FAST:
            spent, effects = seconds(fast)
            fast_times.append(spent)
        spent, found[head] = seconds(lambda head=head: naive(head))
        naive_times.append(spent)
    n_all = n_layers * n_heads
    naive_total = baseline_time + n_all * statistics.mean(naive_times)
    difference = max(
        float((effects.baseline + effects.cie[:, head.layer, head.head] - found[head]).abs().max()) for head in cells
    )
    error, naive_error = errors_against_double(model, means, prompts, effects, found)
    n_pos = float(mask.sum(dim=1).float().mean())
    return dict(
        path=effects.path,
        n_pos=n_pos,
        n_prompts=n_prompts,
        cells=f"{len(cells)} of {n_all}",
        threads=torch.get_num_threads(),
        fast=statistics.median(fast_times),
        naive=naive_total,
        naive_cell=statistics.mean(naive_times),
        ratio=naive_total / statistics.median(fast_times),
        limit=counted_gain(n_layers, n_heads, round(n_pos)),
        limit_all=limit_with_unembedding(n_layers, n_heads, n_pos, d_model, model.cfg.d_vocab),
        difference=max(difference, float((effects.baseline - baseline).abs().max())),
        error=error,
        naive_error=naive_error,
        largest_effect=max(float((found[head] - baseline).abs().max()) for head in cells),
        peak_before=before,
        peak_fast=after_fast,
        peak_both=peak_memory(),
    )


def errors_against_double(model, means, prompts, effects, naive):
    """Largest error of a probability of the fast path, and of the naive loop, against the loop in double precision.

    Both round in single precision, differently, so their difference says little of either. The heads are those on which
    they differ most.
    """
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "cfg"):
            module.cfg.dtype = torch.float64
    index = torch.arange(len(prompts))
    errors = []
    ours = {head: effects.baseline + effects.cie[:, head.layer, head.head] for head in naive}
    for head in sorted(naive, key=lambda head: -float((ours[head] - naive[head]).abs().max()))[:N_EXACT]:

        def replace(z, hook, head=head):
            z[:, -1, head.head] = means.z[head.layer, head.head].double()
            return z

        with torch.inference_mode():
            logits = exact.run_with_hooks(
                prompts.tokens, attention_mask=prompts.attention_mask, fwd_hooks=[(z_hook(head.layer), replace)]
            )
            truth = logits[:, -1].softmax(dim=-1)[index, prompts.first_answer_token]
        errors.append([float((side[head].double() - truth).abs().max()) for side in (ours, naive)])
    return tuple(map(max, zip(*errors, strict=True)))


def report(m):
    """The measurement in words."""
    share, share_all = m["ratio"] / m["limit"], m["ratio"] / m["limit_all"]
    return "\n".join(
        (
            f"\nexact AIE, {m['n_prompts']} prompts of {m['n_pos']:.1f} tokens on average, path {m['path']}, "
            f"{m['threads']} threads",
            f"  naive hook loop {m['naive']:9.1f} s  ({m['naive_cell']:.2f} s a head, from {m['cells']} heads)",
            f"  fast path       {m['fast']:9.2f} s  (median of {N_FAST})",
            f"  ratio           {m['ratio']:9.1f}",
            f"  counted limit   {m['limit']:9.1f}    share reached {share:.0%} (blocks alone)",
            f"                  {m['limit_all']:9.1f}    share reached {share_all:.0%} (with the unembedding)",
            f"  largest difference {m['difference']:.1e} in probability; largest effect {m['largest_effect']:.2f}",
            f"  error against double precision: fast path {m['error']:.1e}, naive loop {m['naive_error']:.1e}",
            f"  peak memory of the process: {m['peak_before']:.0f} MiB with the model and single prompts, "
            f"{m['peak_fast']:.0f} MiB after the fast path, {m['peak_both']:.0f} MiB after the naive loop",
        )
    )


@pytest.mark.benchmark
def test_exact_aie_is_fifty_times_faster_than_the_hook_loop(capsys):
    m = measure()
    with capsys.disabled():
        print(report(m))
    assert m["path"] == "weights"
    assert 90 <= m["n_pos"] <= 104
    assert m["largest_effect"] > 0.01
    assert m["error"] <= max(1e-6, 2 * m["naive_error"])  # no worse than the loop itself is
    assert m["naive_error"] < 1e-5
    assert m["ratio"] >= 50
