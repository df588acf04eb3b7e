"""Batches chosen from free memory, smaller ones where memory runs out, and the memory that is really taken."""

import contextlib
import dataclasses
import functools
import re
import warnings
import weakref

import pytest
import torch
from architectures import build, word_prompts
from checkpoints import save
from conftest import random_model, seeded
from peak_memory import bridged

import fvlens
from fvlens.models import _memory as _model_memory
from fvlens.models import refresh
from fvlens.suffix import (
    _hooked,
    _memory,
    _prefix,
    halving,
    has_hooks,
    in_batches,
    open_reader,
    plan_batch,
    plan_slices,
    run_prefix,
)
from fvlens.suffix._estimate import Estimate
from fvlens.suffix._halving import is_out_of_memory
from fvlens.suffix._layout import is_laid_out, laid_out
from fvlens.types import Head

PAIRS = [("hot", "coldishness"), ("big", "smallx"), ("happy", "sad"), ("up", "zzqq"), ("wet", "dry"), ("in", "out")]


@contextlib.contextmanager
def starving(model, most):
    """Memory for ``most`` rows at once; more raise. Gives the rows that went in: prompts, or edited copies of them.

    Counted where the first block's MLP runs, where the engine runs prompts, kept or only looked at, and where it runs
    copies through a block.
    """
    seen = []

    def count(rows):
        seen.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    def run_weights(model, layout, tokens, *others):
        count(len(tokens))
        return plain_prefix(model, layout, tokens, *others)

    def passes(model, layout, tokens, *others):
        count(len(tokens))
        return plain_passes(model, layout, tokens, *others)

    def block(run, layer, active, n_fresh, edits, *others):
        count(run.n_prompts * (n_fresh + (0 if active is None else active.shape[1])))
        return plain_block(run, layer, active, n_fresh, edits, *others)

    plain_prefix, plain_passes, plain_block = _prefix.run_weights, _prefix.passes, _hooked.WeightsRun._block
    handle = model.blocks[0].mlp.register_forward_pre_hook(
        lambda module, args, kwargs: count((*args, *kwargs.values())[0].shape[0]), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prefix, "run_weights", run_weights)
        patch.setattr(_prefix, "passes", passes)
        patch.setattr(_hooked.WeightsRun, "_block", block)
        try:
            yield seen
        finally:
            handle.remove()
            assert not has_hooks(model)


def halvings(caught, what):
    """The sizes named by warnings, all of which must be about halving: prompts, then copies."""
    pattern = rf"{what}: out of memory with (\d+) (prompts|edited copies of a prompt) together; going on with (\d+)\."
    found = [re.fullmatch(pattern, str(one.message)) for one in caught]
    assert all(found), [str(one.message) for one in caught]
    assert all(issubclass(one.category, UserWarning) for one in caught)
    return [(match[2].split()[0], int(match[1]), int(match[3])) for match in found]


def quiet(function):
    """What a call gives, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(), caught


# --- the rule itself ---


def test_work_is_cut_in_halves_from_where_it_fails():
    tried, done = [], []

    def work(rows, variants):
        tried.append((rows.start, rows.stop))
        if rows.stop - rows.start > (5 if rows.start < 20 else 2):
            raise torch.OutOfMemoryError("full")
        done.extend(range(rows.start, rows.stop))
        return rows.stop - rows.start

    sizes, caught = quiet(lambda: list(in_batches(lambda rows: work(rows, 1), 30, 12, what="it")))
    assert done == list(range(30))
    assert sizes == 7 * [3] + 9 * [1]
    assert halvings(caught, "it") == [("prompts", 12, 6), ("prompts", 6, 3), ("prompts", 3, 1)]
    assert tried[:4] == [(0, 12), (0, 6), (0, 3), (3, 6)]  # on from the slice that failed
    assert len(tried) == len(sizes) + 3


def test_variants_are_halved_when_a_single_prompt_is_too_much():
    done = []

    def work(rows, variants):
        if (rows.stop - rows.start) * variants > 3:
            raise MemoryError
        done.append((rows.start, variants))

    _, caught = quiet(lambda: list(halving(work, [slice(0, 2), slice(2, 4)], variants=12, what="it")))
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert halvings(caught, "it") == [("prompts", 2, 1), ("edited", 12, 6), ("edited", 6, 3)]


def test_a_single_prompt_that_does_not_fit_is_an_error():
    def work(rows):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    with pytest.raises(MemoryError, match="it: out of memory with a single prompt; use shorter prompts") as error:
        list(in_batches(work, 3, 1, what="it"))
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass_unchanged():
    def work(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        list(in_batches(work, 4, 4, what="it"))


def test_what_a_failed_attempt_held_is_free_before_the_next():
    held, alive = [], []

    def work(rows):
        alive.append([ref() is not None for ref in held])
        big = torch.zeros(1000)
        held.append(weakref.ref(big))
        if rows.stop - rows.start > 1:
            raise torch.OutOfMemoryError("full")
        return rows

    quiet(lambda: list(in_batches(work, 4, 4, what="it")))
    assert alive[:3] == [[], [False], [False, False]]


def test_the_messages_of_allocators_are_known():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as error:  # no computer has an exbibyte
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    windows = "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    assert is_out_of_memory(RuntimeError(windows))
    assert not is_out_of_memory(RuntimeError("expected scalar type Half but found Float"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: not enough memory"))


# --- the same results where memory runs out ---


def message_at_one(what):
    return pytest.raises(MemoryError, match=f"{what}: out of memory with a single prompt; use shorter prompts")


@pytest.mark.parametrize("positions", ["last", "demonstration_label"])
def test_means(tiny, generator, positions):
    prompts = word_prompts(tiny, generator, n_prompts=11)
    kwargs = dict(positions=positions, progress=False)
    expected = fvlens.mean_head_activations(tiny, prompts, **kwargs).z
    with starving(tiny, 3) as seen:
        means, caught = quiet(lambda: fvlens.mean_head_activations(tiny, prompts, **kwargs))
    assert halvings(caught, "mean_head_activations") == [("prompts", 11, 5), ("prompts", 5, 2)]
    assert seen == [11, 5, 2, 2, 1, 2, 2, 2]
    torch.testing.assert_close(means.z, expected, rtol=1e-6, atol=1e-6)
    with starving(tiny, 0), message_at_one("mean_head_activations"):
        fvlens.mean_head_activations(tiny, prompts, batch_size=1, **kwargs)


class OwnRows:
    """A vector of its own for each pair, so that a shift of one row shows."""

    def additions(self):
        return {"blocks.1.hook_resid_post": torch.randn(6, 32, generator=seeded(1))}

    def check(self, model):
        pass


@pytest.mark.parametrize("setting", ["zero_shot", "icl"])
def test_scores(tiny, setting):
    kwargs = dict(setting=setting, demonstrations=fvlens.load_relation("plural").pairs[:20], n_shots=2)

    def run(**size):
        return fvlens.evaluate(tiny, PAIRS, vector=OwnRows(), generator=seeded(), **kwargs, **size)

    expected = run()
    with starving(tiny, 1) as seen:
        found, caught = quiet(run)
    named = halvings(caught, "evaluate")
    assert named
    assert all(kind == "prompts" and new == old // 2 for kind, old, new in named)
    assert sum(rows > 1 for rows in seen) == len(named)
    assert (expected.batch_size, found.batch_size) == (max(old for _, old, _ in named), 1)
    for name in ("probabilities", "log_probabilities"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.ranks, expected.ranks)
    assert (found.predictions, found.queries) == (expected.predictions, expected.queries)
    with starving(tiny, 0), message_at_one("evaluate"):
        run(batch_size=1)


def test_generated_answers(tiny):
    def run(**size):
        return fvlens.generate_answers(tiny, PAIRS, max_new_tokens=3, generator=seeded(), **size)

    expected = run()
    with starving(tiny, 3):
        found, caught = quiet(run)
    assert halvings(caught, "generate_answers") == [("prompts", 6, 3)]
    assert found.raw_texts == expected.raw_texts
    with starving(tiny, 0), message_at_one("generate_answers"):
        run(batch_size=1)


def test_filter_set(model):
    right = fvlens.load_relation("antonym").pairs[:13]
    pairs = [(pair.input, pair.output if i % 2 else right[0].output) for i, pair in enumerate(right)]

    def run(**size):
        return fvlens.filter_correct(model, pairs, demonstrations=right, n_shots=2, generator=seeded(), **size)

    expected = run()
    assert 2 < len(expected) < len(pairs) - 2
    with starving(model, 6):
        found, caught = quiet(run)
    assert [(kind, new) for kind, old, new in halvings(caught, "filter_correct")][:1] == [("prompts", 6)]
    assert found == expected
    with starving(model, 0), message_at_one("filter_correct"):
        run(batch_size=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """HookedTransformer in double precision; attention inside a bridge is of single precision in any case."""
    folder = save("llama", tmp_path_factory.mktemp("llama"))
    return dict(
        hooked=build("grouped-query", dtype=torch.float64),
        bridge=fvlens.load_model(folder, device="cpu", backend="bridge"),
    )


CASES = [
    ("hooked", dict(path="weights")),
    ("hooked", dict(path="kv")),
    ("hooked", dict(path="naive")),
    ("hooked", dict(path="kv", answer="whole")),
    ("bridge", dict(path="kv")),
    ("hooked", dict(method="atp")),
    ("hooked", dict(method="ig")),
    ("hooked", dict(method="ig", path="naive", n_steps=2)),
    ("hooked", dict(method="lrp")),
    ("bridge", dict(method="atp")),
]


@pytest.mark.parametrize("kind, settings", CASES, ids=[f"{kind}-{'-'.join(map(str, s.values()))}" for kind, s in CASES])
def test_indirect_effects(models, generator, kind, settings):
    model = models[kind]
    prompts = word_prompts(model, generator, n_prompts=6, n_shots=2)
    means = fvlens.mean_head_activations(model, word_prompts(model, generator, labels="true"), progress=False)
    means = dataclasses.replace(means, z=2 * means.z)

    def run():
        return fvlens.indirect_effects(model, prompts, means, progress=False, **settings)

    expected = run()
    assert expected.cie.abs().max() > 1e-3
    with starving(model, 4) as seen:
        found, caught = quiet(run)
    named = halvings(caught, "indirect_effects")
    assert named[0] == ("prompts", 6, 3)
    assert all(new == old // 2 for _, old, new in named)
    assert sum(rows > 4 for rows in seen) == len(named)  # one warning a failure
    rounding = dict(rtol=1e-6 if kind == "hooked" else 1e-4, atol=1e-6)
    torch.testing.assert_close(found.cie, expected.cie, **rounding)
    torch.testing.assert_close(found.baseline, expected.baseline, **rounding)
    assert found.complete
    assert len(found.cie) == len(prompts)

    def fails():
        with message_at_one("indirect_effects"):
            run()

    with starving(model, 0):
        _, caught = quiet(fails)
    assert halvings(caught, "indirect_effects")[:2] == [("prompts", 6, 3), ("prompts", 3, 1)]


# --- batches chosen from free memory ---


def test_a_batch_fits_what_is_free(tiny, monkeypatch):
    estimate = Estimate.of(tiny)
    fixed = max(estimate.weights, estimate.unembedding)
    row = estimate.forward(50, n_read=1, keep=False)
    for n_rows, expected in ((0.5, 1), (1, 1), (2, 2), (3.9, 2), (4, 4), (127, 64), (128, 128), (10**6, 128)):
        free = 4 * (fixed + int(n_rows * row)) + 4
        monkeypatch.setattr(_memory, "free_memory", lambda device, free=free: free)
        size, caught = quiet(lambda: plan_batch(tiny, n_pos=50))
        assert size == expected
        assert len(caught) == (expected < 128)
        assert all(f"so {expected} prompts run together instead of 128" in str(one.message) for one in caught)
    assert plan_batch(tiny, n_pos=50, max_memory=fixed + 9 * row) == 8
    least = fixed + row
    message = f"max_memory={least - 1} bytes is too small: one prompt of 50 tokens needs about {least} bytes; give more"
    with pytest.raises(ValueError, match=message):
        plan_batch(tiny, n_pos=50, max_memory=least - 1)


def needed(tiny, path="weights", **shape):
    """Bytes for one prompt with one edited copy, without a copy of the weights."""
    with pytest.raises(ValueError, match="max_memory=1 bytes is too small") as error:
        plan_slices(tiny, **shape, path=path, max_memory=1)
    return int(re.search(r"needs about (\d+) bytes", str(error.value))[1])


@pytest.mark.parametrize("path", ["weights", "kv", "naive"])
def test_the_plan_is_the_same_whatever_is_free_as_long_as_it_is_much(path, monkeypatch):
    tiny = random_model()
    shape = dict(n_pos=50, n_suffix=2, n_variants=12, path=path)
    found = set()
    for free in (None, 6 * 1024**3, 7 * 1024**3 + 12345, 10**12):
        monkeypatch.setattr(_memory, "free_memory", lambda device, free=free: free)
        found.add(((plan_slices(tiny, **shape, max_memory=None)), plan_batch(tiny, n_pos=50)))
    assert len(found) == 1
    wide = found.pop()[0]
    free = 4 * 9 * needed(tiny, **shape)
    monkeypatch.setattr(_memory, "free_memory", lambda device: free)
    plan, caught = quiet(lambda: plan_slices(tiny, **shape, max_memory=None))
    assert 1 <= plan.prompts < wide.prompts
    (warning,) = caught
    assert f"so {plan.prompts} prompts run together instead of {wide.prompts}" in str(warning.message)
    _, caught = quiet(lambda: plan_slices(tiny, **shape, max_memory=None, n_prompts=1))
    assert not caught  # one prompt fits as before
    _, caught = quiet(lambda: plan_slices(tiny, **shape, max_memory=None, warn=False))
    assert not caught


def test_everything_asks_for_the_batch_that_fits_says_so_once_and_records_it(monkeypatch):
    """With little memory free, no call runs all rows together; given a batch size, each runs exactly that many."""
    tiny = random_model()
    prompts = word_prompts(tiny, seeded(), n_shots=0, n_prompts=9)
    pairs = [(word, "cold") for word in ("hot", "big", "up", "wet", "in", "dry", "low", "old", "sad")]
    assert len(tiny.tokenizer(" cold", add_special_tokens=False)["input_ids"]) == 1
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    estimate = Estimate.of(tiny)
    whole = max(estimate.weights, estimate.unembedding) + 4 * estimate.forward(5, n_read=1, keep=False)
    engine = needed(tiny, n_pos=5, n_suffix=1, n_variants=1)
    effects = functools.partial(fvlens.indirect_effects, tiny, prompts, means, progress=False)
    tune = functools.partial(fvlens.finetune, tiny, pairs, init="zero", layer=1, epochs=1, batch_size=1, progress=False)
    asked = functools.partial(fvlens.generate_answers, tiny, pairs, max_new_tokens=1)
    short = dict(n_pos=5, n_suffix=1)
    calls = dict(
        means=(whole, lambda **size: fvlens.mean_head_activations(tiny, prompts, progress=False, **size)),
        scores=(engine, lambda **size: fvlens.evaluate(tiny, pairs, generator=seeded(), **size)),
        whole_scores=(whole, lambda **size: fvlens.evaluate(tiny, pairs, generator=seeded(), path="naive", **size)),
        answers=(whole, lambda **size: asked(generator=seeded(), **size)),
        filtered=(engine, lambda **size: fvlens.filter_correct(tiny, pairs, n_shots=1, generator=seeded(), **size)),
        effects=(2 * needed(tiny, n_variants=12, **short), lambda: effects(path="weights")),
        naive=(whole, lambda: effects(path="naive")),
        screen=(2 * needed(tiny, path="kv", gradients=True, n_variants=1, **short), lambda: effects(method="atp")),
        training=(4 * needed(tiny, gradients=True, n_variants=1, **short), lambda: tune(generator=seeded())),
    )
    for name, (few, call) in calls.items():
        sizes = {}
        for free in (4 * few + 4, 10**12):
            refresh(tiny)
            monkeypatch.setattr(_memory, "free_memory", lambda device, free=free: free)
            with starving(tiny, 10**9) as seen:
                result, caught = quiet(call)
            texts = [str(one.message) for one in caught if "is free: activations may take" in str(one.message)]
            assert len(texts) == (free < 10**12), (name, texts)
            sizes[free] = getattr(result, "batch_size", None)
            if sizes[free] is not None and name not in ("training", "effects"):
                assert sizes[free] == max(seen), name
            if getattr(result, "path", None) == "weights":
                assert result.weights == ("laid out at each call" if free < 10**12 else "copied"), name
        small, large = sizes.values()
        assert (small is None and name in ("answers", "filtered")) or 1 <= small < large <= 9, (name, sizes)
        if name in ("means", "scores", "whole_scores", "answers", "filtered"):
            with starving(tiny, 10**9) as seen:
                quiet(lambda call=call: call(batch_size=2))
            assert max(seen) == 2, name
            with pytest.raises(ValueError, match="expected batch_size"):
                call(batch_size=0)


def test_a_copy_that_does_not_fit_is_not_made(monkeypatch):
    model = random_model()
    size = Estimate.of(model).copy
    prompts = word_prompts(model, seeded(), n_shots=0)
    means = fvlens.mean_head_activations(model, prompts, progress=False)
    vector = fvlens.function_vector(model, means, heads=[(1, 2)], layer=1)

    def results(**options):
        training = dict(init="zero", layer=1, epochs=1, batch_size=1, generator=seeded(), progress=False)
        tuned = fvlens.finetune(model, PAIRS[:4], **training, **options)
        return (
            fvlens.indirect_effects(model, prompts, means, progress=False, **options),
            fvlens.evaluate(model, PAIRS, vector=vector, generator=seeded(), **options),
            tuned,
        )

    copied = results()
    assert {result.weights for result in copied} == {"copied"}
    assert {result.weights for result in results(max_memory=size)} == {"copied"}  # it is there already
    refresh(model)
    bare = results(max_memory=2 * size - 1)
    assert {result.weights for result in bare} == {"laid out at each call"}
    assert not is_laid_out(model)
    torch.testing.assert_close(bare[0].cie, copied[0].cie, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bare[1].log_probabilities, copied[1].log_probabilities, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bare[2].vector.vector, copied[2].vector.vector, rtol=1e-4, atol=1e-5)
    assert {result.weights for result in results(path="kv")} == {None}
    assert {result.weights for result in results(max_memory=4 * size)} == {"copied"}
    refresh(model)
    for free, held in ((size + 1024**3 - 1, "laid out at each call"), (size + 1024**3, "copied")):
        monkeypatch.setattr(_memory, "free_memory", lambda device, free=free: free)
        assert fvlens.evaluate(model, PAIRS, generator=seeded()).weights == held


def test_a_split_model_is_bounded_by_its_fullest_device(monkeypatch):
    class Split:
        def parameters(self):
            return [torch.empty(1, device=device) for device in ("cpu", "meta", "meta")]

    free = {"cpu": 4000, "meta": 1000}
    monkeypatch.setattr(_memory, "free_memory", lambda device: free[device.type])
    assert _memory.bound(Split()) == 250
    free["meta"] = None
    assert _memory.bound(Split()) == 1000
    assert _memory.bound(Split(), 7) == 7


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_limits_of_containers_count(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    root = tmp_path / "v2"
    write(root)
    assert _model_memory.cgroup_room(root, own) is None
    write(root / "a/b", memory_dot_max="max\n", memory_dot_current="70\n", memory_dot_stat="anon 1\ninactive_file 5\n")
    assert _model_memory.cgroup_room(root, own) is None
    write(root / "a", memory_dot_max="1000\n", memory_dot_current="300\n", memory_dot_stat="inactive_file 20\n")
    assert _model_memory.cgroup_room(root, own) == 720
    write(root / "a/b", memory_dot_max="100\n")
    assert _model_memory.cgroup_room(root, own) == 35
    write(root / "a/b", memory_dot_current="500\n")
    assert _model_memory.cgroup_room(root, own) == 0
    own.write_text("12:cpu,cpuacct:/a\n4:memory:/elsewhere\n0::/\n")
    v1 = tmp_path / "v1"
    names = dict(memory_dot_limit_in_bytes="1000", memory_dot_usage_in_bytes="400")
    write(v1 / "memory", **names, memory_dot_stat="inactive_file 1\ntotal_inactive_file 30\n")
    assert _model_memory.cgroup_room(v1, own) == 630
    assert _model_memory.cgroup_room(v1, tmp_path / "absent") is None


def test_free_memory_heeds_the_container(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(_model_memory, "cgroup_room", lambda: 12345)
    assert _model_memory.free_memory(cpu) == 12345
    monkeypatch.setattr(_model_memory, "cgroup_room", lambda: 2**62)
    assert 0 < _model_memory.free_memory(cpu) < 2**50


# --- the estimate against what is really allocated ---


def allocated(function):
    """Most bytes that tensors made in a call held at the same time, and what the call gives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result


def test_the_measure_of_allocations():
    def work():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return (b * 2 + 1).sum()  # b, 2 b, and 2 b + 1

    most, _ = allocated(work)
    assert 12_000_000 <= most < 12_001_000


def hooked_model(**settings):
    return random_model(n_layers=4, n_heads=8, d_model=256, d_head=32, d_mlp=1024, n_ctx=256, d_vocab=2000, **settings)


GROUPED = dict(
    n_key_value_heads=4, positional_embedding_type="rotary", rotary_dim=32, normalization_type="RMS", gated_mlp=True,
    act_fn="silu",
)  # fmt: skip
SHAPES = {
    "hooked": (hooked_model, {}, ("weights", "kv")),
    "hooked-grouped": (hooked_model, GROUPED, ("weights", "kv")),
    "bridge": (bridged, {}, ("kv",)),
    "bridge-grouped": (bridged, dict(num_key_value_heads=4), ("kv",)),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_estimate_holds_what_is_allocated(name):
    make, settings, paths = SHAPES[name]
    model = make(**settings)
    estimate = Estimate.of(model)

    def check(taken, fixed, rest, most):
        """``fixed`` copies of weights need not lie beside the rest; the rest is no more than so many times too much."""
        assert taken <= 1.02 * (fixed + rest), (taken, fixed, rest)
        assert rest <= most * taken, (taken, fixed, rest)

    fixed, unembedding = estimate.weights, estimate.unembedding
    heads = [Head(layer, head) for layer in range(4) for head in range(8)]
    values = torch.zeros(32, 32)
    ways = [(path, copied) for path in paths for copied in ((True, False) if path == "weights" else (False,))]
    if "weights" in paths:
        taken, layout = allocated(lambda: laid_out(model))
        assert layout.n_bytes == estimate.copy <= taken <= 1.02 * estimate.copy
    for n_pos, n_suffix in ((24, 1), (160, 1), (160, 12)):
        tokens = torch.randint(2000, (3, n_pos), generator=seeded())
        mask, targets = torch.ones_like(tokens), torch.ones(3, n_suffix, dtype=torch.long)

        def read(keep, tokens=tokens, mask=mask):
            return open_reader(model, 3, keep=keep).read(tokens, mask, n_read=2)

        with torch.inference_mode():
            read(False)  # a bridge holds on to something of its last pass, which it has then
            for keep in (False, True):
                taken, _ = allocated(lambda keep=keep: read(keep))
                check(taken, max(fixed, unembedding), 3 * estimate.forward(n_pos, n_read=2, keep=keep), 2.5)
            for path, copied in ways:
                own = 0 if copied else estimate.one_weight if path == "weights" else fixed
                shape = dict(n_suffix=n_suffix, path=path, **({"copied": copied} if path == "weights" else {}))
                taken, run = allocated(lambda s=shape, t=tokens, m=mask: run_prefix(model, t, m, **s))
                check(taken, own, 3 * estimate.prefix(n_pos, n_suffix, path), 2.5)
                kept = [run.kept] if path == "weights" else [*run.keys, *run.values]
                kept += [run.resid_pre, run.z, run.resid_final]
                size = sum(tensor.numel() * tensor.element_size() for tensor in kept)
                check(size, 0, 3 * estimate.kept(n_pos, n_suffix), 1.2)
                taken, resid = allocated(lambda run=run, t=targets: run.patched(heads, values, t.bool()))
                planned = 3 * 32 * (estimate.variant(n_pos, n_suffix, path) + estimate.result(n_suffix))
                check(taken, own, planned, 2.5)
                taken, _ = allocated(lambda run=run, r=resid, t=targets: run.log_probs(r, t, at_once=20))
                planned = 96 * estimate.result(n_suffix) + 20 * estimate.logits
                check(taken, unembedding, planned, 4)


@pytest.mark.parametrize("from_layer, keep_z", [(0, False), (2, True), (3, False), (4, False)])
def test_less_is_kept_from_a_higher_layer(from_layer, keep_z):
    model = hooked_model(**GROUPED)
    tokens = torch.randint(2000, (3, 40), generator=seeded())
    run = run_prefix(model, tokens, torch.ones_like(tokens), n_suffix=2, from_layer=from_layer, keep_z=keep_z)
    kept = [run.kept, run.resid_pre, *([run.z] if run.z is not None else [])]
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    planned = 3 * Estimate.of(model).kept(40, 2, from_layer=from_layer, keep_z=keep_z)
    assert size <= planned <= 1.2 * size + 3
