"""Variants of many edits against whole forward passes with hooks, on every kind of architecture and both classes."""

import re

import matrix
import pytest
import torch
from architectures import ARCHITECTURES, FASTEST, build, word_prompts
from conftest import needs_hooked, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlens.interventions import hooked, resid_hook, z_hook
from fvlens.suffix import Edit, rows_of, run_prefix
from fvlens.suffix._edits import SiteEdits, joining

ROUTES = [(name, path) for name in ARCHITECTURES for path in ("weights", "kv") if path in ("kv", FASTEST[name])]
ROUTES = [(name, path) for name, path in ROUTES if FASTEST[name] != "naive"]


def drawn_edit(cfg, n_prompts, n_suffix, generator, dtype):
    """One edit of any kind, drawn."""

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    site, op, is_batched = pick("resid_post", "z"), pick("add", "replace", "scale"), pick(False, True)
    head = pick(None, *range(cfg.n_heads)) if site == "z" else None
    shape = (cfg.d_model,) if site == "resid_post" else (cfg.d_head,) if head is not None else (cfg.n_heads, cfg.d_head)
    if op == "scale" and pick(False, True):
        shape, is_batched = (), False
    value = torch.randn((n_prompts, *shape) if is_batched else shape, generator=generator, dtype=dtype)
    where = torch.rand(n_prompts, n_suffix, generator=generator) < 0.6
    where[:, 0] = True
    layer = int(torch.randint(cfg.n_layers, (1,), generator=generator))
    return Edit(layer, site, value, head=head, op=op, where=pick(None, where))


def drawn_variants(cfg, n_prompts, n_suffix, generator, dtype, n_edits=(0, 1, 2, 5, 1, 3)):
    return [tuple(drawn_edit(cfg, n_prompts, n_suffix, generator, dtype) for _ in range(n)) for n in n_edits]


def edited(x, edit, n_suffix):
    """The activation ``[prompt pos *axes]`` with one edit in it, one prompt and position after another."""
    x = x.clone()
    for prompt in range(len(x)):
        for place in range(n_suffix):
            if not (place == 0 if edit.where is None else bool(edit.where[prompt, place])):
                continue
            value = edit.value[prompt] if edit.is_batched else edit.value
            here = (prompt, x.shape[1] - n_suffix + place, *([] if edit.head is None else [edit.head]))
            if edit.op == "replace":
                x[here] = value
            else:
                x[here] = x[here] + value if edit.op == "add" else x[here] * value
    return x


def by_whole_passes(model, prompts, variant, n_suffix):
    """Logits at the last positions of whole passes, each edit by a hook of its own."""

    def hook(edits):
        def change(x):
            for edit in edits:
                x = edited(x, edit, n_suffix)
            return x

        return change

    places = {}
    for edit in variant:
        places.setdefault((z_hook if edit.site == "z" else resid_hook)(edit.layer), []).append(edit)
    with torch.no_grad(), hooked(model, {name: hook(edits) for name, edits in places.items()}):
        return model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -n_suffix:]


def compare(model, prompts, path, n_suffix, generator, *, dtype, tolerance):
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=n_suffix, path=path)
    variants = drawn_variants(model.cfg, len(prompts), n_suffix, generator, dtype)
    with torch.no_grad():
        together = run.logits(run.under(variants))
    keep = prompts.attention_mask[:, -n_suffix:].bool()
    for i, variant in enumerate(variants):
        expected = by_whole_passes(model, prompts, variant, n_suffix)[keep]
        difference = (together[:, i][keep] - expected).abs().max() / expected.abs().max()
        assert difference <= tolerance, (i, variant, float(difference))


@needs_hooked
@pytest.mark.parametrize(("name", "path"), ROUTES)
@pytest.mark.parametrize("n_suffix", [1, 3])
def test_variants_equal_whole_passes(generator, name, path, n_suffix):
    model = build(name, dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=1)
    for _ in range(2):
        compare(model, prompts, path, n_suffix, generator, dtype=torch.float64, tolerance=1e-8)


@pytest.mark.parametrize("backend", matrix.BACKENDS)
@pytest.mark.parametrize("name", matrix.checkpoints.ARCHITECTURES)
def test_variants_equal_whole_passes_on_every_architecture_of_the_matrix(generator, name, backend):
    model, prompts = matrix.loaded(name, backend), matrix.prompts(name).shuffled
    for path in matrix.fast_paths(name, backend):
        compare(model, prompts, path, 2, generator, dtype=torch.float32, tolerance=matrix.TOLERANCE)


@needs_hooked
@pytest.mark.parametrize("path", ["weights", "kv"])
def test_gradients_reach_the_values(generator, path):
    model = build("grouped-query", dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=1)
    run = run_prefix(model, prompts.tokens, prompts.attention_mask, n_suffix=2, path=path)
    cfg = model.cfg
    shapes = [(cfg.d_model,), (cfg.n_heads, cfg.d_head), (cfg.d_head,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    variants = [(Edit(0, "resid_post", values[0]), Edit(1, "z", values[1])), (Edit(1, "z", values[2], head=3),)]
    weights = torch.randn(len(prompts), 2, 2, cfg.d_vocab, generator=generator, dtype=torch.float64)

    def outcome(given):
        return (run.logits(run.under(given)) * weights).sum()

    found = torch.autograd.grad(outcome(variants), values)
    step = 1e-6
    for value, gradient in zip(values, found, strict=True):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            value += step * direction
            up = outcome(variants)
            value -= 2 * step * direction
            down = outcome(variants)
            value += step * direction
        assert float((gradient * direction).sum()) == pytest.approx(float((up - down) / (2 * step)), rel=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_edits_of_many_variants_at_once_are_those_of_each(tiny, seed, n_variants):
    generator = seeded(seed)
    cfg, n_prompts, n_suffix = tiny.cfg, 3, 2
    variants = drawn_variants(cfg, n_prompts, n_suffix, generator, torch.float32, n_edits=[2] * n_variants)
    z = torch.randn(n_prompts, n_variants, n_suffix, cfg.n_heads, cfg.d_head, generator=generator)
    before = z.clone()
    for layer in range(cfg.n_layers):
        got = SiteEdits.of(variants, layer, "z").apply(z)
        for i, variant in enumerate(variants):
            expected = z[:, i]
            for edit in variant:
                if (edit.layer, edit.site) == (layer, "z"):
                    expected = edited(expected, edit, n_suffix)
            torch.testing.assert_close(got[:, i], expected)
    assert torch.equal(z, before)


def test_a_variant_joins_at_its_lowest_edit():
    value = torch.zeros(4)
    assert joining((Edit(2, "z", value, head=0), Edit(1, "resid_post", value)), 5) == (1, 1)
    assert joining((Edit(1, "resid_post", value), Edit(1, "z", value, head=0)), 5) == (1, 0)
    assert joining((), 5) == (5, 0)


def test_rows_of_cut_what_is_a_prompts_own():
    own, shared = torch.arange(12.0).view(3, 4), torch.ones(4)
    where = torch.tensor([[True, False], [False, True], [True, True]])
    first, second = Edit(0, "resid_post", own, where=where), Edit(1, "resid_post", shared)
    ((a, b), (c,)) = rows_of([(first, second), (first,)], slice(1, 3))
    assert torch.equal(a.value, own[1:3])
    assert torch.equal(a.where, where[1:3])
    assert b is second
    assert c is a  # cut once


# --- errors ---


def test_unknown_sites_and_ops_are_refused(unchecked):
    with pytest.raises(ValueError, match="site='mlp' and op='add'; expected one of resid_post, z and one of add, repl"):
        Edit(0, "mlp", torch.zeros(3))
    with pytest.raises(ValueError, match="op='double'; expected one of"):
        Edit(0, "z", torch.zeros(3), op="double")
    with pytest.raises(ValueError, match="head=1 at site='resid_post'; only 'z' has heads"):
        Edit(0, "resid_post", torch.zeros(3), head=1)


def test_edits_that_do_not_fit_are_refused(tiny, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    run = run_prefix(tiny, prompts.tokens, prompts.attention_mask)
    d_model, d_head, n = tiny.cfg.d_model, tiny.cfg.d_head, len(prompts)
    layers, heads = f"layers 0..{tiny.cfg.n_layers - 1}", f"heads 0..{tiny.cfg.n_heads - 1}"
    cases = [
        (Edit(9, "resid_post", torch.zeros(d_model)), f"layer=9, head=None; the model has {layers} and {heads}"),
        (Edit(0, "z", torch.zeros(d_head), head=9), f"layer=0, head=9; the model has {layers} and {heads}"),
        (Edit(0, "resid_post", torch.zeros(5)), f"shape [5] at resid_post of layer 0; expected [{d_model}], or with"),
        (Edit(1, "z", torch.zeros(2, d_head), head=0), f"with a leading axis of {n} prompts [{n}, {d_head}]"),
        (
            Edit(0, "resid_post", torch.zeros(d_model), where=torch.ones(1, 1).bool()),
            f"where has shape [1, 1]; expected [prompt suffix] = [{n}, 1]",
        ),
    ]
    for edit, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            run.under([(edit,)])
