"""What is loaded from the hub, and everything that cannot be loaded: every error message."""

import json
import shutil
import sys
from importlib.metadata import version as version_of

import httpx
import pytest
import torch
import transformers
from checkpoints import SHAPE, VOCABULARY, hugging_face, random_tokens, relative_difference
from conftest import BACKENDS, HAS_HOOKED, both, needs_hooked
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from fvlens.models import (
    _checkpoints,
    _hf_configs,
    _load,
    _memory,
    embedded_folder,
    fingerprint,
    free_memory,
    load_model,
    official_names,
)
from fvlens.types import is_bridge

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
