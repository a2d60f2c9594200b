"""Checkpoints from which a run resumes exactly, and the best model so far.

Lightning's checkpoints have the weights, the optimiser, the schedule and the counts of its loops.
:class:`StreamState` adds what a recurrent net on a stream needs, :class:`CheckpointFile` writes and
reads the file, and :class:`Keeper` says when.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import callbacks as pl_callbacks
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map_only

from lstmx.text.optimisers import NTASGD
from lstmx.text.storage import save_model
from lstmx.text.tokenizer import Tokenizer
from lstmx.text.training import ModelResetter

MODEL = "model.safetensors"
CHECKPOINT = "last.ckpt"


class RunError(RuntimeError):
    """A run cannot begin, go on or be resumed; the message says why and what to do."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the one before is still there."""


class StreamState(ModelResetter):
    """What Lightning leaves out of a checkpoint, so that a run resumes exactly.

    That is, of each process: the model's state in the stream, and the states of the random number
    generators of Python and torch; and the position of the loader.

    Args:
        loader: has ``state_dict`` and ``load_state_dict``; the same for all processes.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._loader = loader
        self._random: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        h = getattr(pl_module.model, "h", None)
        own = {"h": tree_map_only(Tensor, Tensor.cpu, h), "python": random.getstate()}
        own["torch"] = torch.get_rng_state()
        own["cuda"] = torch.cuda.get_rng_state() if pl_module.device.type == "cuda" else None
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, own)
        checkpoint["stream"] = {"loader": self._loader.state_dict(), "processes": states}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        stream = checkpoint["stream"]
        if len(stream["processes"]) != trainer.world_size:
            raise CheckpointError(
                f"the run was made by {len(stream['processes'])} processes and must be resumed by "
                f"as many, got {trainer.world_size}"
            )
        try:
            self._loader.load_state_dict(stream["loader"])
        except ValueError as error:
            raise CheckpointError(f"the checkpoint does not fit the data: {error}") from error
        self._random = stream["processes"][trainer.global_rank]
        if self._random["h"] is not None:
            pl_module.model.h = tree_map_only(
                Tensor, lambda t: t.to(pl_module.device), self._random["h"]
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # As late as possible: what is set up before may draw numbers, and DDP begins as all began.
        if not self._random:
            if trainer.global_rank > 0:  # each process drops other units
                torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        else:
            random.setstate(self._random["python"])
            torch.set_rng_state(self._random["torch"])
            if self._random["cuda"] is not None:
                torch.cuda.set_rng_state(self._random["cuda"])
            self._random = {}


class CheckpointFile(TorchCheckpointIO):
    """Checkpoints that are written whole, read without executing anything, and fit the run.

    Lightning's own go by a temporary directory, which may be on another file system.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self._identity = identity

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint | {"run": self._identity}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {reason}; the one before it is kept: make "
                "room and resume"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (
            *(OSError, RuntimeError, EOFError, ValueError, NotImplementedError),
            *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
        ) as error:
            # torch's own words on the first, many lines of them, advise to execute the file.
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = "it has more than plain data" if unsafe else str(error)
            raise CheckpointError(
                f"{path} is no checkpoint, or is damaged: {reason}; train in another folder"
            ) from error
        if not isinstance(checkpoint, dict) or not {"run", "stream", "loops"} <= checkpoint.keys():
            raise CheckpointError(f"the checkpoint {path} is not one of a run")
        for name, value in self._identity.items():
            if checkpoint["run"].get(name) != value:
                raise CheckpointError(
                    f"the checkpoint {path} is of a run with another {name}: "
                    f"{checkpoint['run'].get(name)!r} there, {value!r} here"
                )
        return checkpoint


class Keeper(pl_callbacks.Checkpoint):
    """Writes ``last.ckpt`` every so many steps and after every epoch, and the best model.

    A callback of Lightning's kind Checkpoint runs after all others, early stopping among them.
    """

    def __init__(
        self, folder: Path, every: int, tokenizer: Tokenizer, classes: list[str] | None
    ) -> None:
        self.folder, self.every = folder, every
        self.tokenizer, self.classes = tokenizer, classes
        self.best_loss, self.best_epoch = math.inf, -1

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.best_epoch = state_dict["best_loss"], state_dict["best_epoch"]

    def _write(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # After the last batch of an epoch Lightning would resume without its validation.
        if trainer.global_step % self.every == 0 and not trainer.is_last_batch:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loss = float(trainer.callback_metrics["valid_loss"])
        if not math.isfinite(loss):
            raise RunError(
                f"the validation loss is {loss} after epoch {trainer.current_epoch}: training "
                "diverged. Lower train.lr or set train.clip"
            )
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, trainer.current_epoch
            if trainer.is_global_zero:
                self._write_model(trainer, pl_module)
        self._write(trainer)

    def _write_model(self, trainer: pl.Trainer, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        averaged = optimizer.averaged() if isinstance(optimizer, NTASGD) else nullcontext()
        with averaged:
            save_model(pl_module.model, self.folder / MODEL, self.tokenizer, classes=self.classes)


class EarlyStopping(pl_callbacks.EarlyStopping):
    """Does not train on when a run is resumed that it had stopped."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience
