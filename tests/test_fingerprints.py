"""Fingerprints: what is hashed, when it is hashed again, and what they say."""

import copy as copying
import dataclasses
import gc
import json

import pytest
import torch
from conftest import BACKENDS, needs_hooked

import fvlens
from fvlens.models import (
    Fingerprint,
    _fingerprint,
    _looks,
    embedded_folder,
    fingerprint,
    load_model,
    refresh,
)
from fvlens.types import Head, is_bridge


@pytest.fixture(params=BACKENDS)
def copy(request):
    """A model of our own to change."""
    return load_model("rel-small", device="cpu", backend=request.param)


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2", "olmo"])
def test_both_backends_hold_the_same_model(folders, name, dtype, tmp_path):
    hooked, bridge = (load_model(folders(name), device="cpu", dtype=dtype, backend=backend) for backend in BACKENDS)
    assert fingerprint(hooked) == fingerprint(bridge)
    vector = fvlens.FunctionVector(torch.ones(32), 1, (Head(1, 0),), "any", fingerprint(hooked))
    file = vector.save(tmp_path / "v.safetensors")
    fvlens.FunctionVector.load(file, model=bridge).check(bridge)
    other = load_model(folders("qwen2"), device="cpu", dtype=dtype, backend="bridge")
    with pytest.raises(ValueError, match=r"was made on model .*weights: "):
        fvlens.FunctionVector.load(file, model=other)


def test_two_loads_have_one_fingerprint(model, copy):
    mine = fingerprint(model)
    assert mine == fingerprint(copy)
    assert mine.differences(fingerprint(copy)) == []
    shape = json.loads((embedded_folder() / "config.json").read_text())
    assert (mine.n_layers, mine.n_heads, mine.d_model) == (shape["n_layer"], shape["n_head"], shape["n_embd"])
    assert (mine.d_head, mine.d_vocab) == (shape["n_embd"] // shape["n_head"], shape["vocab_size"])
    assert (mine.name, mine.revision, mine.dtype) == ("rel-small", "local", "float32")
    assert mine.normalization == "LN"
    assert len(mine.weights) == 16
    assert int(mine.weights, 16) >= 0


def test_one_weight_changed_in_place_changes_the_fingerprint(model, copy):
    before = fingerprint(copy)
    with torch.no_grad():
        weight = list(copy.parameters())[-3].view(-1)
        original = weight[5].item()
        weight[5] = torch.nextafter(torch.tensor(original), torch.tensor(torch.inf))
    changed = fingerprint(copy)
    assert changed.differences(before) == [f"weights: {changed.weights} / {before.weights}"]
    with torch.no_grad():
        weight[5] = original
    assert fingerprint(copy) == before == fingerprint(model)


def test_a_copy_of_a_loaded_model_is_that_model_until_it_is_changed(copy):
    twin = copying.deepcopy(copy)
    assert fingerprint(twin) == fingerprint(copy)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert fingerprint(twin).weights != fingerprint(copy).weights


def test_a_model_of_ones_own_is_hashed_by_its_parameters(copy):
    weights = fingerprint(copy).weights
    del vars(copy)[_fingerprint.ORIGIN]
    refresh(copy)
    own = fingerprint(copy).weights
    assert own != weights
    with torch.no_grad():
        next(copy.parameters()).add_(1)
    assert fingerprint(copy).weights not in (own, weights)


def test_the_weights_hash_reads_names_shapes_and_every_number():
    tensors = {"b": torch.arange(6.0), "a": torch.zeros(2, 3)}
    plain = _fingerprint.weights_hash(tensors.items())
    assert plain == _fingerprint.weights_hash(reversed(tensors.items()))
    changed = tensors["b"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(torch.inf))
    variants = [
        {"b": tensors["b"], "c": tensors["a"]},
        {"b": tensors["a"], "a": tensors["b"]},
        {"b": tensors["b"], "a": torch.zeros(3, 2)},
        {"b": changed, "a": tensors["a"]},
        {"b": tensors["b"].double(), "a": tensors["a"]},
        {"b": tensors["b"].flip(0), "a": tensors["a"]},
        {"b": tensors["b"]},
    ]
    hashes = [_fingerprint.weights_hash(variant.items()) for variant in variants]
    assert len({plain, *hashes}) == len(variants) + 1


def test_a_training_step_changes_the_fingerprint(copy):
    before = fingerprint(copy)
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy(torch.tensor([[0, 1, 2]]), return_type="loss").backward()
    optimizer.step()
    assert fingerprint(copy).weights != before.weights


def test_weights_are_hashed_once_until_they_change(copy, monkeypatch):
    calls = []
    original = _fingerprint.weights_marks

    def counted(parameters, d_vocab):
        calls.append(1)
        return original(parameters, d_vocab)

    monkeypatch.setattr(_fingerprint, "weights_marks", counted)
    first = fingerprint(copy)
    with torch.inference_mode():
        copy(torch.tensor([[0, 1, 2]]))
    assert fingerprint(copy) is first
    assert len(calls) == 0  # loading hashed them
    with torch.no_grad():
        next(copy.parameters()).mul_(1.0)
    assert fingerprint(copy) == first  # hashed again, the same weights
    assert len(calls) == 1
    copy.to(torch.float64)
    assert fingerprint(copy).weights != first.weights
    assert len(calls) == 2


def test_remembered_fingerprints_do_not_keep_models_alive(monkeypatch):
    held = len(_looks._kept)
    temporary = load_model("rel-small", device="cpu")
    assert len(_looks._kept) == held + 1
    del temporary
    gc.collect()
    assert len(_looks._kept) <= held


def test_folding_the_norms_shows(copy, model):
    if is_bridge(copy):
        copy.process_weights(fold_ln=True, center_writing_weights=False, center_unembed=False)
    else:
        copy.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    different = {line.split(":")[0] for line in fingerprint(copy).differences(fingerprint(model))}
    assert {"weights", "normalization"} <= different


@needs_hooked
def test_another_model_differs_in_weights_and_shape(model, tiny):
    found = fingerprint(model).differences(fingerprint(tiny))
    assert any(line.startswith("weights: ") for line in found)
    assert f"n_layers: {model.cfg.n_layers} / 3" in found
    assert f"d_model: {model.cfg.d_model} / 32" in found


def test_name_and_revision_are_told_but_not_compared(model):
    mine = fingerprint(model)
    renamed = dataclasses.replace(mine, name="other", revision="abc")
    assert mine.differences(renamed) == []
    assert mine != renamed
    other = dataclasses.replace(mine, normalization="RMS", d_head=7)
    assert mine.differences(other) == [f"d_head: {mine.d_head} / 7", "normalization: LN / RMS"]


def test_a_fingerprint_survives_json(model):
    mine = fingerprint(model)
    assert Fingerprint.from_json(mine.to_json()) == mine
    assert json.loads(mine.to_json()) == dataclasses.asdict(mine)


def test_what_earlier_files_said_of_bos_makes_no_other_model(model):
    mine = fingerprint(model)
    for policy in ("one", "none"):
        assert Fingerprint.from_fields({**dataclasses.asdict(mine), "bos": policy}) == mine
    with pytest.raises(ValueError, match="fingerprint: bos='two'; expected one or none"):
        Fingerprint.from_fields({**dataclasses.asdict(mine), "bos": "two"})


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "null", "not json", ""])
def test_from_json_refuses_anything_else(model, text):
    with pytest.raises(ValueError, match=r"fingerprint: expected the fields backend, d_head, .* got"):
        Fingerprint.from_json(text)
    fields = json.loads(fingerprint(model).to_json())
    for wrong in ({**fields, "colour": "red"}, {key: fields[key] for key in fields if key != "weights"}):
        with pytest.raises(ValueError, match="fingerprint: expected the fields"):
            Fingerprint.from_json(json.dumps(wrong))


def test_a_fingerprint_says_how_its_model_was_loaded(model, tiny):
    mark = fingerprint(model)
    assert (mark.source, mark.backend) == ("rel-small", "bridge" if is_bridge(model) else "hooked")
    assert (fingerprint(tiny).source, fingerprint(tiny).backend) == ("", "")  # not from load_model
    moved = dataclasses.replace(mark, source="elsewhere", backend="")
    assert moved == mark and moved.differences(mark) == []
    assert Fingerprint.from_json(moved.to_json()).source == "elsewhere"
    old = json.loads(mark.to_json())
    del old["source"], old["backend"]  # as fvlens 0.1 wrote it
    assert Fingerprint.from_json(json.dumps(old)) == mark
