"""The answer against its foils: which logits are compared, and along which direction of the normed residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.prompts import Prompts

FOILS = ("answers", "vocabulary")
_COLUMNS = 4096
"""Columns of an unembedding that are widened at once."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """The answer's logit minus the mean logit of the foils, a prompt a row; numbers in float64 on the CPU.

    Attributes:
        name: what the foils are.
        answers: first token of each answer.
        n_foils: foils of each prompt.
        tokens: tokens whose logits are compared, of all prompts together.
        columns: their unembeddings; behind them that of the mean logit, where the foils are the whole vocabulary.
        biases: their biases.
        weights: what the logit of each column counts.
    """

    name: str
    answers: Int[Tensor, " prompt"]
    n_foils: Int[Tensor, " prompt"]
    tokens: Int[Tensor, " token"]
    columns: Float[Tensor, "d_model column"]
    biases: Float[Tensor, " column"]
    weights: Float[Tensor, "prompt column"]

    @property
    def direction(self) -> Float[Tensor, "prompt d_model"]:
        """Along which the normed residual stream moves the difference."""
        return self.weights @ self.columns.T

    @property
    def bias(self) -> Float[Tensor, " prompt"]:
        """What the unembedding's bias gives to the difference."""
        return self.weights @ self.biases

    def rows(self, rows: slice) -> "Contrast":
        """That of some prompts."""
        shared = self.tokens, self.columns, self.biases
        return Contrast(self.name, self.answers[rows], self.n_foils[rows], *shared, self.weights[rows])


def contrast(model: Any, prompts: Prompts, foil: str | Sequence[str] | Int[Tensor, "prompt foil"]) -> Contrast:
    """The contrast that ``foil`` names; see :func:`~fvlens.attribution.direct_effects`.

    Raises:
        ValueError: a foil that is unknown, empty, or no token of the model; a prompt to which no foil is left.
    """
    answers, n_vocabulary = prompts.first_answer_token, model.W_U.shape[1]
    if isinstance(foil, str) and foil not in FOILS:
        raise ValueError(
            f"direct_effects: foil={foil!r}; expected 'answers', 'vocabulary', a list of words, or token ids for each "
            "prompt."
        )
    n_prompts = len(prompts)
    given = answers.unique().expand(n_prompts, -1) if isinstance(foil, str) else _given(model, n_prompts, foil)
    tokens = torch.cat([answers, given.flatten()]).unique()
    columns = model.W_U.detach()[:, tokens.to(model.W_U.device)].double().cpu()
    biases = model.b_U.detach()[tokens.to(model.b_U.device)].double().cpu()
    is_answer = tokens[None] == answers[:, None]
    if foil == "vocabulary":  # all but the answer: the mean over all of them, with the answer taken out again
        n_foils = torch.full_like(answers, n_vocabulary - 1)
        columns = torch.cat([columns, _mean_column(model.W_U)[:, None]], dim=1)
        biases = torch.cat([biases, model.b_U.detach().double().mean().cpu()[None]])
        whole = torch.full((n_prompts, 1), -n_vocabulary / (n_vocabulary - 1)).double()
        weights = torch.cat([is_answer * (1 + 1 / (n_vocabulary - 1)), whole], dim=1)
    else:
        is_foil = (given[:, :, None] == tokens).any(dim=1) & ~is_answer
        n_foils = is_foil.sum(dim=1)
        weights = is_answer.double() - is_foil.double() / n_foils[:, None]
    bare = (n_foils == 0).nonzero().flatten().tolist()
    if bare:
        raise ValueError(
            f"direct_effects: no wrong answer is left to {len(bare)} of {n_prompts} prompts (the first is {bare[0]}); "
            "give more prompts with other answers, other words as foil=, or foil='vocabulary'."
        )
    name = foil if isinstance(foil, str) else "given"
    return Contrast(name, answers, n_foils, tokens, columns, biases, weights)


def _given(model: Any, n_prompts: int, foil: Sequence[str] | Int[Tensor, "prompt foil"]) -> Int[Tensor, "prompt foil"]:
    """Token ids that were given as foils: as they are, or as words."""
    given = foil if isinstance(foil, Tensor) else torch.tensor([_first_token(model, word) for word in foil])
    given = given.cpu() if isinstance(foil, Tensor) else given.long().expand(n_prompts, -1)
    if len(given) != n_prompts or given.numel() == 0:
        raise ValueError(
            f"direct_effects: expected at least one word as foil, or token ids [prompt foil] for {n_prompts} prompts, "
            f"got shape {tuple(given.shape)}."
        )
    most = model.W_U.shape[1] - 1
    if int(given.min()) < 0 or int(given.max()) > most:
        raise ValueError(
            f"direct_effects: expected token ids in 0..{most} as foil, got {int(given.min())} to {int(given.max())}."
        )
    return given


def _first_token(model: Any, word: str) -> int:
    ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] if word.strip() else []
    if not ids:
        raise ValueError(f"direct_effects: expected words as foil, got {word!r}.")
    return int(ids[0])


def _mean_column(weight: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, " d_model"]:
    """Mean of all columns, summed in float64."""
    total = sum(some.detach().double().sum(dim=1) for some in weight.split(_COLUMNS, dim=1))
    assert isinstance(total, Tensor)
    return total.cpu() / weight.shape[1]
