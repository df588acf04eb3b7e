"""The embedded model: its recipe, its weights and its model card.

``rel-small/`` holds the shipped checkpoint in Hugging Face GPT-2 format; ``python -m fvlens.zoo.build`` trains it
again, ``fvlens study measure`` and ``fvlens study analogies`` measure what its card and the pages quote.
"""
