"""A task as one vector of the residual stream."""

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations import HeadMeans
from fvlens.arguments import check_arguments, check_kinds
from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import resid_hook
from fvlens.metrics import best_tokens
from fvlens.models import Fingerprint, check_model
from fvlens.prompts import Template, known_template, template_from, template_header
from fvlens.showing import Shown, named
from fvlens.suffix import wide_logits
from fvlens.types import Head, HeadLike, as_flag, as_heads, as_list, as_text, as_whole
from fvlens.vectors._parts import INTERRUPTED, as_float32, chosen_heads

FORMAT = "fvlens-vector-1"


@dataclass(frozen=True, slots=True, repr=False)
class FunctionVector(Shown):
    """A vector of the residual stream that stands for a task.

    Attributes:
        vector: the vector, float32 on the CPU.
        layer: it is added after this layer (``blocks.{layer}.hook_resid_post``).
        heads: the heads whose mean outputs it sums.
        relation: the task's name.
        fingerprint: the model it was made on.
        kind: ``"function"``, ``"random"``, ``"combined"`` ...
        template, data_hash: the prompts behind the means. A template's name gives the built-in one; None if unknown.
        seed: seed of the run that made it, if given.
        complete: False if it was trained and the training was interrupted.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    heads: tuple[Head, ...]
    relation: str
    fingerprint: Fingerprint
    kind: str = "function"
    template: Template | str | None = None
    data_hash: str = ""
    seed: int | None = None
    complete: bool = True

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("vector", "heads", "fingerprint")}
        check_kinds("FunctionVector", FunctionVector, given)
        mark = self.fingerprint
        if self.vector.shape != (mark.d_model,):
            raise ValueError(
                f"FunctionVector: expected shape ({mark.d_model},), the model's d_model, got "
                f"{tuple(self.vector.shape)}."
            )
        vector = as_float32(self.vector, "FunctionVector: the vector")
        layer = as_whole(self.layer, "FunctionVector: layer", -sys.maxsize)
        if not 0 <= layer < mark.n_layers:
            raise ValueError(f"FunctionVector: expected a layer in 0..{mark.n_layers - 1}, got {self.layer}.")
        for name in ("relation", "kind", "data_hash"):
            as_text(getattr(self, name), f"FunctionVector: {name}")
        if self.seed is not None:
            as_whole(self.seed, "FunctionVector: seed", -sys.maxsize)
        as_flag(self.complete, "FunctionVector: complete")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "heads", tuple(as_heads(self.heads, mark.n_layers, mark.n_heads)))
        object.__setattr__(self, "template", known_template(self.template))

    def _line(self) -> str:
        part = "" if self.complete else ", interrupted"
        return (
            f"{named(self.relation)}, {self.kind}: {len(self.vector)} numbers after layer {self.layer}, "
            f"{len(self.heads)} heads, norm {self.norm():.3f}, model {self.fingerprint.name!r}{part}"
        )

    # -- steering -----------------------------------------------------------------------------------------------------

    def additions(self) -> Mapping[str, Float[Tensor, " d_model"]]:
        """What :func:`fvlens.inject` adds: hook name -> vector."""
        return {resid_hook(self.layer): self.vector}

    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if the vector was made on another model."""
        again = f"`fvlens run {self.relation}`" if self.relation else "`fvlens run`"
        check_model(self.fingerprint, model, f"the vector of {self.relation or self.kind!r}", again=again)

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def __add__(self, other: "FunctionVector") -> "FunctionVector":
        if not isinstance(other, FunctionVector):
            return NotImplemented
        differences = self.fingerprint.differences(other.fingerprint)
        if differences:
            raise ValueError(f"cannot combine vectors of two models ({'; '.join(differences)}).")
        if self.layer != other.layer:
            raise ValueError(
                f"cannot combine vectors of layers {self.layer} and {other.layer}; bring one over with at_layer()."
            )
        names = [name for name in (self.relation, other.relation) if name]
        return dataclasses.replace(
            self,
            vector=self.vector + other.vector,
            heads=tuple(dict.fromkeys(self.heads + other.heads)),
            relation=" + ".join(dict.fromkeys(names)),
            kind="combined",
            template=self.template if self.template == other.template else None,
            data_hash="",
            complete=self.complete and other.complete,
        )

    def __mul__(self, factor: float | int) -> "FunctionVector":
        if not isinstance(factor, int | float):
            return NotImplemented
        return dataclasses.replace(self, vector=self.vector * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> "FunctionVector":
        return self * -1.0

    def __sub__(self, other: "FunctionVector") -> "FunctionVector":
        if not isinstance(other, FunctionVector):
            return NotImplemented
        names = [name for name in (self.relation, other.relation) if name]
        return dataclasses.replace(self + (-other), relation=" - ".join(dict.fromkeys(names)))

    def at_layer(self, layer: int) -> "FunctionVector":
        """The same vector, to be added after another layer."""
        return dataclasses.replace(self, layer=layer)

    def norm(self) -> float:
        """Euclidean norm."""
        return float(self.vector.norm())

    def cosine(self, other: "FunctionVector") -> float:
        """Cosine similarity with another vector, in [-1, 1].

        Raises:
            ValueError: the vectors differ in width, or one of them is zero.
        """
        if self.vector.shape != other.vector.shape:
            raise ValueError(f"cosine: the vectors have {len(self.vector)} and {len(other.vector)} numbers.")
        product = self.norm() * other.norm()
        if product == 0:
            raise ValueError("cosine: undefined for a zero vector.")
        return max(-1.0, min(1.0, float(self.vector @ other.vector) / product))

    def decode(self, model: Any, k: int = 10, *, final_norm: bool = True) -> list[tuple[str, float]]:
        """The k tokens whose unembedding the vector points to most.

        ``v @ W_U``, by default after the model's final norm. Descriptive only: a vector can steer without decoding to
        anything readable.

        Args:
            model: the model the vector was made on.
            k: number of tokens.
            final_norm: pass the vector through the final norm first.

        Returns:
            Pairs (token text, logit), best first.

        Raises:
            ValueError: the vector is of another model, or k is out of range.
        """
        self.check(model)
        if not 1 <= k <= model.cfg.d_vocab:
            raise ValueError(f"decode: expected k between 1 and {model.cfg.d_vocab}, got {k}.")
        with torch.inference_mode():
            resid = self.vector.to(model.W_U.device, model.W_U.dtype)[None, None]
            logits = wide_logits(model.ln_final(resid) if final_norm else resid, model.W_U)[0, 0]
            tokens = best_tokens(logits, k)
        return [(model.tokenizer.decode([t]), v) for t, v in zip(tokens.tolist(), logits[tokens].tolist(), strict=True)]

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the vector to one safetensors file, its metadata in the header. Replaces an existing file at once."""
        return write_tensors(Path(path), {"vector": self.vector}, vector_header(self), FORMAT)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None, template: Template | str | None = None) -> "FunctionVector":
        """Read a vector that :meth:`save` wrote, with a warning if its training was interrupted.

        Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, the vector must have been made on this model.
            template: taken instead of the file's. Needed for a file of fvlens 0.1, which holds a template's name alone,
                where that is no built-in one.

        Raises:
            ValueError: no such file; not a safetensors file, or a truncated one; not written by fvlens; damaged
                metadata; wrong shape, NaN or infinite values; the name alone of a template that is not built in; or a
            vector of another model than ``model``.
        """
        path = Path(path)
        tensors, header = read_tensors(path, FORMAT)
        if set(tensors) != {"vector"}:
            raise ValueError(f"{path.name}: expected one tensor named 'vector', got {sorted(tensors)}.")
        try:
            loaded = vector_from(tensors["vector"], header, template)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: damaged metadata ({type(error).__name__}: {error}).") from error
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if model is not None:
            loaded.check(model)
        if not loaded.complete:
            warnings.warn(f"{path.name}: {INTERRUPTED}.", stacklevel=2)
        return loaded


def vector_header(vector: FunctionVector) -> dict[str, Any]:
    """All of a vector but its numbers, as plain JSON values."""
    return {
        "layer": vector.layer,
        "heads": [list(head) for head in vector.heads],
        "relation": vector.relation,
        "kind": vector.kind,
        **template_header(vector.template),
        "data_hash": vector.data_hash,
        "seed": vector.seed,
        "complete": vector.complete,
        "fingerprint": dataclasses.asdict(vector.fingerprint),
    }


def vector_from(
    values: Float[Tensor, " d_model"], header: Mapping[str, Any], template: Template | str | None = None
) -> FunctionVector:
    """The vector of these numbers and a header that :func:`vector_header` made; a ``template`` replaces the header's.

    Raises:
        KeyError, TypeError, ValueError: the header is damaged, or the numbers do not fit it.
    """
    if values.dtype != torch.float32:
        raise ValueError(f"expected numbers in torch.float32, got {values.dtype}.")
    plain = {name: header[name] for name in ("layer", "relation", "kind", "data_hash", "seed")}
    mark = Fingerprint.from_fields(header["fingerprint"])
    return FunctionVector(
        vector=values,
        heads=tuple(as_heads(as_list(header["heads"], "heads"), mark.n_layers, mark.n_heads)),
        fingerprint=mark,
        template=template_from(header, template),
        complete=as_flag(header.get("complete", True), "complete"),  # version 0.1 did not say
        **plain,
    )


def function_vector(
    model: Any, means: HeadMeans, *, heads: Iterable[HeadLike], layer: int, seed: int | None = None
) -> FunctionVector:
    """The function vector of a task: the sum of its heads' mean outputs.

    ``v_t = sum over heads of mean z_{l,h} @ W_O[l,h]`` [paper]. The reference adds the output bias once per head on
    models that have one; we leave it out, because it carries nothing of the task [our choice].

    Args:
        model: the model.
        means: task means at the last token, from :func:`~fvlens.mean_head_activations`.
        heads: the chosen heads, ``Head``s or ``(layer, head)`` pairs, usually ``effects.top(10)``.
        layer: the vector is added after this layer; the best one is found by a sweep.
        seed: seed recorded with the vector.

    Returns:
        :class:`FunctionVector`, ``.vector [d_model]`` in float32 on the CPU.

    Raises:
        ValueError: no heads, a head that does not exist or is listed twice, a layer outside the model, means that are
            not of the last token, or means of another model.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small")
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, fvlens.load_relation("antonym"), n_prompts=4, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> (2 * vec - vec).cosine(vec) > 0.999
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3, equation 6.
    """
    check_arguments(function_vector, locals())
    chosen, means_z = chosen_heads(model, means, heads)
    vector = torch.zeros(model.cfg.d_model)
    for head in chosen:
        weight = model.blocks[head.layer].attn.W_O[head.head].detach().float().cpu()
        vector += means_z[head.layer, head.head] @ weight
    return FunctionVector(
        vector=vector,
        layer=layer,
        heads=tuple(chosen),
        relation=means.relation,
        fingerprint=means.fingerprint,
        template=means.template,
        data_hash=means.data_hash,
        seed=seed,
    )


def random_vector_like(vector: FunctionVector, generator: torch.Generator) -> FunctionVector:
    """A vector of random direction with the same norm, layer and model: the control for "any push will do".

    Args:
        vector: the vector to imitate.
        generator: source of randomness.
    """
    check_arguments(random_vector_like, locals())
    direction = torch.randn(vector.vector.shape, generator=generator)
    return dataclasses.replace(
        vector,
        vector=direction * (vector.norm() / direction.norm()),
        heads=(),
        relation=f"random like {vector.relation}",
        kind="random",
        data_hash="",
        complete=True,
    )
