"""``python -m benchmarks.language_model``: the AWD-LSTM on our kernels and on torch.nn's.

Both are the same model with the same weights; torch's layers get their weight dropout put on from
outside. ``speed`` times whole training steps and their parts, ``curves`` trains both from several
seeds, and ``ablation`` trains ours without one thing at a time. TEXT is a folder with the files
train.txt, valid.txt and test.txt. A command that was cut off goes on where it was.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.providers import DroppedWeight
from lstmx.environment import environment, write_json
from lstmx.text import pictures
from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel, find_preset
from lstmx.text.batches import StreamBatches
from lstmx.text.config import LanguageModelConfig, parse_config, updated
from lstmx.text.corpus import Corpus, prepare
from lstmx.text.fit import CHECKPOINT, evaluate, fit_language_model, read_log
from lstmx.text.regularisers import (
    activation_regularisation,
    temporal_activation_regularisation,
)
from lstmx.text.storage import load_model

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console(width=110)

# ---- The same model on torch.nn ------------------------------------------------------------------


class TorchLayer(DroppedWeight):
    """A layer of torch.nn in the place of one of ours, with its weights.

    Args:
        layer: an ``lstmx.LSTM`` or ``lstmx.GRU`` of one direction.
    """

    def __init__(self, layer: Any) -> None:
        kind = nn.LSTM if isinstance(layer, nn.LSTM) else nn.GRU
        module = kind(layer.input_size, layer.hidden_size, batch_first=True)
        module.load_state_dict(layer.state_dict())
        super().__init__(module, layer.weight_dropout)

    def forward(self, x: Tensor, states: Any = None, *, lengths: None = None) -> Any:
        return super().forward(x, states)


def use_torch(model: AWDLSTMLanguageModel) -> AWDLSTMLanguageModel:
    """Exchanges the recurrent layers of a model, in place."""
    layers = [TorchLayer(layer) for layer in model.encoder.rnns]
    model.encoder.rnns = nn.ModuleList(layers)
    return model


class OnTorch(pl.Callback):
    """Trains on torch's layers."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        use_torch(pl_module.model)


BACKENDS: dict[str, list[pl.Callback]] = {"torch": [OnTorch()], "lstmx": []}

# ---- The text ------------------------------------------------------------------------------------


class Beginning:
    """A corpus with only the first tokens of its training text, and a tenth as many of others."""

    def __init__(self, corpus: Corpus, tokens: int) -> None:
        self.corpus, self.tokens, self.tokenizer = corpus, tokens, corpus.tokenizer

    def split(self, name: str) -> Tensor:
        ids = self.corpus.split(name)
        if not self.tokens:
            return ids
        return ids[: self.tokens if name == "train" else self.tokens // 10]


def read_corpus(text: Path, work: Path, tokens: int, vocabulary: int) -> Any:
    """The text in words and punctuation, prepared in ``work`` if it was not yet."""
    folder = work / f"corpus-{vocabulary}"
    if not folder.exists():
        prepare(text, folder, kind="raw-word", max_size=vocabulary)
    return Beginning(Corpus.open(folder), tokens)


def finish(result: dict[str, Any], json: Path | None, name: str = "language_model") -> None:
    """Writes what was measured with what it was measured on; ``name`` is the program's."""
    if json is not None:
        # Of a path that only this machine has, the last part.
        words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
        command = " ".join([f"python -m benchmarks.{name}", *words])
        write_json({"command": command, "environment": environment(), **result}, json)
        console.print(f"numbers: {json}")


# ---- Options -------------------------------------------------------------------------------------

Text = Annotated[Path, typer.Argument(help="Folder with train.txt, valid.txt, test.txt.")]
Work = Annotated[Path, typer.Option(help="Folder for the corpus and the runs.")]
Tokens = Annotated[
    int, typer.Option(min=0, help="Of the training text, and a tenth of the others; 0: all.")
]
Vocabulary = Annotated[int, typer.Option(min=10, help="Words at most.")]
Preset = Annotated[str, typer.Option(help="Dropouts and sizes: fastai_lm, merity_ptb, ...")]
Size = Annotated[int, typer.Option(min=0, help="In place of the preset's; 0: the preset's.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Bptt = Annotated[int, typer.Option(min=1)]
Threads = Annotated[int, typer.Option(min=1)]
Json = Annotated[Path | None, typer.Option(help="Write the numbers there.")]
Plot = Annotated[Path | None, typer.Option(help="Draw there.")]
BUILD = Path("build/language-model")


def given_sizes(embedding: int, hidden: int, layers: int) -> dict[str, int]:
    given = {"embedding": embedding, "hidden": hidden, "layers": layers}
    return {name: value for name, value in given.items() if value}


# ---- Speed ---------------------------------------------------------------------------------------


class Step:
    """Training steps of one model, as :class:`lstmx.text.training.StreamTask` does them."""

    def __init__(self, model: AWDLSTMLanguageModel, precision: str) -> None:
        self.model = model.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        self.precision = precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)

    def _context(self) -> Any:
        mixed = self.precision == "bf16-mixed"
        device = self.model.encoder.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16) if mixed else nullcontext()

    def whole(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        with self._context():
            raw, dropped = self.model.features(x)
            loss = self.model.loss(dropped, y)
            loss = loss + activation_regularisation(dropped, 2.0)
            loss = loss + temporal_activation_regularisation(raw, 1.0)
        loss.backward()
        self.optimise()

    def optimise(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self.optimizer.step()

    def layers(self, x: Tensor) -> None:
        """Forward and backward of the recurrent layers alone."""
        with self._context(), torch.no_grad():
            embedded = self.model.encoder.embedding(x)
        y = embedded.requires_grad_()
        with self._context():
            for layer in self.model.encoder.rnns:
                y, _ = layer(y, None, lengths=None)
        y.backward(torch.ones_like(y))

    def decoder(self, x: Tensor, y: Tensor) -> None:
        """Forward and backward of the decoder and the loss alone."""
        weight = self.model.encoder.embedding.weight
        dropped = torch.randn(*x.shape, self.model.config.embedding, device=weight.device)
        dropped = dropped.to(weight.dtype).requires_grad_()
        with self._context():
            loss = self.model.loss(dropped, y)
        loss.backward()


def _interleaved(
    calls: dict[Any, Callable[[], None]], count: int, device: str
) -> dict[Any, list[float]]:
    """Seconds of each call, which take turns; the first round is not counted."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for turn in range(count + 1):
        # Each goes first every other time.
        for key in sorted(calls, reverse=turn % 2 == 1):
            wait()
            start = time.perf_counter()
            calls[key]()
            wait()
            if turn > 0:
                times[key].append(time.perf_counter() - start)
    return times


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def _same_output(models: dict[str, AWDLSTMLanguageModel], x: Tensor) -> None:
    """In eval mode, before anything is timed."""
    outputs = []
    for model in models.values():
        model.eval()
        with torch.no_grad():
            outputs.append(model(x))
        model.reset()
        model.train()
    # On a GPU both multiply in TF32.
    tolerance = 1e-2 if x.is_cuda else 1e-4
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def _measure_speed(
    config: AWDLSTMConfig,
    corpus: Any,
    batch_size: int,
    bptt: int,
    precision: str,
    steps: int,
    device: str,
) -> dict[str, Any]:
    torch.manual_seed(0)
    words = len(corpus.tokenizer)
    models = {"lstmx": AWDLSTMLanguageModel(words, config)}
    models["torch"] = AWDLSTMLanguageModel(words, config)
    models["torch"].load_state_dict(models["lstmx"].state_dict())
    use_torch(models["torch"])
    for model in models.values():
        model.to(device)
    x, y = next(iter(StreamBatches(corpus.split("train"), batch_size, bptt)))
    x, y = x.to(device), y.to(device)
    _same_output(models, x)
    step = {name: Step(model, precision) for name, model in models.items()}
    calls: dict[Any, Callable[[], None]] = {}
    for name, one in step.items():
        calls["whole", name] = partial(one.whole, x, y)
        calls["layers", name] = partial(one.layers, x)
        calls["decoder", name] = partial(one.decoder, x, y)
        calls["optimiser", name] = one.optimise
    times = _interleaved(calls, steps, device)

    def ratio(part: str, name: str, of_part: str, of_name: str) -> list[float]:
        return [a / b for a, b in zip(times[part, name], times[of_part, of_name], strict=True)]

    result: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "ratio": _spread(ratio("whole", "torch", "whole", "lstmx")),
        "ratio_of_layers": _spread(ratio("layers", "torch", "layers", "lstmx")),
    }
    for name in step:
        result[name] = {
            "tokens_per_second": _spread([x.numel() / value for value in times["whole", name]]),
            "share": {
                part: statistics.median(ratio(part, name, "whole", name))
                for part in ("layers", "decoder", "optimiser")
            },
        }
    # If the layers took no time at all, and the rest as long as now.
    rest = 1 - result["torch"]["share"]["layers"]
    result["bound"] = 1 / rest if rest > 0 else None
    return result


def _speed_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="tokens per second: median and quartiles")
    for name in ("precision", "threads", "torch.nn", "lstmx", "ratio", "layers", "share", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results:
        rates = [row[name]["tokens_per_second"] for name in ("torch", "lstmx")]
        table.add_row(
            row["precision"],
            str(row["threads"]),
            *(f"{r['median']:.0f} ({r['low']:.0f}..{r['high']:.0f})" for r in rates),
            f"{row['ratio']['median']:.2f} ({row['ratio']['low']:.2f}..{row['ratio']['high']:.2f})",
            f"{row['ratio_of_layers']['median']:.2f}",
            f"{row['torch']['share']['layers']:.0%}",
            f"{row['bound']:.2f}" if row["bound"] else "",
        )
    table.caption = (
        "layers: ratio of the recurrent layers alone; share: theirs of torch's step; bound: the "
        "ratio if they took no time"
    )
    return table


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device cuda needs a GPU, and torch sees none")
    return name


def precisions_of_both() -> list[str]:
    """Under autocast torch's LSTM raises an error where oneDNN cannot multiply bfloat16."""
    mixed = ["bf16-mixed"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    return ["float32", *mixed]


@app.command()
def speed(
    text: Text,
    precision: Annotated[
        list[str],
        typer.Option(
            default_factory=precisions_of_both,
            help="float32, bf16-mixed (autocast), bf16-true (all in bfloat16).",
        ),
    ],
    threads: Annotated[list[int], typer.Option(default_factory=lambda: [1, 2])],
    steps: Annotated[int, typer.Option(min=2, help="Timed of each.")] = 9,
    device: Annotated[str, typer.Option(callback=_device, help="cpu or cuda.")] = "cpu",
    work: Work = BUILD,
    tokens: Tokens = 0,
    vocabulary: Vocabulary = 10_000,
    preset: Preset = "fastai_lm",
    embedding: Size = 0,
    hidden: Size = 0,
    layers: Size = 0,
    batch_size: BatchSize = 64,
    bptt: Bptt = 70,
    json: Json = None,
) -> None:
    """Time training steps on both, interleaved."""
    known = ("float32", "bf16-mixed", "bf16-true")
    for name in precision:
        if name not in known:
            raise typer.BadParameter(f"precision must be one of {', '.join(known)}, got {name!r}")
    sizes = given_sizes(embedding, hidden, layers)
    values = {"kind": "language-model", "data": {"source": str(text)}}
    config = parse_config(values | {"model": {"preset": preset, **sizes}})
    corpus = read_corpus(text, work, tokens, vocabulary)
    results = []
    for count in threads:
        torch.set_num_threads(count)
        for name in precision:
            results.append(
                _measure_speed(config.model.encoder, corpus, batch_size, bptt, name, steps, device)
            )
            console.print(_speed_table(results[-1:]))
    settings = {
        "preset": preset,
        **sizes,
        "vocabulary": len(corpus.tokenizer),
        "batch_size": batch_size,
        "bptt": bptt,
    }
    finish({"settings": settings, "results": results}, json)


# ---- Learning ------------------------------------------------------------------------------------


def _train(
    config: LanguageModelConfig, corpus: Any, folder: Path, callbacks: list[pl.Callback]
) -> dict[str, Any]:
    """Trains, or goes on, and returns the curves."""
    resume = (folder / CHECKPOINT).exists()
    result = fit_language_model(config, corpus, folder, resume=resume, callbacks=callbacks)
    log = read_log(folder)
    train: dict[float, list[float]] = {}
    for row in log:
        if "train_loss" in row:
            train.setdefault(row["epoch"], []).append(row["train_loss"])
    valid = {row["epoch"]: row["valid_loss"] for row in log if "valid_loss" in row}
    rates = [row["tokens_per_second"] for row in log if "tokens_per_second" in row]
    return {
        "seed": config.train.seed,
        "train_loss": [statistics.mean(train[epoch]) for epoch in sorted(valid)],
        "valid_loss": [valid[epoch] for epoch in sorted(valid)],
        "best_valid_loss": result.valid_loss,
        "tokens_per_second": statistics.median(rates),
    }


def _mean(values: list[float]) -> float:
    return statistics.mean(values)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _curves_figure(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training and validation loss by epoch: mean over seeds and their range."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    for axis, key in zip(axes, ("train_loss", "valid_loss"), strict=True):
        for name, of_name in runs.items():
            columns = list(zip(*(run[key] for run in of_name), strict=True))
            epochs = range(1, len(columns) + 1)
            (line,) = axis.plot(epochs, [_mean(list(c)) for c in columns], label=name)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(key.replace("_", " ").replace("valid", "validation") + " (nats)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False)
    figure.tight_layout()
    return figure


def _learning_table(runs: dict[str, list[dict[str, Any]]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("run")
    for name in ("best valid loss", "±", "test perplexity", "tokens/s"):
        table.add_column(name, justify="right")
    for name, of_name in runs.items():
        best = [run["best_valid_loss"] for run in of_name]
        test = [run["test_perplexity"] for run in of_name if "test_perplexity" in run]
        rate = _mean([run["tokens_per_second"] for run in of_name])
        cells = [f"{_mean(best):.4f}", f"{_deviation(best):.4f}"]
        table.add_row(name, *cells, f"{_mean(test):.2f}" if test else "", f"{rate:.0f}")
    return table


def language_model_config(
    text: Path, model: dict[str, Any], batch_size: int, bptt: int, train: dict[str, Any]
) -> LanguageModelConfig:
    config = parse_config(
        {
            "kind": "language-model",
            "data": {"source": str(text), "batch_size": batch_size, "bptt": bptt},
            "model": model,
            "train": {"accelerator": "cpu", "clip": 0.25, "log_every": 1, **train},
        }
    )
    assert isinstance(config, LanguageModelConfig)
    return config


def _seeded(config: LanguageModelConfig, seeds: int) -> Iterator[tuple[int, LanguageModelConfig]]:
    for seed in range(seeds):
        changed = updated(config, {"train.seed": seed})
        assert isinstance(changed, LanguageModelConfig)
        yield seed, changed


Epochs = Annotated[int, typer.Option(min=1)]
Seeds = Annotated[int, typer.Option(min=1, help="From 0 on.")]
Rate = Annotated[float, typer.Option(help="Peak of the one cycle.")]
DropMult = Annotated[float, typer.Option(help="Factor of all dropouts.")]


@app.command()
def curves(
    text: Text,
    work: Work = BUILD,
    tokens: Tokens = 0,
    vocabulary: Vocabulary = 10_000,
    preset: Preset = "fastai_lm",
    drop_mult: DropMult = 1.0,
    embedding: Size = 0,
    hidden: Size = 0,
    layers: Size = 0,
    batch_size: BatchSize = 64,
    bptt: Bptt = 70,
    epochs: Epochs = 5,
    lr: Rate = 5e-3,
    seeds: Seeds = 3,
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    threads: Threads = 2,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Train on both from several seeds: the same curves, but for the seeds' noise?"""
    torch.set_num_threads(threads)
    corpus = read_corpus(text, work, tokens, vocabulary)
    model = {"preset": preset, "drop_mult": drop_mult, **given_sizes(embedding, hidden, layers)}
    train = {"epochs": epochs, "lr": lr, "precision": precision}
    config = language_model_config(text, model, batch_size, bptt, train)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    for seed, seeded in _seeded(config, seeds):
        for name, callbacks in BACKENDS.items():
            folder = work / f"curves-{preset}-{precision}" / f"{name}-{seed}"
            runs[name].append(_train(seeded, corpus, folder, list(callbacks)))
            console.print(name, runs[name][-1]["valid_loss"])
    table = _learning_table(runs, f"{preset}, {precision}, {seeds} seeds")
    console.print(table)
    columns = {n: list(zip(*(r["valid_loss"] for r in runs[n]), strict=True)) for n in runs}
    difference = [
        {
            "difference": _mean(list(ours)) - _mean(list(theirs)),
            "deviation": (_deviation(list(theirs)) ** 2 + _deviation(list(ours)) ** 2) ** 0.5,
        }
        for theirs, ours in zip(columns["torch"], columns["lstmx"], strict=True)
    ]
    settings = {
        **model,
        "vocabulary": len(corpus.tokenizer),
        "tokens": len(corpus.split("train")),
        "batch_size": batch_size,
        "bptt": bptt,
        **train,
    }
    finish({"settings": settings, "runs": runs, "valid_loss_by_epoch": difference}, json)
    if plot is not None:
        pictures.save(_curves_figure(runs), plot)
        console.print(f"plot: {plot}")


NT_ASGD = {
    "train.optimizer": "nt-asgd",
    "train.lr": 30.0,
    "train.patience_of_averaging": 3,
    "data.random_length": True,
}
# What is changed, one thing at a time; but SGD goes with the paper's recipe.
ABLATIONS: dict[str, dict[str, Any]] = {
    "all (AdamW, one cycle)": {},
    "no dropout": {"model.drop_mult": 0.0},
    "no weight dropout": {"model.weight_p": 0.0},
    "no AR, no TAR": {"train.alpha": 0.0, "train.beta": 0.0},
    "NT-ASGD": NT_ASGD,
    "SGD without averaging": NT_ASGD | {"train.patience_of_averaging": 10**6},
}


@app.command()
def ablation(
    text: Text,
    work: Work = BUILD,
    tokens: Tokens = 0,
    vocabulary: Vocabulary = 10_000,
    preset: Preset = "fastai_lm",
    drop_mult: DropMult = 1.0,
    embedding: Size = 0,
    hidden: Size = 0,
    layers: Size = 0,
    batch_size: BatchSize = 64,
    bptt: Bptt = 70,
    epochs: Epochs = 10,
    lr: Rate = 5e-3,
    seeds: Seeds = 1,
    threads: Threads = 2,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Train ours without one thing at a time: does each of them help?"""
    torch.set_num_threads(threads)
    find_preset(preset)
    corpus = read_corpus(text, work, tokens, vocabulary)
    model = {"preset": preset, "drop_mult": drop_mult, **given_sizes(embedding, hidden, layers)}
    train = {"epochs": epochs, "lr": lr}
    base = language_model_config(text, model, batch_size, bptt, train)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ABLATIONS}
    for number, (name, changes) in enumerate(ABLATIONS.items()):
        for seed, config in _seeded(updated(base, changes), seeds):
            folder = work / f"ablation-{preset}" / f"{number}-{seed}"
            found = _train(config, corpus, folder, [])
            saved = load_model(folder / "model.safetensors")
            found["test_perplexity"] = evaluate(saved.model, corpus.split("test")).perplexity
            runs[name].append(found)
        console.print(_learning_table({name: runs[name]}, name))
    console.print(_learning_table(runs, f"{preset}, {seeds} seeds"))
    settings = {
        **model,
        "vocabulary": len(corpus.tokenizer),
        "tokens": len(corpus.split("train")),
        "batch_size": batch_size,
        "bptt": bptt,
        **train,
    }
    result = {"settings": settings, "changes": ABLATIONS, "runs": runs}
    finish(result, json)
    if plot is not None:
        pictures.save(_curves_figure(runs), plot)
        console.print(f"plot: {plot}")


if __name__ == "__main__":
    app()
