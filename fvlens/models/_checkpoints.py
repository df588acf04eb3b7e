"""Find a checkpoint, in a folder or on the hub, and read it with Hugging Face; every failure is one clear error.

No code that comes with a checkpoint is run (``trust_remote_code`` is off).
"""

import contextlib
import dataclasses
import difflib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fvlens.files import as_path, path_hint
from fvlens.models import _adapters, _gguf
from fvlens.models._gguf_file import GgufHead, is_gguf
from fvlens.models._named_files import INDEXES, check_named_files
from fvlens.models._packaged import PACKAGED_MODELS, packaged_file

EMBEDDED_MODELS = {"rel-small": "the embedded model: a small GPT-2 trained on the word-pair library"}

NATIVE_FORMAT = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Owners of hub repositories in TransformerLens' own format, which Hugging Face cannot read."""


def embedded_folder(name: str = "rel-small") -> Path:
    """Folder of a model that ships with the package."""
    return Path(str(resources.files("fvlens.zoo") / name))


def official_names() -> list[str]:
    """Names of the hub models that TransformerLens lists.

    Example:
        >>> from fvlens.models import official_names
        >>> "EleutherAI/pythia-160m" in official_names()
        True
    """
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    return list(OFFICIAL_MODEL_NAMES)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a model's files are.

    Attributes:
        path: a folder, or the name of a hub repository.
        name: what the model is called in its configuration.
        revision: branch, tag or commit of the repository; None for its main branch, and for a folder.
        local: whether ``path`` is a folder.
        gguf: the head of the GGUF file in that folder that is the model; None for other formats.
        adapter: folder of a PEFT adapter that is merged into the model; None without.
    """

    path: str
    name: str
    revision: str | None
    local: bool
    gguf: GgufHead | None = None
    adapter: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is given."""
        options = {"revision": self.revision or "main", "local_files_only": self.local, "trust_remote_code": False}
        return options if self.gguf is None else {**options, "gguf_file": self.gguf.path.name}

    @property
    def shown(self) -> str:
        """What messages call it: the repository, the folder, or the file."""
        return self.path if self.gguf is None else str(self.gguf.path)


def is_known(name: str) -> bool:
    """Whether a name stands for a model that comes with fvlens, or whose hash does.

    A file may name such a model without anybody's leave; what a hub name or a path stands for is for the user to say.
    """
    return name in EMBEDDED_MODELS or name in PACKAGED_MODELS


def find_checkpoint(
    name_or_path: str | Path, revision: str | None, *, base: str | Path | None = None, trust: bool = False
) -> Checkpoint:
    """The checkpoint behind a name: an embedded or packaged model, a folder, a GGUF file, a name on the hub.

    Args:
        name_or_path, revision, base, trust: as for :func:`fvlens.load_model`.

    Raises:
        ValueError: neither of these (with the nearest names), a folder without a model, or a ``revision`` of something
            that is not on the hub; an adapter whose base is not given; a ``base`` of something that is no adapter.
    """
    text = str(name_or_path)
    place = as_path(name_or_path)
    if text in EMBEDDED_MODELS:
        place = embedded_folder(text)
    elif text in PACKAGED_MODELS:
        _gguf.require_gguf()
        place = packaged_file(text)
    if place.is_dir() and _adapters.is_adapter(place):
        return _find_adapted(place, revision, base, trust)
    if base is not None:
        raise ValueError(f"load_model: base={str(base)!r} is for a PEFT adapter, which {text} is not; leave base out.")
    if place.is_dir() or place.is_file():
        if revision is not None:
            kind = "folder" if place.is_dir() else "file"
            raise ValueError(
                f"load_model: revision={revision!r} names a revision of a hub model, but {text} is a local {kind}; "
                "leave revision out."
            )
        return _find_local(place, text if is_known(text) else None)
    path = _aliases().get(text.lower())
    if path is None and not isinstance(name_or_path, Path) and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        path = text
    if path is None:
        raise ValueError(
            f"load_model: {text!r} is neither a folder nor a model TransformerLens knows; "
            f"{_nearest(text) or 'see `fvlens models`.'}{path_hint(text)}"
        )
    return Checkpoint(path, path.split("/")[-1], revision, local=False)


def _find_local(place: Path, name: str | None) -> Checkpoint:
    """A folder in Hugging Face format, a GGUF file, or a folder with one."""
    file = place
    if place.is_dir():
        if (place / "config.json").is_file():
            check_named_files(place)
            return Checkpoint(str(place), name or place.resolve().name, None, local=True)
        files = sorted(path for path in place.glob("*.gguf") if path.is_file())
        if len(files) > 1:
            raise ValueError(
                f"load_model: folder {place} holds {len(files)} GGUF files ({', '.join(path.name for path in files)}); "
                "give the path of one."
            )
        if not files:
            raise ValueError(
                f"load_model: folder {place} holds no config.json; expected a model in Hugging Face format, or a GGUF "
                "file."
            )
        file = files[0]
    elif not is_gguf(place):
        raise ValueError(
            f"load_model: {place} is a file, but no GGUF file; expected the folder of a model in Hugging Face format, "
            "or a GGUF file."
        )
    return Checkpoint(str(file.parent), name or file.stem, None, local=True, gguf=_gguf.checked_head(file))


def _find_adapted(folder: Path, revision: str | None, base: str | Path | None, trust: bool) -> Checkpoint:
    """A PEFT adapter and its base: beside it, given, or what its file names if that is trusted."""
    _adapters.require_peft(folder)
    named = _adapters.named_base(folder)
    if base is None and _adapters.holds_base(folder):
        check_named_files(folder)
        under = Checkpoint(str(folder), folder.resolve().name, None, local=True)
    else:
        asked = base if base is not None else named if named is not None and (trust or is_known(named)) else None
        if asked is None:
            says = "names no base" if named is None else f"names the base {named!r}"
            also = "" if named is None else ", or load what it names with --trust (in Python, trust=True)"
            raise ValueError(
                f"load_model: {folder} is a PEFT adapter, whose file {says}; say where its base is with --base "
                f"(in Python, base=){also}."
            )
        try:
            under = find_checkpoint(asked, revision)
        except ValueError as error:
            raise ValueError(
                f"load_model: {folder} is a PEFT adapter to {str(asked)!r}, which is not at hand ({error}) Say where "
                "it is with --base (in Python, base=)."
            ) from error
    return dataclasses.replace(under, name=folder.resolve().name, adapter=folder)


def _aliases() -> dict[str, str]:
    """Every name that TransformerLens knows, in lower case -> name of the repository."""
    from transformer_lens.supported_models import MODEL_ALIASES

    aliases = {alias.lower(): name for name, known in MODEL_ALIASES.items() for alias in known}
    return aliases | {name.lower(): name for name in official_names()}


def _nearest(text: str) -> str:
    """A question after the nearest known names, or nothing."""
    from transformer_lens.supported_models import MODEL_ALIASES

    aliases = [alias for names in MODEL_ALIASES.values() for alias in names]
    known = dict.fromkeys([*EMBEDDED_MODELS, *PACKAGED_MODELS, *official_names(), *aliases])
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""


@contextlib.contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what Hugging Face raises while it reads a checkpoint into one ValueError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from safetensors import SafetensorError

    path = checkpoint.path
    kinds: list[type[Exception]] = [OSError, ValueError, KeyError, AttributeError, NotImplementedError, SafetensorError]
    if checkpoint.gguf is not None:  # its readers trust the file
        kinds += [TypeError, LookupError, ArithmeticError, RuntimeError, struct.error]
    try:
        yield
    except tuple(kinds) as error:
        text = " ".join(str(error).split())[:300]
        causes = _causes(error)
        if "trust_remote_code" in str(error):
            message = (
                f"{path} needs Python code that comes with the checkpoint, and fvlens runs none; expected an "
                "architecture that transformers itself has."
            )
        elif checkpoint.local:
            message = f"the model in {checkpoint.shown} cannot be read ({type(error).__name__}: {text})."
        elif any(isinstance(cause, GatedRepoError) for cause in causes):
            message = (
                f"{path} is gated: accept its licence at https://huggingface.co/{path}, then log in with "
                "`hf auth login` or set HF_TOKEN."
            )
        elif any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            message = (
                f"{path} has no revision {checkpoint.revision!r}; expected a branch, a tag or a commit that "
                f"https://huggingface.co/{path} lists."
            )
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            message = (
                f"{path!r} is neither a folder nor a repository on the hub that you may read; {_nearest(path)} for a "
                "private one, log in with `hf auth login`."
            )
        else:
            message = (
                f"{path!r} is no folder here and could not be fetched ({text}); with no network, save the model to a "
                "folder where there is one and give that folder."
            )
        raise ValueError(f"load_model: {message}") from error


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it; transformers' OSErrors carry the hub's own error as their cause."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def pinned(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint at the commit that its revision stands for now, so that all its files are of one state."""
    from transformers.utils.hub import cached_file

    if checkpoint.local:
        return checkpoint
    with explained(checkpoint):
        file = cached_file(checkpoint.path, "config.json", revision=checkpoint.revision or "main")
        adapter, *indexes = (_fetched(checkpoint, name) for name in (_adapters.ADAPTER_CONFIG, *INDEXES))
    if adapter is not None:
        raise ValueError(
            f"load_model: {checkpoint.path} is a PEFT adapter, or holds one; fetch it into a folder "
            f"(`hf download {checkpoint.path} --local-dir FOLDER`) and give that."
        )
    for index in indexes:
        if index is not None:
            check_named_files(Path(index).parent)
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(file))
    return dataclasses.replace(checkpoint, revision=commit[1]) if commit else checkpoint


def _fetched(checkpoint: Checkpoint, name: str) -> str | None:
    """A file of a repository, fetched; None if it has none of this name."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        checkpoint.path,
        name,
        revision=checkpoint.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else str(found)


def read_config(checkpoint: Checkpoint) -> Any:
    """The Hugging Face configuration."""
    from transformers import AutoConfig

    with explained(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)
    if checkpoint.gguf is not None:
        _gguf.complete_config(config, checkpoint.gguf)
    return config


def decoder_class(checkpoint: Checkpoint, config: Any) -> str:
    """Name of the architecture class, such as ``GPT2LMHeadModel``.

    Raises:
        ValueError: the checkpoint is no decoder-only language model.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    causal = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = (config.architectures or [causal.get(config.model_type)])[0]
    if config.is_encoder_decoder:
        kind = "an encoder-decoder model"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "an encoder-only model"
    elif found not in causal.values():
        kind = "not a causal language model"
    else:
        return str(found)
    raise ValueError(
        f"load_model: fvlens needs a decoder-only model; {checkpoint.path} is {kind} (architecture {found}, model type "
        f"{config.model_type})."
    )


def read_model(checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype, split: dict[str, Any]) -> Any:
    """The Hugging Face model, with attention written out; ``split`` says how to spread it over devices.

    Raises:
        ValueError: files are missing or broken, or weights are missing from them.
    """
    from transformers import AutoModelForCausalLM

    options = {**split, **checkpoint.options}
    if checkpoint.gguf is not None:
        options |= _gguf.options(checkpoint.gguf.path.name)
    beside = checkpoint.adapter is not None and str(checkpoint.adapter) == checkpoint.path
    place = _adapters.without_adapter(Path(checkpoint.path)) if beside else contextlib.nullcontext(checkpoint.path)
    with place as path, explained(checkpoint), _no_loading_bar(checkpoint.local):
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    model, found = read
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"load_model: {checkpoint.shown} lacks {len(missing)} of the weights of {type(model).__name__}, such as "
            f"{missing[0]}; expected a complete checkpoint."
        )
    if checkpoint.gguf is not None:
        _gguf.check_all_used(checkpoint.gguf.path, checkpoint.gguf, model)
        _gguf.forget_quantization(model)
    return model.eval()


@contextlib.contextmanager
def _no_loading_bar(hidden: bool) -> Iterator[None]:
    """Hide Hugging Face's bar over weight files; a local folder loads at once."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    if hidden:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer, padding on the left; None for a folder without one."""
    from transformers import AutoTokenizer

    folder, options = Path(checkpoint.path), checkpoint.options
    if checkpoint.adapter is not None and _has_tokenizer(checkpoint.adapter):  # it may have tokens of its own
        check_named_files(checkpoint.adapter)
        folder, options = checkpoint.adapter, {"local_files_only": True, "trust_remote_code": False}
    elif checkpoint.gguf is not None:
        if "tokenizer.ggml.model" not in checkpoint.gguf.metadata:
            return None
    elif checkpoint.local and not _has_tokenizer(folder):
        return None
    path = str(folder) if folder == checkpoint.adapter else checkpoint.path
    with explained(checkpoint):
        return AutoTokenizer.from_pretrained(path, padding_side="left", **options)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))
