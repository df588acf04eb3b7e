"""Which tokens of left-padded prompts are meant: the last, those of a class, or counted from the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fvlens.prompts import Prompts, TokenClass

Positions = str
"""``"last"`` or the lower-case name of a :class:`~fvlens.prompts.TokenClass`, such as ``"demonstration_label"``."""


def position_names() -> tuple[str, ...]:
    """Names that ``positions=`` takes."""
    return ("last", *(kind.name.lower() for kind in TokenClass if kind is not TokenClass.PADDING))


def position_mask(prompts: Prompts, positions: Positions) -> Bool[Tensor, "prompt pos"]:
    """Which tokens ``positions`` names.

    Raises:
        ValueError: no such position name, or a prompt has no such token.
    """
    if positions not in position_names():
        raise ValueError(f"positions={positions!r}; expected one of {', '.join(position_names())}.")
    if positions == "last":
        mask = torch.zeros_like(prompts.tokens, dtype=torch.bool)
        mask[:, -1] = True
        return mask
    mask = prompts.token_classes == int(TokenClass[positions.upper()])
    empty = int((~mask.any(dim=1)).sum())
    if empty:
        raise ValueError(
            f"positions={positions!r}: {empty} of {len(prompts)} prompts have no such token "
            f"(they have {prompts.n_shots} demonstrations in template {prompts.template.name!r})."
        )
    return mask


@dataclass(frozen=True, slots=True)
class Places:
    """The tokens of each prompt that are kept, as many for every prompt.

    Attributes:
        name: what was asked for: None for all, a name, or indices counted from the right.
        columns: index into ``prompts.tokens`` of each place.
        mask: False where a place holds padding, or where a prompt has fewer tokens of a class than others.
    """

    name: Positions | tuple[int, ...] | None
    columns: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]


def find_places(
    prompts: Prompts, positions: Positions | slice | Sequence[int] | int | None, n_places: int | None = None
) -> Places:
    """The places that ``positions`` names: all, a name's, or those of indices counted from the right.

    Tokens of a class stand at the right of their axis, like everything else: the last of them at index -1. The axis is
    as long as the largest number of them in a prompt, or ``n_places`` if these prompts were chosen out of more.

    Raises:
        ValueError: no such name; a prompt without a token of the class; indices that are not negative, reach beyond the
            prompts, come twice, or are none.
    """
    n_prompts, n_pos = prompts.tokens.shape
    if isinstance(positions, str):
        wanted = position_mask(prompts, positions)
        n_most = int(wanted.sum(dim=1).max())
        n_most = n_most if n_places is None else max(n_most, min(n_places, n_pos))
        # a stable sort moves the wanted ones to the right and keeps their order
        columns = wanted.int().argsort(dim=1, stable=True)[:, n_pos - n_most :]
        mask = wanted.gather(1, columns)
        return Places(positions, columns.masked_fill(~mask, 0), mask)
    name = None if positions is None else _from_the_right(positions, n_pos)
    row = torch.arange(n_pos) if name is None else torch.tensor(name) + n_pos
    columns = row.expand(n_prompts, -1).contiguous()
    return Places(name, columns, prompts.attention_mask.bool()[:, row])


def _from_the_right(positions: slice | Sequence[int] | int, n_pos: int) -> tuple[int, ...]:
    if isinstance(positions, slice):
        if any(end is not None and end >= 0 for end in (positions.start, positions.stop)):
            raise ValueError(
                f"positions={positions}: prompts are left-padded, so positions count from the right; expected a slice "
                "with negative ends, such as slice(-4, None)."
            )
        found = tuple(index - n_pos for index in range(n_pos)[positions])
    else:
        found = (positions,) if isinstance(positions, int) else tuple(int(index) for index in positions)
    outside = [index for index in found if not -n_pos <= index < 0]
    if outside or not found or len(set(found)) < len(found):
        raise ValueError(
            f"positions={positions}: expected different indices counted from the right, from -1 (the last token) to "
            f"{-n_pos}, got {outside or list(found)}."
        )
    return found
