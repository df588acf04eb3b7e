"""The template "chat" against ``apply_chat_template``, on tokenizers with chat formats of several kinds."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TOKENIZER, random_model, seeded
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import fvlens
from fvlens import FunctionVector
from fvlens.composition import CompositeMap, library_composite
from fvlens.prompts import (
    AnswerEnd,
    Template,
    TokenClass,
    build_prompts,
    chat_template,
    check_pairs,
    get_template,
    template_for,
)
from fvlens.relations import Pair, load_relation
from fvlens.universal import UniversalHeads, _find, universal_heads

SYSTEM = "<|im_start|>system\nYou are kind.<|im_end|>\n"
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user and assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CLOSED = (
    "{{ '<s>' }}" + NO_SYSTEM + ALTERNATING + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "(m['content'] | trim) + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
"""One BOS at the start, an end of text behind a conversation that is over; what is said is trimmed, and an answer has
another header when it is asked for than when it is there."""

LLAMA = (
    NO_SYSTEM + ALTERNATING + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORMATS = {
    "turns": TURNS,
    "turns with a system text": "{% if messages[0]['role'] != 'system' %}{{ '" + SYSTEM + "' }}{% endif %}" + TURNS,
    "one BOS, trimmed": CLOSED,
    "BOS in every turn": LLAMA,
    "system text inside the first turn": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first %}{{ '<<SYS>>\nBe kind.\n<</SYS>>\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "a thought before the answer": TURNS.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
    "plain text": (
        "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    ),
}
BEFORE = {"BOS in every turn": " ", "system text inside the first turn": " ", "plain text": " "}
pytestmark = pytest.mark.filterwarnings("ignore:.* share their first token with another")  # letters, most of them

PAIRS = (*load_relation("antonym").pairs[:12], Pair("naïve 42!", "two words"), Pair("O'Neil & son", "x"))


def tokenizer_with(chat):
    """The tests' tokenizer with tokens for turns, and a chat format."""
    made = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    made.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    made.chat_template = chat
    return made


def stand_in(tokenizer):
    """Something with a tokenizer and a context, which is all that prompts need of a model."""
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=2000))


@pytest.fixture(scope="module", params=list(FORMATS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return tokenizer_with(FORMATS[kind])


@pytest.fixture(scope="module")
def chatting():
    """A random-weight model whose tokenizer has a chat format with a system text."""
    tokenizer = tokenizer_with(FORMATS["turns with a system text"])
    made = random_model(d_vocab=len(tokenizer), n_ctx=400)
    tokenizer.padding_side = "left"
    made.tokenizer = tokenizer
    return made


def turns(shown, word):
    said = [part for x, y in shown for part in (("user", x), ("assistant", y))]
    return [{"role": role, "content": text} for role, text in (*said, ("user", word))]


def row_of(prompts, i):
    return prompts.tokens[i][prompts.attention_mask[i].bool()].tolist()


@pytest.mark.parametrize("labels", ["true", "permuted", "deranged", "random"])
@pytest.mark.parametrize("n_shots", [0, 1, 4])
def test_tokens_are_those_of_apply_chat_template(kind, tokenizer, n_shots, labels):
    if labels == "deranged" and n_shots == 1:
        return  # one label cannot be deranged
    prompts = build_prompts(
        stand_in(tokenizer), PAIRS, n_shots=n_shots, labels=labels, template="chat", generator=seeded()
    )
    for i, query in enumerate(prompts.queries):
        asked = turns(prompts.demonstrations[i], query.input)
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert row_of(prompts, i) == expected
        assert prompts.texts[i] == tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        answer = prompts.answer_tokens[i][prompts.answer_mask[i]].tolist()
        assert tokenizer.decode(answer) == BEFORE.get(kind, "") + query.output
        assert tokenizer(prompts.texts[i] + tokenizer.decode(answer), add_special_tokens=False)["input_ids"] == [
            *expected, *answer
        ]  # fmt: skip
    assert prompts.template.before_output == BEFORE.get(kind, "")


def test_the_answer_is_what_the_format_writes_for_it(kind, tokenizer):
    """Given its answer, a prompt goes on as the format does, where it writes answers as it asks for them."""
    if kind in ("one BOS, trimmed", "a thought before the answer"):
        return  # these ask for an answer in another way
    prompts = build_prompts(stand_in(tokenizer), PAIRS, n_shots=2, template="chat", generator=seeded())
    for i, query in enumerate(prompts.queries):
        said = [*turns(prompts.demonstrations[i], query.input), {"role": "assistant", "content": query.output}]
        whole = tokenizer.apply_chat_template(said, tokenize=False)
        assert whole.startswith(prompts.texts[i] + prompts.template.answered(query.output))


def test_every_token_is_classed_by_what_it_is_for():
    tokenizer = tokenizer_with(FORMATS["turns with a system text"])
    prompts = build_prompts(stand_in(tokenizer), PAIRS, n_prompts=1, n_shots=1, template="chat", generator=seeded())
    (shown,), query = prompts.demonstrations[0], prompts.queries[0]
    by_class = {}
    for token, kind in zip(prompts.tokens[0].tolist(), prompts.token_classes[0].tolist(), strict=True):
        by_class.setdefault(TokenClass(kind), []).append(token)
    text = {kind: tokenizer.decode(tokens) for kind, tokens in by_class.items()}
    ask, answer, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    assert text == {
        TokenClass.PREFIX: SYSTEM,
        TokenClass.SEPARATOR: f"{ask}{end}{answer}{end}{ask}{end}{answer}"[: -len("\n")],
        TokenClass.DEMONSTRATION_INPUT: shown.input,
        TokenClass.DEMONSTRATION_LABEL: shown.output,
        TokenClass.QUERY: query.input,
        TokenClass.PREDICTIVE: "\n",
    }


@pytest.mark.parametrize(("kind", "n"), [("one BOS, trimmed", 1), ("BOS in every turn", 3)])
def test_bos_is_as_the_format_writes_it(kind, n):
    """Also where the tokenizer puts one in front of every text by itself, and where one is asked for."""
    tokenizer = tokenizer_with(FORMATS[kind])
    bos = tokenizer.bos_token_id
    for template in ("chat", get_template("chat").with_bos("one"), get_template("chat").with_bos("tokenizer")):
        prompts = build_prompts(stand_in(tokenizer), PAIRS, n_shots=2, template=template, generator=seeded())
        for i in range(len(prompts)):
            row = row_of(prompts, i)
            assert (row[0], row.count(bos)) == (bos, n)
            assert prompts.token_classes[i][prompts.attention_mask[i].bool()][0] == TokenClass.BOS


def test_a_format_without_bos_gets_one_only_if_that_is_asked_for():
    tokenizer = tokenizer_with(TURNS)
    for template, n in (("chat", 0), (get_template("chat").with_bos("one"), 1)):
        prompts = build_prompts(stand_in(tokenizer), PAIRS, n_shots=1, template=template, generator=seeded())
        assert {row_of(prompts, i).count(tokenizer.bos_token_id) for i in range(len(prompts))} == {n}


def test_an_answer_ends_with_its_turn(kind, tokenizer):
    end = AnswerEnd.of(tokenizer, chat_template(tokenizer))
    if kind == "plain text":
        assert end.text == "\n"
        return
    stop = tokenizer.eos_token if kind in ("BOS in every turn", "system text inside the first turn") else "<|im_end|>"
    assert end.text is None
    assert end.tokens == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop)}


def test_the_template_survives_files_and_needs_no_chat_format_then(chatting, tmp_path):
    made = template_for(chatting, "chat")
    assert (made.prefix, made.name) == (SYSTEM, "chat")
    assert Template.from_json(json.loads(json.dumps(made.to_json()))) == made
    fields = dict(layer=1, heads=(), relation="", fingerprint=fvlens.fingerprint(chatting), template=made)
    path = FunctionVector(vector=torch.ones(chatting.cfg.d_model), **fields).save(tmp_path / "v.safetensors")
    loaded = FunctionVector.load(path)
    assert loaded.template == made
    without = stand_in(tokenizer_with(None))
    again = build_prompts(without, PAIRS, n_shots=2, template=loaded.template, generator=seeded())
    assert torch.equal(
        again.tokens, build_prompts(chatting, PAIRS, n_shots=2, template="chat", generator=seeded()).tokens
    )


# --- in every function ---


@pytest.fixture(scope="module")
def split():
    return load_relation("antonym").split(seeded())


@pytest.fixture(scope="module")
def found(chatting, split):
    return fvlens.find_vector(
        chatting, split, n_shots=2, n_prompts=3, n_corrupted=2, n_heads=2, layers=[1], scales=[1], template="chat",
        generator=seeded(), progress=False,
    )  # fmt: skip


def test_a_vector_is_found_evaluated_and_trained_in_it(chatting, split, found):
    made = template_for(chatting, "chat")
    assert found.vector.template == found.means.template == found.effects.template == made
    # its own template is taken without being named
    plain = fvlens.evaluate(chatting, split.test, template="chat", generator=seeded())
    steered = fvlens.evaluate(chatting, split.test, vector=found.vector, generator=seeded())
    assert steered.template == plain.template == made
    assert steered.data_hash == plain.data_hash
    tuned = fvlens.finetune(
        chatting, split.train[:4], init=found.vector, valid=split.valid[:3], epochs=1, generator=seeded(),
        progress=False,
    )  # fmt: skip
    assert tuned.vector.template == tuned.settings.template == made
    from_zero = fvlens.finetune(
        chatting, split.train[:4], init="zero", layer=1, epochs=1, template="chat", generator=seeded(), progress=False
    )
    assert from_zero.vector.template == from_zero.settings.template == made
    answers = fvlens.generate_answers(chatting, split.test[:3], template="chat", generator=seeded())
    assert answers.template == made
    assert check_pairs(split.train, chatting, template="chat", generator=seeded()).template == made


def test_first_tokens_are_those_of_the_answer_itself(chatting, split):
    """A tokenizer splits ``y`` otherwise than `` y``: what is scored is what the model would write."""
    prompts = build_prompts(chatting, split.test, n_shots=0, template="chat", generator=seeded())
    own = chatting.tokenizer([pair.output for pair in split.test], add_special_tokens=False)["input_ids"]
    assert prompts.first_answer_token.tolist() == [ids[0] for ids in own]
    spaced = build_prompts(chatting, split.test, n_shots=0, generator=seeded())
    assert (prompts.first_answer_token != spaced.first_answer_token).any()


def test_composites_and_universal_heads_record_it(chatting, tmp_path, monkeypatch):
    made = template_for(chatting, "chat")
    names = ["antonym", "plural"]
    composite = library_composite(
        chatting, names=names, epochs=1, n_train=2, template="chat", generator=seeded(), progress=False
    )
    assert composite.template == made == CompositeMap.load(composite.save(tmp_path / "c.safetensors")).template
    real = _find.evaluate

    def always_right(*args, **how):  # random weights can do nothing
        found = real(*args, **how)
        return dataclasses.replace(found, ranks=0 * found.ranks)

    monkeypatch.setattr(_find, "evaluate", always_right)
    heads = universal_heads(
        chatting, names[:1], n=2, n_shots=1, n_prompts=2, n_corrupted=2, template="chat", generator=seeded(),
        progress=False,
    )  # fmt: skip
    assert heads.template == made == UniversalHeads.load(heads.save(tmp_path / "heads.json")).template


# --- refused ---


def test_a_tokenizer_without_a_chat_format_is_refused(tiny, split):
    message = (
        "template='chat': the model's tokenizer has no chat format; expected one of qa, arrow, colon, or a Template."
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        fvlens.evaluate(tiny, split.test, template="chat", generator=seeded())
    with pytest.raises(ValueError, match=f"^{message}"):
        fvlens.finetune(tiny, split.train[:4], init="zero", layer=1, template="chat", generator=seeded())


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ raise_exception('Only tools here') }}", r"cannot write turns of user and assistant \(TemplateError: Only"),
        ("{% for m in messages %}", r"cannot write turns of user and assistant \(TemplateSyntaxError"),
        ("{{ messages[-1]['content'] }}", "does not write every turn once, as it is; expected one of qa, arrow, colon"),
        (TURNS.replace("m['content']", "m['content'] | upper"), "does not write every turn once, as it is"),
        (TURNS.replace("'<|im_start|>' +", "'[' ~ loop.index ~ ']' +"), "writes one turn otherwise than the next"),
        (TURNS.replace("m['content']", "m['content'] | replace('two', '2')"), "does not write 1 demonstrations"),
    ],
)
def test_formats_that_cannot_be_written_piece_by_piece_are_refused(chat, message):
    with pytest.raises(ValueError, match=f"template='chat': .*{message}"):
        chat_template(tokenizer_with(chat))


# --- commands ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a chat format."""
    tokenizer, path = tokenizer_with(FORMATS["turns with a system text"]), tmp_path_factory.mktemp("chatting")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=400, n_embd=32, n_layer=2, n_head=4, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_run_in_it_and_again_without_the_tokenizers_format(call, folder, tmp_path):
    few = ["--n-shots", 2, "--n-prompts", 3, "--n-corrupted", 2, "--n-heads", 2, "--n-random", 1, "--n-others", 0]
    place = ["--layer", 1, "--scale", 1, "--epochs", 1, "--n-train", 3, "--quiet"]
    run = tmp_path / "run"
    code, out, err = call("run", "antonym", "--model", folder, "--template", "chat", "--out", run, *few, *place)
    assert code == 0, err
    assert f"template chat: the chat format of the model's tokenizer, which begins {SYSTEM!r}\n" in out
    options = json.loads((run / "results.json").read_text())["options"]
    made = Template.from_json(options["template_text"])
    assert (options["template"], made.prefix) == ("chat", SYSTEM)
    for name in ("vector.safetensors", "vector-finetuned.safetensors"):
        assert FunctionVector.load(run / name).template == made
    code, out, _ = call("inject", run / "vector.safetensors", "hot", "--model", folder, "--generate", 2)
    assert code == 0
    assert f"prompt {made.bare('hot')!r}\n" in out
    without = tmp_path / "without"
    without.mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (without / file.name).write_bytes(file.read_bytes())
    code, out, _ = call("rerun", run, "--model", without, "--quiet")
    assert code == 0 and "the same run" in out
    code, _, err = call("run", "antonym", "--model", without, "--template", "chat", "--out", run, *few, *place)
    assert code == 2 and "the model's tokenizer has no chat format" in err


def test_relations_are_checked_in_it(call, folder):
    code, out, err = call("relations", "check", "antonym", "--model", folder, "--template", "chat")
    assert (code, err) == (0, "") and out.startswith(
        "template chat: the chat format of the model's tokenizer, which begins "
    )
