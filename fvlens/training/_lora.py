"""Low-rank updates of the attention's query and value projections.

They are our own hooks, not the peft library's: peft 0.21 finds no linear modules in a ``HookedTransformer``, takes its
three-dimensional weights for experts and cannot run them, and exchanges modules of the model where it works (a
``TransformerBridge``), so that the model is no longer the one that was loaded.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import acting, hooked
from fvlens.models import Fingerprint, check_model, fingerprint
from fvlens.prompts import Template, template_from, template_header
from fvlens.relations import Pairs
from fvlens.showing import Shown
from fvlens.training._adaptations import Adaptation, AdaptationChange
from fvlens.training._adapted import Baseline, drawn_seed, given_pairs, trained_baseline, valid_pairs
from fvlens.training._change import filled
from fvlens.training._options import TrainingOptions, settled
from fvlens.training._prepared import PreparedPrompts
from fvlens.training._settings import Settings, Task
from fvlens.types import as_flag, is_bridge
from fvlens.vectors import INTERRUPTED

LORA_FORMAT = "fvlens-lora-1"
_PARTS = ("a_q", "b_q", "a_v", "b_v")
LORA_LR = 0.1
"""Default learning rate of low-rank updates, as a share of the standard deviation that A is drawn with."""


@dataclass(frozen=True, slots=True, repr=False)
class LoRA(Adaptation, Shown):
    """Low-rank updates of the query and value projections: ``W_Q + A_Q B_Q`` and ``W_V + A_V B_V``, at every token.

    ``x A B`` is added to what the projection gives, before any norm of the queries and any rotation. Heads are those of
    the projection: a grouped-query model has fewer value heads.

    Attributes:
        layers: the layers that have them.
        a_q, b_q: ``A_Q`` and ``B_Q`` of each of these layers.
        a_v, b_v: ``A_V`` and ``B_V`` of each of these layers.
        fingerprint: the model that they were made on.
        complete: False if the training was interrupted.
        template: of the prompts that they were trained on; None if unknown.
    """

    layers: tuple[int, ...]
    a_q: Float[Tensor, "adapted d_model rank"]
    b_q: Float[Tensor, "adapted rank head d_head"]
    a_v: Float[Tensor, "adapted d_model rank"]
    b_v: Float[Tensor, "adapted rank kv_head d_head"]
    fingerprint: Fingerprint
    complete: bool = True
    template: Template | None = None

    def __post_init__(self) -> None:
        as_flag(self.complete, "LoRA: complete")

    def _line(self) -> str:
        return f"rank {self.rank} at {len(self.layers)} layers, model {self.fingerprint.name!r}"

    @property
    def rank(self) -> int:
        """Rank of each update."""
        return self.a_q.shape[-1]

    @contextlib.contextmanager
    def applied(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Iterator[tuple[Int[Tensor, "batch new_pos"], Int[Tensor, "batch new_pos"]]]:
        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                inputs = stack.enter_context(_attention_inputs(model, layer))
                edits = {
                    f"blocks.{layer}.attn.hook_{name}": functools.partial(_updated, inputs=inputs, name=name, a=a, b=b)
                    for name, a, b in (("q", self.a_q[i], self.b_q[i]), ("v", self.a_v[i], self.b_v[i]))
                }
                stack.enter_context(hooked(model, edits))
            yield tokens, mask

    def check(self, model: Any) -> None:
        check_model(self.fingerprint, model, "the low-rank update", again="`fvlens compare`")

    def save(self, path: str | FilePath) -> FilePath:
        """Write it to one safetensors file, metadata in its header. Replaces an existing file at once."""
        mark = dataclasses.asdict(self.fingerprint)
        header = {"layers": list(self.layers), "fingerprint": mark, "complete": self.complete}
        header |= template_header(self.template)
        return write_tensors(FilePath(path), {name: getattr(self, name) for name in _PARTS}, header, LORA_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None) -> "LoRA":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, it must have been made on this model.

        Raises:
            ValueError: no such file; no low-rank update, or a damaged one; or one of another model than ``model``.
        """
        path = FilePath(path)
        tensors, header = read_tensors(path, LORA_FORMAT)
        try:
            layers = tuple(int(layer) for layer in header["layers"])
            parts = [tensors[name] for name in _PARTS]
            if [part.ndim for part in parts] != [3, 4, 3, 4] or {len(part) for part in parts} != {len(layers)}:
                raise ValueError(f"{len(layers)} layers and {[list(part.shape) for part in parts]}")
            mark = Fingerprint.from_fields(header["fingerprint"])
            complete = as_flag(header.get("complete", True), "complete")  # earlier files do not say
            template = template_from({"template": "", **header})  # nor this
            loaded = cls(layers, *parts, fingerprint=mark, complete=complete, template=template)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged low-rank update ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.check(model)
        if not loaded.complete:
            warnings.warn(f"{path.name}: {INTERRUPTED}.", stacklevel=2)
        return loaded


def _updated(
    projected: Float[Tensor, "batch pos heads d_head"],
    *,
    inputs: dict[str, Tensor],
    name: str,
    a: Float[Tensor, "d_model rank"],
    b: Float[Tensor, "rank heads d_head"],
) -> Float[Tensor, "batch pos heads d_head"]:
    x = inputs[name]
    wide = torch.promote_types(x.dtype, a.dtype)
    update = torch.einsum("bpd,dr,rhe->bphe", x.to(wide), a.to(x.device, wide), b.to(x.device, wide))
    return (projected + update).to(projected.dtype)


@contextlib.contextmanager
def _attention_inputs(model: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """What the query (``"q"``) and value (``"v"``) projections of a block read, in the forward that is under way."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value

    if is_bridge(model):
        places = {f"blocks.{layer}.attn.{name}.hook_in": functools.partial(keep, name) for name in ("q", "v")}
        with hooked(model, places):
            yield found
        return

    def see(forward: Any, *args: Any, **kwargs: Any) -> Any:
        for name, key in (("q", "query_input"), ("v", "value_input")):
            keep(name, kwargs[key])
        return forward(*args, **kwargs)

    with acting(methods={(model.blocks[layer].attn, "forward"): see}):
        yield found


def why_not_low_rank(model: Any, layers: Sequence[int]) -> str | None:
    """Why :class:`LoRA` cannot act on these layers, or None if it can."""
    cfg, points = model.cfg, model.hook_dict
    if not is_bridge(model) and (cfg.use_attn_in or cfg.use_split_qkv_input):
        return "attention inputs are split by head; turn use_attn_in and use_split_qkv_input off"
    needed = ["hook_q", "hook_v", *(["q.hook_in", "v.hook_in"] if is_bridge(model) else [])]
    lacking = [f"blocks.{i}.attn.{name}" for i in layers for name in needed if f"blocks.{i}.attn.{name}" not in points]
    return f"the model has no hook {lacking[0]}" if lacking else None


class LoRAChange(AdaptationChange):
    """Low-rank updates of query and value projections."""

    relative_lr = LORA_LR

    def __init__(
        self, prompts: PreparedPrompts, layers: tuple[int, ...], rank: int, generator: torch.Generator
    ) -> None:
        super().__init__(prompts)
        cfg, n = self.model.cfg, len(layers)
        n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        device = prompts.tokens.device
        self.layers, self.mark = layers, fingerprint(self.model)

        def first() -> nn.Parameter:
            drawn = torch.randn(n, cfg.d_model, rank, generator=generator) / cfg.d_model**0.5
            return nn.Parameter(drawn.to(device))

        def second(n_heads: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(n, rank, n_heads, cfg.d_head, device=device))

        self.a_q, self.b_q = first(), second(cfg.n_heads)
        self.a_v, self.b_v = first(), second(n_kv)

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.a_q, self.b_q, self.a_v, self.b_v]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Standard deviation that A is drawn with."""
        return float(self.model.cfg.d_model**-0.5)

    def adaptation(self) -> LoRA:
        return LoRA(
            self.layers, self.a_q, self.b_q, self.a_v, self.b_v, self.mark, template=self.prompts.prompts.template
        )

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> LoRA:
        return LoRA(
            self.layers,
            *filled(self.parameters()[0], values),
            fingerprint=self.mark,
            template=self.prompts.prompts.template,
        )


def lora(
    model: Any,
    pairs: Pairs,
    *,
    rank: int = 1,
    layers: Sequence[int] | None = None,
    valid: Pairs | None = None,
    relation: str | None = None,
    settings: Settings | None = None,
    generator: torch.Generator,
    **options: Unpack[TrainingOptions],
) -> Baseline:
    """Low-rank updates of the query and value projections of attention, trained with the model frozen.

    ``W_Q + A_Q B_Q`` and ``W_V + A_V B_V`` at every token, with A random normal of variance ``1 / d_model`` and B zero
    at the start, so that training starts at the plain model. The factor ``alpha / rank`` of the source is 1.

    Args:
        model: the model; its parameters, gradient flags and mode are as before afterwards.
        pairs: training pairs.
        rank: rank of each update.
        layers: the layers that have them; by default all.
        valid, relation, settings: as for :func:`~fvlens.training.finetune`.
        generator: draws the seed of the minibatches' order, then A.
        options: as for :func:`~fvlens.training.finetune`; ``lr`` is by default 10% of ``1 / sqrt(d_model)``, the root
            mean square of A at the start.

    Returns:
        :class:`Baseline`. The norm in its history is that of A and B together.

    Raises:
        ValueError: no pairs; ``rank`` below 1 or above ``d_head``; no layers, one twice, or one outside the model; a
            model whose projections cannot be reached; a setting out of range.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> updated = lora(model, split.train[:20], valid=split.valid, epochs=5, generator=g, progress=False)
        >>> updated.n_trainable == model.cfg.n_layers * 4 * model.cfg.d_model
        True

    References:
        Hu et al. 2021, arXiv:2106.09685, sections 4.1 and 4.2.
    """
    own, name = given_pairs("lora", pairs, relation)
    n_layers = model.cfg.n_layers
    adapted = tuple(range(n_layers) if layers is None else layers)
    if not 1 <= rank <= model.cfg.d_head:
        raise ValueError(f"lora: expected rank in 1..{model.cfg.d_head}, the width of a head, got {rank}.")
    if not adapted or len(set(adapted)) < len(adapted) or not all(0 <= layer < n_layers for layer in adapted):
        raise ValueError(f"lora: expected different layers in 0..{n_layers - 1}, got {list(adapted)}.")
    reason = why_not_low_rank(model, adapted)
    if reason is not None:
        raise ValueError(f"lora: cannot reach the query and value projections of this model: {reason}.")
    how, running = settled("lora", model, settings, options)
    task = Task(name, own, valid_pairs("lora", valid), drawn_seed(generator))
    prompts = PreparedPrompts.of(model, [task], how.template, max_memory=running.max_memory)
    change = LoRAChange(prompts, adapted, rank, generator)
    return trained_baseline("lora", f"LoRA, rank {rank}", task, change, how, running)
