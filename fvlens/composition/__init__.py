"""Composite function vectors: a mixture of trained vectors that solves analogies whose relation was never trained.

For an analogy a : b :: c : ?, (1) the source pair is scored under every basis vector, ``s_i = log P(b | a; resid_l +=
v_i)``; (2) an affine map and a softmax turn scores into weights, ``w = softmax(M s + c)``; (3) the mixture ``sum_i w_i
v_i`` is injected on c. A gate (:func:`fit_gate`) says how strongly, or not at all.
"""

from fvlens.composition._answer import Answered, answer_analogy
from fvlens.composition._build import STARTS, Start, library_analogies, library_composite, library_parts
from fvlens.composition._evaluate import (
    CONTROLS,
    AnalogyEvaluation,
    PairedComparison,
    Scored,
    evaluate_analogies,
    leaks,
    mcnemar,
)
from fvlens.composition._fit_gate import fit_gate, gate_signals
from fvlens.composition._fit_map import default_rank, fit_composite
from fvlens.composition._gate import GATES, SIGNALS, Gate
from fvlens.composition._map import (
    MAPS,
    SCORES,
    CompositeMap,
    Explanation,
    FitHistory,
    Seen,
)
from fvlens.composition._options import Fitting, FittingOptions
from fvlens.composition._queries import ANALOGY_SETTINGS, Queries, SourceScores, source_scores
from fvlens.composition._rules import (
    RULES,
    best_single_weights,
    entmax_weights,
    softmax_weights,
    sparsemax_weights,
    top_k_weights,
    uniform_weights,
    weights_by,
)
from fvlens.composition._sensitivity import BasisStudy, Change, basis_study
from fvlens.composition._starts import basis_starts

__all__ = [
    "ANALOGY_SETTINGS",
    "CONTROLS",
    "GATES",
    "MAPS",
    "RULES",
    "SCORES",
    "SIGNALS",
    "STARTS",
    "AnalogyEvaluation",
    "Answered",
    "BasisStudy",
    "Change",
    "CompositeMap",
    "Explanation",
    "FitHistory",
    "Fitting",
    "FittingOptions",
    "Gate",
    "PairedComparison",
    "Queries",
    "Scored",
    "Seen",
    "SourceScores",
    "Start",
    "answer_analogy",
    "basis_starts",
    "basis_study",
    "best_single_weights",
    "default_rank",
    "entmax_weights",
    "evaluate_analogies",
    "fit_composite",
    "fit_gate",
    "gate_signals",
    "leaks",
    "library_analogies",
    "library_composite",
    "library_parts",
    "mcnemar",
    "softmax_weights",
    "source_scores",
    "sparsemax_weights",
    "top_k_weights",
    "uniform_weights",
    "weights_by",
]
