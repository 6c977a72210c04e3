"""The report of an experiment as one self-contained HTML file."""

from __future__ import annotations

import base64
import math
import shlex

from jinja2 import Environment, PackageLoader, StrictUndefined

from batchnorm.report.metrics import Metrics
from batchnorm.report.table import headline, tables


def page(metrics: Metrics, figure_svg: bytes) -> str:
    """The report of section 4.1 as HTML, with the figure in it.

    Args:
        metrics: of the experiment.
        figure_svg: ``figure_1(metrics)["svg"]``.
    """
    accuracy = metrics["summary"]["final_plain"]["mean"]
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("mnist.html.j2").render(
        metrics=metrics,
        headline=headline(metrics),
        tables=tables(metrics),
        figure=base64.b64encode(figure_svg).decode("ascii"),
        first_run=metrics["runs"][0],
        reached=min(run["steps"][-1] for run in metrics["runs"]),
        standard_error=math.sqrt(accuracy * (1 - accuracy) / metrics["data"]["test"]),
        command=_command(metrics),
    )


def _command(metrics: Metrics) -> str:
    """The command that repeats the run."""
    settings = metrics["settings"]
    options = {
        "--data": metrics["data"]["source"],
        "--steps": settings["steps"],
        "--lr": settings["learning_rate"],
        "--weight-std": settings["weight_std"],
        "--seed": settings["seeds"][0],
        "--seeds": len(settings["seeds"]),
        "--threads": settings["threads"],
    }
    return shlex.join(["batchnorm", "reproduce", *(word for pair in options.items() for word in map(str, pair))])
