"""Load a model with Hugging Face, hand it to a class of TransformerLens, and check that its numbers are the same."""

import contextlib
import importlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.models import _adapters, _gguf, _hf_configs, _quantized
from fvlens.models._checkpoints import (
    NATIVE_FORMAT,
    Checkpoint,
    decoder_class,
    find_checkpoint,
    pinned,
    read_config,
    read_model,
    read_tokenizer,
)
from fvlens.models._fingerprint import ORIGIN, LoadReport, Origin, describe, weights_hash, weights_marks
from fvlens.models._heads import head_writes
from fvlens.models._hooked import hooked_transformer, lens
from fvlens.models._looks import of_weights
from fvlens.models._memory import check_memory, free_memory
from fvlens.models._native import read_native
from fvlens.models._tokenizer import beyond_embedding, give_tokenizer
from fvlens.types import HookedModel

Backend = Literal["hooked", "bridge"]


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    backend: Backend | None = None,
    n_devices: int = 1,
    base: str | Path | None = None,
    trust: bool = False,
) -> HookedModel:
    """Load a language model without weight processing.

    The configuration decides how a checkpoint is read, never its name. Both classes redo part of the computation, so
    the loaded model's logits on a few tokens must agree with plain Hugging Face's. No code that comes with a checkpoint
    is run. HookedTransformer's settings come from ``fvlens.models._hf_configs`` for the architectures listed there, for
    others from TransformerLens. A few models that TransformerLens hosts as pickles are read without running anything
    that they name. Weights of GGUF files are unpacked into floats, a PEFT adapter is merged into its base.
    :func:`fvlens.models.load_report` says what was found.

    Args:
        name_or_path: ``"rel-small"`` (the embedded model) or ``"smollm2-135m"`` (in an installed package), which need
            no network; a local folder in Hugging Face format, a GGUF file or a folder with one, or the folder of a PEFT
            adapter; a model name that TransformerLens knows, such as ``"gpt2"``, or ``"owner/name"`` on the hub (both
            fetched on first use).
        device: where the model goes; by default CUDA if there is one, else the CPU.
        dtype: precision of the parameters.
        revision: branch, tag or commit of a hub model; by default its main branch.
        backend: the class: ``"hooked"`` for ``HookedTransformer``, ``"bridge"`` for ``TransformerBridge``; by default
            HookedTransformer where the installed TransformerLens has it.
        n_devices: split the blocks over this many CUDA devices.
        base: the base of a PEFT adapter, whatever the adapter's file names.
        trust: load what the checkpoint's own files name: an adapter's base, the tokenizer of another repository.

    Returns:
        The model in evaluation mode. Its tokenizer is the checkpoint's own and pads on the left (with EOS where it has
        no padding token); None for a folder without one.

    Raises:
        ValueError: no such model or folder (with the nearest names); a model that cannot be fetched, is gated, or has
            no such revision; a revision of a local folder; a model that is not decoder-only, needs code that comes with
            it, lacks weights, or would not fit in memory; one that the backend cannot hold or would compute wrongly;
            an unknown backend, or one that the installed TransformerLens does not have; more devices than there are;
            a package that is missing (with the command that installs it), or that holds another file than it should; a
            GGUF file of an architecture that transformers does not read (with those that it reads); weights in a
            quantised format that no class holds exactly; files that name others outside their folder, or a base that
            ``trust`` does not allow; a tokenizer whose words the embedding does not have.

    Example:
        >>> import fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> model.cfg.n_layers >= 2
        True
    """
    check_arguments(load_model, locals())
    backend = _choose_backend(backend)
    devices = _choose_devices(device, n_devices)
    checkpoint = find_checkpoint(name_or_path, revision, base=base, trust=trust)
    if not checkpoint.local and checkpoint.path.startswith(NATIVE_FORMAT):
        return _load_native(checkpoint, str(name_or_path), backend, devices, dtype, trust)
    reading = contextlib.nullcontext() if checkpoint.gguf is None else _gguf.read_once()
    with reading:
        return _load(pinned(checkpoint), str(name_or_path), backend, devices, dtype)


def _load(
    checkpoint: Checkpoint, source: str, backend: Backend, devices: list[torch.device], dtype: torch.dtype
) -> HookedModel:
    """A checkpoint that Hugging Face reads."""
    config = read_config(checkpoint)
    architecture = decoder_class(checkpoint, config)
    _quantized.refuse(checkpoint.shown, config)
    if backend == "hooked":
        _refuse_differences(checkpoint, config, architecture)
    split = _split(devices) if backend == "bridge" else {}
    copies = 2 if backend == "hooked" else int(not split)  # HookedTransformer is made beside the Hugging Face model
    stored = _quantized.stored_as(config)
    copies += int(checkpoint.gguf is not None or bool(stored))  # blocks are unpacked beside it
    check_memory(checkpoint, config, dtype=dtype, devices=devices, copies=copies)
    tokenizer = read_tokenizer(checkpoint)
    notes = _notes(checkpoint, tokenizer, config.get_text_config().vocab_size)
    spread = {"device_map": {"": "cpu"}} if stored and not split else split  # else it goes to a GPU by itself
    hf_model = read_model(checkpoint, config, dtype=dtype, split=spread)
    if stored:
        hf_model = _quantized.unpacked(hf_model, dtype)
    if checkpoint.adapter is not None:
        hf_model = _adapters.merged(hf_model, checkpoint.adapter)
    weights, forms = weights_marks(hf_model.named_parameters(), config.get_text_config().vocab_size)
    if backend == "bridge" and not split:
        hf_model.to(devices[0])
    tokens = torch.arange(1, 9)[None] % config.get_text_config().vocab_size
    expected = _logits(hf_model, tokens), _logits(hf_model, tokens[:, _N_PADDING:])
    make = _hooked if backend == "hooked" else _bridge
    model = make(checkpoint, hf_model, architecture, dtype)
    model.eval()
    _compare(checkpoint, model, tokens, expected, dtype)
    if backend == "hooked":
        model = _place(model, devices)
    model.cfg.model_name = checkpoint.name
    give_tokenizer(model, tokenizer)
    own = weights_hash(model.named_parameters())
    stored = stored or ("" if checkpoint.gguf is None else checkpoint.gguf.quantization)
    report = _reported(checkpoint, model, tokens, dtype, notes, stored)
    commit = "local" if checkpoint.local else checkpoint.revision or "main"
    vars(model)[ORIGIN] = Origin(weights, own, commit, source, backend, report, forms)
    of_weights(model, "fingerprint", lambda: describe(model, own))  # not hashed again
    return model


def _notes(checkpoint: Checkpoint, tokenizer: Any, d_vocab: int) -> list[str]:
    """What is not as the checkpoint asks for, before its weights are read."""
    notes = [] if tokenizer is None else beyond_embedding(tokenizer, d_vocab, checkpoint.shown)
    if checkpoint.gguf is not None:
        notes += _gguf.passed_over(checkpoint.gguf)
        notes += [] if tokenizer is None else _gguf.tokenizer_differences(tokenizer, checkpoint.gguf)
    return notes


def _reported(
    checkpoint: Checkpoint,
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    dtype: torch.dtype,
    notes: list[str],
    stored: str = "",
) -> LoadReport:
    """What was found while the model was loaded; what is not as it should be is a warning, too."""
    apart = head_writes(model, tokens)
    if apart is not None and not apart <= _most_apart(dtype):
        notes = [
            *notes,
            f"what the heads write adds up to something else than what attention adds (by {apart:.2g} of the largest "
            "value): effects of single heads mean little on this model",
        ]
    for note in notes:
        warnings.warn(f"{checkpoint.shown}: {note}.", UserWarning, stacklevel=3)
    return LoadReport(stored, apart, tuple(notes))


def _most_apart(dtype: torch.dtype) -> float:
    """How far numbers in a precision may be from the same numbers computed otherwise, as a share of the largest."""
    return 1e-3 if dtype.itemsize >= 4 else 0.1


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _has_hooked_transformer() -> bool:
    try:
        lens("HookedTransformer")
    except ImportError:  # from TransformerLens 4 on
        return False
    return True


def _choose_backend(backend: str | None) -> Backend:
    if backend not in (None, "hooked", "bridge"):
        raise ValueError(f"load_model: backend must be 'hooked', 'bridge' or None, got {backend!r}.")
    if backend == "bridge" or (backend is None and not _has_hooked_transformer()):
        return "bridge"
    if not _has_hooked_transformer():
        raise ValueError(
            "load_model: backend='hooked' needs HookedTransformer, which TransformerLens has no longer from 4.0 on; "
            "use backend='bridge', or install 'transformer-lens<4'."
        )
    return "hooked"


def _choose_devices(device: str | torch.device | None, n_devices: int) -> list[torch.device]:
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError as error:  # torch lists all kinds that it has a name for
        raise ValueError(
            f"load_model: device={device!r}: expected the name of a device, such as 'cpu' or 'cuda'."
        ) from error
    if n_devices == 1:
        return [torch.device(device) if device is not None else default_device()]
    if n_devices < 1:
        raise ValueError(f"load_model: n_devices must be 1 or more, got {n_devices}.")
    if device is not None and torch.device(device) != torch.device("cuda"):
        raise ValueError(
            f"load_model: n_devices={n_devices} splits over CUDA devices from the first on, got "
            f"device={str(device)!r}; leave device out."
        )
    available = torch.cuda.device_count()
    if n_devices > available:
        raise ValueError(
            f"load_model: n_devices={n_devices}, but there are {available} CUDA devices; take at most those."
        )
    return [torch.device("cuda", index) for index in range(n_devices)]


def _split(devices: list[torch.device]) -> dict[str, Any]:
    """How Hugging Face spreads a model over several devices; nothing for one."""
    if len(devices) == 1:
        return {}
    return {"device_map": "balanced", "max_memory": {device.index: free_memory(device) for device in devices}}


def _refuse_differences(checkpoint: Checkpoint, config: Any, architecture: str) -> None:
    """HookedTransformer must be able to give this checkpoint's numbers."""
    if architecture in _hf_configs.ARCHITECTURES:
        reason = _hf_configs.obstacle(config)
    elif checkpoint.path.startswith(
        importlib.import_module("transformer_lens.loading_from_pretrained").NEED_REMOTE_CODE_MODELS
    ):
        reason = f"TransformerLens would run code of the repository for architecture {architecture}"
    else:
        return
    if reason is not None:
        raise ValueError(
            f"load_model: HookedTransformer would not give the numbers of {checkpoint.shown}: {reason}; use "
            "backend='bridge'."
        )


def _hooked(checkpoint: Checkpoint, hf_model: Any, architecture: str, dtype: torch.dtype) -> Any:
    """A HookedTransformer with this model's weights, on the CPU."""
    try:
        if architecture in _hf_configs.ARCHITECTURES:
            settings = _hf_configs.hooked_settings(hf_model.config, architecture, dtype)
            cfg = lens("HookedTransformerConfig").from_dict(settings)
        else:
            cfg = _transformer_lens_config(checkpoint, dtype)
        state = _hf_configs.hooked_state(hf_model, cfg)
    except (NotImplementedError, KeyError, AttributeError, AssertionError, OSError, ValueError) as error:
        raise ValueError(
            f"load_model: TransformerLens cannot convert the model in {checkpoint.shown}, architecture {architecture} "
            f"({_said(error)}); use backend='bridge'."
        ) from error
    cfg.tokenizer_name = None
    return hooked_transformer(cfg, state)


def _transformer_lens_config(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """TransformerLens' own settings for an architecture that is not in our table."""
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    if not checkpoint.local:
        return loading.get_pretrained_model_config(
            checkpoint.path, device="cpu", dtype=dtype, revision=checkpoint.revision or "main"
        )
    with _plain_path(Path(checkpoint.path)) as path:
        return loading.get_pretrained_model_config(str(path), device="cpu", dtype=dtype)


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


def _bridge(checkpoint: Checkpoint, hf_model: Any, architecture: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge around this model, where it is."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    cuda = sorted({place.device.index for place in hf_model.parameters() if place.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):  # it makes linear maps, which start random
            model = build_bridge_from_module(
                hf_model, architecture, hf_config=hf_model.config, dtype=dtype, model_name=checkpoint.name
            )
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"load_model: TransformerBridge cannot hold the model in {checkpoint.shown}, architecture {architecture} "
            f"({_said(error)})."
        ) from error
    model.cfg.n_devices = max(1, len(cuda))
    return model


def _place(model: Any, devices: list[torch.device]) -> Any:
    """A HookedTransformer on one device, or its blocks split over several."""
    if len(devices) == 1:
        return model.to(devices[0], print_details=False)
    model.cfg.device, model.cfg.n_devices = "cuda", len(devices)
    model.move_model_modules_to_device()
    return model


def _logits(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's logits, float32 on the CPU."""
    device = model_device(model)
    with torch.inference_mode():
        found = model(tokens.to(device), attention_mask=None if mask is None else mask.to(device))
    return getattr(found, "logits", found).float().cpu()


_N_PADDING = 3
"""Padding before the second row of the tokens on which a loaded model is tried out."""


def _compare(
    checkpoint: Checkpoint,
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    expected: tuple[Float[Tensor, "1 pos d_vocab"], Float[Tensor, "1 short d_vocab"]],
    dtype: torch.dtype,
) -> None:
    """Refuse a model whose logits on a few tokens are not Hugging Face's; both classes redo part of the computation.

    The tokens are run whole, and beside that behind padding, where the first few are left out.
    """
    kind, name = type(model).__name__, str(dtype).removeprefix("torch.")
    rows = tokens.repeat(2, 1)
    mask = torch.ones_like(rows)
    mask[1, :_N_PADDING] = 0
    try:
        found = _logits(model, rows, mask)
    except torch.OutOfMemoryError:
        raise
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"load_model: {kind} cannot run the model in {checkpoint.shown} in {name} ({_said(error)}); use another "
            "dtype, or the other backend, if it is there."
        ) from error
    limit = _most_apart(dtype)
    pairs = ((found[:1], expected[0], ""), (found[1:, _N_PADDING:], expected[1], " behind padding"))
    for ours, theirs, where in pairs:
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if not difference <= limit:  # also where it is not a number
            raise ValueError(
                f"load_model: {kind} would not give the numbers of {checkpoint.shown} in {name}: its logits{where} "
                f"differ from Hugging Face's by {difference:.2g} of the largest; use another dtype, or the other "
                "backend, if it is there."
            )


def _said(error: BaseException) -> str:
    """What an error of TransformerLens' says; its assertions often say nothing."""
    return f"{type(error).__name__}: {str(error)[:200] or 'it does not say why'}"


def _load_native(
    checkpoint: Checkpoint,
    source: str,
    backend: Backend,
    devices: list[torch.device],
    dtype: torch.dtype,
    trust: bool,
) -> HookedModel:
    """A checkpoint in TransformerLens' own format."""
    if backend == "bridge":
        raise ValueError(
            f"load_model: {checkpoint.path} is in TransformerLens' own format, which TransformerBridge does not read; "
            "use backend='hooked' (TransformerLens 3)."
        )
    checkpoint = pinned(checkpoint)
    model, tokenizer = read_native(checkpoint, dtype=dtype, trust=trust)
    notes = [] if tokenizer is None else beyond_embedding(tokenizer, model.cfg.d_vocab, checkpoint.path)
    model = _place(model, devices)
    give_tokenizer(model, tokenizer)
    report = _reported(checkpoint, model, torch.arange(1, 9)[None] % model.cfg.d_vocab, dtype, notes)
    own, forms = weights_marks(model.named_parameters(), model.cfg.d_vocab)
    vars(model)[ORIGIN] = Origin(own, own, checkpoint.revision or "main", source, backend, report, forms)
    return model


def model_device(model: Any) -> torch.device:
    """Device of the model's parameters (of the first, if it is split)."""
    return next(model.parameters()).device
