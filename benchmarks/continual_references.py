"""Plain loops for the methods of continual learning: what Seedbed's are compared with, in score and in CPU time.

Written with nothing but torch, for a stack of linear layers and images of one shape. Each gets the streams that
Seedbed's runs get (the same tasks, sizes and order of classes) and weights drawn from the same seed; the order of the
samples inside a task is drawn from the seed anew.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.continual.task import Task
from utils.training.prepared_data import PreparedData

BATCH, RATE = 128, 1e-3
EWC_WEIGHT, FISHER_SAMPLES = 30.0, 1000
ALPHA, BETA = 0.5, 0.5


@dataclass
class Reference:
    """What a plain loop reached."""

    rows: list[list[float]]
    """Accuracy on each task after each task."""
    cpu: float
    """CPU seconds of training, without measuring."""


class Reservoir:
    """Algorithm R (Vitter 1985) in its plainest form."""

    def __init__(self, capacity: int, outputs: int) -> None:
        """Start empty."""
        self.capacity, self.seen, self.outputs = capacity, 0, outputs
        self.images: Tensor | None = None

    def add(self, images: Tensor, labels: Tensor, logits: Tensor, task: int) -> None:
        """Offer a batch."""
        if self.images is None:
            self.images = torch.zeros(self.capacity, images.shape[1])
            self.labels = torch.zeros(self.capacity, dtype=torch.long)
            self.logits = torch.zeros(self.capacity, self.outputs)
            self.tasks = torch.zeros(self.capacity, dtype=torch.long)
        numbers = torch.arange(self.seen, self.seen + len(labels))
        drawn = (torch.rand(len(labels), dtype=torch.double) * (numbers + 1)).long()
        places = torch.where(numbers < self.capacity, numbers, drawn)
        self.seen += len(labels)
        for number in (places < self.capacity).nonzero().flatten().tolist():
            place = int(places[number])
            self.images[place], self.labels[place] = images[number], labels[number]
            self.logits[place], self.tasks[place] = logits[number], task

    def draw(self, count: int, before: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return some images, labels and logits, of all tasks or of those before one."""
        assert self.images is not None
        held = min(self.seen, self.capacity)
        chosen = torch.randperm(held)
        if before is not None:
            chosen = chosen[self.tasks[chosen] < before]
        chosen = chosen[:count]
        return self.images[chosen], self.labels[chosen], self.logits[chosen]


def fisher(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Return the exact diagonal Fisher of a stack of linear layers: mean over images, expectation over classes."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    inputs: list[Tensor] = []
    value = images
    with torch.no_grad():
        for layer in layers:
            inputs.append(value)
            value = layer(value)
            if layer is not layers[-1]:
                value = functional.relu(value)
        shares = value.softmax(1)
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for label in range(shares.shape[1]):
            error = functional.one_hot(torch.full((len(images),), label), shares.shape[1]) - shares
            for place in reversed(range(len(layers))):
                weighted = shares[:, label, None] * error.square()
                total[2 * place] += weighted.T @ inputs[place].square() / len(images)
                total[2 * place + 1] += weighted.mean(0)
                error = (error @ layers[place].weight) * (inputs[place] > 0)
    return total


def plain(method: str, model: nn.Sequential, data: PreparedData, tasks: Sequence[Task], seed: int, capacity: int
          ) -> Reference:  # fmt: skip
    """Train a model on a stream in one pass over each task, the way a paper's appendix would.

    Args:
        method: naive, joint, replay, der++, agem or ewc.
        model: A stack of linear layers with ReLU between them.
        data: The images.
        tasks: The stream.
        seed: Decides the order of the samples and what is drawn from the memory.
        capacity: Samples in the memory.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    memory = Reservoir(capacity, int(model[-1].out_features))
    parts = [task.shown({n: t[task.train] for n, t in data.train.items()}) for task in tasks]
    streams = [(part["pixel_values"].flatten(1), part["labels"]) for part in parts]
    if method == "joint":
        streams = [(torch.cat([x for x, _ in streams]), torch.cat([y for _, y in streams]))]
    held = [task.held_out(data).validation for task in tasks]
    importance: list[Tensor] = []
    anchor: list[Tensor] = []
    rows, cpu = [], 0.0
    for number, (images, labels) in enumerate(streams):
        started = time.process_time()
        order = torch.randperm(len(labels))
        for start in range(0, len(labels), BATCH):
            chosen = order[start : start + BATCH]
            x, y = images[chosen], labels[chosen]
            answers = model(x)
            loss = functional.cross_entropy(answers, y)
            if memory.seen and method == "replay":
                old, wanted, _ = memory.draw(BATCH)
                loss = loss + functional.cross_entropy(model(old), wanted)
            if memory.seen and method == "der++":
                old, _, logits = memory.draw(BATCH)
                loss = loss + ALPHA * functional.mse_loss(model(old), logits)
                old, wanted, _ = memory.draw(BATCH)
                loss = loss + BETA * functional.cross_entropy(model(old), wanted)
            if number and method == "agem":
                old, wanted, _ = memory.draw(BATCH, before=number)
                optimizer.zero_grad()
                functional.cross_entropy(model(old), wanted).backward()
                towards = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.zero_grad()
            loss.backward()
            if number and method == "agem":
                own = torch.cat([p.grad.flatten() for p in model.parameters()])
                product, sizes = own @ towards, [p.numel() for p in model.parameters()]
                if product < 0:
                    own -= product / (towards @ towards) * towards
                    for p, part in zip(model.parameters(), own.split(sizes), strict=True):
                        p.grad.copy_(part.view_as(p))
            if importance:
                with torch.no_grad():
                    for p, weight, place in zip(model.parameters(), importance, anchor, strict=True):
                        p.grad += EWC_WEIGHT * weight * (p - place)
            optimizer.step()
            if method in ("replay", "der++", "agem"):
                memory.add(x, y, answers.detach(), number)
        if method == "ewc":
            found = fisher(model, images[torch.randperm(len(images))[:FISHER_SAMPLES]])
            now = [p.detach().clone() for p in model.parameters()]
            if importance:
                whole = [a + b for a, b in zip(importance, found, strict=True)]
                anchor = [
                    torch.where(w > 0, (a * p + b * q) / w.clamp(min=1e-30), q)
                    for w, a, p, b, q in zip(whole, importance, anchor, found, now, strict=True)
                ]
                importance = whole
            else:
                importance, anchor = found, now
        cpu += time.process_time() - started
        with torch.no_grad():
            rows.append(
                [
                    float((model(one["pixel_values"].flatten(1)).argmax(1) == one["labels"]).double().mean())
                    for one in held
                ]
            )
    return Reference(rows, cpu)
