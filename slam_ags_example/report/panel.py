"""One panel of a figure: colours and style, and the way to a self-contained SVG element."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "PURPLE",
    "VERMILLION",
    "Panel",
    "draw_panel",
    "looks",
]

# Okabe and Ito's colours, which stay apart in every common colour blindness.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
BLUE, VERMILLION, GREEN, PURPLE = _COLOURS[:4]
GREY = "#777777"
_LINES = ("-", "--", ":", "-.")
_WIDTH_IN, _HEIGHT_IN, _LEGEND_ROW_IN = 4.2, 2.5, 0.17
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "font.size": 9,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Panel:
    """A figure as an <svg> element, and its caption."""

    svg: Markup
    caption: str


def draw_panel(draw: Callable[[Axes], None], title: str, caption: str) -> Panel:
    """Draw one panel, with a legend below it of what ``draw`` gave labels.

    Args:
        draw: draws into the axes.
        title: what the upright axis shows; stands above it, where it takes no width.
        caption: of the figure, a sentence or more.
    """
    # The salt makes the same figure the same file, and two figures share no element's id.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        n_entries = len(axes.get_legend_handles_labels()[1])
        if n_entries:
            n_columns = 3 if n_entries == 3 else 2
            figure.legend(loc="outside lower center", ncols=n_columns, frameon=False)
            figure.set_figheight(_HEIGHT_IN + _LEGEND_ROW_IN * -(-n_entries // n_columns))
        return Panel(_svg(figure), caption)


def _svg(figure: Figure) -> Markup:
    """The figure as an <svg> element, without prologue, metadata and numbered group names."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return Markup(re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", text[text.index("<svg") :]))


def looks() -> Iterator[tuple[str, str]]:
    """Colour and line style of each task in turn, without end; the first 28 pairs all differ."""
    return zip(cycle(_COLOURS), cycle(_LINES))
