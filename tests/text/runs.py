"""Small runs, and programs that train them in other processes."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl

from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.config import parse_config, write_config
from lstmx.text.optimisers import NTASGD
from lstmx.text.storage import save_model

NT_ASGD = {"optimizer": "nt-asgd", "lr": 10.0, "epochs": 4}
BOOKS = Path(__file__).parents[1] / "data" / "books"


class BeginAveraging(pl.Callback):
    """Begins NT-ASGD's averaging with the second epoch.

    When validation gets worse by itself differs from processor to processor.
    """

    def on_train_epoch_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, NTASGD) and trainer.current_epoch == 1:
                optimizer.param_groups[0]["averaged_steps"] = 0


def merged(values, changes):
    """Nested dictionaries, the second one's values first."""
    return values | {
        key: merged(values[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def language_model_run(corpus, **changes):
    """A run of seconds with everything that is random: dropout and lengths."""
    values = {
        "kind": "language-model",
        "data": {
            "source": str(corpus.folder),
            "batch_size": 32,
            "eval_batch_size": 8,
            "bptt": 20,
            "random_length": True,
        },
        "model": {"embedding": 16, "hidden": 24, "layers": 2},
        "train": {"epochs": 2, "lr": 0.02, "log_every": 1, "checkpoint_every": 7, "clip": 0.25},
    }
    return parse_config(merged(values, changes))


def classifier_run(corpus, folder, **changes):
    """A run on the passages of books, from a language model that has learned nothing yet."""
    sizes = AWDLSTMConfig(embedding=16, hidden=24, layers=2)
    pretrained = folder / "pretrained.safetensors"
    save_model(AWDLSTMLanguageModel(len(corpus.tokenizer), sizes), pretrained, corpus.tokenizer)
    values = {
        "kind": "classifier",
        "data": {"source": str(BOOKS), "batch_size": 10},
        "model": {"pretrained": str(pretrained), "hidden": [12]},
        "train": {
            "stages": [
                {"epochs": 1, "lr": 0.02, "unfrozen": 1},
                {"epochs": 1, "lr": 0.01, "unfrozen": 2},
                {"epochs": 1, "lr": 0.005},
            ],
            "seed": 1,
            "log_every": 1,
            "checkpoint_every": 4,
        },
    }
    return parse_config(merged(values, changes))


PROGRAM = """
import os, signal, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from lstmx.text.config import read_config
from lstmx.text.fit import fit

sys.path.insert(0, sys.argv.pop(1))
from runs import BeginAveraging

torch.set_num_threads(1)
config, folder, kill_at, resume = sys.argv[1:]

class Kill(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

resume = resume == "resume"
callbacks = [Kill(), BeginAveraging()]
fit(read_config(Path(config)), Path(folder), resume=resume, callbacks=callbacks)
sys.stdout.flush()
os._exit(0)  # a process group's thread sometimes aborts the interpreter's exit
"""


def fit_elsewhere(config, folder, *, kill_at=-1, processes=0, resume=False):
    """Trains in another process, or in some under torchrun; returns the finished one."""
    program = folder.with_name("program.py")
    program.write_text(PROGRAM)
    path = folder.with_name(f"{folder.name}.toml")
    write_config(config, path)
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [
        program,
        Path(__file__).parent,
        path,
        folder,
        kill_at,
        "resume" if resume else "begin",
    ]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def without_time(log):
    """The rows of a log, but for what no two runs have in common."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log]
