"""Attention of some heads on prompts: from the last token or from all, and on which kinds of tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.activations import activation_cache
from fvlens.arguments import check_arguments
from fvlens.attribution._effects import standard_error
from fvlens.attribution._groups import GROUPS, Right, token_groups
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import Prompts, Template, get_template
from fvlens.relations import Pairs
from fvlens.results import Result
from fvlens.showing import named, number
from fvlens.types import Head, HeadLike, as_heads

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

_MOST = 2 * 1024**3
"""Bytes that whole patterns may take where no bound is given."""


@dataclass(frozen=True, slots=True, repr=False)
class AttentionPatterns(Result):
    """Attention of some heads on prompts, and which kind each token is.

    Prompts are left-padded: index -1 is the last token. Attention to padding is 0, and rows of padding are 0.

    Attributes:
        heads: the heads, in the order they were asked for.
        last: attention from the last token to each token; a row sums to 1.
        full: attention from each token to each token; None if only that of the last one was asked for.
        groups: index into :data:`GROUPS` of each token, -1 for padding.
        right: what makes a label right: ``"input"`` or ``"query"``.
        tokens: the prompts' tokens.
        words: text of each token id that occurs; empty if the model had no tokenizer.
        relation, labels, template, n_shots, data_hash: the prompts.
        fingerprint: the model.
    """

    FORMAT: ClassVar[str] = "fvlens-attention-patterns-1"

    heads: tuple[Head, ...]
    last: Float[Tensor, "prompt head pos"]
    full: Float[Tensor, "prompt head pos pos"] | None
    groups: Int[Tensor, "prompt pos"]
    right: Right
    tokens: Int[Tensor, "prompt pos"]
    words: Mapping[int, str]
    relation: str
    labels: str
    template: Template | str
    n_shots: int
    data_hash: str
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))

    def __len__(self) -> int:
        return len(self.tokens)

    def _line(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", ..." if len(self.heads) > 4 else "")
        kind = "last token" if self.full is None else "all tokens"
        return (
            f"{named(self.relation)}, {self.labels} labels: {len(self.heads)} heads "
            f"({shown}), {len(self)} prompts, from {kind}, model {self.fingerprint.name!r}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = zip([*map(str, self.heads), "even attention"], [*self.mean.tolist(), self.chance.tolist()], strict=True)
        return [("head", *map(_shown, self.group_names)), *((name, *map(number, row)) for name, row in rows)]

    def _check_loaded(self) -> None:
        if len(self.heads) != self.last.shape[1]:
            raise ValueError(f"heads: expected {self.last.shape[1]}, got {len(self.heads)}.")
        if not bool(((self.groups >= -1) & (self.groups < len(GROUPS))).all()):
            raise ValueError(f"groups: expected indices in -1..{len(GROUPS) - 1}.")

    @property
    def group_names(self) -> tuple[str, ...]:
        """The kinds of tokens that occur, in the order of :data:`GROUPS`."""
        return tuple(name for i, name in enumerate(GROUPS) if bool((self.groups == i).any()))

    @property
    def _is_in(self) -> Float[Tensor, "prompt pos group"]:
        index = torch.tensor([GROUPS.index(name) for name in self.group_names])
        return (self.groups[:, :, None] == index).float()

    @property
    def by_group(self) -> Float[Tensor, "prompt head group"]:
        """Attention from the last token to all tokens of a kind together, one of :attr:`group_names`."""
        return self.last @ self._is_in

    @property
    def mean(self) -> Float[Tensor, "head group"]:
        """Mean of :attr:`by_group` over prompts."""
        return self.by_group.mean(dim=0)

    @property
    def stderr(self) -> Float[Tensor, "head group"]:
        """Standard error of :attr:`mean` over prompts (NaN for a single prompt)."""
        return standard_error(self.by_group)

    @property
    def chance(self) -> Float[Tensor, " group"]:
        """What :attr:`mean` would be if a head attended to all tokens alike: the mean share of tokens of a kind."""
        is_in = self._is_in
        return (is_in.sum(dim=1) / is_in.sum(dim=(1, 2))[:, None]).mean(dim=0)

    @property
    def between(self) -> Float[Tensor, "head from_group to_group"]:
        """Attention from a token of one kind to all tokens of another together: mean over such tokens of all prompts.

        Raises:
            ValueError: only attention from the last token was asked for.
        """
        if self.full is None:
            raise ValueError("between: needs attention from all tokens; ask for attention_patterns(..., full=True).")
        is_in = self._is_in
        total = torch.einsum("phqk,pqf,pkg->hfg", self.full, is_in, is_in)
        return total / is_in.sum(dim=(0, 1))[:, None]

    def word(self, prompt: int, column: int) -> str:
        """Text of one token, its id if the text is not known."""
        token = int(self.tokens[prompt, column])
        return self.words.get(token, str(token))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a prompt, head and token: ``prompt, layer, head, key_pos, token, group, attention``.

        ``key_pos`` counts from the right: -1 is the last token. Of full patterns there is a row for each pair of
        tokens, the later one first, with a column ``query_pos``.
        """
        import pandas as pd

        n_pos, real = self.tokens.shape[1], self.groups >= 0
        if self.full is None:
            seen = real[:, None, :].expand_as(self.last)
            values, (prompt, head, key), query = self.last, seen.nonzero(as_tuple=True), None
        else:
            pairs = (real[:, :, None] & real[:, None, :]).tril()
            seen = pairs[:, None].expand_as(self.full)
            values, (prompt, head, query, key) = self.full, seen.nonzero(as_tuple=True)
        own = torch.tensor(self.heads)
        columns: dict[str, Any] = {
            "prompt": prompt.numpy(),
            "layer": own[head, 0].numpy(),
            "head": own[head, 1].numpy(),
        }
        if query is not None:
            columns["query_pos"] = (query - n_pos).numpy()
        columns["key_pos"] = (key - n_pos).numpy()
        columns["token"] = [self.word(i, j) for i, j in zip(prompt.tolist(), key.tolist(), strict=True)]
        columns["group"] = [GROUPS[i] for i in self.groups[prompt, key].tolist()]
        columns["attention"] = values[seen].numpy()
        return pd.DataFrame(columns)

    def plot(self, *, prompt: int | None = None, head: HeadLike | None = None, full: bool = True) -> "Figure":
        """Attention as a map, or of one head on one prompt as bars over its tokens.

        By default each head's mean attention from the last token to each kind of token, with what even attention would
        give. With ``prompt``, each head's attention from the last token to that prompt's tokens. With ``prompt`` and
        ``head``, that head's attention from every token to every token; with ``full=False`` from the last one alone, a
        bar a token, coloured by what the token is for.

        Args:
            prompt: index of a prompt.
            head: one of :attr:`heads`.
            full: of one head: from every token, or from the last one alone.

        Raises:
            ValueError: there is no such prompt or head; a head without a prompt; ``full=False`` without a head; only
                attention from the last token was asked for, and ``full=False`` is not given.
        """
        from fvlens import plots

        if not full and head is None:
            raise ValueError("plot: full=False is for the pattern of one head; give prompt= and head=, too.")
        what = f"{named(self.relation)} ({self.labels} labels, "
        if prompt is None:
            if head is not None:
                raise ValueError(f"plot: head={head} is for one prompt's pattern; give prompt=, too.")
            return plots.shares(
                torch.cat([self.mean, self.chance[None]]),
                [*map(str, self.heads), "even attention"],
                [_shown(name) for name in self.group_names],
                title=f"Attention from the last token, {what}{len(self)} prompts)",
                colorbar_title="attention",
                stderr=torch.cat([self.stderr, torch.full_like(self.chance[None], torch.nan)]),
            )
        if not 0 <= prompt < len(self):
            raise ValueError(f"plot: expected a prompt in 0..{len(self) - 1}, got {prompt}.")
        columns = (self.groups[prompt] >= 0).nonzero().flatten().tolist()
        words = [self.word(prompt, column) for column in columns]
        kinds = [_shown(GROUPS[int(self.groups[prompt, column])]) for column in columns]
        if head is None:
            values, rows, title = self.last[prompt][:, columns], list(map(str, self.heads)), "the last token"
        else:
            one = as_heads([head], self.fingerprint.n_layers, self.fingerprint.n_heads, "plot: head")[0]
            if one not in self.heads:
                raise ValueError(f"plot: head={one}: no such head; there are {', '.join(map(str, self.heads))}.")
            if full and self.full is None:
                raise ValueError(
                    "plot: attention from all tokens was not asked for; give attention_patterns(..., full=True), or "
                    "full=False for that of the last token."
                )
            if not full or self.full is None:
                return plots.token_bars(
                    self.last[prompt, self.heads.index(one), columns],
                    words,
                    kinds,
                    title=f"Attention of {one} from the last token, {what}prompt {prompt})",
                )
            values = self.full[prompt, self.heads.index(one)][columns][:, columns]
            rows, title = words, f"each token, {one}"
        return plots.shares(
            values,
            rows,
            words,
            title=f"Attention from {title}, {what}prompt {prompt})",
            colorbar_title="attention",
            hover=[kinds for _ in rows],
        )


def _shown(group: str) -> str:
    """A kind of token, as people say it."""
    said = {"bos": "start", "predictive": "last token", "demonstration_input": "input"}
    return said.get(group, group.replace("_", " "))


def attention_patterns(
    model: Any,
    prompts: Prompts,
    heads: Iterable[HeadLike],
    *,
    full: bool = False,
    right: Right = "input",
    pairs: Pairs | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> AttentionPatterns:
    """Where some heads look: their attention from the last token, or from all, and on which kinds of tokens.

    The attention of a head after its softmax, ``A[query, key]``; shared keys, windows and caps are the model's own. The
    last token's row is grouped by what tokens are for: demonstrations' inputs, their labels, right and wrong, template
    text, the query. Amounts mean nothing without :attr:`~AttentionPatterns.chance`.

    Args:
        model: the model.
        prompts: the prompts.
        heads: ``Head``s or ``(layer, head)`` pairs, such as ``effects.top(10)``.
        full: keep the attention from every token, too.
        right: a label is right if it is the answer to its own input (``"input"``), or if it is the answer to the query
            (``"query"``: the labels that ABFT calls right, arXiv:2505.14233, section 3).
        pairs: the true pairs, for ``right="input"``, in any shape; by default the pairs that are shown, where labels
            are ``"true"``, else the library's relation of that name.
        batch_size: prompts run together; by default chosen from what memory is free.
        max_memory: bytes for activations, as of :func:`~fvlens.activation_cache`; with ``full`` also for what is kept.
        progress: show a progress bar.

    Returns:
        :class:`AttentionPatterns`: shares of attention, from 0 to 1.

    Raises:
        ValueError: no heads, or ones that there are not; the model's blocks show no attention; which labels are right
            is not known; or full patterns take more than ``max_memory`` (2 GiB by default).

    Example:
        >>> import torch, fvlens
        >>> from fvlens.attribution import attention_patterns
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = fvlens.build_prompts(
        ...     model, fvlens.load_relation("antonym"), n_prompts=4, labels="random", generator=g
        ... )
        >>> patterns = attention_patterns(model, prompts, [(1, 0), (2, 3)], progress=False)
        >>> patterns.group_names
        ('bos', 'demonstration_input', 'wrong_label', 'separator', 'query', 'predictive')
        >>> torch.allclose(patterns.mean.sum(dim=1), torch.ones(2))
        True
    """
    check_arguments(attention_patterns, locals(), runs=True)
    chosen = as_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    if not chosen:
        raise ValueError("attention_patterns: expected at least one head, got none.")
    groups = token_groups(prompts, right=right, pairs=pairs)
    n, n_pos = prompts.tokens.shape
    needed, most = 4 * n * len(chosen) * n_pos * n_pos, _MOST if max_memory is None else max_memory
    if full and needed > most:
        raise ValueError(
            f"attention_patterns: {len(chosen)} whole patterns of {n} prompts take {needed} bytes, above {most}; take "
            "fewer heads or prompts, full=False, or give more max_memory."
        )
    layers = sorted({head.layer for head in chosen})
    cache = activation_cache(
        model,
        prompts,
        sites="pattern",
        layers=layers,
        positions=None if full else "last",
        batch_size=batch_size,
        max_memory=max_memory,
        progress=progress,
    )
    found = torch.zeros(n, len(chosen), n_pos if full else 1, n_pos)
    for layer in layers:
        own = [i for i, head in enumerate(chosen) if head.layer == layer]
        for rows, block in cache.blocks("pattern", layer):
            found[rows, own] = block[:, [chosen[i].head for i in own]]
    return AttentionPatterns(
        heads=tuple(chosen),
        last=found[:, :, -1].contiguous(),
        full=found if full else None,
        groups=groups,
        right=right,
        tokens=prompts.tokens,
        words=cache.words,
        relation=prompts.relation,
        labels=prompts.labels,
        template=prompts.template,
        n_shots=prompts.n_shots,
        data_hash=prompts.data_hash,
        fingerprint=fingerprint(model),
    )
