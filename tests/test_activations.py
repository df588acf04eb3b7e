"""Mean head outputs against averages taken prompt by prompt, without batches and without padding."""

import dataclasses
import re

import pytest
import torch
from architectures import build, global_randomness, rows_of, word_prompts
from conftest import random_model
from test_memory import starving

import fvlens
from fvlens.activations import mean_residuals, position_mask, position_names
from fvlens.models import fingerprint
from fvlens.prompts import TokenClass
from fvlens.suffix import has_hooks


def one_by_one(model, prompts, mask):
    """Mean z over the masked tokens, each prompt alone and unpadded."""
    picked = [[] for _ in range(model.cfg.n_layers)]
    for row, keep, where in zip(rows_of(prompts)[0], prompts.attention_mask, mask, strict=True):
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]))
        for layer in range(model.cfg.n_layers):
            picked[layer].append(cache["z", layer][0][where[keep.bool()]])
    return torch.stack([torch.cat(tokens).mean(dim=0) for tokens in picked])


@pytest.mark.parametrize("name", ["gpt2", "grouped-query", "parallel", "alibi", "shortformer"])
@pytest.mark.parametrize("positions", ["last", "demonstration_label", "query", "separator"])
def test_means_equal_those_taken_one_by_one(generator, name, positions):
    model = build(name)
    prompts = word_prompts(model, generator)
    assert not prompts.attention_mask.all()
    mask = position_mask(prompts, positions)
    expected = one_by_one(model, prompts, mask)
    assert expected.abs().max() > 0.1
    for batch_size in (1, 3, 32):
        means = fvlens.mean_head_activations(model, prompts, positions=positions, batch_size=batch_size, progress=False)
        torch.testing.assert_close(means.z, expected, rtol=1e-4, atol=1e-5)
        assert means.positions == positions


def test_means_on_the_embedded_model(model, generator):
    clean = fvlens.build_prompts(model, fvlens.load_relation("plural"), n_prompts=5, n_shots=2, generator=generator)
    means = fvlens.mean_head_activations(model, clean, batch_size=2, progress=False)
    expected = one_by_one(model, clean, position_mask(clean, "last"))
    torch.testing.assert_close(means.z, expected, rtol=1e-4, atol=1e-5)


def test_prompts_weigh_alike_and_order_does_not_matter(tiny, generator):
    prompts = word_prompts(tiny, generator)
    z = fvlens.mean_head_activations(tiny, prompts, progress=False).z
    parts = [fvlens.mean_head_activations(tiny, prompts.select(p), progress=False).z for p in ([0, 1], range(2, 8))]
    torch.testing.assert_close(z, (2 * parts[0] + 6 * parts[1]) / 8, rtol=1e-4, atol=1e-5)
    order = torch.randperm(8, generator=generator).tolist()
    again = fvlens.mean_head_activations(tiny, prompts.select(order), progress=False).z
    torch.testing.assert_close(z, again, rtol=1e-4, atol=1e-5)


def test_position_masks_partition_the_real_tokens(tiny, generator):
    template = fvlens.prompts.Template("t", "Q:{input}\nA:{output}\n\n", "Q:{input}\nA:", prefix="Words.\n")
    prompts = word_prompts(tiny, generator, template=template)
    names = [name for name in position_names() if name != "last"]
    assert names == [kind.name.lower() for kind in TokenClass if kind is not TokenClass.PADDING]
    total = sum(position_mask(prompts, name).int() for name in names)
    assert torch.equal(total, prompts.attention_mask.int())
    last = position_mask(prompts, "last")
    assert torch.equal(last.nonzero()[:, 1], torch.full((len(prompts),), prompts.tokens.shape[1] - 1))
    assert torch.equal(last, position_mask(prompts, "predictive"))


def test_means_say_where_they_come_from(tiny, generator):
    relation = fvlens.load_relation("antonym")
    prompts = fvlens.build_prompts(
        tiny, relation, n_prompts=3, n_shots=2, labels="permuted", template="colon", generator=generator
    )
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    assert (means.relation, str(means.template), means.n_shots, means.labels) == ("antonym", "colon", 2, "permuted")
    assert (means.n_prompts, means.data_hash) == (3, prompts.data_hash)
    assert means.fingerprint == fingerprint(tiny)
    assert (means.z.device.type, means.z.dtype) == ("cpu", torch.float32)
    assert not means.z.is_inference()
    with pytest.raises(dataclasses.FrozenInstanceError):
        means.relation = "synonym"


def test_hooks_of_the_user_count_and_are_kept(generator):
    model, changed = random_model(), random_model()
    change = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        changed.blocks[0].mlp.b_out += change
    prompts = word_prompts(model, generator)
    model.add_hook("blocks.0.hook_mlp_out", lambda out, hook: out + change)
    hooked = fvlens.mean_head_activations(model, prompts, progress=False).z
    torch.testing.assert_close(hooked, fvlens.mean_head_activations(changed, prompts, progress=False).z)
    assert has_hooks(model)
    model.reset_hooks()
    assert (fvlens.mean_head_activations(model, prompts, progress=False).z - hooked).abs().max() > 1e-3
    assert not has_hooks(model)


def test_sums_are_single_precision_for_half_precision_models(generator):
    model = build("gpt2", dtype=torch.bfloat16)
    prompts = word_prompts(model, generator)
    means = fvlens.mean_head_activations(model, prompts, batch_size=1, progress=False)
    z = []
    for row in rows_of(prompts)[0]:
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]))
        z.append(torch.stack([cache["z", layer][0, -1] for layer in range(3)]).double())
    expected = torch.stack(z).mean(dim=0).float()
    torch.testing.assert_close(means.z, expected, rtol=0.02, atol=0.02)  # padded forwards round otherwise
    assert not torch.equal(means.z, means.z.bfloat16().float())


def test_global_randomness_untouched_and_same_bits_again(tiny, generator):
    prompts = word_prompts(tiny, generator)
    before = global_randomness()
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    assert torch.equal(means.z, fvlens.mean_head_activations(tiny, prompts, progress=False).z)
    assert before == global_randomness()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.parameters())


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_is_checked(tiny, generator, batch_size):
    prompts = word_prompts(tiny, generator, n_shots=0)
    with pytest.raises(ValueError, match=f"mean_head_activations: expected batch_size >= 1, got {batch_size}"):
        fvlens.mean_head_activations(tiny, prompts, batch_size=batch_size, progress=False)


def test_positions_are_checked(tiny, generator):
    bare = word_prompts(tiny, generator, n_shots=0)
    with pytest.raises(ValueError, match=re.escape("positions='labels'; expected one of last, bos, prefix,")):
        fvlens.mean_head_activations(tiny, bare, positions="labels", progress=False)
    message = "positions='demonstration_input': 8 of 8 prompts have no such token (they have 0 demonstrations"
    with pytest.raises(ValueError, match=re.escape(message)):
        fvlens.mean_head_activations(tiny, bare, positions="demonstration_input", progress=False)
    assert not has_hooks(tiny)


def test_an_error_inside_leaves_no_hooks(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    broken = dataclasses.replace(prompts, tokens=torch.full_like(prompts.tokens, tiny.cfg.d_vocab))
    with pytest.raises(IndexError):
        fvlens.mean_head_activations(tiny, broken, progress=False)
    assert not has_hooks(tiny)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_mean_residuals_are_those_of_single_prompts(tiny, generator, batch_size):
    prompts = word_prompts(tiny, generator)
    found = mean_residuals(tiny, prompts, layers=[2, 0, 2], batch_size=batch_size)
    last = []
    for row in rows_of(prompts)[0]:
        with torch.no_grad():
            _, cache = tiny.run_with_cache(torch.tensor([row]))
        last.append(torch.stack([cache["resid_post", layer][0, -1] for layer in (2, 0, 2)]).double())
    torch.testing.assert_close(found, torch.stack(last).mean(dim=0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert found.dtype == torch.float32 and not found.is_inference()


def test_mean_residuals_of_what_does_not_fit(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    with starving(tiny, 0), pytest.raises(MemoryError, match="mean_residuals: out of memory with a single prompt"):
        mean_residuals(tiny, prompts, layers=[0], batch_size=1)
