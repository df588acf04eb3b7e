"""Activations of prompts: kept whole in a cache, or as means.

:func:`activation_cache` keeps what a model computes on prompts, with names for the axes, in memory or on the disk;
:func:`mean_head_activations` keeps the mean output of every head, in memory that does not grow with the prompts. Both
run the prompts by the same loop.
"""

from fvlens.activations._cache import ActivationCache
from fvlens.activations._make import activation_cache
from fvlens.activations._means import HeadMeans, mean_head_activations, mean_residuals
from fvlens.activations._positions import Positions, position_mask, position_names
from fvlens.activations._sites import SITES

__all__ = [
    "SITES",
    "ActivationCache",
    "HeadMeans",
    "Positions",
    "activation_cache",
    "mean_head_activations",
    "mean_residuals",
    "position_mask",
    "position_names",
]
