"""On which models something may be used: its own, the same weights in another form, and no other."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from conftest import TOKENIZER, seeded
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import fvlens
from fvlens.models import Fingerprint, check_model, fingerprint
from fvlens.models._made_on import OLD_MODELS, same_weights


@pytest.fixture(scope="module")
def network():
    """A random GPT-2 as Hugging Face has it."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(config).eval(), tokenizer


@pytest.fixture(scope="module")
def load(network, tmp_path_factory):
    """Save a changed copy of the network and load it."""

    def made(change=None, **how):
        own, tokenizer = network
        changed = GPT2LMHeadModel(copy.deepcopy(own.config)).eval()
        changed.load_state_dict(own.state_dict())
        if change is not None:
            change(changed)
        folder = tmp_path_factory.mktemp("form")
        changed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return fvlens.load_model(folder, device="cpu", **how)

    return made


@pytest.fixture(scope="module")
def first(load):
    return load()


def vector_of(model):
    return fvlens.FunctionVector(torch.ones(model.cfg.d_model), 1, (), "made", fingerprint(model))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_precision_are_allowed_with_a_note(load, first, dtype, backend):
    other = load(dtype=dtype, backend=backend)
    name = str(dtype).removeprefix("torch.")
    for vector, model, said in (
        (vector_of(first), other, f"float32 / {name}"),
        (vector_of(other), first, f"{name} / float32"),
    ):
        with pytest.warns(
            UserWarning, match=rf"vector of 'made' was made on the same weights in another form .*dtype: {said}"
        ):
            vector.check(model)


def test_a_resized_vocabulary_and_an_untied_copy_are_allowed_with_a_note(load, first):
    with torch.random.fork_rng(devices=[]):
        longer = load(lambda own: own.resize_token_embeddings(own.config.vocab_size + 5))
    n = first.cfg.d_vocab
    with pytest.warns(UserWarning, match=rf"in another form .*d_vocab: {n} / {n + 5}"):
        vector_of(first).check(longer)

    def untie(own):
        own.config.tie_word_embeddings = False
        own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach().clone())

    again = load(untie)
    with pytest.warns(UserWarning, match=r"in another form \(then / now: saved in another form\)"):
        vector_of(first).check(again)


def test_other_weights_are_refused(load, first):
    def nudge(own):
        with torch.no_grad():
            for parameter in own.transformer.h.parameters():
                parameter.mul_(1.01)

    def one_number(own):
        with torch.no_grad():
            own.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.01

    def embedding(own):
        with torch.no_grad():
            own.transformer.wte.weight.mul_(2)

    for change in (nudge, one_number, embedding):
        with pytest.raises(ValueError, match=r"was made on model .*, not on this one \(vector / model: weights: "):
            vector_of(first).check(load(change))
    for change in (nudge, embedding):
        with pytest.raises(
            ValueError, match=r"not on this one \(vector / model: weights: .*; dtype: float32 / float64\)"
        ):
            vector_of(first).check(load(change, dtype=torch.float64))
    mark = fingerprint(first)
    assert not same_weights(dataclasses.replace(mark, forms=""), dataclasses.replace(mark, dtype="float64"))
    assert not same_weights(mark, dataclasses.replace(mark, weights="0" * 16, n_layers=3))


def test_everything_made_on_a_model_goes_by_it(load, first, tmp_path):
    """The cache, the means, universal heads, and results read for a model."""
    other = load(dtype=torch.bfloat16)
    pairs = fvlens.load_relation("antonym").pairs[:6]
    prompts = fvlens.build_prompts(first, pairs, n_shots=1, n_prompts=2, generator=seeded())
    means = fvlens.mean_head_activations(first, prompts, progress=False)
    cache = fvlens.activation_cache(first, prompts, sites=("z",), progress=False)
    path = means.save(tmp_path / "means.safetensors")
    for use in (
        lambda: cache.check(other),
        lambda: type(means).load(path, model=other),
        lambda: fvlens.function_vector(other, means, heads=[(0, 1)], layer=1),
        lambda: fvlens.indirect_effects(other, prompts, means, progress=False),
    ):
        with pytest.warns(UserWarning, match="made on the same weights in another form"):
            use()


@pytest.mark.parametrize("digest", sorted(OLD_MODELS["rel-small"]))
def test_what_was_made_on_the_old_embedded_model_is_refused_by_name(model, digest):
    mark = dataclasses.replace(fingerprint(model), weights=digest)
    vector = fvlens.FunctionVector(torch.ones(mark.d_model), 1, (), "antonym", mark)
    message = (
        r"the vector of 'antonym' was made on the rel-small of fvlens 0\.1, which was trained anew since, .*; make it "
        r"again with `fvlens run antonym`"
    )
    with pytest.raises(ValueError, match=message):
        vector.check(model)
    with pytest.raises(ValueError, match=message):
        fvlens.evaluate(model, [("hot", "cold")], vector=vector, generator=seeded())
    with pytest.raises(
        ValueError, match=r"the set of 1 vectors was made on the rel-small .* again with `fvlens compose`"
    ):
        fvlens.VectorSet((vector,)).check(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model(mark, _Holds(mark), "the vector")  # on the old model itself it is right


class _Holds:
    """A model that is known by its fingerprint alone."""

    def __init__(self, mark):
        self.mark = mark


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    from fvlens.models import _made_on

    real = _made_on.fingerprint
    monkeypatch.setattr(_made_on, "fingerprint", lambda model: model.mark if isinstance(model, _Holds) else real(model))


def test_forms_are_read_as_they_were_written(first):
    mark = fingerprint(first)
    assert len(mark.forms.split()) == 3
    assert Fingerprint.from_json(mark.to_json()).forms == mark.forms
    fields = json.loads(mark.to_json())
    del fields["forms"]
    assert Fingerprint.from_fields(fields).forms == ""
    with pytest.raises(ValueError, match="forms: expected three hashes of 16 hex digits, got 'zz'"):
        dataclasses.replace(mark, forms="zz")
