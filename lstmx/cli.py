"""The command ``lstmx``: argument parsing only.

Exit codes: 0 done; 2 what was asked for cannot be done, and the message says what to change; 130
stopped by Ctrl-C; 1 anything else. ``LSTMX_TRACEBACK=1`` shows where an error comes from.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"The command lstmx needs a package that is not there ({error.name}): "
        "pip install lstmx[text]"
    ) from error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Command = TypeVar("Command", bound=Callable[..., None])


def _command(name: str | None = None) -> Callable[[Command], Command]:
    """A command that tells what the text modules refuse in a line, with exit code 2."""

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except (ValueError, OSError, RuntimeError) as error:
                if os.environ.get("LSTMX_TRACEBACK") == "1" or not _is_refusal(error):
                    raise
                _print_error(_described(error))
                raise typer.Exit(2) from error

        app.command(name)(run)
        return function

    return register


def _is_refusal(error: Exception) -> bool:
    """Whether the message is meant for who gave the command, and not for who wrote it."""
    from lstmx.text.checkpoints import RunError

    if isinstance(error, BrokenPipeError):  # of "| head"
        return False
    return not isinstance(error, RuntimeError) or isinstance(error, RunError)


def _described(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; make room and try again, nothing was overwritten" if full else ""
    return f"{where}{error.strerror or error}{advice}"


def _print_error(message: str) -> None:
    # A line stays a line: it may be searched for.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(message)}")


@app.callback()
def _main() -> None:
    """Fused LSTM and GRU kernels for PyTorch, and the AWD-LSTM on top of them."""


def _file(help: str) -> Any:
    return typer.Option(dir_okay=False, writable=True, help=help)


def _directory(help: str) -> Any:
    return typer.Option(file_okay=False, writable=True, help=help)


def _accelerator(name: str) -> str:
    if name not in ("cpu", "gpu", "auto"):
        raise typer.BadParameter(f"accelerator must be cpu, gpu or auto, got {name!r}")
    if name == "gpu" and not torch.cuda.is_available():
        raise typer.BadParameter("accelerator gpu needs a GPU, and torch sees none")
    return name


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
    accelerator: Annotated[
        str, typer.Option(callback=_accelerator, help="cpu, gpu or auto.")
    ] = "cpu",
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
            names,
            seeds,
            backend=backend,
            accelerator=accelerator,
            progress=progress,
            checkpoint=checkpoint,
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


Split = Literal["train", "valid", "test"]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="The folder of a run, or a saved model.")
]


@_command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="Folder with train.txt, valid.txt and test.txt; or a data set.")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    kind: Annotated[
        Literal["word", "raw-word", "bpe"],
        typer.Option(help="Split at spaces; into words and punctuation; into parts of words."),
    ] = "word",
    min_count: Annotated[int, typer.Option(min=1, help="Rarer words become <unk>.")] = 1,
    max_size: Annotated[int | None, typer.Option(help="Largest vocabulary.")] = None,
    lowercase: Annotated[bool, typer.Option(help="Make capitals small.")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Use the vocabulary of this run, model or prepared folder."),
    ] = None,
) -> None:
    """Make token ids of a text, for training."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    from lstmx.text import commands, corpus, report

    given = None if tokenizer is None else commands.load_tokenizer(tokenizer)
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(highlight=False, soft_wrap=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("preparing", total=None)
        made = corpus.prepare(
            source,
            folder,
            kind=kind,
            min_count=min_count,
            max_size=max_size,
            lowercase=lowercase,
            tokenizer=given,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console.print(report.corpus_table(made))


@_command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="What to train: a file in TOML or YAML."),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run.")] = Path("run"),
    corpus: Annotated[
        Path | None, typer.Option(help="Instead of CONFIG: train a language model on this.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Instead of CONFIG: train a classifier on these.")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="Begin with this language model, a run or a file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: train.lr=0.01"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only look for a learning rate, and draw it.")
    ] = False,
) -> None:
    """Train a language model, or a classifier that begins with one."""
    from lstmx.text import commands, fit, report
    from lstmx.text import pictures as draw

    chosen = commands.make_config(
        config,
        out,
        corpus=corpus,
        documents=documents,
        pretrained=pretrained,
        settings=settings or (),
        resume=resume,
    )
    console = Console(highlight=False, soft_wrap=True)
    if find_lr:
        search = fit.find_lr(chosen)
        draw.save(draw.learning_rates(search), out / "learning-rate.png")
        console.print(f"the loss falls fastest at a learning rate of {search.suggestion:.2g}")
        console.print(f"picture: {out / 'learning-rate.png'}")
        return
    progress = report.TrainingProgress(console)
    try:
        with progress:
            result = fit.fit(chosen, out, resume=resume, callbacks=[progress])
    except SystemExit as error:  # Lightning's, after Ctrl-C
        if not progress.interrupted:
            raise
        again = f"lstmx train --out {out} --resume"
        saved = (out / fit.CHECKPOINT).is_file()
        _print_error(f"stopped; {'to go on: ' + again if saved else 'nothing was saved yet'}")
        raise typer.Exit(130) from error
    if int(os.environ.get("RANK", 0)) == 0:
        console.print(report.run_summary(result))


@_command()
def evaluate(
    model: ModelArgument,
    source: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="Prepared folder, or labelled documents.")
    ],
    split: Annotated[Split, typer.Option(help="What part of it.")] = "test",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Of a language model, the parts that a text is read in: 1."),
    ] = None,
    bptt: Annotated[int, typer.Option(min=1, help="Steps at a time.")] = 70,
    json: JsonFile = None,
) -> None:
    """Measure a model: loss and perplexity, or accuracy."""
    from lstmx.environment import write_json
    from lstmx.text import commands, report

    done = commands.evaluate_on(model, source, split=split, batch_size=batch_size, bptt=bptt)
    console = Console(highlight=False)
    console.print(report.evaluation_table(done, f"{model} on {source}, {split}"))
    if json is not None:
        write_json(report.evaluation_json(done, model, source, split), json)
        console.print(f"numbers: {json}")


@_command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The beginning; without one, a new line.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Words to write.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, help="Lower is safer; 0 takes the most probable word.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among so many most probable words only.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the words that make up this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text.")] = None,
) -> None:
    """Let a language model write, word by word."""
    from lstmx.text import commands

    network, tokenizer = commands.load_language_model(model)
    begin = commands.read_prompt(tokenizer, prompt)
    pieces = commands.continue_prompt(
        network,
        tokenizer,
        begin,
        count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if begin.unknown:
        note = f"{begin.unknown} of the prompt's {len(begin.ids)} words are not in the vocabulary"
        Console(stderr=True, highlight=False).print(f"note: {note}", style="yellow")
    typer.secho(prompt, dim=True, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@_command()
def classify(
    model: ModelArgument,
    documents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT|FILE|-]...",
            help="A text; a file, which is one document; or -, a document in each line of stdin.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each, with all probabilities.")
    ] = False,
) -> None:
    """Tell the classes of documents."""
    from lstmx.text import commands, report

    texts = commands.read_inputs(documents or ["-"], sys.stdin)
    for result in commands.classify(model, texts):
        typer.echo(report.classified_json(result) if json else report.classified_line(result))


@_command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A file of fastai or awd-lstm-lm; or with --to, one of ours.")
    ],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    to: Annotated[
        Literal["fastai", "awd-lstm-lm"] | None, typer.Option(help="Write this program's format.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="The words: fastai's pickle, or a .txt with a word a line."),
    ] = None,
) -> None:
    """Carry a language model over from fastai or awd-lstm-lm, or to them."""
    from lstmx.text import commands

    if to is None:
        commands.import_model(source, target, vocabulary)
    else:
        commands.export_model(source, target, to, vocabulary)
    Console(highlight=False, soft_wrap=True).print(f"model: {target}")


@_command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, callback=_plot, help="The picture: RUN/curves.png"),
    ] = None,
) -> None:
    """Draw the learning curves of runs."""
    from lstmx.text import fit
    from lstmx.text import pictures as draw

    path = out or runs[0] / "curves.png"
    draw.save(draw.training_curves({str(run): fit.read_log(run) for run in runs}), path)
    Console(highlight=False, soft_wrap=True).print(f"picture: {path}")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
