"""Small GGUF files of the tests' checkpoints, written by the ``gguf`` package's own writer."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from checkpoints import hugging_face
from conftest import TOKENIZER

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def _as_llama_cpp(name, tensor, config):
    """llama.cpp pairs a rotary head's axes one after another, Hugging Face half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n_heads = next((n for part, n in heads.items() if name.endswith(f"{part}.weight")), None)
    if n_heads is None or config.model_type != "llama":
        return tensor
    return tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path, folder, *, kind=F32, metadata=(), leave_out=(), more=(), pre=None, architecture=None):
    """A checkpoint's weights, configuration and tokenizer as a GGUF file.

    Args:
        path: the file.
        folder: a checkpoint of :data:`ARCHITECTURES` with the tests' tokenizer.
        kind: ggml type of the matrices whose rows fill whole blocks; all others are F32.
        metadata: more keys, each with a text or a whole number.
        leave_out: beginnings of names of tensors that are not written.
        more: tensors beside them, by name.
        pre: write the tests' tokenizer, too, with one merge of digits, and say that it splits text in this way.
            Without, the file has none: Python reads such lists slowly.
        architecture: what the file says it is of; by default what it is.
    """
    model = hugging_face(folder)
    config = model.config
    name = architecture or config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(Path(folder).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if pre is not None:
        _add_tokenizer(writer, pre)
    for key, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    tensors = {}
    for key, tensor in model.state_dict().items():
        stem, _, end = key.rpartition(".")
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[f"{names.get_name(stem)}.{end}"] = _as_llama_cpp(key, tensor, config)
    for key, tensor in {**tensors, **dict(more)}.items():
        if key.startswith(tuple(leave_out)):
            continue
        numbers = tensor.contiguous().numpy().astype(np.float32)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        stored = kind if numbers.ndim == 2 and numbers.shape[1] % block == 0 else F32
        writer.add_tensor(key, gguf.quantize(numbers, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _add_tokenizer(writer, pre):
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"] | {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    special = {entry["content"] for entry in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens[-1] = "12"  # in place of the last merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [int(gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL) for token in tokens]
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    assert "".join(merges[-1].split()) == max(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_merges([*merges[:-1], "1 2"])
    end = vocabulary["<|endoftext|>"]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)


def unpacked(path):
    """Tensors of a file as floats, by the ``gguf`` package's reader alone."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
