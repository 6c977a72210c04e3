"""What all figures share: style, colours that differ in lightness, the same bytes for the same data."""

from __future__ import annotations

import io
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

DPI = 300

PLAIN = "#C44E00"
NORMALIZED = "#0B4F8A"

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "butt",
    # Letters as outlines: the file looks the same where the fonts are missing.
    "svg.fonttype": "path",
    # The same figures give the same bytes.
    "svg.hashsalt": "batchnorm",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.07))
    FigureCanvasAgg(figure)
    return figure


def grouped_steps(axes: Axes) -> None:
    """Numbers on the axis of steps as 10,000."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def saved(figure: Figure) -> dict[Literal["png", "svg"], bytes]:
    """The bytes of a PNG and of an SVG file."""
    return {"png": _saved(figure, "png"), "svg": _saved(figure, "svg")}


def _saved(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    buffer = io.BytesIO()
    dated = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=dated)
    return buffer.getvalue()
