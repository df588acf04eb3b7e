"""Which model something was made on: shape, precision, and a hash of all weights."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.files import parse_json
from fvlens.models._looks import of_weights, spread
from fvlens.types import as_text, as_whole

INFORMATIVE = ("name", "revision", "source", "backend", "quantization", "forms")
"""Fields that say where a model came from, not which one it is."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model something was made on.

    Attributes:
        name: the model's name in its configuration (informative, not compared).
        revision: hub revision, a commit where it is known, or ``"local"`` (informative, not compared).
        weights: first 16 hex digits of a SHA-256 over all parameters; see :func:`fingerprint`.
        n_layers, n_heads, d_model, d_head, d_vocab: the model's shape.
        dtype: precision of the parameters.
        normalization: TransformerLens' normalisation type; ``LNPre``/``RMSPre`` mean that norms were folded.
        source: what :func:`load_model` was given, a name or a folder as it was written; empty for a model that it did
            not load, and in files of fvlens 0.1 (informative, not compared).
        backend: the class that held the model, ``"hooked"`` or ``"bridge"``; empty as ``source`` (informative, not
            compared).
        quantization: how the weights were stored before they were unpacked into floats, such as ``"GGUF Q4_1 210, F32
            61"``; empty for weights stored as floats, and in files of earlier versions (informative: the hash of the
            weights is that of the floats).
        forms: hashes by which the same weights are known in another precision, saved again or with a resized
            vocabulary, see :func:`weights_marks`; empty in files of earlier versions (not compared here).
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
    source: str = dataclasses.field(default="", compare=False)
    backend: str = dataclasses.field(default="", compare=False)
    quantization: str = dataclasses.field(default="", compare=False)
    forms: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("name", "revision", "weights", "dtype", "normalization", *INFORMATIVE[2:]):
            as_text(getattr(self, name), f"fingerprint: {name}")
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab"):
            as_whole(getattr(self, name), f"fingerprint: {name}", 1, 2**31 - 1)
        if not re.fullmatch("[0-9a-f]{16}", self.weights):
            raise ValueError(f"fingerprint: weights: expected 16 hex digits, got {self.weights!r}.")
        if not re.fullmatch("([0-9a-f]{16}( [0-9a-f]{16}){2})?", self.forms):
            raise ValueError(f"fingerprint: forms: expected three hashes of 16 hex digits, got {self.forms[:80]!r}.")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"fingerprint: dtype: expected the name of a precision of torch, got {self.dtype!r}.")

    def differences(self, other: "Fingerprint") -> list[str]:
        """What tells the two models apart, as ``key: mine / theirs`` lines; empty if they are the same model."""
        mine, theirs = asdict(self), asdict(other)
        compared = [key for key in mine if key not in INFORMATIVE]
        return [f"{key}: {mine[key]} / {theirs[key]}" for key in compared if mine[key] != theirs[key]]

    def to_json(self) -> str:
        """The fingerprint as a JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not a JSON object with exactly the fingerprint's fields (``source``, ``backend`` and
                ``quantization`` may be missing), or a field is not what it should be.
        """
        try:
            return cls.from_fields(parse_json(text))
        except json.JSONDecodeError:
            return cls.from_fields(text)

    @classmethod
    def from_fields(cls, fields: Any) -> "Fingerprint":
        """The fingerprint of these fields, as a file holds them.

        Earlier files have one more, ``bos``, which is of prompts and not of a model: see
        :func:`fvlens.prompts.template_from`.

        Raises:
            ValueError: as for :meth:`from_json`.
        """
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        needed = {name for name, is_needed in known.items() if is_needed}
        if isinstance(fields, dict) and "bos" in fields:
            if fields["bos"] not in ("one", "none"):
                raise ValueError(f"fingerprint: bos={fields['bos']!r}; expected one or none.")
            fields = {name: value for name, value in fields.items() if name != "bos"}
        if not isinstance(fields, dict) or not needed <= set(fields) <= set(known):
            got = json.dumps(fields, default=repr)
            raise ValueError(f"fingerprint: expected the fields {', '.join(sorted(known))}, got {got[:80]!r}.")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What :func:`load_model` found out about a model.

    Attributes:
        quantization: as in :class:`Fingerprint`.
        head_writes: how far the sum of all heads' writes plus the bias is from what attention adds, the largest
            difference over the largest value, on a few tokens; None where a norm follows attention.
        notes: what is not as the checkpoint asks for, in words; each was also a warning.
    """

    quantization: str
    head_writes: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """What :func:`load_model` notes on a model.

    Attributes:
        weights: hash of the Hugging Face model's parameters, the same whatever class holds them.
        parameters: hash of the loaded model's own parameters, to tell later whether they are still those.
        revision: commit or revision on the hub, or ``"local"``.
        source: what :func:`load_model` was given.
        backend: the class that holds the model.
        report: what was found while it was loaded.
        forms: of the Hugging Face model's parameters.
    """

    weights: str
    parameters: str
    revision: str
    source: str
    backend: str
    report: "LoadReport"
    forms: str = ""


ORIGIN = "_fvlens_origin"


def load_report(model: Any) -> LoadReport | None:
    """What was found out while a model was loaded; None for one that :func:`load_model` did not load.

    Example:
        >>> import fvlens
        >>> from fvlens.models import load_report
        >>> report = load_report(fvlens.load_model("rel-small", device="cpu"))
        >>> report.head_writes < 1e-5, report.notes
        (True, ())
    """
    origin: Origin | None = vars(model).get(ORIGIN)
    return None if origin is None else origin.report


def fingerprint(model: Any) -> Fingerprint:
    """The model's :class:`Fingerprint`. Hashes all weights once; again only after they were changed or moved.

    A model from :func:`load_model` whose parameters are as loaded has the hash of its Hugging Face parameters, by name
    and in the precision they were loaded in: the same for both backends, so that a vector made with one loads on the
    other. Any other model (changed weights, or one of your own making) has the hash of its own parameters, which
    depends on the class that holds them.

    Example:
        >>> import fvlens
        >>> from fvlens.models import fingerprint
        >>> fingerprint(fvlens.load_model("rel-small")).normalization
        'LN'
    """
    check_arguments(fingerprint, locals())
    made: Fingerprint = of_weights(
        model, "fingerprint", lambda: describe(model, *weights_marks(model.named_parameters(), model.cfg.d_vocab))
    )
    return made


def describe(model: Any, own: str, forms: str = "") -> Fingerprint:
    """The fingerprint of a model whose own parameters hash to ``own``, and in other forms to ``forms``."""
    cfg = model.cfg
    origin: Origin | None = vars(model).get(ORIGIN)
    normalization = str(cfg.normalization_type)
    if getattr(model, "_weights_processed", False) and not normalization.endswith("Pre"):
        normalization += "Pre"  # TransformerBridge keeps the name
    return Fingerprint(
        name=str(cfg.model_name),
        revision=origin.revision if origin is not None else str(getattr(cfg, "checkpoint_value", None) or "local"),
        weights=origin.weights if origin is not None and own == origin.parameters else own,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_vocab=cfg.d_vocab,
        dtype=str(cfg.dtype).removeprefix("torch."),
        normalization=normalization,
        source="" if origin is None else origin.source,
        backend="" if origin is None else origin.backend,
        quantization="" if origin is None else origin.report.quantization,
        forms=origin.forms if origin is not None and own == origin.parameters else forms,
    )


_FIRST = 64
"""Rows of the vocabulary that are looked at, since it may be resized."""


def weights_marks(parameters: Iterable[tuple[str, Shaped[Tensor, "*axes"]]], d_vocab: int) -> tuple[str, str]:
    """:func:`weights_hash` of named tensors, and three hashes by which the same weights are known in another form.

    The first of the three is of all tensors, whatever their names and however often one of them stands there: it stays
    when weights are saved again under other names, or with tied ones apart. The other two are of 64 entries of each
    tensor, evenly spread, rounded to bfloat16 and to float16: they stay in another precision and, as only the first
    rows of the vocabulary's matrices are looked at, with a resized vocabulary.
    """
    named = sorted(parameters, key=lambda item: item[0])
    digests = _hashes([tensor for _, tensor in named])
    rounded = {dtype: hashlib.sha256() for dtype in (torch.bfloat16, torch.float16)}
    for _, tensor in named:
        for axis, size in enumerate(tensor.shape):
            if size == d_vocab:
                tensor = tensor.narrow(axis, 0, min(size, _FIRST))
        entries = spread(tensor.detach()).cpu()
        for dtype, digest in rounded.items():
            digest.update(entries.to(dtype).contiguous().view(torch.uint8).numpy().data)
    whole = hashlib.sha256("\n".join(sorted(set(digests))).encode())
    forms = " ".join(digest.hexdigest()[:16] for digest in (whole, *rounded.values()))
    return _joined(named, digests), forms


def weights_hash(parameters: Iterable[tuple[str, Shaped[Tensor, "*axes"]]]) -> str:
    """Hash of named tensors, whatever their order; the tensors are hashed side by side."""
    named = sorted(parameters, key=lambda item: item[0])
    return _joined(named, _hashes([tensor for _, tensor in named]))


def _joined(named: Sequence[tuple[str, Shaped[Tensor, "..."]]], digests: Sequence[str]) -> str:
    lines = [f"{name} {tuple(tensor.shape)} {found}" for (name, tensor), found in zip(named, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _hashes(tensors: Sequence[Shaped[Tensor, "..."]]) -> list[str]:
    """Hash of each tensor; they are hashed side by side."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_tensor_hash, tensors))


def _tensor_hash(tensor: Shaped[Tensor, "*axes"]) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
