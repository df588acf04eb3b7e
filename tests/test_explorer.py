"""The explorer's session against direct calls: what it computes, what it keeps in files, what it refuses."""

import dataclasses
import json

import pytest
import torch

import fvlens
from fvlens.attribution import attention_patterns, direct_effects, logit_lens
from fvlens.explorer import Session, Settings
from fvlens.explorer._kept import KeptPrompt

SMALL = Settings(n_prompts=12, n_corrupted=4, n_heads=5, n_shots=5)


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """A session on antonyms; tests that change it take a copy."""
    return Session(model, "antonym", settings=SMALL, folder=tmp_path_factory.mktemp("explorer"))


@pytest.fixture
def session(first):
    again = Session(first.model, settings=SMALL, folder=first.folder)
    vars(again).update({**vars(first), "_seen": dict(first._seen)})
    return again


@pytest.fixture(scope="module")
def direct(model):
    """The same by calls of the façade alone, from the same seed."""
    g = torch.Generator().manual_seed(0)
    relation = fvlens.load_relation("antonym")
    found = fvlens.find_vector(
        model, relation, n_heads=5, n_shots=5, n_prompts=12, n_corrupted=4, generator=g, progress=False
    )
    g = torch.Generator().manual_seed(0)
    split = relation.split(g)
    clean = fvlens.build_prompts(model, split.train, queries=split.valid, n_prompts=12, n_shots=5, generator=g)
    wrong = fvlens.build_prompts(
        model, split.train, queries=split.valid, n_prompts=4, n_shots=5, labels="permuted", generator=g
    )
    return found, {"clean": clean, "corrupted": wrong}


def answer_of(model, text, vector=None):
    """Next-token probabilities by a plain forward pass."""
    tokens = torch.tensor([[model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        if vector is None:
            return model(tokens)[0, -1].softmax(-1)
        hook = f"blocks.{vector.layer}.hook_resid_post"

        def add(resid, hook):
            resid[:, -1] += vector.vector
            return resid

        return model.run_with_hooks(tokens, fwd_hooks=[(hook, add)])[0, -1].softmax(-1)


def test_choosing_finds_what_find_vector_finds(first, direct):
    found, prompts = direct
    assert first.heads == found.heads
    assert (first.layer, first.scale) == (found.layer, found.scale)
    torch.testing.assert_close(first.vector.vector, found.vector.vector)
    torch.testing.assert_close(first.found.effects.cie, found.effects.cie)
    assert {kind: own.data_hash for kind, own in first.prompts.items()} == {
        kind: own.data_hash for kind, own in prompts.items()
    }
    assert first.found.effects.data_hash == prompts["corrupted"].data_hash


@pytest.mark.parametrize("asked", [True, False])
def test_next_tokens_are_those_of_plain_passes(model, session, asked):
    text = "hot" if asked else "Q: hot\nA: cold\n\nQ: big\nA:"
    session.type(text, asked=asked)
    session.keep_beside()
    session.move(layer=2, scale=-1.5)
    written = "Q: hot\nA:" if asked else text
    seen = session.next_tokens(4)
    assert list(session.columns) == ["without", "with the vector", "with the one beside"]
    for row, vector in enumerate(session.columns.values()):
        expected = answer_of(model, written, vector)
        torch.testing.assert_close(seen.probability[row], expected[seen.tokens], atol=1e-5, rtol=1e-4)
        assert set(expected.topk(4).indices.tolist()) <= set(seen.tokens.tolist())
        assert seen.best(row) == model.tokenizer.decode([int(expected.argmax())])
    assert not torch.allclose(seen.probability[0], seen.probability[1], atol=1e-2)


def test_next_tokens_take_whole_passes_where_no_route_is_exact(model, session):
    session.type("hot", asked=True)
    kept = KeptPrompt.of(model, "hot", session.template, asked=True)
    whole = dataclasses.replace(kept, run=None)
    vectors = [None, session.vector]
    torch.testing.assert_close(whole.probabilities(vectors), kept.probabilities(vectors), atol=1e-6, rtol=1e-4)


def test_a_prompt_is_run_once_for_all_moves(session, monkeypatch):
    import fvlens.explorer._kept as kept

    session.type("hot")
    calls = []
    monkeypatch.setattr(kept, "run_prefix", lambda *args, **more: calls.append(args))
    for scale in (0.5, 1, 2):
        session.move(scale=scale)
        session.next_tokens()
    assert calls == []


def test_a_click_puts_a_head_in_or_out(model, session, direct):
    found, _ = direct
    out = session.heads[0]
    assert session.toggle(out) is False
    assert out not in session.heads
    assert session.head == out
    expected = fvlens.function_vector(model, found.means, heads=session.heads, layer=session.layer) * session.scale
    torch.testing.assert_close(session.vector.vector, expected.vector)
    other = next(fvlens.Head(3, i) for i in range(8) if fvlens.Head(3, i) not in session.heads)
    assert session.toggle(other) is True
    assert session.heads[-1] == other == session.head
    session.put_in([])
    assert session.vector is None
    assert list(session.columns) == ["without"]


@pytest.mark.parametrize("kind", ["corrupted", "clean"])
def test_the_second_view_is_of_the_same_prompts_and_head(model, session, direct, kind):
    found, prompts = direct
    own = prompts[kind].select(range(4))
    session.look(head="L2H3", kind=kind, prompt=2)
    view = session.view()
    patterns = attention_patterns(model, own, [(2, 3)], progress=False)
    n_tokens = int(own.attention_mask[2].sum())
    torch.testing.assert_close(view.attention, patterns.last[2, 0, -n_tokens:])
    assert float(view.attention.sum()) == pytest.approx(1, abs=1e-4)
    assert "".join(view.words).endswith(model.tokenizer.decode(own.tokens[2, -3:].tolist()))
    assert len(view.words) == n_tokens
    torch.testing.assert_close(view.effects, found.effects.cie[:, 2, 3])
    torch.testing.assert_close(view.direct, direct_effects(model, own, progress=False).heads[:, 2, 3])
    one = fvlens.function_vector(model, found.means, heads=[(2, 3)], layer=1)
    assert view.decoded == tuple(one.decode(model, 8))
    torch.testing.assert_close(session.lens().probability, logit_lens(model, own, k=3, progress=False).probability)
    assert session.questions[2] == f"2: {own.queries[2].input} → {own.queries[2].output}"


def test_a_model_without_direct_effects_says_why_and_shows_the_rest(session, monkeypatch):
    import fvlens.explorer._session as room

    def refuse(*args, **more):
        raise ValueError("the parts add up to something else")

    monkeypatch.setattr(room, "direct_effects", refuse)
    session._seen.clear()
    view = session.view()
    assert view.direct is None
    assert view.why_not == "the parts add up to something else"
    assert len(view.decoded) == 8


def test_pairs_that_were_typed_are_found_like_those_of_a_file(model, tmp_path):
    pairs = fvlens.load_relation("antonym").pairs[:30]
    text = "\n".join(f"{x}, {y}" if i % 2 else f"{x} -> {y}" for i, (x, y) in enumerate(pairs))
    session = Session(model, settings=dataclasses.replace(SMALL, n_shots=40), folder=tmp_path)
    session.choose_typed(text + "\n\n")
    assert session.relation.pairs == pairs
    n_shots = len(session.found.split.train) - 1
    assert session.found.effects.n_shots == n_shots < 40


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hot, cold\nbig", "line 2: expected two words with a comma between them, got 'big'"),
        ("hot,", "line 1: expected two words"),
        (" \n", "no pairs were typed"),
    ],
)
def test_typed_lines_that_are_no_pairs_are_named(session, text, says):
    with pytest.raises(ValueError, match=says):
        session.choose_typed(text)
    assert session.relation.name == "antonym"


def test_states_bring_everything_back(model, session, tmp_path):
    session.folder = tmp_path
    session.keep_beside()
    session.toggle((3, 7))
    session.move(layer=2, scale=2.5)
    session.type("Q: big\nA:", asked=False)
    session.look(head=(1, 4), kind="clean", prompt=3)
    file = session.save_state("mine")
    assert file == tmp_path / "mine.json"
    again = Session(model, folder=tmp_path)
    again.load_state("mine")
    for name in ("heads", "layer", "scale", "text", "asked", "head", "kind", "prompt", "relation"):
        assert getattr(again, name) == getattr(session, name), name
    torch.testing.assert_close(again.vector.vector, session.vector.vector, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again.beside.vector, session.beside.vector)
    assert dataclasses.replace(again.settings, template="qa") == SMALL


def test_vectors_are_saved_with_their_scale_and_loaded_beside(model, session, tmp_path):
    session.folder = tmp_path
    session.move(scale=3)
    file = session.save_vector("mine")
    assert file == tmp_path / "mine.safetensors"
    saved = fvlens.FunctionVector.load(file, model=model)
    torch.testing.assert_close(saved.vector, session.vector.vector)
    assert saved.heads == session.heads
    session.load_beside("mine")
    assert session.beside.cosine(session.vector) == pytest.approx(1)
    session.drop_beside()
    assert session.beside is None


@pytest.mark.parametrize(
    "name", ["../mine", "/tmp/mine", "a/b", ".hidden", "", "mine\n", "a\\b", "..", "mine.json/../../x", "a\0b"]
)
def test_names_do_not_leave_the_folder(session, name):
    for act in (session.save_vector, session.save_state, session.load_beside, session.load_state):
        if name == "mine\n":
            continue
        with pytest.raises(ValueError, match=r"expected a name of letters, digits and _ \. \+ - alone"):
            act(name)


def test_links_do_not_leave_the_folder(session, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "there.json").write_text("{}")
    (inner / "there.json").symlink_to(tmp_path / "there.json")
    session.folder = inner
    with pytest.raises(ValueError, match="a link that leads out of"):
        session.load_state("there")


def test_damaged_states_are_refused_and_change_nothing(session, tmp_path):
    session.folder = tmp_path
    file = session.save_state("mine")
    before = {name: value for name, value in vars(session).items() if name not in ("_seen", "_kept", "_made")}
    good = json.loads(file.read_text())
    for change, says in [
        ({"format": "other"}, "expected a state that an explorer saved"),
        ({"heads": [[9, 9]]}, "head"),
        ({"scale": 1e9}, "scale: expected a number from -8 to 8"),
        ({"kind": "odd"}, "kind: expected one of corrupted, clean"),
        ({"prompt": 99}, r"prompt: expected one in 0\.\.3"),
        ({"pairs": [["hot"]]}, "mine.json: damaged state"),
        ({"fingerprint": {**good["fingerprint"], "weights": "0" * 16, "forms": ""}}, "mine.json: this state"),
    ]:
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=says):
            session.load_state("mine")
        assert {name: value for name, value in vars(session).items() if name in before} == before
    with pytest.raises(ValueError, match="nothere"):
        session.load_state("nothere")


def test_what_cannot_be_shown_is_said(model, session, tmp_path):
    empty = Session(model, folder=tmp_path)
    for act, says in [
        (lambda: empty.chosen, "no pairs yet: choose a relation, or type word pairs"),
        (lambda: empty.save_vector("x"), "there is no vector to save"),
        (empty.keep_beside, "there is no vector to keep"),
        (lambda: empty.save_state("x"), "there is nothing to save yet"),
        (empty.view, "no head yet: click one on the map"),
        (lambda: session.type("  "), "the prompt is empty"),
        (lambda: session.type("hot " * 500, asked=False), "tokens, but the model's context holds 160; shorten it"),
        (lambda: session.next_tokens(0), "next_tokens: expected k between 1 and"),
        (lambda: session.move(layer=4), r"layer: expected one in 0\.\.3, got 4"),
        (lambda: session.move(scale=9), "scale: expected a number from -8 to 8, got 9"),
        (lambda: session.look(head=(4, 0)), "head"),
        (lambda: session.look(kind="odd"), "kind: expected one of corrupted, clean, got 'odd'"),
        (lambda: session.look(prompt=4), r"prompt: expected one in 0\.\.3, got 4"),
        (lambda: Session(model, folder=tmp_path / "nowhere"), "is no folder; make it first"),
    ]:
        with pytest.raises(ValueError, match=says):
            act()
    assert session.text == session.found.split.valid[0].input


def test_words_that_a_tokenizer_does_not_know_are_named(session):
    class Tokenizer:
        unk_token, unk_token_id = "<unk>", 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1 if word in ("the", "cat") else 0 for word in text.split()]}

    class Model:
        tokenizer = Tokenizer()

    with pytest.raises(ValueError, match="the tokenizer does not know 'flurb', 'blorp'; type words"):
        KeptPrompt.of(Model, "the flurb cat blorp", session.template, asked=False)
