"""``fvlens heads`` and ``universal``, and a run with the heads of a file."""

import dataclasses
import json
import re

import pandas as pd
import pytest
import torch
from commands import cells, library
from conftest import seeded

import fvlens
from fvlens import FunctionVector, studies
from fvlens.universal import UniversalHeads


def test_universal_writes_heads_that_run_takes(call, model, tmp_path):
    path = tmp_path / "heads.json"
    names = ("antonym", "plural", "capitalised")
    code, out, err = call(
        "universal", *names, "--n-heads", 3, "--n-prompts", 6, "--n-shots", 4, "--seed", 5, "--out", path, "--quiet"
    )
    assert (code, err) == (0, "")
    # each relation draws from the seed by itself
    alone = [
        fvlens.universal_heads(model, [name], 3, n_prompts=6, n_shots=4, generator=seeded(5), progress=False)
        for name in names
    ]
    loaded = expected = UniversalHeads.load(path, model=model)
    for i, one in enumerate(alone):
        assert torch.equal(loaded.aie[i], one.aie[0]) and torch.equal(loaded.prompt_stderr[i], one.prompt_stderr[0])
        assert torch.equal(loaded.icl_top1[i], one.icl_top1[0]) and torch.equal(loaded.majority[i], one.majority[0])
        assert torch.equal(loaded.icl_interval[i], one.icl_interval[0])
    assert (loaded.relations, loaded.n, loaded.path, loaded.n_shots, loaded.complete) == (names, 3, one.path, 4, True)
    assert loaded.data_hashes == tuple(fvlens.load_relation(name).data_hash for name in names)
    assert {file.name for file in tmp_path.iterdir()} == {"heads.json", "heads.html", "heads-study"}
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert "capitalised" in page
    rows = cells(out)
    said = "mean over 3 relations on rel-small, permuted labels, 3 of 3 cells"
    assert rows[:2] == [[said], ["head", "mean AIE", "standard error"]]
    assert rows[2:5] == [[str(h), f"{expected.mean[h]:.4f}", f"{expected.stderr[h]:.4f}"] for h in expected.heads]
    written = [
        path,
        tmp_path / "heads.html",
        *(tmp_path / "heads-study" / name for name in ("universal.csv", "rows.csv")),
    ]
    assert out.splitlines()[-4:] == [f"wrote {file}" for file in written]
    table = pd.read_csv(tmp_path / "heads-study" / "universal.csv")
    assert [(row.layer, row.head) for row in table[:3].itertuples()] == expected.heads
    assert table.aie[:3].tolist() == pytest.approx([float(expected.mean[head]) for head in expected.heads], abs=1e-7)

    folder = tmp_path / "run"
    code, out, err = call(
        "run", "antonym", "--heads", path, "--n-prompts", 6, "--n-shots", 4, "--n-others", 0, "--n-random", 1,
        "--epochs", 0, "--out", folder, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, f"{path.name} names the model rel-small\n")
    given, *_ = out.splitlines()
    assert given == f"3 heads from {path} (universal heads of this model, 3 relations, permuted labels)"
    read = json.loads((folder / "results.json").read_text())
    assert (read["heads_source"], read["options"]["heads_file"]) == ("file", str(path))
    assert [entry[:2] for entry in read["heads"]] == [list(head) for head in expected.heads]
    g = seeded()
    split = fvlens.load_relation("antonym").split(g)
    clean = fvlens.build_prompts(
        model, split.train, queries=split.valid, n_prompts=6, n_shots=4, relation="antonym", generator=g
    )
    means = fvlens.mean_head_activations(model, clean, progress=False)
    vector = fvlens.function_vector(model, means, heads=expected.heads, layer=read["layer"])
    assert torch.equal(FunctionVector.load(folder / "vector.safetensors").vector, (read["scale"] * vector).vector)


def test_universal_takes_the_library_or_a_part_of_it(call, monkeypatch, tmp_path):
    seen = []

    def stop(study, cells, folder, **options):
        seen.append((cells, folder))
        raise ValueError("enough")

    monkeypatch.setattr("fvlens.studies.run_study", stop)
    monkeypatch.chdir(tmp_path)
    call("universal")
    call("universal", "--family", "part", "--n-heads", 4)
    call("universal", "--category", "translation", "--limit", 2, "--labels", "random", "--template", "arrow", "--quiet")
    headers = {name: header for name, (header, _) in sorted(library().items())}
    translations = [name for name, header in headers.items() if header["category"] == "translation"]
    assert [[cell.relation for cell in cells] for cells, _ in seen] == [
        list(headers), [name for name, header in headers.items() if header["family"] == "part"], translations[:2],
    ]  # fmt: skip
    assert {cell.seed for cell in seen[0][0]} == {0} and str(seen[0][1]) == "heads-study"
    assert dict(seen[2][0][0].options) == {
        "n_shots": 10, "n_prompts": 100, "n_corrupted": 25, "labels": "random", "template": "arrow",
        "bos": None,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


SMALL = ("--n-shots", 3, "--n-prompts", 4, "--n-corrupted", 2, "--n-heads", 2)


def test_universal_that_was_stopped_goes_on(call, monkeypatch, tmp_path):
    own = studies._universal.carried
    names = ("antonym", "plural", "capitalised")

    def carried(model, split, *, relation, **how):
        if relation == "capitalised":
            raise KeyboardInterrupt
        return own(model, split, relation=relation, **how)

    with monkeypatch.context() as patch:
        patch.setattr(studies._universal, "carried", carried)
        with pytest.warns(UserWarning, match="study universal was interrupted: 2 of 3 cells are finished"):
            code, out, err = call("universal", *names, "--out", tmp_path / "h.json", *SMALL)
    assert code == 130 and err.endswith("\nfvlens: interrupted\n") and "2 of 3 cells" in out
    assert "interrupted" in (tmp_path / "h.html").read_text(encoding="utf-8")
    with pytest.warns(UserWarning, match=r"h\.json: the search for these heads was interrupted after 2 relations"):
        part = UniversalHeads.load(tmp_path / "h.json")
    assert part.relations == names[:2]
    code, out, err = call("universal", *names, "--out", tmp_path / "h.json", *SMALL)
    assert code == 0 and "2 of 3 cells were finished before\n" in err
    assert call("universal", *names, "--out", tmp_path / "whole.json", *SMALL, "--quiet")[0] == 0
    whole = (tmp_path / "whole.json").read_text()
    assert (tmp_path / "h.json").read_text() == whole and UniversalHeads.load(tmp_path / "h.json").complete


def test_universal_names_what_is_left_out(call, model, monkeypatch, tmp_path):
    own = studies._universal.carried

    def carried(model, split, *, relation, **how):
        found = own(model, split, relation=relation, **how)
        return dataclasses.replace(found, majority=1.0 if relation == "plural" else 0.0)

    monkeypatch.setattr(studies._universal, "carried", carried)
    code, out, _ = call("universal", "antonym", "plural", "--out", tmp_path / "h.json", *SMALL, "--quiet")
    assert code == 0
    assert "left out, 3 demonstrations do not beat the majority label: plural\n" in out
    found = UniversalHeads.load(tmp_path / "h.json")
    first, second, *_ = cells(out)[2:]  # one relation has no standard error
    assert [first, second] == [[str(head), f"{found.mean[head]:.4f}"] for head in found.heads]
    table = pd.read_csv(tmp_path / "h-study" / "universal.csv")
    assert table.aie[0] == pytest.approx(float(found.aie[0].max())) and set(table.n_relations) == {1}


def test_heads_that_do_not_fit_are_refused(refused, tiny, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text("[[1, 2], [9, 0]]")
    assert "heads.json: heads: L9H0 does not exist: the model has layers 0..3" in refused(
        "run", "plural", "--heads", path
    )
    assert f"no file of heads at {tmp_path / 'none'}." in refused("run", "plural", "--heads", tmp_path / "none")
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": "fvlens-heads-1", "fingerprint": {"name": "x"}}')
    assert "damaged.json: damaged field 'fingerprint' (fingerprint: expected the fields " in refused(
        "run", "plural", "--heads", damaged
    )
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
        (["plural", "--out", "x.html"], "--out x.html: expected the name of a .json file, such as x.json."),
        (["plural", "--out", "."], "--out . is a folder; give the name of a file, such as result.json."),
        (["plural", "--out", "none/h.json"], "--out none/h.json: folder none does not exist; create it first."),
        (["plural", "--n-heads", "33"], "--n-heads: expected 1 to 32 (all heads), got 33."),
        (["plural", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["plural", "plural"], "two relations are named 'plural'; names must be unique"),
    ],
)
def test_universal_refuses(refused, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("universal", *args, "--quiet")
    assert list(tmp_path.iterdir()) == []


# --- heads ---


@pytest.mark.parametrize("labels", ["permuted", "random"])
def test_heads_prints_the_effects_of_the_best_heads(call, model, labels):
    code, out, err = call(
        "heads", "plural", "--n-prompts", 8, "--n-heads", 4, "--labels", labels, "--seed", 2, "--template", "arrow",
        "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    g = seeded(2)
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
    said = re.search(r"(\d+) of the 32 best heads have an exact AIE of 0 or less \(L\dH\d, ", " ".join(out.split()))
    assert said is not None and int(said[1]) >= n_below
    assert "exact AIE of 0" not in call("heads", "plural", "--n-prompts", 4, "--n-heads", 2, *options, "--quiet")[1]
    code, out, err = call("heads", "plural", "--n-prompts", 4, "--n-heads", 33, "--quiet")
    assert code == 2 and "expected n between 1 and 32 (all heads), got 33" in err


def test_heads_prints_a_screen_and_its_recheck(call, model):
    code, out, err = call(
        "heads", "plural", "--n-prompts", 8, "--n-heads", 4, "--method", "atp", "--recheck", 3, "--quiet"
    )  # fmt: skip
    assert (code, err) == (0, "")
    g = seeded()
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
    assert err.startswith("fvlens: indirect_effects: --recheck 3 runs the best heads of a screen again; --method exact")
