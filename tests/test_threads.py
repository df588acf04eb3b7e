"""Steering belongs to the thread and task that opened it: what others run meanwhile has the bits of a quiet model."""

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import gc
import io
import pickle
import re
import threading
import warnings

import pytest
import torch
from conftest import needs_hooked, random_model, seeded

import fvlens
from fvlens.interventions import ablate, hooked, inject, resid_hook, z_hook
from fvlens.interventions._context import _Dispatcher
from fvlens.screens._rules import quiet_norms
from fvlens.suffix import choose_route, has_hooks, open_reader
from fvlens.training import LoRA, frozen

TOKENS = torch.tensor([[0, 11, 12, 13], [0, 21, 22, 23]])


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A steering with given tensors."""

    tensors: dict

    def additions(self):
        return self.tensors

    def check(self, model):
        pass


def steering(model, seed=0, size=3.0):
    g = seeded(seed)
    cfg = model.cfg
    return Fixed(
        {
            resid_hook(1): size * torch.randn(cfg.d_model, generator=g),
            z_hook(0): size * torch.randn(cfg.n_heads, cfg.d_head, generator=g),
        }
    )


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bridge():
    return fvlens.load_model("rel-small", device="cpu", backend="bridge")


@pytest.fixture(params=[pytest.param("hooked", marks=needs_hooked), "bridge"])
def each(request, model, bridge):
    """The embedded model as either class, left as it was."""
    chosen = {"hooked": model, "bridge": bridge}[request.param]
    yield chosen
    assert not has_hooks(chosen)
    assert not any(point.fwd_hooks for name, point in chosen.hook_dict.items() if not name.endswith("hook_scale"))
    assert not any("forward" in module.__dict__ or "generate" in module.__dict__ for module in chosen.modules())


def in_thread(function):
    """What a function gives when another thread runs it; what it raises is raised here."""
    found = []

    def run():
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive(), "the thread waits on somebody"
    result, error = found[0]
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def meanwhile(function):
    """Another thread calls a function over and over, at least five times; what it raises is raised here."""
    stop, warm, errors, n_rounds = threading.Event(), threading.Event(), [], 0

    def run():
        nonlocal n_rounds
        try:
            while not stop.is_set() or n_rounds < 5:
                function()
                n_rounds += 1
                warm.set()
        except BaseException as error:
            errors.append(error)
            warm.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert warm.wait(timeout=120)
        yield
    finally:
        stop.set()
        thread.join(timeout=120)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def plain(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)


# --- threads ---


def test_a_second_thread_runs_the_plain_model(each):
    want, read = plain(each), fvlens_logits(each)
    with inject(each, steering(each)), ablate(each, [(2, 1)]):
        steered = plain(each)
        assert torch.equal(in_thread(lambda: plain(each)), want)
        assert not in_thread(lambda: has_hooks(each)) and has_hooks(each)
        assert torch.equal(in_thread(lambda: fvlens_logits(each)), read)
        assert torch.equal(plain(each), steered)
    assert not torch.equal(steered, want) and torch.equal(plain(each), want)


def fvlens_logits(model):
    with torch.no_grad():
        return open_reader(model, len(TOKENS), keep=False).read(TOKENS, torch.ones_like(TOKENS), n_read=1)[:, 0]


def test_two_threads_steer_with_different_vectors(each):
    mine, theirs = steering(each, 1), steering(each, 2)

    def logits(added):
        with torch.no_grad(), inject(each, added):
            return each(TOKENS)

    want = logits(mine), logits(theirs)
    assert not torch.allclose(*want)
    both_inside = threading.Barrier(2, timeout=60)

    def together(added):
        with torch.no_grad(), inject(each, added):
            both_inside.wait()
            found = each(TOKENS)
            both_inside.wait()
        return found

    other = []
    thread = threading.Thread(target=lambda: other.append(together(theirs)))
    thread.start()
    found = together(mine)
    thread.join()
    assert torch.equal(found, want[0]) and torch.equal(other[0], want[1])
    short, wrong = torch.tensor([[0, 5]]), []

    def again():
        with torch.no_grad(), inject(each, theirs):
            wrong.extend(() if torch.equal(each(TOKENS), want[1]) else (1,))
            each(short)

    with meanwhile(again):
        assert all(torch.equal(logits(mine), want[0]) for _ in range(30))
    assert not wrong


def test_two_threads_generate_with_different_vectors(each):
    options = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)

    def text(added, tokens):
        with inject(each, added, every_new_token=True):
            return each.generate(tokens, **options)

    mine, theirs, short = steering(each, 1), steering(each, 2), torch.tensor([[0, 31, 32]])
    want = text(mine, TOKENS), text(theirs, short)
    wrong = []
    with meanwhile(lambda: wrong.extend(() if torch.equal(text(theirs, short), want[1]) else (1,))):
        assert all(torch.equal(text(mine, TOKENS), want[0]) for _ in range(15))
    assert not wrong


@pytest.mark.parametrize("setting", ["zero_shot", "icl"])
def test_evaluate_beside_a_thread_that_steers_equals_evaluate_alone(each, setting):
    relation = fvlens.load_relation("antonym")
    pairs, pool = relation.pairs[:60], relation.pairs[60:80]

    def numbers(vector=None):
        found = fvlens.evaluate(
            each, pairs, vector=vector, setting=setting, demonstrations=pool if setting == "icl" else None,
            generator=seeded(1),
        )  # fmt: skip
        return found.ranks, found.probabilities, found.log_probabilities

    added = steering(each, 1)
    alone, steered = numbers(), numbers(added)
    other = steering(each, 2, size=9.0)

    def steer():
        with torch.no_grad(), inject(each, other), ablate(each, [(0, 0), (3, 1)]):
            each(TOKENS)

    with meanwhile(steer):
        beside = [numbers() for _ in range(3)]
        beside_steered = numbers(added)
    assert (alone[1] != steered[1]).all()  # the comparison can tell steered numbers from others
    for found, want in [*((found, alone) for found in beside), (beside_steered, steered)]:
        for ours, expected in zip(found, want, strict=True):
            assert len(ours) == 60 and int((ours == expected).sum()) == 60


def test_forwards_beside_the_engine_are_plain_and_its_effects_are_those_of_a_quiet_model(each):
    generator = seeded()
    relation = fvlens.load_relation("antonym")
    build = dict(n_prompts=6, n_shots=2, generator=generator)
    means = fvlens.mean_head_activations(each, fvlens.build_prompts(each, relation, **build), progress=False)
    shuffled = fvlens.build_prompts(each, relation, labels="permuted", **build)

    def effects():
        return fvlens.indirect_effects(each, shuffled, means, path="kv", progress=False).cie

    want, alone, wrong = plain(each), effects(), []
    with meanwhile(lambda: wrong.extend(() if torch.equal(plain(each), want) else (1,))):
        assert torch.equal(effects(), alone)
        with inject(each, steering(each)):
            assert choose_route(each) == ("naive", "hooks on the model")
            assert not torch.equal(plain(each), want)
    assert not wrong
    with inject(each, steering(each)):
        plain(each)
        assert torch.equal(in_thread(effects), alone)


def test_low_rank_updates_beside_plain_forwards(each):
    fingerprint = fvlens.fingerprint(each)
    cfg, g = each.cfg, seeded()
    a = torch.randn(1, cfg.d_model, 2, generator=g)
    b = torch.randn(1, 2, cfg.n_heads, cfg.d_head, generator=g)
    change = LoRA(layers=(1,), a_q=a, b_q=b, a_v=a, b_v=b, fingerprint=fingerprint)

    def updated():
        with torch.no_grad():
            return change.read(each, TOKENS, torch.ones_like(TOKENS), n_read=1)

    want, alone, wrong = plain(each), updated(), []
    with meanwhile(lambda: wrong.extend(() if torch.equal(plain(each), want) else (1,))):
        assert all(torch.equal(updated(), alone) for _ in range(20))
    assert not wrong and not torch.allclose(alone[:, 0], want[:, -1])


def test_hooks_that_raise_beside_blocks_that_open_and_close(each):
    """No table of hooks changes under a forward: what a hook raises comes out, and nothing else."""
    final = resid_hook(each.cfg.n_layers - 1)

    class Mine(Exception):
        pass

    def stop(resid):
        raise Mine

    def steer():
        for _ in range(50):
            with contextlib.suppress(RuntimeError), inject(each, Fixed({final: torch.ones(each.cfg.d_model)})):
                pass

    with meanwhile(steer), hooked(each, {final: stop}):
        for _ in range(60):
            with pytest.raises(Mine):
                plain(each, TOKENS[:1])


def test_a_copy_of_the_context_is_steered_while_the_block_is_open(each):
    want = plain(each)
    with inject(each, steering(each)):
        steered = plain(each)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(plain, each)), steered)
    assert torch.equal(in_thread(lambda: context.run(plain, each)), want)


def test_what_a_bridge_notes_during_a_forward_is_the_threads_own(bridge):
    with hooked(bridge, {z_hook(0): lambda z: None}):  # from the first block on
        plain(bridge)
    bridge._last_hf_cache = "mine"
    assert in_thread(lambda: hasattr(bridge, "_last_hf_cache")) is False
    with pytest.raises(AttributeError, match="_last_hf_cache"):
        in_thread(lambda: delattr(bridge, "_last_hf_cache"))
    in_thread(lambda: setattr(bridge, "_last_hf_cache", "theirs"))
    assert bridge._last_hf_cache == "mine"
    del bridge._last_hf_cache
    assert not hasattr(bridge, "_last_hf_cache")


# --- tasks and generators ---


def test_tasks_steer_each_for_itself(each):
    added = steering(each, 1), steering(each, 2)

    def logits(vector):
        with inject(each, vector):
            return plain(each)

    alone = [logits(vector) for vector in added]
    unsteered = plain(each)

    async def task(vector):
        with inject(each, vector):
            await asyncio.sleep(0)
            found = plain(each)
            await asyncio.sleep(0)
        return found

    async def child(inside):
        await inside.wait()
        return plain(each)

    async def main():
        found = await asyncio.gather(*(task(vector) for vector in added))
        inside, after = asyncio.Event(), asyncio.Event()
        with inject(each, added[0]):
            early, late = asyncio.create_task(child(inside)), asyncio.create_task(child(after))
            inside.set()
            inherited, in_a_thread = await early, await asyncio.to_thread(plain, each)
        after.set()
        return found, inherited, in_a_thread, await late

    found, inherited, in_a_thread, late = asyncio.run(main())
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    assert torch.equal(inherited, alone[0]) and torch.equal(in_a_thread, alone[0])
    assert torch.equal(late, unsteered)  # the block has ended, also for those who inherited it


def open_for_ever(model):
    with inject(model, steering(model)):
        while True:
            yield plain(model)


def test_an_abandoned_generator_blocks_nobody(each):
    want = plain(each)
    with inject(each, steering(each)):
        steered = plain(each)
    kept = []

    def leave_open():
        kept.append(open_for_ever(each))
        return next(kept[0])

    assert torch.equal(in_thread(leave_open), steered)
    assert torch.equal(plain(each), want) and not has_hooks(each)
    with inject(each, steering(each, 2)):
        assert not torch.equal(plain(each), steered)
    assert torch.equal(in_thread(lambda: plain(each)), want)
    kept.clear()  # closed here, while it was opened in a thread that is gone
    gc.collect()


def test_a_block_that_is_closed_in_another_thread_has_ended_where_it_was_opened(each):
    want = plain(each)
    block = open_for_ever(each)
    steered = next(block)
    assert torch.equal(plain(each), steered)  # a generator runs in the context of who advances it
    in_thread(block.close)
    assert not torch.equal(steered, want) and torch.equal(plain(each), want)


# --- copies ---


def test_copies_made_inside_a_block_are_plain_models_of_their_own(each):
    options = dict(max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    state = {name: value.clone() for name, value in each.state_dict().items()}
    want, text = plain(each), each.generate(TOKENS, **options)
    with inject(each, steering(each), every_new_token=True):
        steered = plain(each), each.generate(TOKENS, **options)
        other = copy.deepcopy(each)
        inside = each.state_dict()
        assert torch.equal(plain(other), want) and torch.equal(other.generate(TOKENS, **options), text)
        assert not has_hooks(other)
    assert not torch.equal(steered[0], want)
    assert list(inside) == list(state) and all(torch.equal(inside[name], state[name]) for name in state)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)  # its own: what it generates now is not the old model's
    halved = plain(other)
    assert not torch.allclose(halved, want) and torch.equal(plain(each), want)
    with inject(other, steering(other), every_new_token=True):  # and it can be steered like any other
        assert not torch.equal(plain(other), halved)
        assert torch.equal(plain(each), want)
        first = other.generate(TOKENS, **{**options, "max_new_tokens": 1})[:, -1]
        assert torch.equal(first, plain(other)[:, -1].argmax(-1))
    assert torch.equal(plain(other), halved)


@needs_hooked
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_model_pickled_inside_a_block_is_a_plain_one(generator, how):
    own = random_model()
    want = plain(own)
    options = dict(max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    text = own.generate(TOKENS, **options)
    file = io.BytesIO()
    with inject(own, Fixed({resid_hook(1): torch.ones(32)})):
        assert not torch.equal(plain(own), want)
        (pickle.dump if how == "pickle" else lambda model, target: torch.save(model, target))(own, file)
        file.seek(0)
        other = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
        assert torch.equal(plain(other), want)
    assert torch.equal(other.generate(TOKENS, **options), text) and not has_hooks(other)
    with inject(other, Fixed({resid_hook(1): torch.ones(32)})):
        assert not torch.equal(plain(other), want) and torch.equal(plain(own), want)


@needs_hooked
def test_a_generate_of_the_user_travels_with_a_copy(generator):
    own = random_model()
    own.generate = sum
    with inject(own, Fixed({resid_hook(1): torch.ones(32)})):
        assert own.generate is not sum and own.generate([1, 2]) == 3
        other = copy.deepcopy(own)
        plain(own)
    assert other.generate is sum and own.generate is sum


# --- hooks of others ---


@needs_hooked
def test_order_of_opening_with_hooks_of_others_and_no_pile_of_our_own(generator):
    own = random_model()
    name, calls = resid_hook(1), []

    def note(text):
        return lambda activation, hook=None: calls.append(text)

    def ran():
        calls.clear()
        plain(own)
        return calls

    with hooked(own, {name: note("first")}):  # our hook sits on the point from here on
        plain(own)
    own.add_hook(name, note("theirs"))
    with hooked(own, {name: note("behind")}):
        assert ran() == ["theirs", "behind"]
        own.add_hook(name, note("theirs too"))
        with hooked(own, {name: note("last")}):
            assert ran() == ["theirs", "behind", "theirs too", "last"]
        assert ran() == ["theirs", "behind", "theirs too"]
    for _ in range(20):
        with own.hooks(fwd_hooks=[(name, note("again"))]), hooked(own, {name: note("inside")}):
            assert ran() == ["theirs", "theirs too", "again", "inside"]
    ours = [hook for hook in own.hook_dict[name]._forward_hooks.values() if isinstance(hook, _Dispatcher)]
    assert len(ours) <= 2
    own.reset_hooks()


# --- padding on the right ---


TEXTS = ["Q: dog", "Q: cold\nA: hot\n\nQ: big\nA:"]


@pytest.fixture
def padded_right(each):
    each.tokenizer.padding_side = "right"
    yield each
    each.tokenizer.padding_side = "left"


def blocks(model):
    yield "inject", inject(model, steering(model))
    yield "ablate", ablate(model, [(1, 0)])


def test_texts_that_would_be_padded_on_the_right_are_refused(each):
    want = [plain(each, each.to_tokens(text))[0, -1] for text in TEXTS]
    for caller, block in blocks(each):
        message = rf"^{caller}: the texts have \d+ to \d+ tokens and would be padded on the right.*padding_side = 'l"
        with block:
            alone = [plain(each, each.to_tokens(text))[0, -1] for text in TEXTS]
            with pytest.raises(ValueError, match=message):
                each(TEXTS, padding_side="right")
            with torch.no_grad():
                left = each(TEXTS, padding_side="left")[:, -1]
                torch.testing.assert_close(left, torch.stack(alone), atol=2e-4, rtol=1e-4)
                each([TEXTS[0], TEXTS[0]], padding_side="right")  # of one length: nothing is padded
                each(TEXTS[0], padding_side="right")
                each.run_with_cache(TEXTS)
        assert not torch.allclose(alone[0], want[0])


def test_texts_are_refused_where_the_tokenizer_pads_on_the_right(padded_right):
    model = padded_right
    options = dict(max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
    for caller, block in blocks(model):
        with block:
            with pytest.raises(ValueError, match=f"^{caller}: the texts have .* padded on the right"):
                model(TEXTS)
            with pytest.raises(ValueError, match=f"^{caller}: the texts have .* padded on the right"):
                model.run_with_cache(TEXTS)
            together = model.generate(TEXTS, **options)  # pads on the left by itself
            assert together == [model.generate(text, **options) for text in TEXTS]
    with torch.no_grad():
        model(TEXTS)  # outside a block it is nobody's business
        with inject(model, steering(model)):
            plain(model)
            in_thread(lambda: model(TEXTS))
        with ablate(model, [(1, 0)], positions="all"):
            model(TEXTS)


def test_masks_that_end_with_padding_are_refused(each):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for caller, block in blocks(each):
        with block:
            with pytest.raises(ValueError, match=rf"^{caller}: attention_mask is 0 at the last position of prompt 1"):
                each(TOKENS, attention_mask=mask)
            with torch.no_grad():
                each(TOKENS, attention_mask=mask.flip(1))


def test_tokens_that_end_with_padding_are_refused_unless_a_mask_says_that_they_are_meant(each):
    pad = each.tokenizer.pad_token_id
    tokens = torch.tensor([[pad, 11, 12, 13], [pad, 21, pad, pad]])
    options = dict(max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)
    for caller, block in blocks(each):
        message = rf"^{caller}: prompt 1 ends with the padding token {pad}, and others do not: is the batch padded on"
        with block, torch.no_grad():
            with pytest.raises(ValueError, match=message):
                each(tokens)
            with pytest.raises(ValueError, match=message):
                each.generate(tokens, **options)
            with pytest.raises(ValueError, match=message):
                list(each.generate_stream(tokens, **options))
            each(tokens, attention_mask=torch.ones_like(tokens))
            each(tokens[1:])
            each(torch.tensor([[pad, pad, pad], [pad, 5, 6]]))  # an empty prompt beside another


def test_wrong_arguments_are_the_methods_own_to_refuse(each):
    with inject(each, steering(each)):
        plain(each)
        with pytest.raises(TypeError, match=re.escape("forward()")):
            each()


# --- flags and filters, which are the model's and the process' ---


def test_frozen_blocks_that_overlap_end_as_they_began():
    own = random_model()
    own.train()
    list(own.modules())[-1].eval()
    parameters = list(own.parameters())
    parameters[0].requires_grad_(False)
    before = [p.requires_grad for p in parameters], [m.training for m in own.modules()]

    def now():
        return [p.requires_grad for p in parameters], [m.training for m in own.modules()]

    first, second = frozen(own), frozen(own)
    first.__enter__()
    in_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert not any(now()[0]) and not any(now()[1])  # the other one is still open
    in_thread(lambda: second.__exit__(None, None, None))
    assert now() == before

    def freeze():
        with frozen(own):
            assert not any(now()[0]) and not any(now()[1])

    with meanwhile(freeze):
        for _ in range(50):
            freeze()
    assert now() == before


def test_the_filter_of_a_notice_goes_when_the_last_block_ends():
    notice = "A forward hook edited hook_scale: so it is computed anew"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        first, second = quiet_norms(), quiet_norms()
        first.__enter__()
        in_thread(second.__enter__)
        warnings.filterwarnings("ignore", message="a filter of the user")
        first.__exit__(None, None, None)
        warnings.warn(notice, stacklevel=1)
        in_thread(lambda: second.__exit__(None, None, None))
        with pytest.raises(UserWarning, match="edited hook_scale"):
            warnings.warn(notice, stacklevel=1)
        warnings.warn("a filter of the user stays", stacklevel=1)
        assert warnings.filters[1:] == before
