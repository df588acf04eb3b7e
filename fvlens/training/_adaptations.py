"""What a method does to a forward pass: nothing, demonstrations in front, a vector, soft tokens, low-rank updates.

All of them act through hooks on the frozen model or on the prompt's text, never on the model's weights, and alike on
both classes of model. Prompts are left-padded; tokens of an answer may follow for teacher forcing.
"""

import abc
import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.interventions import acting, hooked, resid_pre_hook
from fvlens.models import Fingerprint
from fvlens.prompts import Prompts, build_prompts, render_prompts, with_answers
from fvlens.relations import Pair
from fvlens.suffix import in_batches, open_reader, plan_batch
from fvlens.types import Steering, is_bridge
from fvlens.vectors import check_model


class Adaptation(abc.ABC):
    """What a method does to a model's forward pass."""

    def on(self, model: Any, prompts: Prompts) -> Prompts:
        """The prompts as this method writes them."""
        return prompts

    @abc.abstractmethod
    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits behind the last ``n_read`` tokens, of which the first is the prompt's last token."""

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if this was made on another model."""


@dataclass(frozen=True, slots=True)
class Unchanged(Adaptation):
    """The model as it is."""

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        return open_reader(model, len(tokens), keep=False).read(tokens, mask, n_read=n_read)

    def check(self, model: Any) -> None:
        """Nothing to refuse: it fits every model."""


@dataclass(frozen=True, slots=True)
class Demonstrations(Adaptation):
    """Demonstrations in front of whatever a prompt shows itself.

    Attributes:
        pairs: what they are drawn from, for each prompt anew and never with its own query's input.
        n_shots: how many.
        seed: of the draws, which are the same at each use.
    """

    pairs: tuple[Pair, ...]
    n_shots: int
    seed: int

    def on(self, model: Any, prompts: Prompts) -> Prompts:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = build_prompts(
            model,
            self.pairs,
            queries=prompts.queries,
            n_shots=self.n_shots,
            template=prompts.template,
            generator=generator,
        )
        shown = [(*first, *own) for first, own in zip(drawn.demonstrations, prompts.demonstrations, strict=True)]
        return render_prompts(
            model,
            prompts.queries,
            shown,
            template=prompts.template,
            labels=prompts.labels,
            n_shots=self.n_shots + prompts.n_shots,
            relation=prompts.relation,
        )

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        return Unchanged().read(model, tokens, mask, n_read=n_read)

    def check(self, model: Any) -> None:
        """Nothing to refuse: words fit every model."""


@dataclass(frozen=True, slots=True)
class Steered(Adaptation):
    """A steering's tensors, added at the prompt's last token.

    Attributes:
        steering: a ``FunctionVector``, a ``DistributedVector`` or the like, without a batch axis.
    """

    steering: Steering

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        column = tokens.shape[1] - n_read
        for name, value in self.steering.additions().items():
            if value.ndim > (2 if name.endswith("hook_z") else 1):
                raise ValueError(
                    f"the tensor for {name} has a batch axis: shape {list(value.shape)}; give one for all prompts."
                )
        edits = {
            name: functools.partial(_added, where=(slice(None), column), value=value)
            for name, value in self.steering.additions().items()
        }
        with hooked(model, edits):
            return Unchanged().read(model, tokens, mask, n_read=n_read)

    def check(self, model: Any) -> None:
        self.steering.check(model)


@dataclass(frozen=True, slots=True)
class SoftPrompt(Adaptation):
    """Tokens whose embeddings are trained, right behind BOS, or in front where there is none.

    Soft token i is the embedding of a token of the vocabulary plus an offset, added to what the first block reads. So
    positions, and any scale or norm of the embeddings, are the model's own, and offsets of zero are ordinary tokens.

    Attributes:
        tokens: the tokens of the vocabulary that they started from.
        offsets: what is added to their embeddings.
        fingerprint: the model that they were made on.
    """

    tokens: Int[Tensor, " soft"]
    offsets: Float[Tensor, "soft d_model"]
    fingerprint: Fingerprint

    def inserted(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> tuple[Int[Tensor, "batch longer"], Int[Tensor, "batch longer"], Int[Tensor, "batch soft"]]:
        """Tokens and mask with the soft tokens in them, and the columns that these stand in."""
        n = len(self.tokens)
        first = mask.argmax(dim=1) + int(self.fingerprint.bos == "one")
        columns = torch.arange(tokens.shape[1] + n, device=tokens.device)[None]
        behind = columns >= first[:, None] + n
        old = (columns - n * behind).clamp(max=tokens.shape[1] - 1)  # where a column's token was
        places = first[:, None] + torch.arange(n, device=tokens.device)
        soft = self.tokens.to(tokens).expand(len(tokens), -1)
        ones = torch.ones_like(soft, dtype=mask.dtype)
        return tokens.gather(1, old).scatter(1, places, soft), mask.gather(1, old).scatter(1, places, ones), places

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        longest = int(mask.sum(dim=1).max()) + len(self.tokens)
        if longest > model.cfg.n_ctx:
            raise ValueError(
                f"soft_prompt: a prompt is {longest} tokens long with its {len(self.tokens)} soft tokens, but the "
                f"model's context holds {model.cfg.n_ctx}; use fewer of them or shorter prompts."
            )
        tokens, mask, places = self.inserted(tokens, mask)
        where = torch.arange(len(tokens), device=tokens.device)[:, None], places
        with hooked(model, {resid_pre_hook(0): functools.partial(_added, where=where, value=self.offsets)}):
            return Unchanged().read(model, tokens, mask, n_read=n_read)

    def check(self, model: Any) -> None:
        check_model(self.fingerprint, model, "the soft prompt")


@dataclass(frozen=True, slots=True)
class LoRA(Adaptation):
    """Low-rank updates of the query and value projections: ``W_Q + A_Q B_Q`` and ``W_V + A_V B_V``, at every token.

    ``x A B`` is added to what the projection gives, before any norm of the queries and any rotation. Heads are those of
    the projection: a grouped-query model has fewer value heads.

    Attributes:
        layers: the layers that have them.
        a_q, b_q: ``A_Q`` and ``B_Q`` of each of these layers.
        a_v, b_v: ``A_V`` and ``B_V`` of each of these layers.
        fingerprint: the model that they were made on.
    """

    layers: tuple[int, ...]
    a_q: Float[Tensor, "adapted d_model rank"]
    b_q: Float[Tensor, "adapted rank head d_head"]
    a_v: Float[Tensor, "adapted d_model rank"]
    b_v: Float[Tensor, "adapted rank kv_head d_head"]
    fingerprint: Fingerprint

    @property
    def rank(self) -> int:
        """Rank of each update."""
        return self.a_q.shape[-1]

    def read(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Float[Tensor, "batch read d_vocab"]:
        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                inputs = stack.enter_context(_attention_inputs(model, layer))
                edits = {
                    f"blocks.{layer}.attn.hook_{name}": functools.partial(_updated, inputs=inputs, name=name, a=a, b=b)
                    for name, a, b in (("q", self.a_q[i], self.b_q[i]), ("v", self.a_v[i], self.b_v[i]))
                }
                stack.enter_context(hooked(model, edits))
            return Unchanged().read(model, tokens, mask, n_read=n_read)

    def check(self, model: Any) -> None:
        check_model(self.fingerprint, model, "the low-rank update")


def _added(activation: Float[Tensor, "batch pos *axes"], *, where: Any, value: Tensor) -> Float[Tensor, "..."]:
    """A new activation with ``value`` added at some places; the sum is rounded once."""
    result = activation.clone()
    result[where] = (activation[where] + value.to(activation.device)).to(activation.dtype)
    return result


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


def read_prompts(
    model: Any, change: Adaptation, prompts: Prompts, *, n_answer: int, batch_size: int | None, what: str
) -> Iterator[tuple[slice, Float[Tensor, "batch read d_vocab"]]]:
    """Logits behind the prompts, and behind the next ``n_answer - 1`` tokens of their answers, in batches.

    Args:
        model: the model.
        change: what is done to it.
        prompts: the prompts, as :meth:`Adaptation.on` writes them.
        n_answer: answer tokens that are scored.
        batch_size: prompts run together; by default chosen from what memory is free, and halved where it runs out.
        what: the function that the user called, for messages.

    Raises:
        ValueError: ``batch_size`` is below 1.
        MemoryError: out of memory with a single prompt.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{what}: expected batch_size of at least 1, got {batch_size}.")
    device = next(model.parameters()).device
    tokens, mask, _ = with_answers(prompts, n_answer)
    n_soft = len(change.tokens) if isinstance(change, SoftPrompt) else 0
    size = batch_size or plan_batch(model, n_pos=tokens.shape[1] + n_soft, n_read=n_answer, n_prompts=len(prompts))

    def run(rows: slice) -> tuple[slice, Tensor]:
        width = int(mask[rows].sum(dim=1).max())  # without needless padding
        own, seen = tokens[rows, -width:].to(device), mask[rows, -width:].to(device)
        return rows, change.read(model, own, seen, n_read=n_answer)

    yield from in_batches(run, len(prompts), size, what=what)
