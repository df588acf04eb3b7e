"""What stands in front of prompts: the policy, its way through files and results, and tokenizers that are odd."""

import dataclasses
import functools
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_hooked, seeded
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import fvlens
from fvlens.composition import source_scores
from fvlens.models import BOS_POLICIES, bos_differs, embedded_folder, fingerprint, in_front
from fvlens.prompts import Template, TokenClass, build_prompts, get_template, render_prompts
from fvlens.relations import Pair
from fvlens.report import RunOptions
from fvlens.studies import STUDIES, Settings
from fvlens.training import LoRA, SoftPrompt, VectorSet, collateral_change, evaluate_adapted
from fvlens.universal import UniversalHeads
from fvlens.vectors import DistributedVector

BOS = "<|endoftext|>"
OTHER = ("<start>", "<end>")
PAIRS = (Pair("hot", "cold"), Pair("an unquestionably strange request", "an ordinary one"), Pair("big", "small"))
QA = get_template("qa")


def made(front=(), behind=(), **special):
    """The embedded tokenizer with a post-processor that puts these tokens around a text."""
    tokenizer = Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))
    tokenizer.add_special_tokens([token for token in OTHER if token in (*front, *behind, *special.values())])
    if front or behind:
        around = [*front, "$A", *behind]
        known = [(token, tokenizer.token_to_id(token)) for token in {*front, *behind}]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=known)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


ALL_ONE = dict(bos_token=BOS, eos_token=BOS, pad_token=BOS)
TOKENIZERS = {
    "adds nothing": lambda: made(**ALL_ONE),
    "adds one": lambda: made([BOS], **ALL_ONE),
    "adds two": lambda: made([BOS, BOS], **ALL_ONE),
    "adds one and an end": lambda: made([BOS], [OTHER[1]], bos_token=BOS, eos_token=OTHER[1]),
    "adds an end": lambda: made([], [OTHER[1]], bos_token=BOS, eos_token=OTHER[1]),
    "adds another": lambda: made([OTHER[0]], [OTHER[1]], bos_token=BOS, pad_token=OTHER[1]),
    "has none": lambda: made(eos_token=BOS),
    "has none and adds": lambda: made([OTHER[0]], [OTHER[1]]),
}
FRONTS = {
    "adds nothing": ([], [BOS], []),
    "adds one": ([BOS], [BOS], []),
    "adds two": ([BOS], [BOS], []),
    "adds one and an end": ([BOS], [BOS], []),
    "adds an end": ([], [BOS], []),
    "adds another": ([OTHER[0]], [BOS], []),
    "has none": ([], [], []),
    "has none and adds": ([OTHER[0]], [], []),
}
"""What the policies tokenizer, one and none put in front of a prompt."""


def stand_in(tokenizer, n_ctx=160, **cfg):
    """Something with a tokenizer and a context, which is all that prompts need of a model."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx, **cfg), hook_dict={}, blocks=[])


def own_rows(prompts):
    return [row[mask.bool()].tolist() for row, mask in zip(prompts.tokens, prompts.attention_mask, strict=True)]


# --- the policy ---


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_each_policy_puts_its_tokens_in_front_and_nothing_behind(name):
    tokenizer = TOKENIZERS[name]()
    bare = Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))
    for policy, front in zip(BOS_POLICIES, FRONTS[name], strict=True):
        ids = tokenizer.convert_tokens_to_ids(front)
        prompts = build_prompts(stand_in(tokenizer), PAIRS, n_shots=2, template=QA.with_bos(policy), generator=seeded())
        for row, text, query in zip(own_rows(prompts), prompts.texts, prompts.queries, strict=True):
            assert row == [*ids, *bare.encode(text, add_special_tokens=False).ids]
            answer = prompts.answer_tokens[prompts.queries.index(query)]
            assert tokenizer.decode(answer[answer >= 0]) == f" {query.output}"
        assert ((prompts.token_classes == TokenClass.BOS).sum(dim=1) == len(front)).all()
        assert prompts.template.bos == policy
        assert in_front(stand_in(tokenizer), policy) == ids


@pytest.mark.parametrize("name", ["adds nothing", "adds one", "adds two"])
def test_a_text_that_begins_with_bos_gets_no_second_one(name):
    tokenizer = TOKENIZERS[name]()
    chat = Template("chat", "{input}:{output}\n", "{input}:", prefix=BOS)
    for policy in BOS_POLICIES:
        prompts = build_prompts(
            stand_in(tokenizer), PAIRS, n_shots=1, template=chat.with_bos(policy), generator=seeded()
        )
        assert [row.count(tokenizer.bos_token_id) for row in own_rows(prompts)] == [1] * len(PAIRS)


def test_policies_differ_only_where_the_tokenizer_makes_them():
    plain, adds, none = (stand_in(TOKENIZERS[name]()) for name in ("adds nothing", "adds one", "has none"))
    assert bos_differs(plain, "one", "none") and bos_differs(plain, "one", "tokenizer")
    assert not bos_differs(plain, "none", "tokenizer")
    assert not bos_differs(adds, "one", "tokenizer") and bos_differs(adds, "none", "tokenizer")
    assert not any(bos_differs(none, "one", other) for other in BOS_POLICIES)
    assert in_front(stand_in(None), "tokenizer") == in_front(stand_in(None), "one") == []


def test_another_policy_is_refused(unchecked):
    with pytest.raises(ValueError, match="template 'qa': bos='two'; expected one of tokenizer, one, none"):
        QA.with_bos("two")
    with pytest.raises(ValueError, match="bos='two'; expected one of tokenizer, one, none"):
        RunOptions(bos="two")
    with pytest.raises(ValueError, match="bos='two'; expected one of tokenizer, one, none"):
        in_front(stand_in(None), "two")


def test_settings_put_their_policy_into_the_template():
    assert RunOptions().template == "qa"
    assert RunOptions(bos="none").template == QA.with_bos("none")
    own = Template("mine", "{input}:{output}\n", "{input}:", bos="tokenizer")
    assert RunOptions(template=own).template.bos == "tokenizer"
    assert RunOptions(template=own, bos="one").template == own.with_bos("one")


# --- what was made under one policy and is used under another ---


@pytest.fixture(scope="module")
def split():
    return fvlens.load_relation("country-capital").split(seeded())


@pytest.fixture(scope="module")
def found(model, split):
    """What leads to a vector, without BOS."""
    return fvlens.find_vector(
        model, split, n_prompts=4, n_corrupted=2, n_shots=2, n_heads=2, layers=[1], scales=[1],
        template=QA.with_bos("none"), generator=seeded(), progress=False,
    )  # fmt: skip


def warned(call, what, made_with="none", used_with="one"):
    """The call warns once, and says both policies."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    said = f"{what} was made on prompts with bos={made_with!r} and is used on prompts with bos={used_with!r}."
    assert [str(one.message) for one in caught] == [said]
    return result


def test_everything_on_the_way_to_a_vector_has_its_policy(found):
    for one in (found.means, found.effects, found.unscaled, found.vector, found.valid):
        assert one.template == QA.with_bos("none")


def test_a_vector_used_under_another_policy_warns(model, split, found):
    pairs, vector = split.test[:4], found.vector
    other = warned(lambda: fvlens.evaluate(model, pairs, vector=vector, template="qa", generator=seeded()), "a vector")
    same = fvlens.evaluate(model, pairs, vector=vector, generator=seeded())
    assert (same.template.bos, other.template.bos) == ("none", "one")
    assert not torch.equal(same.log_probabilities, other.log_probabilities)
    # what is meant by both policies is the same here: nothing to say
    fvlens.evaluate(model, pairs, vector=vector, template=QA.with_bos("tokenizer"), generator=seeded())
    fvlens.evaluate(model, pairs, template="qa", generator=seeded())
    warned(
        lambda: fvlens.generate_answers(
            model, pairs, vector=vector, template="qa", max_new_tokens=1, generator=seeded()
        ),
        "a vector",
    )
    tuned = warned(
        lambda: fvlens.finetune(
            model, split.train[:4], init=vector, template="qa", epochs=1, generator=seeded(), progress=False
        ),
        "a vector",
    )
    assert tuned.vector.template == QA
    prompts = build_prompts(model, pairs, n_shots=0, generator=seeded())
    warned(lambda: collateral_change(model, vector, prompts, generator=seeded()), "a vector")


def test_means_and_bases_used_under_another_policy_warn(model, split, found):
    shuffled = build_prompts(model, split.train, n_prompts=2, n_shots=2, labels="permuted", generator=seeded())
    warned(lambda: fvlens.indirect_effects(model, shuffled, found.means, progress=False), "the mean of the heads")
    basis = VectorSet((found.vector,))
    assert basis.template.bos == "none"
    warned(lambda: source_scores(model, basis, split.test[:2], template="qa"), "the basis")
    source_scores(model, basis, split.test[:2])


@pytest.mark.parametrize("kind", [SoftPrompt, LoRA])
def test_baselines_know_their_policy(model, split, tmp_path, kind):
    template = QA.with_bos("none")
    how = dict(template=template, epochs=1, generator=seeded(), progress=False)
    if kind is SoftPrompt:
        change = fvlens.training.soft_prompt(model, split.train[:4], n_tokens=2, **how).change
    else:
        change = fvlens.training.lora(model, split.train[:4], rank=1, **how).change
    loaded = kind.load(change.save(tmp_path / "x.safetensors"), model=model)
    assert change.template == loaded.template == template
    warned(lambda: evaluate_adapted(model, split.test[:2], loaded, template="qa", generator=seeded()), "a vector")
    evaluate_adapted(model, split.test[:2], loaded, template=template, generator=seeded())


def test_files_keep_the_policy(model, found, tmp_path):
    vector = fvlens.FunctionVector.load(found.vector.save(tmp_path / "v.safetensors"), model=model)
    assert vector.template == QA.with_bos("none")
    each = fvlens.distributed_vector(model, found.means, heads=found.heads)
    assert DistributedVector.load(each.save(tmp_path / "d.safetensors")).template == each.template == vector.template
    basis = VectorSet.load(
        VectorSet((vector, dataclasses.replace(vector, relation="b"))).save(tmp_path / "s.safetensors")
    )
    assert basis.template == vector.template
    prompts = build_prompts(model, PAIRS, n_shots=1, template=vector.template, generator=seeded())
    cache = fvlens.activation_cache(model, prompts, sites="z", layers=[0], progress=False)
    assert type(cache).load(cache.save(tmp_path / "c.safetensors")).prompts.template == vector.template
    heads = UniversalHeads(
        n=1, relations=("a",), data_hashes=("x",),
        aie=torch.zeros(1, 2, 2), prompt_stderr=torch.zeros(1, 2, 2), icl_top1=torch.ones(1),
        icl_interval=torch.ones(1, 2), majority=torch.zeros(1), labels="permuted", n_shots=1, n_prompts=2,
        n_corrupted=2, template=vector.template, path="kv", complete=True,
        fingerprint=dataclasses.replace(fingerprint(model), n_layers=2, n_heads=2),
    )  # fmt: skip
    assert UniversalHeads.load(heads.save(tmp_path / "h.json")).template == vector.template


def test_a_training_of_before_goes_on(model, split):
    """Its state does not say what stood in front of prompts: one BOS token."""
    how = dict(init="zero", layer=1, generator=seeded(), progress=False)
    short = fvlens.finetune(model, split.train[:4], epochs=2, **how)
    state = dataclasses.replace(short.state, header=json.loads(json.dumps(short.state.header)))
    del state.header["settings"]["template"]["bos"]
    state.header["fingerprint"]["bos"] = "one"
    again = fvlens.finetune(model, split.train[:4], epochs=2, resume=state, **{**how, "generator": seeded()})
    assert torch.equal(again.vector.vector, short.vector.vector)
    with pytest.raises(ValueError, match=r"the saved training has settings .*'bos': 'one'.*this one .*'bos': 'none'"):
        fvlens.finetune(
            model, split.train[:4], epochs=2, resume=state, template=QA.with_bos("none"),
            **{**how, "generator": seeded()},
        )  # fmt: skip


# --- the command line ---


def test_a_run_without_bos_and_again(call, model, tmp_path):
    folder = tmp_path / "run"
    few = ["--n-shots", 2, "--n-prompts", 4, "--n-heads", 2, "--epochs", 0, "--n-others", 1, "--n-random", 1]
    code, _, err = call("run", "plural", "--bos", "none", "--out", folder, *few, "--quiet")
    assert (code, err) == (0, "")
    read = json.loads((folder / "results.json").read_text())
    assert (read["options"]["template"], read["options"]["bos"]) == ("qa", "none")
    assert "template_text" not in read["options"]
    file = folder / "vector.safetensors"
    assert fvlens.FunctionVector.load(file).template == QA.with_bos("none")
    code, out, _ = call("rerun", folder, "--quiet")
    assert code == 0 and "the same run" in out

    bare = call("inject", file, "dog")
    ids = model.tokenizer("Q: dog\nA:", add_special_tokens=False)["input_ids"]
    said = "^vector.safetensors was made on prompts with bos='none' and is used on prompts with bos='one'"
    with pytest.warns(UserWarning, match=said):
        other = call("inject", file, "dog", "--bos", "one")
    for (code, out, err), front in ((bare, []), (other, [model.tokenizer.bos_token_id])):
        best = model(torch.tensor([[*front, *ids]]))[0, -1].argmax()
        assert code == 0 and "warning" not in err.lower() and f"{model.tokenizer.decode([best])!r} " in out
    assert bare[1] != other[1]

    options = fvlens.report.read_run(folder).options
    assert (options.bos, options.template) == ("none", QA.with_bos("none"))
    # files of before do not say it
    del read["options"]["bos"]
    (folder / "results.json").write_text(json.dumps(read))
    options = fvlens.report.read_run(folder).options
    assert (options.bos, options.template) == (None, "qa") and QA.bos == "one"


def test_bos_is_an_option_where_prompts_are_written(refused, call):
    for command in ("run", "heads", "compose", "compare", "universal"):
        code, out, _ = call(command, "--help")
        assert code == 0 and "--bos" in out
    assert "'two' is not one of 'tokenizer', 'one', 'none'" in refused("heads", "plural", "--bos", "two")


# --- the study ---


def test_the_study_asks_under_each_policy(model):
    study = STUDIES["bos"]
    cells = study.cells(Settings(relations=("plural",)))
    assert [(cell.seed, cell["bos"]) for cell in cells] == [(0, "one"), (0, "none"), (1, "one"), (1, "none")]
    asked = fvlens.load_relation("plural").split(seeded(), valid=0.4).valid[:20]
    encode = functools.partial(model.tokenizer.encode, add_special_tokens=False)
    for cell, front in ((cells[0], [model.tokenizer.bos_token_id]), (cells[1], [])):
        rows = study.run(cell, model)
        assert [row["prompt"] for row in rows] == ["bare query", "10-shot", "function vector", "fine-tuned vector"]
        logs = []
        for pair in asked:
            prompt, whole = encode(f"Q: {pair.input}\nA:"), encode(f"Q: {pair.input}\nA: {pair.output}")
            with torch.no_grad():
                said = model(torch.tensor([[*front, *whole]]))[0].log_softmax(dim=-1)
            places = range(len(prompt), len(whole))
            logs.append(sum(float(said[len(front) + place - 1, whole[place]]) for place in places))
        assert rows[0]["log_probability"] == pytest.approx(sum(logs) / len(logs), abs=1e-3)


def test_the_study_s_differences_are_paired_by_relation():
    given = {("a", 0): (0.5, 0.25), ("a", 1): (1.0, 0.25), ("b", 0): (0.0, 0.5), ("b", 1): (0.5, 0.5)}
    rows = [
        {"relation": name, "seed": seed, "bos": policy, "prompt": "10-shot", "top1": top1, "log_probability": -top1}
        for (name, seed), both in given.items()
        for policy, top1 in zip(("one", "none"), both, strict=True)
    ]
    tables = STUDIES["bos"].tables(rows)
    row = tables["policies"].iloc[0]
    assert (row.top1_one, row.top1_none) == (0.5, 0.375)  # means over a (0.75, 0.25) and b (0.25, 0.5)
    assert (row.top1_gain, row.top1_low, row.top1_high) == (0.125, -0.25, 0.5)
    assert (row.log_probability_gain, row.log_probability_low) == (-0.125, -0.5)
    assert tables["relations"][["top1_one", "top1_none"]].to_numpy().tolist() == [[0.75, 0.25], [0.25, 0.5]]
    begun = STUDIES["bos"].tables(rows[:5])["policies"].iloc[0]  # of b there is one policy so far
    assert (begun.top1_gain, begun.top1_low, begun.top1_high) == (0.5, 0.5, 0.5)


# --- odd tokenizers ---

backends = pytest.mark.parametrize("backend", [pytest.param("hooked", marks=needs_hooked), "bridge"])


def with_tokenizer(tokenizer, folder, backend):
    """The embedded model with another tokenizer in its folder."""
    shutil.copytree(embedded_folder(), folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    return fvlens.load_model(folder, device="cpu", backend=backend)


@backends
@pytest.mark.parametrize("special", [dict(bos_token=BOS), dict(), ALL_ONE], ids=["no pad", "none at all", "all one"])
def test_padding_is_seen_whatever_its_token_is(tmp_path, backend, special):
    """A batch of prompts of unequal lengths says what each says alone."""
    model = with_tokenizer(made(**special), tmp_path, backend)
    together = build_prompts(model, PAIRS, n_shots=1, generator=seeded())
    assert len({len(row) for row in own_rows(together)}) > 1
    assert all((row[0] == model.tokenizer.bos_token_id) == ("bos_token" in special) for row in own_rows(together))
    vector = fvlens.FunctionVector(
        3 * torch.randn(model.cfg.d_model, generator=seeded()), 1, (), "", fingerprint(model)
    )
    for path in (None, "naive"):
        found = fvlens.evaluate(model, together, vector=vector, path=path, generator=seeded())
        alone = [
            fvlens.evaluate(model, together.select([i]), vector=vector, path="naive", generator=seeded())
            for i in range(len(PAIRS))
        ]
        expected = torch.cat([one.log_probabilities for one in alone])
        torch.testing.assert_close(found.log_probabilities, expected, atol=2e-5, rtol=1e-5)
    texts = fvlens.generate_answers(model, together, vector=vector, max_new_tokens=2, generator=seeded()).raw_texts
    for i, text in enumerate(texts):
        single = fvlens.generate_answers(
            model, together.select([i]), vector=vector, max_new_tokens=2, generator=seeded()
        )
        assert single.raw_texts == (text,)


@backends
def test_strings_with_an_end_behind_are_refused_where_the_last_position_counts(tmp_path, backend):
    """The vector would land on the end."""
    model = with_tokenizer(made([BOS], ["!"], **ALL_ONE), tmp_path, backend)
    text = "Q: hot\nA:"
    prompts = build_prompts(model, PAIRS[:1], n_shots=0, generator=seeded())
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert own_rows(prompts) == [[model.tokenizer.bos_token_id, *ids]]
    vector = fvlens.FunctionVector(torch.ones(model.cfg.d_model), 1, (), "", fingerprint(model))
    options = dict(max_new_tokens=1, do_sample=False, verbose=False)
    said = "^inject: the tokenizer puts '!' behind every text, and the last position is what is changed; give tokens"
    with fvlens.inject(model, vector):
        for call in (model, model.run_with_cache, lambda given: model.generate(given, **options)):
            for given in (text, [text], [text, text]):
                with pytest.raises(ValueError, match=said):
                    call(given)
        model(prompts.tokens)
    model(text)


def test_a_batch_padded_on_the_right_by_to_tokens_is_refused(model):
    """Tokens without a mask, as a tokenizer that pads on the right makes them of texts of unequal lengths."""
    texts = ["Q: dog", "Q: cold\nA: hot\n\nQ: big\nA:"]
    vector = fvlens.FunctionVector(torch.ones(model.cfg.d_model), 1, (), "", fingerprint(model))
    model.tokenizer.padding_side = "right"
    try:
        tokens = model.to_tokens(texts)
        assert tokens[0, -1] == model.tokenizer.pad_token_id
        with fvlens.inject(model, vector):
            for call in (model, model.run_with_cache, lambda given: model.generate(given, verbose=False)):
                with pytest.raises(ValueError, match=r"^inject: prompt 0 ends with the padding token 0, and others do"):
                    call(tokens)
            model(tokens[1:])
        # ours are padded on the left in any case
        prompts = build_prompts(model, PAIRS, n_shots=0, generator=seeded())
        assert prompts.attention_mask[:, -1].all() and not prompts.attention_mask.all()
    finally:
        model.tokenizer.padding_side = "left"


@pytest.fixture(scope="module")
def few_words():
    """A tokenizer that knows some words, and writes all others as one token."""
    known = ["<unk>", "Q", ":", "A", "hot", "cold", "big", "small", "=>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("queries", "shown", "words"),
    [
        ([("hot", "cold"), ("icy", "cold")], [("big", "small")], "'icy'"),
        ([("hot", "warm"), ("icy", "cold")], [("big", "small")], "'warm', 'icy'"),
        ([("hot", "cold")] * 2, [("big", "tiny little")], "'tiny little'"),
        ([("a", "b"), ("c", "d")], [("e", "f")], "'a', 'b', 'c', 'd', 'e' and 1 more"),
    ],
)
def test_words_that_the_tokenizer_does_not_know_are_named(few_words, queries, shown, words):
    asked = [Pair(*query) for query in queries]
    demonstrations = [[Pair(*pair) for pair in shown]] * len(asked)
    said = re.escape(f"the tokenizer does not know {words} and writes '<unk>' in their place; leave these pairs out.")
    with pytest.raises(ValueError, match=said):
        render_prompts(stand_in(few_words), asked, demonstrations, n_shots=1)


def test_a_template_that_the_tokenizer_does_not_know_is_refused(few_words):
    asked = [Pair("hot", "cold")]
    said = r"the tokenizer does not know some of the template.s text and writes it as '<unk>'; use another template"
    with pytest.raises(ValueError, match=said):
        render_prompts(stand_in(few_words), asked, [[]], template="arrow", n_shots=0)
    own = Template("own", "{input} =>{output}\n", "{input} =>")
    assert own_rows(render_prompts(stand_in(few_words), asked, [[]], template=own, n_shots=0)) == [[4, 8]]
    # written out, it is meant
    own = Template("own", "{input} =>{output}\n", "<unk>{input} =>")
    assert own_rows(render_prompts(stand_in(few_words), asked, [[]], template=own, n_shots=0)) == [[0, 4, 8]]


def test_a_bare_query_longer_than_the_context_says_which(model):
    long = Pair("very " * 40 + "long", "short")
    said = (
        r"a prompt with its answer is \d+ tokens long, but the model's context holds 30; leave this pair out or a sho"
    )
    with pytest.raises(ValueError, match=said):
        build_prompts(stand_in(model.tokenizer, n_ctx=30), [*PAIRS, long], n_shots=0, generator=seeded())


def test_a_front_that_has_no_embedding_is_refused():
    tokenizer = made([OTHER[0]], **ALL_ONE)
    beyond = tokenizer.convert_tokens_to_ids(OTHER[0])
    model = stand_in(tokenizer, d_vocab=beyond)
    build_prompts(model, PAIRS, n_shots=0, generator=seeded())
    said = f"holds the token '{OTHER[0]}' .id {beyond}., but the model has embeddings for ids below {beyond} only"
    with pytest.raises(ValueError, match=said):
        build_prompts(model, PAIRS, n_shots=0, template=QA.with_bos("tokenizer"), generator=seeded())
