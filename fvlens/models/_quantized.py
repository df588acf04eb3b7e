"""Checkpoints in Hugging Face format whose weights are stored quantised: unpacked into floats, or refused.

Heads are read from weights that are floats, so both classes need them. transformers unpacks what bitsandbytes stored,
on a CPU too; what GPTQ and AWQ stored it does not, and such a checkpoint is refused before anything is loaded.
"""

from importlib.util import find_spec
from typing import Any

import torch

_REMEDIES = {
    "bitsandbytes": "it is unpacked where the packages bitsandbytes and accelerate are installed (`pip install "
    "'fvlens[bitsandbytes]'`)",
    "gptq": "take the repository that it was made from, or unpack it with gptqmodel",
    "awq": "take the repository that it was made from, or unpack it with the tool that made it",
}


def stored_as(config: Any) -> str:
    """How the weights are stored, such as ``"bitsandbytes nf4"``; empty if as floats."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return ""

    def value(name: str) -> Any:
        return said.get(name) if isinstance(said, dict) else getattr(said, name, None)

    method = value("quant_method")
    kind = str(getattr(method, "value", method) or "unknown")
    four, eight = value("load_in_4bit"), value("load_in_8bit")
    if kind == "unknown" and (four or eight):
        kind = "bitsandbytes"
    if kind != "bitsandbytes":
        return kind
    return f"{kind} {value('bnb_4bit_quant_type') or 'fp4'}" if four else f"{kind} int8"


def refuse(name: str, config: Any) -> None:
    """Refuse a checkpoint whose weights are stored in a way that is not unpacked here.

    Raises:
        ValueError: it is stored so; with what to do.
    """
    stored = stored_as(config)
    kind = stored.partition(" ")[0]
    there = all(find_spec(package) is not None for package in ("bitsandbytes", "accelerate"))
    if not stored or (kind == "bitsandbytes" and there):
        return
    raise ValueError(
        f"load_model: the weights of {name} are stored as {stored}, and heads are read from weights that are floats; "
        f"{_REMEDIES.get(kind, 'take the model that it was made from')}, or take a GGUF file, which is unpacked while "
        "it loads."
    )


def unpacked(hf_model: Any, dtype: torch.dtype) -> Any:
    """A quantised model with its weights as floats, which says nothing of quantisation when it is saved."""
    model = hf_model.dequantize(dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model.to(dtype).requires_grad_(True).eval()
