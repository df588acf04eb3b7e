"""Every measurement over the library: a list of cells, what is measured in one, and tables over all.

:func:`run_study` runs the cells of a :class:`Study`, keeps each as it is finished, and goes on where it was stopped.
``fvlens study NAME`` is the command. A new study is a module with a :class:`Study` in it and one entry in
:data:`STUDIES`.
"""

from fvlens.studies._analogies import ANALOGIES
from fvlens.studies._bos import BOS
from fvlens.studies._claims import CLAIMS
from fvlens.studies._claims_size import CLAIMS_SIZE
from fvlens.studies._compare import COMPARE
from fvlens.studies._compute import COMPUTE
from fvlens.studies._measure import MEASURE
from fvlens.studies._measured import (
    measured_folder,
    pages,
    project_root,
    read_measured,
    root_for,
    take_kept_cells,
    write_measured,
)
from fvlens.studies._precision import PRECISION
from fvlens.studies._runner import Kept, Outcome, read_cell, run_study
from fvlens.studies._screening import SCREENING
from fvlens.studies._sensitivity import SENSITIVITY
from fvlens.studies._shelf import Part, Shelf
from fvlens.studies._start import START
from fvlens.studies._study import LOADING, Cell, Loaded, Row, Settings, Study, Value, plain
from fvlens.studies._trained import TRAINED
from fvlens.studies._universal import UNIVERSAL, heads_from

__all__ = [
    "LOADING",
    "STUDIES",
    "Cell",
    "Kept",
    "Loaded",
    "Outcome",
    "Part",
    "Row",
    "Settings",
    "Shelf",
    "Study",
    "Value",
    "heads_from",
    "measured_folder",
    "pages",
    "plain",
    "project_root",
    "read_cell",
    "read_measured",
    "root_for",
    "run_study",
    "take_kept_cells",
    "write_measured",
]

_LISTED = (
    UNIVERSAL, SCREENING, PRECISION, START, COMPUTE, BOS, MEASURE, CLAIMS, CLAIMS_SIZE, ANALOGIES, COMPARE, *TRAINED,
    SENSITIVITY,
)  # fmt: skip
STUDIES: dict[str, Study] = {study.name: study for study in _LISTED}
"""All studies by name, in the order in which they are listed."""
