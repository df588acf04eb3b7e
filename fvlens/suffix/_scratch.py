"""Memory that operations write to again and again."""

import torch
from jaxtyping import Float
from torch import Tensor


class Scratch:
    """Memory that wide results without gradients are written to again and again, for the time of one job.

    A CPU gives large blocks back to the system and takes fresh pages at each operation, which can cost as much as the
    product that fills them.

    Args:
        n_rows: rows of the largest results, where results grow.
    """

    def __init__(self, n_rows: int = 0) -> None:
        self._n_rows = n_rows
        self._kept: dict[tuple[str, torch.dtype, bool], Tensor] = {}

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether what is made of these rows may be written here: on a CPU, in full precision, without a gradient."""
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not x.requires_grad

    def rows(self, name: str, n_rows: int, width: int, like: Tensor, each: int = 1) -> Float[Tensor, "row out"]:
        """Memory for rows of this width, with whatever is in it: the same for a name until the job ends.

        Args:
            name: of the result.
            n_rows, width: its shape.
            like: gives its precision.
            each: rows of it for each row of the job.
        """
        key = (name, like.dtype, torch.is_inference_mode_enabled())
        kept = self._kept.get(key)
        if kept is None or len(kept) < n_rows * width:
            self._kept.pop(key, None)  # before the larger one is taken
            kept = self._kept[key] = like.new_empty(max(n_rows, each * self._n_rows) * width)
        return kept[: n_rows * width].view(n_rows, width)
