"""Loaded models against plain Hugging Face, in both classes of TransformerLens; fingerprints; every error message."""

import copy as copying
import dataclasses
import gc
import json
import shutil
import socket
import sys
import warnings
from importlib.metadata import version as version_of

import httpx
import pytest
import torch
import transformers
from checkpoints import ARCHITECTURES, GPT2_SHAPE, GROUPED, SHAPE, VOCABULARY, WINDOW, hugging_face, save
from conftest import seeded
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.models import (
    EMBEDDED_MODELS,
    Fingerprint,
    _checkpoints,
    _fingerprint,
    _hf_configs,
    _load,
    _looks,
    _memory,
    bos_token_id,
    embedded_folder,
    fingerprint,
    free_memory,
    load_model,
    model_device,
    official_names,
    quiet_deprecation,
    refresh,
)
from fvlens.types import Head, is_bridge

HAS_HOOKED = _load._has_hooked_transformer()
BACKENDS = ["hooked", "bridge"] if HAS_HOOKED else ["bridge"]
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
both = pytest.mark.parametrize("backend", BACKENDS)


def random_tokens(n_vocab, shape=(3, 17)):
    return torch.randint(1, n_vocab, shape, generator=seeded(1))


def assert_same_logits(mine, reference, atol=1e-4):
    tokens = random_tokens(mine.cfg.d_vocab)
    with torch.inference_mode():
        torch.testing.assert_close(mine(tokens), reference(tokens).logits, atol=atol, rtol=0)


def relative_difference(mine, reference, tokens, mask=None):
    """Largest difference of the logits at real tokens over the largest logit; positions count real tokens only."""
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = reference(tokens, attention_mask=mask, position_ids=positions).logits
        found = mine(tokens) if bool(mask.all()) else mine(tokens, attention_mask=mask)
    assert expected.std() > 0.3  # not trivially alike
    return float((found - expected)[mask.bool()].abs().max() / expected.abs().max())


def padded(tokens, *amounts):
    """Mask of tokens whose rows start with these amounts of padding."""
    mask = torch.ones_like(tokens)
    for row, amount in zip(mask, amounts, strict=True):
        row[:amount] = 0
    return mask


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of an architecture -> its tiny checkpoint, made on first use."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        folder = root / name
        return folder if folder.is_dir() else save(name, folder)

    return get


SMALL_GPT2 = {**GPT2_SHAPE, "n_positions": 40, "n_layer": 2}


# The embedded model


@both
def test_the_embedded_model_gives_hugging_faces_logits(reference, backend):
    mine = load_model("rel-small", device="cpu", backend=backend)
    assert is_bridge(mine) == (backend == "bridge")
    assert_same_logits(mine, reference)


def test_the_default_class_is_hooked_transformer_where_there_is_one(model):
    assert is_bridge(model) != HAS_HOOKED


@needs_hooked
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


@both
def test_it_is_ready_for_prompts(backend):
    model = load_model("rel-small", device="cpu", backend=backend)
    assert not model.training
    assert model.tokenizer.padding_side == "left"
    assert model.cfg.model_name == "rel-small"
    assert model_device(model) == torch.device("cpu")
    assert bos_token_id(model) == model.tokenizer.bos_token_id == model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert set(EMBEDDED_MODELS) == {"rel-small"}


@both
def test_its_tokenizer_is_the_folders_own(backend):
    mine = load_model("rel-small", device="cpu", backend=backend).tokenizer
    plain = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True, padding_side="left")
    assert len(mine) == len(plain)
    assert mine.get_vocab() == plain.get_vocab()
    assert mine.get_added_vocab() == plain.get_added_vocab()
    for text in ("", "hot", "Q: hot\nA:", "<|endoftext|>Q"):
        assert mine.encode(text) == plain.encode(text)
    assert mine("hot cold")["input_ids"] == plain("hot cold")["input_ids"]


@both
def test_a_tokenizer_that_adds_bos_does_so_once_and_one_without_bos_keeps_none(tmp_path, backend):
    for name, change in (("adds", {"add_bos_token": True}), ("none", {"bos_token": None})):
        folder = tmp_path / name
        shutil.copytree(embedded_folder(), folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        mine = load_model(folder, device="cpu", backend=backend)
        plain = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert mine.tokenizer.encode("hot") == plain.encode("hot")
        assert len(mine.tokenizer) == len(plain)
        assert bos_token_id(mine) == plain.bos_token_id
        ids = mine.to_tokens("hot", prepend_bos=True)[0].tolist()
        if name == "adds":
            assert ids.count(plain.bos_token_id) == 1
        else:
            assert (bos_token_id(mine), fingerprint(mine).bos) == (None, "none")


def test_its_folder_under_another_path_is_the_same_model(model, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(embedded_folder(), folder)
    for path in (folder, str(folder)):
        other = load_model(path, device="cpu")
        assert other.cfg.model_name == "elsewhere"
        assert fingerprint(other).differences(fingerprint(model)) == []


@both
def test_precision_is_the_callers_choice(backend):
    mine = load_model("rel-small", device="cpu", dtype=torch.float64, backend=backend)
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.float64}
    assert_same_logits(mine, hugging_face(embedded_folder(), dtype=torch.float64), atol=1e-9)
    half = load_model("rel-small", device="cpu", dtype=torch.bfloat16, backend=backend)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (half.cfg.dtype, fingerprint(half).dtype) == (torch.bfloat16, "bfloat16")


@both
def test_loading_needs_no_network(monkeypatch, backend):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert load_model("rel-small", device="cpu", backend=backend).cfg.n_layers > 1


@both
def test_loading_leaves_the_global_generator_alone(backend):
    before = torch.random.get_rng_state()
    load_model("rel-small", device="cpu", backend=backend)
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_hooked
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


# Architectures


@both
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_gives_hugging_faces_logits(folders, name, backend):
    folder = folders(name)
    mine, reference = load_model(folder, device="cpu", backend=backend), hugging_face(folder)
    tokens = random_tokens(VOCABULARY, (3, 5 * WINDOW))
    assert relative_difference(mine, reference, tokens) < 1e-4
    assert relative_difference(mine, reference, tokens, padded(tokens, 2 * WINDOW, 3, 0)) < 1e-4
    assert is_bridge(mine) == (backend == "bridge")
    assert (mine.cfg.model_name, mine.cfg.n_layers, mine.cfg.n_heads, mine.cfg.d_vocab) == (name, 3, 4, VOCABULARY)
    assert not mine.training
    assert mine.tokenizer.padding_side == "left"
    assert fingerprint(mine).normalization == ("LN" if name in LAYER_NORMS else "RMS")
    prompts = fvlens.build_prompts(mine, [("hot", "cold"), ("big", "small")], n_shots=1, generator=seeded())
    assert (prompts.tokens[:, 0] == 0).all()


LAYER_NORMS = ("gpt2", "gpt-neo", "neox", "gpt-j", "phi", "olmo")


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **settings}}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
SLIDING = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
NEO_SHAPE = {key: value for key, value in SHAPE.items() if not key.startswith("num_")}
NEO = dict(num_layers=2, num_heads=4, attention_types=[[["local"], 2]], window_size=5)
VARIANTS = {
    "gpt-neo without intermediate_size": lambda: transformers.GPTNeoConfig(
        **{**NEO_SHAPE, "intermediate_size": None}, **NEO, tie_word_embeddings=False
    ),
    "neox sequential, no attention biases": lambda: transformers.GPTNeoXConfig(
        **SHAPE, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5, layer_norm_eps=1e-2
    ),
    "gpt-j with n_inner": lambda: transformers.GPTJConfig(**GPT2_SHAPE, rotary_dim=8, n_inner=40),
    "llama, biases, head_dim": lambda: transformers.LlamaConfig(**SHAPE, **GROUPED, attention_bias=True, head_dim=12),
    "llama tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="gelu"),
    "llama rope llama3": lambda: transformers.LlamaConfig(**SHAPE, **GROUPED, **rope("llama3", **LLAMA3)),
    "llama rope linear": lambda: transformers.LlamaConfig(**SHAPE, **rope("linear", factor=4.0)),
    "llama rope yarn": lambda: transformers.LlamaConfig(
        **SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "qwen2 sliding": lambda: transformers.Qwen2Config(**SHAPE, **GROUPED, **SLIDING),
    "qwen3 sliding, biases": lambda: transformers.Qwen3Config(**SHAPE, **GROUPED, **SLIDING, attention_bias=True),
    "qwen3 ungrouped": lambda: transformers.Qwen3Config(**SHAPE, num_key_value_heads=4),
    "mistral without window": lambda: transformers.MistralConfig(**SHAPE, **GROUPED, sliding_window=None),
    "gemma with biases": lambda: transformers.GemmaConfig(**SHAPE, **GROUPED, head_dim=12, attention_bias=True),
    "gemma2 without caps": lambda: transformers.Gemma2Config(
        **SHAPE, **GROUPED, head_dim=12, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "phi grouped": lambda: transformers.PhiConfig(**SHAPE, **GROUPED),
    "olmo clipped, grouped, biases": lambda: transformers.OlmoConfig(
        **SHAPE, **GROUPED, clip_qkv=0.7, attention_bias=True
    ),
}


@needs_hooked
@pytest.mark.parametrize("name", list(VARIANTS))
def test_settings_of_the_architectures_are_read_from_the_configuration(tmp_path, name):
    saved(tmp_path, VARIANTS[name](), tokenizer=False)
    mine, reference = load_model(tmp_path, device="cpu", backend="hooked"), hugging_face(tmp_path)
    tokens = random_tokens(VOCABULARY, (3, 5 * WINDOW))
    assert relative_difference(mine, reference, tokens) < 1e-4
    assert relative_difference(mine, reference, tokens, padded(tokens, 2 * WINDOW, 3, 0)) < 1e-4


CHANGES = {
    "window": ("mistral", {"sliding_window": 3 * WINDOW}),
    "local attention": ("gpt-neo", {"window_size": 3 * WINDOW}),
    "score cap": ("gemma2", {"attn_logit_softcapping": 50.0}),
    "logit cap": ("gemma2", {"final_logit_softcapping": 50.0}),
    "score scale": ("gemma2", {"query_pre_attn_scalar": 12}),
    "norm epsilon": ("llama", {"rms_norm_eps": 1e-1}),
}


@both
@pytest.mark.parametrize("what", list(CHANGES))
def test_each_of_these_settings_reaches_the_logits(folders, tmp_path, what, backend):
    name, change = CHANGES[what]
    shutil.copytree(folders(name), tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    tokens = random_tokens(VOCABULARY, (3, 5 * WINDOW))
    mine = load_model(tmp_path / "changed", device="cpu", backend=backend)
    assert relative_difference(mine, hugging_face(tmp_path / "changed"), tokens) < 1e-4
    assert relative_difference(mine, hugging_face(folders(name)), tokens) > 1e-3


UNSUPPORTED = {
    "dynamic rotary scaling": (
        lambda: transformers.LlamaConfig(**SHAPE, **rope("dynamic", factor=2.0)),
        r"no rotary scaling 'dynamic', only default, linear, llama3, yarn",
    ),
    "linear scaling under windows": (
        lambda: transformers.Qwen2Config(**SHAPE, **GROUPED, **SLIDING, **rope("linear", factor=2.0)),
        "does not scale the rotary positions of layers with a sliding window",
    ),
    "activation": (lambda: transformers.LlamaConfig(**SHAPE, hidden_act="mish"), "has no activation 'mish'"),
    "mlp biases": (
        lambda: transformers.LlamaConfig(**SHAPE, mlp_bias=True),
        r"no biases before the product \(mlp_bias",
    ),
    "qk layer norm": (lambda: transformers.PhiConfig(**SHAPE, qk_layernorm=True), r"queries and keys \(qk_layernorm"),
    "bidirectional": (
        lambda: transformers.GemmaConfig(**SHAPE, **GROUPED, head_dim=12, use_bidirectional_attention=True),
        r"its attention is causal \(use_bidirectional_attention",
    ),
}


@needs_hooked
@pytest.mark.parametrize("what", list(UNSUPPORTED))
def test_what_hooked_transformer_would_compute_differently_is_refused(tmp_path, what):
    config, reason = UNSUPPORTED[what]
    saved(tmp_path, config(), tokenizer=False)
    with pytest.raises(ValueError, match=rf"HookedTransformer would not give the numbers of .*{reason}.*'bridge'"):
        load_model(tmp_path, device="cpu", backend="hooked")
    if what == "qk layer norm":
        with pytest.raises(
            ValueError, match=r"TransformerBridge cannot hold .*PhiForCausalLM .*RuntimeError.*q_layernorm"
        ):
            load_model(tmp_path, device="cpu", backend="bridge")
        return
    mine = load_model(tmp_path, device="cpu", backend="bridge")
    assert relative_difference(mine, hugging_face(tmp_path), random_tokens(VOCABULARY)) < 1e-4


@needs_hooked
def test_architectures_outside_the_table_go_through_transformer_lens(tmp_path):
    assert "Phi3ForCausalLM" not in _hf_configs.ARCHITECTURES
    folder = saved(tmp_path, transformers.Phi3Config(**SHAPE), tokenizer=False)
    mine = load_model(folder, device="cpu", backend="hooked")
    assert relative_difference(mine, hugging_face(folder), random_tokens(VOCABULARY)) < 1e-4


@needs_hooked
def test_a_model_with_other_numbers_than_hugging_faces_is_refused(folders, monkeypatch):
    original = _load.read_model

    def changed(*arguments, **options):
        made = original(*arguments, **options)
        made.config.rms_norm_eps = 1.0  # the class reads the configuration, the Hugging Face model has its own value
        return made

    monkeypatch.setattr(_load, "read_model", changed)
    with pytest.raises(
        ValueError, match=r"would not give the numbers of .*: its logits differ .* by .* of the largest"
    ):
        load_model(folders("llama"), device="cpu", backend="hooked")


class Answering(torch.nn.Linear):
    """A model whose logits are 1 and -2 everywhere, but for what is added."""

    def __init__(self, unpadded=0.0, padded=0.0):
        super().__init__(1, 1)
        self.added = torch.tensor([unpadded, padded])

    def __call__(self, tokens, attention_mask=None):
        logits = torch.tensor([1.0, -2.0]).expand(*tokens.shape, 2)
        return logits if attention_mask is None else logits + self.added[:, None, None]


@pytest.mark.parametrize("limit, dtype", [(1e-3, torch.float32), (1e-3, torch.float64), (0.1, torch.bfloat16)])
def test_how_far_the_logits_may_differ(folders, limit, dtype):
    checkpoint = _checkpoints.find_checkpoint(folders("llama"), None)
    tokens = torch.arange(8)[None]
    expected = Answering()(tokens), Answering()(tokens[:, 3:])
    _load._compare(checkpoint, Answering(1.9 * limit, -1.9 * limit), tokens, expected, dtype)
    for added, where in ((2.1 * limit, ""), (float("nan"), "")):
        with pytest.raises(ValueError, match=rf"Answering would not give the numbers of .*its logits{where} differ .*"):
            _load._compare(checkpoint, Answering(added), tokens, expected, dtype)
        with pytest.raises(
            ValueError, match=r"its logits behind padding differ .* use another dtype, or the other back"
        ):
            _load._compare(checkpoint, Answering(0.0, added), tokens, expected, dtype)


def test_double_precision_on_the_bridge_is_refused_where_padding_breaks_it(folders):
    """Hugging Face takes its softmax in single precision, where double precision's lowest mask is minus infinity."""
    with pytest.raises(
        ValueError, match=r"TransformerBridge would not give .* in float64: its logits behind padding .* nan"
    ):
        load_model(folders("llama"), device="cpu", backend="bridge", dtype=torch.float64)


class Broken(Answering):
    """A model that fails under a mask."""

    def __call__(self, tokens, attention_mask=None):
        raise RuntimeError("expected m1 and m2 to have the same dtype")


def test_a_model_that_cannot_run_in_a_precision_is_refused(folders):
    checkpoint = _checkpoints.find_checkpoint(folders("llama"), None)
    with pytest.raises(
        ValueError,
        match=r"Broken cannot run the model in .*llama in bfloat16 \(RuntimeError: expected m1 .*; use another",
    ):
        _load._compare(checkpoint, Broken(), torch.arange(8)[None], (torch.ones(1, 8, 2),) * 2, torch.bfloat16)


def test_an_assertion_of_transformer_lens_is_an_error_of_ours(tmp_path):
    saved(tmp_path, transformers.GPTNeoXConfig(**SHAPE, attention_bias=False), tokenizer=False)
    with pytest.raises(ValueError, match=r"TransformerBridge cannot hold .* \(AssertionError: it does not say why\)"):
        load_model(tmp_path, device="cpu", backend="bridge")


def test_the_bridge_ignores_a_switch_of_gpt2s_attention_and_is_refused(tmp_path):
    saved(tmp_path, transformers.GPT2Config(**SMALL_GPT2, scale_attn_weights=False), tokenizer=False)
    with pytest.raises(ValueError, match=r"TransformerBridge would not give the numbers of .*: its logits differ"):
        load_model(tmp_path, device="cpu", backend="bridge")
    if HAS_HOOKED:
        assert_same_logits(load_model(tmp_path, device="cpu", backend="hooked"), hugging_face(tmp_path))


@needs_hooked
def test_an_architecture_that_transformer_lens_cannot_convert(tmp_path):
    saved(tmp_path, transformers.Olmo2Config(**SHAPE), tokenizer=False)
    with pytest.raises(ValueError, match=r"cannot convert the model in .*, architecture Olmo2ForCausalLM .*'bridge'"):
        load_model(tmp_path, device="cpu", backend="hooked")
    mine = load_model(tmp_path, device="cpu", backend="bridge")
    assert relative_difference(mine, hugging_face(tmp_path), random_tokens(VOCABULARY)) < 1e-4


def test_an_architecture_that_the_bridge_does_not_know(tmp_path):
    config = transformers.CTRLConfig(vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=1, n_head=4, n_positions=64)
    saved(tmp_path, config, tokenizer=False)
    with pytest.raises(
        ValueError, match=r"TransformerBridge cannot hold the model in .*, architecture CTRLLMHeadModel"
    ):
        load_model(tmp_path, device="cpu", backend="bridge")


# Local folders


@both
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_inner": 48},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-2},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_gpt2_folders_without_n_ctx(tmp_path, settings, backend):
    folder = saved(tmp_path, transformers.GPT2Config(**SMALL_GPT2, **settings), tokenizer=False)
    assert "n_ctx" not in json.loads((folder / "config.json").read_text())
    mine = load_model(folder, device="cpu", backend=backend)
    assert mine.cfg.n_ctx == 40
    assert_same_logits(mine, hugging_face(folder))


@both
@pytest.mark.parametrize("folder_name", ["tiny-llama", "my-gemma-2-notes"])
def test_the_folders_name_does_not_decide_the_architecture(folders, tmp_path, folder_name, backend):
    for name in ("llama", "neox"):
        folder = tmp_path / folder_name / name
        shutil.copytree(folders(name), folder)
        mine = load_model(folder, device="cpu", backend=backend)
        assert mine.cfg.model_name == name
        assert relative_difference(mine, hugging_face(folder), random_tokens(VOCABULARY)) < 1e-4


@both
def test_a_folder_without_a_tokenizer_loads_without_one(tmp_path, backend):
    folder = saved(tmp_path, transformers.GPT2Config(**SMALL_GPT2), tokenizer=False)
    mine = load_model(folder, device="cpu", backend=backend)
    assert mine.tokenizer is None
    assert bos_token_id(mine) is None
    assert fingerprint(mine).bos == "none"
    assert_same_logits(mine, hugging_face(tmp_path))


# The hub, from a cache that stands in for it

COMMITS = {"main": "a" * 40, "step7": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch, folders):
    """Puts checkpoints into an empty hub cache under given names; two revisions with different weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(repository, name):
        place = tmp_path / f"models--{repository.replace('/', '--')}"
        for revision, commit in COMMITS.items():
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / revision).write_text(commit)
            shutil.copytree(folders(name), place / "snapshots" / commit)
        path = place / "snapshots" / COMMITS["step7"] / "model.safetensors"
        save_file({key: tensor / 2 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        return place

    return put


@both
@pytest.mark.parametrize("asked, repository", [("gpt2-small", "gpt2"), ("owner/some-gpt2", "owner/some-gpt2")])
def test_a_hub_model_with_its_revision(hub, asked, repository, backend):
    place = hub(repository, "gpt2")
    tokens = random_tokens(VOCABULARY)
    for revision, commit in ((None, "main"), ("step7", "step7"), (COMMITS["step7"], "step7")):
        mine = load_model(asked, device="cpu", revision=revision, backend=backend)
        snapshot = place / "snapshots" / COMMITS[commit]
        assert relative_difference(mine, hugging_face(snapshot), tokens) < 1e-4
        assert mine.cfg.model_name == repository.split("/")[-1]
        assert fingerprint(mine).revision == COMMITS[commit]
        assert mine.tokenizer.padding_side == "left"
        assert fingerprint(mine).differences(fingerprint(load_model(snapshot, device="cpu"))) == []


@needs_hooked
def test_a_hub_model_outside_the_table(hub, monkeypatch):
    monkeypatch.delitem(_hf_configs.ARCHITECTURES, "LlamaForCausalLM")
    place = hub("01-ai/Yi-6B", "llama")
    mine = load_model("yi-6b", device="cpu", backend="hooked")
    snapshot = place / "snapshots" / COMMITS["main"]
    assert relative_difference(mine, hugging_face(snapshot), random_tokens(VOCABULARY)) < 1e-4


@needs_hooked
def test_transformer_lens_never_gets_to_run_a_repositorys_code(hub, monkeypatch):
    monkeypatch.delitem(_hf_configs.ARCHITECTURES, "PhiForCausalLM")
    hub("microsoft/phi-2", "phi")
    with pytest.raises(
        ValueError, match=r"numbers of microsoft/phi-2: TransformerLens would run code of the repository"
    ):
        load_model("phi-2", device="cpu", backend="hooked")


def test_names_are_those_that_transformer_lens_lists():
    names = official_names()
    assert {"gpt2", "EleutherAI/pythia-70m", "meta-llama/Llama-2-7b-hf", "google/gemma-2-2b"} <= set(names)
    assert len(names) == len(set(names)) > 200


def fails_with(monkeypatch, error):
    """Let every download end in this error of the hub's client."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def refuse(*arguments, **options):
        raise error("refused", response=response)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)


@both
def test_a_gated_model(monkeypatch, backend):
    fails_with(monkeypatch, GatedRepoError)
    with pytest.raises(
        ValueError,
        match=r"google/gemma-2-2b is gated: accept its licence at https://hugg\S+/google/gemma-2-2b, then log in",
    ):
        load_model("gemma-2-2b", device="cpu", backend=backend)


@both
def test_a_revision_that_does_not_exist(monkeypatch, backend):
    fails_with(monkeypatch, RevisionNotFoundError)
    with pytest.raises(ValueError, match=r"gpt2 has no revision 'nope'; expected a branch, a tag or a commit"):
        load_model("gpt2", device="cpu", revision="nope", backend=backend)


@both
def test_a_repository_that_does_not_exist(monkeypatch, backend):
    fails_with(monkeypatch, RepositoryNotFoundError)
    with pytest.raises(
        ValueError,
        match=r"'EleutherAI/pythia-71m' is neither a folder nor a repository .*did you mean EleutherAI/pythia-.*log in",
    ):
        load_model("EleutherAI/pythia-71m", device="cpu", backend=backend)


@both
def test_a_model_that_cannot_be_fetched_is_one_clear_error(backend):
    with pytest.raises(
        ValueError,
        match=r"'gpt2' is no folder here and could not be fetched \(.+\); with no network, save the model to a",
    ):
        load_model("gpt2", backend=backend)


def test_a_path_is_never_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'models/mine' is neither a folder nor a model"):
        load_model(_checkpoints.Path("models/mine"))


def test_a_model_in_transformer_lens_own_format(monkeypatch):
    with pytest.raises(ValueError, match=r"NeelNanda/\S+ is in TransformerLens' own format, .* use backend='hooked'"):
        load_model("NeelNanda/GELU_1L512W_C4_Code", backend="bridge")
    if HAS_HOOKED:
        with pytest.raises(
            ValueError, match=r"'NeelNanda/GELU_1L512W_C4_Code' is no folder here and could not be fetch"
        ):
            load_model("gelu-1l", backend="hooked")


# Errors


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_an_unknown_name_offers_the_nearest(backend):
    with pytest.raises(
        ValueError, match=r"'gpt2-smal' is neither a folder nor a model .* knows; did you mean gpt2-small,"
    ):
        load_model("gpt2-smal", backend=backend)
    with pytest.raises(ValueError, match=r"'rel_smal' is neither .*did you mean .*rel-small"):
        load_model("rel_smal", backend=backend)
    with pytest.raises(ValueError, match=r"'§§§§' is neither .*see `fvlens models`"):
        load_model("§§§§", backend=backend)


def test_backends_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be 'hooked', 'bridge' or None, got 'hugging'"):
        _load._choose_backend("hugging")
    monkeypatch.setattr(_load, "_has_hooked_transformer", lambda: False)
    with pytest.raises(
        ValueError, match=r"needs HookedTransformer, .* use backend='bridge', or install 'transformer-l"
    ):
        load_model("rel-small", backend="hooked")
    assert is_bridge(load_model("rel-small", device="cpu"))


def test_hooked_transformer_is_found_or_missed_by_its_import(monkeypatch):
    assert _load._has_hooked_transformer() == (int(version_of("transformer-lens").split(".")[0]) < 4)
    fake = type(sys)("transformer_lens")

    def missing(name):
        raise ImportError(f"{name} was removed in TransformerLens 4.0")

    fake.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "transformer_lens", fake)
    assert not _load._has_hooked_transformer()


def test_a_revision_of_something_local(tmp_path):
    for path in ("rel-small", embedded_folder()):
        with pytest.raises(
            ValueError, match=r"revision='v1' names a revision of a hub model, but .* is a local folder"
        ):
            load_model(path, revision="v1")


def test_more_devices_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"n_devices=2, but there are 1 CUDA devices; take at most those"):
        load_model("rel-small", n_devices=2)
    with pytest.raises(ValueError, match=r"n_devices must be 1 or more, got 0"):
        load_model("rel-small", n_devices=0)
    with pytest.raises(
        ValueError, match=r"n_devices=2 splits over CUDA devices .*, got device='cpu'; leave device out"
    ):
        load_model("rel-small", n_devices=2, device="cpu")


def test_devices_are_passed_to_hugging_face(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(_load, "free_memory", lambda device: 10**9 + device.index)
    devices = _load._choose_devices(None, 3)
    assert devices == [torch.device("cuda", index) for index in range(3)]
    assert _load._split(devices) == {
        "device_map": "balanced",
        "max_memory": {0: 10**9, 1: 10**9 + 1, 2: 10**9 + 2},
    }
    assert _load._split([torch.device("cpu")]) == {}


def test_a_model_that_does_not_fit(folders, monkeypatch):
    folder = folders("llama")
    n_parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(_memory, "free_memory", lambda device: 8 * n_parameters - 1)
    asked = []
    monkeypatch.setattr(_load, "read_model", lambda *arguments, **options: asked.append(1))
    for backend, copies in [("hooked", 2), ("bridge", 1)]:
        if backend not in BACKENDS:
            continue
        needed = copies * 8 * n_parameters / 1024**3
        with pytest.raises(
            ValueError,
            match=rf"llama has {n_parameters:,} parameters and needs {needed:.3g} GiB in float64 while it loads on cpu"
            rf", where {(8 * n_parameters - 1) / 1024**3:.3g} GiB are free; take a smaller dtype .*n_devices",
        ):
            load_model(folder, device="cpu", dtype=torch.float64, backend=backend)
    assert asked == []
    monkeypatch.undo()
    monkeypatch.setattr(_memory, "free_memory", lambda device: 8 * n_parameters)
    load_model(folder, device="cpu", backend=BACKENDS[0])  # two copies of float32


def test_memory_of_several_devices_adds_up(folders, monkeypatch):
    checkpoint = _checkpoints.find_checkpoint(folders("gpt2"), None)
    config = _checkpoints.read_config(checkpoint)
    n_bytes = 4 * sum(parameter.numel() for parameter in hugging_face(checkpoint.path).parameters())
    assert 4 * _memory.count_parameters(config) == n_bytes
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    free = {"cuda": n_bytes // 2 - 1, "cpu": 2 * n_bytes}
    monkeypatch.setattr(_memory, "free_memory", lambda device: free[device.type])
    settings = dict(dtype=torch.float32, devices=devices)
    with pytest.raises(ValueError, match="while it loads on cuda:0, cuda:1, where"):
        _memory.check_memory(checkpoint, config, **settings, copies=0)
    free["cuda"] = n_bytes
    _memory.check_memory(checkpoint, config, **settings, copies=2)
    free["cpu"] -= 1
    with pytest.raises(ValueError, match="while it loads on cpu, where"):
        _memory.check_memory(checkpoint, config, **settings, copies=2)
    free["cpu"] = None  # unknown: not refused
    _memory.check_memory(checkpoint, config, **settings, copies=2)


def test_free_memory_is_what_the_system_tells(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < free_memory(cpu) < 2**50
    assert free_memory(torch.device("mps")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda", 0)) == 123
    monkeypatch.setattr(_memory.Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert free_memory(cpu) == 5 * 1024
    monkeypatch.setattr(_memory.Path, "read_text", lambda path: "")
    pages = {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(_memory.os, "sysconf", lambda name: pages[name])
    assert free_memory(cpu) == 3 * 4096

    def unknown(path):
        raise OSError("no such file")

    monkeypatch.setattr(_memory.Path, "read_text", unknown)
    assert free_memory(cpu) is None


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json; expected a model in Hugging Face format"):
        load_model(tmp_path)


def test_a_folder_with_a_broken_configuration(tmp_path):
    for text in ('{"model_type": ', '{"model_type": "no-such-type"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"the model in .* cannot be read \((OSError|ValueError): .*\)"):
            load_model(tmp_path)


@both
def test_a_folder_without_weights(tmp_path, backend):
    shutil.copy(embedded_folder() / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"the model in .* cannot be read \(OSError: .*\)"):
        load_model(tmp_path, backend=backend)


@both
def test_a_folder_with_broken_or_missing_weights(folders, tmp_path, backend):
    folder = tmp_path / "model"
    shutil.copytree(folders("llama"), folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 2 of the weights of LlamaForCausalLM, such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(folder, device="cpu", backend=backend)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the model in .* cannot be read"):
        load_model(folder, device="cpu", backend=backend)


BERT = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
NOT_DECODERS = {
    "BertForMaskedLM": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), "an encoder-only model"),
    "BertLMHeadModel": (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BERT)), "an encoder-only model"),
    "T5ForConditionalGeneration": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "an encoder-decoder model",
    ),
    "LlamaForSequenceClassification": (
        lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})
        ),
        "not a causal language model",
    ),
}


@both
@pytest.mark.filterwarnings("ignore:If you want to use `BertLMHeadModel`")
@pytest.mark.parametrize("architecture", list(NOT_DECODERS))
def test_only_decoders_are_loaded(tmp_path, architecture, backend):
    make, kind = NOT_DECODERS[architecture]
    with torch.random.fork_rng(devices=[]):
        make().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"fvlens needs a decoder-only model; .* is {kind} \(architecture {architecture}, model type"
    ):
        load_model(tmp_path, backend=backend)


@both
def test_code_that_comes_with_a_checkpoint_is_not_run(folders, tmp_path, backend):
    folder, marker = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(folders("llama"), folder)
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Own(LlamaConfig): pass\n"
    (folder / "own.py").write_text(code)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    path.write_text(json.dumps(config))
    load_model(folder, device="cpu", backend=backend)  # transformers has this model type itself
    path.write_text(json.dumps({**config, "model_type": "own-llama"}))
    with pytest.raises(ValueError, match=r"needs Python code that comes with the checkpoint, and fvlens runs none"):
        load_model(folder, device="cpu", backend=backend)
    assert not marker.exists()
    exec(compile(code, "own.py", "exec"), {"__name__": "own"})
    assert marker.exists()  # the marker would have told


# Fingerprints


@pytest.fixture(params=BACKENDS)
def copy(request):
    """A model of our own to change."""
    return load_model("rel-small", device="cpu", backend=request.param)


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2", "olmo"])
def test_both_backends_hold_the_same_model(folders, name, dtype, tmp_path):
    hooked, bridge = (load_model(folders(name), device="cpu", dtype=dtype, backend=backend) for backend in BACKENDS)
    assert fingerprint(hooked) == fingerprint(bridge)
    vector = fvlens.FunctionVector(torch.ones(32), 1, (Head(1, 0),), "any", fingerprint(hooked))
    file = vector.save(tmp_path / "v.safetensors")
    fvlens.FunctionVector.load(file, model=bridge).check(bridge)
    other = load_model(folders("qwen2"), device="cpu", dtype=dtype, backend="bridge")
    with pytest.raises(ValueError, match=r"was made on model .*weights: "):
        fvlens.FunctionVector.load(file, model=other)


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
        weight = list(copy.parameters())[-3].view(-1)
        original = weight[5].item()
        weight[5] = torch.nextafter(torch.tensor(original), torch.tensor(torch.inf))
    changed = fingerprint(copy)
    assert changed.differences(before) == [f"weights: {changed.weights} / {before.weights}"]
    with torch.no_grad():
        weight[5] = original
    assert fingerprint(copy) == before == fingerprint(model)


def test_a_copy_of_a_loaded_model_is_that_model_until_it_is_changed(copy):
    twin = copying.deepcopy(copy)
    assert fingerprint(twin) == fingerprint(copy)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert fingerprint(twin).weights != fingerprint(copy).weights


def test_a_model_of_ones_own_is_hashed_by_its_parameters(copy):
    weights = fingerprint(copy).weights
    del vars(copy)[_fingerprint.ORIGIN]
    refresh(copy)
    own = fingerprint(copy).weights
    assert own != weights
    with torch.no_grad():
        next(copy.parameters()).add_(1)
    assert fingerprint(copy).weights not in (own, weights)


def test_the_weights_hash_reads_names_shapes_and_every_number():
    tensors = {"b": torch.arange(6.0), "a": torch.zeros(2, 3)}
    plain = _fingerprint.weights_hash(tensors.items())
    assert plain == _fingerprint.weights_hash(reversed(tensors.items()))
    changed = tensors["b"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(torch.inf))
    variants = [
        {"b": tensors["b"], "c": tensors["a"]},
        {"b": tensors["a"], "a": tensors["b"]},
        {"b": tensors["b"], "a": torch.zeros(3, 2)},
        {"b": changed, "a": tensors["a"]},
        {"b": tensors["b"].double(), "a": tensors["a"]},
        {"b": tensors["b"].flip(0), "a": tensors["a"]},
        {"b": tensors["b"]},
    ]
    hashes = [_fingerprint.weights_hash(variant.items()) for variant in variants]
    assert len({plain, *hashes}) == len(variants) + 1


def test_a_training_step_changes_the_fingerprint(copy):
    before = fingerprint(copy)
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy(torch.tensor([[0, 1, 2]]), return_type="loss").backward()
    optimizer.step()
    assert fingerprint(copy).weights != before.weights


def test_weights_are_hashed_once_until_they_change(copy, monkeypatch):
    calls = []
    original = _fingerprint.weights_hash

    def counted(parameters):
        calls.append(1)
        return original(parameters)

    monkeypatch.setattr(_fingerprint, "weights_hash", counted)
    first = fingerprint(copy)
    with torch.inference_mode():
        copy(torch.tensor([[0, 1, 2]]))
    assert fingerprint(copy) is first
    assert len(calls) == 0  # loading hashed them
    with torch.no_grad():
        next(copy.parameters()).mul_(1.0)
    assert fingerprint(copy) == first  # hashed again, the same weights
    assert len(calls) == 1
    copy.to(torch.float64)
    assert fingerprint(copy).weights != first.weights
    assert len(calls) == 2


def test_remembered_fingerprints_do_not_keep_models_alive(monkeypatch):
    held = len(_looks._kept)
    temporary = load_model("rel-small", device="cpu")
    assert len(_looks._kept) == held + 1
    del temporary
    gc.collect()
    assert len(_looks._kept) <= held


def test_folding_the_norms_shows(copy, model):
    if is_bridge(copy):
        copy.process_weights(fold_ln=True, center_writing_weights=False, center_unembed=False)
    else:
        copy.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    different = {line.split(":")[0] for line in fingerprint(copy).differences(fingerprint(model))}
    assert {"weights", "normalization"} <= different


@needs_hooked
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
    with pytest.raises(ValueError, match=r"fingerprint: expected the fields backend, bos, d_head, .* got"):
        Fingerprint.from_json(text)
    fields = json.loads(fingerprint(model).to_json())
    for wrong in ({**fields, "colour": "red"}, {key: fields[key] for key in fields if key != "weights"}):
        with pytest.raises(ValueError, match="fingerprint: expected the fields"):
            Fingerprint.from_json(json.dumps(wrong))


def test_a_fingerprint_says_how_its_model_was_loaded(model, tiny):
    mark = fingerprint(model)
    assert (mark.source, mark.backend) == ("rel-small", "bridge" if is_bridge(model) else "hooked")
    assert (fingerprint(tiny).source, fingerprint(tiny).backend) == ("", "")  # not from load_model
    moved = dataclasses.replace(mark, source="elsewhere", backend="")
    assert moved == mark and moved.differences(mark) == []
    assert Fingerprint.from_json(moved.to_json()).source == "elsewhere"
    old = json.loads(mark.to_json())
    del old["source"], old["backend"]  # as fvlens 0.1 wrote it
    assert Fingerprint.from_json(json.dumps(old)) == mark
