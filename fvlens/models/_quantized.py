"""Checkpoints in Hugging Face format whose weights are stored quantised: refused before anything is loaded."""

from typing import Any

_REMEDIES = {
    "bitsandbytes": "load it with transformers where bitsandbytes runs, call model.dequantize(), and save that",
    "gptq": "take the repository that it was made from, or unpack it with gptqmodel",
    "awq": "take the repository that it was made from, or unpack it with the tool that made it",
}


def refuse(name: str, config: Any) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantised.

    Raises:
        ValueError: it does; with what to do.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    kind = str(getattr(method, "value", method) or "unknown")
    if kind == "unknown" and isinstance(said, dict) and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        kind = "bitsandbytes"
    raise ValueError(
        f"load_model: the weights of {name} are stored as {kind}, and heads are read from weights that are floats; "
        f"{_REMEDIES.get(kind, 'take the model that it was made from')}, or take a GGUF file, which is unpacked while "
        "it loads."
    )
