"""The same run again, from its files: what is compared, and what is refused."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from runs import FILES, Page, file_hash, page_of

import fvlens
from fvlens import FunctionVector, report
from fvlens.report import (
    Loading,
    RunDifference,
    RunOptions,
    read_run,
    rerun,
    results_json,
    run_relation,
    write_run,
)

LOADED = Loading("rel-small", device="cpu")
QUICK = RunOptions(n_shots=4, n_prompts=6, n_corrupted=3, n_heads=4, n_random=2, n_others=1)


@pytest.fixture(scope="session")
def first(model):
    """A run that says how its model was loaded."""
    relation = fvlens.load_relation("plural")
    return run_relation(
        model, relation, options=QUICK, loading=LOADED, command=["fvlens", "run", "plural"], progress=False
    )


@pytest.fixture(scope="session")
def written(first, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_run(first, folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """The run's files, ours to change."""
    return Path(shutil.copytree(written, tmp_path / "first", ignore=shutil.ignore_patterns("*.html")))


@pytest.fixture
def remembered(first, monkeypatch):
    """The second run comes out like the first, without the work, and without its page."""
    monkeypatch.setattr(report._rerun, "run_relation", lambda *args, **options: first)
    monkeypatch.setattr(report._files, "write_report", lambda path, result: path)


def edit(folder, **changes):
    """Change fields of results.json; a dot goes into an object, None as a function removes."""
    path = folder / "results.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[int(key) if isinstance(place, list) else key]
        last = int(last) if isinstance(place, list) else last
        if value is edit:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def test_a_run_repeated_from_its_files_is_the_same(first, folder):
    """The model too is loaded again."""
    done = rerun(folder, progress=False)
    assert done.differences == ()
    assert done.agrees
    assert done.largest == 0
    assert len(done.to_dataframe()) == 0
    assert done.out == folder.parent / "first-rerun"
    old, new = (json.loads((place / "results.json").read_text()) for place in (folder, done.out))
    timeless = {"seconds": 0, "ffv_seconds": 0}
    assert {**old, **timeless, "command": None} == {**new, **timeless}
    assert old["command"] == ["fvlens", "run", "plural"]
    assert old["loading"] == {
        "model": "rel-small", "device": "cpu", "dtype": None, "revision": None, "backend": None, "base": None
    }  # fmt: skip
    for name in ("vector.safetensors", "vector-finetuned.safetensors"):
        vectors = [FunctionVector.load(place / name) for place in (folder, done.out)]
        assert torch.equal(vectors[0].vector, vectors[1].vector)
    assert {file.name for file in done.files} == set(FILES)
    inputs = {"schema", "seed", "fingerprint", "options", "loading", "versions", "platform", "seconds", "ffv_seconds"}
    inputs |= {"loaded"}
    results = {key: value for key, value in old.items() if key not in inputs}
    found = re.findall(r"(?<=[\[ ])-?\d+(?:\.\d+)?(?:e-?\d+)?(?=[,\]}])", json.dumps(results))
    assert done.n_numbers == len(found) + 2 * first.fingerprint.d_model


def test_numbers_are_put_together_once_a_run(first, folder, model, remembered, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(report._files, "results_json", lambda result: made.append(result) or results_json(result))
    write_run(first, tmp_path / "other")
    assert made == [first]
    rerun(folder, model=model)
    assert made == [first, first]
    assert not hasattr(report._page, "results_json") and not hasattr(report._rerun, "results_json")


def test_the_second_run_uses_the_settings_of_the_first(tiny, tmp_path):
    """Every option differs from its default, and the model is the one that is given."""
    options = RunOptions(
        seed=3, n_shots=2, n_prompts=5, n_corrupted=2, n_heads=2, labels="random", both_labels=True, layer=1,
        scale=1.5, template="arrow", n_random=1, n_others=1, n_train=4, epochs=2,
    )  # fmt: skip
    write_run(run_relation(tiny, fvlens.load_relation("plural"), options=options, progress=False), tmp_path / "a")
    done = rerun(tmp_path / "a", out=tmp_path / "b", model=tiny, command=["again"], progress=False)
    assert done.differences == ()
    assert done.result.options == options
    assert done.result.command == ("again",)
    assert json.loads((tmp_path / "b" / "results.json").read_text())["model"] == "custom"


def test_a_changed_number_is_reported_and_nothing_else(first, folder, model, remembered):
    edit(folder, fv_top1=first.steered["permuted"].top1 - 0.25)
    done = rerun(folder, model=model)
    now = first.steered["permuted"].top1
    assert done.differences == (RunDifference("number", "fv_top1", now - 0.25, now, pytest.approx(0.25)),)
    assert not done.agrees
    assert done.largest == pytest.approx(0.25)
    assert rerun(folder, model=model, tolerance=0.26).agrees
    (row,) = done.to_dataframe().to_dict("records")
    assert (row["kind"], row["name"], row["size"]) == ("number", "fv_top1", pytest.approx(0.25))


def test_differences_are_relative_above_one(folder, first, model, remembered):
    logit = first.decoded[0][1]
    assert logit > 2
    edit(folder, decoded__0__1=logit * 1.25)
    (found,) = rerun(folder, model=model).differences
    assert found.name == "decoded[0][1]"
    assert found.size == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"decoded__0__0": "other"}, "decoded[0][0]"),
        ({"icl_top1": edit}, "icl_top1"),
        ({"icl_top1": None}, "icl_top1"),
        ({"more": 3}, "more"),
        ({"heads__3": edit}, "heads[3][0]"),
        ({"other_relations__0": "nosuch"}, "other_relations[0]"),
    ],
)
def test_results_that_are_no_numbers_must_be_the_same(folder, model, remembered, changes, name):
    edit(folder, **changes)
    done = rerun(folder, model=model)
    found = {one.name: one for one in done.differences}
    assert found[name].kind == "result"
    assert found[name].size is None
    assert not done.agrees


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        ({"fingerprint__weights": "0" * 16}, "model", "fingerprint.weights"),
        ({"fingerprint__revision": "abc"}, "model", "fingerprint.revision"),
        ({"data_hash": "0" * 16}, "data", "data_hash"),
        ({"data__relations__plural": "0" * 16}, "data", "data.relations.plural"),
        ({"data__relations__gone": "0" * 16}, "data", "data.relations.gone"),
        ({"data__library": "0" * 16}, "data", "data.library"),
        ({"versions__torch": "0.1"}, "version", "versions.torch"),
        ({"versions__torch": edit}, "version", "versions.torch"),
        ({"code_hash": "0" * 16}, "version", "code_hash"),
        ({"platform__threads": 77}, "platform", "platform.threads"),
        ({"path": "naive"}, "setting", "path"),
        ({"ffv_path": "naive"}, "setting", "ffv_path"),
    ],
)
def test_what_the_numbers_depend_on_is_reported_but_no_failure(folder, model, remembered, changes, kind, name):
    edit(folder, **changes)
    said = []
    done = rerun(folder, model=model, announce=said.extend)
    (found,) = done.differences
    assert (found.kind, found.name, found.size) == (kind, name, None)
    (old,) = changes.values()
    assert found.old == ("(absent)" if old is edit else old)
    assert found.new != found.old
    assert (found.new == "(absent)") == (name == "data.relations.gone")
    assert done.agrees
    assert said == ([] if kind == "setting" else [found])


def test_a_changed_relation_changes_the_numbers_too(folder, model, monkeypatch):
    relation = fvlens.load_relation("plural")
    shorter = dataclasses.replace(relation, pairs=relation.pairs[:50])
    load = fvlens.load_relation
    for module, function in ((report._recorded, "library_relation"), (report._provenance, "load_relation")):
        monkeypatch.setattr(module, function, lambda name: shorter if name == "plural" else load(name))
    done = rerun(folder, model=model, progress=False)
    kinds = defaultdict(set)
    for one in done.differences:
        kinds[one.kind].add(one.name)
    assert kinds["data"] == {"data_hash", "data.relations.plural", "data.library"}
    assert "n_test" in kinds["number"]
    assert not done.agrees


@pytest.mark.parametrize("name", ["vector.safetensors", "vector-finetuned.safetensors"])
def test_the_vectors_are_compared_number_by_number(folder, first, model, remembered, name):
    path = folder / name
    vector = first.vector if name == "vector.safetensors" else first.tuned.vector
    changed = vector.vector.clone()
    changed[5] += 0.5
    dataclasses.replace(vector, vector=changed).save(path)
    done = rerun(folder, model=model)
    (found,) = done.differences
    assert (found.kind, found.name) == ("number", f"{name}: norm")
    a, b = changed[5].item(), vector.vector[5].item()
    assert found.size == pytest.approx(0.5 / max(1, abs(a), abs(b)))
    assert (found.old, found.new) == pytest.approx((changed.norm().item(), vector.norm()))
    assert not done.agrees
    path.unlink()
    done = rerun(folder, model=model)
    assert done.differences == (RunDifference("data", name, "(absent)", "written"),)
    assert done.agrees
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=re.escape(f"{name}: not a safetensors file")):
        rerun(folder, model=model)


def test_a_vector_of_another_width_is_not_the_same(folder, tiny, tiny_result, model, remembered):
    tiny_result.vector.save(folder / "vector.safetensors")
    (found,) = rerun(folder, model=model).differences
    assert found == RunDifference("result", "vector.safetensors: length", 32, 128)


def test_given_heads_come_from_the_results_when_their_file_has_changed_or_gone(tiny, given, heads_file, tmp_path):
    given = dataclasses.replace(given, given=dataclasses.replace(given.given, path=str(heads_file)))
    write_run(given, tmp_path / "first")
    again = lambda: rerun(tmp_path / "first", model=tiny, trust=True, progress=False)  # noqa: E731
    assert again().differences == ()
    old = results_json(given)["data"]["heads_file"]
    unseen = "(outside the run's folder: not looked at without trust)"
    found = read_run(tmp_path / "first").changes(tiny)
    assert found == [RunDifference("data", "data.heads_file", old, unseen)]
    heads_file.write_text("[[0, 0]]")
    done = again()
    new = hashlib.sha256(b"[[0, 0]]").hexdigest()[:16]
    assert done.differences == (RunDifference("data", "data.heads_file", old, new),)
    assert torch.equal(done.result.vector.vector, given.vector.vector)
    heads_file.unlink()
    done = again()
    assert done.differences == (RunDifference("data", "data.heads_file", old, "(absent)"),)
    assert done.result.vector.heads == given.vector.heads


@pytest.mark.parametrize("change", [{"model": "owner/name"}, {"base": "owner/name"}, {"model": "../model"}])
def test_a_file_does_not_choose_the_model(folder, monkeypatch, change):
    """What it names is asked for with trust, or said anew; the embedded model needs neither."""
    asked = []

    def load(name, **options):
        asked.append((name, options))
        raise ValueError("loaded")

    monkeypatch.setattr(report._settings, "load_model", load)
    with pytest.raises(ValueError, match="loaded"):
        rerun(folder)
    assert asked.pop() == ("rel-small", {"device": "cpu"})
    edit(folder, **{f"loading__{name}": value for name, value in change.items()})
    (named,) = change.values()
    with pytest.raises(ValueError, match=rf"names the model .*{re.escape(repr(named))}, and a file does not choose"):
        rerun(folder)
    assert asked == []
    with pytest.raises(ValueError, match="loaded"):
        rerun(folder, trust=True)
    assert asked.pop() == ("rel-small" if "base" in change else named, {
        "device": "cpu", "trust": True, **{name: value for name, value in change.items() if name == "base"}
    })  # fmt: skip
    with pytest.raises(ValueError, match="loaded"):
        rerun(folder, loading=Loading("other"))
    assert asked == [("other", {})]


def test_runs_of_earlier_versions_name_no_base(folder, first, model, remembered):
    edit(folder, loading__base=edit, fingerprint__quantization=edit, loaded=edit)
    assert rerun(folder, model=model).differences == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": edit}, "schema: expected 4, got None; the file is of another version of fvlens"),
        ({"schema": 99}, "schema: expected 4, got 99; the file is of another version of fvlens"),
        ({"schema": "3"}, "schema: expected 4, got '3'; the file is of another version of fvlens"),
        ({"schema": 2}, "schema: expected 4, got 2; the file is of another version of fvlens, whose runs draw and"),
        ({"schema": 3, "command": ["fvlens", "run", "antonym", "--out", "a b"]},
         "so make the run again with `fvlens run antonym --out 'a b'`."),
        ({"schema": 3, "command": None}, "so make the run again with `fvlens run`."),
        ({"schema": 3, "command": "x"}, "so make the run again with `fvlens run`."),
        ({"relation": 3}, "relation: expected str, got 3."),
        ({"relation": "plurall"}, "relation: no relation named 'plurall'"),
        ({"relation": edit}, "relation: the field is missing."),
        ({"options": []}, "options: expected dict, got []."),
        ({"options__n_shots": edit}, "options.n_shots: the field is missing."),
        ({"options__n_shots": "4"}, "options.n_shots: expected int, got '4'."),
        ({"options__n_shots": True}, "options.n_shots: expected int, got True."),
        ({"options__n_shots": 0}, "options: n_shots: expected at least 1, got 0."),
        ({"options__epochs": edit}, "options.epochs: the field is missing."),
        ({"options__epochs": None}, "options.epochs: expected int, got None."),
        ({"options__n_train": 0}, "options: n_train: expected at least 1, got 0."),
        ({"options__labels": "true"}, "options.labels: expected one of 'permuted', 'random', got 'true'."),
        ({"options__layer": 1.0}, "options.layer: expected int or null, got 1.0."),
        ({"options__template": "nosuch"}, "options: no template named 'nosuch'"),
        ({"options__more": 1}, "options.more: not a field of this schema; expected n_shots"),
        ({"options__heads_file": edit}, "options.heads_file: the field is missing."),
        ({"options__seed": 2**63, "seed": 2**63}, f"options: seed: expected 0 to 2**63 - 1, got {2**63}."),
        ({"seed": 1}, "seed: 1, but options.seed is 0; expected one seed."),
        ({"loading": "rel-small"}, "loading: expected dict or null, got 'rel-small'."),
        ({"loading__dtype": "int8"}, "loading.dtype: expected one of 'float32', 'bfloat16', 'float16', 'float64'"),
        ({"loading__backend": "x"}, "loading.backend: expected one of 'hooked', 'bridge' or null, got 'x'."),
        ({"loading__device": "nosuch"}, "loading.device: 'nosuch' is not a device."),
        ({"loading__trust": True}, "loading.trust: a file cannot say that it is to be trusted"),
        ({"loading__code": "import os"}, "loading.code: not a field of this schema; expected model, device"),
        ({"fingerprint__weights": 1}, "fingerprint.weights: expected str, got 1."),
        ({"fingerprint__more": 1}, "fingerprint.more: not a field of this schema"),
        ({"data": None}, "data: expected dict, got None."),
        ({"data__relations": []}, "data.relations: expected dict, got []."),
        ({"data__relations__plural": 1}, "data.relations.plural: expected str, got 1."),
        ({"data__library": edit}, "data.library: the field is missing."),
        ({"data__heads_file": 1}, "data.heads_file: expected str or null, got 1."),
        ({"data_hash": None}, "data_hash: expected str, got None."),
        ({"versions": []}, "versions: expected dict, got []."),
        ({"versions__torch": []}, "versions.torch: expected a text or a number, got []."),
        ({"platform__threads": {}}, "platform.threads: expected a text or a number, got {}."),
        ({"code_hash": edit}, "code_hash: the field is missing."),
        ({"heads_source": "other"}, "heads_source: expected one of 'ranking', 'file', 'named', got 'other'."),
        ({"heads_source": "file"}, "heads_source is 'file', but options.heads_file or data.heads_file is null."),
    ],
)  # fmt: skip
def test_results_that_do_not_fit_are_refused(folder, changes, message):
    edit(folder, **changes)
    for read in (read_run, rerun):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(folder)
        assert str(error.value).startswith(f"{folder / 'results.json'}: ")
    assert not (folder.parent / "first-rerun").exists()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (3, "heads: expected list, got 3."),
        ([[9, 0, None, None]] * 4, "heads: L9H0 does not exist"),
        ([[0, 1, None, None], [0, 1, None, None]], "heads: L0H1 is listed twice"),
        ([[0], [1]], "heads: expected (layer, head) pairs of integers, got [0]; by name a head is 'L1H2'."),
        ([[0, 1, None, None]], "heads: expected options.n_heads, 4 heads, got 1."),
    ],
)
def test_recorded_heads_that_do_not_fit_are_refused(folder, heads, message):
    edit(folder, heads_source="file", options__heads_file="x", data__heads_file="y", heads_note="z", heads=heads)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_run(folder)
    assert str(error.value).startswith(f"{folder / 'results.json'}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "results.json: not a JSON file, or a truncated one ("),
        (b'{"schema": 3', "results.json: not a JSON file, or a truncated one ("),
        (b'{"schema": NaN}', "results.json: not a JSON file, or a truncated one (NaN is not a number)."),
        (b"[" * 100_000, "results.json: not a JSON file, or a truncated one ("),
        (b"\xff\x00", "results.json: not a JSON file, or a truncated one ("),
        (b"[1]", "results.json: expected a JSON object, got list."),
    ],
)
def test_results_that_are_no_json_are_refused(tmp_path, data, message):
    (tmp_path / "results.json").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_run(tmp_path)


def test_a_run_that_cannot_be_repeated_is_refused(folder, tiny, tmp_path, model):
    with pytest.raises(ValueError, match=r"no results of a finished `fvlens run` at .*results\.json\."):
        rerun(tmp_path / "none")
    for tolerance in (-1.0, float("nan"), float("inf")):
        message = f"rerun: tolerance: expected a number of at least 0, got {tolerance}."
        with pytest.raises(ValueError, match=re.escape(message)):
            rerun(folder, tolerance=tolerance)
    for out in (folder, folder / ".." / "first"):
        with pytest.raises(ValueError, match=re.escape(f"rerun: {out} holds the run itself; give another folder")):
            rerun(folder, out=out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=re.escape(f"rerun: {tmp_path / 'file'} is a file; give a folder.")):
        rerun(folder, out=tmp_path / "file")
    edit(folder, loading__model=str(tmp_path / "no-model"))
    with pytest.raises(ValueError, match="no-model"):
        rerun(folder)
    edit(folder, loading=None)
    with pytest.raises(ValueError, match=re.escape("loading: the run was started from Python and names no model")):
        rerun(folder)


@pytest.mark.parametrize("name", [".", "../first", "sub/.."])
def test_the_second_folder_stands_beside_the_first_by_any_name(folder, model, remembered, monkeypatch, name):
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    assert rerun(name, model=model).out.resolve() == folder.resolve().parent / "first-rerun"
    assert (folder.parent / "first-rerun" / "results.json").is_file()


def test_page_tells_how_to_repeat_the_run(first, result, tmp_path):
    files = write_run(first, tmp_path / "my folder")
    told = dict(Page(files[-1].read_text(encoding="utf-8")).tables["provenance"])
    mark = first.fingerprint
    assert told["model"] == f"rel-small (revision local, weights {mark.weights}, float32)"
    assert told["loaded with"] == "model rel-small, device cpu"
    assert told["command"] == "fvlens run plural"
    assert told["again"] == f"fvlens rerun '{tmp_path}/my folder'"
    (other,) = first.others
    assert told["other data"] == f"{other} {file_hash(other)}, whole library {first.provenance.library_hash}"
    assert f"(code {first.provenance.code_hash})" in told["versions"]
    assert f"threads {torch.get_num_threads()}" in told["machine"]
    python = dict(page_of(result, tmp_path).tables["provenance"])
    assert python["again"] == f"fvlens.report.rerun({str(tmp_path)!r}, model=model)"
    assert "command" not in python
    assert "loaded with" not in python
