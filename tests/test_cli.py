"""The commands: what they print and write, and that every error is one line with a hint and exit code 2."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import small_run
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

import fvlens
from fvlens import FunctionVector, cli
from fvlens.evaluation import copied, layer_scale_sweep
from fvlens.find import relation_effects
from fvlens.finetuning import STUDIES, Settings
from fvlens.models import fingerprint
from fvlens.prompts import Template
from fvlens.relations import held_out
from fvlens.report import Loading, RunOptions
from fvlens.universal import UniversalHeads

DATA = Path(fvlens.__file__).parent / "relations" / "data"
REQUIRED = (
    "relation model seed icl_top1 zero_shot_top1 shuffled_top1 fv_top1 fv_random_labels_top1 random_vector_top1 "
    "other_relation_top1 layer heads n_test versions seconds ffv_top1 ffv_layer ffv_epochs ffv_seconds"
).split()


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """Run a command that must fail: its one line on standard error."""

    def run(*args):
        code, out, err = call(*args)
        assert (code, out) == (2, "")
        assert err.startswith("fvlens: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err.strip()

    return run


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    """A vector file of the embedded model."""
    return small_run(model).vector.save(tmp_path_factory.mktemp("vector") / "antonym.safetensors")


def process(*args, **changes):
    """Run a command as a user does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **changes}
    return subprocess.run(
        [sys.executable, "-m", "fvlens.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def cells(text):
    """Rows of a printed table; its columns are two spaces apart."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]


def library():
    """Header and number of pairs of every relation file, read without fvlens."""
    found = {}
    for file in DATA.glob("*.tsv"):
        lines = file.read_text(encoding="utf-8").splitlines()
        header = dict(line[1:].strip().split(": ", 1) for line in lines if line.startswith("#"))
        pairs = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
        found[header["name"]] = (header, pairs)
    return found


# --- run ---


def test_run_writes_its_files_into_a_folder_that_holds_others(call, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    (tmp_path / "results.json").write_text("old")
    code, out, err = call(
        "run", "antonym", "--out", tmp_path, "--n-prompts", 10, "--n-heads", 6, "--seed", 3, "--both-labels", "--quiet"
    )
    assert (code, err) == (0, "")
    assert {file.name for file in tmp_path.iterdir()} == {
        "keep.txt", "results.json", "report.html", "vector.safetensors", "vector-finetuned.safetensors"
    }  # fmt: skip
    assert (tmp_path / "keep.txt").read_text() == "mine"
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(REQUIRED) <= set(read)
    assert (read["relation"], read["model"], read["seed"]) == ("antonym", "rel-small", 3)
    assert (read["options"]["n_prompts"], read["options"]["n_random"], len(read["heads"])) == (10, 10, 6)
    vector = FunctionVector.load(tmp_path / "vector.safetensors")
    assert (vector.layer, vector.seed, vector.relation) == (read["layer"], 3, "antonym")
    assert [list(head) for head in vector.heads] == [entry[:2] for entry in read["heads"]]
    assert "antonym" in (tmp_path / "report.html").read_text(encoding="utf-8")

    assert f"antonym on rel-small, {read['n_test']} test pairs" in out
    shown = {row[0]: row[1:] for row in cells(out) if len(row) == 3}
    for start, key in (
        ("10 clean demonstrations", "icl_top1"),
        ("10 demonstrations, labels permuted", "shuffled_top1"),
        ("bare query", "zero_shot_top1"),
        ("function vector, 6 heads by permuted labels", "fv_top1"),
        ("function vector, 6 heads by random labels", "fv_random_labels_top1"),
        ("fine-tuned vector, 20 pairs, 20 epochs", "ffv_top1"),
        ("10 random vectors of the same norm", "random_vector_top1"),
        ("vectors of other relations", "other_relation_top1"),
    ):
        (row,) = [values for name, values in shown.items() if name.startswith(start)]
        low, high = read["intervals"][key]
        assert row == [f"{read[key]:.2f}", f"{low:.2f} to {high:.2f}"]
    for name in ("vector.safetensors", "vector-finetuned.safetensors", "results.json", "report.html"):
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
    args = ("run", "plural", "--n-prompts", 4, "--n-heads", 2, "--n-shots", 3, "--out", tmp_path, "--quiet")
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
    assert {file.name for file in (tmp_path / "fvlens-antonym").iterdir()} == {
        "vector.safetensors", "vector-finetuned.safetensors", "results.json", "report.html"
    }  # fmt: skip
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
    assert read["options"]["n_random"] >= 10
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
        "--backend", "hooked", "--n-prompts", 4, "--n-heads", 2, "--n-shots", 3, "--out", tmp_path, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert seen == {
        "name": "some/folder", "device": "cpu", "dtype": torch.float16, "revision": "v1", "backend": "hooked"
    }  # fmt: skip
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["loading"] == {
        "model": "some/folder", "device": "cpu", "dtype": "float16", "revision": "v1", "backend": "hooked"
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
            "--out", str(folder),
        ])  # fmt: skip
    assert end.value.code == 0
    return folder


def test_rerun_gives_the_same_run(call, run_folder, tmp_path):
    code, out, err = call("rerun", run_folder, "--quiet")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    again = run_folder.with_name("[1] run-rerun")
    assert lines[0] == "changed since the first run: nothing that the numbers depend on"
    names = ("vector.safetensors", "vector-finetuned.safetensors", "results.json", "report.html")
    assert lines[1:5] == [f"wrote {again / name}" for name in names]
    assert re.fullmatch(r"the same run: \d+ numbers compared, all equal", lines[5])
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
    assert (code, err) == (1, "")
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


# --- universal, and run with its heads ---


def test_universal_writes_heads_that_run_takes(call, model, tmp_path):
    path = tmp_path / "heads.json"
    names = ("antonym", "plural", "capitalised")
    code, out, err = call(
        "universal", *names, "--n-heads", 3, "--n-prompts", 6, "--n-shots", 4, "--seed", 5, "--out", path, "--quiet"
    )
    assert (code, err) == (0, "")
    expected = fvlens.universal_heads(
        model, names, 3, n_prompts=6, n_shots=4, generator=torch.Generator().manual_seed(5), progress=False
    )
    loaded = UniversalHeads.load(path, model=model)
    assert torch.equal(loaded.aie, expected.aie)
    assert {file.name for file in tmp_path.iterdir()} == {"heads.json", "heads.html"}
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert "capitalised" in page
    rows = cells(out)
    assert rows[:2] == [["mean over 3 relations on rel-small, permuted labels"], ["head", "mean AIE", "standard error"]]
    assert rows[2:5] == [[str(h), f"{expected.mean[h]:.4f}", f"{expected.stderr[h]:.4f}"] for h in expected.heads]
    assert out.splitlines()[-2:] == [f"wrote {path}", f"wrote {tmp_path / 'heads.html'}"]

    folder = tmp_path / "run"
    code, out, err = call(
        "run", "antonym", "--heads", path, "--n-prompts", 6, "--n-shots", 4, "--out", folder, "--quiet"
    )
    assert (code, err) == (0, "")
    assert out.startswith(f"3 heads from {path} (universal heads of this model, 3 relations, permuted labels)\n")
    read = json.loads((folder / "results.json").read_text())
    assert (read["heads_source"], read["options"]["heads_file"]) == ("file", str(path))
    assert [entry[:2] for entry in read["heads"]] == [list(head) for head in expected.heads]
    g = torch.Generator().manual_seed(0)
    split = fvlens.load_relation("antonym").split(g)
    clean = fvlens.build_prompts(
        model, split.train, queries=split.valid, n_prompts=6, n_shots=4, relation="antonym", generator=g
    )
    means = fvlens.mean_head_activations(model, clean, progress=False)
    vector = fvlens.function_vector(model, means, heads=expected.heads, layer=read["layer"])
    assert torch.equal(FunctionVector.load(folder / "vector.safetensors").vector, (read["scale"] * vector).vector)


def test_universal_takes_the_library_or_a_part_of_it(call, monkeypatch, tmp_path):
    seen = []

    def stop(model, relations, n, **options):
        seen.append((list(relations), n, options))
        raise ValueError("enough")

    monkeypatch.setattr("fvlens.universal.universal_heads", stop)
    monkeypatch.chdir(tmp_path)
    call("universal")
    call("universal", "--family", "part", "--n-heads", 4)
    call("universal", "--category", "translation", "--limit", 2, "--labels", "random", "--template", "arrow", "--quiet")
    headers = {name: header for name, (header, _) in sorted(library().items())}
    assert seen[0][:2] == (list(headers), 10)
    assert seen[1][:2] == ([name for name, header in headers.items() if header["family"] == "part"], 4)
    translations = [name for name, header in headers.items() if header["category"] == "translation"]
    assert seen[2][:2] == (translations[:2], 10)
    options = seen[2][2]
    assert options.pop("generator").initial_seed() == 0
    assert options == {
        "n_shots": 10, "n_prompts": 100, "labels": "random", "template": "arrow", "progress": False
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_universal_names_what_is_left_out_and_what_is_unfinished(call, model, monkeypatch, tmp_path):
    g = torch.Generator().manual_seed(0)
    found = fvlens.universal_heads(
        model, ["antonym", "plural"], 2, n_prompts=4, n_corrupted=2, n_shots=3, generator=g, progress=False
    )
    part = dataclasses.replace(found, majority=torch.tensor([0.0, 1.0]), complete=False)
    monkeypatch.setattr("fvlens.universal.universal_heads", lambda *args, **options: part)
    code, out, err = call("universal", "antonym", "plural", "tool-use", "--out", tmp_path / "h.json", "--n-shots", 3)
    assert (code, err) == (130, "fvlens: interrupted\n")
    assert "left out, 3 demonstrations do not beat the majority label: plural\n" in out
    assert out.splitlines()[-1] == "2 of 3 relations were finished"
    assert "interrupted" in (tmp_path / "h.html").read_text(encoding="utf-8")
    with pytest.warns(UserWarning, match=r"h\.json: the search for these heads was interrupted after 2 relations"):
        assert UniversalHeads.load(tmp_path / "h.json").relations == ("antonym", "plural")
    first, second, *_ = cells(out)[2:]  # one relation has no standard error
    assert [first, second] == [[str(head), f"{part.mean[head]:.4f}"] for head in part.heads]


def test_heads_that_do_not_fit_are_refused(refused, tiny, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text("[[1, 2], [9, 0]]")
    assert "heads.json: heads: L9H0 does not exist: the model has layers 0..3" in refused(
        "run", "plural", "--heads", path
    )
    assert f"no file of heads at {tmp_path / 'none'}." in refused("run", "plural", "--heads", tmp_path / "none")
    for option, *value in (("--n-heads", 10), ("--labels", "permuted"), ("--both-labels",)):
        message = refused("run", "plural", "--heads", path, option, *value)
        assert (
            message == f"fvlens: {option} says how to rank heads, but --heads {path} gives them; leave one of them out."
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["antonim"], "no relation named 'antonim'"),
        (["plural", "--family", "part"], "relations are named, so --category and --family have nothing to choose"),
        (["--family", "nosuch"], "no relation has family 'nosuch'"),
        (["plural", "--out", "x.html"], "--out x.html: expected a name for a JSON file, such as heads.json."),
        (["plural", "--out", "."], "--out .: expected a name for a JSON file, such as heads.json."),
        (["plural", "--out", "none/h.json"], "--out none/h.json: folder none does not exist; create it first."),
        (["plural", "--n-heads", "33"], "n: expected 1 to 32 (all heads), got 33."),
        (["plural", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["plural", "plural"], "relation 'plural' is given 2 times"),
    ],
)
def test_universal_refuses(refused, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("universal", *args, "--quiet")
    assert list(tmp_path.iterdir()) == []


# --- study ---

FEW = ("--n-prompts", 8, "--n-heads", 4, "--n-seeds", 1, "--epochs", 1, "--quiet")


def study_by_hand(model, name, *, train, layer, **settings):
    """The same study by the library's own functions."""
    g = torch.Generator().manual_seed(3)
    split = fvlens.load_relation("plural").split(g, train=train)
    means, effects = relation_effects(
        model, split, relation="plural", labels="permuted", n_prompts=8, generator=g, progress=False
    )
    vector = fvlens.function_vector(model, means, heads=effects.top(4), layer=0)
    sweep = layer_scale_sweep(
        model, split.valid, vector, layers=None if layer is None else [layer], generator=copied(g), progress=False
    )
    vector = vector.at_layer(sweep.best_layer)
    if name != "scale":  # there the factor is what is studied
        vector = vector * sweep.best_scale
    return STUDIES[name](
        model, split, init=vector, n_seeds=1, settings=Settings(epochs=1), relation="plural", generator=g,
        progress=False, **settings,
    ), sweep.best_scale  # fmt: skip


def test_study_prints_and_writes_the_points(call, model, tmp_path):
    folder = tmp_path / "new" / "folder"
    code, out, err = call("study", "layer", "plural", "--out", folder, "--n-train", 3, "--seed", 3, *FEW)
    assert (code, err) == (0, "")
    expected, scale = study_by_hand(model, "layer", train=0.45, layer=None, n_train=3)
    for x in range(model.cfg.n_layers):
        tuned, untuned = (
            f"{at.top1:.3f} [{at.interval.low:.3f}, {at.interval.high:.3f}]"
            for line in ("fine-tuned", "untuned")
            for at in expected.line(line)
            if at.x == x
        )
        assert re.search(rf"^ {x} +{re.escape(tuned)} +{re.escape(untuned)} *$", out, re.MULTILINE)
    assert f", times {scale:g}, 1 seed, {expected.n_test} test pairs; no vector" in out
    assert f"; no vector {expected.references['no vector']:.3f}; inter" in out
    assert pd.read_csv(folder / "study-layer.csv").top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert sorted(file.name for file in folder.iterdir()) == ["study-layer.csv", "study-layer.html"]
    assert "Layer of the vector: plural" in (folder / "study-layer.html").read_text()


def test_training_size_study_splits_for_many_training_pairs(call, model, tmp_path):
    code, out, _ = call("study", "training-size", "plural", "--out", tmp_path, "--layer", 1, "--seed", 3, *FEW)
    assert code == 0
    expected, scale = study_by_hand(model, "training-size", train=0.7, layer=1)
    told = f"top-1 of plural on rel-small, vector after layer 1, times {scale:g}, 1 seed, {expected.n_test} test pairs"
    assert told in out
    table = pd.read_csv(tmp_path / "study-training-size.csv")
    assert table.top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert f"untuned vector {expected.references['untuned vector']:.3f}" in out


def test_scale_study_multiplies_the_vector_itself(call, model, tmp_path):
    code, out, _ = call("study", "scale", "plural", "--out", tmp_path, "--layer", 1, "--seed", 3, "--n-train", 2, *FEW)
    assert code == 0
    expected, _ = study_by_hand(model, "scale", train=0.45, layer=1, n_train=2)
    assert f"vector after layer 1, 1 seed, {expected.n_test} test pairs" in out
    table = pd.read_csv(tmp_path / "study-scale.csv")
    assert table.top1.tolist() == pytest.approx(expected.to_dataframe().top1.tolist())
    assert table.norm.tolist() == pytest.approx(expected.to_dataframe().norm.tolist())


def test_study_refuses(refused, tmp_path):
    assert refused("study", "size", "plural") == (
        "fvlens: no study named 'size'; expected one of training-size, layer, scale, l2, init."
    )
    assert "--n-train: the number of training pairs is what this study varies; leave it out." in refused(
        "study", "training-size", "plural", "--n-train", 5
    )
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; give a folder" in refused("study", "layer", "plural", "--out", file)


def test_an_interrupted_study_writes_what_is_finished(call, model, tmp_path, monkeypatch):
    own = fvlens.finetuning._studies.finetune_many
    count = itertools.count()

    def train(*args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(fvlens.finetuning._studies, "finetune_many", train)
    with pytest.warns(UserWarning, match="the study was interrupted: 2 of 4 layers are done"):
        code, _, _ = call("study", "layer", "plural", "--out", tmp_path, "--n-train", 2, "--layer", 0, *FEW)
    assert code == 130
    table = pd.read_csv(tmp_path / "study-layer.csv")
    assert sorted(set(table.x)) == [0, 1] and not table.complete.any()
    assert "interrupted: a part" in (tmp_path / "study-layer.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))


# --- relations, models, heads ---


@pytest.mark.parametrize(
    "filters",
    [{}, {"category": "translation"}, {"family": "part"}, {"domain": "animal"}, {"family": "kind", "domain": "animal"}],
)
def test_relations_lists_what_the_files_hold(call, filters):
    chosen = {
        name: (header, pairs)
        for name, (header, pairs) in library().items()
        if all(header[key] == value for key, value in filters.items())
    }
    assert chosen
    code, out, err = call("relations", *(part for key, value in filters.items() for part in (f"--{key}", value)))
    assert (code, err) == (0, "")
    heading, *lines, last = out.splitlines()
    names = ["relation", "category", "family", "pairs", "example"]
    starts = [heading.index(name) for name in names]
    assert heading.split() == names
    rows = [[line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    assert rows == [
        [name, header["category"], header["family"], str(len(pairs)), f"{pairs[0][0]} -> {pairs[0][1]}"]
        for name, (header, pairs) in sorted(chosen.items())
    ]
    total = sum(len(pairs) for _, pairs in chosen.values())
    assert last == f"{len(chosen)} relations, {total} pairs"


def test_relations_fits_80_columns(call, monkeypatch):
    """No name is cut in a terminal of the usual width."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("relations")
    assert "…" not in out
    words = {line.split()[0] for line in out.splitlines() if line.strip() and not line.startswith(" ")}
    assert set(library()) <= words
    assert max(map(len, out.splitlines())) <= 80


def test_models_lists_the_embedded_model_and_those_of_transformer_lens(call):
    code, out, err = call("models")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("rel-small  (")
    assert lines[1:] == list(OFFICIAL_MODEL_NAMES)
    wanted = [name for name in OFFICIAL_MODEL_NAMES if "pythia-70m" in name.lower()]
    assert wanted
    assert call("models", "--filter", "Pythia-70M")[1].splitlines() == wanted
    assert call("models", "--filter", "REL-SMALL")[1].splitlines() == lines[:1]


@pytest.mark.parametrize("labels", ["permuted", "random"])
def test_heads_prints_the_effects_of_the_best_heads(call, model, labels):
    code, out, err = call(
        "heads", "plural", "--n-prompts", 8, "--n-heads", 4, "--labels", labels, "--seed", 2, "--template", "arrow",
        "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    g = torch.Generator().manual_seed(2)
    split = fvlens.load_relation("plural").split(g)
    common = dict(queries=split.valid, template="arrow", relation="plural", generator=g)
    clean = fvlens.build_prompts(model, split.train, n_prompts=8, **common)
    means = fvlens.mean_head_activations(model, clean, progress=False)
    corrupted = fvlens.build_prompts(model, split.train, n_prompts=25, labels=labels, **common)
    effects = fvlens.indirect_effects(model, corrupted, means, progress=False)
    expected = [[str(h), f"{effects.aie[h]:.4f}", f"{effects.stderr[h]:.4f}"] for h in effects.top(4)]
    rows = cells(out)
    assert rows[0] == [f"plural, {labels} labels"]
    assert rows[1:] == [["head", "AIE", "standard error"], *expected]


@pytest.mark.parametrize("labels", ["permuted", "random"])
def test_heads_ranks_by_the_labels_that_were_asked_for_alone(call, monkeypatch, labels):
    asked = []
    original = fvlens.find.indirect_effects

    def watched(model, prompts, *args, **given):
        asked.append(prompts.labels)
        return original(model, prompts, *args, **given)

    monkeypatch.setattr("fvlens.find.indirect_effects", watched)
    assert call("heads", "plural", "--n-prompts", 2, "--labels", labels, "--quiet")[0] == 0
    assert asked == [labels]


@pytest.mark.parametrize("options", [[], ["--method", "atp", "--recheck", 32]])
def test_heads_says_which_heads_do_not_help(call, options):
    """Of all 32 heads many hurt; of the best two none does."""
    code, out, err = call("heads", "plural", "--n-prompts", 4, "--n-heads", 32, *options, "--quiet")
    assert (code, err) == (0, "")
    effects = [float(row[3 if options else 1]) for row in cells(out)[2:34]]
    n_below = sum(effect < 0 for effect in effects)
    assert effects == sorted(effects, reverse=True) and n_below > 2
    last = out.splitlines()[-1]
    assert re.match(r"\d+ of the 32 best heads have an exact AIE of 0 or less \(L\dH\d, ", last)
    assert int(last.split()[0]) >= n_below
    assert "exact AIE of 0" not in call("heads", "plural", "--n-prompts", 4, "--n-heads", 2, *options, "--quiet")[1]
    code, out, err = call("heads", "plural", "--n-prompts", 4, "--n-heads", 33, "--quiet")
    assert code == 2 and "expected n between 1 and 32 (all heads), got 33" in err


def test_heads_prints_a_screen_and_its_recheck(call, model):
    code, out, err = call(
        "heads", "plural", "--n-prompts", 8, "--n-heads", 4, "--method", "atp", "--recheck", 3, "--quiet"
    )  # fmt: skip
    assert (code, err) == (0, "")
    g = torch.Generator().manual_seed(0)
    split = fvlens.load_relation("plural").split(g)
    common = dict(queries=split.valid, relation="plural", generator=g)
    means = fvlens.mean_head_activations(
        model, fvlens.build_prompts(model, split.train, n_prompts=8, **common), progress=False
    )
    corrupted = fvlens.build_prompts(model, split.train, n_prompts=25, labels="permuted", **common)
    screen = fvlens.indirect_effects(model, corrupted, means, method="atp", recheck=3, progress=False)
    exact = fvlens.indirect_effects(model, corrupted, means, progress=False)
    expected = []
    for head in screen.top(4):
        row = [str(head), f"{screen.aie[head]:.4f}", f"{screen.stderr[head]:.4f}"]
        again = [f"{exact.aie[head]:.4f}", f"{exact.stderr[head]:.4f}"] if head in screen.recheck.heads else []
        expected.append(row + again)
    rows = cells(out)
    assert rows[1] == ["head", "AtP", "standard error", "exact AIE", "standard error"]
    assert rows[2:] == expected
    assert [len(row) for row in expected] == [5, 5, 5, 3]


def test_heads_says_how_relevance_was_computed(call):
    code, out, err = call("heads", "plural", "--n-prompts", 4, "--n-heads", 2, "--method", "lrp", "--quiet")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "AttnLRP rules for norms, activation functions, gates and attention products"
    assert cells(out)[1] == ["head", "LRP relevance", "standard error"]


def test_heads_refuses_a_recheck_of_exact_effects(call):
    code, out, err = call("heads", "plural", "--n-prompts", 4, "--recheck", 3, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("fvlens: indirect_effects: recheck=3 runs the best heads of a screen again; method='exact'")


# --- inject ---


def continuation(model, text, vector=None, scale=1.0, n=5):
    """The most likely next tokens and their chances, the vector added by a hook of our own."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]

    def add(resid, hook):
        return resid + scale * vector.vector * (torch.arange(resid.shape[1]) == resid.shape[1] - 1)[:, None]

    hooks = [] if vector is None else [(f"blocks.{vector.layer}.hook_resid_post", add)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        chances = model(torch.tensor([[model.tokenizer.bos_token_id, *ids]]))[0, -1].softmax(dim=-1)
    values, tokens = chances.topk(n)
    return [f"{model.tokenizer.decode([t])!r} {v:.3f}" for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("prompt", "text", "options", "scale", "n"),
    [
        ("hot", "Q: hot\nA:", [], 1.0, 5),
        ("  big ", "Q: big\nA:", ["--scale", "-0.5", "--top", "3"], -0.5, 3),
        ("Q: open\nA:", "Q: open\nA:", [], 1.0, 5),
        ("the [bold] cat is :cat:", "the [bold] cat is :cat:", ["--top", "2"], 1.0, 2),
    ],
)
def test_inject_shows_a_prompt_with_and_without_the_vector(call, model, saved, prompt, text, options, scale, n):
    vector = FunctionVector.load(saved)
    code, out, err = call("inject", saved, *options, "--", prompt)
    assert (code, err) == (0, "")
    first, rest = out.split("\n", 1)
    assert first == f"prompt {text!r}"
    plain, steered = continuation(model, text, n=n), continuation(model, text, vector, scale, n)
    assert plain != steered
    rows = cells(rest)
    assert rows[0] == ["rank", "plain", f"with antonym after layer {vector.layer}"]
    assert rows[1:] == [[str(i + 1), plain[i], steered[i]] for i in range(n)]


def test_inject_generates_what_follows(call, model, saved):
    """Greedy tokens; only the prompt's last token is steered, so later tokens follow from the text alone plus the
    first steered step's keys and values."""
    vector = FunctionVector.load(saved)
    code, out, err = call("inject", saved, "hot", "--generate", 1)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for line, name, best in (
        (lines[-2], "plain  ", continuation(model, "Q: hot\nA:", n=1)),
        (lines[-1], "steered", continuation(model, "Q: hot\nA:", vector, n=1)),
    ):
        assert line == f"{name} {best[0].rsplit(' ', 1)[0]}"
    longer = call("inject", saved, "hot", "--generate", 4)[1].splitlines()
    for short, long in zip(lines[-2:], longer[-2:], strict=True):
        assert long.startswith(short[:-1])
        assert len(long) > len(short)


def test_a_word_is_asked_in_the_template_of_the_vector(call, model, tiny, tmp_path):
    def file(template):
        fields = dict(layer=0, heads=(), relation="", fingerprint=fingerprint(model), template=template)
        return FunctionVector(vector=torch.zeros(model.cfg.d_model), **fields).save(tmp_path / "v.safetensors")

    assert call("inject", file("arrow"), "hot")[1].startswith("prompt ' hot ->'\n")
    code, out, _ = call("inject", file(""), "hot")
    assert code == 0
    assert out.startswith("prompt 'Q: hot\\nA:'\n")
    rows = cells(out)[2:]
    assert all(before == after for _, before, after in rows)  # a zero vector changes nothing
    assert "with vector after layer 0" in out
    own = Template("my own", "{input} is to{output};\n", "{input} is to", prefix="Pairs {x}:\n")
    assert call("inject", file(own), "hot")[1].startswith("prompt 'Pairs {x}:\\n hot is to'\n")
    written = tmp_path / "own.json"
    written.write_text(json.dumps(own.to_json()))
    assert call("inject", file("qa"), "hot", "--template", written)[1].startswith("prompt 'Pairs {x}:\\n hot is to'\n")
    assert call("inject", file(own), "hot", "--template", "arrow")[1].startswith("prompt ' hot ->'\n")


def test_a_run_in_an_own_template_and_again(call, tmp_path):
    """From a file, through every part of the run, into its files, and once more from these alone."""
    own = Template("mine", "{input} is to{output};\n", "{input} is to")
    written = tmp_path / "own.json"
    written.write_text(json.dumps(own.to_json()))
    few = ["--n-shots", 2, "--n-prompts", 4, "--n-heads", 2, "--epochs", 1]
    folder = tmp_path / "run"
    code, _, err = call("run", "plural", "--out", folder, "--template", written, *few, "--quiet")
    assert (code, err) == (0, "")
    read = json.loads((folder / "results.json").read_text())
    assert (read["options"]["template"], read["options"]["template_text"]) == ("mine", own.to_json())
    for name in ("vector.safetensors", "vector-finetuned.safetensors"):
        assert FunctionVector.load(folder / name).template == own
    written.unlink()  # the run knows its template
    code, out, _ = call("rerun", folder, "--quiet")
    assert code == 0 and "the same run" in out
    read["options"]["template_text"]["query"] = "nothing"
    (folder / "results.json").write_text(json.dumps(read))
    code, _, err = call("rerun", folder, "--quiet")
    assert code == 2 and "options.template_text: template 'mine': expected {input} exactly once in query" in err


def test_a_template_that_is_none_is_refused(call, tmp_path):
    code, _, err = call("heads", "plural", "--template", tmp_path / "none.json")
    assert code == 2 and "none.json." in err and "no template at" in err
    code, _, err = call("heads", "plural", "--template", "nosuch")
    assert (
        code == 2 and "--template: no template named 'nosuch'; expected one of qa, arrow, colon, or a JSON file" in err
    )


# --- errors ---


def test_unknown_names_are_refused_with_the_nearest(refused):
    assert "no relation named 'antonim'" in refused("run", "antonim")
    assert "did you mean antonym" in refused("heads", "antonim")
    assert "no relation has category 'nosuch'; expected one of" in refused("relations", "--category", "nosuch")
    assert "no relation has family 'nosuch'" in refused("relations", "--family", "nosuch")
    assert "no relation has domain 'nosuch'" in refused("relations", "--domain", "nosuch")
    assert "'rel-smal' is neither a folder nor a model" in refused("run", "antonym", "--model", "rel-smal")
    assert "did you mean rel-small" in refused("heads", "antonym", "--model", "rel-smal")
    assert "no template named 'nosuch'; expected one of qa" in refused("run", "antonym", "--template", "nosuch")


def test_folders_and_files_that_do_not_fit_are_refused(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("something")
    assert refused("run", "antonym", "--out", file) == f"fvlens: --out {file} is a file; give a folder."
    assert file.read_text() == "something"
    assert "holds no config.json" in refused("run", "antonym", "--model", tmp_path)
    assert f"no vector file at {tmp_path / 'none'}" in refused("inject", tmp_path / "none", "hot")
    assert "file: not a safetensors file, or a truncated one" in refused("inject", file, "hot")


def test_a_vector_of_another_model_is_refused(refused, tiny, tmp_path):
    fields = dict(layer=0, heads=(), relation="antonym", fingerprint=fingerprint(tiny))
    file = FunctionVector(vector=torch.ones(tiny.cfg.d_model), **fields).save(tmp_path / "v.safetensors")
    message = refused("inject", file, "hot")
    assert "the vector of 'antonym' was made on model" in message
    assert f"d_model: {tiny.cfg.d_model} / 128" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "Missing argument 'relation'"),
        (["run", "antonym", "--labels", "true"], "'true' is not one of 'permuted', 'random'"),
        (["run", "antonym", "--seed", "x"], "Invalid value for '--seed': Input should be a valid integer"),
        (["run", "antonym", "--n-shots", "0"], "'--n-shots': Input should be greater than or equal to 1"),
        (["run", "antonym", "--n-heads", "33"], "n_heads=33: expected at most 16, half of the model's 32 heads"),
        (["run", "antonym", "--layer", "4"], "layer=4: expected 0..3."),
        (["run", "antonym", "--n-train", "0"], "'--n-train': Input should be greater than or equal to 1"),
        (["run", "antonym", "--epochs", "-1"], "'--epochs': Input should be greater than or equal to 0"),
        (["run", "antonym", "--nosuch"], "No such option: --nosuch"),
        (["run", "antonym", "--n-shots", "60"], "60"),
        (["run", "antonym", "--device", "nosuch"], "nosuch"),
        (["nosuch"], "No such command 'nosuch'"),
        (["inject", "VECTOR"], "Missing argument 'prompt'"),
        (["inject", "VECTOR", " "], "the prompt is empty; give some text."),
        (["inject", "VECTOR", "a" * 40 + " b", "--generate", "500"], "--generate asks for 500 more; the model"),
        (["inject", "VECTOR", "hot", "--top", "0"], "'--top': Input should be greater than or equal to 1"),
        (["inject", "VECTOR", "hot", "--generate", "-1"], "'--generate': Input should be greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused(refused, saved, args, message):
    quiet = ["--quiet"] if args[0] == "run" and len(args) > 1 else []
    assert message in refused(*(saved if arg == "VECTOR" else arg for arg in args), *quiet)


def test_usage_errors_point_to_the_help(refused):
    assert refused("run").endswith("(fvlens --help, or --debug for details)")
    assert not refused("run", "antonim").endswith("details)")


def test_debug_shows_the_traceback(call):
    with pytest.raises(ValueError, match="no relation named 'antonim'"):
        cli.main(["--debug", "run", "antonim"])
    with pytest.raises(ValueError, match="no relation named 'antonim'"):
        cli.main(["run", "antonim", "--debug"])
    assert call("relations", "--domain", "animal", "--debug")[0] == 0


def test_an_interruption_is_one_line(call, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_relation", interrupted)
    assert call("run", "antonym") == (130, "", "fvlens: interrupted\n")


def test_help_names_every_command(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert call() == (code, out, err)
    assert out.count("\n") > 10  # not squeezed into one line, as errors are
    for command in ("run", "rerun", "universal", "relations", "models", "heads", "inject"):
        assert re.search(rf"^  {command} ", out, flags=re.MULTILINE)
        assert call(command, "--help")[0] == 0


# --- as a user runs it ---


def test_commands_work_as_processes():
    done = process("relations", "--category", "spelling")
    spelling = {name: pairs for name, (header, pairs) in library().items() if header["category"] == "spelling"}
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{len(spelling)} relations, {sum(map(len, spelling.values()))} pairs"

    failed = process("run", "antonim")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith("fvlens: no relation named 'antonim'")

    debug = process("run", "antonim", "--debug")
    assert debug.returncode == 1
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert "ValueError: no relation named 'antonim'" in debug.stderr


def test_inject_works_as_a_process(saved):
    done = process("inject", saved, "hot", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == r"prompt 'Q: hot\nA:'"
    assert len(done.stdout.splitlines()) == 7


# Analogies


@pytest.fixture(scope="session")
def composite_file(model, tmp_path_factory):
    """A small composite of the embedded model."""
    from fvlens.composition import library_composite

    made = library_composite(
        model, names=["animal-young", "animal-home", "body-part", "tool-part", "vehicle-part"], gate="threshold",
        setting="one_shot", n_analogies=20, epochs=5, generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip
    return made.save(tmp_path_factory.mktemp("composite") / "small.safetensors")


def test_analogy_prints_answer_weights_and_the_unsteered_answer(call, composite_file):
    code, text, _ = call("analogy", "cow", "calf", "bear", "--composite", composite_file, "--choices", "den, cub,paw")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "cow : calf :: bear : cub"
    assert any(re.match(r" *unsteered, one-shot +cub \d\.\d\d, ", line) for line in lines)
    assert any(re.fullmatch(r" *animal-young +[01]\.\d{3} *", line) for line in lines)
    assert any(re.search(r"gate, one-shot prompt: [01]\.00 of the composite is injected", line) for line in lines)


def test_analogy_says_what_a_transfer_map_takes_the_pair_for(call, composite_file, model, tmp_path):
    from fvlens.composition import CompositeMap, fit_composite, library_analogies

    basis, generator = CompositeMap.load(composite_file).basis, torch.Generator().manual_seed(0)
    asked = library_analogies("train", n=60, names=basis.names, kind="near", generator=generator)
    made = fit_composite(model, basis, asked, map="transfer", epochs=1, generator=generator, progress=False)
    code, text, _ = call("analogy", "cow", "calf", "bear", "--composite", made.save(tmp_path / "made.safetensors"))
    assert code == 0
    first, chance = made.explain(model, "cow", "calf").named(1)[0]
    assert f"cow : calf is taken for: {first} {chance:.2f}, " in text


def test_analogy_refuses_a_single_choice_and_a_strange_file(refused, saved, composite_file):
    hint = "expected at least two different words with commas between them"
    assert hint in refused("analogy", "a", "b", "c", "--choices", "one", "--composite", composite_file)
    assert "antonym.safetensors" in refused("analogy", "cow", "calf", "bear", "--composite", saved)


def test_analogies_evaluates_a_file(call, refused, composite_file, tmp_path):
    file, folder = tmp_path / "some.tsv", tmp_path / "out"
    seen = held_out().split(fvlens.load_relation("animal-young")).train[0]
    file.write_text("".join(f"{seen.input}\t{seen.output}\t{target}\tcub\n" for target in ("bear", "lion")))
    given = ("analogies", file, "--composite", composite_file, "--quiet")
    assert "took part in making the composite" in refused(*given)
    code, text, _ = call(*given, "--allow-leak", "--out", folder)
    assert code == 0
    assert re.search(r"unsteered, one-shot +2 +1\.000 +\[1\.000, 1\.000\]", text)
    assert set(pd.read_csv(folder / "summary.csv")["way"]) >= {"composite, one-shot", "gated composite, one-shot"}
    assert len(pd.read_csv(folder / "analogies.csv")["analogy"].unique()) == 2
    assert (folder / "analogies.html").exists()
    assert call(*given, "--allow-leak", "--limit", "1")[1].count(" 1.000") >= 1


def test_sensitivity_prints_and_writes_its_study(call, composite_file, tmp_path):
    folder = tmp_path / "study"
    code, text, _ = call(
        "sensitivity", "--composite", composite_file, "--n-test", "12", "--n-repeats", "1", "--out", folder, "--quiet"
    )
    assert code == 0
    table = pd.read_csv(folder / "sensitivity.csv")
    for row in table.to_dict("records"):
        assert re.search(rf"{row['change']} +{row['n_basis']:.0f} +{row['top1']:.3f} ", text)
    assert "12 analogies, bare query; unsteered" in text and (folder / "sensitivity.html").exists()


def test_compose_writes_what_analogy_reads(call, refused, monkeypatch, model, tmp_path):
    from fvlens import composition

    asked = {}

    def quick(network, **options):
        asked.update(options)
        return whole(network, **{**options, "names": ["animal-young", "animal-home"], "epochs": 1})

    whole = composition.library_composite
    monkeypatch.setattr(composition, "library_composite", quick)
    file = tmp_path / "made.safetensors"
    code, text, _ = call("compose", "--out", file, "--layer", "2", "--seed", "3", "--quiet")
    assert code == 0 and "2 vectors after layer 2, map none" in text and f"wrote {file}" in text
    assert asked["map"] == "none" and asked["n_analogies"] == 2430 and asked["generator"].initial_seed() == 3
    assert composition.CompositeMap.load(file, model=model).basis.names == ("animal-young", "animal-home")
    assert "expected a name for a file in a folder that exists" in refused("compose", "--out", tmp_path)
