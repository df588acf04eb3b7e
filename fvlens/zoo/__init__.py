"""The embedded model: its recipe, its weights and its model card.

``rel-small/`` holds the shipped checkpoint in Hugging Face GPT-2 format; ``python -m fvlens.zoo.build`` trains it again
and ``python -m fvlens.zoo.measure`` measures the table of its card.
"""

from fvlens.zoo._table import mean_with_interval

__all__ = ["mean_with_interval"]
