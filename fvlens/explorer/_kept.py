"""A prompt that was run once, and what it continues with under one vector after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fvlens.interventions import inject
from fvlens.metrics import best_tokens
from fvlens.models import in_front, model_device
from fvlens.prompts import Template
from fvlens.scoring import as_edits
from fvlens.suffix import SuffixRun, choose_route, open_reader, run_prefix
from fvlens.vectors import FunctionVector


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The most probable next tokens of one prompt, under several vectors.

    Attributes:
        words: text of each token that is listed.
        tokens: their ids.
        probability: of each token, a row a vector.
    """

    words: tuple[str, ...]
    tokens: Int[Tensor, " token"]
    probability: Float[Tensor, "vector token"]

    def best(self, row: int) -> str:
        """The most probable of the listed tokens under a vector."""
        return self.words[int(self.probability[row].argmax())]


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """A prompt whose keys, values and residual streams are kept, so that a vector costs its last token alone.

    Attributes:
        model: the model.
        tokens: the prompt, with what the template puts in front.
        run: what was kept; None where no exact route is there, and every vector takes a whole pass.
    """

    model: Any
    tokens: Int[Tensor, "1 pos"]
    run: SuffixRun | None

    @classmethod
    def of(cls, model: Any, text: str, template: Template, *, asked: bool) -> "KeptPrompt":
        """Run a prompt once.

        Args:
            model: the model.
            text: the prompt.
            template: says what stands in front, and how a word is asked.
            asked: the text is a word to ask in the template, without demonstrations.

        Raises:
            ValueError: an empty prompt, one that is too long for the context, or a word that the tokenizer does not
                know.
        """
        if not text.strip():
            raise ValueError("the prompt is empty; type a word or some text.")
        written = template.bare(text.strip()) if asked else text
        tokenizer = model.tokenizer
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        _check_known(tokenizer, text, ids)
        tokens = torch.tensor([[*in_front(model, template.bos, ids), *ids]])
        if tokens.shape[1] > model.cfg.n_ctx:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens, but the model's context holds {model.cfg.n_ctx}; shorten it."
            )
        route, _ = choose_route(model, None)
        run = None if route == "naive" else run_prefix(model, tokens, torch.ones_like(tokens), path=route)
        return cls(model, tokens, run)

    def probabilities(self, vectors: Sequence[FunctionVector | None]) -> Float[Tensor, "vector d_vocab"]:
        """Probability of every next token under each vector; None stands for the model as it is.

        ``softmax(logits(x_last + v))``, where v is added after its layer at the prompt's last token.

        Raises:
            ValueError: a vector of another model.
        """
        with torch.no_grad():
            if self.run is None:
                return torch.stack([self._whole_pass(vector) for vector in vectors])
            variants = [as_edits(self.model, vector, 1.0, 1) for vector in vectors]
            resid = self.run.under([variant for variant in variants if variant is not None])
            return self.run.logits(resid[0, :, 0]).float().softmax(dim=-1).cpu()

    def _whole_pass(self, vector: FunctionVector | None) -> Float[Tensor, " d_vocab"]:
        tokens = self.tokens.to(model_device(self.model))

        def read() -> Tensor:
            logits = open_reader(self.model, 1, keep=False).read(tokens, torch.ones_like(tokens), n_read=1)
            return logits[0, -1].float().softmax(dim=-1).cpu()

        if vector is None:
            return read()
        with inject(self.model, vector):
            return read()

    def next_tokens(self, vectors: Sequence[FunctionVector | None], k: int = 5) -> NextTokens:
        """The k best tokens under each vector, together: those of the first vector first, each once.

        Raises:
            ValueError: a vector of another model; k is out of range.
        """
        chances = self.probabilities(vectors)
        if not 1 <= k <= chances.shape[1]:
            raise ValueError(f"next_tokens: expected k between 1 and {chances.shape[1]}, got {k}.")
        ids = list(dict.fromkeys(best_tokens(chances, k).flatten().tolist()))
        words = tuple(self.model.tokenizer.decode([i]) for i in ids)
        return NextTokens(words, torch.tensor(ids), chances[:, ids])


def _check_known(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Refuse text that the tokenizer has no tokens for, with the words that it does not know."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids or tokenizer.unk_token in text:
        return
    words = [word for word in text.split() if unknown in tokenizer(" " + word, add_special_tokens=False)["input_ids"]]
    said = ", ".join(map(repr, words[:5])) or "some of this text"
    raise ValueError(f"the tokenizer does not know {said}; type words that the model has seen.")
