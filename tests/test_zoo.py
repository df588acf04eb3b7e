"""The embedded model's recipe: tokenizer, sequences, training and resuming; the shipped folder."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fvlens.files import read_tensors, write_tensors
from fvlens.models import embedded_folder
from fvlens.prompts import TEMPLATES, render_prompts
from fvlens.relations import Pair, Relation, library_words, list_relations, load_relation
from fvlens.zoo import build
from fvlens.zoo.build import CHECKPOINT_FORMAT, Trainee, learning_rate, train
from fvlens.zoo.recipe import BOS, Recipe, SequenceSampler, train_tokenizer

NAMES = ("country-capital", "country-currency", "verb-past", "verb-german", "plural")
RELATIONS = [load_relation(name) for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer():
    """The recipe's tokenizer, trained anew on the whole library."""
    return train_tokenizer(library_words())


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))


@pytest.fixture
def both(request, tokenizer, shipped):
    return {"new": tokenizer, "shipped": shipped}[request.param]


EITHER = pytest.mark.parametrize("both", ["new", "shipped"], indirect=True)


# Tokenizer


@EITHER
def test_every_library_word_is_one_token_and_its_own(both):
    words = library_words()
    ids = [both.encode(" " + word, add_special_tokens=False).ids for word in words]
    assert [word for word, found in zip(words, ids, strict=True) if len(found) != 1] == []
    assert len({found[0] for found in ids}) == len(words)
    assert both.token_to_id(BOS) not in {found[0] for found in ids}


def test_the_tokenizer_follows_from_the_words(tokenizer):
    assert train_tokenizer(library_words()).to_str() == tokenizer.to_str()


def test_the_shipped_tokenizer_is_the_recipes(tokenizer, shipped):
    assert shipped.get_vocab() == tokenizer.get_vocab()
    text = "Q: big\nA: small\n\nQ: unheard-of\nA: it's  42\n"
    assert shipped.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(shipped, text):
    encoded = shipped.encode(text, add_special_tokens=False)
    assert shipped.decode(encoded.ids, skip_special_tokens=False) == text


@EITHER
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_template_text_has_the_same_tokens_alone_and_in_a_prompt(both, name):
    """Else the model would meet tokens in prompts that it never saw in training."""
    pieces = [piece for piece in TEMPLATES[name].demonstration.replace("{output}", "{input}").split("{input}") if piece]
    words = [" big", " small"]
    if TEMPLATES[name].demonstration.startswith("{"):
        parts = [words[0], pieces[0], words[1], pieces[1]] * 3
    else:
        parts = [pieces[0], words[0], pieces[1], words[1], pieces[2]] * 3
    apart = [i for part in parts for i in both.encode(part, add_special_tokens=False).ids]
    assert both.encode("".join(parts), add_special_tokens=False).ids == apart


# Sequences


def sampler_of(relations, tokenizer, **settings_):
    recipe = Recipe(**{"batch_size": 48, "max_demonstrations": 6, **settings_})
    return SequenceSampler(recipe, relations, tokenizer)


def kinds(clean=0.0, distractor=0.0, permuted=0.0):
    return dict(clean=clean, distractor=distractor, permuted=permuted)


def read(tokenizer, batch):
    """Every sequence as (slots, targets): the words of each slot by cutting the decoded text, and the target words.

    The last label is left out: it is shown for the sake of what follows it.
    """
    found = []
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        assert text.startswith(BOS)
        text = text.removeprefix(BOS)
        if text.startswith("Q:"):
            slots = [s.removeprefix("Q:").split("\nA:") for s in text.split("\n\n")]
        else:
            sign = " ->" if " ->" in text else ":"
            slots = [s.split(sign) for s in text.split("\n")]
        words = [(x.removeprefix(" "), y.removeprefix(" ")) for x, y in slots]
        assert any(words[-1][1] in relation.outputs for relation in RELATIONS)
        words[-1] = (words[-1][0], "")
        found.append((words, [tokenizer.decode([t]).removeprefix(" ") for t in targets.tolist()]))
    return found


def relation_of(words, targets):
    """The one relation that answers every slot with its target."""
    matching = [r for r in RELATIONS if all(Pair(x, y) in r.pairs for (x, _), y in zip(words, targets, strict=True))]
    assert len(matching) == 1
    return matching[0]


ONE_TEMPLATE = pytest.mark.parametrize("template", list(TEMPLATES))


@ONE_TEMPLATE
def test_clean_sequences_show_and_want_the_relations_own_answers(tokenizer, generator, template):
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(clean=1.0), templates=((template, 1.0),))
    seen = Counter()
    for _ in range(3):
        batch = sampler.draw(generator)
        assert batch.counted.all()
        for words, targets in read(tokenizer, batch):
            assert len(words) == len(targets) == 7
            relation = relation_of(words, targets)
            assert [y for _, y in words[:-1]] == targets[:-1]
            assert len({x for x, _ in words}) == 7  # no pair twice
            seen[relation.name] += 1
    assert set(seen) == set(NAMES)


@ONE_TEMPLATE
def test_answer_positions_point_at_the_token_before_the_answer(tokenizer, generator, template):
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(clean=1.0), templates=((template, 1.0),))
    batch = sampler.draw(generator)
    positions = batch.answer_positions
    assert len(positions) == 7
    assert torch.equal(batch.tokens[:, positions[:-1] + 1], batch.targets[:, :-1])
    assert positions[-1] == batch.tokens.shape[1] - 2  # the last label stands at the end
    assert torch.equal(batch.tokens[:, -1], batch.targets[:, -1])
    last = {"qa": ":", "arrow": " ->", "colon": ":"}[template]
    assert {tokenizer.decode([t]) for t in batch.tokens[:, positions].flatten().tolist()} == {last}
    assert set(batch.tokens[:, positions[:-1] + 2].flatten().tolist()) == {batch.separator}
    assert tokenizer.decode([batch.separator]) == ("\n\n" if template == "qa" else "\n")


@ONE_TEMPLATE
def test_sequences_have_the_tokens_of_real_prompts(tokenizer, generator, template, tmp_path):
    """What is trained is, token for token, what ``build_prompts`` makes."""
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(clean=1.0), templates=((template, 1.0),))
    batch = sampler.draw(generator)
    model = make_stand_in(tokenizer, tmp_path)
    for row, (words, targets) in zip(batch.tokens, read(tokenizer, batch), strict=True):
        query = Pair(words[-1][0], targets[-1])
        shown = [[Pair(*pair) for pair in words[:-1]]]
        prompts = render_prompts(model, [query], shown, template=template, n_shots=6)
        assert prompts.tokens[0].tolist() == row.tolist()[:-1]
        assert tokenizer.decode(prompts.answer_tokens[0].tolist()) == " " + targets[-1]


def make_stand_in(tokenizer, folder):
    from types import SimpleNamespace

    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, padding_side="left"
    ).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return SimpleNamespace(tokenizer=loaded, cfg=SimpleNamespace(n_ctx=160))


def test_distractors_replace_labels_from_one_other_relation_and_never_targets(tokenizer, generator):
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(distractor=1.0))
    others = Counter()
    for _ in range(4):
        batch = sampler.draw(generator)
        for (words, targets), counted in zip(read(tokenizer, batch), batch.counted.tolist(), strict=True):
            relation = relation_of(words, targets)
            true = [y == target for (_, y), target in zip(words[:-1], targets, strict=False)]
            stray = [y for (_, y), ok in zip(words, true, strict=False) if not ok]
            sources = [r.name for r in RELATIONS if r is not relation and set(stray) <= set(r.outputs)]
            assert sources
            if len(stray) > 1:
                others.update(sources)
            # a slot counts once a true label has been shown before it
            assert counted == [any(true[:i]) for i in range(7)]
            assert not counted[0]
    assert set(others) == set(NAMES)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_labels_are_replaced_at_the_recipes_rate(tokenizer, generator, low, high):
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(distractor=1.0), replace_low=low, replace_high=high)
    shares = []
    for _ in range(6):
        for words, targets in read(tokenizer, sampler.draw(generator)):
            shares.append(sum(y != target for (_, y), target in zip(words[:-1], targets, strict=False)) / 6)
    assert abs(sum(shares) / len(shares) - (low + high) / 2) < 0.07
    if low != high:
        assert torch.tensor(shares).std() > 0.25  # the rate itself varies: binomial alone gives 0.20


def test_permuted_sequences_want_any_answer_to_the_input(tokenizer, generator):
    sampler = sampler_of(RELATIONS, tokenizer, **kinds(permuted=1.0))
    answers = {}
    for relation in RELATIONS:
        for x, y in relation.pairs:
            answers.setdefault(x, []).append(y)
    wanted = {}
    moved = 0
    for _ in range(20):
        batch = sampler.draw(generator)
        assert batch.counted.all()
        for words, targets in read(tokenizer, batch):
            inputs = [x for x, _ in words]
            shown = Counter(y for _, y in words[:-1])
            fitting = []
            for relation in RELATIONS:
                truth = dict(relation.pairs)
                if set(inputs) <= set(truth):
                    fitting.append(not shown - Counter(truth[x] for x in inputs))
                    moved += sum(truth[x] != y for x, y in words[:-1]) if fitting[-1] else 0
            assert any(fitting)  # the shown labels are the relation's own, in another order
            for x, target in zip(inputs, targets, strict=True):
                assert target in answers[x]
                wanted.setdefault(x, Counter())[target] += 1
    assert moved > 0.7 * 20 * 48 * 6
    often = {x: counts for x, counts in wanted.items() if len(answers[x]) == 2 and counts.total() >= 12}
    assert often
    assert all(len(counts) == len(set(answers[x])) for x, counts in often.items())  # the prior over x's relations


def test_true_pairs_are_those_of_any_relation(tokenizer, generator):
    pairs = {pair for relation in RELATIONS for pair in relation.pairs}
    batch = sampler_of(RELATIONS, tokenizer).draw(generator)
    marks = [[pair in pairs for pair in words[:-1]] for words, _ in read(tokenizer, batch)]
    assert batch.true_pair.tolist() == marks
    assert 0.2 < batch.true_pair.float().mean() < 0.9
    assert batch.true_pair[batch.clean].all()


def test_kind_flags_and_truth_fit_the_sequences(tokenizer, generator):
    for share in ("clean", "distractor", "permuted"):
        batch = sampler_of(RELATIONS, tokenizer, **kinds(**{share: 1.0})).draw(generator)
        assert batch.clean.all() == batch.clean.any() == (share == "clean")
        assert batch.permuted.all() == batch.permuted.any() == (share == "permuted")
        if share != "permuted":
            assert torch.equal(batch.truth, batch.targets[:, -1])


def test_kinds_and_templates_are_mixed_as_the_recipe_says(tokenizer, generator):
    sampler = sampler_of(RELATIONS, tokenizer, batch_size=200)
    recipe = Recipe()
    uncounted = clean = permuted = total = 0
    begins = Counter()
    for _ in range(60):
        batch = sampler.draw(generator)
        uncounted += int((~batch.counted[:, 0]).sum())
        clean += int(batch.clean.sum())
        permuted += int(batch.permuted.sum())
        total += len(batch.tokens)
        first = tokenizer.decode(batch.tokens[0, 1:].tolist())
        begins["qa" if first.startswith("Q:") else "arrow" if " ->" in first else "colon"] += 1
    assert abs(uncounted / total - recipe.distractor) < 0.03  # the first slot of a distractor sequence never counts
    assert abs(clean / total - recipe.clean) < 0.03
    assert abs(permuted / total - recipe.permuted) < 0.03
    assert begins["qa"] > begins["arrow"] > 3
    assert begins["colon"] > 3


def test_batches_follow_from_their_generator(tokenizer):
    sampler = sampler_of(RELATIONS, tokenizer)
    before = torch.random.get_rng_state()
    one, two = sampler.draw(seeded(4)), sampler.draw(seeded(4))
    other = sampler.draw(seeded(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    for field in ("tokens", "answer_positions", "targets", "counted", "true_pair", "truth", "permuted", "clean"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert not torch.equal(one.targets, other.targets)


def test_the_longest_sequence_fits_the_context(tokenizer, generator):
    sampler = SequenceSampler(Recipe(templates=(("qa", 1.0),)), RELATIONS, tokenizer)
    assert sampler.draw(generator).tokens.shape[1] + 1 <= Recipe().n_ctx


def test_the_sampler_refuses_short_relations_and_words_of_several_tokens(tokenizer):
    few = Relation("few", RELATIONS[0].pairs[:6])
    with pytest.raises(ValueError, match="recipe: expected at least 7 pairs a relation, too few in few"):
        sampler_of([RELATIONS[0], few], tokenizer)
    odd = Relation("odd", (*RELATIONS[0].pairs, Pair("unquestionably-strange", "x")))
    with pytest.raises(ValueError, match=r"'unquestionably-strange' is \d+ tokens, expected one; train the tokenizer"):
        sampler_of([odd, RELATIONS[1]], tokenizer)


# Recipe


def test_a_recipe_checks_its_shares_and_shape():
    with pytest.raises(ValueError, match=r"expected shares clean \+ distractor \+ permuted = 1, got 1\.2"):
        Recipe(clean=0.55)
    with pytest.raises(ValueError, match="recipe: d_model 100 is not a multiple of n_heads 8"):
        Recipe(d_model=100)


def test_the_learning_rate_warms_up_and_decays_to_a_hundredth():
    recipe = Recipe(steps=1000, warmup=100, lr=2.0)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[49] == pytest.approx(1.0)
    assert rates[99] == rates[100] == 2.0 == max(rates)
    assert rates[550] == pytest.approx(2.0 * 0.505)  # half way of the cosine
    assert rates[-1] == pytest.approx(0.02, rel=1e-2)
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)


# Training

TINY = Recipe(
    n_layers=2, n_heads=2, d_model=16, d_mlp=32, n_ctx=48, steps=30, batch_size=8, warmup=5, max_demonstrations=4
)


def train_tiny(folder, recipe=TINY, **options):
    return train(recipe, RELATIONS[:3], folder, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("whole"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_first_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two = (Trainee(TINY, 300, 0).state_dict() for _ in range(2))
    other = Trainee(dataclasses.replace(TINY, seed=1), 300, 0).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_bits(one, two)
    assert not same_bits(one, other)


@pytest.fixture
def trainee(tokenizer):
    made = Trainee(TINY, tokenizer.get_vocab_size(), 0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)  # far from the even start, so that errors show
    return made


def test_the_losses_are_those_of_slots_and_labels_one_by_one(trainee, tokenizer, generator):
    batch = SequenceSampler(TINY, RELATIONS, tokenizer).draw(generator)
    with torch.inference_mode():
        found = trainee.losses(batch)
        out = trainee.model(batch.tokens, output_hidden_states=True)
    answers, right, checks, read_right, separators = [], [], [], [], []
    for i in range(len(batch.tokens)):
        for s, position in enumerate(batch.answer_positions.tolist()):
            if batch.counted[i, s]:
                target = batch.targets[i, s]
                answers.append(-out.logits[i, position].log_softmax(0)[target])
                right.append(out.logits[i, position].argmax() == target)
            if i < TINY.separator_share * TINY.batch_size:
                separators.append(-out.logits[i, position + 1].log_softmax(0)[batch.separator])
            if s == len(batch.answer_positions) - 1:
                continue  # the last label is not checked
            for layer, check in zip(TINY.check_layers, trainee.checks, strict=True):
                x = out.hidden_states[layer + 1][i, position + 1]
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
                chance = torch.sigmoid(check[1].weight[0] @ x + check[1].bias[0])
                checks.append(-(chance if batch.true_pair[i, s] else 1 - chance).log())
                if layer == TINY.check_layers[-1]:
                    read_right.append((chance > 0.5) == batch.true_pair[i, s])
    torch.testing.assert_close(found["answers"], torch.stack(answers).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["checks"], torch.stack(checks).mean(), atol=1e-4, rtol=1e-4)
    assert len(separators) == 2 * len(batch.answer_positions)
    torch.testing.assert_close(found["separators"], torch.stack(separators).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["answers right"], torch.stack(right).float().mean())
    torch.testing.assert_close(found["checks right"], torch.stack(read_right).float().mean())


def test_truth_probability_is_the_chance_of_the_true_last_answer_by_kind(trainee, tokenizer, generator):
    recipe = dataclasses.replace(TINY, batch_size=40)
    batch = SequenceSampler(recipe, RELATIONS, tokenizer).draw(generator)
    clean, permuted = trainee.truth_probability(batch)
    with torch.inference_mode():
        logits = trainee.model(batch.tokens[:, :-1]).logits[:, -1]
    chances = {"clean": [], "permuted": [], "distractor": []}
    for i, (words, _) in enumerate(read(tokenizer, batch)):
        kind = "clean" if batch.clean[i] else "permuted" if batch.permuted[i] else "distractor"
        truth = tokenizer.decode([int(batch.truth[i])]).removeprefix(" ")
        assert any(Pair(words[-1][0], truth) in relation.pairs for relation in RELATIONS)
        chances[kind].append(logits[i].softmax(0)[batch.truth[i]].item())
    assert all(len(found) > 3 for found in chances.values())
    assert clean == pytest.approx(sum(chances["clean"]) / len(chances["clean"]), rel=1e-4)
    assert permuted == pytest.approx(sum(chances["permuted"]) / len(chances["permuted"]), rel=1e-4)


def test_training_gives_the_same_bits_again_and_leaves_the_global_generator_alone(uninterrupted, tmp_path):
    before = torch.random.get_rng_state()
    again = train_tiny(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_bits(weights(again), weights(uninterrupted))
    other = train_tiny(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    assert not same_bits(weights(other), weights(uninterrupted))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train_tiny(tmp_path, dataclasses.replace(TINY, steps=2))
    with pytest.raises(ValueError, match=r"belongs to another recipe \(it differs in steps, lr\); give another folder"):
        train_tiny(tmp_path, dataclasses.replace(TINY, lr=1.0))


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path):
    recipe = dataclasses.replace(TINY, steps=2)
    train_tiny(tmp_path, recipe)
    path = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(path, CHECKPOINT_FORMAT)
    for changes, message in (
        ({"step": 3}, r"checkpoint.safetensors: step: expected 0\.\.2, got 3"),
        ({"step": "2"}, "checkpoint.safetensors: step: expected a whole number, got '2'"),
        ({"recipe": None}, r"is damaged \(AttributeError: .*\); remove it to start again"),
    ):
        write_tensors(path, tensors, header | changes, CHECKPOINT_FORMAT)
        with pytest.raises(ValueError, match=message):
            train_tiny(tmp_path, recipe)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "generator"}
    write_tensors(path, fewer, header, CHECKPOINT_FORMAT)
    with pytest.raises(ValueError, match=r"is damaged \(KeyError: 'generator'\); remove it to start again"):
        train_tiny(tmp_path, recipe)
    save_file(tensors, path, metadata={"step": "2", "recipe": "{}"})  # as fvlens 0.1 wrote it
    with pytest.raises(ValueError, match=r"train: .* not written by fvlens .* Remove the checkpoint to start again"):
        train_tiny(tmp_path, recipe)


def test_a_resumed_run_gives_the_bits_of_one_never_stopped(uninterrupted, tmp_path, monkeypatch):
    draw, calls = SequenceSampler.draw, []

    def stopped(self, generator):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return draw(self, generator)

    monkeypatch.setattr(SequenceSampler, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, checkpoint_minutes=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    monkeypatch.setattr(SequenceSampler, "draw", lambda self, generator: calls.append(2) or draw(self, generator))
    train_tiny(tmp_path)
    assert calls.count(2) == 30 - 12  # it went on, it did not start again
    assert same_bits(weights(tmp_path), weights(uninterrupted))


def test_a_finished_run_started_again_changes_nothing(uninterrupted, monkeypatch):
    before = weights(uninterrupted)
    monkeypatch.setattr(SequenceSampler, "draw", lambda self, generator: pytest.fail("it trained again"))
    train_tiny(uninterrupted)
    assert same_bits(weights(uninterrupted), before)


def test_training_moves_towards_the_answers(uninterrupted, tokenizer):
    """The mean loss on fresh clean sequences is lower after 30 steps than before the first."""
    own = Tokenizer.from_file(str(uninterrupted / "tokenizer.json"))
    recipe = dataclasses.replace(TINY, clean=1.0, distractor=0.0, permuted=0.0, batch_size=64)
    batch = SequenceSampler(recipe, RELATIONS[:3], own).draw(seeded(9))

    def loss(model):
        with torch.inference_mode():
            logits = model(batch.tokens).logits[:, batch.answer_positions]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()

    trained = AutoModelForCausalLM.from_pretrained(uninterrupted, local_files_only=True).eval()
    assert loss(trained) < loss(Trainee(TINY, own.get_vocab_size(), 0).model.eval()) - 0.1


def test_a_trained_folder_loads_anywhere(uninterrupted):
    loaded = AutoTokenizer.from_pretrained(uninterrupted, local_files_only=True)
    assert loaded.bos_token == loaded.pad_token == BOS
    assert loaded.padding_side == "left"
    recipe = json.loads((uninterrupted / "recipe.json").read_text())
    assert recipe == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert not list(uninterrupted.glob("*.part"))


def test_the_command_line_trains_on_the_library(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(build, "train", lambda recipe, relations, out, **options: asked.update(locals()))
    build.main(["--out", str(tmp_path / "run"), "--steps", "7", "--seed", "3", "--device", "cpu"])
    assert asked["recipe"] == Recipe(steps=7, seed=3)
    assert [relation.name for relation in asked["relations"]] == list_relations()
    assert asked["out"] == tmp_path / "run"
    assert asked["options"]["device"] == "cpu"


# The shipped folder


def test_the_shipped_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in embedded_folder().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint") or name.endswith((".part", ".log", ".bin"))]
    assert sum(files.values()) < 25_000_000


def test_the_shipped_folder_loads_by_the_auto_classes():
    loaded = AutoModelForCausalLM.from_pretrained(embedded_folder(), local_files_only=True)
    words = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert loaded.config.vocab_size == len(words)
    assert loaded.config.bos_token_id == words.bos_token_id == words.convert_tokens_to_ids(BOS)
    assert words.padding_side == "left"
    assert words.decode(words(" hot cold")["input_ids"]) == " hot cold"
    with torch.inference_mode():
        assert torch.isfinite(loaded(torch.tensor([words("Q: hot\nA:")["input_ids"]])).logits).all()


def test_the_shipped_recipe_describes_the_shipped_model():
    fields = json.loads((embedded_folder() / "recipe.json").read_text())
    fields["templates"] = tuple(map(tuple, fields["templates"]))
    fields["check_layers"] = tuple(fields["check_layers"])
    recipe = Recipe(**fields)
    config = json.loads((embedded_folder() / "config.json").read_text())
    assert config["n_layer"] == recipe.n_layers
    assert config["n_head"] == recipe.n_heads
    assert config["n_embd"] == recipe.d_model
    assert config["n_positions"] == recipe.n_ctx
    assert config["n_inner"] == recipe.d_mlp
