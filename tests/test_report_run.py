"""How a run goes: no look at the test pairs, options, fine-tuning, heads from a file, refusals."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import seeded
from runs import SMALL, TINY, Page, best, bootstrap, of_kind, ranked, right, same

import fvlens
from fvlens import FunctionVector, Relation, find, finetune, report
from fvlens.find import relation_effects
from fvlens.relations import Pair
from fvlens.report import (
    RunOptions,
    other_relations,
    rerun,
    results_json,
    run_relation,
    write_run,
)
from fvlens.types import Head
from fvlens.universal import read_heads

# --- how the run goes ---


def test_test_pairs_are_used_for_nothing_but_the_scores(watched):
    result, calls, _ = watched
    split = result.split
    test = {word for pair in split.test for word in pair}
    scored = [i for i, call in enumerate(calls) if call.prompts.queries == split.test]
    found = [(i, call) for i, call in enumerate(calls) if i not in scored]
    assert scored
    assert max(i for i, _ in found) < min(scored)  # everything is settled before the first test query is asked
    own = [call.prompts for _, call in found if call.prompts.relation == "antonym"]
    assert sorted(prompts.labels for prompts in own) == ["permuted", "random", "true", "true", "true"]
    assert split.disjoint == "both"
    for prompts in own:
        assert not test & {word for pair in prompts.queries for word in pair}
        shown = [pair for row in prompts.demonstrations for pair in row]
        assert not test & {pair.input for pair in shown}
        if prompts.labels != "random":  # random labels are answers of other relations
            assert not test & {pair.output for pair in shown}
        assert set(prompts.queries) <= set(split.valid)
    (trained,) = [call.prompts for _, call in found if call.module == "training._prepared"]
    own, other = trained.queries[: 20 + len(split.valid)], trained.queries[20 + len(split.valid) :]
    assert own == split.train[:20] + split.valid
    assert set(other) <= set(fvlens.load_relation(result.others[0]).pairs)
    others = {call.prompts.relation for _, call in found if call.module != "training._prepared"} - {"antonym"}
    assert others == set(result.others)
    for i in scored:  # the demonstrations of the scores are train pairs
        shown = {pair.input for row in calls[i].prompts.demonstrations for pair in row}
        assert shown <= {pair.input for pair in split.train}


def test_options_reach_the_prompts(watched):
    _, calls, _ = watched
    built = [call.prompts for call in calls if call.module == "find"]
    by_labels = defaultdict(set)
    for prompts in built:
        by_labels[prompts.labels].add((len(prompts), prompts.n_shots, prompts.template.name))
    assert dict(by_labels) == {"true": {(20, 10, "qa")}, "permuted": {(8, 10, "qa")}, "random": {(8, 10, "qa")}}


def test_same_seed_gives_the_same_run_and_another_seed_another(tiny, tiny_result, numbers, watched):
    again, _, wall = watched
    assert 0 < again.seconds <= wall
    timeless = {"seconds": 0, "ffv_seconds": 0}
    assert {**results_json(again), **timeless} == {**numbers, **timeless}
    antonym = fvlens.load_relation("antonym")
    torch.randn(3)  # the global generator plays no part
    twice = run_relation(tiny, antonym, options=TINY, progress=False)
    assert torch.equal(twice.vector.vector, tiny_result.vector.vector)
    other = run_relation(tiny, antonym, options=dataclasses.replace(TINY, seed=1), progress=False)
    assert other.split.test != tiny_result.split.test
    assert not torch.equal(other.effects["permuted"].cie, tiny_result.effects["permuted"].cie)


def test_run_leaves_the_global_generator_and_the_model_alone(tiny):
    before, weights = torch.get_rng_state(), [p.clone() for p in tiny.parameters()]
    run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny.parameters(), strict=True))
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in tiny.hook_dict.values())


def test_vectors_are_made_of_the_heads_that_were_found(model, result):
    g = seeded()
    split = fvlens.load_relation("antonym").split(g)
    drawn = dict(relation="antonym", n_prompts=20, n_corrupted=8, progress=False)
    means, permuted = relation_effects(model, split, generator=g, **drawn)
    _, random = relation_effects(model, split, labels="random", means=means, generator=g, **drawn)
    for ranking, effects in {"permuted": permuted, "random": random}.items():
        torch.testing.assert_close(effects.cie, result.effects[ranking].cie, rtol=0, atol=0)
        heads = [Head(layer, head) for layer, head, *_ in ranked(effects, 10)]
        vector = sum(means.z[layer, head] @ model.W_O[layer, head].detach() for layer, head in heads)
        scale = best(result.sweeps[ranking])[1]
        torch.testing.assert_close(result.vectors[ranking].vector, scale * vector, rtol=1e-4, atol=1e-5)
        assert result.vectors[ranking].seed == 0
    assert result.vector is result.vectors["permuted"]


def test_only_the_labels_asked_for_are_ranked_and_a_comparison_moves_no_number(tiny):
    relation = fvlens.load_relation("antonym")
    found = {
        (labels, both): run_relation(
            tiny, relation, options=dataclasses.replace(TINY, labels=labels, both_labels=both), progress=False
        )
        for labels, both in itertools.product(("permuted", "random"), (False, True))
    }
    for labels, other in (("permuted", "random"), ("random", "permuted")):
        alone, both = found[labels, False], found[labels, True]
        assert list(alone.effects) == list(alone.vectors) == [labels]
        assert list(both.effects) == list(both.vectors) == [labels, other]
        assert alone.effects[labels].labels == labels and both.effects[other].labels == other
        a, b = results_json(alone), results_json(both)
        assert list(a["rankings"]) == [labels] and list(b["rankings"]) == [labels, other]
        changed = {
            "rankings",
            "options",
            "seconds",
            "platform",
            "cautions",
            "fv_random_labels_top1",
            "intervals",
            "exact",
        }
        assert {name for name in a if a[name] != b[name]} <= changed | {"ffv_seconds"}
        assert a["rankings"][labels] == b["rankings"][labels]
        # and each ranking is, where it can be compared, the one that a run of its own finds
        assert torch.equal(alone.effects[labels].cie, found[labels, True].effects[labels].cie)


def test_a_given_scale_and_layer_are_taken(tiny):
    options = dataclasses.replace(TINY, layer=1, scale=2.0)
    found = run_relation(tiny, fvlens.load_relation("antonym"), options=options, progress=False)
    assert (found.vector.layer, found.scale, found.at_scale_one) == (1, 2.0, None)
    plain = run_relation(
        tiny, fvlens.load_relation("antonym"), options=dataclasses.replace(options, scale=1.0), progress=False
    )
    assert torch.equal(found.vector.vector, 2 * plain.vector.vector)
    assert plain.at_scale_one is plain.steered["permuted"]
    numbers = results_json(found)
    assert numbers["fv_scale_one_top1"] is numbers["choice"]["scale_one"] is None
    assert not any("the same at scale 1" in name for name, *_ in [*found.summary(), *plain.summary()])


def test_a_scale_is_a_finite_number(unchecked):
    assert repr(RunOptions(scale=2).scale) == "2.0"  # as it comes back from results.json
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        RunOptions(scale=float("nan"))


def test_controls_are_scaled_as_the_vector_is(model, result):
    """Random vectors have the norm of what is injected; every row of one vector says its scale."""
    scale = result.scale
    assert scale != 1  # else nothing is tested here
    rows = {row.kind: row for row in result.controls.rows}
    assert {one.scale for kind in ("vector", "random_vector", "random_heads", "other_relation")
            for one in rows[kind].evaluations} == {scale}  # fmt: skip
    again = fvlens.evaluate(model, result.split.test, vector=result.vector, generator=seeded())
    torch.testing.assert_close(again.probabilities, result.steered["permuted"].probabilities)


def test_without_other_relations_the_number_is_null(tiny_result):
    numbers = results_json(tiny_result)
    assert numbers["other_relation_top1"] is None
    assert numbers["intervals"]["other_relation_top1"] is None
    assert numbers["other_relations"] == []
    assert not any("other relations" in name for name, *_ in tiny_result.summary())
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_a_run_says_that_it_took_heads_that_do_not_help(tiny, tmp_path, monkeypatch):
    """In the result, its file, its page and on the command line; nothing is said where all heads help."""
    original = find.indirect_effects

    def shifted(*args, **given):  # two heads help
        found = original(*args, **given)
        return dataclasses.replace(found, cie=found.cie - found.aie.flatten().sort(descending=True).values[1:3].mean())

    relation, options = (
        fvlens.load_relation("antonym"),
        dataclasses.replace(TINY, n_others=1, epochs=0, both_labels=True),
    )
    assert run_relation(tiny, relation, options=options, progress=False).cautions == ()
    monkeypatch.setattr(find, "indirect_effects", shifted)
    found = run_relation(tiny, relation, options=options, progress=False)
    wheres = ["permuted labels", "random labels", f"vector of {found.others[0]}"]
    assert [caution.split(": ")[0] for caution in found.cautions] == wheres
    for caution in found.cautions:
        assert "1 of the 3 best heads have an exact AIE of 0 or less" in caution
    assert found.vector.heads == tuple(found.effects["permuted"].ranking[:3])
    files = write_run(found, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["cautions"] == list(found.cautions)
    page = files[-1].read_text()
    assert all(f"<li>{caution}</li>" in page for caution in found.cautions)


def test_layer_and_labels_can_be_chosen(tiny):
    options = dataclasses.replace(TINY, layer=1, labels="random", template="arrow", seed=5)
    found = run_relation(
        tiny, fvlens.load_relation("antonym"), options=options, model_name="my model", progress=False
    )  # fmt: skip
    assert {vector.layer for vector in found.vectors.values()} == {1}
    assert found.vector is found.vectors["random"]
    assert (str(found.vector.template), found.vector.seed, found.model_name) == ("arrow", 5, "my model")
    control = next(row for row in found.controls.rows if row.kind == "vector").evaluations[0]
    assert torch.equal(control.probabilities, found.steered["random"].probabilities)
    assert results_json(found)["options"]["labels"] == "random"


@pytest.mark.parametrize("part", ["indirect_effects", "layer_scale_sweep", "controls", "finetune_many"])
def test_an_interrupted_part_ends_the_run(tiny, monkeypatch, part):
    """Its partial result would pass for the whole."""
    room = find if part in ("indirect_effects", "layer_scale_sweep") else report._run
    original = getattr(room, part)

    def interrupted(*args, **kwargs):
        whole = original(*args, **kwargs)
        if part == "finetune_many":
            *runs, last = whole
            return dataclasses.replace(whole, runs=(*runs, dataclasses.replace(last, complete=False)))
        return dataclasses.replace(whole, complete=False)

    monkeypatch.setattr(room, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, progress=False)


@pytest.mark.parametrize("name", ["antonym", "country-capital", "plural", "word-length", "first-letter"])
def test_other_relations_share_no_output_and_no_family(name):
    relation = fvlens.load_relation(name)
    library = [fvlens.load_relation(other) for other in fvlens.list_relations()]
    allowed = {
        other.name
        for other in library
        if other.family != relation.family and not {y for _, y in other.pairs} & {y for _, y in relation.pairs}
    }
    assert len(allowed) >= 3
    g = seeded()
    everything = other_relations(relation, 10_000, g)
    assert set(everything) == allowed
    assert len(everything) == len(allowed)
    drawn = [other_relations(relation, 3, seeded(seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(names) for names in drawn}) > 1
    assert all(len(names) == 3 and set(names) <= allowed for names in drawn)
    assert other_relations(relation, 0, g) == []


def test_with_random_labels_the_numbers_are_those_of_the_saved_vector(tiny):
    options = dataclasses.replace(TINY, labels="random", n_heads=5, both_labels=True)
    found = run_relation(tiny, fvlens.load_relation("plural"), options=options, progress=False)
    read = results_json(found)
    ours = {"fv_top1": read["fv_top1"], "interval": read["intervals"]["fv_top1"]}
    assert read["rankings"]["random"] == {
        **ours, "layer": read["layer"], "scale": read["scale"], "heads": read["heads"]
    }  # fmt: skip
    assert same(read["heads"], ranked(found.effects["random"], 5))
    assert same(read["rankings"]["permuted"]["heads"], ranked(found.effects["permuted"], 5))
    assert [entry[:2] for entry in read["heads"]] == [list(head) for head in found.vector.heads]
    assert read["layer"] == found.vector.layer
    assert read["fv_top1"] == right(found.steered["random"]).mean() == of_kind(found, "vector").mean()
    assert read["fv_random_labels_top1"] == read["fv_top1"]
    assert read["rankings"]["permuted"]["fv_top1"] == right(found.steered["permuted"]).mean()
    assert read["rankings"]["permuted"]["layer"] == found.vectors["permuted"].layer


# --- the fine-tuned vector ---


def test_the_fine_tuned_vector_is_that_of_finetune(model, result, numbers, tmp_path):
    """Trained by hand from the saved vector, then scored from its file."""
    write_run(result, tmp_path)
    start, saved = (FunctionVector.load(tmp_path / f"vector{end}.safetensors") for end in ("", "-finetuned"))
    split = fvlens.load_relation("antonym").split(seeded())
    tuned = finetune(model, split.train[:20], init=start, valid=split.valid, generator=seeded(), progress=False)
    torch.testing.assert_close(saved.vector, tuned.vector.vector, rtol=1e-4, atol=1e-4)  # others ran beside it
    assert (saved.kind, saved.layer, saved.heads) == ("fine-tuned", start.layer, start.heads)
    assert (numbers["ffv_best_epoch"], numbers["ffv_lr"]) == (tuned.best_epoch, tuned.lr)
    score = fvlens.evaluate(model, split.test, vector=saved, generator=seeded())
    assert numbers["ffv_top1"] == score.top1
    assert numbers["intervals"]["ffv_top1"] == [score.interval.low, score.interval.high]
    assert not torch.equal(saved.vector, start.vector)


def test_training_is_of_the_pairs_epochs_and_place_that_are_asked_for(tiny):
    options = dataclasses.replace(TINY, n_train=3, epochs=1, layer=1, template="arrow", labels="random", n_others=1)
    found = run_relation(tiny, fvlens.load_relation("plural"), options=options, progress=False)
    split = fvlens.load_relation("plural").split(seeded())
    tuned = finetune(
        tiny, split.train[:3], init=found.vectors["random"], valid=split.valid, epochs=1, template="arrow",
        generator=seeded(), progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found.tuned.vector.vector, tuned.vector.vector, rtol=1e-4, atol=1e-4)
    read = results_json(found)
    assert (read["ffv_n_train"], read["ffv_epochs"], read["ffv_layer"]) == (3, 1, 1)
    score = fvlens.evaluate(tiny, split.test, vector=found.tuned.vector, template="arrow", generator=seeded())
    assert torch.equal(found.tuned.evaluation.probabilities, score.probabilities)
    many = run_relation(
        tiny, fvlens.load_relation("plural"), options=dataclasses.replace(TINY, n_train=10_000), progress=False
    )
    assert results_json(many)["ffv_n_train"] == len(split.train)


def test_other_relations_learn_their_own_task(model, monkeypatch):
    """What stands as a control is good at something."""
    seen = {}
    train = report._run.finetune_many

    def watch(model, splits, **options):
        own, *others = splits
        assert (own, options["init"][0].relation) == ("plural", "plural")
        whole = train(model, splits, **options)
        options["init"] = options["init"][1:]
        seen.update(splits={name: splits[name] for name in others}, found=whole.runs[1:], **options)
        return whole

    monkeypatch.setattr(report._run, "finetune_many", watch)
    result = run_relation(
        model, fvlens.load_relation("plural"), options=dataclasses.replace(SMALL, n_others=2), progress=False
    )
    assert tuple(seen["splits"]) == result.others == tuple(run.relation for run in seen["found"])
    assert (seen["n_train"], seen["epochs"], seen["template"]) == (20, 20, "qa")
    for name, run, start in zip(result.others, seen["found"], seen["init"], strict=True):
        assert (start.relation, start.layer, run.vector.layer) == (name, result.vector.layer, result.vector.layer)
        own = fvlens.evaluate(model, seen["splits"][name].valid, vector=run.vector, generator=seeded())
        assert own.top1 == pytest.approx(run.history.valid_top1[run.best_epoch].item())
        assert own.top1 > fvlens.evaluate(model, seen["splits"][name].valid, generator=seeded()).top1
    scores = [
        right(fvlens.evaluate(model, result.split.test, vector=run.vector, generator=seeded())) for run in seen["found"]
    ]
    read = results_json(result)
    assert read["other_relation_ffv_top1"] == pytest.approx(np.mean(scores))
    assert [right(one).tolist() for one in result.tuned.others] == [one.tolist() for one in scores]
    interval = read["intervals"]["other_relation_ffv_top1"]
    np.testing.assert_allclose(interval, bootstrap(np.mean(scores, axis=0)), atol=1.5 / result.n_test)


def test_without_training_all_other_numbers_are_the_same(model, result, numbers, tmp_path):
    plain = run_relation(
        model, fvlens.load_relation("antonym"), options=dataclasses.replace(SMALL, epochs=0), progress=False
    )
    without = results_json(plain)
    new = {"ffv_top1", "ffv_layer", "ffv_epochs", "ffv_best_epoch", "ffv_lr", "ffv_n_train", "ffv_cosine", "ffv_norm",
           "ffv_path", "ffv_decoded", "ffv_seconds", "other_relation_ffv_top1"}  # fmt: skip
    assert {name for name in numbers if "ffv" in name} == new
    assert all(without[name] is None and numbers[name] is not None for name in new)
    spans = {"ffv_top1", "other_relation_ffv_top1"}
    assert all(without["intervals"][name] is None for name in spans)
    assert numbers.keys() == without.keys()
    for name in numbers.keys() - new - {"seconds", "options", "intervals", "exact"}:
        assert without[name] == numbers[name], name
    of_training = {name.removesuffix("_top1") for name in spans}
    assert {key: without["exact"][key] for key in of_training} == dict.fromkeys(of_training)
    assert without["exact"] == numbers["exact"] | dict.fromkeys(of_training)
    rest = lambda read: {key: value for key, value in read["intervals"].items() if key not in spans}  # noqa: E731
    assert rest(without) == rest(numbers)
    assert without["options"] == numbers["options"] | {"epochs": 0}
    assert torch.equal(plain.vector.vector, result.vector.vector)
    assert [name for name, *_ in plain.summary()] == [name for name, *_ in result.summary() if "tuned" not in name]

    write_run(result, tmp_path)
    files = write_run(plain, tmp_path)
    assert [file.name for file in files] == [
        "vector.safetensors", "heads.csv", "effects.csv", "answers.csv", "results.json", "report.html"
    ]  # fmt: skip
    assert not (tmp_path / "vector-finetuned.safetensors").exists()  # it was of another run
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Fine-tuned vector" not in page.texts["h2"]
    assert "Where it fails" in page.texts["h2"]
    assert not {"tuned", "decoded"} & page.tables.keys()
    assert "fine-tuned vector" not in dict(page.tables["provenance"])
    assert {len(row) for row in page.tables["samples"]} == {5}


def test_an_untrained_run_is_repeated_untrained(tiny, tmp_path):
    options = dataclasses.replace(TINY, epochs=0)
    write_run(run_relation(tiny, fvlens.load_relation("plural"), options=options, progress=False), tmp_path / "a")
    (tmp_path / "a" / "vector-finetuned.safetensors").write_bytes(b"of something else")
    done = rerun(tmp_path / "a", model=tiny, progress=False)
    assert done.differences == ()
    assert done.result.tuned is None


def test_given_heads_are_trained_too(tiny, given, tmp_path):
    write_run(given, tmp_path)
    saved = FunctionVector.load(tmp_path / "vector-finetuned.safetensors")
    pairs, valid = given.split.train[:20], given.split.valid
    tuned = finetune(tiny, pairs, init=given.vector, valid=valid, epochs=2, generator=seeded(), progress=False)
    torch.testing.assert_close(saved.vector, tuned.vector.vector, rtol=1e-4, atol=1e-4)
    assert saved.heads == given.vector.heads
    assert len(given.tuned.others) == 1


# --- heads from a file ---


def test_given_heads_make_the_vector_and_none_is_ranked(tiny, given, heads_file, monkeypatch):
    g = seeded()
    split = fvlens.load_relation("antonym").split(g)
    clean = fvlens.build_prompts(
        tiny, split.train, queries=split.valid, n_shots=2, n_prompts=4, relation="antonym", generator=g
    )
    means = fvlens.mean_head_activations(tiny, clean, progress=False)
    expected = fvlens.function_vector(tiny, means, heads=[(2, 3), (0, 1), (1, 1)], layer=0)
    assert torch.equal(given.vector.vector, given.scale * expected.vector)
    assert given.vector.heads == expected.heads
    assert (given.vector.layer, given.scale) == best(given.sweeps["file"])
    assert (list(given.vectors), list(given.sweeps), list(given.steered), given.effects) == (["file"],) * 3 + ({},)
    assert len(given.others) == 1
    read = json.loads(json.dumps(results_json(given), allow_nan=False))
    assert read["heads"] == [[2, 3, None, None], [0, 1, None, None], [1, 1, None, None]]
    assert (read["heads_source"], read["rankings"], read["path"]) == ("file", {}, None)
    assert (read["options"]["heads_file"], read["options"]["n_heads"]) == (given.given.path, 3)
    assert read["data"]["heads_file"] == hashlib.sha256(heads_file.read_bytes()).hexdigest()[:16]
    assert read["heads_note"] == "a plain list; it does not say which model the heads are of"
    assert read["fv_top1"] == right(given.steered["file"]).mean()
    assert read["fv_random_labels_top1"] is read["intervals"]["fv_random_labels_top1"] is None
    names = [name for name, *_ in given.summary()]
    text = f"function vector, 3 heads from heads.json, layer {given.vector.layer}, scale {given.scale:g}"
    assert text in names
    assert not any("labels, layer" in name for name in names)

    def never(*args, **kwargs):
        raise AssertionError("heads were ranked")

    monkeypatch.setattr(find, "indirect_effects", never)
    heads = read_heads(heads_file, tiny)
    run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, heads=heads, progress=False)


def test_more_given_heads_than_can_be_drawn_again_are_refused(tiny, heads_file):
    heads_file.write_text(json.dumps([[layer, head] for layer in range(2) for head in range(4)]))
    with pytest.raises(ValueError, match="n_heads=8: expected at most 6, half of the model's 12 heads"):
        run_relation(
            tiny, fvlens.load_relation("antonym"), options=TINY, heads=read_heads(heads_file, tiny), progress=False
        )


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "true"}, "labels='true'; expected one of permuted, random."),
        ({"n_shots": 0}, "n_shots: expected at least 1, got 0."),
        ({"n_prompts": 0}, "n_prompts: expected at least 1, got 0."),
        ({"n_corrupted": 1}, "n_corrupted: expected at least 2, got 1; a standard error needs two prompts."),
        ({"n_heads": 0}, "n_heads: expected at least 1, got 0."),
        ({"n_random": -3}, "n_random: expected at least 1, got -3."),
        ({"n_others": -1}, "n_others: expected 0 or more, got -1."),
        ({"n_train": 0}, "n_train: expected at least 1, got 0."),
        ({"epochs": -1}, "epochs: expected 0 or more, got -1; 0 leaves the training out."),
        ({"seed": -1}, "seed: expected 0 to 2**63 - 1, got -1."),
        ({"seed": 2**63}, f"seed: expected 0 to 2**63 - 1, got {2**63}."),
        ({"template": "nosuch"}, "no template named 'nosuch'; expected one of qa, arrow, colon"),
    ],
)
def test_bad_options_are_refused(unchecked, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RunOptions(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_heads": 13}, "n_heads=13: expected at most 6, half of the model's 12 heads"),
        ({"n_heads": 7}, "n_heads=7: expected at most 6, half of the model's 12 heads"),
        ({"layer": 3}, "layer=3: expected 0..2."),
        ({"layer": -1}, "layer=-1: expected 0..2."),
        ({"n_shots": 100}, "100 demonstrations wanted for query"),
    ],
)
def test_what_the_model_or_relation_cannot_do_is_refused(tiny, settings, message):
    options = dataclasses.replace(TINY, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        run_relation(tiny, fvlens.load_relation("antonym"), options=options, progress=False)


def test_half_of_the_heads_is_the_most(tiny):
    found = run_relation(
        tiny, fvlens.load_relation("antonym"), options=dataclasses.replace(TINY, n_heads=6), progress=False
    )  # fmt: skip
    assert len(found.vector.heads) == 6


def test_small_relations_are_refused(tiny):
    five = Relation(name="five", pairs=tuple(Pair(f"a{i}", f"b{i}") for i in range(5)))
    with pytest.raises(ValueError, match=re.escape("split: expected a relation of at least 6 pairs, got 5 in 'five'.")):
        run_relation(tiny, five, options=TINY, progress=False)
    eight = Relation(name="eight", pairs=tuple(Pair(f"a{i}", f"b{i}") for i in range(8)))
    with pytest.raises(ValueError, match=r"10 demonstrations wanted for query 'a\d', but only 4 pairs"):
        run_relation(tiny, eight, options=dataclasses.replace(TINY, n_shots=10), progress=False)


def test_a_control_that_was_not_run_is_refused(tiny_result):
    with pytest.raises(ValueError, match="summary: no row of kind 'other_relation'"):
        tiny_result.control("other_relation")
