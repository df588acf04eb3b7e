"""Memory that a process takes for exact effects under a bound: `python peak_memory.py hooked weights,kv 33554432`.

Prints JSON: for each path and bound, bytes of resident memory beyond what the process held before the call, at its
highest. Linux only: the high-water mark is set back before each call. `python peak_memory.py cache make,mean,save,load
67108864` does the same for an activation cache larger than the bound, one step after the other, and `python
peak_memory.py steered weights 67108864` for training over kept prompts.
"""

import ctypes
import functools
import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from checkpoints import TOKENIZER, VOCABULARY
from conftest import random_model
from transformers import AutoTokenizer

import fvlens
from fvlens.suffix import SteeredPrompts

SHAPE = dict(n_layers=6, n_heads=8, d_model=256, d_head=32, d_mlp=1024, n_ctx=512)


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


def caches(steps, *bounds):
    """Peaks of the steps of an activation cache that goes to the disk."""
    model = random_model(**SHAPE)
    g = torch.Generator().manual_seed(0)
    prompts = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=64, n_shots=14, generator=g)
    found = {step: [] for step in steps.split(",")}

    def make(some, max_memory):
        sites = ("z", "resid_post", "pattern")
        return fvlens.activation_cache(model, some, sites=sites, max_memory=max_memory, progress=False)

    make(prompts.select([0]), None).mean()  # whatever is made once
    for bound in bounds:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cache.safetensors"
            before = settled()
            cache = make(prompts, int(bound))
            assert cache.n_bytes > 2 * int(bound), f"{cache.n_bytes} bytes are too few for the bound {bound}"
            found["make"].append(resident("VmHWM") - before)
            for step, call in (("mean", cache.mean), ("save", functools.partial(cache.save, file))):
                before = settled()
                call()
                found[step].append(resident("VmHWM") - before)
            before = settled()
            fvlens.ActivationCache.load(file, max_memory=int(bound)).mean()
            found["load"].append(resident("VmHWM") - before)
    print(json.dumps(found))


def steered(paths, *bounds):
    """Peaks of training over kept prompts that do not all fit the bound: every prompt once."""
    model = random_model(**SHAPE)
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    prompts = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=100, n_shots=14, generator=g)
    found = {}

    def run(path, some, max_memory):
        given = some.tokens, some.attention_mask, some.answer_tokens
        kept = SteeredPrompts(model, *given, 0, path=path, max_memory=max_memory)
        vector = torch.zeros(model.cfg.d_model, requires_grad=True)
        for rows in torch.arange(len(some)).split(min(20, kept.tokens_at_once // int(kept.n_tokens.max()))):
            kept.read(rows, vector)[0].sum().backward()

    for path in paths.split(","):
        run(path, prompts.select([0]), None)  # whatever is made once
        found[path] = []
        for bound in bounds:
            before = settled()
            run(path, prompts, int(bound))
            found[path].append(resident("VmHWM") - before)
    print(json.dumps(found))


def main(kind, paths, *bounds):
    torch.set_num_threads(1)
    if kind == "steered":
        steered(paths, *bounds)
        return
    if kind == "cache":
        caches(paths, *bounds)
        return
    model = bridged(6) if kind == "bridge" else random_model(**SHAPE)
    g = torch.Generator().manual_seed(0)
    pairs = fvlens.load_relation("antonym")
    clean = fvlens.build_prompts(model, pairs, n_prompts=2, n_shots=2, generator=g)
    prompts = fvlens.build_prompts(model, pairs, n_prompts=32, n_shots=14, labels="permuted", generator=g)
    means = fvlens.mean_head_activations(model, clean, progress=False)
    found = {}
    for path in paths.split(","):
        fvlens.indirect_effects(model, prompts.select([0]), means, path=path, progress=False)  # whatever is made once
        found[path] = []
        for bound in bounds:
            before = settled()
            fvlens.indirect_effects(model, prompts, means, path=path, max_memory=int(bound), progress=False)
            found[path].append(resident("VmHWM") - before)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
