"""Memory that a process takes under a bound: `python peak_memory.py`. Linux only: it sets the high-water mark back.

Prints JSON: by what was measured, pairs of a bound and the bytes of resident memory at their highest, beyond what the
process held before. Everything is measured in one process, since starting one takes longer than a measurement. First
glibc keeps of what is freed what it likes, then every larger block goes back to the system, as the bound counts.
"""

import ctypes
import functools
import gc
import json
import tempfile
from pathlib import Path

import torch
from checkpoints import TOKENIZER, VOCABULARY
from conftest import random_model
from transformers import AutoTokenizer

import fvlens
from fvlens.suffix import SteeredPrompts

MIB = 2**20
SHAPE = dict(n_layers=6, n_heads=8, d_model=256, d_head=32, d_mlp=1024, n_ctx=512)
_M_MMAP_THRESHOLD = -3
"""Of malloc.h: blocks above it are given back to the system when they are freed."""


def bridged(n_layers=4, *, n_heads=8, d_model=256, **grouped):
    """A bridge to a random GPT-2, or with settings for grouped heads to a Llama."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    if grouped:
        shape = dict(hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=n_layers)
        config = LlamaConfig(vocab_size=VOCABULARY, **shape, num_attention_heads=n_heads, **grouped)
        name = "LlamaForCausalLM"
    else:
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=d_model, n_layer=n_layers, n_head=n_heads, n_positions=512)
        name = "GPT2LMHeadModel"
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        made = AutoModelForCausalLM.from_config(config).eval()
    model = build_bridge_from_module(made, name, hf_config=config, dtype=torch.float32)
    model.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    return model


def resident(which):
    """``VmRSS``, the resident memory now, or ``VmHWM``, its high-water mark; in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def settled():
    """Give back what is free, set the high-water mark back, and return the resident memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measured(run, prompts, bounds):
    """Pairs of a bound and the peak of ``run(prompts, bound)``.

    What else the process does can only add to a peak (6 MiB in one of two runs of the suite), so one above its bound is
    measured again, twice at most, and the smallest counts.
    """
    run(prompts, bounds[0])  # whatever is made once
    found = []
    for bound in bounds:
        peaks = []
        while not peaks or (peaks[-1] > bound and len(peaks) < 3):
            before = settled()
            run(prompts, bound)
            peaks.append(resident("VmHWM") - before)
        found.append((bound, min(peaks)))
    return found


def drawn(model, n_prompts, **labels):
    g = torch.Generator().manual_seed(0)
    pairs = fvlens.load_relation("antonym")
    return fvlens.build_prompts(model, pairs, n_prompts=n_prompts, n_shots=14, generator=g, **labels)


def effects(model, path, *bounds):
    """Exact effects of all heads."""
    means = fvlens.mean_head_activations(model, drawn(model, 2), progress=False)

    def run(some, bound):
        fvlens.indirect_effects(model, some, means, path=path, max_memory=bound, progress=False)

    return measured(run, drawn(model, 24, labels="permuted"), bounds)


def steered(model):
    """Training over kept prompts that do not all fit the bound: every prompt once."""
    model.requires_grad_(False)

    def run(some, bound):
        given = some.tokens, some.attention_mask, some.answer_tokens
        kept = SteeredPrompts(model, *given, 0, path="weights", max_memory=bound)
        vector = torch.zeros(model.cfg.d_model, requires_grad=True)
        for rows in torch.arange(len(some)).split(min(20, kept.tokens_at_once // int(kept.n_tokens.max()))):
            kept.read(rows, vector)[0].sum().backward()

    return measured(run, drawn(model, 60), (48 * MIB, 120 * MIB))


def caches(model):
    """An activation cache that goes to the disk, one step after the other."""
    prompts = drawn(model, 16)
    found = {step: [] for step in ("make", "mean", "save", "load")}

    def make(some, bound):
        sites = ("z", "resid_post", "pattern")
        return fvlens.activation_cache(model, some, sites=sites, max_memory=bound, progress=False)

    make(prompts.select([0]), None).mean()  # whatever is made once
    for bound in (12 * MIB, 30 * MIB):

        def step(name, call, bound=bound):
            before = settled()
            made = call()
            found[name].append((bound, resident("VmHWM") - before))
            return made

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cache.safetensors"
            cache = step("make", lambda bound=bound: make(prompts, bound))
            assert cache.n_bytes > 2 * bound, f"{cache.n_bytes} bytes are too few for the bound {bound}"
            step("mean", cache.mean)
            step("save", functools.partial(cache.save, file))
            step("load", lambda file=file, bound=bound: fvlens.ActivationCache.load(file, max_memory=bound).mean())
    return {f"cache, {name}": peaks for name, peaks in found.items()}


def main():
    torch.set_num_threads(1)
    model = random_model(**SHAPE)
    found = {"effects, weights, freed as glibc likes": effects(model, "weights", 24 * MIB, 80 * MIB)}
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536) == 1
    found["effects, weights"] = effects(model, "weights", 24 * MIB, 80 * MIB)
    found["effects, kv"] = effects(model, "kv", 32 * MIB, 96 * MIB)
    found["effects, bridge"] = effects(bridged(6), "kv", 20 * MIB, 72 * MIB)
    found |= caches(model)
    found["training"] = steered(model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
