"""PEFT adapters: a folder of small changes to another model, its base, into whose weights they are merged."""

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvlens.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, alone or beside its base."""
    return (folder / ADAPTER_CONFIG).is_file()


def require_peft(folder: Path) -> None:
    """Merging needs peft.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"load_model: {folder} is a PEFT adapter, which needs the package peft; expected "
            "`pip install 'fvlens[peft]'`, or a folder into which the adapter was merged (`merge_and_unload`)."
        )


def named_base(folder: Path) -> str | None:
    """The base that an adapter's own file names, if it names one.

    Raises:
        ValueError: the adapter has no weights, or its configuration is none.
    """
    content = read_json(folder / ADAPTER_CONFIG, "configuration of a PEFT adapter")
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise ValueError(f"load_model: {folder / ADAPTER_CONFIG} is no configuration of a PEFT adapter (no peft_type).")
    if not any((folder / file).is_file() for file in _WEIGHTS):
        raise ValueError(f"load_model: adapter {folder} has no weights; expected {' or '.join(_WEIGHTS)}.")
    base = content.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def holds_base(folder: Path) -> bool:
    """Whether an adapter's folder holds the base, too: a configuration, and weights of a whole model."""
    whole = any(path.is_file() for kind in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(kind))
    return (folder / "config.json").is_file() and whole


@contextlib.contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """The folder's files but for the adapter's, which transformers would load by itself, unmerged."""
    with tempfile.TemporaryDirectory(prefix="fvlens") as temporary:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (ADAPTER_CONFIG, *_WEIGHTS):
                try:
                    (Path(temporary) / path.name).symlink_to(path.resolve())
                except OSError as error:  # no links on this system
                    raise ValueError(
                        f"load_model: {folder} holds a base and an adapter, which this system cannot tell apart "
                        f"({error}); put the adapter's files into a folder of their own and say --base "
                        "(in Python, base=)."
                    ) from error
        yield Path(temporary)


def merged(hf_model: Any, folder: Path) -> Any:
    """The base with the adapter in its weights.

    Raises:
        ValueError: an adapter that is not part of the weights (a prompt, a prefix), one for another base, one whose
            weights are missing or left over, or one that is broken.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(f"{kind} adds tokens or keys and cannot be merged into weights")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # what it warns of is checked below
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft's own calls of transformers
            adapted = PeftModel.from_pretrained(hf_model, str(folder), config=config, torch_device="cpu")
            held = set(load_peft_weights(str(folder), device="cpu"))  # by safetensors, or weights_only=True
            wanted = set(get_peft_model_state_dict(adapted))
            if held != wanted:
                raise ValueError(
                    f"{len(wanted - held)} weights are missing and {len(held - wanted)} have no place in "
                    f"{type(hf_model).__name__}, such as {sorted(held ^ wanted)[0]}"
                )
            model = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"load_model: the adapter in {folder} cannot be merged into this base ({type(error).__name__}: {text}); "
            "expected the base that it was trained on."
        ) from error
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True).eval()
