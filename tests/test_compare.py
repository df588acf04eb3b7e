"""The table of trainings and baselines on one relation: every method in it, scored by itself."""

import dataclasses
import warnings

import pandas as pd
import pytest
import torch
from conftest import seeded

import fvlens
from fvlens.training import (
    _adaptations,
    _collateral,
    _compare,
    _methods,
    collateral_change,
    compare,
    evaluate_adapted,
    unrelated_prompts,
)

# --- the table ---

QUICK = {"n_train": 12, "n_heads": 3, "n_shots": 3, "n_prompts": 4, "n_soft": (2,), "epochs": 1}
NAMES = [
    "bare query",
    "3-shot prompting",
    "function vector, 3 heads",
    "activation addition",
    "fine-tuned from vector",
    "fine-tuned from zero",
    "2 soft tokens",
    "LoRA, rank 1",
]


@pytest.fixture(scope="module")
def asked():
    """Every set of prompts that was written while the table was made: (queries, demonstrations)."""
    return []


@pytest.fixture(scope="module")
def table(model, asked):
    with pytest.MonkeyPatch.context() as patch:
        real = fvlens.prompts.render_prompts

        def spy(model, queries, demonstrations, **how):
            asked.append((tuple(queries), {pair for shown in demonstrations for pair in shown}))
            return real(model, queries, demonstrations, **how)

        for module in (fvlens.prompts._prompts, _adaptations, _collateral):
            patch.setattr(module, "render_prompts", spy)
        return compare(model, "country-capital", n_unrelated=5, progress=False, **QUICK)


def test_the_table_has_every_method(model, table):
    d = model.cfg.d_model
    assert [row.name for row in table.rows] == NAMES
    assert [row.n_trainable for row in table.rows] == [0, 0, 0, 0, d, d, 2 * d, 16 * d]
    assert table.complete and table.relation == "country-capital"
    relation = fvlens.load_relation("country-capital")
    split = relation.split(seeded())
    assert (table.n_train, table.n_valid, table.n_test) == (12, len(split.valid), len(split.test))
    prompts = unrelated_prompts(model, relation, n=5, generator=seeded())
    for row in table.rows:
        again = evaluate_adapted(model, split.test, row.adapted, relation=relation.name, generator=seeded())
        assert torch.equal(again.ranks, row.evaluation.ranks) and again.interval == row.evaluation.interval
        change = collateral_change(model, row.adapted, prompts, generator=seeded())
        assert torch.equal(change.divergences, row.collateral.divergences)
    assert table["bare query"].collateral.mean == 0.0
    tuned, start = table["fine-tuned from vector"], table["function vector, 3 heads"]
    assert tuned.seconds == start.seconds + tuned.adapted.seconds
    recipe = fvlens.find_vector(
        model, dataclasses.replace(split, train=split.train[:12]), relation=relation.name, n_heads=3,
        n_shots=QUICK["n_shots"], n_prompts=QUICK["n_prompts"], generator=seeded(), progress=False,
    )  # fmt: skip
    assert (table.layer, table.scale) == (recipe.layer, recipe.scale)
    assert torch.equal(start.adapted.vector.vector, recipe.vector.vector)
    assert f"after layer {recipe.layer}, the function vector times {recipe.scale:g}, seed 0" in table.describe()
    assert {table[name].adapted.vector.layer for name in (NAMES[2], *NAMES[4:6])} == {table.layer}
    assert len(table["activation addition"].adapted.choices) == 4 * model.cfg.n_layers
    with pytest.raises(ValueError, match="no method 'magic' here; there are bare query, 3-shot prompting"):
        table["magic"]


def test_test_pairs_are_used_for_nothing_but_scores(table, asked):
    split = fvlens.load_relation("country-capital").split(seeded())
    test, train = set(split.test), set(split.train[:12])
    scored = 0
    for queries, shown in asked:
        assert not shown & test
        if set(queries) & test:
            scored += 1
            assert queries == split.test and shown <= train
    assert scored == len(NAMES) + 2  # demonstrations are written in three steps: the bare query, the draw, the whole
    trained_on = [queries for queries, _ in asked if set(queries) & train]
    assert trained_on


def test_the_table_can_be_read_and_saved(table, tmp_path):
    frame = table.to_dataframe()
    assert frame["method"].tolist() == NAMES
    assert frame["top1"].tolist() == [row.evaluation.top1 for row in table.rows]
    assert frame["kl"].tolist() == [row.collateral.divergences.double().mean().item() for row in table.rows]
    text, values, whole = table.save(tmp_path / "new")
    assert (text.name, values.name, whole.name) == ("compare.md", "compare.csv", "compare.safetensors")
    assert sorted(path.name for path in text.parent.iterdir()) == [values.name, text.name, whole.name]
    read = pd.read_csv(values)
    assert read["method"].tolist() == NAMES
    assert read["top1"].tolist() == pytest.approx(frame["top1"].tolist())
    lines = text.read_text().splitlines()
    assert lines[1].startswith("| --- | ---: |") and len(lines) == 2 + len(NAMES) + 2
    for line, row in zip(lines[2:], table.rows, strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        low, high, _ = row.evaluation.interval
        assert cells[0] == row.name and cells[1] == f"{row.n_trainable:,}"
        assert cells[3:6] == [f"{row.evaluation.top1:.2f}", f"{low:.2f} to {high:.2f}", f"{row.collateral.mean:.3f}"]
    assert "12 training" in lines[-1] and "5 prompts of other relations, in nats" in lines[-1]


def test_the_table_can_be_drawn(table, unchecked):
    for quantity, values in (
        ("top1", [row.evaluation.top1 for row in table.rows]),
        ("collateral", [row.collateral.mean for row in table.rows]),
    ):
        (bars,) = table.plot(quantity).data
        assert list(bars.x) == pytest.approx(values)
    with pytest.raises(ValueError, match="quantity='norm'; expected 'top1' or 'collateral'"):
        table.plot("norm")


def test_an_interrupted_table_keeps_what_is_finished(model, table, monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_methods, "act_add", stop)
    with pytest.warns(UserWarning, match="compare was interrupted: 3 of 8 methods are finished"):
        part = compare(model, "country-capital", n_unrelated=5, progress=False, **QUICK)
    assert not part.complete and [row.name for row in part.rows] == NAMES[:3]
    for ours, theirs in zip(part.rows, table.rows, strict=False):  # the same seed, the same bits
        assert torch.equal(ours.evaluation.ranks, theirs.evaluation.ranks)
        assert torch.equal(ours.collateral.divergences, theirs.collateral.divergences)
        assert ours.collateral.interval == theirs.collateral.interval
    page, values, _ = part.save(tmp_path)
    assert "Interrupted: the methods that are not here were not reached." in page.read_text(encoding="utf-8")
    assert not pd.read_csv(values).complete.any()
    assert "complete" not in table.to_dataframe() and "Interrupted" not in table.describe()
    assert "interrupted" in part.plot().layout.title.text
    monkeypatch.setattr(_compare, "evaluate_adapted", stop)
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        compare(model, "country-capital", n_unrelated=5, progress=False, **QUICK)


def test_a_method_is_one_row_of_the_table(model, monkeypatch):
    """What is planned there is made, scored and counted; keywords of trainings reach all that are trained."""

    def borrowed(budget):
        assert budget.settings.l2 == 0.5
        return [_methods.Planned(lambda: budget.start, "borrowed", 100.0)]

    monkeypatch.setattr(_compare, "METHODS", [_methods._untuned, borrowed, _methods._low_rank])
    found = compare(model, "country-capital", n_unrelated=5, l2=0.5, progress=False, **QUICK)
    assert [row.name for row in found.rows] == [NAMES[2], "borrowed", "LoRA, rank 1"] and found.complete
    assert found.rows[1].seconds == 100.0 + found.rows[0].seconds
    assert torch.equal(found.rows[1].evaluation.ranks, found.rows[0].evaluation.ranks)
    assert found.rows[2].adapted.settings.l2 == 0.5
    with pytest.raises(ValueError, match="compare: resume and checkpoint are for one training"):
        compare(model, "country-capital", checkpoint="state")


def test_the_command_prints_and_writes_the_table(tmp_path, capsys, monkeypatch):
    from fvlens import cli

    main = cli.main
    monkeypatch.setattr(cli.out, "width", 120)
    folder = tmp_path / "out"
    options = "--n-train 12 --n-shots 3 --n-prompts 4 --n-heads 3 --layer 1 --epochs 1 --n-unrelated 5 --quiet"
    arguments = ["compare", "country-capital", "--out", str(folder), "--device", "cpu", *options.split()]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    shown, _ = capsys.readouterr()
    frame = pd.read_csv(folder / "compare.csv")
    names = [*NAMES[:6], "1 soft token", "8 soft tokens", NAMES[-1]]
    assert frame["method"].tolist() == names
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    for line, row in zip(lines[2:], frame.itertuples(), strict=True):
        assert line.startswith(f"| {row.method} | {row.n_trainable:,.0f} | ")
        assert f" | {row.top1:.2f} [{row.top1_low:.2f}, {row.top1_high:.2f}] | {row.kl:.3f} [" in line
    assert f"wrote {folder / 'compare.md'}" in shown and "vectors after layer 1, the function vector times" in shown
    assert (folder / "compare.md").read_text().count("\n| ") == len(names) + 1
    # the same numbers as the library's own function
    found = compare(
        fvlens.load_model("rel-small", device="cpu"), "country-capital", n_train=12, n_shots=3, n_prompts=4, n_heads=3,
        layer=1, epochs=1, n_unrelated=5, progress=False,
    )  # fmt: skip
    assert frame["top1"].tolist() == pytest.approx([row.evaluation.top1 for row in found.rows])
    assert frame["kl"].tolist() == pytest.approx([row.collateral.mean for row in found.rows])
    assert frame["kl_high"].tolist() == pytest.approx([row.collateral.interval.high for row in found.rows])
    assert set(frame["scale"]) == {found.scale} and set(frame["n_test"]) == {found.n_test}
    with pytest.raises(SystemExit) as end:
        main(["compare", "magic", "--out", str(folder)])
    assert end.value.code == 2 and "magic" in capsys.readouterr().err


def test_a_comparison_says_that_heads_were_taken_that_do_not_help(tiny, monkeypatch):
    from fvlens import find

    original = find.indirect_effects
    how = dict(QUICK, n_unrelated=2, progress=False)
    assert compare(tiny, "country-capital", **how).caution == ""

    def shifted(*args, **given):  # two heads help
        found = original(*args, **given)
        return dataclasses.replace(found, cie=found.cie - found.aie.flatten().sort(descending=True).values[1:3].mean())

    monkeypatch.setattr(find, "indirect_effects", shifted)
    found = compare(tiny, "country-capital", **how)
    assert found.caution.startswith("1 of the 3 best heads have an exact AIE of 0 or less (L")
    assert found.describe().endswith(f"Heads: {found.caution}") and found.caution in found.to_markdown()
