"""``fvlens compose``, ``analogy``, ``analogies`` and ``sensitivity``."""

import re

import pandas as pd
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens.relations import held_out


@pytest.fixture(scope="session")
def composite_file(model, tmp_path_factory):
    """A small composite of the embedded model."""
    from fvlens.composition import library_composite

    made = library_composite(
        model, names=["animal-young", "animal-home", "body-part", "tool-part", "vehicle-part"], gate="threshold",
        setting="one_shot", n_analogies=20, epochs=5, generator=seeded(), progress=False,
    )  # fmt: skip
    return made.save(tmp_path_factory.mktemp("composite") / "small.safetensors")


def test_analogy_prints_answer_weights_and_the_unsteered_answer(call, composite_file):
    code, text, err = call("analogy", "cow", "calf", "bear", "--composite", composite_file, "--choices", "den, cub,paw")
    assert (code, err) == (0, "small.safetensors names the model rel-small\n")
    lines = text.splitlines()
    assert lines[0] == "cow : calf :: bear : cub"
    assert any(re.match(r" *unsteered, one-shot +cub \d\.\d\d, ", line) for line in lines)
    assert any(re.fullmatch(r" *animal-young +[01]\.\d{3} *", line) for line in lines)
    assert any(re.search(r"gate, one-shot prompt: [01]\.00 of the composite is injected", line) for line in lines)


def test_analogy_says_what_a_transfer_map_takes_the_pair_for(call, composite_file, model, tmp_path):
    from fvlens.composition import CompositeMap, fit_composite, library_analogies

    basis, generator = CompositeMap.load(composite_file).basis, seeded()
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


def test_a_composite_says_how_its_model_is_loaded(call, refused, tmp_path):
    from fvlens.composition import library_composite

    half = fvlens.load_model("rel-small", device="cpu", dtype=torch.bfloat16)
    names = ["animal-young", "animal-home"]
    made = library_composite(half, names=names, epochs=1, generator=seeded(), progress=False)
    asked = ("analogy", "cow", "calf", "bear", "--composite", made.save(tmp_path / "half.safetensors"))
    code, out, err = call(*asked, "--device", "cpu")
    assert (code, err) == (0, "half.safetensors names the model rel-small\n")
    assert out.startswith("cow : calf :: bear : ")
    message = refused(*asked, "--dtype", "float32")
    assert "dtype: bfloat16 / float32); leave out --dtype: the file says how its model is loaded." in message


def test_analogies_evaluates_a_file(call, composite_file, tmp_path):
    file, folder = tmp_path / "some.tsv", tmp_path / "out"
    seen = held_out().split(fvlens.load_relation("animal-young")).train[0]
    file.write_text("".join(f"{seen.input}\t{seen.output}\t{target}\tcub\n" for target in ("bear", "lion")))
    given = ("analogies", file, "--composite", composite_file, "--quiet")
    code, _, err = call(*given)
    assert (code, "took part in making the composite" in err) == (2, True)
    assert err.endswith("score all the same with --allow-leak.\n")
    code, text, err = call(*given, "--allow-leak", "--out", folder)
    assert code == 0 and f"{file} is read as tsv; --format decides\n" in err
    assert "is read as" not in call(*given, "--allow-leak", "--format", "tsv", "--limit", 1)[2]
    assert re.search(r"unsteered, one-shot +2 +1\.000 +\[1\.000, 1\.000\]", text)
    assert set(pd.read_csv(folder / "summary.csv")["way"]) >= {"composite, one-shot", "gated composite, one-shot"}
    assert len(pd.read_csv(folder / "analogies.csv")["analogy"].unique()) == 2
    assert (folder / "analogies.html").exists()
    assert call(*given, "--allow-leak", "--limit", "1")[1].count(" 1.000") >= 1


def test_sensitivity_prints_and_writes_its_study(call, refused, composite_file, model, tmp_path):
    from fvlens.composition import CompositeMap, basis_study, library_analogies

    folder = tmp_path / "study"
    given = ("sensitivity", "--composite", composite_file, "--n-test", 12, "--n-repeats", 1, "--out", folder, "--quiet")
    code, text, _ = call(*given)
    assert code == 0
    table = pd.read_csv(folder / "sensitivity.csv")
    for row in table.to_dict("records"):
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        assert f"| {row['change']} | {row['n_basis']:.0f} | {row['top1']:.3f} {interval} | " in text
    assert "12 analogies, bare query; unsteered" in text and "8 of 8 cells" in text
    assert "full basis (5)" in (folder / "sensitivity.html").read_text(encoding="utf-8")
    # each change is that of the library's own function, by itself
    solver = CompositeMap.load(composite_file)
    for change, how in (
        ("full basis", {}),
        ("50% dropped", {"drop": (0.5,)}),
        ("own family removed", {"remove": ("family",)}),
    ):
        g = seeded()
        asked = library_analogies("test", n=12, names=solver.basis.names, n_foils=0, generator=g)
        none = {"drop": (), "merge": None, "noise": (), "remove": ()}
        found = basis_study(model, solver, asked, n_repeats=1, generator=g, progress=False, **(none | how))
        (row,) = table[table.change == change].to_dict("records")
        wanted = found.to_dataframe().iloc[-1]
        for name in ("n_basis", "top1", "low", "high", "difference", "diff_low", "diff_high", "stability"):
            assert row[name] == pytest.approx(wanted[name]), (change, name)
        assert row["unsteered"] == pytest.approx(found.references["unsteered"])
    message = refused(*given[:3], "--relations", "plural", "--out", folder)
    assert "small.safetensors has a basis, so relations have nothing to choose" in message


def test_a_changed_composite_is_another_cell(composite_file, tmp_path):
    from fvlens.studies import STUDIES, Settings

    study = STUDIES["sensitivity"]
    paths = [composite_file, tmp_path / "copy.safetensors", tmp_path / "other.safetensors"]
    paths[1].write_bytes(composite_file.read_bytes())
    paths[2].write_bytes(composite_file.read_bytes() + b" ")
    cells = [study.cells(Settings(options=study.options(composite=path)))[0] for path in paths]
    keys = [cell.key(study, {"weights": "x"}, study.data_hash(cell)) for cell in cells]
    assert keys[0] == keys[1] != keys[2]


def test_compose_writes_what_analogy_reads(call, monkeypatch, model, tmp_path):
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
    assert (
        asked["map"] == "none"
        and asked["start"] == "vector"
        and asked["n_analogies"] == 2430
        and asked["generator"].initial_seed() == 3
    )
    assert composition.CompositeMap.load(file, model=model).basis.names == ("animal-young", "animal-home")
    err = call("compose", "--out", file, "--n-train", "2", "--quiet")[2]
    layer = composition.CompositeMap.load(file, model=model).basis.layer
    assert err == f"layer {layer} was chosen, where function vectors do best together; --layer decides\n"
    err = call("compose", "--out", file, "--start", "zero", "--n-train", "2", "--quiet")[2]
    assert asked["start"] == "zero" and err == "layer 1 was chosen, a third of the way up; --layer decides\n"
