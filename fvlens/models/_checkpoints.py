"""Find a checkpoint, in a folder or on the hub, and read it with Hugging Face; every failure is one clear error.

No code that comes with a checkpoint is run (``trust_remote_code`` is off).
"""

import contextlib
import copy
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

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
    """

    path: str
    name: str
    revision: str | None
    local: bool

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is given."""
        return {"revision": self.revision or "main", "local_files_only": self.local, "trust_remote_code": False}


def find_checkpoint(name_or_path: str | Path, revision: str | None) -> Checkpoint:
    """The checkpoint behind a name: an embedded model, a folder, a name TransformerLens knows, ``owner/name``.

    Raises:
        ValueError: neither of these (with the nearest names), a folder without ``config.json``, or a ``revision`` of
            something that is not on the hub.
    """
    text = str(name_or_path)
    folder = embedded_folder(text) if text in EMBEDDED_MODELS else Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"load_model: revision={revision!r} names a revision of a hub model, but {text} is a local folder; "
                "leave revision out."
            )
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"load_model: folder {folder} holds no config.json; expected a model in Hugging Face format."
            )
        return Checkpoint(str(folder), text if text in EMBEDDED_MODELS else folder.resolve().name, None, local=True)
    path = _aliases().get(text.lower())
    if path is None and not isinstance(name_or_path, Path) and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        path = text
    if path is None:
        raise ValueError(
            f"load_model: {text!r} is neither a folder nor a model TransformerLens knows; "
            f"{_nearest(text) or 'see `fvlens models`.'}"
        )
    return Checkpoint(path, path.split("/")[-1], revision, local=False)


def _aliases() -> dict[str, str]:
    """Every name that TransformerLens knows, in lower case -> name of the repository."""
    from transformer_lens.supported_models import MODEL_ALIASES

    aliases = {alias.lower(): name for name, known in MODEL_ALIASES.items() for alias in known}
    return aliases | {name.lower(): name for name in official_names()}


def _nearest(text: str) -> str:
    """A question after the nearest known names, or nothing."""
    from transformer_lens.supported_models import MODEL_ALIASES

    aliases = [alias for names in MODEL_ALIASES.values() for alias in names]
    known = dict.fromkeys([*EMBEDDED_MODELS, *official_names(), *aliases])
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""


@contextlib.contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what Hugging Face raises while it reads a checkpoint into one ValueError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from safetensors import SafetensorError

    path = checkpoint.path
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        causes = _causes(error)
        if "trust_remote_code" in str(error):
            message = (
                f"{path} needs Python code that comes with the checkpoint, and fvlens runs none; expected an "
                "architecture that transformers itself has."
            )
        elif checkpoint.local:
            message = f"the model in {path} cannot be read ({type(error).__name__}: {text})."
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
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(file))
    return dataclasses.replace(checkpoint, revision=commit[1]) if commit else checkpoint


def read_config(checkpoint: Checkpoint) -> Any:
    """The Hugging Face configuration."""
    from transformers import AutoConfig

    with explained(checkpoint):
        return AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)


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

    with explained(checkpoint), _no_loading_bar(checkpoint.local):
        read: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **split,
            **checkpoint.options,
        )
    model, found = read
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"load_model: {checkpoint.path} lacks {len(missing)} of the weights of {type(model).__name__}, such as "
            f"{missing[0]}; expected a complete checkpoint."
        )
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

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if checkpoint.local and not any((Path(checkpoint.path) / file).is_file() for file in files):
        return None
    with explained(checkpoint):
        return AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left", **checkpoint.options)


def count_parameters(config: Any) -> int:
    """Parameters of a model of this configuration, counted without making them; tied ones count once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    return sum(parameter.numel() for parameter in made.parameters())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        free = _available()
    except (OSError, ValueError, IndexError):
        return None
    room = cgroup_room()
    return free if room is None else min(free, room)


def _available() -> int:
    """Bytes of memory that the system can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left under the limits of the control groups that hold this process (a container); None without a limit.

    Cached files that the kernel would give back count as free.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    rooms: list[int] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":  # version 2
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, usage, cached = names
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit here
                left = int((place / limit).read_text()) - int((place / usage).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                rooms.append(max(0, left + int(stat.get(cached, 0))))
            if place == base:
                break
    return min(rooms, default=None)


def check_memory(
    checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype, devices: list[torch.device], copies: int
) -> None:
    """Estimate, before anything is loaded, whether the weights fit.

    Args:
        checkpoint, config: the model.
        dtype: precision of the parameters.
        devices: where the model goes, in equal shares.
        copies: how often the weights are held while the model is made on the CPU.

    Raises:
        ValueError: they do not.
    """
    n_parameters = count_parameters(config)
    weights = n_parameters * dtype.itemsize
    cpu = torch.device("cpu")
    needs = [(devices, weights if devices != [cpu] else copies * weights)]
    if devices != [cpu] and copies > 0:
        needs.append(([cpu], copies * weights))
    for places, needed in needs:
        free = [free_memory(place) for place in places]
        total = sum(amount for amount in free if amount is not None)
        if None in free or needed <= total:
            continue
        where = ", ".join(str(place) for place in places)
        raise ValueError(
            f"load_model: {checkpoint.name} has {n_parameters:,} parameters and needs {_gib(needed)} in "
            f"{str(dtype).removeprefix('torch.')} while it loads on {where}, where {_gib(total)} are free; take a "
            "smaller dtype (torch.bfloat16), another device, or split it over CUDA devices with n_devices."
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 1024**3:.3g} GiB"
