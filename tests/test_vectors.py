"""Function vectors: arithmetic as for plain vectors, files that come back bit for bit, and refusals that say why."""

import dataclasses
import json
import os
import pickle
import re
import struct

import pytest
import torch
from architectures import build, word_prompts
from conftest import random_model, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import fvlens
from fvlens import DistributedVector, FunctionVector, files, vectors
from fvlens.interventions import resid_hook, z_hook
from fvlens.models import fingerprint
from fvlens.prompts import TEMPLATES, Template
from fvlens.suffix import has_hooks
from fvlens.types import Head

QUICK = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32).map(torch.tensor)
FACTORS = st.floats(-50, 50, width=16)


def vector_of(model, values, **changes):
    """A vector with given numbers."""
    fields = dict(vector=values, layer=1, heads=(Head(0, 1),), relation="antonym", fingerprint=fingerprint(model))
    return FunctionVector(**{**fields, **changes})


@pytest.fixture
def vector(tiny, generator):
    """A vector of random numbers with all its metadata."""
    return vector_of(
        tiny, torch.randn(32, generator=generator), heads=(Head(0, 1), Head(2, 3)), template="qa", data_hash="abc",
        seed=7, kind="function",
    )  # fmt: skip


@pytest.fixture(scope="module")
def other():
    """A model of the tiny one's shape and other weights."""
    made = random_model()
    with torch.no_grad():
        made.W_E[0, 0] += 1
    return made


# --- building ---


def test_vector_is_the_sum_of_what_the_heads_write(generator):
    """Each head's write measured by running the model: attention output with the head at its mean, less without it."""
    model = build("grouped-query")
    prompts = word_prompts(model, generator)
    means = fvlens.mean_head_activations(model, prompts, progress=False)
    heads = [Head(0, 2), Head(1, 0), Head(2, 3), Head(0, 1)]
    vector = fvlens.function_vector(model, means, heads=heads, layer=2, seed=5)
    expected = torch.zeros(model.cfg.d_model)
    for layer, head in heads:
        written = []
        for new in (means.z[layer, head], torch.zeros(model.cfg.d_head)):

            def replace(z, hook, head=head, new=new):
                z = z.clone()
                z[:, -1, head] = new
                return z

            hooks = [
                (z_hook(layer), replace),
                (f"blocks.{layer}.hook_attn_out", lambda out, hook, written=written: written.append(out[0, -1])),
            ]
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                model(prompts.tokens[:1], attention_mask=prompts.attention_mask[:1])
        expected += written[0] - written[1]
    torch.testing.assert_close(vector.vector, expected, rtol=1e-4, atol=1e-5)
    assert (vector.layer, vector.heads, vector.seed, vector.kind) == (2, tuple(heads), 5, "function")
    assert (vector.relation, vector.template, vector.data_hash) == (means.relation, prompts.template, prompts.data_hash)
    assert not vector.vector.requires_grad


def test_order_of_heads_does_not_matter_and_sets_add_up(tiny, generator):
    means = fvlens.mean_head_activations(tiny, word_prompts(tiny, generator), progress=False)
    make = lambda *heads: fvlens.function_vector(tiny, means, heads=heads, layer=1)  # noqa: E731
    torch.testing.assert_close(make((0, 1), (2, 2)).vector, make((2, 2), (0, 1)).vector)
    together = make((0, 1)) + make((2, 2))
    torch.testing.assert_close(together.vector, make((0, 1), (2, 2)).vector)
    assert together.heads == (Head(0, 1), Head(2, 2))


@pytest.mark.parametrize("maker", [fvlens.function_vector, fvlens.distributed_vector])
@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], "heads: expected at least one head, got none."),
        ([(0, 1), (0, 1)], "heads: L0H1 is listed twice"),
        ([(3, 0)], "heads: L3H0 does not exist: the model has layers 0..2 and heads 0..3."),
        ([(0, 4)], "heads: L0H4 does not exist"),
        ([(0, -1)], "heads: L0H-1 does not exist"),
    ],
)
def test_bad_heads_are_refused(tiny, generator, maker, heads, message):
    means = fvlens.mean_head_activations(tiny, word_prompts(tiny, generator, n_shots=0), progress=False)
    settings = dict(layer=1) if maker is fvlens.function_vector else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        maker(tiny, means, heads=heads, **settings)


@pytest.mark.parametrize("maker", [lambda *a: fvlens.function_vector(*a, heads=[(0, 0)], layer=0),
                                   lambda *a: fvlens.distributed_vector(*a, heads=[(0, 0)])])  # fmt: skip
def test_bad_means_are_refused(tiny, other, generator, maker):
    prompts = word_prompts(tiny, generator, n_shots=1)
    elsewhere = fvlens.mean_head_activations(tiny, prompts, positions="query", progress=False)
    with pytest.raises(ValueError, match="expected means of the last token, got means at 'query'"):
        maker(tiny, elsewhere)
    foreign = fvlens.mean_head_activations(other, prompts, progress=False)
    with pytest.raises(ValueError, match=r"the means of the heads was made on model .* not on this one .*weights: "):
        maker(tiny, foreign)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_is_checked(tiny, generator, layer):
    means = fvlens.mean_head_activations(tiny, word_prompts(tiny, generator, n_shots=0), progress=False)
    with pytest.raises(ValueError, match=f"FunctionVector: expected a layer in 0..2, got {layer}"):
        fvlens.function_vector(tiny, means, heads=[(0, 0)], layer=layer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(31), "FunctionVector: expected shape (32,), the model's d_model, got (31,)."),
        (torch.ones(1, 32), "FunctionVector: expected shape (32,), the model's d_model, got (1, 32)."),
        (torch.full((32,), torch.nan), "FunctionVector: the vector holds NaN or infinite values."),
        (torch.full((32,), -torch.inf), "FunctionVector: the vector holds NaN or infinite values."),
    ],
)
def test_bad_numbers_are_refused(tiny, unchecked, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vector_of(tiny, values)


def test_vectors_are_values(tiny, unchecked):
    """Single precision, without gradient, heads as Heads, frozen."""
    made = vector_of(tiny, torch.ones(32, dtype=torch.float64, requires_grad=True), heads=((0, 1),))
    assert made.vector.dtype == torch.float32
    assert not made.vector.requires_grad
    assert made.heads == (Head(0, 1),)
    assert isinstance(made.heads[0], Head)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.layer = 2


# --- arithmetic ---


@QUICK
@given(NUMBERS, NUMBERS, NUMBERS, FACTORS, FACTORS)
def test_vector_space_laws(tiny, a, b, c, s, t):
    u, v, w = (vector_of(tiny, x) for x in (a, b, c))
    close = lambda left, right: torch.testing.assert_close(  # noqa: E731
        left.vector, right.vector, rtol=1e-4, atol=1e-5 * (1 + abs(s)) * (1 + abs(t)) * 100
    )
    assert torch.equal((u + v).vector, a + b)
    assert torch.equal((u + v).vector, (v + u).vector)
    assert torch.equal((u - v).vector, a - b)
    assert torch.equal((s * u).vector, (u * s).vector)
    assert torch.equal((-u).vector, -a)
    assert torch.equal((1 * u).vector, a)
    assert (0 * u).norm() == 0
    assert (u - u).norm() == 0
    close((u + v) + w, u + (v + w))
    close(s * (u + v), s * u + s * v)
    close((s + t) * u, s * u + t * u)
    close((s * t) * u, s * (t * u))


@QUICK
@given(NUMBERS, NUMBERS, st.floats(0.125, 50, width=16))
def test_norm_and_cosine(tiny, a, b, s):
    u, v = vector_of(tiny, a), vector_of(tiny, b)
    assert u.norm() == pytest.approx(sum(float(x) ** 2 for x in a) ** 0.5, rel=1e-5, abs=1e-30)
    if min(u.norm(), v.norm()) < 1e-3:
        return
    expected = sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / (u.norm() * v.norm())
    assert u.cosine(v) == pytest.approx(expected, abs=1e-5)
    assert u.cosine(v) == pytest.approx(v.cosine(u), abs=1e-6)
    assert -1 <= u.cosine(v) <= 1
    assert (s * u).cosine(v) == pytest.approx(u.cosine(v), abs=1e-5)
    assert (-u).cosine(v) == pytest.approx(-u.cosine(v), abs=1e-6)
    assert u.cosine(u) == pytest.approx(1, abs=1e-6)
    assert (u + v).norm() <= (u.norm() + v.norm()) * (1 + 1e-6)


def test_combined_vectors_say_what_went_in(tiny, vector):
    synonym = dataclasses.replace(vector, relation="synonym", heads=(Head(2, 3), Head(1, 1)))
    both = vector + synonym
    assert (both.relation, both.kind, both.layer, both.data_hash) == ("antonym + synonym", "combined", 1, "")
    assert both.heads == (Head(0, 1), Head(2, 3), Head(1, 1))
    assert (vector - synonym).relation == "antonym - synonym"
    assert (vector + vector).relation == "antonym"
    assert (vector + dataclasses.replace(vector, relation="")).relation == "antonym"
    double = 2 * vector
    assert (double.relation, double.heads, double.kind, double.seed) == ("antonym", vector.heads, "function", 7)
    moved = vector.at_layer(2)
    assert moved.layer == 2
    assert torch.equal(moved.vector, vector.vector)
    assert dict(moved.additions()).keys() == {resid_hook(2)}


def test_vectors_that_do_not_fit_are_not_combined(other, vector, unchecked):
    foreign = vector_of(other, torch.ones(32))
    with pytest.raises(ValueError, match=r"cannot combine vectors of two models \(weights: "):
        vector + foreign
    with pytest.raises(ValueError, match=r"cannot combine vectors of two models \(weights: "):
        vector - foreign
    message = "cannot combine vectors of layers 1 and 2; bring one over with at_layer()."
    with pytest.raises(ValueError, match=re.escape(message)):
        vector + vector.at_layer(2)
    with pytest.raises(ValueError, match=re.escape("FunctionVector: expected a layer in 0..2, got 5.")):
        vector.at_layer(5)
    for wrong in (lambda: vector + 1, lambda: vector - 1, lambda: 1 + vector, lambda: vector * vector):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    with pytest.raises(ValueError, match="the vector holds NaN or infinite values"):
        vector * float("nan")


def test_cosine_is_refused_where_it_is_undefined(tiny, vector):
    zero = 0 * vector
    for pair in ((vector, zero), (zero, vector)):
        with pytest.raises(ValueError, match=re.escape("cosine: undefined for a zero vector.")):
            pair[0].cosine(pair[1])
    wide = random_model(n_layers=1, d_model=16)
    with pytest.raises(ValueError, match=re.escape("cosine: the vectors have 32 and 16 numbers.")):
        vector.cosine(vector_of(wide, torch.ones(16), layer=0))


# --- decoding ---


@pytest.mark.parametrize("final_norm", [True, False])
def test_decode_equals_a_decoding_by_hand(tiny, vector, final_norm):
    x = vector.vector.double()
    if final_norm:
        x = (x - x.mean()) / (x.var(unbiased=False) + tiny.cfg.eps).sqrt()
        x = x * tiny.ln_final.w.double() + tiny.ln_final.b.double()
    scores = (x @ tiny.W_U.double()).tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:6]
    got = vector.decode(tiny, 6, final_norm=final_norm)
    assert [word for word, _ in got] == [tiny.tokenizer.decode([i]) for i in order]
    assert [score for _, score in got] == pytest.approx([scores[i] for i in order], rel=1e-4)


def test_decode_finds_the_word_that_the_vector_points_to(tiny):
    token = tiny.tokenizer(" cold", add_special_tokens=False)["input_ids"][0]
    direction = tiny.W_U[:, token].detach()
    assert vector_of(tiny, direction).decode(tiny, 1, final_norm=False)[0] == (
        tiny.tokenizer.decode([token]),
        pytest.approx(float(direction @ direction), rel=1e-5),
    )


def test_decode_checks_its_arguments(tiny, other, vector):
    for k in (0, tiny.cfg.d_vocab + 1):
        with pytest.raises(ValueError, match=f"decode: expected k between 1 and {tiny.cfg.d_vocab}, got {k}"):
            vector.decode(tiny, k)
    with pytest.raises(ValueError, match=r"the vector of 'antonym' was made on model .* not on this one"):
        vector.decode(other)


# --- files ---


def test_saved_vectors_come_back_bit_for_bit(tiny, vector, tmp_path):
    path = tmp_path / "antonym.safetensors"
    assert vector.save(path) == path
    for loaded in (FunctionVector.load(path), FunctionVector.load(str(path), model=tiny)):
        assert torch.equal(loaded.vector, vector.vector)
        for field in dataclasses.fields(vector):
            if field.name != "vector":
                assert getattr(loaded, field.name) == getattr(vector, field.name)
        assert all(isinstance(head, Head) for head in loaded.heads)
    assert [file.name for file in tmp_path.iterdir()] == ["antonym.safetensors"]  # no sidecar, nothing left over


@QUICK
@given(
    NUMBERS,
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), unique=True, max_size=5).map(
        lambda pairs: tuple(Head(*pair) for pair in pairs)
    ),
    st.text(max_size=20).filter(lambda text: "\x00" not in text and text.isprintable()),
    st.none() | st.integers(0, 2**62),
)
def test_any_vector_survives_a_file(tiny, tmp_path, values, layer, heads, relation, seed):
    made = vector_of(tiny, values, layer=layer, heads=heads, relation=relation, seed=seed, kind="random")
    loaded = FunctionVector.load(made.save(tmp_path / "v.safetensors"), model=tiny)
    assert torch.equal(loaded.vector, values)
    assert (loaded.layer, loaded.heads, loaded.relation) == (layer, heads, relation)
    assert (loaded.seed, loaded.kind, loaded.fingerprint) == (seed, "random", made.fingerprint)


def test_any_tool_can_read_the_file(vector, tmp_path):
    with safe_open(vector.save(tmp_path / "v.safetensors"), framework="pt") as file:
        assert torch.equal(file.get_tensor("vector"), vector.vector)
        header = json.loads(file.metadata()["fvlens"])
    assert header["heads"] == [[0, 1], [2, 3]]
    assert header["fingerprint"]["d_model"] == 32


def write(path, tensors, header, form=vectors.FORMAT):
    """A file like ours, with anything in it."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"format": form, "fvlens": text})
    return path


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fvlens"])


def test_missing_and_broken_files_are_refused(vector, tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(ValueError, match=re.escape(f"no vector file at {path}.")):
        FunctionVector.load(path)
    with pytest.raises(ValueError, match=re.escape(f"no vector file at {tmp_path}.")):
        FunctionVector.load(tmp_path)
    whole = vector.save(path).read_bytes()
    message = r"v\.safetensors: not a safetensors file, or a truncated one"
    for n_bytes in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(ValueError, match=message):
            FunctionVector.load(path)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=message):
        FunctionVector.load(path)


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_pickles_are_refused_and_not_run(tmp_path, writer):
    path, sprung = tmp_path / "v.safetensors", tmp_path / "sprung"
    with path.open("wb") as file:
        writer(Trap(sprung), file)
    with pytest.raises(ValueError, match="not a safetensors file, or a truncated one"):
        FunctionVector.load(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap does work
    assert sprung.is_dir()


def test_foreign_safetensors_are_refused(vector, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"vector": vector.vector}, path)
    message = "weights.safetensors: not written by fvlens (format None, expected 'fvlens-vector-1')."
    with pytest.raises(ValueError, match=re.escape(message)):
        FunctionVector.load(path)
    write(path, {"vector": vector.vector}, {}, form="fvlens-vector-9")
    with pytest.raises(ValueError, match=re.escape("not written by fvlens (format 'fvlens-vector-9', expected")):
        FunctionVector.load(path)


def test_damaged_metadata_is_refused(vector, tmp_path, unchecked):
    path = vector.save(tmp_path / "v.safetensors")
    good, tensors = header_of(path), {"vector": vector.vector}

    def refused(header, message):
        write(path, tensors, header)
        with pytest.raises(ValueError, match=message) as error:
            FunctionVector.load(path)
        assert str(error.value).startswith("v.safetensors: ")

    refused("{not json", r"damaged metadata \(JSONDecodeError")
    refused("[1, 2]", r"damaged metadata \(TypeError: expected an object, got list\)")
    save_file(tensors, path, metadata={"format": vectors.FORMAT})
    with pytest.raises(ValueError, match=r"v\.safetensors: damaged metadata \(KeyError: 'fvlens'\)"):
        FunctionVector.load(path)
    for key in good:
        if key not in ("template_text", "complete"):  # files of fvlens 0.1 have none
            refused({k: v for k, v in good.items() if k != key}, rf"damaged metadata \(KeyError: '{key}'\)")
    refused({**good, "template": "arrow"}, "the template is named 'arrow', but its text 'qa'")
    refused({**good, "template_text": {"name": "qa"}}, "expected a template as an object with name, demonstration")
    refused({**good, "template": ["qa"], "template_text": None}, r"template: expected a text, got \['qa'\]")
    for layer in (None, True, 1.0, "1"):
        refused({**good, "layer": layer}, f"FunctionVector: layer: expected a whole number, got {layer!r}")
    refused({**good, "seed": 1.5}, r"FunctionVector: seed: expected a whole number, got 1\.5")
    refused({**good, "complete": 1}, "complete: expected true or false, got 1")
    for name in ("relation", "kind", "data_hash"):
        refused({**good, name: 5}, f"FunctionVector: {name}: expected a text, got 5")
    refused({**good, "layer": 9}, r"expected a layer in 0\.\.2, got 9")
    for heads in (3, {}, ""):
        refused({**good, "heads": heads}, f"heads: expected a list, got {heads!r}")
    refused({**good, "heads": [[1]]}, r"heads: expected \(layer, head\) pairs of integers, got \[1\]")
    refused({**good, "heads": [[1, True]]}, r"heads: expected \(layer, head\) pairs of integers, got \[1, True\]")
    refused({**good, "heads": [[1, 4]]}, "heads: L1H4 does not exist")
    refused({**good, "fingerprint": {"name": "x"}}, "fingerprint: expected the fields .*, got ")
    wrong = {**good["fingerprint"], "n_layers": "three"}
    refused({**good, "fingerprint": wrong}, "fingerprint: n_layers: expected a whole number, got 'three'")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"vector": torch.full((32,), torch.nan)}, "v.safetensors: FunctionVector: the vector holds NaN or infinite"),
        ({"vector": torch.ones(16)}, "v.safetensors: FunctionVector: expected shape (32,), the model's d_model,"),
        ({"vector": torch.ones(2, 16)}, "v.safetensors: FunctionVector: expected shape (32,)"),
        ({"direction": torch.ones(32)}, "v.safetensors: expected one tensor named 'vector', got ['direction']."),
        (
            {"vector": torch.ones(32), "more": torch.ones(1)},
            "v.safetensors: expected one tensor named 'vector', got ['more', 'vector'].",
        ),
    ],
)
def test_bad_tensors_in_a_file_are_refused(vector, tmp_path, unchecked, tensors, message):
    path = vector.save(tmp_path / "v.safetensors")
    write(path, tensors, header_of(path))
    with pytest.raises(ValueError, match=re.escape(message)):
        FunctionVector.load(path)


def test_a_vector_of_another_model_is_refused_unless_told_so(tiny, other, vector, tmp_path):
    path = vector.save(tmp_path / "v.safetensors")
    message = r"the vector of 'antonym' was made on model .*, not on this one \(vector / model: weights: "
    with pytest.raises(ValueError, match=message):
        FunctionVector.load(path, model=other)
    loaded = FunctionVector.load(path)
    tokens = torch.tensor([[0, 5, 6]])
    with pytest.raises(ValueError, match=message + r".* / .*\); pass check=False to use it all the same\."):
        with fvlens.inject(other, loaded):
            pytest.fail("the block was entered")
    plain = other(tokens)
    with fvlens.inject(other, loaded, check=False):
        assert (other(tokens)[:, -1] - plain[:, -1]).abs().max() > 1e-3
    with fvlens.inject(tiny, loaded):
        tiny(tokens)
    assert not has_hooks(other)


def test_a_failed_save_keeps_the_old_file(tiny, vector, tmp_path, monkeypatch):
    path = vector.save(tmp_path / "v.safetensors")
    old = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files._write.os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            (2 * vector).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(files._write.os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            (2 * vector).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    (2 * vector).save(path)
    assert torch.equal(FunctionVector.load(path).vector, 2 * vector.vector)


def test_saving_into_a_missing_folder_is_refused(vector, tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=re.escape(f"save: folder {folder} does not exist; create it first.")):
        vector.save(folder / "v.safetensors")
    assert not folder.exists()


# --- controls and distributed vectors ---


def test_random_vector_has_the_norm_and_nothing_else(vector):
    draw = lambda seed: fvlens.random_vector_like(vector, seeded(seed))  # noqa: E731
    before = torch.get_rng_state()
    made = draw(0)
    assert made.norm() == pytest.approx(vector.norm(), rel=1e-5)
    assert torch.equal(made.vector, draw(0).vector)
    assert not torch.equal(made.vector, draw(1).vector)
    assert torch.equal(before, torch.get_rng_state())
    assert (made.kind, made.heads, made.layer, made.data_hash) == ("random", (), vector.layer, "")
    assert made.relation == "random like antonym"
    assert made.fingerprint == vector.fingerprint
    # directions are uniform: cosines have mean 0 and variance 1 / d_model
    g = seeded()
    cosines = torch.tensor([fvlens.random_vector_like(vector, g).cosine(vector) for _ in range(500)])
    assert abs(cosines.mean()) < 4 / (32 * 500) ** 0.5
    assert cosines.var() == pytest.approx(1 / 32, rel=0.3)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0])
def test_distributed_vector_adds_the_means_to_the_heads(tiny, generator, alpha):
    prompts = word_prompts(tiny, generator)
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    heads = [Head(0, 1), Head(2, 0), Head(0, 3)]
    made = fvlens.distributed_vector(tiny, means, heads=heads, alpha=alpha)

    def add(z, hook):
        z = z.clone()
        for layer, head in heads:
            if layer == hook.layer():
                z[:, -1, head] += alpha * means.z[layer, head]
        return z

    run = lambda: tiny(prompts.tokens, attention_mask=prompts.attention_mask)  # noqa: E731
    with torch.no_grad():
        plain = run()
        with tiny.hooks(fwd_hooks=[(z_hook(layer), add) for layer in (0, 2)]):
            expected = run()
        with fvlens.inject(tiny, made):
            got = run()
    torch.testing.assert_close(got, expected)
    assert (got - plain)[:, -1].abs().max() > 1e-2
    assert made.additions().keys() == {z_hook(0), z_hook(2)}
    assert (made.heads, made.relation, made.kind) == (tuple(heads), means.relation, "distributed")
    assert isinstance(made, DistributedVector)


def test_one_head_distributed_at_the_last_layer_equals_its_vector(tiny, generator):
    """Without anything above that reads z, adding to z or its projection to the attention output is the same."""
    prompts = word_prompts(tiny, generator)
    means = fvlens.mean_head_activations(tiny, prompts, progress=False)
    made = fvlens.distributed_vector(tiny, means, heads=[(2, 1)])
    vector = fvlens.function_vector(tiny, means, heads=[(2, 1)], layer=2)

    def add(out, hook):
        return torch.cat([out[:, :-1], out[:, -1:] + vector.vector], dim=1)

    with torch.no_grad():
        with fvlens.inject(tiny, made):
            got = tiny(prompts.tokens, attention_mask=prompts.attention_mask)
        with tiny.hooks(fwd_hooks=[("blocks.2.hook_attn_out", add)]):
            expected = tiny(prompts.tokens, attention_mask=prompts.attention_mask)
    torch.testing.assert_close(got, expected)


def test_distributed_vector_refuses_another_model(tiny, other, generator):
    prompts = word_prompts(tiny, generator, n_shots=0)
    made = fvlens.distributed_vector(tiny, fvlens.mean_head_activations(tiny, prompts, progress=False), heads=[(0, 0)])
    made.check(tiny)
    with pytest.raises(ValueError, match=r"the distributed vector of '' was made on model .* not on this one"):
        with fvlens.inject(other, made):
            pytest.fail("the block was entered")
    with fvlens.inject(other, made, check=False):
        other(prompts.tokens, attention_mask=prompts.attention_mask)


def test_decode_puts_the_smaller_of_two_equal_tokens_first(tied):
    with torch.no_grad():
        weight = tied.unembed.W_U
        before = weight.clone()
        try:
            weight[:, [7, 100, 300]] = 1.0
            words = vector_of(tied, torch.ones(32)).decode(tied, 3, final_norm=False)
        finally:
            weight.copy_(before)
    assert [word for word, _ in words] == [tied.tokenizer.decode([i]) for i in (7, 100, 300)]


# --- templates ---

OWN = Template("mine", "{input} is to{output};\n", "{input} is to", prefix="Pairs {x}:\n")


def file_of_version_0_1(path, mark, template, bos="one"):
    """A vector file byte for byte as fvlens 0.1 wrote it: of a template the name alone."""
    header = {
        "layer": 1, "heads": [[0, 1]], "relation": "antonym", "kind": "function", "template": template,
        "data_hash": "abc", "seed": 7, "fingerprint": {**dataclasses.asdict(mark), "bos": bos},
    }  # fmt: skip
    numbers = struct.pack("<32f", *range(32))
    told = {
        "__metadata__": {"format": "fvlens-vector-1", "fvlens": json.dumps(header, sort_keys=True)},
        "vector": {"dtype": "F32", "shape": [32], "data_offsets": [0, len(numbers)]},
    }
    text = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


def test_a_file_of_version_0_1_is_read(tiny, tmp_path):
    mark = fingerprint(tiny)
    for name, expected in [("qa", TEMPLATES["qa"]), ("arrow", TEMPLATES["arrow"]), ("", None)]:
        loaded = FunctionVector.load(file_of_version_0_1(tmp_path / "old.safetensors", mark, name), model=tiny)
        assert loaded.template == expected
        assert loaded.vector.tolist() == list(range(32)) and loaded.heads == (Head(0, 1),) and loaded.seed == 7
    old = FunctionVector.load(file_of_version_0_1(tmp_path / "old.safetensors", mark, "arrow", "none"), model=tiny)
    assert old.template == TEMPLATES["arrow"].with_bos("none")  # its tokenizer had none
    path = file_of_version_0_1(tmp_path / "old.safetensors", mark, "mine")
    said = r"old.safetensors: no template named 'mine'; .* fvlens 0.1 wrote the name alone .* template=Template\(...\)"
    with pytest.raises(ValueError, match=said):
        FunctionVector.load(path)
    assert FunctionVector.load(path, template=OWN).template == OWN
    saved = FunctionVector.load(path, template=OWN).save(tmp_path / "new.safetensors")
    assert FunctionVector.load(saved).template == OWN


def test_a_vector_carries_the_whole_template(tiny, vector, tmp_path):
    own = dataclasses.replace(vector, template=OWN)
    path = own.save(tmp_path / "v.safetensors")
    assert header_of(path)["template"] == "mine"
    assert header_of(path)["template_text"] == {
        "name": "mine", "demonstration": "{input} is to{output};\n", "query": "{input} is to",
        "prefix": "Pairs {x}:\n", "bos": "one",
    }  # fmt: skip
    assert FunctionVector.load(path).template == OWN
    assert FunctionVector.load(path, template="colon").template == TEMPLATES["colon"]
    assert (own * 2).template == (own + own).template == own.at_layer(0).template == OWN
    assert (own + vector).template is None  # of two templates
    assert vector_of(tiny, torch.ones(32)).template is None
    with pytest.raises(ValueError, match="no template named 'mine'; expected one of qa, arrow, colon, chat, or a Temp"):
        vector_of(tiny, torch.ones(32), template="mine")


def test_a_distributed_vector_knows_its_template(tiny, generator):
    pairs = fvlens.load_relation("antonym")
    clean = fvlens.build_prompts(tiny, pairs, n_prompts=2, n_shots=1, template=OWN, generator=generator)
    means = fvlens.mean_head_activations(tiny, clean, progress=False)
    assert means.template == OWN
    assert fvlens.distributed_vector(tiny, means, heads=[(0, 1)]).template == OWN


# --- files of distributed vectors ---


@pytest.fixture
def apart(tiny, generator):
    """A distributed vector of two heads."""
    values = torch.zeros(3, tiny.cfg.n_heads, tiny.cfg.d_head)
    for head in (Head(0, 1), Head(2, 3)):
        values[head] = torch.randn(tiny.cfg.d_head, generator=generator)
    return DistributedVector(values, (Head(2, 3), Head(0, 1)), "antonym", fingerprint(tiny), "tuned", "arrow")


def test_a_distributed_vector_comes_back_from_its_file(tiny, other, apart, tmp_path):
    file = apart.save(tmp_path / "apart.safetensors")
    loaded = DistributedVector.load(file, model=tiny)
    assert torch.equal(loaded.values, apart.values)
    for name in ("heads", "relation", "fingerprint", "kind", "template"):
        assert getattr(loaded, name) == getattr(apart, name)
    assert str(DistributedVector.load(file, template="colon").template) == "colon"
    with pytest.raises(ValueError, match="the distributed vector of 'antonym' was made on model"):
        DistributedVector.load(file, model=other)
    with pytest.raises(ValueError, match="expected 'fvlens-vector-1'"):
        FunctionVector.load(file)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda t, h: t.pop("values"), "KeyError: 'values'"),
        (lambda t, h: h.pop("heads"), "KeyError: 'heads'"),
        (lambda t, h: h.update(heads=[[9, 0]]), "does not exist"),
        (lambda t, h: t.update(values=t["values"][:2]), "expected numbers [3 4 d_head], got [2, "),
        (lambda t, h: t["values"].fill_(float("nan")), "values holds NaN or infinite values"),
    ],
)
def test_damaged_distributed_vectors_are_refused(apart, tmp_path, damage, told, unchecked):
    file = apart.save(tmp_path / "apart.safetensors")
    tensors, header = files.read_tensors(file, vectors.DISTRIBUTED_FORMAT)
    damage(tensors, header)
    tensors.setdefault("other", torch.zeros(1))
    files.write_tensors(file, tensors, header, vectors.DISTRIBUTED_FORMAT)
    with pytest.raises(ValueError, match=f"apart.safetensors: damaged distributed vector \\(.*{re.escape(told)}"):
        DistributedVector.load(file)
