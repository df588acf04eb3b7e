"""Load a model, and say exactly which model it is.

Models are ``HookedTransformer``s loaded WITHOUT weight processing (no layer-norm folding, no centring), so that a
vector of the residual stream means the same here as in any other tool.
"""

import contextlib
import difflib
import hashlib
import json
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

EMBEDDED_MODELS = {"rel-small": "the embedded model: a small GPT-2 trained on the word-pair library"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model something was made on.

    Attributes:
        name: the model's name in its configuration (informative, not compared).
        revision: hub revision, or ``"local"`` (informative, not compared).
        weights: first 16 hex digits of the SHA-256 of all parameters, in their stored precision.
        n_layers, n_heads, d_model, d_head, d_vocab: the model's shape.
        dtype: precision of the parameters.
        normalization: TransformerLens' normalisation type; ``LNPre``/``RMSPre`` mean that norms were folded.
        bos: ``"one"`` if prompts start with one BOS token, ``"none"`` if the tokenizer has none.
    """

    name: str
    revision: str
    weights: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    dtype: str
    normalization: str
    bos: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """What tells the two models apart, as ``key: mine / theirs`` lines; empty if they are the same model."""
        mine, theirs = asdict(self), asdict(other)
        compared = [key for key in mine if key not in ("name", "revision")]
        return [f"{key}: {mine[key]} / {theirs[key]}" for key in compared if mine[key] != theirs[key]]

    def to_json(self) -> str:
        """The fingerprint as a JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not a JSON object with exactly the fingerprint's fields.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            fields = None
        expected = set(cls.__slots__)
        if not isinstance(fields, dict) or set(fields) != expected:
            raise ValueError(f"fingerprint: expected the fields {', '.join(sorted(expected))}, got {text[:80]!r}.")
        return cls(**fields)


def embedded_folder(name: str = "rel-small") -> Path:
    """Folder of a model that ships with the package."""
    return Path(str(resources.files("fvlens.zoo") / name))


@contextlib.contextmanager
def quiet_deprecation() -> Iterator[None]:
    """Silence TransformerLens' notice that HookedTransformer will go in 4.0, at our own calls only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        yield


def load_model(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> "HookedTransformer":
    """Load a language model as a ``HookedTransformer``, without weight processing.

    Args:
        name: ``"rel-small"`` (the embedded model, needs no network), a local folder in Hugging Face format, or a model
            name that TransformerLens knows, such as ``"gpt2"`` (fetched from the hub on first use).
        device: where the model goes; by default CUDA if there is one, else the CPU.
        dtype: precision of the parameters.

    Returns:
        The model in evaluation mode, its tokenizer padding on the left.

    Raises:
        ValueError: no such model or folder (with the nearest names), a model that cannot be fetched, or a folder that
            is not a model TransformerLens can convert.

    Example:
        >>> import fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> model.cfg.n_layers >= 2
        True
    """
    device = torch.device(device) if device is not None else default_device()
    text = str(name)
    if text in EMBEDDED_MODELS:
        model = _load_folder(embedded_folder(text), device, dtype, text)
    elif Path(name).is_dir():
        model = _load_folder(Path(name), device, dtype, Path(name).resolve().name)
    else:
        model = _load_official(text, device, dtype)
    model.eval()
    if model.tokenizer is not None:
        model.tokenizer.padding_side = "left"
    return model


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype, name: str) -> "HookedTransformer":
    """A Hugging Face folder through TransformerLens' own conversion functions."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"load_model: folder {folder} holds no config.json; expected a model in Hugging Face format.")
    architecture = "unknown"
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = (hf_config.architectures or ["unknown"])[0]
        if architecture == "GPT2LMHeadModel":
            cfg = HookedTransformerConfig.from_dict(_gpt2_config(hf_config, device, dtype))
        else:
            with _plain_path(folder) as path:
                cfg = get_pretrained_model_config(str(path), device=str(device), dtype=dtype)
        with _no_loading_bar():
            hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        state = get_pretrained_state_dict(str(folder), cfg, hf_model=hf_model, dtype=dtype)
    except (NotImplementedError, KeyError, AttributeError, OSError, ValueError) as error:
        raise ValueError(
            f"load_model: TransformerLens cannot convert the model in {folder}, architecture {architecture} "
            f"({type(error).__name__}: {error})."
        ) from error
    cfg.model_name = name
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if _has_tokenizer(folder) else None
    cfg.tokenizer_name = None
    with quiet_deprecation():
        model = HookedTransformer(cfg, tokenizer=tokenizer, default_padding_side="left", move_to_device=False)
        model.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )
    return model.to(device, print_details=False)


@contextlib.contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hide Hugging Face's bar over weight files; a local folder loads at once."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """The folder under a path without meaning: TransformerLens takes words such as "llama" in a path for the model."""
    with tempfile.TemporaryDirectory(prefix="fvlens") as temporary:
        link = Path(temporary) / "model"
        try:
            link.symlink_to(folder.resolve(), target_is_directory=True)
        except OSError:  # no links on this system
            link = folder
        yield link


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _gpt2_config(hf_config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """TransformerLens' GPT-2 settings, from fields that today's GPT2Config writes (TransformerLens reads ``n_ctx``)."""
    return {
        "d_model": hf_config.n_embd,
        "d_head": hf_config.n_embd // hf_config.n_head,
        "n_heads": hf_config.n_head,
        "d_mlp": hf_config.n_inner or 4 * hf_config.n_embd,
        "n_layers": hf_config.n_layer,
        "n_ctx": hf_config.n_positions,
        "eps": hf_config.layer_norm_epsilon,
        "d_vocab": hf_config.vocab_size,
        "act_fn": hf_config.activation_function,
        "use_attn_scale": hf_config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf_config.scale_attn_by_inverse_layer_idx,
        "use_local_attn": False,
        "normalization_type": "LN",
        "original_architecture": "GPT2LMHeadModel",
        "tie_word_embeddings": hf_config.tie_word_embeddings,
        "init_weights": False,
        "device": str(device),
        "dtype": dtype,
    }


def _load_official(name: str, device: torch.device, dtype: torch.dtype) -> "HookedTransformer":
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_official_model_name
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    try:
        get_official_model_name(name)
    except ValueError as error:
        aliases = [alias for names in MODEL_ALIASES.values() for alias in names]
        known = dict.fromkeys([*EMBEDDED_MODELS, *OFFICIAL_MODEL_NAMES, *aliases])
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see `fvlens models`."
        raise ValueError(
            f"load_model: {name!r} is neither a folder nor a model TransformerLens knows; {hint}"
        ) from error
    try:
        with quiet_deprecation():
            return HookedTransformer.from_pretrained_no_processing(
                name, device=str(device), dtype=dtype, default_padding_side="left"
            )
    except OSError as error:  # Hugging Face's error for no network, no such revision, or a gated model
        raise ValueError(
            f"load_model: {name!r} could not be fetched ({' '.join(str(error).split())[:200]}); with no network, save "
            "the model to a folder where there is one and give that folder."
        ) from error


def bos_token_id(model: Any) -> int | None:
    """Id of the one BOS token that prompts start with; None if the model's tokenizer has none."""
    return None if model.tokenizer is None else model.tokenizer.bos_token_id


_fingerprints: "weakref.WeakKeyDictionary[Any, tuple[tuple[tuple[int, int], ...], Fingerprint]]" = (
    weakref.WeakKeyDictionary()
)


def fingerprint(model: Any) -> Fingerprint:
    """The model's :class:`Fingerprint`. Hashes all weights once; again only after they were changed or moved.

    Example:
        >>> import fvlens
        >>> from fvlens.models import fingerprint
        >>> fingerprint(fvlens.load_model("rel-small")).bos
        'one'
    """
    state = tuple((p.data_ptr(), p._version) for p in model.parameters())
    known = _fingerprints.get(model)
    if known is not None and known[0] == state:
        return known[1]
    cfg = model.cfg
    result = Fingerprint(
        name=str(cfg.model_name),
        revision=str(getattr(cfg, "checkpoint_value", None) or "local"),
        weights=_weights_hash(model),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_vocab=cfg.d_vocab,
        dtype=str(cfg.dtype).removeprefix("torch."),
        normalization=str(cfg.normalization_type),
        bos="none" if bos_token_id(model) is None else "one",
    )
    _fingerprints[model] = (state, result)
    return result


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()[:16]


def model_device(model: Any) -> torch.device:
    """Device of the model's parameters (of the first, if it is split)."""
    return next(model.parameters()).device
