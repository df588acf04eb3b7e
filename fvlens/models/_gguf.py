"""Models in GGUF files, read by transformers into floats: what it can read, and what it does not honour.

transformers builds the configuration and the tokenizer from the file's metadata and unpacks its blocks. Metadata that
it passes over would change the numbers without a word, so what is known to do so is looked for here and said.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fvlens.models._gguf_file import GgufHead, read_head

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"): (r"\p{N}", _GPT2),
    ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion"): (_GPT2,),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"): (_LLAMA3,),
    ("qwen2", "stablelm2", "hunyuan", "deepseek-r1-qwen", "megrez"): (_QWEN2,),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""How llama.cpp, whose format it is, splits text before it merges: the patterns of each name, one after another."""

_PROBES = (
    *("1", " 7", "2024", " 1234567", "3.14", "1,000,000", "a1b22c333", "50%", "x = 10**6", " 12:30"),
    *("I'm", "don't", " they'll", "we've", "IT'S", "o'clock", "the dogs' tails"),
    *(
        "two  spaces",
        "line\n\nnext",
        "\ttab",
        "end \n",
        "Q: hot\nA: cold\n\n",
        "naïve café",
        "北京",
        "→ ↦",
        "(a) [b] {c}",
    ),
)


def require_gguf() -> None:
    """GGUF files need a package for their blocks.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "load_model: a GGUF file needs the package gguf, which is not installed; expected "
            "`pip install 'fvlens[gguf]'` (or `pip install gguf`)."
        )


def readable() -> list[str]:
    """Names of the architectures whose GGUF files the installed transformers reads."""
    legacy = importlib.import_module("transformers.modeling_gguf_pytorch_utils").GGUF_SUPPORTED_ARCHITECTURES
    newer = getattr(importlib.import_module("transformers.integrations"), "gguf", None)
    names = {*legacy, *getattr(newer, "GGUF_CONFIG_ARCHS", ())} - {"general", "tokenizer"}
    return sorted(names)


def checked_head(path: Path) -> GgufHead:
    """The head of a GGUF file that transformers can read whole.

    Raises:
        ValueError: no GGUF file; one part of several; or an architecture that transformers does not read (with those
            that it reads).
    """
    require_gguf()
    head = read_head(path)
    n_parts = head.metadata.get("split.count", 1)
    if n_parts != 1:
        raise ValueError(
            f"load_model: {path} is one of {n_parts} files, and transformers reads one; join them first with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    known = readable()
    name = head.architecture
    written = {name, name.replace("-", "_"), name.replace("moe", "_moe")}  # as transformers spells it
    if not written & set(known):
        raise ValueError(
            f"load_model: {path} is of architecture {name!r}, whose GGUF files transformers does not read; it reads "
            f"{', '.join(known)}. Take the model in Hugging Face format."
        )
    return head


def complete_config(config: Any, head: GgufHead) -> None:
    """Put into a configuration what transformers leaves at another model's default."""
    if head.architecture == "gpt2" and head.said("context_length"):
        config.n_positions = head.said("context_length")


def options(file: str) -> dict[str, Any]:
    """What ``from_pretrained`` is given beside the file's name: blocks are unpacked, whatever kernels there are."""
    made = getattr(importlib.import_module("transformers"), "GgufConfig", None)
    return {} if made is None else {"quantization_config": made(gguf_file=file, dequantize=True)}


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once while it reads configuration, tokenizer and weights, and show no bar.

    It parses all metadata each time, token by token through a memory map, and makes the table of names anew for every
    module of the model; on the file of SmolLM2-135M that is most of the loading time.
    """
    gguf = importlib.import_module("gguf")
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    class Plain(gguf.GGUFReader):
        """Slices a plain array over the memory map, which is several times faster than slicing the map."""

        @property
        def data(self) -> Any:
            return self.plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self.plain = np.asarray(mapped)

    swapped = (
        (gguf, "GGUFReader", functools.cache(Plain)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (module, "tqdm", functools.partial(module.tqdm, disable=True)),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in swapped]
    try:
        for owner, name, quick in swapped:
            setattr(owner, name, quick)
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


def forget_quantization(hf_model: Any) -> None:
    """Take from a model of floats what says that it is quantised, so that it can be saved and read again."""
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_is_quantized"):
        vars(hf_model).pop(name, None)


def check_all_used(path: Path, head: GgufHead, hf_model: Any) -> None:
    """Refuse a file that holds more numbers than the model that transformers made of it.

    Raises:
        ValueError: it does; transformers drops tensors that it has no place for.
    """
    tied = bool(hf_model.config.get_text_config().tie_word_embeddings)
    passed = ("rope_freqs", "rope_factors", *(["output.weight"] if tied else []))
    n_file = sum(tensor.size for tensor in head.tensors if not tensor.name.startswith(passed))
    n_model = sum(parameter.numel() for parameter in hf_model.parameters())
    if n_file > n_model:
        raise ValueError(
            f"load_model: {path} holds {n_file:,} numbers, and {type(hf_model).__name__} takes {n_model:,} of them: "
            "transformers drops tensors that it has no place for (biases, for the most part), and the model would "
            "compute something else. Take the model in Hugging Face format."
        )


def passed_over(head: GgufHead) -> list[str]:
    """What the file says of its model that transformers does not read, and that changes numbers."""
    notes = []
    scaling = head.said("rope.scaling.type", "none")
    names = sorted({tensor.name for tensor in head.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))})
    if scaling not in ("none", "") or names:
        what = ", ".join([*([f"rope.scaling.type {scaling!r}"] if scaling not in ("none", "") else []), *names])
        notes.append(
            f"the file scales its rotary positions ({what}), and transformers reads none of it: the model's numbers "
            "are not those that it was trained for; take it in Hugging Face format"
        )
    return notes


def tokenizer_differences(tokenizer: Any, head: GgufHead) -> list[str]:
    """What transformers' tokenizer of a GGUF file does otherwise than the file asks for, on many short texts.

    The texts are digits, contractions, spaces and all words of the library, bare and behind a space. Their tokens are
    compared with those under the split that the file names (``tokenizer.ggml.pre``), and decoded back.
    """
    from tokenizers import Regex, pre_tokenizers

    notes = []
    texts = list(dict.fromkeys([*_PROBES, *_library_words()]))
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    name = head.metadata.get("tokenizer.ggml.pre")
    splits = next((patterns for names, patterns in _SPLITS.items() if name in names), None)
    if head.metadata.get("tokenizer.ggml.model") == "gpt2":
        if splits is None:
            notes.append(
                f"how the file's tokenizer splits text ({name or 'it does not say'}) is not known here; digits, "
                "contractions and spaces may be split otherwise than in training"
            )
        else:
            asked = copy.deepcopy(tokenizer.backend_tokenizer)
            parts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits]
            asked.pre_tokenizer = pre_tokenizers.Sequence(
                [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            expected = [encoding.ids for encoding in asked.encode_batch(texts, add_special_tokens=False)]
            differing = [row for row in zip(texts, ids, expected, strict=True) if row[1] != row[2]]
            if differing:
                text, mine, theirs = differing[0]
                notes.append(
                    f"the file's tokenizer splits text as {name!r}, which transformers does not honour: "
                    f"{len(differing)} of {len(texts):,} texts have other tokens, such as {text!r}, "
                    f"{_shown(tokenizer, mine)} instead of {_shown(tokenizer, theirs)}"
                )
    # sentencepiece puts a space in front, and the decoder may leave it
    back = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    lost = [pair for pair in zip(texts, back, strict=True) if pair[0].lstrip(" ") != pair[1].lstrip(" ")]
    if lost:
        text, found = lost[0]
        notes.append(
            f"{len(lost)} of {len(texts):,} texts do not come back from their tokens, such as {text!r}, which comes "
            f"back as {found!r}"
        )
    return notes


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return "|".join(tokenizer.decode([token]) for token in ids)


def _library_words() -> Iterator[str]:
    """Every word of the library's pairs, bare and behind a space. Its files are found by their path."""
    for file in sorted(Path(str(resources.files("fvlens"))).glob("relations/data/*.tsv")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                for word in line.split("\t"):
                    yield from (word, f" {word}")
