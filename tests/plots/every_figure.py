"""One figure of each kind, by the name of its function, with a given title."""

import torch

from fvlens import plots

AIE = torch.tensor([[0.01, -0.02, 0.3], [0.0, 0.125, -0.4]])
NUMBERS = [0.2, 0.5, 0.9]
LOW, HIGH = [0.1, 0.4, 0.8], [0.3, 0.6, 1.0]
SERIES = dict(train_loss=[3.0, 1.0, 0.5], valid_loss=[3.0, 1.5, 1.25], valid_top1=[0.1, 0.5, 0.4])
NAMES = ["no vector", "a random vector of the same norm", "vector"]

FIGURES = {
    "heatmap": lambda title: plots.heatmap(AIE, stderr=AIE.abs() / 9, outlined=[(0, 2)], title=title),
    "direct_map": lambda title: plots.direct_map(AIE, AIE[:, 0], {"embedding": 0.1}, total=0.2, title=title),
    "line_sweep": lambda title: plots.line_sweep(
        [0, 1, 2], NUMBERS, LOW, HIGH, x_title="Layer", y_title="Top-1", references={"10-shot": 0.9}, marked=1,
        title=title,
    ),
    "curves": lambda title: plots.curves(
        [1, 5, 20], {"train": NUMBERS, "test": LOW}, {"train": (LOW, HIGH)}, x_title="Pairs", y_title="Top-1",
        note="Bands: words", title=title,
    ),
    "bars": lambda title: plots.bars(NAMES, NUMBERS, LOW, HIGH, x_title="Top-1", title=title),
    "decoded": lambda title: plots.decoded([" a", "\n"], [1.0, 0.5], title=title),
    "similarity": lambda title: plots.similarity(torch.eye(3), ["a", "b", "c"], title=title),
    "relation_map": lambda title: plots.relation_map(AIE, ["a", "b"], ["x", "y", "z"], n_chosen=1, title=title),
    "shares": lambda title: plots.shares(AIE.abs(), ["a", "b"], ["x", "y", "z"], title=title),
    "dots": lambda title: plots.dots(
        NUMBERS, HIGH, ["a", "b", "c"], groups=["x", "y", "x"], rings=("ring", LOW), x_title="One", y_title="Other",
        title=title,
    ),
    "distribution": lambda title: plots.distribution(["L0H1", "L1H0"], [NUMBERS, LOW], x_title="CIE", title=title),
    "token_bars": lambda title: plots.token_bars(NUMBERS, ["big", ":", "\n"], ["input", "mark", "mark"], title=title),
    "token_map": lambda title: plots.token_map(AIE, ["layer 1", "layer 0"], ["big", ":", "\n"], title=title),
    "place_map": lambda title: plots.place_map(
        torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 0.0]]), ["a", "b", "c"], groups=["x", "y", "x"], title=title
    ),
    "paired_bars": lambda title: plots.paired_bars([" a", "\n", " b"], NUMBERS, LOW, title=title),
    "training_curves": lambda title: plots.training_curves(
        **SERIES, norm=[1.0, 2.0, 3.0], cosine=[1.0, 0.9, 0.8], marked=1, title=title
    ),
}  # fmt: skip
