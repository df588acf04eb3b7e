"""The numbers of a run, recomputed from their parts."""

import dataclasses
import importlib.metadata
import json
import re

import numpy as np
import pytest
import torch
from runs import TINY, best, bootstrap, file_hash, of_kind, ranked, right, same

import fvlens
from fvlens.models import load_report
from fvlens.report import (
    results_json,
    run_relation,
    write_run,
)
from fvlens.suffix import choose_route


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
        "exact": {name.removesuffix("_top1"): float(value.mean()) for name, value in scores.items()},  # of one token
        "n_first_tokens": len({pair.output for pair in result.split.test}),
        "tables": {"heads": "heads.csv", "effects": "effects.csv", "answers": "answers.csv"},
        "pairs": None,
        "decoded": [[model.tokenizer.decode([t]), v] for t, v in zip(tokens.tolist(), logits.tolist(), strict=True)],
        "ffv_decoded": [list(pair) for pair in result.tuned.vector.decode(model)],
        "options": {
            "seed": 0, "n_shots": 10, "n_prompts": 20, "n_corrupted": 8, "n_heads": 10, "labels": "permuted",
            "both_labels": True, "layer": None, "scale": None, "template": "qa", "n_random": 2, "n_others": 1,
            "n_train": 20, "epochs": 20, "heads_file": None, "bos": "one",
        },
        "loading": None,
        "command": None,
        "fingerprint": dataclasses.asdict(fvlens.fingerprint(model)),
        "loaded": {"quantization": "", "head_writes": load_report(model).head_writes, "notes": []},
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
