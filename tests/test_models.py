"""Loaded models against plain Hugging Face; fingerprints; every error message."""

import dataclasses
import gc
import json
import shutil
import socket
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens import models
from fvlens.models import (
    EMBEDDED_MODELS,
    Fingerprint,
    bos_token_id,
    embedded_folder,
    fingerprint,
    load_model,
    model_device,
    quiet_deprecation,
)


def hugging_face(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def random_tokens(n_vocab, shape=(3, 17)):
    return torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(1))


def assert_same_logits(mine, reference, atol=1e-4):
    tokens = random_tokens(mine.cfg.d_vocab)
    with torch.inference_mode():
        torch.testing.assert_close(mine(tokens), reference(tokens).logits, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def reference():
    return hugging_face(embedded_folder())


def saved(folder, config, *, tokenizer=True):
    """A model of this configuration with random weights (large enough to matter), in Hugging Face format."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).float()
        for parameter in made.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    made.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True).save_pretrained(folder)
    return folder


VOCABULARY = json.loads((embedded_folder() / "config.json").read_text())["vocab_size"]
SMALL_GPT2 = dict(vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


# The embedded model


def test_the_embedded_model_gives_hugging_faces_logits(model, reference):
    assert_same_logits(model, reference)


def test_its_parameters_are_hugging_faces_unprocessed(model, reference):
    base = reference.transformer
    n_heads = reference.config.n_head
    same = torch.testing.assert_close
    same(model.W_E, base.wte.weight, atol=0, rtol=0)
    same(model.W_U, base.wte.weight.T, atol=0, rtol=0)
    same(model.W_pos, base.wpe.weight, atol=0, rtol=0)
    assert model.b_U.abs().max() == 0
    same(model.ln_final.w, base.ln_f.weight, atol=0, rtol=0)
    same(model.ln_final.b, base.ln_f.bias, atol=0, rtol=0)
    for mine, theirs in zip(model.blocks, base.h, strict=True):
        same(mine.ln1.w, theirs.ln_1.weight, atol=0, rtol=0)
        same(mine.ln1.b, theirs.ln_1.bias, atol=0, rtol=0)
        same(mine.ln2.w, theirs.ln_2.weight, atol=0, rtol=0)
        for part, weight in zip(theirs.attn.c_attn.weight.chunk(3, dim=1), "QKV", strict=True):
            heads = torch.stack(part.chunk(n_heads, dim=1))
            same(getattr(mine.attn, f"W_{weight}"), heads, atol=0, rtol=0)
        values = theirs.attn.c_attn.bias.chunk(3)[2]
        same(mine.attn.b_V.flatten(), values, atol=0, rtol=0)
        same(mine.attn.W_O.flatten(0, 1), theirs.attn.c_proj.weight, atol=0, rtol=0)
        same(mine.attn.b_O, theirs.attn.c_proj.bias, atol=0, rtol=0)
        same(mine.mlp.W_in, theirs.mlp.c_fc.weight, atol=0, rtol=0)
        same(mine.mlp.W_out, theirs.mlp.c_proj.weight, atol=0, rtol=0)


def test_it_is_ready_for_prompts(model):
    assert not model.training
    assert model.tokenizer.padding_side == "left"
    assert model.cfg.model_name == "rel-small"
    assert model_device(model) == torch.device("cpu")
    assert bos_token_id(model) == model.tokenizer.bos_token_id == model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert set(EMBEDDED_MODELS) == {"rel-small"}


def test_its_folder_under_another_path_is_the_same_model(model, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(embedded_folder(), folder)
    for path in (folder, str(folder)):
        other = load_model(path, device="cpu")
        assert other.cfg.model_name == "elsewhere"
        assert fingerprint(other).differences(fingerprint(model)) == []


def test_precision_is_the_callers_choice():
    mine = load_model("rel-small", device="cpu", dtype=torch.float64)
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.float64}
    assert_same_logits(mine, hugging_face(embedded_folder(), dtype=torch.float64), atol=1e-9)
    half = load_model("rel-small", device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_loading_needs_no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert load_model("rel-small", device="cpu").cfg.n_layers > 1


def test_loading_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    load_model("rel-small", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_deprecation_notice_is_silent_at_our_own_call_only(model):
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model("rel-small", device="cpu")
    assert [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning)] == []
    with pytest.warns(DeprecationWarning, match="HookedTransformer"):
        HookedTransformer(model.cfg)
    with pytest.warns(DeprecationWarning, match="something else"), quiet_deprecation():
        warnings.warn("something else", DeprecationWarning, stacklevel=1)


# Other models in local folders


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_inner": 48},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-2},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_gpt2_folders_without_n_ctx(tmp_path, settings):
    folder = saved(tmp_path, transformers.GPT2Config(**SMALL_GPT2, **settings))
    assert "n_ctx" not in json.loads((folder / "config.json").read_text())
    mine = load_model(folder, device="cpu")
    assert mine.cfg.n_ctx == 40
    assert_same_logits(mine, hugging_face(folder))


SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SPECIAL = dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
OTHERS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **SPECIAL, num_key_value_heads=4),
    "llama-grouped": lambda: transformers.LlamaConfig(**SHAPE, **SPECIAL, num_key_value_heads=2, rms_norm_eps=1e-3),
    "neox": lambda: transformers.GPTNeoXConfig(**SHAPE, **SPECIAL),
    "neox-sequential": lambda: transformers.GPTNeoXConfig(**SHAPE, **SPECIAL, use_parallel_residual=False),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures_give_hugging_faces_logits(tmp_path, name):
    folder = tmp_path / "model"
    saved(folder, OTHERS[name]())
    mine = load_model(folder, device="cpu")
    assert_same_logits(mine, hugging_face(folder))
    assert not mine.training
    assert mine.tokenizer.padding_side == "left"
    assert not str(mine.cfg.normalization_type).endswith("Pre")  # norms are not folded
    pairs = [("hot", "cold"), ("big", "small")]
    prompts = fvlens.build_prompts(mine, pairs, n_shots=1, generator=torch.Generator().manual_seed(0))
    assert (prompts.tokens[:, 0] == 0).all()


@pytest.mark.parametrize("folder_name", ["tiny-llama", "my-gemma-2-notes"])
def test_the_folders_name_does_not_decide_the_architecture(tmp_path, folder_name):
    for name in ("llama", "neox"):
        folder = tmp_path / folder_name / name
        saved(folder, OTHERS[name]())
        mine = load_model(folder, device="cpu")
        assert mine.cfg.model_name == name
        assert_same_logits(mine, hugging_face(folder))


def test_a_folder_without_a_tokenizer_loads_without_one(tmp_path):
    mine = load_model(saved(tmp_path, transformers.GPT2Config(**SMALL_GPT2), tokenizer=False), device="cpu")
    assert mine.tokenizer is None
    assert bos_token_id(mine) is None
    assert fingerprint(mine).bos == "none"
    assert_same_logits(mine, hugging_face(tmp_path))


# Errors


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(
        ValueError, match=r"'gpt2-smal' is neither a folder nor a model .* knows; did you mean gpt2-small,"
    ):
        load_model("gpt2-smal")
    with pytest.raises(ValueError, match=r"'rel_smal' is neither .*did you mean .*rel-small"):
        load_model("rel_smal")
    with pytest.raises(ValueError, match=r"'§§§§' is neither .*see `fvlens models`"):
        load_model("§§§§")


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json; expected a model in Hugging Face format"):
        load_model(tmp_path)


def test_a_folder_with_a_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="TransformerLens cannot convert the model in"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match="TransformerLens cannot convert the model in"):
        load_model(tmp_path)


def test_a_folder_without_weights(tmp_path):
    shutil.copy(embedded_folder() / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"TransformerLens cannot convert the model in .*OSError"):
        load_model(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_refused(tmp_path):
    config = transformers.BertConfig(**SHAPE, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"TransformerLens cannot convert .*, architecture BertForMaskedLM"):
        load_model(tmp_path)


# Fingerprints


@pytest.fixture
def copy():
    """A model of our own to change."""
    return load_model("rel-small", device="cpu")


def test_two_loads_have_one_fingerprint(model, copy):
    mine = fingerprint(model)
    assert mine == fingerprint(copy)
    assert mine.differences(fingerprint(copy)) == []
    shape = json.loads((embedded_folder() / "config.json").read_text())
    assert (mine.n_layers, mine.n_heads, mine.d_model) == (shape["n_layer"], shape["n_head"], shape["n_embd"])
    assert (mine.d_head, mine.d_vocab) == (shape["n_embd"] // shape["n_head"], shape["vocab_size"])
    assert (mine.name, mine.revision, mine.dtype) == ("rel-small", "local", "float32")
    assert (mine.normalization, mine.bos) == ("LN", "one")
    assert len(mine.weights) == 16
    assert int(mine.weights, 16) >= 0


def test_one_weight_changed_in_place_changes_the_fingerprint(model, copy):
    before = fingerprint(copy)
    with torch.no_grad():
        weight = copy.blocks[-1].attn.W_O
        original = weight[0, 0, 0].item()
        weight[0, 0, 0] = torch.nextafter(torch.tensor(original), torch.tensor(torch.inf))
    changed = fingerprint(copy)
    assert changed.differences(before) == [f"weights: {changed.weights} / {before.weights}"]
    with torch.no_grad():
        weight[0, 0, 0] = original
    assert fingerprint(copy) == before == fingerprint(model)


def test_a_training_step_changes_the_fingerprint(copy):
    before = fingerprint(copy)
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy(torch.tensor([[0, 1, 2]]), return_type="loss").backward()
    optimizer.step()
    assert fingerprint(copy).weights != before.weights


def test_weights_are_hashed_once_until_they_change(copy, monkeypatch):
    calls = []
    original = models._weights_hash

    def counted(model):
        calls.append(model)
        return original(model)

    monkeypatch.setattr(models, "_weights_hash", counted)
    first = fingerprint(copy)
    with torch.inference_mode():
        copy(torch.tensor([[0, 1, 2]]))
    assert fingerprint(copy) is first
    assert len(calls) == 1
    with torch.no_grad():
        copy.W_E.mul_(1.0)
    assert fingerprint(copy) == first  # hashed again, the same weights
    assert len(calls) == 2
    copy.to(torch.float64)
    assert fingerprint(copy).weights != first.weights
    assert len(calls) == 3


def test_remembered_fingerprints_do_not_keep_models_alive(monkeypatch):
    held = len(models._fingerprints)
    temporary = load_model("rel-small", device="cpu")
    fingerprint(temporary)
    assert len(models._fingerprints) == held + 1
    del temporary
    gc.collect()
    assert len(models._fingerprints) <= held


def test_folding_the_norms_shows(copy, model):
    copy.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    different = {line.split(":")[0] for line in fingerprint(copy).differences(fingerprint(model))}
    assert {"weights", "normalization"} <= different


def test_another_model_differs_in_weights_and_shape(model, tiny):
    found = fingerprint(model).differences(fingerprint(tiny))
    assert any(line.startswith("weights: ") for line in found)
    assert f"n_layers: {model.cfg.n_layers} / 3" in found
    assert f"d_model: {model.cfg.d_model} / 32" in found


def test_name_and_revision_are_told_but_not_compared(model):
    mine = fingerprint(model)
    renamed = dataclasses.replace(mine, name="other", revision="abc")
    assert mine.differences(renamed) == []
    assert mine != renamed
    other = dataclasses.replace(mine, bos="none", d_head=7)
    assert mine.differences(other) == [f"d_head: {mine.d_head} / 7", "bos: one / none"]


def test_a_fingerprint_survives_json(model):
    mine = fingerprint(model)
    assert Fingerprint.from_json(mine.to_json()) == mine
    assert json.loads(mine.to_json()) == dataclasses.asdict(mine)


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "null", "not json", ""])
def test_from_json_refuses_anything_else(model, text):
    with pytest.raises(ValueError, match=r"fingerprint: expected the fields bos, d_head, .* got"):
        Fingerprint.from_json(text)
    fields = json.loads(fingerprint(model).to_json())
    for wrong in ({**fields, "colour": "red"}, {key: fields[key] for key in fields if key != "weights"}):
        with pytest.raises(ValueError, match="fingerprint: expected the fields"):
            Fingerprint.from_json(json.dumps(wrong))


def test_a_model_that_cannot_be_fetched_is_one_clear_error():
    with pytest.raises(ValueError, match=r"'gpt2' could not be fetched \(.+\); with no network, save the model to a"):
        fvlens.load_model("gpt2")
