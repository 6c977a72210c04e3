"""The command line: parse, call, print. What it calls is imported by each command, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"batchnorm {metadata.version('batchnorm')}")
        raise typer.Exit


@app.callback()
def batchnorm(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Batch normalization for PyTorch."""


@app.command()
def reproduce(
    data: Annotated[
        str, typer.Option(help="digits (scikit-learn's), mnist (from OpenML), or a folder with the four IDX files.")
    ] = "digits",
    steps: Annotated[int, typer.Option(help="Training steps of each network; the paper's are 50,000.")] = 50_000,
    lr: Annotated[float, typer.Option(help="Learning rate of both networks.")] = 0.1,
    weight_std: Annotated[float, typer.Option(help="Standard deviation of the Gaussian initial weights.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the mini-batches.")] = 0,
    seeds: Annotated[int, typer.Option(help="Number of runs, with this many seeds from --seed on.")] = 1,
    threads: Annotated[int, typer.Option(help="PyTorch's threads; one is fastest at this size.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("reproduction"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines in place of bar and tables.")] = False,
) -> None:
    """Section 4.1 of the paper: one network with and without batch normalization.

    Writes metrics.json, figure1.png, figure1.svg and report.html.
    """
    from rich.console import Console

    from batchnorm.experiments.mnist import Settings
    from batchnorm.experiments.reproduce import reproduce as run
    from batchnorm.report.terminal import Terminal

    settings = Settings(steps=steps, learning_rate=lr, weight_std=weight_std, seed=seed, seeds=seeds, threads=threads)
    terminal = Terminal(Console(), Console(stderr=True), quiet=quiet)
    raise typer.Exit(run(settings, data, out, terminal))
