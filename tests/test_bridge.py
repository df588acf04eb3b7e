"""The fast path over TransformerBridge against whole forward passes of the same model, on every architecture."""

import pytest
import torch
from architectures import word_prompts
from checkpoints import ARCHITECTURES, save
from conftest import seeded
from transformers import AutoTokenizer

from fvlens.interventions import hooked, inject, resid_hook, resid_pre_hook, z_hook
from fvlens.models import embedded_folder
from fvlens.suffix import choose_route, has_hooks, open_reader, run_prefix, steered_resid, why_not_kv
from fvlens.types import Head, is_bridge


@pytest.fixture(scope="module")
def bridges(tmp_path_factory):
    """A bridge to each tiny checkpoint, made once, with our own tokenizer on it."""
    from transformer_lens.model_bridge import TransformerBridge

    made = {}

    def get(name):
        if name not in made:
            folder = save(name, tmp_path_factory.mktemp(name))
            model = TransformerBridge.boot_transformers(str(folder), device="cpu")
            model._tokenizer = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
            made[name] = model
        return made[name]

    yield get
    for model in made.values():
        assert not has_hooks(model)
        assert not any("forward" in block.__dict__ for block in model.blocks)


def forward(model, prompts, functions):
    with hooked(model, functions):
        return model(prompts.tokens, attention_mask=prompts.attention_mask)


def close(ours, theirs):
    """Equal up to the rounding of float32, in which Hugging Face's attention takes its softmax in any case."""
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_takes_the_cached_path(bridges, name):
    model = bridges(name)
    assert is_bridge(model)
    assert why_not_kv(model) is None
    assert choose_route(model) == ("kv", "TransformerBridge runs Hugging Face's own blocks")


@pytest.mark.parametrize("n_suffix", [1, 4, None], ids=["one", "four", "all"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_patched_heads_equal_hooked_passes(bridges, generator, name, n_suffix):
    model = bridges(name)
    prompts = word_prompts(model, generator, n_shots=1)
    n = prompts.tokens.shape[1] if n_suffix is None else n_suffix
    keep = prompts.attention_mask[:, -n:].bool()
    assert n_suffix is not None or not keep.all()
    heads = [Head(0, 1), Head(0, 3), Head(1, 0), Head(2, 2)]
    values = torch.randn(len(heads), model.cfg.d_head, generator=generator)
    where = keep & (torch.rand(len(prompts), n, generator=generator) < 0.6)
    where[:, -1] = True
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path="kv")
    with torch.no_grad():
        plain = forward(model, prompts, {})[:, -n:]
        close(run.logits(run.resid_final)[keep], plain[keep])
        got = run.logits(run.patched(heads, values, where))
        for i, head in enumerate(heads):

            def replace(z, i=i, head=head):
                z = z.clone()
                z[:, -n:, head.head] = torch.where(where[..., None], values[i], z[:, -n:, head.head])
                return z

            expected = forward(model, prompts, {z_hook(head.layer): replace})[:, -n:]
            close(got[:, i][keep], expected[keep])
            assert (expected - plain)[where].abs().max() > 1e-2  # the patch is not a trifle


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_continue_from_equals_a_pass_with_that_residual(bridges, generator, name):
    model = bridges(name)
    prompts = word_prompts(model, generator)
    n, n_variants = 2, 3
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n, path="kv")
    given = torch.randn(len(prompts), n_variants, n, model.cfg.d_model, generator=generator)
    for layer in range(model.cfg.n_layers + 1):
        last = layer == model.cfg.n_layers
        with torch.no_grad():
            got = run.logits(run.continue_from(layer, given))
            for i in range(n_variants):

                def replace(resid, i=i):
                    return torch.cat([resid[:, :-n], given[:, i]], dim=1)

                hook = resid_hook(layer - 1) if last else resid_pre_hook(layer)
                close(got[:, i], forward(model, prompts, {hook: replace})[:, -n:])


class Steered:
    """A vector added after one layer."""

    def __init__(self, layer, vector):
        self.layer, self.vector = layer, vector

    def additions(self):
        return {resid_hook(self.layer): self.vector}

    def check(self, model):
        pass


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_steered_suffixes_equal_inject_and_so_does_their_gradient(bridges, generator, name):
    model = bridges(name)
    prompts = word_prompts(model, generator)
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, path="kv")
    targets = prompts.answer_tokens[:, :1]
    for layer in range(model.cfg.n_layers):
        found = []
        for suffix in (True, False):
            vector = torch.randn(model.cfg.d_model, generator=seeded(1))
            vector.requires_grad_()
            if suffix:
                logits = run.logits(steered_resid(run, layer, vector))[:, 0, 0]
            else:
                with inject(model, Steered(layer, vector)):
                    logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
            loss = -logits.log_softmax(-1).gather(-1, targets).mean()
            (gradient,) = torch.autograd.grad(loss, vector)
            found.append((logits.detach(), gradient))
        close(found[0][0], found[1][0])
        close(found[0][1], found[1][1])
        assert found[1][1].abs().max() > 1e-4


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_reading_on_equals_reading_at_once(bridges, generator, name):
    model = bridges(name)
    prompts = word_prompts(model, generator)
    with torch.no_grad():
        whole = model(prompts.tokens, attention_mask=prompts.attention_mask)
        once = open_reader(model, len(prompts), keep=False).read(prompts.tokens, prompts.attention_mask, n_read=3)
        reader = open_reader(model, len(prompts), keep=True)
        parts = [
            reader.read(prompts.tokens[:, rows], prompts.attention_mask[:, rows], n_read=3)
            for rows in (slice(0, -5), slice(-5, None))
        ]
    close(once, whole[:, -3:])
    close(parts[1], whole[:, -3:])


def test_a_model_that_its_cache_does_not_serve_takes_the_naive_path(bridges, monkeypatch):
    from fvlens.suffix import _bridge

    model = bridges("gpt2")
    monkeypatch.setattr(_bridge, "_verdicts", {})
    original = _bridge._FrozenLayer.update

    def forgetful(self, keys, values, *args, **kwargs):
        keys, values = original(self, keys, values, *args, **kwargs)
        return keys, torch.zeros_like(values)

    monkeypatch.setattr(_bridge._FrozenLayer, "update", forgetful)
    path, reason = choose_route(model)
    assert path == "naive"
    assert "a suffix over its cache differs from a whole pass by" in reason
    with pytest.raises(ValueError, match=r"path='kv' is not exact for this model .*differs from a whole pass"):
        choose_route(model, "kv")
    monkeypatch.setattr(_bridge, "_verdicts", {})
    monkeypatch.setattr(_bridge._FrozenLayer, "update", lambda self, *args, **kwargs: None)
    assert "its blocks cannot be run over a cache (TypeError" in choose_route(model)[1]
    assert not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("site", ["z", "resid_post"])
def test_a_model_whose_variants_part_from_whole_passes_takes_the_naive_path(bridges, monkeypatch, site):
    """What runs alone would be exact: only edits on the way, in the middle of the model, go wrong."""
    from fvlens.suffix import _bridge
    from fvlens.suffix._edits import SiteEdits

    model = bridges("gpt2")
    monkeypatch.setattr(_bridge, "_verdicts", {})
    assert choose_route(model)[0] == "kv"
    original = SiteEdits.of

    def lost(variants, layer, where):
        return SiteEdits() if (layer, where) == (model.cfg.n_layers // 2, site) else original(variants, layer, where)

    monkeypatch.setattr(SiteEdits, "of", lost)
    monkeypatch.setattr(_bridge, "_verdicts", {})
    path, reason = choose_route(model)
    assert path == "naive"
    assert "a suffix over its cache differs from a whole pass by" in reason


def test_hooks_of_others_mean_the_naive_path(bridges):
    model = bridges("gpt2")
    with hooked(model, {z_hook(0): lambda z: None}):
        assert choose_route(model) == ("naive", "hooks on the model")


def test_the_residual_stream_in_the_middle_of_a_block_cannot_be_steered(bridges):
    model = bridges("gpt2")

    class Middle(Steered):
        def additions(self):
            return {"blocks.1.hook_resid_mid": self.vector}

    with (
        pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_mid' cannot be steered on a TransformerBridge"),
        inject(model, Middle(1, torch.zeros(model.cfg.d_model))),
    ):
        pass
