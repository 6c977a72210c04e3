"""The report of section 4.2 as one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
from typing import Any

from batchnorm.report.inception.metrics import PLAIN, Metrics
from batchnorm.report.inception.tables import headline, tables
from batchnorm.report.page import command, embedded, render


def page(metrics: Metrics, figure_2_svg: bytes, figure_4_svg: bytes) -> str:
    """The report as HTML, the figures inside it.

    Args:
        metrics: of the experiment.
        figure_2_svg, figure_4_svg: see ``figures``.
    """
    plain = metrics["summary"]["variants"].get(PLAIN)
    return render(
        "inception.html.j2",
        metrics=metrics,
        headline=headline(metrics),
        tables=tables(metrics),
        figure_2=embedded(figure_2_svg),
        figure_4=embedded(figure_4_svg),
        error_validation=_standard_error(plain["best"]["mean"], metrics["data"]["validation"]) if plain else None,
        error_test=(
            _standard_error(plain["test_accuracy"]["mean"], metrics["data"]["test"])
            if plain and plain["test_accuracy"]
            else None
        ),
        trained=sum(run["complete"] for run in metrics["runs"]),
        value=_value,
        command=_command(metrics),
    )


def _standard_error(accuracy: float, images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / images)


def _value(value: Any) -> str:
    """A setting as a reader writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _command(metrics: Metrics) -> str:
    settings = metrics["settings"]
    swept = settings["sweep"]
    return command(
        "batchnorm reproduce inception",
        {
            "--data": metrics["data"]["source"],
            "--steps": settings["steps"],
            "--seeds": len(settings["seeds"]),
            "--seed": settings["seeds"][0],
            "--ensemble": settings["ensemble"],
            "--batch-size": settings["batch_size"],
            "--width": settings["width"],
            "--size": settings["size"],
            "--scale": settings["scale"],
            "--lr": None if swept else settings["learning_rate"],
            "--decay": None if swept else settings["decay"],
            "--sweep": swept,
            "--device": settings["device"],
            "--processes": settings["processes"],
        },
    )
