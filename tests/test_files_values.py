"""Values that change in a file: the file is refused, or what is read is what stands there, never something near it."""

import copy
import json
import math

import pytest
import torch
from architectures import word_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fvlens
from fvlens import FunctionVector, VectorSet
from fvlens.activations import ActivationCache, activation_cache
from fvlens.activations import _file as cache_file
from fvlens.composition import SIGNALS, CompositeMap, FitHistory, Gate
from fvlens.composition._map import MAP_FORMAT
from fvlens.files import read_tensors, write_tensors
from fvlens.models import fingerprint
from fvlens.prompts import TEMPLATES
from fvlens.training._set import SET_FORMAT
from fvlens.types import Head
from fvlens.universal import UniversalHeads
from fvlens.vectors import FORMAT

OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**400, 1e308, 0.0, 1.0, 2.0, -1.5, math.nan, math.inf, -math.inf]),
    st.sampled_from(["", "2", "1.0", "true", "qa", "NaN", "nosuch", "é"]),
    st.sampled_from([[], [1], [[1, 2]], {}, {"a": 1}, ["a", "b"], "ab"]),
)


def vector(mark, seed=0, relation="antonym"):
    values = torch.randn(mark.d_model, generator=torch.Generator().manual_seed(seed))
    heads = (Head(0, 1), Head(2, 3))
    return FunctionVector(values, 1, heads, relation, mark, template="qa", data_hash="abc", seed=7)


def composite(mark):
    basis = VectorSet((vector(mark), vector(mark, 1, "plural")), ("meaning", "morphology"))
    made = CompositeMap.plain(basis, pairs=[("hot", "cold")])
    gate = Gate("logistic", tuple(i / 4 for i in range(len(SIGNALS))), -0.5, "one_shot")
    history = FitHistory((2.5, 1.5), (math.nan, math.nan), (0.25, 0.5))
    return CompositeMap(
        basis, "transfer", made.matrix, made.shift, gates=(gate,), seen=made.seen, history=history,
        transfer=torch.tensor([[0.5, -1.0], [0.0, 2.0]]),
    )  # fmt: skip


def places(value, path=()):
    """Where something stands in nested lists and objects, inner and outer."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value, path, new):
    """A copy with something else in one place."""
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return result


def told(header):
    """A header as text: 1, 1.0 and true are three things, but where any number will do; what is a set has no order."""

    def plain(value, real=False):
        if isinstance(value, dict):
            rest = {key: one for key, one in value.items() if key != "seen"}
            sets = {"seen": {key: sorted(one) for key, one in value["seen"].items()}} if "seen" in value else {}
            return sets | {key: plain(one, key in ("strength", "slopes", "offset")) for key, one in rest.items()}
        if isinstance(value, list):
            return [plain(one, real) for one in value]
        return float(value) if real and type(value) is int else value

    return json.dumps(plain(header), sort_keys=True)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """One file of each kind: how it is loaded, its format, its tensors and its header."""
    folder = tmp_path_factory.mktemp("saved")
    mark = fingerprint(tiny)
    generator = torch.Generator().manual_seed(0)
    cache = activation_cache(
        tiny, word_prompts(tiny, generator, n_shots=1, n_prompts=3), sites="z", layers=[0, 2], positions=[-2, -1],
        progress=False,
    )  # fmt: skip
    made = {
        "vector": (vector(mark), FunctionVector, FORMAT),
        "set": (composite(mark).basis, VectorSet, SET_FORMAT),
        "composite": (composite(mark), CompositeMap, MAP_FORMAT),
        "cache": (cache, ActivationCache, cache_file.FORMAT),
    }
    return {
        name: (kind, form, *read_tensors(one.save(folder / name), form)) for name, (one, kind, form) in made.items()
    }


def same_as_told(kind, form, path, header, again):
    """Whether what was loaded says what the file says; a template may be told by its name alone."""
    loaded = kind.load(path)
    _, found = read_tensors(loaded.save(again), form)
    if told(found) == told(header):
        return True
    text = json.loads(told(header))
    for some in (text, *text.get("vectors", [])):
        if "template_text" in some and some["template_text"] is None and some["template"] in TEMPLATES:
            some["template_text"] = TEMPLATES[some["template"]].to_json()
    return told(found) == told(text)


@pytest.mark.parametrize("name", ["vector", "set", "composite", "cache"])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_value_that_changes_is_refused_or_read_as_it_stands(saved, tmp_path, unchecked, name, data):
    kind, form, tensors, header = saved[name]
    place = data.draw(st.sampled_from(sorted(places(header), key=repr)))
    header = changed(header, place, data.draw(OTHER))
    path = write_tensors(tmp_path / "x", tensors, header, form)
    try:
        kind.load(path)
    except (ValueError, UserWarning) as error:  # a warning is an error here: of an interrupted training
        assert str(error)  # noqa: PT017
        return
    assert same_as_told(kind, form, path, header, tmp_path / "again"), place


@pytest.mark.parametrize("name", ["vector", "set", "composite"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_in_every_tensor(saved, tmp_path, unchecked, name, value):
    kind, form, tensors, header = saved[name]
    for which in tensors:
        for wrong in (tensors[which].clone().index_put_((torch.tensor(0),), torch.tensor(value)), tensors[which].int()):
            path = write_tensors(tmp_path / "x", {**tensors, which: wrong}, header, form)
            with pytest.raises(ValueError, match=r"holds NaN or infinite values|expected numbers"):
                kind.load(path)
        path = write_tensors(tmp_path / "x", {**tensors, which: tensors[which][:1]}, header, form)
        with pytest.raises(ValueError, match=r"^x: "):
            kind.load(path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_value_that_changes_in_a_set_of_heads_is_refused_or_read_as_it_stands(tiny, tmp_path, unchecked, data):
    mark = fingerprint(tiny)
    aie = torch.randn(2, mark.n_layers, mark.n_heads, generator=torch.Generator().manual_seed(0))
    made = UniversalHeads(
        n=2, relations=("a", "b"), data_hashes=("x", "y"), aie=aie, prompt_stderr=aie.abs(),
        icl_top1=torch.tensor([0.5, 0.75]), icl_interval=torch.tensor([[0.25, 0.75], [0.5, 1.0]]),
        majority=torch.tensor([0.25, 0.25]), labels="permuted", n_shots=4, n_prompts=6, n_corrupted=3, template="qa",
        path="kv", complete=True, fingerprint=mark,
    )  # fmt: skip
    content = json.loads(made.save(tmp_path / "heads.json").read_text())
    place = data.draw(st.sampled_from(sorted(places(content), key=repr)))
    content = changed(content, place, data.draw(OTHER))
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(content))
    try:
        loaded = UniversalHeads.load(path)
    except (ValueError, UserWarning):  # a warning is an error here: a part of the relations
        return
    found = json.loads(loaded.save(tmp_path / "again.json").read_text())
    if content["template_text"] is None:
        content["template_text"] = TEMPLATES[content["template"]].to_json()

    def plain(value):
        """Numbers of tensors are kept in float32, where 1 and 1.0 are one."""
        if isinstance(value, dict):
            return {key: plain(one) if key in TENSORS else one for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else float(value)

    TENSORS = ("aie", "prompt_stderr", "icl_top1", "icl_interval", "majority")
    assert told(plain(found)) == told(plain(content)), place


def test_values_given_are_checked_like_values_read(tiny, unchecked):
    """A composite with NaN used to answer."""
    mark = fingerprint(tiny)
    made = composite(mark)
    for name in ("matrix", "shift", "transfer"):
        with pytest.raises(ValueError, match=f"CompositeMap: {name} holds NaN or infinite values"):
            replaced(made, **{name: getattr(made, name) * math.nan})
    with pytest.raises(ValueError, match="CompositeMap: strength: expected a finite number, got nan"):
        replaced(made, strength=math.nan)
    with pytest.raises(ValueError, match="CompositeMap: strength: expected a finite number, got 1000"):
        replaced(made, strength=10**400)
    gate = made.gates[0]
    with pytest.raises(ValueError, match="Gate: slope of entropy: expected a finite number, got nan"):
        replaced(gate, slopes=(math.nan, *gate.slopes[1:]))
    with pytest.raises(ValueError, match="Gate: offset: expected a finite number, got '1'"):
        replaced(gate, offset="1")
    with pytest.raises(ValueError, match="Gate: setting='x'; expected one of zero_shot, one_shot"):
        replaced(gate, setting="x")
    with pytest.raises(ValueError, match=r"FitHistory: train_loss: expected a tuple of floats, got \('1',\)"):
        FitHistory(("1",), (1.0,), (1.0,))
    with pytest.raises(ValueError, match="of one length, got 1 values of train_loss and 2 of valid_loss"):
        FitHistory((1.0,), (1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="VectorSet: category: expected a text, got 3"):
        VectorSet(made.basis.vectors, ("a", 3))
    with pytest.raises(ValueError, match=r"FunctionVector: the vector: expected numbers of a floating precision, got"):
        replaced(made.basis[0], vector=torch.ones(mark.d_model, dtype=torch.int64))
    with pytest.raises(ValueError, match="FunctionVector: the vector holds NaN or infinite"):  # in float32
        replaced(made.basis[0], vector=torch.full((mark.d_model,), 1e300, dtype=torch.float64))
    for change, message in (
        (dict(weights="00"), "fingerprint: weights: expected 16 hex digits, got '00'"),
        (dict(dtype="float"), None),
        (dict(dtype="nosuch"), "fingerprint: dtype: expected the name of a precision of torch, got 'nosuch'"),
        (dict(n_heads=0), r"fingerprint: n_heads: expected 1\.\.2147483647, got 0"),
        (dict(n_layers=10**30), r"fingerprint: n_layers: expected 1\.\.2147483647, got 10{30}"),
        (dict(d_model=32.0), r"fingerprint: d_model: expected a whole number, got 32\.0"),
        (dict(name=None), "fingerprint: name: expected a text, got None"),
        (dict(source=None), "fingerprint: source: expected a text, got None"),
        (dict(backend=1), "fingerprint: backend: expected a text, got 1"),
    ):
        if message is not None:
            with pytest.raises(ValueError, match=message):
                replaced(mark, **change)


def test_distributed_vectors_are_checked(tiny, unchecked):
    mark = fingerprint(tiny)
    values = torch.zeros(mark.n_layers, mark.n_heads, mark.d_head)
    make = fvlens.vectors.DistributedVector
    assert torch.equal(make(values, (Head(0, 1),), "a", mark).values, values)
    for wrong, heads, relation, message in (
        (values[:1], (), "a", "DistributedVector: expected values of shape"),
        (values * math.nan, (), "a", "DistributedVector: values holds NaN or infinite values"),
        (values, ((0, 99),), "a", "heads: L0H99 does not exist"),
        (values, (), None, "DistributedVector: relation: expected a text, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            make(wrong, heads, relation, mark)


def test_words_are_texts(unchecked):
    for pairs in (("ab",), ((1, "b"),), (("a", "b", "c"),), ("a",)):
        with pytest.raises(ValueError, match="relation 'r': expected a pair of two words, got"):
            fvlens.Relation("r", pairs)
    with pytest.raises(ValueError, match="relation 3: name: expected a text, got 3"):
        fvlens.Relation(3, (("a", "b"),))
    with pytest.raises(ValueError, match="analogy: d: expected a text, got 4"):
        fvlens.Analogy("a", "b", "c", 4)
    with pytest.raises(ValueError, match="analogy: alternatives: expected a list, got 'x'"):
        fvlens.Analogy("a", "b", "c", "d", alternatives="x")


def replaced(one, **changes):
    import dataclasses

    return dataclasses.replace(one, **changes)
