"""Every architecture on every backend against the oracle over plain Hugging Face; the models' support table."""

import dataclasses
import functools
import re

import matrix
import pytest
import support_table
import torch
from architectures import WORDS, global_randomness
from checkpoints import ARCHITECTURES, CONTEXT, VARIANTS, hugging_face, save
from matrix import BACKENDS, BATCH_SIZES, FEATURES, LAYER, N_NEW, TOLERANCE, agree, off, seeded
from oracle import hf
from transformers import AutoModelForCausalLM

import fvlens
from fvlens.suffix import ROUTES

CASES = [(name, backend) for name in ARCHITECTURES for backend in BACKENDS]
every_case = pytest.mark.parametrize(("name", "backend"), CASES)
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


# --- the checkpoints and the oracle ---


def test_checkpoints_are_the_same_every_time_and_leave_the_global_generators_alone(tmp_path):
    before = global_randomness()
    one = hugging_face(save("neox", tmp_path / "one"))
    other = hugging_face(save("neox", tmp_path / "other", tokenizer=False))
    assert global_randomness() == before
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not (tmp_path / "other/tokenizer.json").exists()


DIFFERENCES = {
    "gpt-neo": dict(window_size=CONTEXT),
    "neox": dict(use_parallel_residual=False),
    "mistral": dict(sliding_window=None),
    "gemma2": dict(sliding_window=CONTEXT),
    "gemma2 ": dict(attn_logit_softcapping=None),
    "gemma2  ": dict(final_logit_softcapping=None),
    "gemma2   ": dict(query_pre_attn_scalar=12),
}
"""Architecture -> a setting without which its logits must be others."""


@pytest.mark.parametrize(("name", "changes"), DIFFERENCES.items())
def test_what_makes_an_architecture_different_matters(name, changes):
    name = name.strip()
    config = ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        other = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(matrix.plain(name).state_dict())
    row = matrix.prompts(name).rows[0]
    assert off(hf.logits(other, row)[-1], hf.logits(matrix.plain(name), row)[-1]) > 0.01


@every_architecture
def test_every_parameter_of_a_checkpoint_matters(name):
    """No bias or gain is left at a value that would hide it."""
    for key, parameter in matrix.plain(name).named_parameters():
        assert parameter.std() > 0.05, key


@every_architecture
def test_prompts_differ_in_length_and_have_something_to_find(name):
    made, oracle = matrix.prompts(name), matrix.reference(name)
    lengths = made.shuffled.attention_mask.sum(dim=1)
    assert lengths.max() - lengths.min() >= 8
    assert {len(answer) for answer in made.answers} == {1, 2, 3, 4}
    assert oracle.cie.abs().max() > 0.01
    assert oracle.label_cie.abs().max() > 0.001
    assert ((oracle.baseline > 0.01) & (oracle.baseline < 0.9)).all()
    assert all(off(steered, oracle.logits) > 0.1 for steered in oracle.steered)
    assert off(oracle.distributed, oracle.logits) > 0.1
    assert off(oracle.gradients, oracle.whole_gradients) > 1e-3
    assert any(new != found for new, found in zip(oracle.generated, plainly_generated(name), strict=True))


def plainly_generated(name):
    zero = torch.zeros_like(matrix.reference(name).direction)
    return [hf.greedy(matrix.plain(name), row, N_NEW, zero, LAYER) for row in matrix.prompts(name).rows]


@every_architecture
def test_single_precision_alone_stays_far_below_the_tolerance(name):
    """Hugging Face with itself in double precision: what the tolerance has to allow for."""
    oracle = matrix.reference(name)
    means, cie, baseline = matrix.effects_of(hugging_face(matrix.folder(name), dtype=torch.float64), name)
    for ours, exact in ((oracle.means, means), (oracle.cie, cie), (oracle.baseline, baseline)):
        assert off(ours, exact) < TOLERANCE / 4


# --- fvlens against the oracle ---


@every_case
def test_prompts_are_the_same_for_every_model(name, backend):
    g = seeded(4)
    model = matrix.loaded(name, backend)
    clean = matrix.made_prompts(model, generator=g)
    assert clean.tokens.equal(matrix.prompts(name).clean.tokens)
    assert matrix.made_prompts(model, generator=g, labels="permuted").tokens.equal(matrix.prompts(name).shuffled.tokens)


@every_case
def test_a_bos_that_is_also_the_padding_is_seen_without_a_mask(name, backend):
    """As a user runs one prompt, and as ``generate`` does: TransformerLens guesses where padding is."""
    model, made = matrix.loaded(name, backend), matrix.prompts(name)
    assert model.tokenizer.bos_token_id == model.tokenizer.pad_token_id == made.rows[0][0]
    with torch.no_grad():
        found = torch.stack([model(torch.tensor([row]))[0, -1] for row in made.rows])
    agree(found, matrix.unsteered(name))


@every_case
def test_means_in_every_batch_size(name, backend):
    oracle = matrix.reference(name)
    for size in BATCH_SIZES:
        agree(matrix.means_of(name, backend, batch_size=size).z, oracle.means)
    agree(matrix.means_of(name, backend, positions="demonstration_label").z, oracle.label_means)


@every_case
@pytest.mark.parametrize("path", ROUTES)
def test_effects_on_every_path(name, backend, path):
    """At the last token; on fast paths also of whole answers, patched at the demonstrations' labels."""
    oracle = matrix.reference(name)
    if path != "naive" and path not in matrix.fast_paths(name, backend):
        with pytest.raises(ValueError, match=re.escape(f"path={path!r} is not exact for this model")):
            matrix.effects(name, backend, path=path)
        return
    cie, baseline, taken = matrix.effects(name, backend, path=path)
    agree(cie, oracle.cie)
    agree(baseline, oracle.baseline)
    assert taken == {path}
    if path == "naive":  # slow, and the same code for every architecture
        return
    means = matrix.means_of(name, backend, positions="demonstration_label")
    label_cie, label_baseline, also = matrix.effects(name, backend, path=path, means=means, answer="whole")
    agree(label_cie, oracle.label_cie)
    agree(label_baseline, oracle.label_baseline)
    assert also == {path}


@every_case
def test_ranking(name, backend):
    model, oracle = matrix.loaded(name, backend), matrix.reference(name)
    found = fvlens.indirect_effects(
        model, matrix.prompts(name).shuffled, matrix.means_of(name, backend), progress=False
    )
    aie = oracle.cie.mean(dim=0)
    agree(found.aie, aie)
    order = torch.tensor([aie[head] for head in found.ranking])
    assert len(set(found.ranking)) == aie.numel()
    assert (order.diff() <= TOLERANCE * aie.abs().max()).all()  # descending, but for ties
    assert found.ranking[:4] == oracle.heads


@every_case
def test_function_vector_and_logits_under_it(name, backend):
    oracle = matrix.reference(name)
    agree(matrix.vector_of(name, backend).vector, oracle.vector)
    for layer in range(len(oracle.means)):
        vector = matrix.vector_of(name, backend, layer)
        for size in BATCH_SIZES:
            agree(matrix.injected_logits(name, backend, vector, size), oracle.steered[layer])


@every_case
def test_distributed_injection(name, backend):
    model, oracle = matrix.loaded(name, backend), matrix.reference(name)
    vector = fvlens.distributed_vector(model, matrix.means_of(name, backend), heads=oracle.heads)
    for size in BATCH_SIZES:
        agree(matrix.injected_logits(name, backend, vector, size), oracle.distributed)


@dataclasses.dataclass(frozen=True, slots=True)
class ZeroShot:
    """Bare queries under the oracle's direction, tokens made by hand, one prompt at a time."""

    pairs: list[tuple[str, str]]
    logits: torch.Tensor  # [prompt d_vocab] at the prompt's end
    first: torch.Tensor  # [prompt] first token of each answer
    whole: torch.Tensor  # [prompt] log-probability of each whole answer
    texts: list[str]  # what is generated, up to the end of text or the first line break


@functools.cache
def zero_shot(name):
    """Pairs whose answers are likely under the direction, and others whose answers have several tokens."""
    tokenizer, model, direction = matrix.tokenizer(), matrix.plain(name), matrix.reference(name).direction
    pairs, logits, first, whole, texts, lengths = [], [], [], [], [], set()
    for i, (word, output) in enumerate(WORDS[2:7]):
        text = f"Q: {word}\nA:"
        row = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        logits.append(hf.steered_logits(model, row, direction, LAYER)[-1])
        if i % 2 == 0:
            ranked = map(tokenizer.decode, logits[-1].argsort(descending=True).tolist())
            output = next(word for word in ranked if re.fullmatch(" [a-z]+", word))[1:]
        both = [0, *tokenizer(f"{text} {output}", add_special_tokens=False)["input_ids"]]
        assert both[: len(row)] == row
        answer = both[len(row) :]
        pairs.append((word, output))
        lengths.add(len(row))
        first.append(answer[0])
        whole.append(-hf.loss_and_gradient(model, row, answer, direction, LAYER)[0])
        ids = hf.greedy(model, row, N_NEW, direction, LAYER)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        broken = [i for i, token in enumerate(ids) if "\n" in tokenizer.decode([token])]
        texts.append(tokenizer.decode(ids[: broken[0] + 1] if broken else ids))
    assert len(lengths) > 2
    return ZeroShot(pairs, torch.stack(logits), torch.tensor(first)[:, None], torch.stack(whole), texts)


@every_case
def test_evaluation(name, backend):
    """Ranks, probabilities of the first token, log-probabilities of whole answers, under a vector."""
    model, asked = matrix.loaded(name, backend), zero_shot(name)
    steering = matrix.Trained(matrix.reference(name).direction, LAYER)
    own = asked.logits.gather(1, asked.first)
    slack = TOLERANCE * asked.logits.abs().max()
    above, near = (asked.logits > own + slack).sum(dim=1), (asked.logits > own - slack).sum(dim=1)
    assert (above < 30).any() and (above > 30).any()
    top1 = (asked.logits.argmax(dim=-1) == asked.first[:, 0]).double().mean().item()
    for size in BATCH_SIZES:
        got = fvlens.evaluate(model, asked.pairs, vector=steering, batch_size=size, generator=seeded())
        agree(got.probabilities, asked.logits.softmax(dim=-1).gather(1, asked.first)[:, 0])
        agree(got.log_probabilities, asked.whole)
        assert ((above <= got.ranks) & (got.ranks < near)).all()
        assert got.top1 == pytest.approx(top1)


@every_case
def test_generated_answers_in_every_batch_size(name, backend):
    """Left-padded prompts, greedily, the vector at the prompt's last token only."""
    model, asked = matrix.loaded(name, backend), zero_shot(name)
    steering = matrix.Trained(matrix.reference(name).direction, LAYER)
    for size in BATCH_SIZES:
        got = fvlens.generate_answers(
            model, asked.pairs, vector=steering, batch_size=size, max_new_tokens=N_NEW, generator=seeded()
        )
        assert list(got.raw_texts) == asked.texts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_load_with_the_same_logits_or_not_at_all(name, backend):
    reason = support_table.why_not("loads", name, backend)
    if reason is None:
        assert matrix.loads(name, backend) == support_table.cell("loads", name, backend) == "yes"
    else:
        with pytest.raises(ValueError, match=re.escape(reason)):
            matrix.loads(name, backend)
        assert support_table.cell("loads", name, backend) == f"no: {reason}"


# --- the support table ---


@every_case
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(name, backend, feature):
    """A cell is what was found; a feature that is not supported raises with the reason in its cell."""
    reason = support_table.why_not(feature, name, backend)
    if reason is None:
        assert support_table.cell(feature, name, backend) == support_table.expected(feature, name, backend)
    else:
        with pytest.raises(ValueError, match=re.escape(reason)):
            FEATURES[feature](name, backend)
        assert reason in support_table.cell(feature, name, backend)


def test_the_models_page_holds_the_table():
    assert support_table.section_of_page() == support_table.section()
