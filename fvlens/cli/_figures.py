"""``--figure`` of the commands: what they show as a figure in a file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fvlens.plots import Figure


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """Whether and how what a command shows is drawn.

    Attributes:
        figure: Also draw what is shown, in a file that ends in .html, .svg, .pdf or .png.
        width: Of the figure: page (700 pixels) or column (3.3 inches).
        dark: The figure in light on dark.
    """

    figure: Path | None = None
    width: Literal["page", "column"] = "page"
    dark: bool = False

    def __post_init__(self) -> None:
        if self.figure is None and (self.width != "page" or self.dark):
            raise ValueError("--width and --dark are of a figure; say where it goes with --figure FILE.")
        if self.figure is not None:  # before the work
            from fvlens.plots import check_figure_file

            check_figure_file(self.figure)

    def draw(self, make: "Callable[[], Figure]") -> list[Path]:
        """Make the figure and write it, if one is wanted: the files."""
        if self.figure is None:
            return []
        return [make().save(self.figure, width=self.width, theme="dark" if self.dark else "light")]
