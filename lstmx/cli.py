"""The command ``lstmx``: argument parsing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(
        f"The command lstmx needs a package that is not there ({error.name}): "
        "pip install lstmx[text]"
    ) from error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    """Fused LSTM and GRU kernels for PyTorch, and the AWD-LSTM on top of them."""


def _file(help: str) -> Any:
    return typer.Option(dir_okay=False, writable=True, help=help)


def _directory(help: str) -> Any:
    return typer.Option(file_okay=False, writable=True, help=help)


def _plot(path: Path | None) -> Path | None:
    """Refuses a format before hours of training, and not after."""
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"name must end in .png, .svg or .pdf, got {str(path)!r}")
    return path


JsonFile = Annotated[Path | None, _file("Write all numbers to this file.")]
Seeds = Annotated[int, typer.Option(min=1, help="Train each model from this many seeds.")]
Threads = Annotated[
    int, typer.Option(min=1, help="The models are small: more threads are no faster.")
]


@app.command()
def env(
    shape: Annotated[
        list[str] | None, typer.Option(help="T,B,I,H: tell how it would be computed.")
    ] = None,
) -> None:
    """What is installed, whether it works, and which kernel a shape would take."""
    import argparse

    from lstmx.diagnostics import Shape, describe

    try:
        shapes = [Shape.parse(text) for text in shape or []]
    except argparse.ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error
    Console(highlight=False, soft_wrap=True).print(describe(shapes), markup=False)


@app.command()
def chapter(
    models: Annotated[str, typer.Option(help="Models to train, separated by commas.")] = "all",
    seeds: Seeds = 1,
    backend: Annotated[
        str, typer.Option(help="Recurrent layers: lstmx, torch, reference, cells or plain.")
    ] = "lstmx",
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(dir_okay=False, callback=_plot, help="Draw the learning curves there."),
    ] = None,
    pictures: Annotated[
        Path | None, _directory("Draw all of the chapter's pictures in this directory.")
    ] = None,
    checkpoint: Annotated[
        Path | None, _directory("Keep the trained models in this directory.")
    ] = None,
) -> None:
    """Train the models of fast.ai's chapter 12 and compare them with the book."""
    from lstmx.environment import write_json
    from lstmx.text import chapter as experiments
    from lstmx.text import pictures as draw
    from lstmx.text import report
    from lstmx.text.models import find_backend

    names = list(experiments.EXPERIMENTS)
    if models != "all":
        names = list(dict.fromkeys(name.strip() for name in models.split(",")))
    try:
        find_backend(backend)
        for name in names:
            experiments.find(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)

    console = Console(highlight=False)
    with report.progress_bar(console=console) as progress:
        results, continued = experiments.train_all(
            names, seeds, backend=backend, progress=progress, checkpoint=checkpoint
        )
    console.print(report.chapter_table(results))
    for name, text in continued.items():
        console.print(f"model {name} continues: [dim]{experiments.PROMPT}[/dim] {text}")
    if json is not None:
        write_json(report.chapter_json(results, backend), json)
        console.print(f"numbers: {json}")
    if plot is not None:
        draw.save(draw.learning_curves(results), plot)
        console.print(f"plot: {plot}")
    if pictures is not None:
        draw.save_all(pictures, results)
        console.print(f"pictures: {pictures}")
    if checkpoint is not None:
        console.print(f"checkpoints: {checkpoint}")


@app.command()
def memory(
    distances: Annotated[
        str, typer.Option(help="Words between name and question, separated by commas.")
    ] = "5,10,20,40,80,160",
    seeds: Seeds = 3,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(dir_okay=False, callback=_plot, help="Draw accuracy by distance there."),
    ] = None,
) -> None:
    """How long RNN, LSTM and GRU remember a name."""
    from rich.progress import Progress

    from lstmx.environment import write_json
    from lstmx.text import memory as task
    from lstmx.text import pictures as draw
    from lstmx.text import report

    try:
        lengths = [int(distance) for distance in distances.split(",")]
        if min(lengths) < 0:
            raise ValueError
    except ValueError as error:
        raise typer.BadParameter(
            f"distances must be numbers from 0 on, got {distances!r}"
        ) from error
    torch.set_num_threads(threads)

    console = Console(highlight=False)
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=len(lengths) * len(task.CELLS) * seeds)
        results = task.sweep(lengths, seeds, lambda _: progress.advance(bar))
    console.print(report.memory_table(results))
    if json is not None:
        write_json(report.memory_json(results), json)
        console.print(f"numbers: {json}")
    if plot is not None:
        draw.save(draw.memory(results), plot)
        console.print(f"plot: {plot}")


def main() -> None:
    """Entry point."""
    app()
