"""What is compared must have one length."""

from jaxtyping import Shaped
from torch import Tensor


def check_same_length(function: str, a: Shaped[Tensor, "*axes_a"], b: Shaped[Tensor, "*axes_b"]) -> None:
    """Raise ValueError unless two tensors have one shape."""
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: expected two tensors of one length, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "give the scores of the same things in the same order."
        )
