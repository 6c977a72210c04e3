"""Reports of experiments, each one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from batchnorm.report.metrics import Metrics
from batchnorm.report.table import headline, tables


def page(metrics: Metrics, figure_svg: bytes) -> str:
    """The report of section 4.1 as HTML, with the figure in it.

    Args:
        metrics: of the experiment.
        figure_svg: ``figure_1(metrics)["svg"]``.
    """
    settings = metrics["settings"]
    accuracy = metrics["summary"]["final_plain"]["mean"]
    return render(
        "mnist.html.j2",
        metrics=metrics,
        headline=headline(metrics),
        tables=tables(metrics),
        figure=embedded(figure_svg),
        first_run=metrics["runs"][0],
        reached=min(run["steps"][-1] for run in metrics["runs"]),
        standard_error=math.sqrt(accuracy * (1 - accuracy) / metrics["data"]["test"]),
        command=command(
            "batchnorm reproduce",
            {
                "--data": metrics["data"]["source"],
                "--steps": settings["steps"],
                "--lr": settings["learning_rate"],
                "--weight-std": settings["weight_std"],
                "--seed": settings["seeds"][0],
                "--seeds": len(settings["seeds"]),
                "--threads": settings["threads"],
            },
        ),
    )


def render(template: str, **values: object) -> str:
    """A template of this package, filled in. Every page extends ``frame.html.j2``."""
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def embedded(svg: bytes) -> str:
    """A figure as the address of an image that holds it whole."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def command(words: str, options: Mapping[str, object]) -> str:
    """What to type to run it again; options that are None are left out, those that are True have no value."""
    found = words.split()
    for name, value in options.items():
        if value is None or value is False:
            continue
        found += [name] if value is True else [name, str(value)]
    return shlex.join(found)
