"""The chain on a real language model, SmolLM2-135M-Instruct, against plain Hugging Face: ``pytest -m real``."""

import json

import pytest
import torch
from conftest import seeded
from oracle import hf

import fvlens
from fvlens.models import PACKAGED_MODELS, bos_token_id, fingerprint, load_report
from fvlens.models._packaged import packaged_file

NAME = "smollm2-135m"


def _missing():
    """Why the model is not here; None if it is."""
    try:
        import gguf  # noqa: F401

        packaged_file(NAME)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


MISSING = _missing()
pytestmark = [pytest.mark.real, pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")]


@pytest.fixture(scope="module")
def real():
    return fvlens.load_model(NAME, device="cpu")


@pytest.fixture(scope="module")
def plain():
    """The same file in transformers alone."""
    from transformers import AutoModelForCausalLM

    file = packaged_file(NAME)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def split():
    return fvlens.load_relation("verb-past").split(seeded())


@pytest.fixture(scope="module")
def found(real, split):
    return fvlens.find_vector(
        real, split, labels="permuted", n_shots=5, n_prompts=20, n_corrupted=6, layers=range(8, 24, 3), scales=(1, 2),
        relation="verb-past", generator=seeded(), progress=False,
    )  # fmt: skip


def row_of(prompts, index):
    """Token ids of one prompt without its padding."""
    return prompts.tokens[index][prompts.attention_mask[index].bool()].tolist()


def test_the_model_is_the_one_of_the_package(real, plain):
    cfg, mark, report = real.cfg, fingerprint(real), load_report(real)
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_vocab) == (30, 9, 576, 49152)
    assert (mark.name, mark.source, mark.dtype) == (NAME, NAME, "float32")
    assert mark.quantization.startswith("GGUF Q4_1 ")
    assert report.head_writes < 1e-4
    assert PACKAGED_MODELS[NAME].version == "0.1.2"
    tokens = torch.randint(0, cfg.d_vocab, (2, 40), generator=seeded())
    with torch.inference_mode():
        torch.testing.assert_close(real(tokens), plain(tokens).logits, atol=2e-3, rtol=0)


def test_library_words_and_digits_come_back_from_their_tokens(real):
    words = [word for name in fvlens.list_relations() for pair in fvlens.load_relation(name).pairs for word in pair]
    texts = [*(f" {word}" for word in dict.fromkeys(words)), "I'm 1,234 years old, don't ask.", "a\n\nb  c"]
    ids = real.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert real.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) == texts
    pieces = real.tokenizer.tokenize(" 1234")
    assert pieces[-4:] == ["1", "2", "3", "4"]  # every digit is a token of its own


def test_effects_are_those_of_whole_passes(real, plain, split, found):
    prompts = fvlens.build_prompts(
        real, split.train, queries=split.valid, n_prompts=2, n_shots=5, labels="permuted", generator=seeded(3)
    )
    effects = fvlens.indirect_effects(real, prompts, found.means, progress=False)
    heads = [*found.effects.ranking[:3], found.effects.ranking[100], found.effects.ranking[-1]]
    assert len(found.effects.ranking) == 270
    for index in range(2):
        row, answer = row_of(prompts, index), [int(token) for token in prompts.answer_tokens[index] if token >= 0]
        before = hf.answer_probability(plain, row, answer)
        for head in heads:

            def patch(where, z, head=head):
                z[-1, head.head] = found.means.z[head]
                return z

            with hf.heads_seen(plain, [head.layer], patch):
                after = hf.answer_probability(plain, row, answer)
            assert float(effects.cie[index, head.layer, head.head]) == pytest.approx(after - before, abs=1e-5)
    assert effects.cie.abs().max() > 1e-3


def test_an_evaluation_is_plain_hugging_faces(real, plain, split, found):
    score = fvlens.evaluate(real, split.test, vector=found.vector, generator=seeded())
    prompts = fvlens.build_prompts(real, split.test, n_shots=0, generator=seeded())
    assert [pair.input for pair in score.queries] == [pair.input for pair in prompts.queries]
    for index in range(len(prompts.queries)):
        after = hf.steered_logits(plain, row_of(prompts, index), found.vector.vector, found.layer)[-1]
        token = int(prompts.answer_tokens[index, 0])
        assert float(score.probabilities[index]) == pytest.approx(float(after.softmax(-1)[token]), abs=1e-4)
        assert int(score.ranks[index]) == int((after > after[token]).sum())


def test_a_function_vector_works_and_a_fine_tuned_one_works_better(real, split, found):
    bare = fvlens.evaluate(real, split.test, generator=seeded())
    untuned = fvlens.evaluate(real, split.test, vector=found.vector, generator=seeded())
    tuned = fvlens.finetune(
        real, split.train[:20], init=found.vector, valid=split.valid, epochs=6, generator=seeded(), progress=False
    )
    trained = fvlens.evaluate(real, split.test, vector=tuned.vector, generator=seeded())
    assert bare.top1 + 0.1 < untuned.top1 < trained.top1 - 0.1
    assert bos_token_id(real) is not None


def test_chat_prompts_are_those_of_its_chat_format(real, split):
    for n_shots, labels in ((0, "true"), (3, "permuted")):
        prompts = fvlens.build_prompts(
            real, split.train, queries=split.test, n_shots=n_shots, labels=labels, template="chat", generator=seeded()
        )
        for index, query in enumerate(prompts.queries):
            said = [turn for x, y in prompts.demonstrations[index] for turn in (("user", x), ("assistant", y))]
            turns = [{"role": role, "content": text} for role, text in (*said, ("user", query.input))]
            expected = real.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert row_of(prompts, index) == expected
            answer = [int(token) for token in prompts.answer_tokens[index] if token >= 0]
            assert answer == real.tokenizer(query.output, add_special_tokens=False)["input_ids"]
    assert prompts.template.prefix.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_an_answer_of_a_chat_ends_with_its_turn(real, split):
    found = fvlens.generate_answers(
        real, split.test[:6], setting="icl", demonstrations=split.train, template="chat", max_new_tokens=8,
        generator=seeded(),
    )  # fmt: skip
    assert found.ended.all()
    assert not any("<|" in text for text in found.raw_texts)


def test_the_commands_take_it_by_name(call, tmp_path):
    few = ["--n-shots", 3, "--n-prompts", 6, "--n-corrupted", 2, "--n-heads", 4, "--n-random", 1, "--n-others", 0]
    place = ["--layer", 12, "--scale", 2, "--epochs", 0, "--quiet"]
    code, out, err = call("run", "verb-past", "--model", NAME, "--out", tmp_path / "run", *few, *place)
    assert (code, err) == (0, "")
    assert f"verb-past on {NAME}" in out
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["loaded"]["quantization"] == content["fingerprint"]["quantization"]
    assert content["loaded"]["head_writes"] < 1e-4
    code, out, err = call("inject", tmp_path / "run" / "vector.safetensors", "walk")
    assert (code, err.splitlines()[0]) == (0, f"vector.safetensors names the model {NAME}")
