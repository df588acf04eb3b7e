"""Results of long work in files: what is loaded is what was saved, and what is damaged or foreign is refused."""

import dataclasses
import importlib.metadata
import json
import math

import pytest
import torch
from every_result import results, tiny_model

import fvlens
from fvlens.files import read_tensors, write_tensors
from fvlens.results import Result
from fvlens.training import Comparison, TrainingState

NAMES = (
    "HeadMeans", "IndirectEffects", "IndirectEffects, rechecked", "DirectEffects", "AttentionPatterns",
    "AttentionPatterns, full", "LogitLens", "Evaluation", "Evaluation, bare", "GeneratedAnswers", "LayerSweep",
    "HeadCountSweep", "LayerScaleSweep", "Controls", "Found", "FineTuned", "FineTunedSet", "Baseline",
    "Baseline, LoRA", "Baseline, untrained", "Scores", "AnalogyEvaluation", "BasisStudy", "Comparison", "Collateral",
)  # fmt: skip


def classes(cls=Result):
    return {one for direct in cls.__subclasses__() for one in (direct, *classes(direct))}


def equal(one, other):
    """Whether two values are the same to the bit, of the same classes all the way down."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bool(((one == other) | ((one != one) & (other != other))).all())
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, TrainingState):  # its header is plain JSON, in which a tuple is a list
        return equal(one.tensors, other.tensors) and json.loads(json.dumps(one.header)) == other.header
    if dataclasses.is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one) if f.init)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def saved(name, folder):
    """The file that a result was saved to."""
    result = results()[name]
    if isinstance(result, Comparison):
        return result.save(folder)[-1]
    return result.save(folder / "result.safetensors")


def test_every_class_of_results_is_here():
    assert {type(one).__name__ for one in results().values()} == {one.__name__ for one in classes() if one.FORMAT}
    assert tuple(sorted(results())) == tuple(sorted(NAMES))
    formats = [one.FORMAT for one in classes() if one.FORMAT]
    assert len({*formats}) == len({one.__name__ for one in classes() if one.FORMAT})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_what_was_saved(tmp_path, name):
    result = results()[name]
    path = saved(name, tmp_path)
    loaded = type(result).load(path)
    assert equal(loaded, result)
    first = path.read_bytes()
    again = loaded._write(tmp_path / "again.safetensors")
    assert again.read_bytes() == first
    header = read_tensors(path, result.FORMAT)[1]
    assert header["complete"] is True
    assert header["versions"]["fvlens"] == importlib.metadata.version("fvlens")
    mark = result._made_on()
    assert header["fingerprint"] == (None if mark is None else dataclasses.asdict(mark))


def test_a_result_of_another_model_is_refused(tmp_path, model):
    means = results()["HeadMeans"]
    path = means.save(tmp_path / "means.safetensors")
    assert equal(fvlens.activations.HeadMeans.load(path, model=tiny_model()), means)
    with pytest.raises(ValueError, match=r"the HeadMeans in means.safetensors was made on model .* not on this one"):
        fvlens.activations.HeadMeans.load(path, model=model)
    bare = results()["Evaluation, bare"]
    path = bare.save(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="the Evaluation does not say which model it was made on; load it without"):
        type(bare).load(path, model=model)


def test_a_part_is_said_to_be_one(tmp_path):
    part = dataclasses.replace(results()["IndirectEffects"], complete=False)
    path = part.save(tmp_path / "part.safetensors")
    with pytest.warns(UserWarning, match=r"part.safetensors: a part of the whole, since the work was interrupted"):
        loaded = type(part).load(path)
    assert loaded.complete is False


def test_what_is_shared_is_written_once(tmp_path):
    one, many = results()["Evaluation"], results()["LayerScaleSweep"]
    sizes = [result.save(tmp_path / "x.safetensors").stat().st_size for result in (one, many)]
    n = len(many.layers) * len(many.scales) + 1
    assert sizes[1] < 0.75 * n * sizes[0]
    header = json.dumps(read_tensors(tmp_path / "x.safetensors", many.FORMAT)[1])
    assert header.count("extraordinarily") == 1


def change(path, result, edit):
    """Write a result's file again, its header or its tensors edited; checksums fit what is written."""
    tensors, header = read_tensors(path, result.FORMAT)
    edit(header, tensors)
    write_tensors(path, tensors, header, result.FORMAT)


def _value(header):
    return header["parts"][header["value"]["part"]]


EDITS = [
    ("HeadMeans", lambda h, t: t.update(z=t["z"][:, :2]), r"HeadMeans: expected z of shape \(3, 4, 8\)"),
    ("HeadMeans", lambda h, t: t.update(z=t["z"].long()), r"z: expected Float\[Tensor, 'layer head d_head'\], got"),
    ("HeadMeans", lambda h, t: t.pop("z"), "KeyError: 'z'"),
    ("HeadMeans", lambda h, t: t.update(more=t["z"]), r"there is more in it than the result: \['more'\]"),
    ("HeadMeans", lambda h, t: _value(h).update(n_prompts=True), "n_prompts: expected a whole number, got True"),
    ("HeadMeans", lambda h, t: _value(h).update(n_prompts=0), "n_prompts: expected at least 1, got 0"),
    ("HeadMeans", lambda h, t: _value(h).update(positions="nowhere"), "positions='nowhere'; expected one of last"),
    ("HeadMeans", lambda h, t: _value(h).pop("labels"), "expected the fields z, positions"),
    ("HeadMeans", lambda h, t: _value(h).update(other=1), "expected the fields z, positions"),
    ("HeadMeans", lambda h, t: _value(h).update({"class": "Evaluation"}), "expected a HeadMeans, got a 'Evaluation'"),
    ("HeadMeans", lambda h, t: h.update(complete=1), "complete: expected true or false, got 1"),
    ("HeadMeans", lambda h, t: h.update(complete=False), "complete and fingerprint are not those of the result"),
    ("HeadMeans", lambda h, t: h.update(fingerprint=None), "complete and fingerprint are not those of the result"),
    ("HeadMeans", lambda h, t: h["value"].update(part=99), r"part: expected 0\.\.\d+, got 99"),
    ("HeadMeans", lambda h, t: _value(h).update(template={"part": h["value"]["part"]}), r"part: expected 0\.\."),
    ("IndirectEffects", lambda h, t: t.update(baseline=t["baseline"][:2]), "baseline: expected .* beside the others"),
    ("IndirectEffects", lambda h, t: t.update(cie=t["cie"][:, :, :3]), "expected cie of 3 layers x 4 heads"),
    ("IndirectEffects", lambda h, t: _value(h).update(method="magic"), "method='magic'; expected one of exact"),
    ("IndirectEffects", lambda h, t: _value(h).update(path="teleport"), "path='teleport'; expected one of"),
    ("Evaluation", lambda h, t: t.update(ranks=t["ranks"] - 10**6), "ranks: expected numbers of at least 0"),
    ("Evaluation", lambda h, t: t.update(probabilities=t["probabilities"] + 2), "probabilities: expected shares"),
    ("Evaluation", lambda h, t: _value(h).update(predictions=["a"]), "predictions: expected 8 entries, got 1"),
    ("LayerSweep", lambda h, t: _value(h).update(layers=[0, 1]), "expected 2 evaluations, at least one; got 3"),
    ("LayerScaleSweep", lambda h, t: _value(h).update(scales=[1.0]), "expected 3 x 1 evaluations"),
    ("FineTuned", lambda h, t: _value(h).update(best_epoch=9), "best_epoch: expected 0..1, got 9"),
    ("AnalogyEvaluation", lambda h, t: _value(h)["scored"].append(_value(h)["scored"][0]), "scored: a key comes twice"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), EDITS)
def test_a_damaged_file_is_refused(tmp_path, unchecked, name, edit, message):
    result = results()[name]
    path = saved(name, tmp_path)
    change(path, result, edit)
    with pytest.raises(ValueError, match=rf"result.safetensors: damaged file of {type(result).__name__} \(.*{message}"):
        type(result).load(path)


def test_foreign_and_changed_files_are_refused(tmp_path):
    means, effects = results()["HeadMeans"], results()["IndirectEffects"]
    path = effects.save(tmp_path / "effects.safetensors")
    with pytest.raises(ValueError, match=r"not written by fvlens \(format 'fvlens-effects-1', expected"):
        type(means).load(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="changed after the file was saved"):
        type(effects).load(path)
    with pytest.raises(ValueError, match="no file of IndirectEffects at"):
        type(effects).load(tmp_path / "none.safetensors")


class _Own:
    def additions(self):
        return {}

    def check(self, model):
        pass


def test_a_change_of_ones_own_is_not_written(tmp_path):
    from fvlens.training._adaptations import Steered

    own = dataclasses.replace(results()["Baseline, untrained"], change=Steered(_Own()))
    with pytest.raises(ValueError, match=r"change\.steering is a _Own, which files of fvlens cannot hold"):
        own.save(tmp_path / "own.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_is_found_by_its_folder(tmp_path):
    result = results()["Comparison"]
    names = [path.name for path in result.save(tmp_path / "new")]
    assert names == ["compare.md", "compare.csv", "compare.safetensors"]
    assert equal(Comparison.load(tmp_path / "new"), result)
