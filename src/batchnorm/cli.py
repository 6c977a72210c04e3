"""The command line: parse, call, print. Each command imports what it needs, so ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from batchnorm.report.terminal import Terminal

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


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _terminal(*, quiet: bool) -> Terminal:
    from rich.console import Console

    from batchnorm.report.terminal import Terminal

    return Terminal(Console(), Console(stderr=True), quiet=quiet)


@app.callback()
def batchnorm(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Batch normalization for PyTorch."""


reproductions = typer.Typer(invoke_without_command=True)
app.add_typer(reproductions, name="reproduce")


@reproductions.callback()
def reproduce(
    context: typer.Context,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines instead of a progress bar and tables.")] = False,
) -> None:
    """Section 4.1 of the paper: one network with and without batch normalization.

    Writes metrics.json, figure1.png, figure1.svg and report.html.
    """
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if _is_given(context, name)]
        if given:
            raise typer.BadParameter(
                f"{', '.join(given)} before {context.invoked_subcommand}: its options go after its name."
            )
        return

    from batchnorm.experiments.mnist import Settings
    from batchnorm.experiments.reproduce import reproduce as run

    settings = Settings(steps=steps, learning_rate=lr, weight_std=weight_std, seed=seed, seeds=seeds, threads=threads)
    raise typer.Exit(run(settings, data, out, _terminal(quiet=quiet)))


@reproductions.command()
def inception(
    data: Annotated[
        str | None,
        typer.Option(
            help="fashion-mnist (fetched from OpenML if this machine has none), a folder with the four IDX files, "
            "or one with train/CLASS and val/CLASS. [default: fashion-mnist, not fetched]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="500 steps, one seed, two networks together.")] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps of each network. [default: 1600]")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of runs, with as many seeds from --seed on. [default: 3]")
    ] = None,
    ensemble: Annotated[int | None, typer.Option(help="BN-x5 networks that answer together. [default: 3]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn at random.")] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try rates and decays for the plain network first, and take the best.")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the plain network. [default: the scale's]")] = None,
    decay: Annotated[
        float | None, typer.Option(help="Factor by which the rates fall over all steps. [default: the scale's]")
    ] = None,
    width: Annotated[float, typer.Option(help="Factor of the channels; 1 is the paper's.")] = 0.125,
    size: Annotated[int | None, typer.Option(help="Pixels of a side. [default: as the images are]")] = None,
    scale: Annotated[str, typer.Option(help="Values of section 4.2.1: small, or paper for ImageNet.")] = "small",
    batch_size: Annotated[int, typer.Option(help="Images of a mini-batch; the paper's are 32.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda if there is one]")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Networks trained at a time. [default: the processors, 1 on a GPU]")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode image files, for each network.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("reproduction-inception"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines in place of bar and tables.")] = False,
) -> None:
    """Section 4.2 of the paper: Inception and its batch-normalized variants on images.

    Writes metrics.json, figure2 and figure4 (.png, .svg) and report.html.
    """
    from batchnorm.experiments.inception.command import reproduce as run
    from batchnorm.experiments.inception.settings import settings_for

    settings = settings_for(
        quick=quick, steps=steps, seeds=seeds, ensemble=ensemble, seed=seed, sweep=sweep, learning_rate=lr, decay=decay,
        width=width, size=size, scale=scale, batch_size=batch_size, device=device, processes=processes,
    )  # fmt: skip
    raise typer.Exit(run(settings, data, out, _terminal(quiet=quiet), resume=resume, workers=workers))


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
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines instead of tables.")] = False,
) -> None:
    """Speed and memory of the layers on this machine, against PyTorch and a copy."""
    from batchnorm.bench.command import bench as run

    raise typer.Exit(run(shape, dtype, layout, mode, extra, threads, peers, seconds, json, plot, quiet=quiet))
