"""inject and ablate against a plain Hugging Face model that is edited by hand, prompt by prompt and without padding."""

import contextlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import random_model
from transformers import AutoModelForCausalLM

from fvlens.interventions import ablate, inject, resid_hook, z_hook
from fvlens.interventions._context import _Dispatcher, _Shown
from fvlens.models import embedded_folder
from fvlens.suffix import has_hooks
from fvlens.types import is_bridge

TEXTS = ("Q: dog\nA:", "Q: cold\nA: hot\n\nQ: big\nA:", "Q: France\nA: Paris\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:")
N_NEW = 4


@dataclass(frozen=True)
class Fixed:
    """A steering with given tensors, which records whom it was asked about."""

    tensors: dict[str, torch.Tensor]
    refusal: str = ""
    asked: list[Any] = field(default_factory=list)

    def additions(self):
        return self.tensors

    def check(self, model):
        self.asked.append(model)
        if self.refusal:
            raise ValueError(self.refusal)


# --- the oracle: plain Hugging Face, one unpadded prompt at a time, the whole sequence anew for each token ---


def adding(vector, where):
    """An edit that adds a vector at some positions of x [pos ...]."""

    def edit(x):
        return torch.cat([x[: where.start or 0], x[where] + vector, x[len(x) if where.stop is None else where.stop :]])

    return edit


def setting(head, new, where):
    """An edit that overwrites one head at some positions of z [pos head d_head]."""

    def edit(z):
        z = z.clone()
        z[where, head] = new
        return z

    return edit


def hf_logits(plain, tokens, edits):
    """Logits [pos d_vocab] of one prompt; ``edits`` are (``"resid"`` or ``"z"``, layer, function)."""
    with contextlib.ExitStack() as stack:
        for kind, layer, edit in edits:
            block = plain.transformer.h[layer]
            if kind == "resid":

                def after_block(module, args, output, edit=edit):
                    return (
                        (edit(output[0][0])[None], *output[1:]) if isinstance(output, tuple) else edit(output[0])[None]
                    )

                handle = block.register_forward_hook(after_block)
            else:

                def before_projection(module, args, edit=edit):
                    z = args[0][0].unflatten(-1, (plain.config.n_head, -1))
                    return (edit(z).flatten(-2)[None],)

                handle = block.attn.c_proj.register_forward_pre_hook(before_projection)
            stack.callback(handle.remove)
        return plain(torch.tensor([tokens]), use_cache=False).logits[0]


def hf_greedy(plain, tokens, edits, n_new=N_NEW):
    """New tokens and the logits that chose them, from the whole sequence run anew for each."""
    tokens, logits = list(tokens), []
    for _ in range(n_new):
        logits.append(hf_logits(plain, tokens, edits)[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[-n_new:], torch.stack(logits)


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


@pytest.fixture
def left_clean(model, tiny):
    """After the test no hook and no wrapper is left on the shared models."""
    yield
    for each in (model, tiny):
        assert pristine(each)


pytestmark = pytest.mark.usefixtures("left_clean")


def pristine(model):
    """No hook is left but dispatchers that nobody uses, and no method is replaced."""
    waiting = all(
        isinstance(hook, _Dispatcher) and not hook.users
        for point in model.hook_points()
        for hook in point._forward_hooks.values()
    )
    listed = any(
        point.bwd_hooks or any(not isinstance(handle.hook, _Shown) for handle in point.fwd_hooks)
        for point in model.hook_points()
    )
    methods = {"forward", "generate", "generate_stream", "hf_generate"} & set(model.__dict__)
    return waiting and not listed and not methods and not has_hooks(model)


def rows_of(model, texts=TEXTS):
    return [[model.tokenizer.bos_token_id, *model.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]


def padded(model, rows):
    width = max(map(len, rows))
    pad = model.tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def normal(*shape, generator, size=1.0):
    return size * torch.randn(*shape, generator=generator)


def told_of_padding(model, tokens):
    """The mask for a bridge, which takes tokens for unpadded unless told; HookedTransformer looks for itself."""
    if not is_bridge(model):
        return {}
    mask = (tokens != model.tokenizer.pad_token_id).long()
    mask[:, :-1] |= mask[:, 1:].clone()  # the BOS is the same token
    return {"attention_mask": mask}


def generated(model, tokens, **options):
    """New tokens [prompt N_NEW] and the logits that chose them [prompt N_NEW d_vocab], greedily."""
    settings = dict(max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False, output_logits=True)
    out = model.generate(tokens, **{**settings, **told_of_padding(model, tokens), **options})
    return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1)


def last_logits(model, rows):
    tokens, mask = padded(model, rows)
    return model(tokens, attention_mask=mask)[:, -1]


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


def by_hand(tiny, tokens, vector, every, n_new=N_NEW):
    """Greedy loop over the whole sequence with a hand-written hook at absolute positions."""
    length = tokens.shape[1]
    stop = None if every else length

    def add(x, hook):
        x = x.clone()
        x[:, length - 1 : stop] += vector
        return x

    logits = []
    for _ in range(n_new):
        logits.append(tiny.run_with_hooks(tokens, fwd_hooks=[(resid_hook(1), add)])[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, length:], torch.stack(logits, dim=1)


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


def test_no_tensor_of_the_caller_is_written_to(tiny, generator):
    vector, z = normal(32, generator=generator), normal(4, 8, generator=generator)
    tokens, mask = padded(tiny, rows_of(tiny))
    kept = [t.clone() for t in (vector, z, tokens, mask)]
    seen: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def look(x, hook):
        seen.append(x)
        copies.append(x.clone())

    with tiny.hooks(fwd_hooks=[(resid_hook(1), look), (z_hook(1), look)]):
        with inject(tiny, Fixed({resid_hook(1): vector, z_hook(1): z}), scale=2.0), ablate(tiny, [(1, 0)]):
            tiny(tokens, attention_mask=mask)
            generated(tiny, tokens)
    assert all(torch.equal(a, b) for a, b in zip((vector, z, tokens, mask), kept, strict=True))
    assert len(seen) > 4 and all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


def test_the_global_generator_is_left_alone(tiny, generator):
    torch_state = torch.get_rng_state()
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})), ablate(tiny, [(0, 0)], positions="all"):
        generated(tiny, padded(tiny, rows_of(tiny))[0])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_train_mode_is_left_alone(generator):
    own = random_model().train()
    with inject(own, Fixed({resid_hook(1): normal(32, generator=generator)})):
        own(torch.tensor([[1, 2]]))
    assert own.training


def test_hooks_of_the_user_stay_and_ours_go(generator):
    own = random_model()
    calls: list[str] = []

    def note(name):
        def hook(x, hook):
            calls.append(name)

        return hook

    own.add_hook(resid_hook(1), note("before"))
    own.add_perma_hook(resid_hook(1), note("permanent"))
    own.add_hook(resid_hook(1), note("backward"), dir="bwd")
    steering = Fixed({resid_hook(1): normal(32, generator=generator)})
    with inject(own, steering):
        own.add_hook(resid_hook(1), note("inside"))
        with own.hooks(fwd_hooks=[(resid_hook(1), note("context"))]):
            own(torch.tensor([[1, 2]])).sum().backward()
    assert calls == ["before", "permanent", "inside", "context", "backward"]
    calls.clear()
    own(torch.tensor([[1, 2]])).sum().backward()
    assert calls == ["before", "permanent", "inside", "backward"]
    point = own.hook_dict[resid_hook(1)]
    foreign = [hook for hook in point._forward_hooks.values() if not isinstance(hook, _Dispatcher)]
    assert len(point.fwd_hooks) == len(foreign) == 3 and len(point.bwd_hooks) == 1


def test_reset_hooks_inside_does_not_end_the_block(tiny, generator):
    tokens = torch.tensor([[1, 2, 3]])
    plain = tiny(tokens)
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})):
        steered = tiny(tokens)
        tiny.reset_hooks()
        tiny.run_with_cache(tokens)
        assert torch.equal(tiny(tokens), steered)
        tiny.reset_hooks(including_permanent=True)  # by another thread, say: the block is not its own to end
        assert torch.equal(tiny(tokens), steered) and not torch.equal(steered, plain)
    assert torch.equal(tiny(tokens), plain)


def test_the_cache_shows_the_steered_activation(tiny, generator):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[1, 2, 3]])
    _, before = tiny.run_with_cache(tokens)
    with inject(tiny, Fixed({resid_hook(0): vector})):
        _, after = tiny.run_with_cache(tokens)
    torch.testing.assert_close(after[resid_hook(0)][0, -1], before[resid_hook(0)][0, -1] + vector)
    assert torch.equal(after[resid_hook(0)][0, :-1], before[resid_hook(0)][0, :-1])


def test_a_generate_of_the_user_is_put_back(generator):
    own = random_model()
    inner = own.generate
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    own.generate = counted
    steering = Fixed({resid_hook(1): normal(32, generator=generator)})
    want = by_hand(own, torch.tensor([[3, 4]]), steering.tensors[resid_hook(1)], every=False)[0]
    with inject(own, steering):
        assert own.generate is not counted
        assert torch.equal(generated(own, torch.tensor([[3, 4]]))[0], want)
    assert own.generate is counted and calls == [1]


def test_a_generate_put_there_inside_the_block_stays(generator):
    own = random_model()
    with inject(own, Fixed({resid_hook(1): normal(32, generator=generator)})):
        wrapper = own.generate

        def outer(*args, **kwargs):
            return wrapper(*args, **kwargs)

        own.generate = outer
        generated(own, torch.tensor([[3, 4]]))
    assert own.generate is outer
    unsteered = generated(own, torch.tensor([[3, 4]]))[1]
    del own.generate
    assert torch.equal(generated(own, torch.tensor([[3, 4]]))[1], unsteered)


def test_a_generating_method_that_is_an_attribute_keeps_its_signature(tiny, generator):
    before = inspect.signature(tiny.generate)
    with inject(tiny, Fixed({resid_hook(1): normal(32, generator=generator)})):
        assert inspect.signature(tiny.generate) == before
        tiny(torch.tensor([[1]]))


# --- leaving the block ---


@pytest.mark.parametrize("make", [lambda m, v: inject(m, Fixed({resid_hook(1): v})), lambda m, v: ablate(m, [(1, 2)])])
def test_an_exception_passes_and_nothing_stays(tiny, generator, make):
    tokens = torch.tensor([[1, 2, 3]])
    want = tiny(tokens)
    with pytest.raises(KeyError, match="mine"), make(tiny, normal(32, generator=generator)):  # no forward: still mine
        raise KeyError("mine")
    assert pristine(tiny) and torch.equal(tiny(tokens), want)


def test_an_exception_in_generate_does_not_spoil_the_next_run(tiny, generator):
    vector = normal(32, generator=generator)
    tokens = torch.tensor([[1, 2, 3]])
    want = by_hand(tiny, tokens, vector, every=False)
    n_runs = 0

    def fail_late(x, hook):
        nonlocal n_runs
        n_runs += 1
        if n_runs == 3:
            raise KeyError("third token")

    with inject(tiny, Fixed({resid_hook(1): vector})):
        with pytest.raises(KeyError, match="third token"), tiny.hooks(fwd_hooks=[(resid_hook(2), fail_late)]):
            generated(tiny, tokens)
        torch.testing.assert_close(tiny(tokens)[:, -1], want[1][:, 0])
        got = generated(tiny, tokens)
    assert torch.equal(got[0], want[0])


def test_an_interrupted_inner_block_leaves_the_outer_one(tiny, generator):
    steering = Fixed({resid_hook(0): normal(32, generator=generator)})
    with inject(tiny, steering):
        want = last_logits(tiny, rows_of(tiny))
        with pytest.raises(KeyboardInterrupt), inject(tiny, steering):
            raise KeyboardInterrupt
        assert torch.equal(last_logits(tiny, rows_of(tiny)), want)


def test_blocks_may_end_in_another_order(tiny, generator):
    a, b = normal(32, generator=generator), normal(32, generator=generator)
    tokens = torch.tensor([[3, 4, 5]])
    first, second = inject(tiny, Fixed({resid_hook(1): a})), inject(tiny, Fixed({resid_hook(1): b}))
    first.__enter__()
    second.__enter__()
    both = generated(tiny, tokens)
    first.__exit__(None, None, None)
    rest = generated(tiny, tokens, use_past_kv_cache=False)
    second.__exit__(None, None, None)
    assert pristine(tiny)
    torch.testing.assert_close(both[1], by_hand(tiny, tokens, a + b, every=False)[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rest[1], by_hand(tiny, tokens, b, every=False)[1], atol=1e-4, rtol=1e-4)


def test_a_hook_that_never_ran_is_an_error(tiny, generator):
    steering = Fixed({resid_hook(0): normal(32, generator=generator), z_hook(2): normal(4, 8, generator=generator)})
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError, match=r"inject: blocks\.0\.hook_resid_post, blocks\.2\.attn\.hook_z never ran"):
        with inject(tiny, steering):
            pass
    with pytest.raises(RuntimeError, match=r"^inject: blocks\.2\.attn\.hook_z never ran .*stop_at_layer"):
        with inject(tiny, steering):
            tiny(tokens, stop_at_layer=1)
    with pytest.raises(RuntimeError, match=r"never ran"), inject(tiny, steering):
        random_model()(tokens)
    with pytest.raises(RuntimeError, match=r"^ablate: blocks\.1\.attn\.hook_z never ran"), ablate(tiny, [(1, 0)]):
        tiny(tokens, stop_at_layer=1)


# --- bad input ---


def opened(context):
    with context:
        pytest.fail("the block was entered")


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
    with pytest.raises(ValueError, match=f"inject: expected a finite scale, got {scale}"):
        opened(inject(tiny, Fixed({resid_hook(0): torch.ones(32)}), scale=scale))


def test_inject_refuses_what_is_not_a_steering(tiny, unchecked):
    with pytest.raises(ValueError, match=r"inject: expected a Steering .* got Tensor"):
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
