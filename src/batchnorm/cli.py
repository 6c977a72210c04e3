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

        print(f"batchnorm {metadata.version('batchnorm')}")
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


@app.command()
def warmup(
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, float16 or float64; may be repeated. [default: float32]"),
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Also the kernels for masks and sample weights.")] = False,
) -> None:
    """Compile the CPU kernels ahead of time and keep them on disk."""
    import torch

    from batchnorm import warmup as warm

    names = dtype or ["float32"]
    found = [kind if isinstance(kind := getattr(torch, name, None), torch.dtype) else name for name in names]
    count = warm(found, masks=masks)  # type: ignore[arg-type]  # what is no dtype is refused by its name
    print(f"{count} kernels are ready")


@app.command()
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="Sizes of the input; may be repeated. [default: 32,64,56,56]")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16 or float64. [default: float32]")
    ] = None,
    layout: Annotated[list[str] | None, typer.Option(help="contiguous or channels_last. [default: contiguous]")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="forward, forward+backward or inference. [default: all three]")
    ] = None,
    extra: Annotated[list[str] | None, typer.Option(help="plain, relu or residual+relu. [default: plain]")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas between.")] = "1,all",
    peers: Annotated[str, typer.Option(help="Rivals among torch, compile, onednn.")] = "torch,compile,onednn",
    seconds: Annotated[float, typer.Option(help="Time for each case.")] = 2.0,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture: .png, .svg or .pdf.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines in place of tables.")] = False,
) -> None:
    """Speed and memory of the layers on this machine, against PyTorch and a copy."""
    from batchnorm.bench.command import bench as run

    raise typer.Exit(run(shape, dtype, layout, mode, extra, threads, peers, seconds, json, plot, quiet=quiet))
