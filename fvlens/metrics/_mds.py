"""Points in the plane whose distances are as close as can be to given ones."""

import torch
from jaxtyping import Float
from torch import Tensor


def mds(
    distances: Float[Tensor, "n n"], *, most_steps: int = 300, tolerance: float = 1e-7
) -> tuple[Float[Tensor, "n 2"], float]:
    """Multidimensional scaling to two axes: places, and how far their distances are from the given ones.

    Starts at the classical solution (the two largest eigenvectors of the double-centred squares) and lowers the stress
    by the Guttman transform, which never raises it (SMACOF). The first axis is the longer one, and on each axis the
    coordinate of the largest size is positive, so that the same distances give the same map.

    Args:
        distances: symmetric, at least 0, 0 on the diagonal.
        most_steps: transforms at most.
        tolerance: stop when the stress falls by less.

    Returns:
        Places, and the stress ``sqrt(sum (d - distance)^2 / sum distance^2)``: 0 where the plane holds the distances.

    Raises:
        ValueError: distances that are not finite, not symmetric, below 0, or not 0 on the diagonal.

    Example:
        >>> import torch
        >>> from fvlens.metrics import mds
        >>> corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
        >>> places, stress = mds(torch.cdist(corners, corners))
        >>> torch.allclose(torch.cdist(places, places), torch.cdist(corners, corners), atol=1e-4), round(stress, 4)
        (True, 0.0)

    References:
        Borg and Groenen 2005, Modern Multidimensional Scaling, chapters 8 and 12.
    """
    wanted = distances.detach().cpu().double()
    scale = float(wanted.max()) if wanted.numel() else 0.0
    if not bool(wanted.isfinite().all()) or bool((wanted < 0).any()):
        raise ValueError("mds: expected finite distances of at least 0.")
    if float((wanted - wanted.T).abs().max()) > 1e-5 * scale or float(wanted.diagonal().max()) > 1e-3 * scale:
        raise ValueError("mds: expected symmetric distances that are 0 on the diagonal.")
    wanted = (wanted + wanted.T) / 2
    n = len(wanted)
    total = float((wanted**2).sum())
    if n < 2 or total == 0:
        return torch.zeros(n, 2), 0.0

    # the classical solution, in which distances are exact where they are Euclidean in the plane
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centring @ wanted**2 @ centring)
    places = torch.zeros(n, 2, dtype=torch.float64)
    kept = min(2, n)
    places[:, :kept] = (vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt()).flip(1)

    def stress(at: Tensor) -> float:
        return float(((torch.cdist(at, at) - wanted) ** 2).sum() / total) ** 0.5

    before = stress(places)
    for _ in range(most_steps):
        current = torch.cdist(places, places)
        ratio = torch.where(current > 0, wanted / current.clamp(min=1e-12), 0.0)
        moved = (ratio.sum(dim=1, keepdim=True) * places - ratio @ places) / n
        now = stress(moved)
        if before - now < tolerance:
            break
        places, before = moved, now

    # turned to its own axes, the longer one first
    places = places - places.mean(dim=0)
    turned = places @ torch.linalg.svd(places, full_matrices=False).Vh.T
    largest = turned.gather(0, turned.abs().argmax(dim=0, keepdim=True))
    turned = turned * torch.where(largest < 0, -1.0, 1.0)
    return turned.float(), before
