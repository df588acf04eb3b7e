"""Whether something may be used on a model: it was made on this one, on the same weights in another form, or not."""

import warnings
from typing import Any

from fvlens.models._fingerprint import Fingerprint, fingerprint

OLD_MODELS = {
    "rel-small": {
        "b66b1881aba0d9a0",  # float32
        "23ff1aadd9acebb9",  # bfloat16
        "6239d31270fab665",  # float16
        "eeea5530450d193c",  # float64
    },
}
"""Hashes of embedded models of fvlens 0.1 that were trained anew since, by name."""

_FORM = {"weights", "dtype", "d_vocab"}
"""What may differ between two forms of the same weights."""


def check_model(made_on: Fingerprint, model: Any, what: str, *, again: str = "the call that made it") -> None:
    """Refuse a model that something was not made on.

    The same weights in another precision, saved in another form or with a resized vocabulary are allowed, with a
    warning.

    Args:
        made_on: the model that it was made on.
        model: the model that it is to be used on.
        what: what it is, for the message.
        again: what makes it again.

    Raises:
        ValueError: it was made on another model.
    """
    differences = told_apart(made_on, fingerprint(model), what, again=again)
    if differences:
        raise ValueError(
            f"{what} was made on model {made_on.name!r}, not on this one (vector / model: {'; '.join(differences)}); "
            "pass check=False to use it all the same."
        )


def told_apart(made_on: Fingerprint, now: Fingerprint, what: str, *, again: str = "the call that made it") -> list[str]:
    """What tells two models apart, empty for one model; a warning where they are two forms of the same weights.

    Raises:
        ValueError: the first is an embedded model of an earlier version that was trained anew.
    """
    differences = made_on.differences(now)
    if not differences:
        return []
    refuse_retrained(made_on, now, what, again=again)
    if not same_weights(made_on, now):
        return differences
    form = [line for line in differences if not line.startswith("weights:")] or ["saved in another form"]
    warnings.warn(
        f"{what} was made on the same weights in another form (then / now: {'; '.join(form)}); it is used as it is.",
        stacklevel=4,
    )
    return []


def refuse_retrained(made_on: Fingerprint, now: Fingerprint, what: str, *, again: str) -> None:
    """Refuse what was made on an embedded model that was trained anew, unless it is used on that very model.

    Raises:
        ValueError: it was.
    """
    if not made_on.differences(now):
        return
    for name, hashes in OLD_MODELS.items():
        if made_on.weights in hashes:
            raise ValueError(
                f"{what} was made on the {name} of fvlens 0.1, which was trained anew since, so that it means nothing "
                f"to the {name} of this version or to any other model; make it again with {again}."
            )


def same_weights(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same weights in two forms.

    In one precision and with one vocabulary all numbers must be the same. In two precisions, entries of every tensor
    rounded to the coarser of them; float16 and bfloat16 cannot be compared so, and count as different.
    """
    differing = {line.partition(":")[0] for line in one.differences(other)}
    if not one.forms or not other.forms or not differing <= _FORM:
        return False
    (whole, bfloat16, float16), (other_whole, other_bfloat16, other_float16) = one.forms.split(), other.forms.split()
    dtypes = {one.dtype, other.dtype}
    if len(dtypes) == 1 and one.d_vocab == other.d_vocab:
        return whole == other_whole
    return float16 == other_float16 if "float16" in dtypes else bfloat16 == other_bfloat16
