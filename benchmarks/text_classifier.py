"""``python -m benchmarks.text_classifier TEXT BOOKS``: what is a language model worth?

A classifier is fine-tuned from a language model of TEXT by gradual unfreezing (ULMFiT: Howard &
Ruder 2018), and trained from scratch: the same sizes, vocabulary, documents, dropouts and number of
epochs, with all layers from the first one and one cycle of the learning rate. Each seed draws its
training documents. ``python -m benchmarks.king_james`` makes both folders; a program that was cut
off goes on where it was.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.language_model import (
    BUILD,
    BatchSize,
    Bptt,
    DropMult,
    Epochs,
    Json,
    Rate,
    Seeds,
    Size,
    Text,
    Threads,
    Tokens,
    Vocabulary,
    Work,
    console,
    finish,
    given_sizes,
    language_model_config,
    read_corpus,
)
from lstmx.text.classifier import TextClassifier
from lstmx.text.config import ClassifierConfig, Stage, parse_config
from lstmx.text.corpus import LabelledCorpus, LabelledSplit
from lstmx.text.fit import (
    CHECKPOINT,
    MODEL,
    evaluate_classifier,
    fit_classifier,
    fit_language_model,
    read_documents,
)
from lstmx.text.storage import load_model

STAGES = (Stage(2, 2e-2, 1), Stage(2, 1e-2, 2), Stage(6, 1e-2))
NAMES = ("fine-tuned", "scratch")


def some_of_each(split: LabelledSplit, count: int, seed: int) -> LabelledSplit:
    """Documents of a split drawn at random, ``count`` of each class; 0: all.

    Raises:
        ValueError: a class has fewer.
    """
    if not count:
        return split
    draw = random.Random(seed)
    chosen: list[int] = []
    for label in split.labels.unique().tolist():
        indices = (split.labels == label).nonzero()[:, 0].tolist()
        if count > len(indices):
            raise ValueError(
                f"documents must be at most {len(indices)}, a class has no more; got {count}"
            )
        chosen += sorted(draw.sample(indices, count))
    return LabelledSplit([split.ids[i] for i in chosen], split.labels[chosen])


def classifier_config(
    books: Path, language_model: Path, batch_size: int, drop_mult: float, scratch_lr: float
) -> Iterator[tuple[str, ClassifierConfig]]:
    """The fine-tuned run, and the one from scratch."""
    epochs = sum(stage.epochs for stage in STAGES)
    # Lower rates for lower layers keep what they have learned: from scratch there is nothing.
    trains = (
        {"stages": [asdict(stage) for stage in STAGES]},
        {"stages": [{"epochs": epochs, "lr": scratch_lr}], "factor": 1.0},
    )
    for name, train in zip(NAMES, trains, strict=True):
        config = parse_config(
            {
                "kind": "classifier",
                "data": {"source": str(books), "batch_size": batch_size},
                "model": {
                    "pretrained": str(language_model),
                    "scratch": name == "scratch",
                    "drop_mult": drop_mult,
                },
                "train": {"accelerator": "cpu", "log_every": 1, **train},
            }
        )
        assert isinstance(config, ClassifierConfig)
        yield name, config


def _accuracy(config: ClassifierConfig, documents: LabelledCorpus, folder: Path) -> dict[str, Any]:
    """Trains, or goes on, and measures the model of the best epoch."""
    resume = (folder / CHECKPOINT).exists()
    result = fit_classifier(config, documents, folder, resume=resume)
    model = load_model(result.model).model
    assert isinstance(model, TextClassifier)
    return {
        "seed": config.train.seed,
        "best_epoch": result.best_epoch,
        "valid_accuracy": evaluate_classifier(model, documents.valid).accuracy,
        "test_accuracy": evaluate_classifier(model, documents.test).accuracy,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation, "by_seed": values}


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="test accuracy: mean ± standard deviation over seeds")
    for name in ("of each class", *NAMES, "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results:
        cells = [_spread([run["test_accuracy"] for run in row["runs"][name]]) for name in NAMES]
        cells.append(row["gain"])
        count = str(row["documents"] or "all")
        table.add_row(count, *(f"{c['mean']:.3f} ± {c['deviation']:.3f}" for c in cells))
    return table


def main(
    text: Text,
    books: Annotated[Path, typer.Argument(help="Folder with train.csv, valid.csv, test.csv.")],
    documents: Annotated[
        list[int],
        typer.Option(default_factory=lambda: [25], help="Of each class; 0: all."),
    ],
    work: Work = BUILD,
    tokens: Tokens = 0,
    vocabulary: Vocabulary = 4000,
    embedding: Size = 96,
    hidden: Size = 192,
    layers: Size = 2,
    batch_size: BatchSize = 32,
    bptt: Bptt = 70,
    epochs: Epochs = 1,
    lr: Rate = 1e-2,
    drop_mult: DropMult = 0.3,
    document_batch_size: BatchSize = 10,
    scratch_lr: Rate = 5e-3,
    seeds: Seeds = 3,
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """Train a language model, then classifiers that begin with it and classifiers that do not."""
    torch.set_num_threads(threads)
    corpus = read_corpus(text, work, tokens, vocabulary)
    model = {"drop_mult": drop_mult, **given_sizes(embedding, hidden, layers)}
    train = {"epochs": epochs, "lr": lr}
    config = language_model_config(text, model, batch_size, bptt, train)
    folder = work / f"classifier-{tokens}"
    lm = folder / "language-model"
    resume = (lm / CHECKPOINT).exists()
    trained = fit_language_model(config, corpus, lm, resume=resume)
    console.print(f"language model: validation loss {trained.valid_loss:.3f}")

    results = []
    for count in documents:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for seed in range(seeds):
            pairs = classifier_config(books, lm / MODEL, document_batch_size, drop_mult, scratch_lr)
            for name, plain in pairs:
                seeded = replace(plain, train=replace(plain.train, seed=seed))
                all_documents = read_documents(seeded, corpus.tokenizer)
                some = replace(all_documents, train=some_of_each(all_documents.train, count, seed))
                found = _accuracy(seeded, some, folder / f"{name}-{count}-{seed}")
                runs[name].append(found)
                console.print(count, name, found)
        test = [[run["test_accuracy"] for run in runs[name]] for name in NAMES]
        gain = _spread([ours - scratch for ours, scratch in zip(*test, strict=True)])
        results.append(
            {"documents": count, "training_documents": len(some.train), "runs": runs, "gain": gain}
        )
    console.print(_table(results))
    settings = {
        **model,
        "vocabulary": len(corpus.tokenizer),
        "tokens": len(corpus.split("train")),
        "batch_size": batch_size,
        "bptt": bptt,
        **train,
        "document_batch_size": document_batch_size,
        "stages": [asdict(stage) for stage in STAGES],
        "scratch_lr": scratch_lr,
    }
    sizes = {name: len(getattr(some, name)) for name in ("valid", "test")}
    counts = some.test.labels.bincount()
    data = {
        "classes": some.classes,
        **{f"{name}_documents": size for name, size in sizes.items()},
        "largest_class_of_test": float(counts.max() / counts.sum()),
    }
    result = {
        "settings": settings,
        "data": data,
        "language_model": {"valid_loss": trained.valid_loss},
        "results": results,
    }
    finish(result, json, "text_classifier")


if __name__ == "__main__":
    typer.run(main)
