"""What exact AIE costs: time and peak memory against prompts, length, layers and heads, and the bridge's fast path.

One factor is varied at a time from the shape of GPT-2 small (random weights, small vocabulary). Beside each measured
ratio to the base stands the ratio of multiplications that the method predicts: N forwards of T tokens, and N L H
one-token forwards through half of the layers. Times are of the processor, on one thread, and the base is measured
again beside every other configuration, so that a busy machine changes little. Peak memory is resident memory beyond
what was held before the call; Linux only.

Run with ``pytest -m benchmark -s tests/benchmarks``.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from peak_memory import bridged, resident, settled

import fvlens
from benchmarks.test_aie_speed import pairs_of_three_tokens, seconds, spread_cells
from fvlens.interventions import hooked, z_hook
from fvlens.models import fingerprint

BASE = dict(n_prompts=8, n_shots=6, n_layers=12, n_heads=12, d_model=768)
VARIED = [
    ("prompts", dict(n_prompts=16)),
    ("prompts", dict(n_prompts=32)),
    ("length", dict(n_shots=3)),
    ("length", dict(n_shots=13)),
    ("layers", dict(n_layers=6)),
    ("layers", dict(n_layers=24)),
    ("heads", dict(n_heads=4)),
    ("heads", dict(n_heads=8)),
    ("heads", dict(n_heads=16)),
    ("medium", dict(n_layers=24, n_heads=16, d_model=1024)),
]
D_HEAD = 64
BAND = (0.7, 1.4)
"""Measured ratio over predicted ratio."""


def multiplications(n_prompts, n_pos, n_layers, n_heads, d_model, d_vocab):
    """Predicted multiplications: whole forwards, one-token forwards through half the layers, and the unembedding."""
    width = n_heads * D_HEAD
    block = 4 * d_model * width + 8 * d_model**2  # of one token, without attention scores
    whole = n_pos * n_layers * (block + n_pos * width)  # half of the keys on average, scores and values
    one_token = n_layers / 2 * (block + 2 * n_pos * width)
    cells = n_layers * n_heads
    return n_prompts * (whole + cells * one_token + (1 + cells) * d_model * d_vocab)


def task(model, n_prompts, n_shots):
    """Prompts of equal length and means for a model."""
    g = torch.Generator().manual_seed(0)
    pairs = pairs_of_three_tokens(model, 60)
    clean = fvlens.build_prompts(model, pairs, n_prompts=4, n_shots=n_shots, generator=g)
    prompts = fvlens.build_prompts(model, pairs, n_prompts=n_prompts, n_shots=n_shots, labels="permuted", generator=g)
    return prompts, fvlens.mean_head_activations(model, clean, progress=False)


def cost(model, prompts, means):
    """Seconds of the processor and bytes of one call."""
    linux = Path("/proc/self/clear_refs").exists()
    before = settled() if linux else 0
    start = time.process_time()
    effects = fvlens.indirect_effects(model, prompts, means, progress=False)
    spent = time.process_time() - start
    assert effects.path == "weights"
    return spent, resident("VmHWM") - before if linux else None


def small_model(**settings):
    return random_model(**settings, d_head=D_HEAD, d_mlp=4 * settings["d_model"])


def rows():
    """Every configuration with its cost relative to the base, and what was predicted."""

    def prepared(settings):
        shape = {key: settings[key] for key in ("n_layers", "n_heads", "d_model")}
        model = small_model(**shape)
        prompts, means = task(model, settings["n_prompts"], settings["n_shots"])
        n_pos = prompts.tokens.shape[1]
        predicted = multiplications(settings["n_prompts"], n_pos, **shape, d_vocab=model.cfg.d_vocab)
        return (model, prompts, means), n_pos, predicted

    base, base_pos, base_predicted = prepared(BASE)
    cost(*base)  # warm-up
    found, base_costs = [], [cost(*base)]
    for name, change in VARIED:
        settings = BASE | change
        same_model = all(settings[key] == BASE[key] for key in ("n_layers", "n_heads", "d_model"))
        if same_model:
            prompts, means = task(base[0], settings["n_prompts"], settings["n_shots"])
            other, n_pos = (base[0], prompts, means), prompts.tokens.shape[1]
            shape = {key: settings[key] for key in ("n_layers", "n_heads", "d_model")}
            predicted = multiplications(settings["n_prompts"], n_pos, **shape, d_vocab=base[0].cfg.d_vocab)
        else:
            other, n_pos, predicted = prepared(settings)
            cost(other[0], other[1].select([0]), other[2])  # warm-up
        own = cost(*other)
        base_costs.append(cost(*base))
        ratio = own[0] / statistics.mean([spent for spent, _ in base_costs[-2:]])  # before it and behind it
        found.append((name, settings, n_pos, own, ratio, predicted / base_predicted))
    middle = sorted(base_costs)[len(base_costs) // 2]
    return [("base", BASE, base_pos, middle, 1.0, 1.0), *found]


def table(found):
    """A Markdown table."""
    lines = [
        "| varied | prompts | tokens | layers x heads | d_model | seconds | time to base | predicted | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, s, n_pos, (spent, peak), ratio, predicted in found:
        memory = "-" if peak is None else f"{peak / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {s['n_prompts']} | {n_pos} | {s['n_layers']} x {s['n_heads']} | {s['d_model']} | {spent:.2f} "
            f"| {ratio:.2f} | {predicted:.2f} | {memory} |"
        )
    return "\n".join(lines)


@pytest.mark.benchmark
def test_cost_grows_as_predicted(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = rows()
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\nexact AIE, 1 thread\n\n{table(found)}")
    for name, settings, _, (_, peak), ratio, predicted in found:
        assert BAND[0] <= ratio / predicted <= BAND[1], (name, settings, ratio, predicted)
        assert peak is None or peak <= 2 * 2**30, (name, peak)  # the default bound is 1 GiB


@pytest.mark.benchmark
def test_the_bridge_has_a_fast_path_too(capsys):
    n_layers, n_heads = 12, 12
    model = bridged(n_layers, n_heads=n_heads, d_model=768)
    with torch.no_grad():  # larger weights and peaked predictions, so that patches move probabilities
        for name, parameter in model.named_parameters():
            parameter.mul_(2.5 if parameter.ndim > 1 else 2.2 if "ln_f" in name or "ln_final" in name else 1)
    prompts, means = task(model, n_prompts=8, n_shots=10)
    likely = []
    with torch.inference_mode():
        for tokens, mask in zip(prompts.tokens, prompts.attention_mask, strict=True):
            likely.append(model(tokens[None], attention_mask=mask[None])[0, -1].argmax())
    prompts = dataclasses.replace(prompts, answer_tokens=torch.stack(likely).clone()[:, None])
    means = dataclasses.replace(means, z=8 * means.z)  # far from what the heads say
    fingerprint(model)
    index = torch.arange(len(prompts))

    def naive(head=None):
        def replace(z):
            z = z.clone()
            z[:, -1, head.head] = means.z[head.layer, head.head]
            return z

        with torch.inference_mode(), hooked(model, {} if head is None else {z_hook(head.layer): replace}):
            logits = model(prompts.tokens, attention_mask=prompts.attention_mask)
            return logits[:, -1].softmax(dim=-1)[index, prompts.answer_tokens[:, 0]].clone()

    def fast():
        return fvlens.indirect_effects(model, prompts, means, progress=False)

    fast(), naive()  # warm-up
    fast_times, naive_times, difference = [], [], 0.0
    for head in spread_cells(n_layers, n_heads, 2):
        spent, effects = seconds(fast)
        fast_times.append(spent)
        spent, found = seconds(lambda head=head: naive(head))
        naive_times.append(spent)
        ours = effects.baseline + effects.cie[:, head.layer, head.head]
        difference = max(difference, float((ours - found).abs().max()))
    naive_total = (1 + n_layers * n_heads) * statistics.mean(naive_times)
    ratio = naive_total / statistics.mean(fast_times)
    n_pos = prompts.tokens.shape[1]
    with capsys.disabled():
        print(
            f"\nexact AIE through TransformerBridge, {len(prompts)} prompts of {n_pos} tokens, path {effects.path}, "
            f"{torch.get_num_threads()} threads\n  naive hook loop {naive_total:.1f} s (from {len(naive_times)} of "
            f"{n_layers * n_heads} heads), fast path {statistics.mean(fast_times):.2f} s, ratio {ratio:.1f}, "
            f"largest difference {difference:.1e}, largest effect {float(effects.cie.abs().max()):.2f}"
        )
    assert effects.path == "kv"
    assert effects.cie.abs().max() > 1e-3
    assert difference < 1e-5
    assert ratio >= 25
