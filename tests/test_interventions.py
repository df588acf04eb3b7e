"""inject and ablate against a plain Hugging Face model that is edited by hand, prompt by prompt and without padding."""

import pytest
import torch
from conftest import random_model
from steering import (
    N_NEW,
    TEXTS,
    Fixed,
    adding,
    by_hand,
    generated,
    hf_greedy,
    hf_logits,
    last_logits,
    normal,
    opened,
    padded,
    rows_of,
    setting,
    told_of_padding,
)
from transformers import AutoModelForCausalLM

from fvlens.interventions import ablate, inject, resid_hook, z_hook
from fvlens.models import embedded_folder
from fvlens.types import is_bridge

pytestmark = pytest.mark.usefixtures("left_clean")


@pytest.fixture(scope="module")
def plain():
    """The embedded model as plain Hugging Face."""
    return AutoModelForCausalLM.from_pretrained(embedded_folder(), local_files_only=True).eval()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- inject: one forward ---


def test_hook_names(tiny):
    assert [resid_hook(i) in tiny.hook_dict for i in range(4)] == [True, True, True, False]
    assert [z_hook(i) in tiny.hook_dict for i in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("layer", [0, 2])
def test_inject_residual_equals_hugging_face_at_every_position(model, plain, generator, layer):
    vector = normal(model.cfg.d_model, generator=generator)
    rows = rows_of(model)
    tokens, mask = padded(model, rows)
    with torch.no_grad(), inject(model, Fixed({resid_hook(layer): vector}), scale=2) as same:
        assert same is model
        logits = model(tokens, attention_mask=mask)
    for row, got in zip(rows, logits, strict=True):
        with torch.no_grad():
            want = hf_logits(plain, row, [("resid", layer, adding(2 * vector, slice(len(row) - 1, len(row))))])
            unsteered = hf_logits(plain, row, [])
        torch.testing.assert_close(got[-len(row) :], want, atol=2e-4, rtol=1e-4)
        assert (want[-1] - unsteered[-1]).abs().max() > 1e-2


def test_inject_into_several_heads_equals_hugging_face(model, plain, generator):
    shape = (model.cfg.n_heads, model.cfg.d_head)
    low, high = normal(*shape, generator=generator), normal(*shape, generator=generator)
    low[1:] = 0  # one head only
    rows = rows_of(model)
    with torch.no_grad(), inject(model, Fixed({z_hook(0): low, z_hook(2): high}), scale=0.5):
        got = last_logits(model, rows)
    for i, row in enumerate(rows):
        at = slice(len(row) - 1, len(row))
        edits = [("z", 0, adding(0.5 * low, at)), ("z", 2, adding(0.5 * high, at))]
        with torch.no_grad():
            torch.testing.assert_close(got[i], hf_logits(plain, row, edits)[-1], atol=2e-4, rtol=1e-4)


def test_inject_one_tensor_per_prompt(model, plain, generator):
    cfg, rows = model.cfg, rows_of(model)
    resid = normal(len(rows), cfg.d_model, generator=generator)
    z = normal(len(rows), cfg.n_heads, cfg.d_head, generator=generator)
    with torch.no_grad(), inject(model, Fixed({resid_hook(1): resid, z_hook(3): z})):
        got = last_logits(model, rows)
    for i, row in enumerate(rows):
        at = slice(len(row) - 1, len(row))
        edits = [("resid", 1, adding(resid[i], at)), ("z", 3, adding(z[i], at))]
        with torch.no_grad():
            torch.testing.assert_close(got[i], hf_logits(plain, row, edits)[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
)
def test_inject_at_each_residual_hook_equals_a_hand_written_hook(tiny, generator, kind):
    vector = normal(32, generator=generator)
    tokens = torch.randint(5, 500, (2, 6), generator=generator)
    if kind == "hook_resid_mid" and is_bridge(tiny):
        with pytest.raises(ValueError, match="cannot be steered on a TransformerBridge: there it is"):
            opened(inject(tiny, Fixed({f"blocks.1.{kind}": vector})))
        return

    def by_hand(x, hook):
        x[:, -1] += vector
        return x

    want = tiny.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{kind}", by_hand)])
    with inject(tiny, Fixed({f"blocks.1.{kind}": vector})):
        assert torch.equal(tiny(tokens), want)
    assert not torch.equal(tiny(tokens), want)


def test_inject_takes_the_activations_dtype(generator):
    double = random_model(dtype=torch.float64)
    vector = normal(32, generator=generator)
    tokens = torch.randint(5, 500, (1, 4), generator=generator)
    want = double.run_with_hooks(tokens, fwd_hooks=[(resid_hook(0), lambda x, hook: x + _at_end(x, vector.double()))])
    with inject(double, Fixed({resid_hook(0): vector})):
        assert torch.equal(double(tokens), want)


def _at_end(x, vector):
    delta = torch.zeros_like(x)
    delta[:, -1] = vector
    return delta


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_zero_vector_changes_nothing(tiny, use_cache):
    zero = Fixed({resid_hook(1): torch.zeros(32), z_hook(0): torch.zeros(4, 8)})
    tokens, _ = padded(tiny, rows_of(tiny))
    want, want_logits = generated(tiny, tokens, use_past_kv_cache=use_cache)
    with inject(tiny, zero, every_new_token=True):
        got, got_logits = generated(tiny, tokens, use_past_kv_cache=use_cache)
    assert torch.equal(got, want) and torch.equal(got_logits, want_logits)


def test_scale_zero_and_opposite_vectors_cancel(tiny, generator):
    steering = Fixed({resid_hook(1): normal(32, generator=generator)})
    want = last_logits(tiny, rows_of(tiny))
    with inject(tiny, steering, scale=0.0):
        assert torch.equal(last_logits(tiny, rows_of(tiny)), want)
    with inject(tiny, steering, scale=3), inject(tiny, steering, scale=-3):
        torch.testing.assert_close(last_logits(tiny, rows_of(tiny)), want)


def test_nested_additions_add_up(tiny, generator):
    a, b = normal(32, generator=generator), normal(32, generator=generator)
    z = normal(4, 8, generator=generator)
    rows = rows_of(tiny)
    with inject(tiny, Fixed({resid_hook(0): a + 2 * b, z_hook(1): z})):
        want = last_logits(tiny, rows)
    with inject(tiny, Fixed({resid_hook(0): a})):
        with inject(tiny, Fixed({resid_hook(0): b}), scale=2.0), inject(tiny, Fixed({z_hook(1): z})):
            torch.testing.assert_close(last_logits(tiny, rows), want)
        with inject(tiny, Fixed({resid_hook(0): a})):  # the outer one is still there after the inner ones are gone
            twice = last_logits(tiny, rows)
    with inject(tiny, Fixed({resid_hook(0): 2 * a})):
        torch.testing.assert_close(last_logits(tiny, rows), twice)


def test_batch_padding_and_order_change_nothing(tiny, generator):
    steering = Fixed({resid_hook(0): normal(32, generator=generator), z_hook(2): normal(4, 8, generator=generator)})
    rows = rows_of(tiny)
    with inject(tiny, steering):
        together = last_logits(tiny, rows)
        alone = torch.cat([last_logits(tiny, [row]) for row in rows])
        turned = last_logits(tiny, rows[::-1])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, turned.flip(0), atol=1e-5, rtol=1e-5)


# --- inject: generation ---


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("every", [False, True], ids=["prompt", "every-new"])
@pytest.mark.parametrize("kind", ["resid", "z"])
def test_generation_equals_hugging_face(model, plain, generator, kind, every, use_cache):
    cfg, rows = model.cfg, rows_of(model)
    if kind == "resid":
        tensors = {resid_hook(1): normal(cfg.d_model, generator=generator, size=2.0)}
    else:
        tensors = {z_hook(i): normal(cfg.n_heads, cfg.d_head, generator=generator, size=2.0) for i in (0, 1)}
    tokens, _ = padded(model, rows)
    with inject(model, Fixed(tensors), every_new_token=every):
        got, got_logits = generated(model, tokens, use_past_kv_cache=use_cache)
    for i, row in enumerate(rows):
        at = {every_: slice(len(row) - 1, None if every_ else len(row)) for every_ in (False, True)}
        edits = {e: [(kind, int(name.split(".")[1]), adding(v, at[e])) for name, v in tensors.items()] for e in at}
        with torch.no_grad():
            want, want_logits = hf_greedy(plain, row, edits[every])
            other_logits = hf_greedy(plain, row, edits[not every])[1]
            unsteered_logits = hf_greedy(plain, row, [])[1]
        assert got[i].tolist() == want
        torch.testing.assert_close(got_logits[i], want_logits, atol=5e-4, rtol=1e-4)
        # the three ways differ, so that the comparison can tell them apart
        assert (want_logits[0] - unsteered_logits[0]).abs().max() > 1e-2
        assert (want_logits[1] - other_logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        {"positional_embedding_type": "rotary", "rotary_dim": 8, "parallel_attn_mlp": True},
        {"positional_embedding_type": "rotary", "rotary_dim": 8, "n_key_value_heads": 2, "normalization_type": "RMS"},
    ],
    ids=["parallel", "grouped-query"],
)
def test_generation_with_and_without_cache_agrees_on_other_architectures(generator, architecture, every):
    other = random_model(**architecture)
    steering = Fixed({resid_hook(0): normal(32, generator=generator), z_hook(1): normal(4, 8, generator=generator)})
    tokens, _ = padded(other, rows_of(other))
    with inject(other, steering, every_new_token=every):
        cached = generated(other, tokens, use_past_kv_cache=True)
        whole = generated(other, tokens, use_past_kv_cache=False)
        first = last_logits(other, rows_of(other))
    assert torch.equal(cached[0], whole[0])
    torch.testing.assert_close(cached[1], whole[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached[1][:, 0], first, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generated(other, tokens)[1], cached[1], atol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("every", [False, True])
def test_generation_from_a_prompt_of_one_token(tiny, generator, every, use_cache):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[17], [23]])
    want, want_logits = by_hand(tiny, tokens, vector, every)
    with inject(tiny, Fixed({resid_hook(1): vector}), every_new_token=every):
        got, got_logits = generated(tiny, tokens, use_past_kv_cache=use_cache)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_logits, want_logits, atol=1e-4, rtol=1e-4)


def test_each_generate_call_and_each_forward_starts_anew(tiny, generator):
    vector = normal(32, generator=generator)
    short, long = torch.tensor([[17, 18]]), torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    with inject(tiny, Fixed({resid_hook(1): vector})):
        first = generated(tiny, short)
        between = tiny(short)[:, -1]
        longer = tiny(long)[:, -1]
        second = generated(tiny, long, use_past_kv_cache=False)
        last = generated(tiny, short)
    for got, tokens in ((first, short), (second, long), (last, short)):
        want = by_hand(tiny, tokens, vector, every=False)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(between, first[1][:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(longer, second[1][:, 0], atol=1e-4, rtol=1e-4)


def test_nested_blocks_in_generation_keep_their_own_mode(model, plain, generator):
    a, b = (normal(model.cfg.d_model, generator=generator, size=2.0) for _ in range(2))
    row = rows_of(model)[1]
    prompt, every = slice(len(row) - 1, len(row)), slice(len(row) - 1, None)
    with inject(model, Fixed({resid_hook(1): a})), inject(model, Fixed({resid_hook(1): b}), every_new_token=True):
        got = [generated(model, torch.tensor([row]), use_past_kv_cache=cache) for cache in (True, False)]
    with torch.no_grad():
        want = hf_greedy(plain, row, [("resid", 1, adding(a, prompt)), ("resid", 1, adding(b, every))])
    for new, logits in got:
        assert new[0].tolist() == want[0]
        torch.testing.assert_close(logits[0], want[1], atol=5e-4, rtol=1e-4)


def test_generation_from_text_equals_generation_from_tokens(model, generator):
    steering = Fixed({resid_hook(1): normal(model.cfg.d_model, generator=generator, size=2.0)})
    tokens, _ = padded(model, rows_of(model))
    options = dict(max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False)
    with inject(model, steering):
        texts = model.generate(list(TEXTS), **options)
        sequences = model.generate(tokens, **options, **told_of_padding(model, tokens))
    assert texts == [model.tokenizer.decode(row, skip_special_tokens=True) for row in sequences]
    assert texts != model.generate(list(TEXTS), **options)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("every", [False, True])
def test_generate_stream_with_other_runs_between_its_items(tiny, generator, every, use_cache):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[17, 18, 19]])
    other = torch.tensor([[4, 5, 6, 7, 8, 9, 10]])
    want = by_hand(tiny, tokens, vector, every)[0]
    with inject(tiny, Fixed({resid_hook(1): vector}), every_new_token=every):
        alone = tiny(other)
        pieces = []
        for piece in tiny.generate_stream(
            tokens, max_new_tokens=N_NEW, max_tokens_per_yield=1, do_sample=False, stop_at_eos=False, verbose=False,
            use_past_kv_cache=use_cache,
        ):  # fmt: skip
            pieces.append(piece)
            assert torch.equal(tiny(other), alone)
    assert torch.equal(torch.cat(pieces, dim=1)[:, tokens.shape[1] :], want)


# --- inject: gradients and other people's things ---


@pytest.mark.parametrize("kind", ["resid", "z"])
def test_gradients_equal_hugging_face(model, plain, generator, kind):
    cfg, rows = model.cfg, rows_of(model)
    name = resid_hook(1) if kind == "resid" else z_hook(1)
    start = normal(*((cfg.d_model,) if kind == "resid" else (cfg.n_heads, cfg.d_head)), generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    flags = [p.requires_grad for p in model.parameters()]
    with inject(model, Fixed({name: 3.0 * ours}), scale=0.5):
        loss = -last_logits(model, rows).log_softmax(-1)[:, 100].mean()
    (grad,) = torch.autograd.grad(loss, ours)
    terms = []
    for row in rows:
        edit = adding(1.5 * theirs, slice(len(row) - 1, len(row)))
        terms.append(-hf_logits(plain, row, [(kind, 1, edit)])[-1].log_softmax(-1)[100])
    (want,) = torch.autograd.grad(torch.stack(terms).mean(), theirs)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-3)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_gradients_per_prompt_are_separate(tiny, generator):
    vectors = normal(3, 32, generator=generator).requires_grad_()
    with inject(tiny, Fixed({resid_hook(0): vectors})):
        (grad,) = torch.autograd.grad(last_logits(tiny, rows_of(tiny))[1, 7], vectors)
    assert grad[1].abs().max() > 0 and not grad[[0, 2]].any()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"at least one tensor to add, but the steering's additions\(\) are empty"),
        ({"blocks.3.hook_resid_post": torch.ones(32)}, r"no hook 'blocks\.3\.hook_resid_post'; it has 3 layers"),
        ({"resid_post": torch.ones(32)}, r"no hook 'resid_post'.*named like 'blocks\.0\.hook_resid_post'"),
        (
            {"blocks.1.attn.hook_pattern": torch.ones(32)},
            r"'blocks\.1\.attn\.hook_pattern' cannot be steered; expected",
        ),
        ({resid_hook(1): torch.ones(31)}, r"blocks\.1\.hook_resid_post has shape \[31\]; this model takes \[32\]"),
        ({resid_hook(1): torch.ones(())}, r"has shape \[\]; this model takes \[32\]"),
        (
            {resid_hook(1): torch.ones(2, 1, 32)},
            r"has shape \[2, 1, 32\]; this model takes \[32\], or that with a lead",
        ),
        ({z_hook(1): torch.ones(32)}, r"blocks\.1\.attn\.hook_z has shape \[32\]; this model takes \[4, 8\]"),
        ({z_hook(1): torch.ones(8, 4)}, r"has shape \[8, 4\]; this model takes \[4, 8\]"),
    ],
)
def test_inject_refuses_bad_additions_before_any_forward(tiny, tensors, message):
    good = {resid_hook(0): torch.ones(32)} if tensors else {}
    with pytest.raises(ValueError, match=message):
        opened(inject(tiny, Fixed({**good, **tensors})))


def test_inject_refuses_a_batch_of_another_size(tiny):
    for n in (1, 2):
        with pytest.raises(
            ValueError, match=rf"hook_resid_post has a batch axis of {n}, but 3 prompts are run together"
        ):
            with inject(tiny, Fixed({resid_hook(0): torch.ones(n, 32)})):
                last_logits(tiny, rows_of(tiny))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_inject_refuses_a_scale_that_is_not_finite(tiny, scale):
    with pytest.raises(ValueError, match=f"inject: scale: expected a finite number, got {scale}"):
        opened(inject(tiny, Fixed({resid_hook(0): torch.ones(32)}), scale=scale))


def test_inject_refuses_what_is_not_a_steering(tiny, unchecked):
    with pytest.raises(ValueError, match=r"inject: steering: expected a Steering, got a Tensor"):
        opened(inject(tiny, torch.ones(32)))


def test_inject_asks_the_steering_about_the_model(tiny):
    steering = Fixed({resid_hook(0): torch.ones(32)}, refusal="made on another model")
    with pytest.raises(ValueError, match="made on another model"):
        opened(inject(tiny, steering))
    assert steering.asked == [tiny]
    with inject(tiny, steering, check=False):
        tiny(torch.tensor([[1]]))
    assert steering.asked == [tiny]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": []}, "ablate: expected at least one head, got none"),
        ({"heads": [(3, 0)]}, r"heads: L3H0 does not exist"),
        ({"positions": "first"}, "ablate: positions='first'; expected 'last' or 'all'"),
        ({"value": "mean"}, r"ablate: value='mean'; expected 'zero' or a tensor \[layer head d_head\]"),
        ({"value": torch.ones(3, 4, 7)}, r"value has shape \[3, 4, 7\]; expected \[layer head d_head\] = \[3, 4, 8\]"),
        ({"value": torch.ones(4, 8)}, r"value has shape \[4, 8\]; expected"),
    ],
)
def test_ablate_refuses_bad_input(tiny, unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        opened(ablate(tiny, **{"heads": [(0, 0)], **options}))


# --- ablate ---


@pytest.mark.parametrize("with_value", [False, True], ids=["zero", "mean"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_ablation_equals_hugging_face(model, plain, generator, positions, with_value):
    cfg, rows = model.cfg, rows_of(model)
    heads = [(0, 1), (2, 0), (2, cfg.n_heads - 1)]
    value = normal(cfg.n_layers, cfg.n_heads, cfg.d_head, generator=generator)
    tokens, _ = padded(model, rows)
    with ablate(model, heads, positions=positions, **({"value": value} if with_value else {})) as same:
        assert same is model
        runs = [generated(model, tokens, use_past_kv_cache=cache) for cache in (True, False)]
        with torch.no_grad():
            once = last_logits(model, rows)
    for i, row in enumerate(rows):
        where = slice(len(row) - 1, len(row)) if positions == "last" else slice(None)
        edits = [("z", layer, setting(h, value[layer, h] if with_value else 0.0, where)) for layer, h in heads]
        with torch.no_grad():
            want, want_logits = hf_greedy(plain, row, edits)
            assert (want_logits[0] - hf_logits(plain, row, [])[-1]).abs().max() > 1e-2
        for new, logits in runs:
            assert new[i].tolist() == want
            torch.testing.assert_close(logits[i], want_logits, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(once[i], want_logits[0], atol=2e-4, rtol=1e-4)


def test_a_head_set_to_its_own_value_changes_nothing(tiny):
    tokens = torch.tensor([[4, 5, 6, 7]])
    want, cache = tiny.run_with_cache(tokens)
    own = torch.stack([cache[z_hook(i)][0, -1] for i in range(3)])
    heads = [(i, h) for i in range(3) for h in range(4)]
    with ablate(tiny, heads, value=own):
        torch.testing.assert_close(tiny(tokens), want, atol=1e-6, rtol=1e-6)


def test_without_any_head_only_the_bias_is_written(generator):
    own = random_model()
    with torch.no_grad():
        own.blocks[1].attn.b_O.copy_(normal(32, generator=generator))
    with ablate(own, [(1, h) for h in range(4)], positions="all"):
        _, cache = own.run_with_cache(torch.tensor([[4, 5, 6], [7, 8, 9]]))
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], own.blocks[1].attn.b_O.expand(2, 3, 32))


def test_ablation_and_injection_run_in_the_order_of_opening(tiny, generator):
    z = normal(4, 8, generator=generator)
    tokens = torch.tensor([[4, 5, 6]])
    steering = Fixed({z_hook(1): z})

    def last_z():
        return tiny.run_with_cache(tokens)[1][z_hook(1)][0, -1, 2]

    with ablate(tiny, [(1, 2)]), inject(tiny, steering):
        assert torch.equal(last_z(), z[2])
    with inject(tiny, steering), ablate(tiny, [(1, 2)]):
        assert torch.equal(last_z(), torch.zeros(8))


def test_gradients_reach_the_ablation_value_of_the_chosen_heads_only(tiny, generator):
    value = normal(3, 4, 8, generator=generator).requires_grad_()
    kept = value.detach().clone()
    with ablate(tiny, [(1, 2), (2, 0)], value=value):
        (grad,) = torch.autograd.grad(last_logits(tiny, rows_of(tiny))[:, 9].sum(), value)
    reached = grad.abs().amax(-1) > 0
    assert reached.nonzero().tolist() == [[1, 2], [2, 0]]
    assert torch.equal(value.detach(), kept)
