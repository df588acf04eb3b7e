"""Activation caches that are larger than their bound, and caches in files."""

import dataclasses
import gc
import json
import os
import re

import pytest
import torch
from architectures import word_prompts
from conftest import random_model
from safetensors import safe_open
from safetensors.torch import save_file
from test_memory import halvings, quiet, starving

from fvlens import ActivationCache, activation_cache
from fvlens.activations import _file, _make
from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import hooked, resid_hook
from fvlens.suffix import has_hooks

BIG = 2**30


def cached(model, prompts, **settings):
    return activation_cache(model, prompts, progress=False, **settings)


def small(model, prompts, n, **settings):
    """A bound under which n prompts make a slice."""
    one = cached(model, prompts, **settings).n_bytes // len(prompts)
    return 2 * n * one + 1


@pytest.fixture
def tiny_bounds(monkeypatch):
    """Bounds that are too small for the model's own activations count for the cache alone."""
    own = _make.plan_batch
    monkeypatch.setattr(_make, "plan_batch", lambda model, n_pos, max_memory, **more: own(model, n_pos=n_pos, **more))


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize("given", [True, False])
def test_slices_on_the_disk_hold_the_same_numbers(tiny, generator, tmp_path, tiny_bounds, given, batch_size):
    prompts = word_prompts(tiny, generator, n_prompts=11)
    settings = dict(sites=("z", "pattern", "resid_post"))
    whole = cached(tiny, prompts, batch_size=batch_size or 3, **settings)
    bound = small(tiny, prompts, 3, **settings)
    folder = dict(folder=tmp_path) if given else {}
    cache = cached(tiny, prompts, max_memory=bound, batch_size=batch_size, **settings, **folder)
    assert len(cache.store.files) == 4 and not whole.store.files
    assert sorted(tmp_path.iterdir()) == (sorted(cache.store.files) if given else [])
    assert "bytes in 4 files" in repr(cache)
    for site in cache.sites:
        assert cache.shape(site) == whole.shape(site)
        for layer in range(3):
            found = torch.cat([block for _, block in cache.blocks(site, layer)])
            torch.testing.assert_close(found, whole[site, layer], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cache.mean(site), whole.mean(site), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(cache.mean_heads().z, whole.mean_heads().z, rtol=1e-5, atol=1e-6)
    order = [10, 0, 1, 5, 4, 3, 3]
    some = cache.select(prompts=order, layers=[1], sites="z")
    torch.testing.assert_close(some["z"], whole["z"][1:2, order], rtol=1e-5, atol=1e-6)
    parts = list(cache)
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    torch.testing.assert_close(torch.cat([p["z", 0] for p in parts]), whole["z", 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=rf"'pattern' takes \d+ bytes, above max_memory={bound}; read one layer, as cac"
    ):
        dataclasses.replace(cache, sites=("pattern",), max_memory=bound)["pattern"]
    files = cache.store.files
    del cache, some, parts
    gc.collect()
    assert [path.exists() for path in files] == [given] * 4
    assert files[0].parent.exists() == given


def test_each_file_of_a_folder_is_a_cache(tiny, generator, tmp_path, tiny_bounds):
    prompts = word_prompts(tiny, generator, n_prompts=7)
    for positions in ("demonstration_label", None):
        settings = dict(positions=positions, batch_size=2)
        bound = small(tiny, prompts, 2, **settings)
        cache = cached(tiny, prompts, max_memory=bound, folder=tmp_path, **settings)
        start = 0
        for path in cache.store.files:
            part = ActivationCache.load(path, model=tiny)
            rows = slice(start, start + len(part))
            start += len(part)
            assert torch.equal(part["z", 1], cache.select(prompts=rows)["z", 1])
            assert torch.equal(part.mask, cache.mask[rows]) and torch.equal(part.columns, cache.columns[rows])
            assert part.prompts.texts == prompts.texts[rows]
            assert part.part == (rows.start, 7) and repr(part).endswith(f"from prompt {rows.start} on of 7 that ran)")
            assert part.select(prompts=[0, 1][: len(part) - 1] or [0, 0]).part is None
        assert start == 7


def test_nothing_is_left_behind_where_it_fails(tiny, generator, tmp_path, monkeypatch, tiny_bounds):
    prompts = word_prompts(tiny, generator, n_prompts=7)
    bound = small(tiny, prompts, 2)
    made = []
    own = _make.tempfile.mkdtemp
    monkeypatch.setattr(
        _make.tempfile, "mkdtemp", lambda prefix: made.append(own(prefix=prefix, dir=tmp_path)) or made[0]
    )
    seen = []

    def interrupt(activation):
        seen.append(len(activation))
        if len(seen) == 3:
            raise KeyboardInterrupt

    for folder in (tmp_path, None):
        seen.clear()
        with hooked(tiny, {resid_hook(1): interrupt}), pytest.raises(KeyboardInterrupt):
            cached(tiny, prompts, max_memory=bound, batch_size=2, folder=folder)
        assert list(tmp_path.iterdir()) == []
        assert not has_hooks(tiny)
    assert len(made) == 1


def test_out_of_memory_halves_the_batch(tiny, generator, tiny_bounds):
    prompts = word_prompts(tiny, generator, n_prompts=11)
    expected = cached(tiny, prompts)
    with starving(tiny, 3) as seen:
        cache, caught = quiet(lambda: cached(tiny, prompts))
    assert halvings(caught, "activation_cache") == [("prompts", 11, 5), ("prompts", 5, 2)]
    torch.testing.assert_close(cache["z"], expected["z"], rtol=1e-5, atol=1e-6)
    bound = small(tiny, prompts, 5)
    with starving(tiny, 3) as seen:
        cache, _ = quiet(lambda: cached(tiny, prompts, max_memory=bound))
    assert seen == [5, 2, 2, 1, 2, 2, 1, 1]
    torch.testing.assert_close(cache["z", 2], expected["z", 2], rtol=1e-5, atol=1e-6)
    with starving(tiny, 0), pytest.raises(MemoryError, match="activation_cache: out of memory with a single prompt"):
        cached(tiny, prompts, batch_size=1)


def test_the_bound_is_shared_with_the_model(tiny, generator, monkeypatch):
    """The model's passes get what the numbers leave."""
    prompts = word_prompts(tiny, generator)
    asked = []
    own = _make.plan_batch
    monkeypatch.setattr(_make, "plan_batch", lambda model, **k: asked.append(k["max_memory"]) or own(model, **k))
    cache = cached(tiny, prompts, max_memory=BIG)
    cached(tiny, prompts)
    assert asked == [BIG - cache.n_bytes, None]
    one = cache.n_bytes // len(prompts)
    message = rf"activation_cache: max_memory={one} bytes is too small: the activations of one prompt take {one}, and"
    with pytest.raises(ValueError, match=message):
        cached(tiny, prompts, max_memory=one)
    with pytest.raises(ValueError, match=r"max_memory=\d+ bytes is too small: one prompt of \d+ tokens needs about"):
        cached(tiny, prompts, sites="resid_post", layers=0, positions="last", max_memory=2048)


def test_a_full_disk_is_noticed_before_it_is_full(tiny, generator, tmp_path, monkeypatch, tiny_bounds):
    prompts = word_prompts(tiny, generator)
    bound = small(tiny, prompts, 2)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(_make.shutil, "disk_usage", lambda path: usage)
    message = (
        rf"activation_cache: the activations take {cached(tiny, prompts).n_bytes} bytes, but .* has 1000 free; give"
    )
    with pytest.raises(ValueError, match=message):
        cached(tiny, prompts, max_memory=bound, folder=tmp_path)


# --- files ---


@pytest.mark.parametrize("positions", [None, "last", "demonstration_label", slice(-3, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_caches_come_back_bit_for_bit(tiny, generator, tmp_path, positions, dtype):
    prompts = word_prompts(tiny, generator)
    cache = cached(tiny, prompts, sites=("z", "k", "pattern"), layers=[0, 2], positions=positions, dtype=dtype)
    path = tmp_path / "cache.safetensors"
    assert cache.save(path) == path
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    one = cache.n_bytes // len(prompts)
    for max_memory, lazy in ((None, False), (2 * cache.n_bytes, False), (2 * cache.n_bytes - 1, True), (4 * one, True)):
        again = ActivationCache.load(path, model=tiny, max_memory=max_memory)
        assert bool(again.store.files) == lazy
        for site in cache.sites:
            for layer in cache.layers:
                found = torch.cat([block for _, block in again.blocks(site, layer)])
                assert torch.equal(found, cache[site, layer]) and found.dtype == dtype
        for field in ("sites", "layers", "positions", "fingerprint", "words", "rows"):
            assert getattr(again, field) == getattr(cache, field)
        assert torch.equal(again.mask, cache.mask) and torch.equal(again.columns, cache.columns)
        for field in dataclasses.fields(prompts):
            mine, theirs = getattr(prompts, field.name), getattr(again.prompts, field.name)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    some = again.select(prompts=[5, 2])
    some.save(tmp_path / "some.safetensors")
    assert torch.equal(ActivationCache.load(tmp_path / "some.safetensors")["pattern"], cache["pattern"][:, [5, 2]])
    with safe_open(path, framework="pt") as file:  # any tool can read it
        assert torch.equal(file.get_tensor("z"), cache["z"])


def test_a_file_that_changes_under_a_cache_is_noticed(tiny, generator, tmp_path):
    cache = cached(tiny, word_prompts(tiny, generator))
    path = cache.save(tmp_path / "cache.safetensors")
    lazy = ActivationCache.load(path, max_memory=cache.n_bytes)
    assert torch.equal(lazy["z", 0], cache["z", 0])
    cache.select(layers=[0, 1]).save(path)
    with pytest.raises(ValueError, match=r"cache\.safetensors: the file was replaced or changed since it was opened"):
        lazy["z", 0]
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"no file at {path}.")):
        lazy["z", 0]


def test_caches_of_other_models_are_refused(tiny, generator, tmp_path):
    cache = cached(tiny, word_prompts(tiny, generator))
    path = cache.save(tmp_path / "cache.safetensors")
    other = random_model()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    message = r"the activations were cached on model .*, not on this one \(cache / model: weights: "
    with pytest.raises(ValueError, match=message):
        ActivationCache.load(path, model=other)
    with pytest.raises(ValueError, match=message):
        cache.check(other)
    cache.check(tiny)


def test_broken_files_are_refused(tiny, generator, tmp_path):
    cache = cached(tiny, word_prompts(tiny, generator), positions="last")
    path = tmp_path / "c.safetensors"
    for missing in (path, tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"no activation cache at {missing}.")):
            ActivationCache.load(missing)
    whole = cache.save(path).read_bytes()
    for n_bytes in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(ValueError, match=r"c\.safetensors: not a safetensors file, or a truncated one"):
            ActivationCache.load(path)
    save_file({"z": torch.ones(1)}, path)
    message = "c.safetensors: not written by fvlens (format None, expected 'fvlens-activations-1')."
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationCache.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"c\.safetensors: expected a regular file, got a pipe, a socket or a device"):
        ActivationCache.load(path)


def test_damaged_metadata_and_tensors_are_refused(tiny, generator, tmp_path, unchecked):
    prompts = word_prompts(tiny, generator, n_shots=1)
    cache = cached(tiny, prompts, sites=("z", "pattern"), layers=[0, 2])
    path = cache.save(tmp_path / "c.safetensors")
    tensors, good = read_tensors(path, _file.FORMAT)

    def refused(message, tensors=tensors, **changes):
        header = json.loads(json.dumps(good)) | changes
        write_tensors(path, tensors, header, _file.FORMAT)
        with pytest.raises(ValueError, match=message) as error:
            ActivationCache.load(path)
        assert str(error.value).startswith("c.safetensors: ")

    for key in good:
        changed = {name: value for name, value in good.items() if name != key}
        write_tensors(path, tensors, changed, _file.FORMAT)
        with pytest.raises(ValueError, match=rf"c\.safetensors: damaged metadata \(KeyError: '{key}'\)"):
            ActivationCache.load(path)
    for key in good["prompts"]:
        refused(
            rf"damaged metadata \(KeyError: '{key}'\)", prompts={k: v for k, v in good["prompts"].items() if k != key}
        )
    refused("sites: no site named 'zz'", sites=["zz", "pattern"])
    refused("sites: expected a list, got 3", sites=3)
    refused("layers: expected a whole number, got 2.0", layers=[0, 2.0])
    refused("layers: expected a whole number, got False", layers=[False, 2])
    refused("positions: expected a whole number, got '-1'", positions=["-1"])
    refused("n_places: expected a whole number, got '1'", n_places="1")
    refused(r"n_places: expected \d+, got 99", n_places=99)
    refused("words: expected a text, got 5", words=good["words"] | {"5": 5})
    refused("words: expected ids of tokens, got '05'", words=good["words"] | {"05": "x"})
    refused("part: expected a whole number, got 0.0", part=[0.0, 9])
    refused("part: 8 prompts from prompt 3 on are not a part of 9", part=[3, 9])
    refused("n_shots: expected a whole number, got '1'", prompts=good["prompts"] | {"n_shots": "1"})
    refused("labels: expected a text, got ", prompts=good["prompts"] | {"labels": ["true"]})
    shown = [{}, *good["prompts"]["demonstrations"][1:]]
    refused("demonstrations: expected a list, got {}", prompts=good["prompts"] | {"demonstrations": shown})
    refused("relation: expected a text, got None", prompts=good["prompts"] | {"relation": None})
    refused(r"layers: expected different layers out of \[0, 1, 2\], got \[0, 3\]", layers=[0, 3])
    refused(r"'pattern' has shape \[2, 8, 4, \d+, \d+\]; expected \[3, 8, 4,|'z' has shape", layers=[0, 1, 2])
    refused("positions='first'; expected one of last", positions="first")
    refused(r"'z' has shape \[2, 8, \d+, 4, 8\]; expected \[2, 8, 1, 4, 8\]", positions=[-1])
    refused("expected different indices counted from the right", positions=[-1000])
    refused("positions: expected a list, got 7", positions=7)
    refused("fingerprint: expected the fields", fingerprint={"name": "x"})
    refused("the prompts hash to .*, but 0123 were cached", data_hash="0123")
    refused(r"damaged metadata \(AttributeError", words=[1])
    refused("invalid literal for int", words={"x": "y"})
    refused(r"damaged metadata \(TypeError", prompts=3)
    refused("labels='wrong'; expected one of true, permuted", prompts=good["prompts"] | {"labels": "wrong"})
    refused("expected as many queries, demonstrations, texts", prompts=good["prompts"] | {"texts": ["a"]})
    refused(r"queries: expected a pair of two words, got \['a'\]", prompts=good["prompts"] | {"queries": [["a"]] * 8})
    template = good["prompts"]["template"] | {"more": "text"}
    refused(
        "expected a template as an object with name, demonstration", prompts=good["prompts"] | {"template": template}
    )

    def with_tensor(name, value):
        return {**tensors, name: value}

    refused("expected the tensors pattern, prompts.answer_tokens, .*, got", with_tensor("more", torch.ones(1)))
    refused("expected activations of one floating dtype, got", with_tensor("z", tensors["z"].half()))
    ints = {name: tensors[name].long() for name in ("z", "pattern")}
    refused("expected activations of one floating dtype, got torch.int64", {**tensors, **ints})
    refused("'z' has shape", with_tensor("z", tensors["z"][:, :, :, :2]))
    tokens = tensors["prompts.tokens"]
    refused(
        "expected prompts.tokens as a matrix of integers, got torch.float32",
        with_tensor("prompts.tokens", tokens.float()),
    )
    refused("expected tokens, their mask and their classes of one shape", with_tensor("prompts.tokens", tokens[:, 1:]))
    refused("expected as many queries", with_tensor("prompts.tokens", tokens[1:]))
    refused(r"expected prompts.tokens as ids of \d+ tokens, got", with_tensor("prompts.tokens", tokens + 10_000))
    for name in ("attention_mask", "token_classes"):
        refused("expected a mask of 0 and 1, and known classes", with_tensor(f"prompts.{name}", tokens + 9))
    write_tensors(path, tensors, good, _file.FORMAT)
    assert torch.equal(ActivationCache.load(path)["z"], cache["z"])
