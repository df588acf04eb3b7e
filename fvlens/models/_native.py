"""Checkpoints in TransformerLens' own format: pickles, read without running anything that they name.

TransformerLens' own loader unpickles them whole, which runs whatever a file names. Here ``torch.load`` reads tensors
and containers and refuses the rest (``weights_only=True``).
"""

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from fvlens.models._checkpoints import Checkpoint, explained
from fvlens.models._hooked import hooked_transformer
from fvlens.models._memory import free_memory

TOKENIZERS = ("NeelNanda/gpt-neox-tokenizer-digits", "EleutherAI/gpt-neox-20b", "gpt2")
"""Tokenizers that TransformerLens' own models name and that are loaded without asking."""

_CONVERSIONS = {"neel-solu-old": "convert_neel_solu_old_weights", "mingpt": "convert_mingpt_weights"}


def read_native(checkpoint: Checkpoint, *, dtype: torch.dtype, trust: bool) -> tuple[Any, Any]:
    """A HookedTransformer of such a checkpoint on the CPU, and its tokenizer or None.

    Args:
        checkpoint: the repository, at a commit.
        dtype: precision of the parameters.
        trust: load a tokenizer of any repository that the configuration names.

    Raises:
        ValueError: it cannot be fetched; its file holds more than tensors; it does not fit into the memory; or its
            tokenizer is another repository's and ``trust`` is off.
    """
    from huggingface_hub import constants
    from transformers import AutoTokenizer

    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    with explained(checkpoint):
        cfg = loading.get_pretrained_model_config(
            checkpoint.path,
            device="cpu",
            dtype=dtype,
            cache_dir=constants.HF_HUB_CACHE,
            revision=checkpoint.revision or "main",
        )
        file = _weights_file(checkpoint)
    _check_memory(checkpoint, file)
    state = {name: tensor.to(dtype) for name, tensor in tensors_of(file).items()}
    conversion = _CONVERSIONS.get(cfg.original_architecture)
    if conversion is not None:
        state = getattr(loading, conversion)(state, cfg)

    named = cfg.tokenizer_name
    tokenizer = None
    if named is not None:
        if named not in TOKENIZERS and not trust:
            raise ValueError(
                f"load_model: {checkpoint.path} names the tokenizer of another repository, {named!r}; expected one of "
                f"{', '.join(TOKENIZERS)}. Load it all the same with --trust (in Python, trust=True)."
            )
        with explained(Checkpoint(named, named, None, local=False)):
            tokenizer = AutoTokenizer.from_pretrained(named, padding_side="left", trust_remote_code=False)
    cfg.tokenizer_name = None
    return hooked_transformer(cfg, state).eval(), tokenizer


def tensors_of(file: Path) -> dict[str, Shaped[Tensor, "*axes"]]:
    """The tensors of a pickled checkpoint; nothing that the file names is run.

    Raises:
        ValueError: the file holds anything else, or is broken.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"load_model: {file.name} is a pickle that holds more than tensors, or is broken ({text}); fvlens runs "
            "nothing that comes with a checkpoint."
        ) from error
    named = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not named:
        raise ValueError(
            f"load_model: {file.name}: expected tensors by name, got {type(content).__name__}; it is no checkpoint of "
            "TransformerLens'."
        )
    return dict(content)


def _weights_file(checkpoint: Checkpoint) -> Path:
    """The final weights of the repository, fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from transformers.utils.hub import cached_file

    revision = checkpoint.revision or "main"
    folder = Path(str(cached_file(checkpoint.path, "config.json", revision=revision))).parent
    try:
        names = HfApi().list_repo_files(checkpoint.path, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):  # what was fetched before must do
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.pth"))]
    final = [name for name in names if name.endswith("final.pth")]
    if not final:
        raise OSError(f"{checkpoint.path} has no file that ends in final.pth")
    return Path(str(cached_file(checkpoint.path, final[0], revision=revision)))


def _check_memory(checkpoint: Checkpoint, file: Path) -> None:
    """The weights are held twice while the model is made."""
    needed, free = 2 * file.stat().st_size, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise ValueError(
            f"load_model: {checkpoint.name} needs about {needed:,} bytes while it loads on cpu, where {free:,} are "
            "free."
        )
