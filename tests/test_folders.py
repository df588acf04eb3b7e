"""What people have in a folder beside a plain model: adapters, quantised weights, pickles, other tokenizers."""

import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from checkpoints import VOCABULARY, hugging_face
from conftest import HAS_HOOKED, TOKENIZER, both, needs_hooked, seeded
from transformers import AutoTokenizer

import fvlens
from fvlens.models import _adapters, _heads, _load, _native, _quantized, fingerprint, load_model, load_report
from fvlens.models._named_files import lies_inside
from fvlens.types import is_bridge

TOKENS = torch.randint(1, VOCABULARY, (2, 17), generator=seeded(1))


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a tiny checkpoint to change."""

    def make(name="llama"):
        return shutil.copytree(folders(name), tmp_path / "model")

    return make


def logits(model):
    with torch.inference_mode():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# PEFT adapters


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """A LoRA adapter of the tiny Llama, alone, and the logits of base and adapter in plain peft."""
    peft = pytest.importorskip("peft", reason="needs the package peft (extra peft)")
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(hugging_face(folders("llama")), settings).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return folder, logits(adapted)


@both
def test_an_adapter_is_merged_into_the_base_that_is_given(adapter, folders, backend):
    folder, expected = adapter
    mine = load_model(folder, device="cpu", backend=backend, base=folders("llama"))
    torch.testing.assert_close(logits(mine), expected, atol=1e-4, rtol=0)
    assert (expected - logits(hugging_face(folders("llama")))).abs().max() > 0.1
    assert mine.cfg.model_name == "lora"
    assert mine.tokenizer is not None
    assert all(parameter.requires_grad for parameter in mine.parameters())
    plain = load_model(folders("llama"), device="cpu", backend=backend)
    assert [line.split(":")[0] for line in fingerprint(mine).differences(fingerprint(plain))] == ["weights"]


def test_the_base_that_a_file_names_is_loaded_if_that_is_trusted(adapter, folders):
    folder, expected = adapter
    with pytest.raises(
        ValueError, match=r"is a PEFT adapter, whose file names the base '.*llama'; say .*--base.*trust"
    ):
        load_model(folder, device="cpu")
    torch.testing.assert_close(logits(load_model(folder, device="cpu", trust=True)), expected, atol=1e-4, rtol=0)


def test_a_base_that_is_not_at_hand_is_said(adapter, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "lora")
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is a PEFT adapter to '.*gone', which is not at hand \(load_model: .*--base"):
        load_model(folder, trust=True)
    rewrite(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(
        ValueError, match=r"whose file names no base; say where its base is with --base \(in Python, base=\)\."
    ):
        load_model(folder, trust=True)


@both
def test_base_and_adapter_in_one_folder(adapter, copy, backend):
    folder = copy()
    for file in adapter[0].iterdir():
        shutil.copy(file, folder / file.name)
    rewrite(folder / "adapter_config.json", base_model_name_or_path="/nowhere")  # nobody asks for it
    mine = load_model(folder, device="cpu", backend=backend)
    torch.testing.assert_close(logits(mine), adapter[1], atol=1e-4, rtol=0)
    assert mine.tokenizer is not None


def test_adapters_that_cannot_be_merged(adapter, folders, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"the adapter in .*lora cannot be merged into this base .*trained on"):
        load_model(adapter[0], device="cpu", base=folders("gpt2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(hugging_face(folders("llama")), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"PREFIX_TUNING adds tokens or keys and cannot be merged"):
        load_model(tmp_path / "prefix", device="cpu", base=folders("llama"))
    folder = shutil.copytree(adapter[0], tmp_path / "less")
    rewrite(folder / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"0 weights are missing and 6 have no place in LlamaForCausalLM, such as "):
        load_model(folder, device="cpu", base=folders("llama"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights; expected adapter_model\.safetensors or adapter_model\.bin"):
        load_model(folder, device="cpu", base=folders("llama"))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is no configuration of a PEFT adapter \(no peft_type\)"):
        load_model(folder, device="cpu", base=folders("llama"))


def test_an_adapter_without_peft_and_a_base_without_an_adapter(adapter, folders, monkeypatch):
    with pytest.raises(ValueError, match=r"base='x' is for a PEFT adapter, which .*llama is not; leave base out"):
        load_model(folders("llama"), base="x")
    monkeypatch.setattr(_adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is a PEFT adapter, which needs the package peft; .*fvlens\[peft\]"):
        load_model(adapter[0], base=folders("llama"))


# Quantised weights


@pytest.mark.parametrize(
    "method, remedy",
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            r"bitsandbytes nf4, .*unpacked where .*fvlens\[bitsandbytes\]",
        ),
        ({"load_in_8bit": True}, r"bitsandbytes int8, .*fvlens\[bitsandbytes\]"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, .*the repository that it was made from.*gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "awq, .*the repository that it was made from"),
        ({"quant_method": "next-years"}, "next-years, .*take the model that it was made from, or take a GGUF file"),
    ],
)
@both
def test_quantised_weights_are_refused_before_anything_is_read(copy, monkeypatch, method, remedy, backend):
    folder = copy()
    rewrite(folder / "config.json", quantization_config=method)
    monkeypatch.setattr(_quantized, "find_spec", lambda name: None)
    monkeypatch.setattr(_load, "read_model", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"the weights of .* are stored as {remedy}"):
        load_model(folder, backend=backend)


def test_the_kind_of_quantisation_is_read_from_objects_too():
    class Config:
        quantization_config = type("Said", (), {"quant_method": "awq"})()

    with pytest.raises(ValueError, match="stored as awq"):
        _quantized.refuse("x", Config())


QUANTISED = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
    "fp4": ({"load_in_4bit": True}, "bitsandbytes fp4"),
    "int8": ({"load_in_8bit": True}, "bitsandbytes int8"),
}


@pytest.mark.parametrize("kind", QUANTISED)
@both
def test_what_bitsandbytes_stored_is_unpacked_and_mediated(folders, tmp_path, kind, backend):
    """Weights are those that transformers unpacks; heads of the model are mediated, and what is saved says nothing."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how, stored = QUANTISED[kind]
    packed = AutoModelForCausalLM.from_pretrained(
        folders("llama"), quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}, dtype=torch.float32
    )
    folder = shutil.copytree(folders("llama"), tmp_path / kind)
    (folder / "model.safetensors").unlink()
    packed.save_pretrained(folder)
    model = load_model(folder, backend=backend, device="cpu")
    assert fingerprint(model).quantization == load_report(model).quantization == stored
    plain = packed.dequantize(torch.float32).eval()
    tokens = torch.arange(3, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, atol=1e-4, rtol=1e-4)
    relation = fvlens.load_relation("antonym")
    prompts = fvlens.build_prompts(
        model, relation, labels="permuted", n_prompts=2, n_shots=3, generator=torch.Generator().manual_seed(0)
    )
    means = fvlens.mean_head_activations(model, prompts, progress=False)
    ours, slow = (
        fvlens.indirect_effects(model, prompts, means, path=path, progress=False).cie for path in (None, "naive")
    )
    assert torch.isfinite(ours).all() and ours.abs().max() > 0
    torch.testing.assert_close(ours, slow, atol=1e-6, rtol=1e-4)


# Tokenizers


@both
def test_a_checkpoint_without_a_tokenizer_says_so_where_one_is_needed(copy, backend):
    folder = copy()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    mine = load_model(folder, device="cpu", backend=backend)
    assert mine.tokenizer is None
    with pytest.raises(ValueError, match=r"the model has no tokenizer; put its tokenizer's files .*into its folder"):
        fvlens.build_prompts(mine, [("hot", "cold"), ("big", "small")], n_shots=1, generator=seeded())


def with_tokens(folder, words, **changes):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    tokenizer.add_tokens(words)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


@both
def test_added_tokens_without_an_embedding_do_no_harm_until_a_prompt_holds_one(copy, backend):
    folder = copy()
    with_tokens(folder, ["<extra>"], pad_token="<pad>")
    with pytest.warns(UserWarning, match=rf"2 added tokens .*'<extra>', {VOCABULARY} of {VOCABULARY}\); no prompt may"):
        mine = load_model(folder, device="cpu", backend=backend)
    assert len(load_report(mine).notes) == 1
    pairs = [("hot", "cold"), ("antonym", "synonym"), ("big", "small")]
    prompts = fvlens.build_prompts(mine, pairs, n_shots=1, generator=seeded())
    assert prompts.tokens.max() < VOCABULARY
    assert mine(prompts.tokens, attention_mask=prompts.attention_mask).isfinite().all()
    with pytest.raises(
        ValueError, match=rf"holds the token '<extra>' \(id {VOCABULARY}\), but the model has embeddings"
    ):
        fvlens.build_prompts(mine, [*pairs, ("<extra>", "x")], n_shots=3, n_prompts=8, generator=seeded())


def test_a_vocabulary_beyond_the_embedding_is_refused(copy):
    folder = copy()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzzz"] = VOCABULARY
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"has 1 tokens that the model has no embedding for, such as 'zzzz'; .* below {VOCABULARY}"
    ):
        load_model(folder, device="cpu")


# What files name


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:\\x", "\\\\host\\x", "..\\x", "", 3, None, "a\0b"])
def test_names_that_lead_out_of_a_folder(name):
    assert not lies_inside(name)


def test_names_that_stay_inside():
    assert all(map(lies_inside, ["model-00001-of-00002.safetensors", "sub/model.safetensors", "..model"]))


@both
def test_an_index_names_nothing_outside_its_folder(copy, tmp_path, backend):
    folder = copy()
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    for named, problem in (
        ({"a": "../outside.safetensors"}, r"names '\.\./outside\.safetensors'; expected a file inside its folder"),
        ({"a": str(tmp_path / "outside.safetensors")}, "expected a file inside its folder. Nothing outside it is read"),
        ([], "has no weight_map; expected an index of weight files"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
        with pytest.raises(ValueError, match=problem):
            load_model(folder, device="cpu", backend=backend)


def test_a_tokenizer_names_nothing_outside_its_folder(copy):
    folder = copy()
    rewrite(folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names '\.\./tokenizer\.4\.0\.0\.json'"):
        load_model(folder, device="cpu")


def test_shards_inside_the_folder_load(folders, tmp_path):
    reference = hugging_face(folders("llama"))
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(
        logits(load_model(tmp_path / "shards", device="cpu")), logits(reference), atol=1e-4, rtol=0
    )


# TransformerLens' own pickles

COMMIT = "c" * 40


class Marks:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def native(tmp_path, monkeypatch, tiny):
    """Puts a pickle into an empty hub cache under the name of one of TransformerLens' own models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(content, tokenizer=None):
        place = tmp_path / "models--NeelNanda--SoLU_1L512W_C4_Code"
        shutil.rmtree(place, ignore_errors=True)
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        snapshot = place / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        cfg = tiny.cfg
        sizes = {name: getattr(cfg, name) for name in ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx")}
        config = dict(sizes, d_vocab=cfg.d_vocab, act_fn="gelu_new", attn_only=False, normalization="LN")
        (snapshot / "config.json").write_text(json.dumps(config | {"tokenizer_name": tokenizer}))
        torch.save(content, snapshot / "SoLU_1L512W_final.pth")

    return put


leaves_files_open = pytest.mark.filterwarnings(  # TransformerLens' reader of config.json
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@needs_hooked
@leaves_files_open
def test_a_pickle_of_tensors_is_read(native, tiny):
    native({name: tensor for name, tensor in tiny.state_dict().items() if "mask" not in name and "IGNORE" not in name})
    mine = load_model("solu-1l", device="cpu", backend="hooked")
    torch.testing.assert_close(logits(mine), logits(tiny), atol=1e-5, rtol=0)
    assert (fingerprint(mine).source, fingerprint(mine).revision) == ("solu-1l", COMMIT)
    assert load_report(mine).head_writes < 1e-5


@needs_hooked
@leaves_files_open
def test_a_pickle_that_runs_something_is_refused_and_nothing_is_run(native, tmp_path):
    marker = tmp_path / "was-run"
    native({"embed.W_E": Marks(marker)})
    with pytest.raises(
        ValueError, match=r"final\.pth is a pickle that holds more than tensors, .*; fvlens runs nothing"
    ):
        load_model("solu-1l", device="cpu", backend="hooked")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marks(marker)))
    assert marker.exists()  # the marker would have told


@needs_hooked
@leaves_files_open
def test_other_pickles_and_tokenizers_of_others_are_refused(native, monkeypatch):
    native([torch.ones(2)])
    with pytest.raises(ValueError, match=r"final\.pth: expected tensors by name, got list"):
        load_model("solu-1l", device="cpu", backend="hooked")
    native({"x": torch.ones(2)}, tokenizer="somebody/else")
    with pytest.raises(ValueError, match=r"names the tokenizer of another repository, 'somebody/else'; .*--trust"):
        load_model("solu-1l", device="cpu", backend="hooked")
    monkeypatch.setattr(_native, "free_memory", lambda device: 7)
    with pytest.raises(
        ValueError, match=r"SoLU_1L512W_C4_Code needs about [\d,]+ bytes while it loads on cpu, where 7"
    ):
        load_model("solu-1l", device="cpu", backend="hooked")


def test_a_repository_with_an_adapter_is_not_loaded_in_silence(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--adapted"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    snapshot = shutil.copytree(folders("gpt2"), place / "snapshots" / COMMIT)
    load_model("owner/adapted", device="cpu")
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(
        ValueError, match=r"owner/adapted is a PEFT adapter, or holds one; fetch it .*hf download owner"
    ):
        load_model("owner/adapted", device="cpu")
    (snapshot / "adapter_config.json").unlink()
    index = {"metadata": {}, "weight_map": {"a": "../../other"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./\.\./other'; expected a file inside its folder"):
        load_model("owner/adapted", device="cpu")


# Heads add up


@both
@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "neox", "llama", "gemma", "phi"])
def test_what_heads_write_adds_up_on_every_architecture(folders, name, backend):
    mine = load_model(folders(name), device="cpu", backend=backend)
    assert load_report(mine).head_writes < 1e-5


@both
def test_heads_are_not_compared_where_a_norm_follows(folders, backend):
    assert load_report(load_model(folders("gemma2"), device="cpu", backend=backend)).head_writes is None


def test_half_precision_adds_up_to_its_rounding(folders):
    found = load_report(load_model(folders("llama"), device="cpu", dtype=torch.bfloat16)).head_writes
    assert 1e-5 < found < 0.02


def test_heads_that_do_not_add_up_are_said(folders, monkeypatch):
    original = _heads._sum_of_heads
    monkeypatch.setattr(_heads, "_sum_of_heads", lambda attention, z: 1.5 * original(attention, z))
    with pytest.warns(UserWarning, match=r"what the heads write adds up to something else .*by 0\.5 of the largest"):
        mine = load_model(folders("llama"), device="cpu")
    assert load_report(mine).head_writes == pytest.approx(0.5, rel=1e-3)
    assert is_bridge(mine) != HAS_HOOKED


def test_a_model_of_ones_own_has_no_report(tiny):
    assert load_report(tiny) is None
