"""Whole answers: ``exact`` is what a plain Hugging Face model writes greedily; first tokens that are shared."""

import dataclasses
import warnings

import pytest
import torch
from conftest import seeded
from oracle import hf
from transformers import AutoModelForCausalLM

import fvlens
from fvlens.evaluation import evaluate
from fvlens.models import embedded_folder, fingerprint
from fvlens.prompts import PAD_ANSWER, AnswerTokens, build_prompts, check_pairs
from fvlens.relations import Pair, Relation
from fvlens.scoring import score
from fvlens.training import finetune
from fvlens.training._adaptations import Unchanged
from fvlens.training._collateral import _read_scores
from fvlens.vectors import FunctionVector

SHARING = [("hot", "coldx"), ("big", "coldq"), ("old", "new"), ("up", "down")]


@pytest.fixture(scope="module")
def plain():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(embedded_folder(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def vector(model):
    direction = torch.randn(model.cfg.d_model, generator=seeded(1))
    return FunctionVector(4.0 * direction / direction.norm(), 1, (), "made", fingerprint(model))


@pytest.fixture(scope="module")
def asked(model, plain, vector):
    """Prompts whose answers are what the plain model writes under the vector, or differ from it in one token."""
    prompts = build_prompts(model, fvlens.load_relation("antonym").pairs[:12], n_shots=0, generator=seeded())
    rows = [row[keep.bool()].tolist() for row, keep in zip(prompts.tokens, prompts.attention_mask, strict=True)]
    answers = []
    for i, row in enumerate(rows):
        answer = hf.greedy(plain, row, 1 + i % 3, vector.vector, vector.layer)
        if i % 4 == 1:
            answer[-1] = (answer[-1] + 1) % model.cfg.d_vocab  # wrong at the end
        if i % 4 == 2:
            answer[0] = (answer[0] + 1) % model.cfg.d_vocab  # wrong at the start, and so what follows it differs
        answers.append(answer)
    padded = torch.tensor([answer + [PAD_ANSWER] * (3 - len(answer)) for answer in answers])
    return dataclasses.replace(prompts, answer_tokens=padded), rows, answers


@pytest.mark.parametrize("path", ["weights", "kv", "naive"])
def test_exact_is_what_a_plain_model_writes_greedily(model, plain, vector, asked, path):
    prompts, rows, answers = asked
    written = {
        name: [
            hf.greedy(plain, row, len(answer), given, 1) == answer for row, answer in zip(rows, answers, strict=True)
        ]
        for name, given in (("plain", torch.zeros_like(vector.vector)), ("steered", vector.vector))
    }
    found = score(model, prompts, [None, vector], path=path)
    assert found.exact.tolist() == [written["plain"], written["steered"]]
    assert 0 < sum(written["steered"]) < len(rows) and written["plain"] != written["steered"]
    right_at_first = (found.ranks == 0) & ~found.exact
    assert right_at_first.any() and not (found.exact & (found.ranks > 0)).any()


def test_an_evaluation_carries_it_beside_top1(model, vector, asked):
    prompts, _, _ = asked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(model, prompts, vector=vector, generator=seeded())
    expected = score(model, prompts, [vector]).exact[0]
    assert torch.equal(found.whole, expected) and found.exact == pytest.approx(expected.double().mean().item())
    assert found.exact < found.top1 and f"exact={found.exact:.3f}" in repr(found)
    assert found.to_dataframe()["exact"].tolist() == expected.tolist()
    one_token = evaluate(model, [("hot", "cold"), ("big", "small")], generator=seeded())
    assert one_token.exact == one_token.top1 and "exact" not in repr(one_token) and one_token.caution == ""


def test_methods_that_act_on_whole_prompts_have_it_too(model, asked):
    prompts, _, _ = asked
    assert torch.equal(_read_scores(model, Unchanged(), prompts, None).exact, score(model, prompts, [None]).exact)


def test_first_tokens_that_are_shared_are_counted_and_warned_of(model):
    """Counted by the tokenizer alone; top-1 takes one such answer for the other, exact does not."""
    first = [model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0] for _, answer in SHARING]
    assert first[0] == first[1] and len(set(first)) == 3
    message = "evaluate: 2 of 4 different answers share their first token with another, so top-1, which"
    with pytest.warns(UserWarning, match=message):
        found = evaluate(model, SHARING, generator=seeded())
    assert found.n_first_tokens == 3 and message.partition(": ")[2] in found.caution
    # answers that all begin with what the model says first, and go on otherwise: top-1 is 1, and nothing is right
    bare = build_prompts(model, [("hot", "cold"), ("big", "small")], n_shots=0, generator=seeded())
    best = score(model, bare, [None]).best[0]
    lie = dataclasses.replace(bare, answer_tokens=torch.stack([best, (best + 1) % model.cfg.d_vocab], dim=1))
    said = evaluate(model, lie, generator=seeded())
    assert said.top1 == 1.0 and said.exact == score(model, lie, [None], path="naive").exact.double().mean()


def test_sweeps_and_controls_have_it(model, vector):
    table = fvlens.layer_sweep(
        model, [("hot", "cold"), ("big", "smallish")], vector, generator=seeded(), progress=False
    )
    frame = table.to_dataframe()
    assert frame["exact"].tolist() == [one.exact for one in table.evaluations]
    assert (frame["exact"] <= frame["top1"]).all()


# --- what pairs are worth ---


def test_what_pairs_are_worth(model):
    pairs = [*SHARING, ("hot", "warm"), ("New York City", "New York"), ("up ", "down")]
    found = check_pairs(pairs, model, generator=seeded())
    answers = [answer for _, answer in [*SHARING, ("New York City", "New York")]]
    ids = [tuple(model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers]
    firsts = [one[0] for one in ids]
    assert found.answers == AnswerTokens(
        n=5,
        n_one_token=sum(len(one) == 1 for one in ids),
        n_first_tokens=len(set(firsts)),
        n_sharing=sum(firsts.count(one) > 1 for one in firsts),
    )
    assert (len(found.relation), found.n_in_input, found.split, found.trainable) == (5, 1, None, False)
    assert [one.why for one in found.dropped] == ["another output, 'coldx', stands before it", "stands twice"]
    assert found.no_split.startswith("split: expected a relation of at least 6 pairs, got 5")
    assert found.cautions[0] == found.no_split and found.answers.caution in found.cautions
    rows = dict(found.rows())
    assert rows["pairs kept"] == "5" and rows["dropped, stand twice"] == rows["dropped, another output before"] == "1"
    assert rows["answers in their own input"] == "1 of 5" and rows["20 pairs to train on"] == "no"
    assert rows["different first tokens"] == str(len(set(firsts)))
    assert list(found.to_dataframe().columns) == ["what", "number"] and len(found.to_dataframe()) == len(rows)
    assert repr(found).startswith("PairsCheck(custom pairs: 5 pairs kept, 2 dropped, ")


def test_a_library_relation_is_worth_training_on(model):
    whole = fvlens.load_relation("antonym")
    found = check_pairs("antonym", generator=seeded(3))
    split = whole.split(seeded(3))
    assert found.split == split and found.trainable and found.answers is None and found.model_name == ""
    assert (
        dict(found.rows())["train, valid, test pairs"] == f"{len(split.train)}, {len(split.valid)}, {len(split.test)}"
    )
    assert found.cautions == () and found.notes == () and found.dropped == ()
    few = Relation("few", whole.pairs[:12])
    assert "only 5 pairs are left for training, where 20 are usual" in check_pairs(few, generator=seeded()).cautions[0]
    same = Relation("same", tuple(Pair(str(i), "ab"[i % 2]) for i in range(20)))
    assert "outputs recur too often to be kept apart" in " ".join(check_pairs(same, generator=seeded()).cautions)


# --- one reader everywhere ---


def test_every_function_takes_every_shape(model, tmp_path):
    """The same numbers of a list, records, an iterator, a frame and a file; iterators are gone through once."""
    import pandas as pd

    pairs = [tuple(pair) for pair in fvlens.load_relation("antonym").pairs[:8]]
    table = tmp_path / "mine.csv"
    pd.DataFrame(pairs, columns=["input", "output"]).to_csv(table, index=False)
    shapes = [[{"k": a, "v": b} for a, b in pairs], dict(pairs), pd.DataFrame(pairs), table]
    how = dict(setting="icl", n_shots=2)
    expected = evaluate(model, pairs, demonstrations=pairs, generator=seeded(), **how)
    for shape in [*shapes, iter(pairs)]:
        shown = iter(pairs) if not isinstance(shape, list | dict | pd.DataFrame) and shape is not table else shape
        found = evaluate(model, shape, demonstrations=shown, generator=seeded(), **how)
        assert torch.equal(found.ranks, expected.ranks) and found.data_hash == expected.data_hash
        assert found.relation == ("mine" if shape is table else "")
    bare = evaluate(model, zip(*zip(*pairs, strict=True), strict=True), generator=seeded())
    assert torch.equal(bare.ranks, evaluate(model, pairs, generator=seeded()).ranks)
    settings = dict(init="zero", layer=1, epochs=1, progress=False)
    vectors = [finetune(model, s, valid=s, generator=seeded(), **settings).vector for s in [pairs, *shapes]]
    assert all(torch.equal(one.vector, vectors[0].vector) for one in vectors)
    assert [one.relation for one in vectors] == ["", "", "", "", "mine"]
    for shape in (iter(pairs), *shapes):
        prompts = build_prompts(model, shape, n_shots=2, generator=seeded())
        assert [tuple(query) for query in prompts.queries] == pairs


@pytest.mark.parametrize("part", ["pairs", "demonstrations"])
def test_bad_pairs_are_refused_everywhere_by_name(model, unchecked, part):
    good = [("hot", "cold"), ("big", "small"), ("up", "down")]
    for bad, message in ((["ab", "cd", "ef"], "got the text 'ab'"), ([{"a": "b"}], "a record with two fields")):
        given = {"pairs": good, "demonstrations": good, part: bad}
        with pytest.raises(ValueError, match=f"evaluate: {part}, pair 1: expected .*{message}"):
            evaluate(model, given["pairs"], demonstrations=given["demonstrations"], setting="icl", n_shots=1,
                     generator=seeded())  # fmt: skip
        how = dict(init="zero", layer=1, generator=seeded(), progress=False)
        name = "pairs" if part == "pairs" else "valid"
        with pytest.raises(ValueError, match=f"finetune: {name}, pair 1: expected .*{message}"):
            finetune(model, given["pairs"], valid=given["demonstrations"], **how)
    with pytest.raises(
        ValueError, match="build_prompts: pool: expected a list of texts or None, got 'ab'; put them into a list"
    ):
        build_prompts(model, good, n_shots=1, labels="random", pool="ab", generator=seeded())
