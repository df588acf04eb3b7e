"""Prompts: templates as data; clean, corrupted and zero-shot in-context prompts as tokens; what pairs are worth.

A prompt is BOS, then one demonstration per shot, then the query with its answer missing. What stands before words is
the template's: in the built-in ones a space, so that the answer is the continuation `` y`` and its first token decides
top-1. :func:`check_pairs` says beforehand how far that token tells answers apart.
"""

from fvlens.prompts._answers import AnswerEnd, answers_behind
from fvlens.prompts._chat import chat_template, template_for
from fvlens.prompts._check import AnswerTokens, PairsCheck, check_pairs, checked
from fvlens.prompts._prompts import (
    LABELS,
    PAD_ANSWER,
    Labels,
    Prompts,
    build_prompts,
    render_prompts,
    with_answers,
)
from fvlens.prompts._templates import (
    TEMPLATE_NAMES,
    TEMPLATES,
    Template,
    TokenClass,
    get_template,
    known_template,
    read_template,
    template_from,
    template_header,
    template_or,
    warn_of_bos,
)

__all__ = [
    "LABELS",
    "PAD_ANSWER",
    "TEMPLATES",
    "TEMPLATE_NAMES",
    "AnswerEnd",
    "AnswerTokens",
    "Labels",
    "PairsCheck",
    "Prompts",
    "Template",
    "TokenClass",
    "answers_behind",
    "build_prompts",
    "chat_template",
    "check_pairs",
    "checked",
    "get_template",
    "known_template",
    "read_template",
    "render_prompts",
    "template_for",
    "template_from",
    "template_header",
    "template_or",
    "warn_of_bos",
    "with_answers",
]
