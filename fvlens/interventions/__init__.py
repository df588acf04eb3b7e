"""Add to activations (:func:`inject`) or overwrite them (:func:`ablate`) while a ``with`` block is open.

Which positions are touched
    A forward outside ``generate``: the last one (index -1), which is the last token of each LEFT-padded prompt.
    ``model.generate`` runs many forwards. With a key/value cache a hook sees ``[batch, T]``, then ``[batch, 1]`` for
    each new token; without one it sees ``T, T + 1, ...`` positions. In both, the prompt's last token is position
    ``T - 1``, and only that one is touched unless asked otherwise. Without a cache it is touched again in every
    forward, so that both ways compute the same thing. A batch that is padded on the right is refused.

Whom a block steers
    The thread and the asyncio task that opened it, nobody else: two threads may steer one model with different vectors
    at the same time, and a third one gets the plain model. Nobody waits on anybody. A task that is created inside a
    block, and whatever else runs in a copy of its context (``asyncio.to_thread``), is steered while the block is open.
    A copy of the model, or a pickled one, is not.

How it is done
    What a block does stands in a context variable, see :mod:`fvlens.interventions._context`; nothing of the model is
    changed but once a hook point: it gets one hook that asks the variable, and keeps it. Hooks that somebody else added
    run in the order of opening, stay when a block ends, and ``model.reset_hooks()`` does not end a block.
"""

from fvlens.interventions._bridges import part_threads
from fvlens.interventions._context import acting, acts_on, hooked, lock
from fvlens.interventions._names import resid_hook, resid_pre_hook, z_hook
from fvlens.interventions._steer import ablate, checked_additions, inject

__all__ = [
    "ablate",
    "acting",
    "acts_on",
    "checked_additions",
    "hooked",
    "inject",
    "lock",
    "part_threads",
    "resid_hook",
    "resid_pre_hook",
    "z_hook",
]
