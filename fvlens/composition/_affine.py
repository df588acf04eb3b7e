"""What is trained of a composite: modules from scaled source scores to weights."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fvlens.composition._rules import weights_by

RECOGNITION_L2 = 1e-4
"""Weight of the squared entries of M while a transfer map learns to recognise relations."""


class Affine(nn.Module):
    """``rule(M s + c)`` with M in one of four shapes, plus the factor on the mixture.

    Scores are centred and scaled by what training saw, so that one learning rate fits all; :meth:`folded` gives the
    plain M and c.
    """

    def __init__(
        self, map: str, scores: Float[Tensor, "row relation"], rule: str, rank: int, learn_strength: bool
    ) -> None:
        super().__init__()
        self.map, self.rule = map, rule
        n = scores.shape[1]
        scaled = map == "lowrank"
        self.centre, self.spread = scale_of(scores) if scaled else (torch.zeros(n), torch.ones(n))
        self.shift = nn.Parameter(torch.zeros(n), requires_grad=map != "none")
        self.log_strength = nn.Parameter(torch.zeros(()), requires_grad=learn_strength)
        if map == "diagonal":
            self.scale = nn.Parameter(torch.ones(n))
        elif map == "full":
            self.change = nn.Parameter(torch.zeros(n, n))
        elif map == "lowrank":
            standard = (scores - self.centre) / self.spread
            directions = torch.linalg.svd(standard, full_matrices=False).Vh[:rank]
            self.right = nn.Parameter(directions.clone())
            self.left = nn.Parameter(torch.zeros(n, len(directions)))

    def matrix(self) -> Float[Tensor, "relation relation"]:
        """M over the scaled scores."""
        n = len(self.shift)
        if self.map == "diagonal":
            return torch.diag(self.scale)
        if self.map == "full":
            return torch.eye(n) + self.change
        if self.map == "lowrank":
            return self.left @ self.right
        return torch.eye(n)

    def penalty(self, scores: Float[Tensor, "row relation"]) -> Tensor:
        """Squared distance of M and c from the start, the ridge's term."""
        change = {"diagonal": lambda: self.scale - 1, "full": lambda: self.change, "lowrank": self.matrix}[self.map]()
        return change.square().sum() + self.shift.square().sum()

    def forward(self, scores: Float[Tensor, "row relation"]) -> Float[Tensor, "row relation"]:
        """Weights, times the strength."""
        affine = ((scores - self.centre) / self.spread) @ self.matrix().T + self.shift
        return self.log_strength.exp() * weights_by(self.rule, affine)

    def strength(self) -> float:
        """Factor on the mixture."""
        return float(self.log_strength.detach().exp())

    def folded(self) -> tuple[Float[Tensor, "relation relation"], Float[Tensor, " relation"]]:
        """M and c over plain scores."""
        return folded(self.matrix().detach(), self.shift.detach(), self.centre, self.spread)


class Transfer(nn.Module):
    """``T rule(M s + c)``: M and c say which basis relation a source pair shows, T what is then injected.

    ``T = b 1 + F G + R``: b is one number (less than 0 where a demonstration's own code stands in the way), column f
    of F the signed weights that sources of group f share (G is 1 where a basis relation is of a group), R what a single
    source relation adds to them. Only T is trained here, from 0; the ridge is on what R injects.
    """

    def __init__(
        self, matrix: Float[Tensor, "relation relation"], shift: Float[Tensor, " relation"], rule: str,
        basis: Float[Tensor, "relation d_model"], groups: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__()
        self.recognition, self.rule, self.basis = (matrix, shift), rule, basis
        names = sorted(set(groups))
        self.members = torch.stack([torch.tensor([group == name for group in groups]) for name in names]).float()
        n = len(shift)
        self.same = nn.Parameter(torch.zeros(()))
        self.shared = nn.Parameter(torch.zeros(n, len(names)))
        self.own = nn.Parameter(torch.zeros(n, n))

    def recognised(self, scores: Float[Tensor, "row relation"]) -> Float[Tensor, "row relation"]:
        matrix, shift = self.recognition
        return weights_by(self.rule, scores @ matrix.T + shift)

    def transfer(self) -> Float[Tensor, "relation relation"]:
        """T."""
        return self.same * torch.eye(len(self.own)) + self.shared @ self.members + self.own

    def penalty(self, scores: Float[Tensor, "row relation"]) -> Tensor:
        """Mean squared length of what R injects."""
        return (self.recognised(scores) @ self.own.T @ self.basis).square().sum(dim=1).mean()

    def forward(self, scores: Float[Tensor, "row relation"]) -> Float[Tensor, "row relation"]:
        """Signed weights."""
        return self.recognised(scores) @ self.transfer().T

    def strength(self) -> float:
        """Factor on the mixture; T has a scale of its own."""
        return 1.0

    def folded(self) -> tuple[Float[Tensor, "relation relation"], Float[Tensor, " relation"]]:
        """M and c over plain scores."""
        return self.recognition


def scale_of(scores: Float[Tensor, "row relation"]) -> tuple[Float[Tensor, " relation"], Float[Tensor, " relation"]]:
    """Mean and deviation of every score."""
    return scores.mean(dim=0), scores.std(dim=0, correction=0).clamp(min=1e-3)


def folded(matrix: Tensor, shift: Tensor, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """``M (s - centre) / spread + c`` as a matrix and a shift over plain scores."""
    plain = matrix / spread
    return plain, shift - plain @ centre


def recognition(
    scores: Float[Tensor, "row relation"], labels: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "relation relation"], Float[Tensor, " relation"]]:
    """M and c with which ``softmax(M s + c)`` names the relation of a source pair: multinomial logistic regression.

    ``L = mean of -log softmax(M z + c)[label] + 1e-4 |M|^2`` over rows, z the scaled scores; convex, by L-BFGS.

    Args:
        scores: of the source pairs.
        labels: place of each pair's relation in the basis.

    Returns:
        M and c over plain scores.
    """
    n = scores.shape[1]
    centre, spread = scale_of(scores)
    standard = (scores - centre) / spread
    matrix, shift = torch.zeros(n, n, requires_grad=True), torch.zeros(n, requires_grad=True)

    def loss() -> Tensor:
        logits = standard @ matrix.T + shift
        return nn.functional.cross_entropy(logits, labels) + RECOGNITION_L2 * matrix.square().sum()

    minimise(loss, [matrix, shift])
    return folded(matrix.detach(), shift.detach(), centre, spread)


def minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
    """Bring a convex loss to its minimum by L-BFGS, in place."""
    optimiser = torch.optim.LBFGS(list(parameters), max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        return float(found.detach())

    with torch.enable_grad():
        optimiser.step(closure)


def distinct(scores: Float[Tensor, "row relation"], labels: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Of the rows that have a label (not -1), the first of each with equal scores and label."""
    keep = torch.zeros(len(labels), dtype=torch.bool)
    known: set[tuple[int, bytes]] = set()
    for i, label in enumerate(labels.tolist()):
        key = (label, scores[i].numpy().tobytes())
        if label >= 0 and key not in known:
            known.add(key)
            keep[i] = True
    return keep
