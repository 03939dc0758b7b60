"""Trainers, modules and loaders as users write them, for the tests of the callback."""

import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.nn import functional

from tests.continual.toys import SPEC, net
from utils.continual.callback import ContinualCallback

TASKS = 3


class Lit(pl.LightningModule):
    """A user's own module: own step, own loss, own optimizer."""

    def __init__(self, model=None, rate=3e-3, fused=None):
        super().__init__()
        self.net = net() if model is None else model
        self.rate, self.fused = rate, fused

    def training_step(self, batch, number):
        return functional.cross_entropy(self.scores(self.net(batch[0])), batch[1])

    def scores(self, output):
        return output

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.0, fused=self.fused)


def made(method, module, seed=0, batch=None, **changes):
    return ContinualCallback({"method": method, "buffer": 60, **changes}, model=module.net,
                             task="image_classification", batch=batch, seed=seed, spec=SPEC)  # fmt: skip


def fit(module, loader, *callbacks, path=None, epochs=1, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[*callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=path)
    return trainer


def of_task(digits, number, split="train", count=None):
    """Return the images and labels of two digits."""
    samples = getattr(digits, split)
    rows = (samples["labels"] // 2 == number).nonzero().flatten()[:count]
    return samples["pixel_values"][rows], samples["labels"][rows]


def loader(digits, number, split="train", batch_size=16, count=None):
    """Return batches of a task in a fixed order."""
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*of_task(digits, number, split, count)), batch_size
    )


class Batches:
    """A loader that goes on where a checkpoint was written."""

    def __init__(self, batches):
        self.batches, self.at = list(batches), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for place in range(self.at % len(self.batches), len(self.batches)):
            self.at = place + 1
            yield self.batches[place]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def weights(module):
    return {name: value.clone() for name, value in module.net.state_dict().items()}


class Saving(pl.Callback):
    """Writes a checkpoint at one step of a fit."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def scaled(**options):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))]}
