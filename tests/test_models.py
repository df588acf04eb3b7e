"""Loaded models against plain Hugging Face, in both classes of TransformerLens."""

import json
import shutil
import socket
import warnings

import pytest
import torch
import transformers
from checkpoints import (
    ARCHITECTURES,
    GPT2_SHAPE,
    GROUPED,
    SHAPE,
    VOCABULARY,
    WINDOW,
    hugging_face,
    random_tokens,
    relative_difference,
)
from conftest import HAS_HOOKED, both, needs_hooked, seeded
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.models import (
    EMBEDDED_MODELS,
    _checkpoints,
    _hf_configs,
    _load,
    bos_token_id,
    embedded_folder,
    fingerprint,
    load_model,
    model_device,
    quiet_deprecation,
)
from fvlens.types import is_bridge


def assert_same_logits(mine, reference, atol=1e-4):
    tokens = random_tokens(mine.cfg.d_vocab)
    with torch.inference_mode():
        torch.testing.assert_close(mine(tokens), reference(tokens).logits, atol=atol, rtol=0)


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
            assert bos_token_id(mine) is None


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
    assert_same_logits(mine, hugging_face(tmp_path))
