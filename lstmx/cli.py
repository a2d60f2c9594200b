"""The command ``lstmx``: argument parsing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@app.command()
def chapter(
    models: Annotated[str, typer.Option(help="Models to train, separated by commas.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Train each model from this many seeds.")] = 1,
    backend: Annotated[
        str, typer.Option(help="Recurrent layers: lstmx, torch, reference, cells or plain.")
    ] = "lstmx",
    threads: Annotated[
        int, typer.Option(min=1, help="The models are small: more threads are no faster.")
    ] = 1,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the learning curves there.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Draw all of the chapter's pictures in this directory.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the trained models in this directory.")
    ] = None,
) -> None:
    """Train the models of fast.ai's chapter 12 and compare them with the book."""
    from lstmx.environment import write_json
    from lstmx.text import chapter as experiments
    from lstmx.text import pictures as draw
    from lstmx.text.generation import continue_text
    from lstmx.text.models import StatefulModel, find_backend

    console = Console()
    names = list(experiments.EXPERIMENTS) if models == "all" else models.split(",")
    try:
        find_backend(backend)
        for name in names:
            experiments.find(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)

    results: dict[str, list[experiments.Run]] = {}
    written: dict[str, str] = {}
    with experiments.progress_bar(console=console) as progress:
        for name in names:
            for seed in range(seeds):
                run, model = experiments.train(
                    name, seed, backend=backend, progress=progress, checkpoint=checkpoint
                )
                results.setdefault(name, []).append(run)
            if isinstance(model, StatefulModel) and name != "3":
                written[name] = continue_text(model, experiments.PROMPT, 24)
    console.print(experiments.table(results))
    for name, text in written.items():
        console.print(
            f"model {name} continues: [dim]{experiments.PROMPT}[/dim] {text}", highlight=False
        )
    if json is not None:
        write_json(experiments.as_json(results, backend), json)
        console.print(f"numbers: {json}", highlight=False)
    if plot is not None:
        draw.save(draw.learning_curves(results), plot)
        console.print(f"plot: {plot}", highlight=False)
    if pictures is not None:
        draw.save_all(pictures, results)
        console.print(f"pictures: {pictures}", highlight=False)
    if checkpoint is not None:
        console.print(f"checkpoints: {checkpoint}", highlight=False)


@app.command()
def memory(
    distances: Annotated[
        str, typer.Option(help="Words between name and question, separated by commas.")
    ] = "5,10,20,40,80,160",
    seeds: Annotated[int, typer.Option(min=1, help="Train each net from this many seeds.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="The nets are small.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy by distance there.")] = None,
) -> None:
    """How long RNN, LSTM and GRU remember a name."""
    from dataclasses import asdict

    from rich.progress import Progress
    from rich.table import Table

    from lstmx.environment import environment, write_json
    from lstmx.text import memory as task
    from lstmx.text import pictures as draw

    try:
        lengths = [int(distance) for distance in distances.split(",")]
        if min(lengths) < 0:
            raise ValueError
    except ValueError as error:
        raise typer.BadParameter(
            f"distances must be numbers from 0 on, got {distances!r}"
        ) from error
    torch.set_num_threads(threads)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=len(lengths) * len(task.CELLS) * seeds)
        results = task.sweep(lengths, seeds, lambda _: progress.advance(bar))
    table = Table(title="Accuracy, mean over seeds; guessing gives 0.125")
    table.add_column("distance", justify="right")
    for cell in task.CELLS:
        table.add_column(cell, justify="right")
    for distance in lengths:
        row = [
            [r.accuracy for r in results if (r.cell, r.distance) == (cell, distance)]
            for cell in task.CELLS
        ]
        table.add_row(str(distance), *(f"{sum(values) / len(values):.3f}" for values in row))
    console.print(table)
    if json is not None:
        write_json({"environment": environment(), "results": [asdict(r) for r in results]}, json)
        console.print(f"numbers: {json}", highlight=False)
    if plot is not None:
        draw.save(draw.memory(results), plot)
        console.print(f"plot: {plot}", highlight=False)


def main() -> None:
    """Entry point."""
    app()
