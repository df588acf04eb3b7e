"""Gradient screens: against finite differences, plain autograd and a second implementation."""

import dataclasses
import inspect
import math
import re
import typing

import pytest
import torch
from architectures import ARCHITECTURES, build, effects_of, global_randomness, likely_answers, means_of, word_prompts
from checkpoints import save
from conftest import random_model, seeded

import fvlens
from fvlens.activations import position_mask
from fvlens.models import embedded_folder
from fvlens.prompts import TokenClass
from fvlens.screens import Screening, relevance, relevance_rules
from fvlens.suffix import has_hooks, plan_slices
from fvlens.types import Head

SCREENS = ("atp", "ig", "lrp")


@pytest.fixture(scope="module")
def bridge():
    """The embedded model as a TransformerBridge."""
    return booted(embedded_folder())


def booted(folder, **settings):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu", **settings)


def relation_prompts(model, generator, n_prompts=3, labels="random", n_shots=4, **settings):
    relation = fvlens.load_relation("antonym")
    settings = dict(n_prompts=n_prompts, labels=labels, n_shots=n_shots, **settings)
    return fvlens.build_prompts(model, relation, generator=generator, **settings)


# --- an independent answer: probabilities under hooks of our own ---


def moved_probability(model, prompts, means, layer, shares, *, whole=False):
    """P(answer) if head h of a layer goes ``shares[h]`` of the way to its mean; whole prompts, one batch, no fvlens."""
    width = prompts.answer_mask.shape[1] if whole else 1
    given = prompts.answer_tokens[:, : width - 1].clamp(min=0)
    tokens = torch.cat([prompts.tokens, given], dim=1)
    mask = torch.cat([prompts.attention_mask, torch.ones_like(given)], dim=1)
    where = torch.nn.functional.pad(position_mask(prompts, means.positions), (0, width - 1))[..., None, None]

    def move(z, hook):
        return z + where * torch.as_tensor(shares).to(z)[:, None] * (means.z[layer].to(z) - z)

    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", move)]):
        logs = model(tokens, attention_mask=mask).double().log_softmax(dim=-1)
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for i in range(width):
        at = prompts.tokens.shape[1] - 1 + i
        token = prompts.answer_tokens[:, i]
        found = logs[torch.arange(len(prompts)), at, token.clamp(min=0)]
        total += torch.where(token < 0, 0.0, found)
    return total.exp()


def slope(model, prompts, means, layer, head, at, step=1e-4, **settings):
    """Derivative of P by head ``head``'s share, all heads of its layer at share ``at``, by central differences."""
    shares = torch.full((model.cfg.n_heads,), float(at), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        nudged = shares.clone()
        nudged[head] += sign * step
        ends.append(moved_probability(model, prompts, means, layer, nudged, **settings))
    return (ends[0] - ends[1]) / (2 * step)


CELLS = [Head(0, 1), Head(1, 3), Head(2, 0)]


@pytest.mark.parametrize(
    ("name", "answer", "positions"),
    [(name, "first", "last") for name in ("gpt2", "grouped-query", "parallel", "soft-caps", "local", "alibi")]
    + [(name, "whole", "demonstration_label") for name in ("gpt2", "grouped-query", "shortformer")]
    + [("shortformer", "whole", "last"), ("gpt2", "first", "query")],
)
def test_attribution_patching_is_the_slope_of_the_exact_effect(models, generator, name, answer, positions):
    """At share 0, on the path of exact patching: P(z~ + share (mean z - z~)). In float64."""
    model = models(name, dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=2)
    means = means_of(model, prompts, stretch=3, positions=positions)
    got = effects_of(model, prompts, means, method="atp", answer=answer)
    assert got.path == ("naive" if name == "shortformer" else "kv")
    for layer, head in CELLS:
        expected = slope(model, prompts, means, layer, head, 0, whole=answer == "whole")
        if layer == 2 and positions != "last":
            assert (expected == 0).all()  # nobody reads the last layer there
        else:
            assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got.cie[:, layer, head].double(), expected, rtol=1e-4, atol=1e-7)
    still = moved_probability(model, prompts, means, 0, [0.0] * 4, whole=answer == "whole")
    torch.testing.assert_close(got.baseline.double(), still, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "answer"), [("gpt2", "first"), ("grouped-query", "whole"), ("shortformer", "whole")])
def test_integrated_gradients_average_slopes_at_midpoints(models, generator, name, answer):
    model = models(name, dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=2)
    means = means_of(model, prompts, stretch=3, positions="last" if answer == "first" else "query")
    got = effects_of(model, prompts, means, method="ig", n_steps=3, answer=answer)
    assert (got.method, got.n_steps) == ("ig", 3)
    for layer, head in CELLS:
        at = [slope(model, prompts, means, layer, head, x, whole=answer == "whole") for x in (1 / 6, 1 / 2, 5 / 6)]
        expected = torch.stack(at).mean(dim=0)
        assert expected.abs().max() > (
            1e-4 if layer < 2 or answer == "first" else -1
        )  # nobody reads layer 2 at a query
        torch.testing.assert_close(got.cie[:, layer, head].double(), expected, rtol=1e-4, atol=1e-7)
    still = moved_probability(model, prompts, means, 0, [0.0] * 4, whole=answer == "whole")
    torch.testing.assert_close(got.baseline.double(), still, rtol=1e-5, atol=1e-9)


def test_integrated_gradients_of_a_layer_add_up_to_the_layers_effect(models, generator):
    """Completeness, with an error that falls with the square of the number of midpoints."""
    model = models("gpt2", dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=4)
    means = means_of(model, prompts, stretch=2)
    whole = torch.stack(
        [moved_probability(model, prompts, means, layer, [1.0] * 4) for layer in range(model.cfg.n_layers)], dim=1
    )
    still = moved_probability(model, prompts, means, 0, [0.0] * 4)[:, None]
    assert (whole - still).abs().max() > 0.05
    errors = {}
    for n_steps in (8, 16, 32):
        got = effects_of(model, prompts, means, method="ig", n_steps=n_steps)
        errors[n_steps] = float((got.cie.sum(dim=2) - (whole - still)).abs().max())
    assert errors[32] < 1e-3
    assert errors[8] / errors[16] > 3
    assert errors[16] / errors[32] > 3


def test_attribution_patching_is_nearly_exact_for_small_changes(models, generator):
    """What is left is of second order: with a tenth of the change, a hundredth of the error."""
    model = models("gpt2", dtype=torch.float64)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=1)
    own = means_of(model, prompts)  # of one prompt: its own outputs
    direction = torch.randn(own.z.shape, generator=generator)
    errors = []
    for size in (0.1, 0.01):
        means = dataclasses.replace(own, z=own.z + size * direction)
        exact = effects_of(model, prompts, means, path="naive").cie
        got = effects_of(model, prompts, means, method="atp").cie
        assert (exact.abs() > 1e-5 * size).all()
        errors.append(float((got - exact).norm() / exact.norm()))
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]


# --- relevance ---


def pattern_times_gradient(model, prompts):
    """Positive ``A * dlogit_y/dA`` at the last query, summed over label tokens; plain autograd on whole prompts."""
    patterns = {}

    def keep(pattern, hook):
        pattern = pattern.detach().requires_grad_() if not pattern.requires_grad else pattern
        pattern.retain_grad()
        patterns[hook.name] = pattern
        return pattern

    with torch.enable_grad(), model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)]):
        logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        chosen = logits[torch.arange(len(prompts)), prompts.first_answer_token]
        grads = torch.autograd.grad(chosen.sum(), list(patterns.values()))
    labels = (prompts.token_classes == int(TokenClass.DEMONSTRATION_LABEL))[:, None]
    scores = [
        ((pattern * grad)[:, :, -1].clamp(min=0) * labels).sum(dim=-1).detach()
        for pattern, grad in zip(patterns.values(), grads, strict=True)
    ]
    return torch.stack(scores, dim=1)


def screening_of(model, prompts, path="kv"):
    """What :func:`fvlens.indirect_effects` hands to the screens, built here."""
    last = position_mask(prompts, "last")
    cfg = model.cfg
    return Screening(
        model=model,
        tokens=prompts.tokens,
        mask=prompts.attention_mask,
        targets=torch.where(last, prompts.first_answer_token[:, None], -1),
        patched=last,
        means=torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head),
        path=path,
    )


@pytest.mark.parametrize("path", ["kv", "naive"])
@pytest.mark.parametrize("name", ["gpt2", "grouped-query", "soft-caps", "qk-norm"])
def test_relevance_without_rules_is_pattern_times_gradient(models, generator, name, path):
    model = models(name)
    prompts = word_prompts(model, generator, n_prompts=4)
    expected = pattern_times_gradient(model, prompts)
    keys = prompts.token_classes == int(TokenClass.DEMONSTRATION_LABEL)
    scores, baseline, missing = relevance(screening_of(model, prompts, path), slice(0, 4), keys, rules=False)
    assert expected.max() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
    chances = logits.softmax(dim=-1)[torch.arange(4), prompts.first_answer_token]
    torch.testing.assert_close(baseline, chances, rtol=1e-4, atol=1e-7)
    assert missing == ""
    ruled, _, _ = relevance(screening_of(model, prompts, path), slice(0, 4), keys)
    assert (ruled - scores).abs().max() > 0.01


def half(x):
    """Same value, half the gradient."""
    return (x + x.detach()) / 2


def linear_norm(norm, x, centred):
    """A norm whose scale is a constant of the backward pass."""
    x = x - x.mean(dim=-1, keepdim=True) if centred else x
    scale = (x.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt().detach()
    return x / scale * norm.w + (norm.b if centred else 0)


def relevance_by_hand(model, row, answer):
    """AttnLRP's backward pass of one unpadded prompt, written out: gradient times pattern of the last query."""
    cfg = model.cfg
    centred = cfg.normalization_type == "LN"
    resid = (model.W_E[row] + model.W_pos[: len(row)]).detach()
    patterns = []
    causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
    for block in model.blocks:
        x = linear_norm(block.ln1, resid, centred)
        q, k, v = (
            half(torch.einsum("td,hde->the", x, w) + b)
            for w, b in (
                (block.attn.W_Q, block.attn.b_Q), (block.attn.W_K, block.attn.b_K), (block.attn.W_V, block.attn.b_V)
            )
        )  # fmt: skip
        scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(cfg.d_head)
        pattern = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
        if not pattern.requires_grad:
            pattern.requires_grad_()
        patterns.append(pattern)
        z = torch.einsum("hqk,khe->qhe", half(pattern), v)
        resid = resid + torch.einsum("qhe,hed->qd", z, block.attn.W_O) + block.attn.b_O
        x = linear_norm(block.ln2, resid, centred)
        if cfg.gated_mlp:
            gate, up = x @ block.mlp.W_gate, x @ block.mlp.W_in
            acted = torch.sigmoid(gate).detach() * gate  # silu(g) = sigmoid(g) g
            hidden = half(acted) * half(up).detach() + half(acted).detach() * half(up)
            hidden = hidden - (acted * up).detach() + block.mlp.b_in
        else:
            before = x @ block.mlp.W_in + block.mlp.b_in
            hidden = before * (torch.nn.functional.gelu(before, approximate="tanh") / before).detach()
        resid = resid + hidden @ block.mlp.W_out + block.mlp.b_out
    logit = (linear_norm(model.ln_final, resid, centred) @ model.W_U + model.b_U)[-1, answer]
    grads = torch.autograd.grad(logit, patterns)
    return logit, torch.stack([(p * g)[:, -1].detach() for p, g in zip(patterns, grads, strict=True)])


@pytest.mark.parametrize("path", ["kv", "naive"])
@pytest.mark.parametrize(
    "kind", [dict(), dict(gated_mlp=True, act_fn="silu", normalization_type="RMS")], ids=["plain", "gated"]
)
def test_relevance_equals_a_second_implementation(generator, kind, path):
    model = random_model(**kind, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith(".w"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    prompts = word_prompts(model, generator, n_prompts=3)
    got = effects_of(model, prompts, means_of(model, prompts), method="lrp", path=path)
    assert got.note == "AttnLRP rules for norms, activation functions, gates and attention products"
    for i in range(3):
        real = prompts.attention_mask[i].bool()
        logit, found = relevance_by_hand(model, prompts.tokens[i, real], prompts.first_answer_token[i])
        with torch.no_grad():  # the second implementation is this model
            torch.testing.assert_close(
                logit.detach(), model(prompts.tokens[i, real][None])[0, -1, prompts.first_answer_token[i]]
            )
        labels = prompts.token_classes[i, real] == int(TokenClass.DEMONSTRATION_LABEL)
        expected = (found.clamp(min=0) * labels).sum(dim=-1)
        assert expected.max() > 1e-3
        torch.testing.assert_close(got.cie[i].double(), expected, rtol=1e-4, atol=1e-7)


def test_rules_leave_every_activation_as_it_is(models, generator):
    from fvlens.interventions import hooked

    for name in ("gpt2", "grouped-query", "soft-caps"):
        model = models(name)
        prompts = word_prompts(model, generator, n_prompts=3)
        with torch.no_grad():
            plain = model(prompts.tokens, attention_mask=prompts.attention_mask)
            with hooked(model, relevance_rules(model).edits):
                ruled = model(prompts.tokens, attention_mask=prompts.attention_mask)
        assert torch.equal(plain, ruled)


def test_relevance_names_the_rules_that_it_could_not_apply(generator):
    model = random_model(num_experts=2, experts_per_token=1, gated_mlp=True, act_fn="silu", normalization_type="RMS")
    prompts = word_prompts(model, generator, n_prompts=2)
    got = effects_of(model, prompts, means_of(model, prompts), method="lrp")
    assert got.note.endswith("plain gradient instead: activation functions at blocks.0.mlp.hook_post and 2 more")
    assert got.cie.max() > 0

    silent = random_model()
    prompts = word_prompts(silent, generator, n_prompts=2)
    silent.blocks[1].ln1.hook_scale = torch.nn.Identity()  # the name stays, the hook never runs
    silent.blocks[2].attn.hook_q = torch.nn.Identity()
    got = effects_of(silent, prompts, means_of(silent, prompts), method="lrp")
    expected = "norm scales at blocks.1.ln1.hook_scale; attention products at blocks.2.attn.hook_q"
    assert got.note.endswith(f"plain gradient instead: {expected}")


# --- what must hold for every screen ---


@pytest.mark.parametrize("method", SCREENS)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "shortformer"])
def test_both_paths_agree(models, generator, name, method):
    model = models(name)
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=4)
    assert not prompts.attention_mask.all()
    means = means_of(model, prompts, stretch=2)
    fast, slow = (effects_of(model, prompts, means, method=method, path=path) for path in ("kv", "naive"))
    assert (fast.path, slow.path) == ("kv", "naive")
    assert fast.cie.abs().max() > 1e-2
    torch.testing.assert_close(fast.cie, slow.cie, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fast.baseline, slow.baseline, rtol=1e-4, atol=1e-6)
    assert not has_hooks(model)


@pytest.mark.parametrize("positions", ["bos", "query"])
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_both_paths_agree_where_the_suffix_holds_padding(models, generator, method, positions):
    model = models("grouped-query")
    prompts = word_prompts(model, generator, n_shots=2, n_prompts=4)
    means = means_of(model, prompts, stretch=2, positions=positions)
    settings = dict(method=method, answer="whole")
    fast, slow = (effects_of(model, prompts, means, path=path, **settings) for path in ("kv", "naive"))
    assert fast.cie.abs().max() > 1e-3
    assert slow.cie.isfinite().all()
    torch.testing.assert_close(fast.cie, slow.cie, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("path", ["kv", "naive"])
@pytest.mark.parametrize("method", SCREENS)
def test_padding_batch_and_order_change_nothing(models, generator, method, path):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_prompts=5)
    means = means_of(model, prompts, stretch=2)
    whole = effects_of(model, prompts, means, method=method, path=path)
    n_pad = 5
    padded = dataclasses.replace(
        prompts,
        tokens=torch.nn.functional.pad(prompts.tokens, (n_pad, 0), value=7),
        attention_mask=torch.nn.functional.pad(prompts.attention_mask, (n_pad, 0)),
        token_classes=torch.nn.functional.pad(prompts.token_classes, (n_pad, 0), value=int(TokenClass.PADDING)),
    )
    order = torch.randperm(len(prompts), generator=generator).tolist()
    alone = [prompts.select([i]) for i in range(len(prompts))]
    for got in (
        effects_of(model, padded, means, method=method, path=path).cie,
        effects_of(model, prompts.select(order), means, method=method, path=path).cie[torch.tensor(order).argsort()],
        torch.cat([effects_of(model, one, means, method=method, path=path).cie for one in alone]),
    ):
        torch.testing.assert_close(got, whole.cie, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("method", SCREENS)
def test_memory_bound_changes_nothing(models, generator, method):
    model = models("gpt2")
    prompts = word_prompts(model, generator, n_prompts=5)
    means = means_of(model, prompts, stretch=2)
    whole = effects_of(model, prompts, means, method=method)
    with pytest.raises(ValueError, match="max_memory=1 bytes is too small: one prompt of") as error:
        effects_of(model, prompts, means, method=method, max_memory=1)
    least = int(re.search(r"needs about (\d+) bytes", str(error.value))[1])
    n_copies = 8 if method == "ig" else 1
    shape = dict(n_pos=prompts.tokens.shape[1], n_suffix=1, n_variants=n_copies, path="kv", gradients=True)
    cuts = set()
    for factor in (1, 2, 4):
        plan = plan_slices(model, **shape, max_memory=factor * least)
        cuts.add((plan.prompts, plan.variants))
        cut = effects_of(model, prompts, means, method=method, max_memory=factor * least)
        torch.testing.assert_close(cut.cie, whole.cie, rtol=1e-3, atol=5e-6)
    assert (1, 1) in cuts
    assert len(cuts) > 1


@pytest.mark.parametrize("path", ["kv", "naive"])
@pytest.mark.parametrize("method", SCREENS)
def test_parameters_and_global_state_are_left_alone(generator, method, path):
    model = random_model()
    prompts = word_prompts(model, generator, n_prompts=2)
    means = means_of(model, prompts)
    frozen = model.blocks[0].mlp.W_in
    frozen.requires_grad_(False)
    model.W_E.grad = torch.ones_like(model.W_E)
    before, flags = global_randomness(), [parameter.requires_grad for parameter in model.parameters()]
    first = effects_of(model, prompts, means, method=method, path=path)
    again = effects_of(model, prompts, means, method=method, path=path)
    assert torch.equal(first.cie, again.cie)
    assert torch.is_grad_enabled()
    broken = dataclasses.replace(prompts, tokens=torch.full_like(prompts.tokens, model.cfg.d_vocab))
    with pytest.raises(IndexError):
        effects_of(model, broken, means, method=method, path=path)
    with torch.no_grad():
        inside = effects_of(model, prompts, means, method=method, path=path)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        deeper = effects_of(model, prompts.select([0, 1]), means, method=method, path=path)
        assert torch.is_inference_mode_enabled()
    for got in (inside, deeper):
        assert torch.equal(got.cie, first.cie)
        assert not got.cie.requires_grad
    assert not has_hooks(model)
    assert before == global_randomness()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(model.W_E.grad, torch.ones_like(model.W_E))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not model.W_E)


@pytest.mark.parametrize(
    ("method", "place", "message"),
    [
        ("atp", "hook_z", "the hook blocks.1.attn.hook_z never ran, so there is no gradient to take"),
        ("ig", "hook_z", "the hook blocks.1.attn.hook_z never ran, so there is no gradient to take"),
        ("lrp", "hook_pattern", "the hook blocks.1.attn.hook_pattern never ran, so there is no gradient to take"),
    ],
)
def test_a_hook_that_never_ran_is_an_error(generator, method, place, message):
    model = random_model()
    prompts = word_prompts(model, generator, n_prompts=2)
    means = means_of(model, prompts)
    setattr(model.blocks[1].attn, place, torch.nn.Identity())  # the name stays, the hook never runs
    with pytest.raises(RuntimeError, match=message):
        effects_of(model, prompts, means, method=method, path="naive")
    assert not has_hooks(model)


@pytest.mark.parametrize("method", SCREENS)
def test_half_precision_comes_close(generator, method):
    single = build("gpt2")
    prompts = word_prompts(single, generator)
    expected = effects_of(single, prompts, means_of(single, prompts, stretch=2), method=method)
    rounded = build("gpt2", dtype=torch.bfloat16)
    got = effects_of(rounded, prompts, means_of(rounded, prompts, stretch=2), method=method)
    assert got.cie.dtype == got.baseline.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([got.cie.flatten(), expected.cie.flatten()]))[0, 1]
    assert correlation > 0.97


@pytest.mark.parametrize("method", ["atp", "ig"])
def test_small_probabilities_survive_float16(generator, method):
    """The gradient of P is far below float16's smallest number; that of log P is not."""
    single, rounded = build("gpt2"), build("gpt2", dtype=torch.float16)
    prompts = word_prompts(single, generator, n_prompts=4)
    with torch.no_grad():
        unlikely = single(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1].argmin(dim=-1)
    prompts = dataclasses.replace(prompts, answer_tokens=unlikely[:, None])
    expected = effects_of(single, prompts, means_of(single, prompts), method=method)
    assert expected.baseline.max() < 6e-8  # the smallest positive float16
    got = effects_of(rounded, prompts, means_of(rounded, prompts), method=method)
    error = (got.cie - expected.cie).norm() / expected.cie.norm()
    assert error < 0.1


# --- TransformerBridge ---


@pytest.mark.parametrize("method", SCREENS)
def test_a_bridge_gives_the_same_numbers(model, bridge, generator, method):
    prompts = relation_prompts(model, generator)
    clean = relation_prompts(model, generator, labels="true")
    hooked_model = effects_of(model, prompts, means_of(model, clean), method=method)
    means = means_of(bridge, clean)
    for path in ("kv", "naive"):
        got = effects_of(bridge, prompts, means, method=method, path=path)
        assert got.path == path
        assert got.note == hooked_model.note
        assert hooked_model.cie.abs().max() > 1e-3
        torch.testing.assert_close(got.cie, hooked_model.cie, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(got.baseline, hooked_model.baseline, rtol=1e-4, atol=1e-6)
    assert not has_hooks(bridge)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bridge.parameters())


def slopes_by_autograd(model, prompts, means, layer, at):
    """Derivative of P by every head's share at ``at``: whole prompts, gradient of the shares themselves."""
    shares = torch.full((model.cfg.n_heads, 1), float(at), requires_grad=True)

    def move(z, hook):
        return torch.cat([z[:, :-1], z[:, -1:] + shares * (means.z[layer] - z[:, -1:].detach())], dim=1)

    found = []
    for i in range(len(prompts)):
        with torch.enable_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", move)]):
            logits = model(prompts.tokens[i : i + 1], attention_mask=prompts.attention_mask[i : i + 1])
            chance = logits[0, -1].softmax(dim=-1)[prompts.first_answer_token[i]]
        found.append(torch.autograd.grad(chance, shares)[0][:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "gpt-j", "gemma2", "neox"])
def test_bridges_of_other_architectures_against_plain_autograd(tmp_path, generator, name):
    model = booted(save(name, tmp_path))
    prompts = likely_answers(model, relation_prompts(model, generator, n_prompts=2, n_shots=2))
    means = means_of(model, prompts, stretch=3)
    for method, at in (("atp", [0.0]), ("ig", [0.25, 0.75])):
        got = effects_of(model, prompts, means, method=method, n_steps=2)
        for layer in range(3):
            each = [slopes_by_autograd(model, prompts, means, layer, x) for x in at]
            expected = torch.stack(each).mean(dim=0)
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(got.cie[:, layer], expected, rtol=1e-3, atol=1e-6)
    if name == "gpt-j":  # the bridge leaves its attention to Hugging Face and can only look at the pattern
        message = "this model only shows the activation at blocks.0.attn.hook_pattern, what a hook changes there has no"
        with pytest.raises(RuntimeError, match=message):
            effects_of(model, prompts, means, method="lrp")
        assert not has_hooks(model)
        return
    keys = prompts.token_classes == int(TokenClass.DEMONSTRATION_LABEL)
    plain, _, _ = relevance(screening_of(model, prompts), slice(0, 2), keys, rules=False)
    torch.testing.assert_close(plain, pattern_times_gradient(model, prompts), rtol=1e-3, atol=1e-5)
    assert effects_of(model, prompts, means, method="lrp").note == (
        "AttnLRP rules for norms, activation functions, gates and attention products"
    )


# --- on the embedded model ---


@pytest.mark.parametrize("labels", ["permuted", "random"])
def test_screens_of_the_embedded_model(model, labels):
    """Means over every 60th relation; single relations scatter (see the table in ``fvlens/attribution/README.md``)."""
    quality = {m: [] for m in SCREENS}
    for name in fvlens.list_relations()[::60]:
        g = seeded()
        split = fvlens.load_relation(name).split(g)
        common = dict(queries=split.valid, relation=name, generator=g)
        clean = fvlens.build_prompts(model, split.train, n_prompts=100, **common)
        corrupted = fvlens.build_prompts(model, split.train, n_prompts=25, labels=labels, **common)
        means = means_of(model, clean)
        exact = effects_of(model, corrupted, means)
        for m, found in quality.items():
            screen = effects_of(model, corrupted, means, method=m, recheck=10)
            assert m == "lrp" or screen.top(1) == exact.top(1)
            found.append(screen.compare(exact))
    spearman = {m: sum(q.spearman for q in found) / len(found) for m, found in quality.items()}
    overlap = {m: sum(q.overlap for q in found) / len(found) for m, found in quality.items()}
    assert spearman["atp"] > 0.7 and spearman["ig"] > 0.8
    assert min(spearman["atp"], spearman["ig"]) > spearman["lrp"] > 0.1
    assert min(overlap["atp"], overlap["ig"]) > 0.8 - 1e-9


# --- the table ---


def test_a_screen_is_one_row_of_the_table(tiny, generator, monkeypatch):
    """What stands there is run, named and checked like the others, and the command offers what stands there."""
    from fvlens import cli, screens
    from fvlens.attribution import METHODS

    assert ("exact", *screens.SCREENS) == METHODS
    offered = inspect.signature(cli.heads).parameters["method"].annotation
    assert typing.get_args(typing.get_args(offered)[0]) == METHODS

    def halves(screening, rows, request):
        scores, baseline = screens.attribution_patching(screening, rows)
        return scores / request.n_steps, baseline, "halves"

    row = screens.Screen("Half a screen", "Half", halves, by_steps=True)
    monkeypatch.setitem(screens.SCREENS, "half", row)
    monkeypatch.setattr("fvlens.attribution._mediation.METHODS", (*METHODS, "half"))
    prompts = word_prompts(tiny, generator)
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    found = fvlens.indirect_effects(tiny, prompts, means, method="half", n_steps=2, progress=False)
    plain = fvlens.indirect_effects(tiny, prompts, means, method="atp", progress=False)
    torch.testing.assert_close(found.cie, plain.cie / 2)
    assert (found.note, found.n_steps, found.score, found.unit) == ("halves", 2, "Half", "probability")
