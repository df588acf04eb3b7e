"""What does the model say to these prompts under these changes?

Every score in the package is an answer to this question: an evaluation asks it of one vector, a sweep of one vector at
many layers, a table of controls of thirty vectors, a composite of every basis vector. So there is one function,
:func:`score`, for all of them.

1. *Groups.* Prompts go in groups by the length of their answer, so that none is padded to the longest.
2. *Once.* Each group's prompts run once, in slices that fit the memory.
3. *Changes.* All changes of all prompts of a slice go up together, each from its first changed layer
   (:meth:`fvlens.suffix.SuffixRun.under`).
4. *Outcomes.* At the prompt's last token the rank and log-probability of the answer's first token and the best token;
   behind it the ranks and log-probabilities of the answer's other tokens, given those before.

Where that is not exact (hooks of the user's, an architecture without an exact route, a steering at a hook that the
engine has no site for), whole passes under hooks give the same numbers, one change after another; the result's ``path``
says so. These whole passes are the standing oracle of the engine: ``path="naive"`` asks for them.

One definition of right: the rank of an answer's token counts the tokens with a larger logit, and those with an equal
logit and a smaller id. Right means rank 0, so predictions, ranks and ``argmax`` never disagree. A whole answer is right
if each of its tokens is, given those before: then, and only then, the model writes it greedily.
"""

from fvlens.scoring._changes import ablation, as_edits, changed
from fvlens.scoring._score import note_other_bos, score
from fvlens.scoring._scores import Change, Scores
from fvlens.scoring._suffix import by_answer_length
from fvlens.scoring._whole_passes import Batch, context_batches

__all__ = [
    "Batch",
    "Change",
    "Scores",
    "ablation",
    "as_edits",
    "by_answer_length",
    "changed",
    "context_batches",
    "note_other_bos",
    "score",
]
