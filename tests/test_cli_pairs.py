"""Commands on one's own files of pairs: checked, run, run again, and taken wherever a relation is."""

import json

import pytest
from commands import cells
from runs import Page

import fvlens

WORDS = fvlens.load_relation("plural").pairs[:44]
FEW = ("--n-shots", 2, "--n-prompts", 4, "--n-heads", 3, "--quiet")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A file as a spreadsheet program writes it: semicolons, a heading, stray blanks, a pair twice."""
    path = tmp_path_factory.mktemp("own") / "my words.csv"
    lines = ["Wort;Mehrzahl", *(f"{a};{b}" for a, b in WORDS), f"{WORDS[0].input} ;{WORDS[0].output}"]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.fixture(scope="module")
def folder(mine, tmp_path_factory):
    """Two relations."""
    path = tmp_path_factory.mktemp("two")
    (path / "one.csv").write_text("".join(f"{a},{b}\n" for a, b in WORDS))
    (path / "two.jsonl").write_text("".join(json.dumps([b, a]) + "\n" for a, b in WORDS))
    return path


def test_check_says_what_a_file_is_worth(call, mine):
    code, out, err = call("relations", "check", mine)
    assert (code, err) == (0, "")
    rows = dict(row for row in cells(out) if len(row) == 2)
    split = fvlens.relations.reading_of(mine).relation.split(
        fvlens.relations._relation.torch.Generator().manual_seed(0)
    )
    assert (rows["pairs kept"], rows["dropped, stand twice"]) == ("44", "1")
    assert rows["train, valid, test pairs"] == ", ".join(str(len(p)) for p in (split.train, split.valid, split.test))
    assert rows["20 pairs to train on"] == "yes" and "answers of one token" not in rows
    assert f"dropped, line 46: {WORDS[0].input} -> {WORDS[0].output} (stands twice)" in out
    assert "line 1 ('Wort', 'Mehrzahl') was taken for a heading" in out and "1 word had white space" in out


def test_check_with_a_model_counts_its_tokens(call, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('{"hot": "coldx", "big": "coldq", "old": "new"}')
    code, out, _ = call("relations", "check", path, "--model", "rel-small")
    rows = dict(row for row in cells(out) if len(row) == 2)
    assert code == 0 and rows["answers that share their first token"] == "2 of 3 different"
    assert "2 of 3 different answers share their first token with another" in out


def test_check_refuses_what_it_cannot_read(refused, tmp_path, folder, call):
    (tmp_path / "bad.csv").write_text("hot,cold\nbig\n")
    assert "bad.csv, line 2: expected two words" in refused("relations", "check", tmp_path / "bad.csv")
    assert "no file 'nosuch', and no relation named 'nosuch'" in refused("relations", "check", "nosuch")
    assert "--device without --model; say which model." in refused("relations", "check", folder, "--device", "cpu")
    assert "line 2: expected two words" in refused("heads", tmp_path / "bad.csv", *FEW)
    code, out, _ = call("relations", "check", folder)
    assert code == 0 and out.count("pairs kept") == 2


@pytest.fixture(scope="module")
def ran(mine, tmp_path_factory):
    """The folder of a run on the file."""
    from fvlens import cli

    out = tmp_path_factory.mktemp("run") / "out"
    options = ("--n-corrupted", 3, "--n-random", 1, "--n-others", 0, "--epochs", 1)
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in ("run", mine, *FEW, *options, "--out", out)])
    assert not end.value.code
    return out


def test_a_run_on_a_file_keeps_its_pairs(ran, mine):
    results = json.loads((ran / "results.json").read_text())
    assert results["relation"] == "my words"
    assert results["pairs"]["file"] == str(mine) and len(results["pairs"]["file_hash"]) == 16
    assert [tuple(pair) for pair in results["pairs"]["list"]] == [tuple(pair) for pair in WORDS]
    assert results["data_hash"] == fvlens.Relation("x", WORDS).data_hash
    assert results["exact"]["icl"] == results["icl_top1"]  # answers of one token
    page = Page((ran / "report.html").read_text())
    facts = dict(page.tables["provenance"])
    assert f"44 pairs from {mine}" in facts["relation"] and facts["again"].startswith("fvlens rerun ")


def test_it_runs_again_without_the_file(ran, mine, call, tmp_path):
    moved = mine.rename(mine.with_name("gone.csv"))
    try:
        code, out, _ = call("rerun", ran, "--out", tmp_path / "again", "--quiet")
    finally:
        moved.rename(mine)
    assert code == 0 and "the same run: " in out
    assert json.loads((tmp_path / "again" / "results.json").read_text())["pairs"]["list"] is not None


def test_damaged_pairs_are_refused_by_name(ran, tmp_path):
    from fvlens.report import read_run

    content = json.loads((ran / "results.json").read_text())
    for damaged, message in (([["hot"]], "pair 1: expected a pair of two words"), (None, "expected list, got None")):
        content["pairs"]["list"] = damaged
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"pairs\.list: {message}"):
            read_run(tmp_path)


def test_a_results_file_names_no_file_of_pairs_as_its_relation(ran, tmp_path, mine):
    from fvlens.report import read_run

    content = json.loads((ran / "results.json").read_text())
    content |= {"pairs": None, "relation": str(mine)}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="relation: no relation named"):
        read_run(tmp_path)


def test_files_and_folders_are_taken_wherever_relations_are(call, mine, folder, tmp_path, monkeypatch):
    few = (*FEW[:-1], "--n-corrupted", 3, "--quiet")
    code, out, err = call("heads", mine, *few)
    assert code == 0 and "my words, permuted labels" in out and "my words: line 1 ('Wort'" in err
    assert err.startswith(f"{mine}: a file of 44 word pairs, the relation my words\n")
    options = ("--n-train", 4, "--epochs", 1, "--quiet")
    code, out, _ = call("compose", folder, *options, "--out", tmp_path / "own.safetensors")
    assert code == 0 and "2 vectors after layer" in out
    assert fvlens.composition.CompositeMap.load(tmp_path / "own.safetensors").basis.names == ("one", "two")
    seen = []

    def stop(study, cells, folder, **options):
        seen.append((study.name, [cell.relation for cell in cells]))
        raise ValueError("enough")

    monkeypatch.setattr("fvlens.studies.run_study", stop)
    monkeypatch.chdir(tmp_path)
    files = [str(folder / "one.csv"), str(folder / "two.jsonl")]
    call("universal", folder, "plural")
    call("compare", mine)
    call("study", "screening", "--relations", folder)
    assert seen[0] == ("universal", [*files, "plural"]) and seen[1] == ("compare", [str(mine)])
    assert set(seen[2][1]) == set(files)
