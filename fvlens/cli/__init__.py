"""Commands: ``fvlens run``, ``rerun``, ``diff``, ``universal``, ``compare``, ``study``, ``relations``, ``models``,
``heads``, ``inject``, ``compose``, ``analogy``, ``analogies``, ``sensitivity``, ``explain``, ``doctor``.

One file holds a group of commands. Options are made from the dataclasses of settings that they fill (``_options.py``);
whoever reads a file of vectors or heads loads the model that the file names (``_loading.py``). Words are explained in
one place (``_glossary.py``), which help pages end with. What a command found goes to standard output, what it guessed
and how far it is to standard error. Errors are one line with a hint and exit code 2, in the words of the command line
(``_errors.py``); ``--debug``, anywhere on the line, shows the traceback instead.
"""

import typer

from fvlens.cli._analogies import analogies, analogy, compose
from fvlens.cli._app import app, err, main, out
from fvlens.cli._diff import diff
from fvlens.cli._doctor import doctor
from fvlens.cli._explain import explain
from fvlens.cli._glossary import help_note
from fvlens.cli._heads import heads, universal
from fvlens.cli._inject import inject
from fvlens.cli._library import models
from fvlens.cli._relations import app as relations
from fvlens.cli._run import rerun, run
from fvlens.cli._studies import study, study_command
from fvlens.studies import STUDIES

__all__ = ["app", "err", "main", "out"]

# studies with a name of their own
compare, sensitivity = (study_command(STUDIES[name]) for name in ("compare", "sensitivity"))

COMMANDS = (
    run, rerun, diff, universal, compare, study, relations, models, heads, inject, compose, analogy, analogies,
    sensitivity, explain, doctor,
)  # fmt: skip
"""In the order in which the help lists them."""

for _command in COMMANDS:
    if isinstance(_command, typer.Typer):
        app.add_typer(_command)
    else:
        app.command(epilog=help_note(_command.__name__))(_command)
