"""``fvlens run`` and ``rerun``: what they print and write, and how options reach the run."""

import dataclasses
import importlib.metadata
import json
import re
import time

import pytest
import torch
from commands import cells, process
from conftest import HAS_HOOKED
from runs import FILES, small_run

import fvlens
from fvlens import FunctionVector, cli
from fvlens.cli._loading import recorded_loading
from fvlens.report import Loading, RunOptions

SHORT = ("--n-random", 2, "--n-others", 1, "--epochs", 2)
"""Fewer controls and less training than by default; a run in default settings is below, as a process."""
REQUIRED = (
    "relation model seed icl_top1 zero_shot_top1 shuffled_top1 fv_top1 fv_random_labels_top1 random_vector_top1 "
    "other_relation_top1 layer heads n_test versions seconds ffv_top1 ffv_layer ffv_epochs ffv_seconds"
).split()


def test_run_writes_its_files_into_a_folder_that_holds_others(call, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    (tmp_path / "results.json").write_text("old")
    code, out, err = call(
        "run", "antonym", "--out", tmp_path, "--n-prompts", 10, "--n-heads", 6, "--seed", 3, "--both-labels", *SHORT,
        "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert {file.name for file in tmp_path.iterdir()} == {
        "keep.txt", *FILES
    }  # fmt: skip
    assert (tmp_path / "keep.txt").read_text() == "mine"
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(REQUIRED) <= set(read)
    assert (read["relation"], read["model"], read["seed"]) == ("antonym", "rel-small", 3)
    assert (read["options"]["n_prompts"], read["options"]["n_random"], len(read["heads"])) == (10, 2, 6)
    vector = FunctionVector.load(tmp_path / "vector.safetensors")
    assert (vector.layer, vector.seed, vector.relation) == (read["layer"], 3, "antonym")
    assert [list(head) for head in vector.heads] == [entry[:2] for entry in read["heads"]]
    assert "antonym" in (tmp_path / "report.html").read_text(encoding="utf-8")

    assert f"antonym on rel-small, {read['n_test']} test pairs" in out
    shown = {row[0]: row[1:3] for row in cells(out) if len(row) in (3, 4)}  # a fourth where exact differs
    for start, key in (
        ("10 clean demonstrations", "icl_top1"),
        ("10 demonstrations, labels permuted", "shuffled_top1"),
        ("bare query", "zero_shot_top1"),
        ("function vector, 6 heads by permuted labels", "fv_top1"),
        ("function vector, 6 heads by random labels", "fv_random_labels_top1"),
        ("fine-tuned vector, 20 pairs, 2 epochs", "ffv_top1"),
        ("2 random vectors of the same norm", "random_vector_top1"),
        ("vectors of other relations", "other_relation_top1"),
    ):
        (row,) = [values for name, values in shown.items() if name.startswith(start)]
        low, high = read["intervals"][key]
        assert row == [f"{read[key]:.2f}", f"{low:.2f} to {high:.2f}"]
    for name in FILES:
        assert f"wrote {tmp_path / name}\n" in out


def test_run_passes_its_options_on(call, monkeypatch, tmp_path):
    seen = {}

    def stop(model, relation, **given):
        seen.update(relation=relation.name, **given)
        raise ValueError("enough")

    monkeypatch.setattr("fvlens.report.run_relation", stop)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(
        "run", "plural", "--model", "rel-small", "--seed", 7, "--n-shots", 4, "--n-prompts", 20, "--n-heads", 5,
        "--labels", "random", "--layer", 2, "--template", "arrow", "--device", "cpu",
        "--n-train", 9, "--epochs", 3, "--scale", 1.5, "--both-labels",
    )  # fmt: skip
    assert (code, err) == (2, "fvlens: enough\n")
    options, command = seen.pop("options"), seen.pop("command")
    assert seen == {
        "relation": "plural", "heads": None, "loading": Loading("rel-small", device="cpu"), "progress": True
    }  # fmt: skip
    assert command[:6] == ["fvlens", "run", "plural", "--model", "rel-small", "--seed"]
    assert (options.seed, options.n_shots, options.n_prompts, options.n_heads) == (7, 4, 20, 5)
    assert (options.labels, options.layer, options.template) == ("random", 2, "arrow")
    assert (options.n_train, options.epochs, options.scale, options.both_labels) == (9, 3, 1.5, True)
    call("run", "plural")
    assert seen["options"] == RunOptions()
    assert (seen["loading"], seen["command"]) == (Loading(), ["fvlens", "run", "plural"])
    assert list(tmp_path.iterdir()) == []  # a run that fails leaves no folder


def test_training_can_be_left_out(call, tmp_path):
    args = ("run", "plural", "--n-prompts", 4, "--n-heads", 2, "--n-shots", 3, *SHORT, "--out", tmp_path, "--quiet")
    assert call(*args)[0] == 0
    trained = json.loads((tmp_path / "results.json").read_text())
    code, out, err = call(*args, "--epochs", 0)
    assert (code, err) == (0, "")
    assert "fine-tuned" not in out
    assert not (tmp_path / "vector-finetuned.safetensors").exists()
    read = json.loads((tmp_path / "results.json").read_text())
    assert (read["ffv_top1"], read["ffv_layer"], read["options"]["epochs"]) == (None, None, 0)
    assert trained["ffv_top1"] is not None
    for name in ("icl_top1", "fv_top1", "other_relation_top1", "random_heads_top1", "heads", "decoded"):
        assert read[name] == trained[name]


def test_results_go_to_a_folder_named_after_the_relation(call, model, monkeypatch, tmp_path):
    monkeypatch.setattr("fvlens.report.run_relation", lambda *args, **options: small_run(model))
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("run", "antonym", "--quiet")
    assert code == 0
    assert {file.name for file in (tmp_path / "fvlens-antonym").iterdir()} == set(FILES)
    assert "wrote fvlens-antonym/report.html" in out


def test_names_with_brackets_and_colons_are_printed_as_they_are(call, model, monkeypatch, tmp_path):
    """Rich would take them for markup or an emoji."""
    monkeypatch.setattr("fvlens.report.run_relation", lambda *args, **options: small_run(model))
    folder = tmp_path / "[red] :cat: [/red]"
    code, out, _ = call("run", "antonym", "--out", folder, "--quiet")
    assert code == 0
    assert f"wrote {folder / 'results.json'}\n" in out


@pytest.mark.slow
def test_run_with_default_settings_takes_less_than_a_minute(tmp_path):
    """From process start to the written report, on two cores (issue 2, section 6)."""
    began = time.monotonic()
    done = process("run", "antonym", "--out", tmp_path)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(REQUIRED) <= set(read)
    assert read["n_test"] >= 60
    assert (read["options"]["n_random"], read["ffv_epochs"], len(read["other_relations"])) == (10, 20, 3)
    assert read["seconds"] < seconds < 60
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    # what the run is for: the vector does the task, and the controls do not
    controls = max(read["zero_shot_top1"], read["random_vector_top1"], read["other_relation_top1"])
    assert read["fv_top1"] > controls
    assert read["ffv_top1"] > max(controls, read["other_relation_ffv_top1"])


def test_the_way_a_model_is_loaded_reaches_it_and_the_files(call, model, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "fvlens.report._settings.load_model", lambda name, **options: seen.update(name=name, **options) or model
    )
    code, _, err = call(
        "run", "plural", "--model", "some/folder", "--device", "cpu", "--dtype", "float16", "--revision", "v1",
        "--backend", "hooked", "--n-prompts", 4, "--n-heads", 2, "--n-shots", 3, *SHORT, "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert seen == {
        "name": "some/folder", "device": "cpu", "dtype": torch.float16, "revision": "v1", "backend": "hooked"
    }  # fmt: skip
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["loading"] == {
        "model": "some/folder", "device": "cpu", "dtype": "float16", "revision": "v1", "backend": "hooked",
        "base": None,
    }  # fmt: skip
    assert read["model"] == "some/folder"
    assert read["command"][:5] == ["fvlens", "run", "plural", "--model", "some/folder"]
    assert read["command"][-3:] == ["--out", str(tmp_path), "--quiet"]


# --- rerun ---


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """What `fvlens run` writes."""
    folder = tmp_path_factory.mktemp("run") / "[1] run"
    with pytest.raises(SystemExit) as end:
        cli.main([
            "run", "plural", "--n-prompts", "5", "--n-heads", "3", "--n-shots", "3", "--device", "cpu", "--quiet",
            *map(str, SHORT), "--out", str(folder),
        ])  # fmt: skip
    assert end.value.code == 0
    return folder


def test_rerun_gives_the_same_run(call, run_folder, tmp_path):
    code, out, err = call("rerun", run_folder, "--quiet")
    assert (code, err) == (0, f"{run_folder / 'results.json'} names the model rel-small\n")
    lines = out.splitlines()
    again = run_folder.with_name("[1] run-rerun")
    assert lines[0] == "changed since the first run: nothing that the numbers depend on"
    n = 1 + len(FILES)
    assert lines[1:n] == [f"wrote {again / name}" for name in FILES]
    assert re.fullmatch(r"the same run: \d+ numbers compared, all equal", lines[n])
    read = json.loads((again / "results.json").read_text())
    assert read["command"] == ["fvlens", "rerun", str(run_folder), "--quiet"]


def test_rerun_says_what_differs(call, run_folder, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    content = json.loads((run_folder / "results.json").read_text())
    right = content["icl_top1"]
    content["icl_top1"] = right - 0.125
    content["versions"]["torch"] = "0.1"
    content["data_hash"] = "0123456789abcdef"
    (folder / "results.json").write_text(json.dumps(content))
    out_folder = tmp_path / "out"
    code, out, err = call("rerun", folder, "--out", out_folder, "--quiet")
    assert (code, err) == (1, f"{folder / 'results.json'} names the model rel-small\n")
    first, *_, last = out.splitlines()
    assert first == "changed since the first run: data data_hash, version versions.torch"
    rows = cells(out)[1:]
    assert rows[:2] == [[str(folder)], ["what differs", "first run", "this run", "difference"]]
    now = fvlens.load_relation("plural").data_hash
    assert rows[2:7] == [
        ["data", "data_hash", "0123456789abcdef", now],
        ["version", "versions.torch", "0.1", importlib.metadata.version("torch")],
        ["number", "icl_top1", f"{right - 0.125}", f"{right}", "1.2e-01"],
        ["data", "vector.safetensors", "(absent)", "written"],
        ["data", "vector-finetuned.safetensors", "(absent)", "written"],
    ]
    n = re.fullmatch(
        r"not the same run: 1 results differ beyond 1e-05 \((\d+) numbers compared, largest difference 1\.2e-01\)", last
    )
    assert int(n[1]) > 50
    code, out, _ = call("rerun", folder, "--out", out_folder, "--tolerance", "0.2", "--quiet")
    assert code == 0
    assert out.splitlines()[-1].endswith("numbers compared, largest difference 1.2e-01")


def test_rerun_refuses_what_is_no_run(refused, run_folder, tmp_path):
    assert f"no results of a finished `fvlens run` at {tmp_path / 'results.json'}." in refused("rerun", tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 2}')
    assert "results.json: schema: expected 4, got 2" in refused("rerun", tmp_path)
    content = json.loads((run_folder / "results.json").read_text())
    for change, message in (
        ({"relation": "plurall"}, "relation: no relation named 'plurall'"),
        ({"loading": content["loading"] | {"model": "rel-smal"}}, "rel-smal"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(content | change))
        assert message in refused("rerun", tmp_path)
    assert "holds the run itself" in refused("rerun", run_folder, "--out", run_folder)
    assert "tolerance: expected a number of at least 0, got -1.0" in refused("rerun", run_folder, "--tolerance", -1)


# --- what a run wrote, used by other commands ---


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory):
    """A run in half precision."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(SystemExit) as end:
        cli.main([
            "run", "plural", "--dtype", "bfloat16", "--n-prompts", "5", "--n-heads", "3", "--n-shots", "3",
            "--n-others", "0", "--n-random", "1", "--epochs", "0", "--device", "cpu", "--quiet", "--out", str(folder),
        ])  # fmt: skip
    assert end.value.code == 0
    return folder


def test_a_vector_says_how_its_model_is_loaded(call, refused, half_folder):
    file = half_folder / "vector.safetensors"
    mark = FunctionVector.load(file).fingerprint
    assert (mark.source, mark.dtype, mark.backend) == ("rel-small", "bfloat16", "hooked" if HAS_HOOKED else "bridge")
    code, out, err = call("inject", file, "dog")
    named = "vector.safetensors names the model rel-small\n"
    assert (code, err) == (0, f"{named}the prompt 'dog' is a word, asked in template qa; --raw takes it as text\n")
    assert out.startswith("prompt 'Q: dog\\nA:'\n")
    message = refused("inject", file, "dog", "--dtype", "float32")
    assert "vector.safetensors was made on model 'rel-small', not on this one (file / model: " in message
    assert "dtype: bfloat16 / float32" in message
    remedy = "leave out --dtype: the file says how its model is loaded, or use it all the same with --no-check."
    assert message.endswith(f"); {remedy}")


def test_heads_say_how_their_model_is_loaded(call, refused, tmp_path):
    path, folder = tmp_path / "heads.json", tmp_path / "run"
    few = ("--n-prompts", 4, "--n-shots", 3, "--device", "cpu", "--quiet")
    code, _, err = call("universal", "plural", "--n-heads", 2, "--dtype", "bfloat16", "--out", path, *few)
    assert (code, err) == (0, "")
    code, _, err = call(
        "run", "plural", "--heads", path, "--out", folder, "--epochs", 0, "--n-others", 0, "--n-random", 1, *few
    )
    assert (code, err) == (0, "heads.json names the model rel-small\n")
    loading = json.loads((folder / "results.json").read_text())["loading"]
    assert (loading["model"], loading["dtype"], loading["device"]) == ("rel-small", "bfloat16", "cpu")
    message = refused("run", "plural", "--heads", path, "--dtype", "float64", "--model", "rel-small", *few)
    assert "heads.json was made on model 'rel-small', not on this one (file / model: " in message
    assert message.endswith("; leave out --model and --dtype: the file says how its model is loaded.")


def test_what_the_line_says_goes_before_what_the_file_says(model):
    mark = dataclasses.replace(
        fvlens.fingerprint(model), source="owner/name", revision="abc", dtype="float16", backend="bridge"
    )
    assert recorded_loading(mark, {}) == Loading("owner/name", None, "float16", "abc", "bridge")
    given = {"revision": "main", "device": "cpu", "dtype": "float32", "backend": "hooked"}
    assert recorded_loading(mark, given) == Loading("owner/name", "cpu", "float32", "main", "hooked")
    # another place has revisions of its own
    assert recorded_loading(mark, {"model": "folder"}) == Loading("folder", None, "float16", None, "bridge")
    # files of fvlens 0.1 know a name alone; HookedTransformer is the default where it is there
    old = dataclasses.replace(mark, source="", name="rel-small", revision="local", backend="hooked")
    assert recorded_loading(old, {}) == Loading("rel-small", None, "float16")


def test_a_model_that_has_changed_since_is_refused(refused, model, tmp_path):
    mark = dataclasses.replace(fvlens.fingerprint(model), weights="0123456789abcdef")
    vector = FunctionVector(torch.ones(model.cfg.d_model), layer=0, heads=(), relation="", fingerprint=mark)
    message = refused("inject", vector.save(tmp_path / "v.safetensors"), "dog")
    assert "weights: 0123456789abcdef / " in message
    assert (
        "the model has changed since, so make the file again, or say with --model where the old one is, or use it "
        in message
    )
