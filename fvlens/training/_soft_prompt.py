"""Soft prompts: input embeddings that are trained."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.files import read_tensors, write_tensors
from fvlens.interventions import hooked, resid_pre_hook
from fvlens.models import Fingerprint, bos_token_id, check_model, fingerprint
from fvlens.prompts import Template, template_from, template_header
from fvlens.relations import Pairs
from fvlens.showing import Shown
from fvlens.training._adaptations import Adaptation, AdaptationChange, added
from fvlens.training._adapted import Baseline, drawn_seed, given_pairs, trained_baseline, valid_pairs
from fvlens.training._options import TrainingOptions, settled
from fvlens.training._prepared import PreparedPrompts
from fvlens.training._settings import Settings, Task
from fvlens.types import as_flag
from fvlens.vectors import INTERRUPTED

SOFT_PROMPT_FORMAT = "fvlens-soft-prompt-1"
SOFT_PROMPT_LR = 0.1
"""Default learning rate of a soft prompt, as a share of the root mean square of what the first block reads."""


@dataclass(frozen=True, slots=True, repr=False)
class SoftPrompt(Adaptation, Shown):
    """Tokens whose embeddings are trained, right behind the BOS token of a prompt, or in front where there is none.

    Soft token i is the embedding of a token of the vocabulary plus an offset, added to what the first block reads. So
    positions, and any scale or norm of the embeddings, are the model's own, and offsets of zero are ordinary tokens.

    Attributes:
        tokens: the tokens of the vocabulary that they started from.
        offsets: what is added to their embeddings.
        fingerprint: the model that they were made on.
        complete: False if the training was interrupted.
        template: of the prompts that they were trained on; None if unknown.
    """

    tokens: Int[Tensor, " soft"]
    offsets: Float[Tensor, "soft d_model"]
    fingerprint: Fingerprint
    complete: bool = True
    template: Template | None = None

    def __post_init__(self) -> None:
        as_flag(self.complete, "SoftPrompt: complete")

    def _line(self) -> str:
        n, width = self.offsets.shape
        return f"{n} tokens of {width} numbers, norm {float(self.offsets.norm()):.3f}, model {self.fingerprint.name!r}"

    @property
    def n_more(self) -> int:
        return len(self.tokens)

    def inserted(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], bos: int | None
    ) -> tuple[Int[Tensor, "batch longer"], Int[Tensor, "batch longer"], Int[Tensor, "batch soft"]]:
        """Tokens and mask with the soft tokens in them, and the columns that these stand in."""
        n = len(self.tokens)
        first = mask.argmax(dim=1)
        if bos is not None:
            first = first + (tokens.gather(1, first[:, None])[:, 0] == bos)
        columns = torch.arange(tokens.shape[1] + n, device=tokens.device)[None]
        behind = columns >= first[:, None] + n
        old = (columns - n * behind).clamp(max=tokens.shape[1] - 1)  # where a column's token was
        places = first[:, None] + torch.arange(n, device=tokens.device)
        soft = self.tokens.to(tokens).expand(len(tokens), -1)
        ones = torch.ones_like(soft, dtype=mask.dtype)
        return tokens.gather(1, old).scatter(1, places, soft), mask.gather(1, old).scatter(1, places, ones), places

    @contextlib.contextmanager
    def applied(
        self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], *, n_read: int
    ) -> Iterator[tuple[Int[Tensor, "batch new_pos"], Int[Tensor, "batch new_pos"]]]:
        longest = int(mask.sum(dim=1).max()) + len(self.tokens)
        if longest > model.cfg.n_ctx:
            raise ValueError(
                f"soft_prompt: a prompt is {longest} tokens long with its {len(self.tokens)} soft tokens, but the "
                f"model's context holds {model.cfg.n_ctx}; use fewer of them or shorter prompts."
            )
        tokens, mask, places = self.inserted(tokens, mask, bos_token_id(model))
        where = torch.arange(len(tokens), device=tokens.device)[:, None], places
        with hooked(model, {resid_pre_hook(0): functools.partial(added, where=where, value=self.offsets)}):
            yield tokens, mask

    def check(self, model: Any) -> None:
        check_model(self.fingerprint, model, "the soft prompt", again="`fvlens compare`")

    def save(self, path: str | FilePath) -> FilePath:
        """Write it to one safetensors file, metadata in its header. Replaces an existing file at once."""
        header = {"fingerprint": dataclasses.asdict(self.fingerprint), "complete": self.complete}
        header |= template_header(self.template)
        return write_tensors(
            FilePath(path), {"tokens": self.tokens, "offsets": self.offsets}, header, SOFT_PROMPT_FORMAT
        )

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None) -> "SoftPrompt":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, it must have been made on this model.

        Raises:
            ValueError: no such file; not a soft prompt, or a damaged one; or one of another model than ``model``.
        """
        path = FilePath(path)
        tensors, header = read_tensors(path, SOFT_PROMPT_FORMAT)
        try:
            mark = Fingerprint.from_fields(header["fingerprint"])
            tokens, offsets = tensors["tokens"], tensors["offsets"]
            if tokens.ndim != 1 or offsets.shape != (len(tokens), mark.d_model):
                raise ValueError(f"offsets {list(offsets.shape)} of tokens {list(tokens.shape)}")
            # earlier files say neither
            complete = as_flag(header.get("complete", True), "complete")
            template = template_from({"template": "", **header})
            loaded = cls(tokens, offsets, mark, complete=complete, template=template)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged soft prompt ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.check(model)
        if not loaded.complete:
            warnings.warn(f"{path.name}: {INTERRUPTED}.", stacklevel=2)
        return loaded


class SoftPromptChange(AdaptationChange):
    """Offsets of soft tokens."""

    relative_lr = SOFT_PROMPT_LR

    def __init__(self, prompts: PreparedPrompts, tokens: Int[Tensor, " soft"]) -> None:
        super().__init__(prompts)
        self.soft, self.mark = tokens, fingerprint(self.model)
        self.offsets = nn.Parameter(torch.zeros(len(tokens), self.model.cfg.d_model, device=prompts.tokens.device))

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.offsets]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Root mean square of what the first block reads, over all tokens."""
        total, n = 0.0, 0
        with torch.no_grad():
            for portion in self.prompts.portions(rows):
                part, seen = rows[portion].to(self.prompts.mask.device), list[Tensor]()
                self.prompts.whole_passes(part, {resid_pre_hook(0): seen.append})
                values = seen[0][self.prompts.mask[part].bool()].double()
                total, n = total + float(values.square().sum()), n + values.numel()
        return (total / n) ** 0.5

    def adaptation(self) -> SoftPrompt:
        return SoftPrompt(self.soft, self.offsets, self.mark, template=self.prompts.prompts.template)

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> SoftPrompt:
        return SoftPrompt(self.soft, values.view(len(self.soft), -1), self.mark, template=self.prompts.prompts.template)


def _random_tokens(model: Any, n: int, generator: torch.Generator) -> Int[Tensor, " soft"]:
    """Random tokens of the vocabulary, no special ones."""
    special = set(model.tokenizer.all_special_ids)
    ordinary = [token for token in range(min(model.cfg.d_vocab, len(model.tokenizer))) if token not in special]
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (n,), generator=generator)]


def soft_prompt(
    model: Any,
    pairs: Pairs,
    *,
    n_tokens: int = 1,
    valid: Pairs | None = None,
    relation: str | None = None,
    settings: Settings | None = None,
    generator: torch.Generator,
    **options: Unpack[TrainingOptions],
) -> Baseline:
    """A soft prompt: a few input embeddings behind BOS, trained with the model frozen.

    The embeddings start as those of random tokens of the vocabulary. One of them has as many numbers as a vector of the
    residual stream. See :class:`~fvlens.training.SoftPrompt` for what exactly is added where. All later tokens move
    by ``n_tokens`` positions, which a small model with learned positions may not bear: on the embedded one, 1 soft
    token fails, and 8 work, the length of a demonstration.

    Args:
        model: the model; its parameters, gradient flags and mode are as before afterwards.
        pairs: training pairs.
        n_tokens: soft tokens.
        valid, relation, settings: as for :func:`~fvlens.training.finetune`.
        generator: draws the seed of the minibatches' order, then the tokens.
        options: as for :func:`~fvlens.training.finetune`; ``lr`` is by default 10% of the root mean square of what the
            first block reads.

    Returns:
        :class:`Baseline`. The norm in its history is that of the change from the first embeddings.

    Raises:
        ValueError: no pairs; ``n_tokens`` below 1, or too many for the model's context; a setting out of range.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> soft = soft_prompt(model, split.train[:20], valid=split.valid, epochs=5, generator=g, progress=False)
        >>> soft.n_trainable == model.cfg.d_model
        True

    References:
        Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2 (start from sampled vocabulary).
    """
    own, name = given_pairs("soft_prompt", pairs, relation)
    if n_tokens < 1:
        raise ValueError(f"soft_prompt: expected n_tokens of at least 1, got {n_tokens}.")
    how, running = settled("soft_prompt", model, settings, options)
    seed = drawn_seed(generator)
    tokens = _random_tokens(model, n_tokens, generator)
    task = Task(name, own, valid_pairs("soft_prompt", valid), seed)
    prompts = PreparedPrompts.of(model, [task], how.template, max_memory=running.max_memory, n_more=n_tokens)
    what = f"{n_tokens} soft token{'s' if n_tokens > 1 else ''}"
    return trained_baseline("soft_prompt", what, task, SoftPromptChange(prompts, tokens), how, running)
