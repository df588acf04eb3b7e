"""Which tokens of a prompt are what, labels being right or wrong."""

from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fvlens.prompts import Prompts, TokenClass
from fvlens.relations import Pairs, as_pairs, list_relations, load_relation

Right = Literal["input", "query"]

GROUPS = ("bos", "prefix", "demonstration_input", "right_label", "wrong_label", "separator", "query", "predictive")
"""Kinds of tokens: those of :class:`~fvlens.prompts.TokenClass`, labels parted into right and wrong ones."""

_LABEL = TokenClass.DEMONSTRATION_LABEL


def token_groups(prompts: Prompts, *, right: Right = "input", pairs: Pairs | None = None) -> Int[Tensor, "prompt pos"]:
    """Index into :data:`GROUPS` of each token, -1 for padding.

    Args:
        prompts: the prompts.
        right: a label is right if it is an answer to its own input (``"input"``), or if it is the answer to the query
            (``"query"``, as in arXiv:2505.14233).
        pairs: the true pairs, for ``right="input"``; by default those that are known: the shown ones where labels are
            ``"true"``, else those of the library's relation that the prompts name.

    Raises:
        ValueError: an unknown ``right``; the true pairs are not known, or leave out a demonstration's input; the
            tokenizer merges labels with what stands beside them.
    """
    if right not in ("input", "query"):
        raise ValueError(f"attention_patterns: right={right!r}; expected 'input' or 'query'.")
    flags = _of_query(prompts) if right == "query" else _of_input(prompts, pairs)
    groups = torch.full_like(prompts.token_classes, -1)
    for index, name in enumerate(GROUPS):
        if not name.endswith("_label"):  # these are told apart below
            groups[prompts.token_classes == int(TokenClass[name.upper()])] = index
    for row, kinds in enumerate(prompts.token_classes.tolist()):
        runs = [
            [column for column, _ in run]
            for kind, run in groupby(enumerate(kinds), key=lambda item: item[1])
            if kind == int(_LABEL)
        ]
        if len(runs) != len(flags[row]):
            raise ValueError(
                f"attention_patterns: prompt {row} shows {len(flags[row])} labels, but its tokens hold {len(runs)}: "
                "the tokenizer merges some with what stands beside them; use a template that parts them."
            )
        for run, is_right in zip(runs, flags[row], strict=True):
            groups[row, run] = GROUPS.index("right_label" if is_right else "wrong_label")
    return groups


def _of_query(prompts: Prompts) -> list[list[bool]]:
    asked = zip(prompts.queries, prompts.demonstrations, strict=True)
    return [[pair.output == query.output for pair in shown] for query, shown in asked]


def _of_input(prompts: Prompts, pairs: Pairs | None) -> list[list[bool]]:
    """Whether each label is a true answer to its input."""
    if pairs is None and (prompts.labels == "true" or prompts.n_shots == 0):
        return [[True] * len(shown) for shown in prompts.demonstrations]
    if pairs is None and prompts.relation not in list_relations():
        raise ValueError(
            f"attention_patterns: which of the {prompts.labels} labels of {prompts.relation or 'custom pairs'!r} are "
            "right is not known; give the true pairs as pairs=, or right='query'."
        )
    if pairs is None:
        pairs = load_relation(prompts.relation)
    true = dict(as_pairs(pairs, what="attention_patterns: pairs"))
    unknown = {pair.input for shown in prompts.demonstrations for pair in shown} - true.keys()
    if unknown:
        raise ValueError(
            f"attention_patterns: the true pairs leave out {len(unknown)} inputs of demonstrations, such as "
            f"{min(unknown)!r}; give all of them as pairs=, or right='query'."
        )
    return [[pair.output == true[pair.input] for pair in shown] for shown in prompts.demonstrations]
