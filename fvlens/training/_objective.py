"""The second seam of training: what is made small."""

import abc
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.metrics import is_best
from fvlens.training._change import Readout, Wants


class Objective(abc.ABC):
    """From what the model says under a change to a loss of each pair, and of a relation.

    Attributes:
        wants: what it has to be told beside the log-probabilities of answers.
    """

    wants = Wants()

    @abc.abstractmethod
    def per_pair(self, readout: Readout) -> Float[Tensor, " row"]:
        """What each row adds to the mean of its relation."""

    def of_mean(self, mean: Float[Tensor, " relation"]) -> Float[Tensor, " relation"]:
        """The loss of a relation from the mean over its pairs."""
        return mean

    def is_right(self, readout: Readout) -> Bool[Tensor, " row"]:
        """Whether each row counts as solved in validation: the answer's first token is the best one, and no NaN."""
        assert readout.first is not None
        return is_best(readout.first, readout.targets[:, 0].to(readout.first.device))

    def identity(self) -> dict[str, Any]:
        """What a saved training must have in common with this one, as plain JSON values."""
        return {"objective": type(self).__name__}


class CrossEntropy(Objective):
    """``-log P(y | x)`` in nats, summed over the answer's tokens."""

    def per_pair(self, readout: Readout) -> Float[Tensor, " row"]:
        return -readout.log_probs.sum(dim=1)

    def identity(self) -> dict[str, Any]:
        """Nothing beyond the settings' ``loss``."""
        return {}


class Perplexity(CrossEntropy):
    """The exponential of the mean over pairs of ``-log P(y | x)`` per token."""

    def per_pair(self, readout: Readout) -> Float[Tensor, " row"]:
        n_tokens = (readout.targets >= 0).sum(dim=1).to(readout.log_probs.device)
        return super().per_pair(readout) / n_tokens

    def of_mean(self, mean: Float[Tensor, " relation"]) -> Float[Tensor, " relation"]:
        return mean.exp()


OBJECTIVES: dict[str, Callable[[], Objective]] = {"cross_entropy": CrossEntropy, "perplexity": Perplexity}
"""The objectives that ``loss=`` names."""
