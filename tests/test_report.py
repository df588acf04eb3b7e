"""The whole chain: its numbers recomputed from their parts, no look at the test pairs, its files and its page."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, small_run

import fvlens
from fvlens import FunctionVector, Relation, find, finetune, report
from fvlens.find import relation_effects
from fvlens.prompts import Prompts
from fvlens.relations import Pair
from fvlens.report import (
    Loading,
    RunDifference,
    RunOptions,
    other_relations,
    read_run,
    rerun,
    results_json,
    run_relation,
    write_report,
    write_run,
)
from fvlens.suffix import choose_route
from fvlens.types import Head
from fvlens.universal import read_heads

TINY = RunOptions(n_shots=2, n_prompts=4, n_corrupted=3, n_heads=3, n_random=2, n_others=0, epochs=2)


FILES = ("vector.safetensors", "vector-finetuned.safetensors", "results.json", "report.html")


@pytest.fixture(scope="session")
def result(model):
    return small_run(model)


@pytest.fixture(scope="session")
def numbers(result):
    return results_json(result)


@dataclasses.dataclass
class Call:
    """One call of build_prompts: from which module, and what it made."""

    module: str
    prompts: Prompts


@pytest.fixture(scope="session")
def watched(model):
    """The same run again, with every prompt that was built, and the seconds it took."""
    calls = []

    def spy(module, original):
        def build(*args, **kwargs):
            prompts = original(*args, **kwargs)
            calls.append(Call(module, prompts))
            return prompts

        return build

    with pytest.MonkeyPatch.context() as patch:
        for module in ("find", "evaluation._prompting", "finetuning._training"):
            target = f"fvlens.{module}.build_prompts"
            patch.setattr(target, spy(module, fvlens.build_prompts))
        began = time.monotonic()
        again = run_relation(model, fvlens.load_relation("antonym"), options=SMALL, progress=False)
    return again, calls, time.monotonic() - began


@pytest.fixture(scope="session")
def tiny_result(tiny):
    return run_relation(tiny, fvlens.load_relation("antonym"), options=TINY, progress=False)


def right(evaluation):
    """1 where the predicted word is the answer, 0 elsewhere. All answers of the library are one token here."""
    pairs = zip(evaluation.predictions, evaluation.queries, strict=True)
    return np.array([float(prediction == pair.output) for prediction, pair in pairs])


def of_kind(result, kind):
    """Score of each query, averaged over all single vectors of one kind of control."""
    rows = [row for row in result.controls.rows if row.kind == kind]
    return np.mean([right(one) for row in rows for one in row.evaluations], axis=0)


def bootstrap(scores):
    """95% interval of the mean, by another generator and more resamples."""
    rng = np.random.default_rng(1)
    means = rng.choice(scores, (20_000, len(scores))).mean(axis=1)
    return np.quantile(means, [0.025, 0.975])


def ranked(effects, n):
    """The first n heads with their mean effects and standard errors."""
    cie = effects.cie.double().numpy()
    mean, error = cie.mean(axis=0), cie.std(axis=0, ddof=1) / len(cie) ** 0.5
    order = np.argsort(-mean.ravel(), kind="stable")[:n]
    cells = [divmod(int(i), mean.shape[1]) for i in order]
    return [[layer, head, mean[layer, head], error[layer, head]] for layer, head in cells]


def best(sweep, scales=None):
    """Layer and scale of the most right answers; ties by probability, then by |scale - 1|, then the lower layer."""

    def worse(place):
        one = sweep.at(*place)
        return -right(one).sum(), -one.probabilities.double().mean().item(), abs(place[1] - 1), place[0]

    return min(((layer, scale) for layer in sweep.layers for scale in scales or sweep.scales), key=worse)


def file_hash(name):
    """Hash of a relation's pairs, from its file."""
    text = (Path(fvlens.__file__).parent / "relations" / "data" / f"{name}.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def same(got, expected):
    """Equal, floats up to rounding, at any depth."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float):
        return got == pytest.approx(expected, abs=1e-6)
    return type(got) is type(expected) and got == expected


# --- the numbers ---


def test_every_number_follows_from_the_parts(model, result, numbers):
    cfg, vector = model.cfg, result.vectors["permuted"]
    relation = fvlens.load_relation("antonym")
    with torch.no_grad():
        centred = vector.vector - vector.vector.mean()
        normed = centred / (centred.square().mean() + cfg.eps).sqrt() * model.ln_final.w + model.ln_final.b
        logits, tokens = (normed @ model.W_U).topk(10)
    parts = [result.split.train, result.split.valid, result.split.test]
    words = [{word for pair in part for word in pair} for part in parts]
    inputs = [{pair.input for pair in part} for part in parts]
    apart = lambda sets: not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])  # noqa: E731
    assert apart(inputs)
    assert sorted(pair for part in parts for pair in part) == sorted(relation.pairs)
    scores = {
        "icl_top1": right(result.icl),
        "zero_shot_top1": right(result.zero_shot),
        "shuffled_top1": right(result.shuffled),
        "fv_top1": right(result.steered["permuted"]),
        "fv_random_labels_top1": right(result.steered["random"]),
        "fv_scale_one_top1": right(result.at_scale_one),
        "random_vector_top1": of_kind(result, "random_vector"),
        "other_relation_top1": of_kind(result, "other_relation"),
        "random_heads_top1": of_kind(result, "random_heads"),
        "ffv_top1": right(result.tuned.evaluation),
        "other_relation_ffv_top1": np.mean([right(one) for one in result.tuned.others], axis=0),
    }
    before, after = (one.vector.double().numpy() for one in (vector, result.tuned.vector))
    history = result.tuned.run.history
    sweep = result.sweeps["permuted"]
    (layer, scale), (layer_at_one, _) = best(sweep), best(sweep, scales=[1.0])
    # best top-1, then lowest loss, then the earlier epoch
    epochs = list(zip((-history.valid_top1).tolist(), history.valid_loss.tolist(), strict=True))
    intervals = numbers["intervals"]
    assert set(intervals) == {"level", *scores} - {"random_heads_top1"}
    assert intervals["level"] == 0.95
    for name, value in scores.items():
        assert len(value) == len(result.split.test)
        if name in intervals:
            np.testing.assert_allclose(intervals[name], bootstrap(value), atol=1.5 / len(value), err_msg=name)
    expected = {
        "schema": 4,
        "relation": "antonym",
        "model": "rel-small",
        "seed": 0,
        **{name: float(value.mean()) for name, value in scores.items()},
        "layer": layer,
        "scale": scale,
        "choice": {
            "layer": layer,
            "scale": scale,
            "valid_top1": float(right(sweep.at(layer, scale)).mean()),
            "n_valid": len(result.split.valid),
            "scale_one": {"layer": layer_at_one, "valid_top1": float(right(sweep.at(layer_at_one, 1)).mean())},
        },
        "ffv_layer": layer,
        "ffv_epochs": 20,
        "ffv_best_epoch": epochs.index(min(epochs)),
        "ffv_lr": result.tuned.run.lr,
        "ffv_n_train": 20,
        "ffv_cosine": float(before @ after / (np.linalg.norm(before) * np.linalg.norm(after))),
        "fv_norm": float(np.linalg.norm(before)),
        "ffv_norm": float(np.linalg.norm(after)),
        "heads_source": "ranking",
        "heads": ranked(result.effects["permuted"], 10),
        "rankings": {
            ranking: {
                "fv_top1": float(right(result.steered[ranking]).mean()),
                "interval": intervals[key],
                "layer": best(result.sweeps[ranking])[0],
                "scale": best(result.sweeps[ranking])[1],
                "heads": ranked(result.effects[ranking], 10),
            }
            for ranking, key in (("permuted", "fv_top1"), ("random", "fv_random_labels_top1"))
        },
        "n_test": len(result.split.test),
        "intervals": intervals,
        "icl_probability": float(np.mean(result.icl.probabilities.tolist())),
        "shuffled_probability": float(np.mean(result.shuffled.probabilities.tolist())),
        "other_relations": list(result.others),
        "path": choose_route(model)[0],
        "ffv_path": result.tuned.run.path,
        "cautions": [],
        "decoded": [[model.tokenizer.decode([t]), v] for t, v in zip(tokens.tolist(), logits.tolist(), strict=True)],
        "ffv_decoded": [list(pair) for pair in result.tuned.vector.decode(model)],
        "options": {
            "seed": 0, "n_shots": 10, "n_prompts": 20, "n_corrupted": 8, "n_heads": 10, "labels": "permuted",
            "both_labels": True, "layer": None, "scale": None, "template": "qa", "n_random": 2, "n_others": 1,
            "n_train": 20, "epochs": 20, "heads_file": None,
        },
        "loading": None,
        "command": None,
        "fingerprint": dataclasses.asdict(fvlens.fingerprint(model)),
        "data_hash": file_hash("antonym"),
        "data": {
            "relations": {name: file_hash(name) for name in ("antonym", *result.others)},
            "library": result.provenance.library_hash,
            "heads_file": None,
        },
        "heads_note": None,
        "split_disjoint": "both" if apart(words) else "input",
        "versions": result.provenance.versions,
        "code_hash": result.provenance.code_hash,
        "platform": result.provenance.platform,
        "ffv_seconds": result.tuned.run.seconds,
        "seconds": result.seconds,
    }  # fmt: skip
    assert set(numbers) == set(expected)
    for name, value in expected.items():
        if name == "decoded":  # logits are tens, in float32
            assert [word for word, _ in numbers[name]] == [word for word, _ in value]
            np.testing.assert_allclose([v for _, v in numbers[name]], [v for _, v in value], rtol=1e-4)
        elif name.endswith("norm"):  # over a hundred, in float32
            assert numbers[name] == pytest.approx(value, rel=1e-6)
        else:
            assert same(numbers[name], value), (name, numbers[name], value)


def test_scores_are_those_of_a_plain_forward_pass(model, result, numbers):
    """Bare queries as text, the vector added by a hook of our own."""

    def top1(vector=None):
        hooks = []
        if vector is not None:

            def add(resid, hook):
                resid = resid.clone()
                resid[:, -1] += vector.vector
                return resid

            hooks = [(f"blocks.{vector.layer}.hook_resid_post", add)]
        found = []
        for word, answer in result.split.test:
            ids = model.tokenizer(f"Q: {word}\nA:", add_special_tokens=False)["input_ids"]
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                logits = model(torch.tensor([[model.tokenizer.bos_token_id, *ids]]))[0, -1]
            found.append(model.tokenizer.decode([int(logits.argmax())]) == f" {answer}")
        return float(np.mean(found))

    assert numbers["zero_shot_top1"] == pytest.approx(top1())
    assert numbers["fv_top1"] == pytest.approx(top1(result.vectors["permuted"]))
    assert numbers["fv_random_labels_top1"] == pytest.approx(top1(result.vectors["random"]))
    assert numbers["ffv_top1"] == pytest.approx(top1(result.tuned.vector))


def test_in_context_scores_are_those_of_the_prompts_that_were_built(model, numbers, watched):
    """The watched run's prompts through the plain model."""
    _, calls, _ = watched
    shown = [call.prompts for call in calls if call.module == "evaluation._prompting" and call.prompts.n_shots]
    assert [prompts.labels for prompts in shown] == ["true", "permuted"]
    for name, prompts in zip(("icl", "shuffled"), shown, strict=True):
        with torch.no_grad():
            logits = model(prompts.tokens, attention_mask=prompts.attention_mask)[:, -1]
        words = [f" {pair.output}" for pair in prompts.queries]
        tokens = torch.tensor([model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words])
        assert numbers[f"{name}_top1"] == pytest.approx((logits.argmax(dim=-1) == tokens).double().mean().item())
        chances = logits.softmax(dim=-1)[range(len(tokens)), tokens]
        assert numbers[f"{name}_probability"] == pytest.approx(chances.double().mean().item(), abs=1e-5)


def test_page_and_table_of_controls_give_one_number_for_one_thing(result, tiny):
    other = run_relation(
        tiny, fvlens.load_relation("antonym"), options=dataclasses.replace(TINY, labels="random"), progress=False
    )
    for run in (result, other):
        top1 = {row.kind: row.top1 for row in run.controls.rows}
        assert top1["icl"] == run.icl.top1
        assert top1["shuffled"] == run.shuffled.top1
        assert top1["no_vector"] == run.zero_shot.top1
        assert top1["vector"] == run.steered[run.options.labels].top1


def test_json_has_the_keys_and_types_that_readers_rely_on(result, tmp_path):
    write_run(result, tmp_path)

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert same(read, results_json(result))
    assert isinstance(read["relation"], str)
    assert isinstance(read["model"], str)
    for name in ("seed", "layer", "n_test", "ffv_layer", "ffv_epochs", "ffv_best_epoch"):
        assert type(read[name]) is int, name
    for name in (
        "icl_top1", "zero_shot_top1", "shuffled_top1", "fv_top1", "fv_random_labels_top1", "random_vector_top1",
        "other_relation_top1", "ffv_top1", "other_relation_ffv_top1",
    ):  # fmt: skip
        assert type(read[name]) is float, name
        assert 0 <= read[name] <= 1, name
    for entry in read["heads"]:
        assert [type(item) for item in entry] == [int, int, float, float]
    assert len(read["heads"]) == 10
    assert read["n_test"] >= 60
    assert type(read["schema"]) is int
    assert type(read["seconds"]) is float
    assert type(read["ffv_seconds"]) is float
    assert 0 < read["ffv_seconds"] < read["seconds"]
    for name in ("fvlens", "torch", "transformer-lens"):
        assert read["versions"][name] == importlib.metadata.version(name)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", read["versions"]["python"])


def test_summary_shows_the_same_numbers(result, numbers):
    rows = {name: (value, interval) for name, value, interval in result.summary()}
    random, place = numbers["rankings"]["random"], f"layer {numbers['layer']}, scale {numbers['scale']:g}"
    expected = {
        "10 clean demonstrations": "icl_top1",
        "10 demonstrations, labels permuted": "shuffled_top1",
        "bare query": "zero_shot_top1",
        f"function vector, 10 heads by permuted labels, {place}": "fv_top1",
        f"the same at scale 1, layer {numbers['choice']['scale_one']['layer']}": "fv_scale_one_top1",
        f"function vector, 10 heads by random labels, layer {random['layer']}, scale {random['scale']:g}": (
            "fv_random_labels_top1"
        ),
        f"fine-tuned vector, 20 pairs, 20 epochs, layer {numbers['layer']}": "ffv_top1",
        "2 random vectors of the same norm": "random_vector_top1",
        f"vectors of other relations ({numbers['other_relations'][0]})": "other_relation_top1",
        "fine-tuned vectors of the same other relations": "other_relation_ffv_top1",
        "2 sets of random heads": "random_heads_top1",
    }
    assert list(rows) == list(expected)
    for name, key in expected.items():
        assert rows[name][0] == numbers[key]
        if key in numbers["intervals"]:
            assert list(rows[name][1]) == [*numbers["intervals"][key], 0.95]


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
    trained, trained_other = [call.prompts for _, call in found if call.module == "finetuning._training"]
    assert trained.queries == split.train[:20] + split.valid
    assert set(trained_other.queries) <= set(fvlens.load_relation(result.others[0]).pairs)
    others = {call.prompts.relation for _, call in found if call.module != "finetuning._training"} - {"antonym"}
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
    g = torch.Generator().manual_seed(0)
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
        changed = {"rankings", "options", "seconds", "platform", "cautions", "fv_random_labels_top1", "intervals"}
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
    again = fvlens.evaluate(model, result.split.test, vector=result.vector, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_page_says_what_half_precision_does_to_ranks(tiny, tmp_path, dtype):
    options = dataclasses.replace(TINY, n_others=1, epochs=0)
    found = run_relation(tiny, fvlens.load_relation("antonym"), options=options, progress=False)
    found = dataclasses.replace(found, fingerprint=dataclasses.replace(found.fingerprint, dtype=dtype))
    page = write_run(found, tmp_path)[-1].read_text()
    said = f"The model computes in bfloat16: how many prompts run together (here\nup to {found.zero_shot.batch_size} of"
    assert (said in page) == (dtype == "bfloat16")


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


@pytest.mark.parametrize("part", ["indirect_effects", "layer_scale_sweep", "controls", "finetune"])
def test_an_interrupted_part_ends_the_run(tiny, monkeypatch, part):
    """Its partial result would pass for the whole."""
    room = find if part in ("indirect_effects", "layer_scale_sweep") else report._run
    original = getattr(room, part)

    def interrupted(*args, **kwargs):
        return dataclasses.replace(original(*args, **kwargs), complete=False)

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
    g = torch.Generator().manual_seed(0)
    everything = other_relations(relation, 10_000, g)
    assert set(everything) == allowed
    assert len(everything) == len(allowed)
    drawn = [other_relations(relation, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)]
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
    split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    tuned = finetune(model, split.train[:20], init=start, valid=split.valid, generator=g(), progress=False)
    assert torch.equal(saved.vector, tuned.vector.vector)
    assert (saved.kind, saved.layer, saved.heads) == ("fine-tuned", start.layer, start.heads)
    assert (numbers["ffv_best_epoch"], numbers["ffv_lr"]) == (tuned.best_epoch, tuned.lr)
    score = fvlens.evaluate(model, split.test, vector=saved, generator=g())
    assert numbers["ffv_top1"] == score.top1
    assert numbers["intervals"]["ffv_top1"] == [score.interval.low, score.interval.high]
    assert not torch.equal(saved.vector, start.vector)


def test_training_is_of_the_pairs_epochs_and_place_that_are_asked_for(tiny):
    options = dataclasses.replace(TINY, n_train=3, epochs=1, layer=1, template="arrow", labels="random", n_others=1)
    found = run_relation(tiny, fvlens.load_relation("plural"), options=options, progress=False)
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    split = fvlens.load_relation("plural").split(g())
    tuned = finetune(
        tiny, split.train[:3], init=found.vectors["random"], valid=split.valid, epochs=1, template="arrow",
        generator=g(), progress=False,
    )  # fmt: skip
    assert torch.equal(found.tuned.vector.vector, tuned.vector.vector)
    read = results_json(found)
    assert (read["ffv_n_train"], read["ffv_epochs"], read["ffv_layer"]) == (3, 1, 1)
    score = fvlens.evaluate(tiny, split.test, vector=found.tuned.vector, template="arrow", generator=g())
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
        seen.update(splits=splits, found=train(model, splits, **options), **options)
        return seen["found"]

    monkeypatch.setattr(report._run, "finetune_many", watch)
    result = run_relation(
        model, fvlens.load_relation("plural"), options=dataclasses.replace(SMALL, n_others=2), progress=False
    )
    assert tuple(seen["splits"]) == result.others == tuple(run.relation for run in seen["found"])
    assert (seen["n_train"], seen["epochs"], seen["template"]) == (20, 20, "qa")
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    for name, run, start in zip(result.others, seen["found"], seen["init"], strict=True):
        assert (start.relation, start.layer, run.vector.layer) == (name, result.vector.layer, result.vector.layer)
        own = fvlens.evaluate(model, seen["splits"][name].valid, vector=run.vector, generator=g())
        assert own.top1 == pytest.approx(run.history.valid_top1[run.best_epoch].item())
        assert own.top1 > fvlens.evaluate(model, seen["splits"][name].valid, generator=g()).top1
    scores = [
        right(fvlens.evaluate(model, result.split.test, vector=run.vector, generator=g())) for run in seen["found"]
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
    for name in numbers.keys() - new - {"seconds", "options", "intervals"}:
        assert without[name] == numbers[name], name
    rest = lambda read: {key: value for key, value in read["intervals"].items() if key not in spans}  # noqa: E731
    assert rest(without) == rest(numbers)
    assert without["options"] == numbers["options"] | {"epochs": 0}
    assert torch.equal(plain.vector.vector, result.vector.vector)
    assert [name for name, *_ in plain.summary()] == [name for name, *_ in result.summary() if "tuned" not in name]

    write_run(result, tmp_path)
    files = write_run(plain, tmp_path)
    assert [file.name for file in files] == ["vector.safetensors", "results.json", "report.html"]
    assert not (tmp_path / "vector-finetuned.safetensors").exists()  # it was of another run
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Fine-tuned vector" not in page.texts["h2"]
    assert "Sample predictions" in page.texts["h2"]
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
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    pairs, valid = given.split.train[:20], given.split.valid
    tuned = finetune(tiny, pairs, init=given.vector, valid=valid, epochs=2, generator=g(), progress=False)
    assert torch.equal(saved.vector, tuned.vector.vector)
    assert saved.heads == given.vector.heads
    assert len(given.tuned.others) == 1


def test_page_shows_the_training(page, result, numbers):
    assert "Fine-tuned vector" in page.texts["h2"]
    span = lambda key: "{:.3f} to {:.3f}".format(*numbers["intervals"][key])  # noqa: E731
    expected = {
        "bare query": "zero_shot_top1",
        "function vector": "fv_top1",
        "fine-tuned vector": "ffv_top1",
        f"fine-tuned vectors of other relations ({result.others[0]})": "other_relation_ffv_top1",
        "10 clean demonstrations": "icl_top1",
    }
    assert page.tables["tuned"][1:] == [[name, f"{numbers[key]:.3f}", span(key)] for name, key in expected.items()]
    rows = zip(numbers["decoded"], numbers["ffv_decoded"], strict=True)
    assert page.tables["decoded"][1:] == [
        [str(i), repr(a), f"{x:.2f}", repr(b), f"{y:.2f}"] for i, ((a, x), (b, y)) in enumerate(rows, start=1)
    ]
    (text,) = [" ".join(text.split()) for text in page.texts["p"] if "trained further" in text]
    for part in (
        "bare queries of 20 training pairs",
        f"Chosen on the {len(result.split.valid)} validation pairs: epoch {numbers['ffv_best_epoch']} of 20.",
        f"Added after layer {numbers['ffv_layer']}",
        f"cosine similarity to it {numbers['ffv_cosine']:.2f};",
        f"norm {numbers['ffv_norm']:.2f}, of the function vector {numbers['fv_norm']:.2f}.",
        f"Trained in {numbers['ffv_seconds']:.1f} s.",
    ):
        assert part in text
    ours = [script for script in page.texts["script"] if "Training of antonym" in script]
    (curves,) = ours
    for name in ("training pairs", "validation pairs", "validation top-1", "norm", "cosine"):
        assert f'"name":"{name}"' in curves
    told = dict(page.tables["provenance"])["fine-tuned vector"]
    run = result.tuned.run
    assert told == (
        f"20 pairs, epoch {run.best_epoch} of 20, learning rate {run.lr:.3g}, order of pairs by seed {run.seed}, "
        f"path {run.path}, {run.seconds:.1f} seconds"
    )


def test_page_says_where_training_gained_nothing(result, tmp_path):
    stayed = dataclasses.replace(result.tuned.run, best_epoch=0)
    page = page_of(dataclasses.replace(result, tuned=dataclasses.replace(result.tuned, run=stayed)), tmp_path)
    assert any("epoch 0 of 20, the start: none was better." in " ".join(text.split()) for text in page.texts["p"])


# --- heads from a file ---


@pytest.fixture
def heads_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text("[[2, 3], [0, 1], [1, 1]]")
    return path


@pytest.fixture(scope="session")
def given(tiny, tmp_path_factory):
    """A run over heads from a file, with another relation among its controls."""
    heads_file = tmp_path_factory.mktemp("heads") / "heads.json"
    heads_file.write_text("[[2, 3], [0, 1], [1, 1]]")
    options = dataclasses.replace(TINY, n_others=1, n_heads=5)
    return run_relation(
        tiny, fvlens.load_relation("antonym"), options=options, heads=read_heads(heads_file, tiny), progress=False
    )


def test_given_heads_make_the_vector_and_none_is_ranked(tiny, given, heads_file, monkeypatch):
    g = torch.Generator().manual_seed(0)
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


def test_page_shows_given_heads_instead_of_heatmaps(given, tmp_path):
    path = write_report(tmp_path / "report.html", given)
    page = Page(path.read_text(encoding="utf-8"))
    assert "L2H3, L0H1, L1H1" in page.texts["p"]
    assert not any("Which heads carry" in text for text in page.texts["h2"])
    assert "Where the vector works (heads from heads.json)" in page.texts["h2"]
    told = dict(page.tables["provenance"])
    assert told["heads"].startswith(f"L2H3, L0H1, L1H1, from {given.given.path} (file ")
    assert told["attribution path"] == "none: the heads were given"


def test_more_given_heads_than_can_be_drawn_again_are_refused(tiny, heads_file):
    heads_file.write_text(json.dumps([[layer, head] for layer in range(2) for head in range(4)]))
    with pytest.raises(ValueError, match="n_heads=8: expected at most 6, half of the model's 12 heads"):
        run_relation(
            tiny, fvlens.load_relation("antonym"), options=TINY, heads=read_heads(heads_file, tiny), progress=False
        )


# --- provenance ---


def test_provenance_names_what_the_numbers_depend_on(result, numbers, model):
    source = result.provenance
    assert numbers["versions"].keys() == {
        "fvlens", "torch", "transformer-lens", "transformers", "tokenizers", "numpy", "python"
    }  # fmt: skip
    lines = []
    for name in fvlens.list_relations():
        lines.append(f"{name}\t{fvlens.load_relation(name).family}\t{file_hash(name)}")
    assert source.library_hash == hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert source.platform["threads"] == torch.get_num_threads()
    assert source.platform["device"] == "cpu"
    assert source.platform["system"] == platform.platform()
    assert source.platform["processor"]
    assert source.platform["model_class"] == type(model).__name__
    assert numbers["fingerprint"]["revision"] == "local"
    assert re.fullmatch("[0-9a-f]{16}", source.code_hash)


def test_code_hash_changes_with_any_file_of_the_package(model, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").write_text("2")
    (tmp_path / "data.txt").write_text("3")
    monkeypatch.setattr(report._provenance.resources, "files", lambda name: tmp_path)
    digest = lambda: report.Provenance.of(model, {}).code_hash  # noqa: E731
    first = digest()
    (tmp_path / "data.txt").write_text("4")
    assert digest() == first
    (tmp_path / "sub" / "b.py").write_text("3")
    assert digest() != first
    (tmp_path / "sub" / "b.py").write_text("2")
    assert digest() == first
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert digest() != first


@pytest.mark.parametrize(
    ("loading", "expected"),
    [
        (Loading(), ("rel-small", {})),
        (Loading("x", device="cpu", revision="main"), ("x", {"device": "cpu", "revision": "main"})),
        (
            Loading("y", dtype="bfloat16", backend="bridge"),
            ("y", {"dtype": torch.bfloat16, "backend": "bridge"}),
        ),
    ],
)
def test_loading_passes_on_what_was_given_and_nothing_else(monkeypatch, loading, expected):
    monkeypatch.setattr(report._settings, "load_model", lambda name, **options: (name, options))
    assert loading.load() == expected


# --- the same run again ---

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
        "model": "rel-small", "device": "cpu", "dtype": None, "revision": None, "backend": None
    }  # fmt: skip
    for name in ("vector.safetensors", "vector-finetuned.safetensors"):
        vectors = [FunctionVector.load(place / name) for place in (folder, done.out)]
        assert torch.equal(vectors[0].vector, vectors[1].vector)
    assert {file.name for file in done.files} == set(FILES)
    inputs = {"schema", "seed", "fingerprint", "options", "loading", "versions", "platform", "seconds", "ffv_seconds"}
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
    for module in (report._recorded, report._provenance):
        monkeypatch.setattr(module, "load_relation", lambda name: shorter if name == "plural" else load(name))
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
    again = lambda: rerun(tmp_path / "first", model=tiny, progress=False)  # noqa: E731
    assert again().differences == ()
    old = results_json(given)["data"]["heads_file"]
    heads_file.write_text("[[0, 0]]")
    done = again()
    new = hashlib.sha256(b"[[0, 0]]").hexdigest()[:16]
    assert done.differences == (RunDifference("data", "data.heads_file", old, new),)
    assert torch.equal(done.result.vector.vector, given.vector.vector)
    heads_file.unlink()
    done = again()
    assert done.differences == (RunDifference("data", "data.heads_file", old, "(absent)"),)
    assert done.result.vector.heads == given.vector.heads


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
        ({"options__more": 1}, "options.more: not a field of this schema; expected seed, n_shots"),
        ({"options__heads_file": edit}, "options.heads_file: the field is missing."),
        ({"options__seed": 2**63, "seed": 2**63}, f"options: seed: expected 0 to 2**63 - 1, got {2**63}."),
        ({"seed": 1}, "seed: 1, but options.seed is 0; expected one seed."),
        ({"loading": "rel-small"}, "loading: expected dict or null, got 'rel-small'."),
        ({"loading__dtype": "int8"}, "loading.dtype: expected one of 'float32', 'bfloat16', 'float16', 'float64'"),
        ({"loading__backend": "x"}, "loading.backend: expected one of 'hooked', 'bridge' or null, got 'x'."),
        ({"loading__device": "nosuch"}, "loading.device: 'nosuch' is not a device."),
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
        ({"heads_source": "other"}, "heads_source: expected one of 'ranking', 'file', got 'other'."),
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
        ([[0], [1]], "heads: expected (layer, head) pairs of integers, got [0]."),
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
    with pytest.raises(ValueError, match=re.escape("results.json: cannot be read (No such file or directory); exp")):
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


# --- files ---


def test_files_are_written_beside_what_is_there(result, tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "results.json").write_text("old")
    (folder / "sub").mkdir()
    files = write_run(result, folder)
    assert [file.name for file in files] == list(FILES)
    assert {file.name for file in folder.iterdir()} == {"notes.txt", "sub", *(file.name for file in files)}
    assert (folder / "notes.txt").read_text() == "mine"
    loaded = FunctionVector.load(folder / "vector.safetensors")
    assert torch.equal(loaded.vector, result.vector.vector)
    assert (loaded.layer, loaded.heads, loaded.relation) == (result.vector.layer, result.vector.heads, "antonym")


def test_missing_folders_are_made(tiny_result, tmp_path):
    files = write_run(tiny_result, str(tmp_path / "a" / "b"))
    assert all(file.is_file() and file.parent == tmp_path / "a" / "b" for file in files)


def test_files_are_replaced_at_once(tiny_result, tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_text(f"old {name}")
    readers = {name: (tmp_path / name).open() for name in ("results.json", "report.html")}
    try:
        write_run(tiny_result, tmp_path)
        for name, reader in readers.items():  # whoever had the old file open still reads all of it
            assert reader.read() == f"old {name}"
    finally:
        for reader in readers.values():
            reader.close()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_run(tiny_result, tmp_path)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", tiny_result)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- the page ---

FETCHING = ("src", "href", "srcset", "xlink:href", "action", "formaction", "poster", "background", "data", "ping")


class Page(HTMLParser):
    """A page's tags, its texts by tag, and its tables by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.tables, self.styles = [], defaultdict(list), {}, []
        self._open, self._rows = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.styles.append(attrs.get("style") or "")
        if tag == "table":
            self._rows = self.tables.setdefault(attrs.get("id"), [])
        elif tag == "tr":
            self._rows.append([])
        if tag in ("title", "h1", "h2", "p", "td", "th", "script", "style"):
            self._open.append((tag, []))

    def handle_data(self, data):
        for _, parts in self._open:
            parts.append(data)

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            text = "".join(self._open.pop()[1]).strip()
            self.texts[tag].append(text)
            if tag in ("td", "th"):
                self._rows[-1].append(text)


def page_of(result, tmp_path):
    return Page(write_report(tmp_path / "page.html", result).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def page(result, tmp_path_factory):
    return page_of(result, tmp_path_factory.mktemp("page"))


def test_page_needs_nothing_from_elsewhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("base", "iframe", "object", "embed", "img", "form"), tag
        assert attrs.get("http-equiv") is None
        for name in FETCHING:
            assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, name, attrs[name])
    for style in (*page.styles, *page.texts["style"]):
        assert "url(" not in style
        assert "@import" not in style
    libraries = [script for script in page.texts["script"] if "plotly.js v" in script[:200]]
    assert len(libraries) == 1
    for script in page.texts["script"]:  # the library names servers, for maps that are not drawn; our part names none
        assert script in libraries or not re.search(r"https?:|fetch\(|import\(", script)
    assert sum("Plotly.newPlot" in script for script in page.texts["script"] if script not in libraries) == 7


def test_page_shows_the_numbers(page, result, numbers):
    assert page.texts["title"] == ["antonym: function vector on rel-small"]
    assert page.texts["h1"] == ["antonym"]
    assert page.tables["summary"][1:] == [
        [name, f"{value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
        for name, value, interval in result.summary()
    ]
    text = dict(page.tables["provenance"])
    assert numbers["fingerprint"]["weights"] in text["model"]
    assert text["relation"] == f"antonym (data {numbers['data_hash']}; no word in two parts of its split)"
    assert text["pairs"].endswith(f"{numbers['n_test']} test")
    assert json.loads(text["options"]) == numbers["options"]
    assert text["attribution path"] == numbers["path"]
    assert f"torch {torch.__version__.split('+')[0]}" in text["versions"]
    lead = page.texts["p"][0]
    assert f"10 heads, scale\n{numbers['scale']:g}, added after layer {numbers['layer']};" in lead
    assert f"{numbers['n_test']} test pairs" in lead


def test_samples_tick_the_right_answers_only(page, result):
    columns = (result.zero_shot, result.steered["permuted"], result.tuned.evaluation, result.icl)
    expected = []
    for i, pair in enumerate(result.split.test[:15]):
        cells = [one.predictions[i] + (" ✓" if one.predictions[i] == pair.output else "") for one in columns]
        expected.append([pair.input, pair.output, *cells])
    assert page.tables["samples"][1:] == expected
    ticks = sum("✓" in cell for row in expected for cell in row)
    assert 0 < ticks < 60
    assert page.tables["samples"][0] == ["query", "answer", "bare", "function vector", "fine-tuned", "10-shot"]


def test_the_beginning_of_an_answer_is_not_the_answer(result, tmp_path):
    """A wrong token that the answer begins with gets no tick, a right first token of a longer answer gets one."""
    (pair, *_), n = result.zero_shot.queries, result.zero_shot.n
    prefix = (pair.output[:1], *result.zero_shot.predictions[1:])
    wrong = dataclasses.replace(result.zero_shot, predictions=prefix, ranks=torch.full((n,), 7))
    first = dataclasses.replace(result.icl, predictions=prefix, ranks=torch.zeros(n, dtype=torch.long))
    row = page_of(dataclasses.replace(result, zero_shot=wrong, icl=first), tmp_path).tables["samples"][1]
    assert row[2] == pair.output[:1]
    assert row[5] == f"{pair.output[:1]} ✓"


def test_figures_name_the_relation(page):
    ours = "\n".join(script for script in page.texts["script"] if "plotly.js v" not in script[:200])
    assert "custom pairs" not in ours
    assert ours.count("antonym") >= 5


def test_odd_names_and_words_are_text(tiny, tiny_result, tmp_path):
    name = '</title></script><script>alert("1")</script> & <b>'
    odd = ["<script>x</script>", "a&amp;b", '"q"', "</td>", "x'y", "<!--", "{{ 7 * 7 }}", "${y}", "<img src=x>"]
    pairs = tuple(Pair(f"{word}{i}", f"{word}out{i}") for i in range(4) for word in odd)
    relation = Relation(name=name, pairs=pairs)
    found = run_relation(tiny, relation, options=TINY, model_name="<i>m</i>", progress=False)
    decoded = (("</script><b>", 2.0), (" <i>", 1.0))
    found = dataclasses.replace(found, decoded=decoded, tuned=dataclasses.replace(found.tuned, decoded=decoded))
    page = page_of(found, tmp_path)
    assert page.texts["h1"] == [name]
    assert page.texts["title"] == [f"{name}: function vector on <i>m</i>"]
    shown = [row[:2] for row in page.tables["samples"][1:]]
    assert shown == [list(pair) for pair in found.split.test[:15]]
    plain = page_of(tiny_result, tmp_path)
    count = lambda page, tag: sum(name == tag for name, _ in page.tags)  # noqa: E731
    for tag in ("script", "b", "i", "img", "h2", "table", "title"):
        assert count(page, tag) == count(plain, tag), tag
