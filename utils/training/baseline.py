"""A model against a plain transformer of its size: same batches, same settings, several seeds, no claim without proof.

The seed of a pair of runs decides the initial weights of both models and the order of the samples that both see, so
that their losses are compared in pairs. Models that transformers builds keep their own initial weights.
"""

import base64
import html
import inspect
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from utils.adapters import ModelAdapter, ModelSpec
from utils.loading import LoadedModel, load_model
from utils.runtime.errors import ConfigError, DataError, MissingPackageError
from utils.runtime.files import null_nonfinite, write_atomic
from utils.runtime.isolation import preserved
from utils.runtime.optional import require
from utils.runtime.progress import progress_bar
from utils.runtime.resources import format_count
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.fresh_model import NO_BUDGET, buildable, fresh_model, module_of
from utils.training.prepared_data import PreparedData
from utils.training.run import RECORD, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = {
    "causal_lm": "example:gpt",
    "masked_lm": "example:bert",
    "image_classification": "example:vit",
}
"""The plain transformer of each task."""
TOLERANCE = 0.05
"""Largest difference between the numbers of parameters, as a share."""
ASPECT = 32.0
"""Width per layer that a small transformer usually has."""
ROUNDS = 15
"""Timed steps of each model, taken in turns."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95% confidence interval, by Student's t."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} (95% interval {self.low:+.4f} to {self.high:+.4f}, {self.count} seeds)"


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean of ``first - second``; a single pair has an interval without ends.

    Raises:
        ValueError: There is no pair, or not the same number on both sides.
    """
    from scipy.special import stdtrit

    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("A difference needs at least one pair.")
    count, mean = len(differences), sum(differences) / len(differences)
    if count == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Contender:
    """One of the two models, over all seeds."""

    name: str
    parameters: int
    losses: tuple[float, ...]
    """Held-out loss at the end, one per seed."""
    curves: tuple[tuple[tuple[int, float], ...], ...]
    """Step and held-out loss of each measurement, one curve per seed."""
    step_seconds: float
    """Median time of a training step, the two models timed in turns."""
    step_flops: int | None
    """Multiplications and additions of matrix products in a training step; None when they cannot be counted."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "name": self.name, "parameters": self.parameters, "losses": list(self.losses),
            "curves": [[list(point) for point in curve] for curve in self.curves],
            "step_seconds": self.step_seconds, "step_flops": self.step_flops,
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Comparison:
    """A model beside a reference of its size."""

    model: Contender
    reference: Contender
    difference: Difference
    """Held-out loss of the model minus that of the reference; below zero the model is better."""
    data: str
    task: str
    seeds: tuple[int, ...]
    steps: int
    folder: Path
    reference_config: dict[str, Any]
    """Width, depth and the other settings of the reference."""

    @property
    def winner(self) -> str | None:
        """``model`` or ``reference``; None when the interval includes zero."""
        if self.difference.high < 0:
            return "model"
        return "reference" if self.difference.low > 0 else None

    @property
    def verdict(self) -> str:
        """What the numbers allow to say, in one sentence."""
        end = f"the held-out loss differs by {self.difference}"
        if len(self.seeds) == 1:
            return f"Nothing is shown with a single seed: {end}."
        if self.winner is None:
            return f"No difference is shown between {self.model.name} and a plain transformer of its size: {end}."
        better, worse = (
            (self.model.name, "a plain transformer of its size")
            if self.winner == "model"
            else ("A plain transformer of its size", self.model.name)
        )
        return f"{better} is better than {worse} after {self.steps} steps: {end}."

    @property
    def time_ratio(self) -> float:
        """Time of a step of the model, over that of the reference."""
        return self.model.step_seconds / self.reference.step_seconds

    def _rows(self) -> list[list[str]]:
        rows = [["", "model", "reference"]]
        pair = (self.model, self.reference)
        rows.append(["class", *(c.name for c in pair)])
        rows.append(["parameters", *(format_count(c.parameters) for c in pair)])
        rows += [[f"held-out loss, seed {s}", *(f"{c.losses[i]:.4f}" for c in pair)] for i, s in enumerate(self.seeds)]
        rows.append(["milliseconds per step", *(f"{1000 * c.step_seconds:.1f}" for c in pair)])
        if all(c.step_flops is not None for c in pair):
            rows.append(["FLOPs per step", *(f"{c.step_flops:.3g}" for c in pair)])
        return rows

    def text(self) -> str:
        """Return the comparison as aligned text, the verdict first."""
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        cost = f"A step of {self.model.name} takes {self.time_ratio:.2f} times as long as one of the reference."
        return "\n".join([self.verdict, *lines, cost, f"{self.task} on {self.data}; runs in {self.folder}"])

    __repr__ = text

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; ends of an interval that has none, and losses not finite, are null."""
        found = {
            "verdict": self.verdict, "winner": self.winner, "model": self.model.to_dict(),
            "reference": self.reference.to_dict(), "reference_config": self.reference_config,
            "difference": {"mean": self.difference.mean, "low": self.difference.low, "high": self.difference.high},
            "time_ratio": self.time_ratio, "data": self.data, "task": self.task, "seeds": list(self.seeds),
            "steps": self.steps, "folder": str(self.folder),
        }  # fmt: skip
        return {name: null_nonfinite(value) for name, value in found.items()}

    def figure(self) -> "Figure":
        """Draw the held-out losses over the steps and over the time that they cost."""
        require("matplotlib", "draw the comparison")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for contender, color in ((self.model, "#1f6f8b"), (self.reference, "#c05746")):
            for axis, scale in zip(axes, (1.0, contender.step_seconds), strict=True):
                for number, curve in enumerate(contender.curves):
                    axis.plot([x * scale for x, _ in curve], [y for _, y in curve], color=color, alpha=0.25, lw=1)
                    if number == 0:
                        means = [sum(c[i][1] for c in contender.curves) / len(contender.curves)
                                 for i in range(min(map(len, contender.curves)))]  # fmt: skip
                        axis.plot([x * scale for x, _ in curve[: len(means)]], means, color=color, lw=2,
                                  label=contender.name)  # fmt: skip
        axes[0].set(xlabel="step", ylabel="held-out loss (nats)", title="Per step")
        axes[1].set(xlabel="seconds of training steps", title="Per second")
        axes[0].legend(frameon=False)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        return figure

    def _repr_html_(self) -> str:
        """Show the comparison in a notebook."""
        try:
            figure = self.figure()
        except MissingPackageError as error:
            drawn = f"<p>{html.escape(str(error))}</p>"
        else:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            drawn = (
                "<img alt='held-out losses' style='max-width:100%' "
                f"src='data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}'>"
            )
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        return f"<p><b>{html.escape(self.verdict)}</b></p><table>{rows}</table>{drawn}"

    def to_html(self, path: str | Path) -> None:
        """Write the comparison as one HTML file."""
        title = f"{self.model.name} and a transformer of its size"
        write_atomic(
            Path(path),
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
            f'<body style="font:14px/1.5 system-ui,sans-serif;max-width:1000px;margin:16px auto">{self._repr_html_()}'
            "</body></html>\n",
        )


def benchmark(
    model: Any,
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    folder: str | Path = "runs/benchmark",
    *,
    seeds: Sequence[int] = (0, 1, 2),
    spec: ModelSpec | None = None,
    trust: bool = False,
    progress: bool = True,
) -> Comparison:
    """Train a model and a plain transformer of the same size on the same batches, and say who wins.

    A second call on the same folder continues where the first one was stopped.

    Args:
        model: A loaded model, a reference for `utils.load_model`, or a function that returns a new module.
        data: A data reference or prepared data.
        config: How to train both; its seed is replaced by `seeds`.
        folder: Where the runs are kept.
        seeds: One pair of runs for each; an interval needs two, and three or more make it useful.
        spec: Facts about the model that override detection.
        trust: As for `utils.load_model`.
        progress: Show a progress bar.

    Returns:
        Losses, the interval of their difference, curves and the cost of a step.

    Raises:
        ConfigError: `seeds` is empty or repeats itself, or a run was stopped by the time budget before its end.
        DataError: There is no reference for the model's task.
        SeedbedError: The model cannot be built again or trained.
    """
    config = config or TrainingConfig()
    chosen = tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"The benchmark has seeds={list(chosen)}.", "Expected different seeds, at least one.")
    source = buildable(model, spec, trust)
    adapter = ModelAdapter(fresh_model(source, chosen[0]), spec=spec)
    prepared = data if isinstance(data, PreparedData) else prepare_data(adapter, data, config)
    reference = reference_model(prepared, adapter.num_parameters)
    runs: dict[str, list[Run]] = {"model": [], "reference": []}
    with progress_bar(2 * len(chosen), f"Comparing {adapter.name}", progress) as bar:
        for seed in chosen:
            for kind, origin, stated in (("model", source, spec), ("reference", reference, None)):
                place = Path(folder) / f"seed-{seed}" / kind
                runs[kind].append(_train(origin, seed, prepared, config, place, stated))
                bar.update(1)
    first = {kind: done[0] for kind, done in runs.items()}
    seconds = _step_seconds(first)
    names = {"model": adapter.name, "reference": f"plain {type(reference.module).__name__}"}
    contenders = {
        kind: _contender(names[kind], done, seconds[kind], _step_flops(done[0])) for kind, done in runs.items()
    }
    difference = paired_difference(contenders["model"].losses, contenders["reference"].losses)
    return Comparison(
        contenders["model"], contenders["reference"], difference, prepared.reference, prepared.task, chosen,
        runs["model"][0].total_steps, Path(folder), dict(reference.config),
    )  # fmt: skip


def reference_model(data: PreparedData, parameters: int) -> LoadedModel:
    """Build a plain transformer for some data with a given number of parameters.

    Raises:
        DataError: There is none for the task, or none of that size.
    """
    if data.task not in REFERENCES:
        raise DataError(
            f"There is no plain transformer to compare with for {data.task}.",
            f"Expected a task of {', '.join(REFERENCES)}.",
        )
    fixed = _fixed_settings(data)
    example = load_model(REFERENCES[data.task], config=fixed)
    kind = type(example.module)
    best: tuple[float, dict[str, Any]] | None = None
    nearest = math.inf
    for width in range(8, 2049, 8):
        heads = max(1, width // 32)
        while width % heads or (width // heads) % 2:
            heads -= 1
        settings = {**example.config, "d_model": width, "nhead": heads}
        # The count is linear in the depth: two models without memory tell it for all depths.
        one, two = (_count(kind, {**settings, "num_layers": depth}) for depth in (1, 2))
        if one > parameters * (1 + TOLERANCE):
            nearest = min(nearest, one)
            break
        depth = max(1, round(1 + (parameters - one) / (two - one)))
        count = one + (depth - 1) * (two - one)
        error = abs(count / parameters - 1)
        nearest = min(nearest, count, key=lambda n: abs(n - parameters))
        if error > TOLERANCE:
            continue
        score = abs(math.log(width / depth / ASPECT)) + 20 * error
        if best is None or score < best[0]:
            best = (score, {**settings, "num_layers": depth})
    if best is None:
        raise DataError(
            f"No plain transformer with {format_count(parameters)} parameters fits this data; the nearest has "
            f"{format_count(int(nearest))}.",
            f"Expected one within {TOLERANCE:.0%}.",
            "Compare a larger model, or one with a smaller vocabulary.",
        )
    return load_model(REFERENCES[data.task], config=best[1])


def _fixed_settings(data: PreparedData) -> dict[str, Any]:
    """Return the settings of the reference that the data decides."""
    if data.task == "image_classification":
        channels, height, width = data.train["pixel_values"].shape[1:]
        if height != width:
            raise DataError(f"The images are {height} x {width}.", "Expected square ones for the plain transformer.")
        patch = next(p for p in (4, 2, 1) if height % p == 0) if height < 64 else max(4, math.gcd(height, 16))
        classes = int(max(data.train["labels"].max(), data.validation["labels"].max())) + 1
        return {
            "image_size": int(height), "num_channels": int(channels), "num_classes": classes, "patch_size": patch
        }  # fmt: skip
    assert data.tokenizer is not None
    return {"vocab_size": data.tokenizer.vocab_size, "max_seq_len": int(data.train["input_ids"].shape[1])}


def _count(kind: Any, settings: dict[str, Any]) -> int:
    """Return the number of parameters of a model without building it in memory."""
    names = inspect.signature(kind).parameters
    with torch.device("meta"):
        module = kind(**{name: value for name, value in settings.items() if name in names})
    return sum(p.numel() for p in module.parameters())


def _train(
    source: Any, seed: int, data: PreparedData, config: TrainingConfig, place: Path, spec: ModelSpec | None
) -> Run:
    """Train one run to its end, or continue it."""
    from utils.training.resume import check_same, resume, train

    fresh = fresh_model(source, seed)
    settings = config.with_changes(seed=seed)
    if (place / RECORD).exists():
        check_same(place, fresh, data, settings, spec=spec)
        run = resume(
            place, model=module_of(fresh), time_budget_minutes=config.time_budget_minutes or NO_BUDGET, progress=False
        )
    else:
        run = train(fresh, data, settings, place, spec=spec, progress=False)
    if not run.finished:
        raise ConfigError(
            f"The run in {place} ended at step {run.step} of {run.total_steps}: {run.status}.",
            "Expected all runs of the comparison to reach their end.",
            "Make the same call again to continue.",
        )
    return run


def _contender(name: str, runs: list[Run], step_seconds: float, step_flops: int | None) -> Contender:
    """Sum up the runs of one model."""
    measured = [[row for row in run.metrics if row["split"] == "validation"] for run in runs]
    curves = tuple(tuple((int(row["step"]), float(row["loss"])) for row in rows) for rows in measured)
    losses = tuple(curve[-1][1] for curve in curves)
    adapter = runs[0].adapter
    return Contender(name, adapter.num_parameters, losses, curves, step_seconds, step_flops)


def _step(run: Run, batch: dict[str, torch.Tensor]) -> float:
    """Do the forward and backward pass of a step, leave the model as it was and return the seconds."""
    from utils.training.evaluation import objective

    with preserved(run.model, 0, "timing"):
        run.model.train()
        started = time.perf_counter()
        objective(run.adapter, run.data, batch, 0)[0].backward()
        if run.adapter.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _batch(run: Run) -> dict[str, torch.Tensor]:
    from utils.training.batching import collate

    chosen = torch.arange(min(run.config.batch_size, run.data.train_samples))
    return {name: tensor.to(run.adapter.device) for name, tensor in collate(run.data.train, chosen).items()}


def _step_seconds(runs: dict[str, Run]) -> dict[str, float]:
    """Time one step of each model in turns, so that a busy machine slows both down."""
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(ROUNDS + 1):
        for kind, run in runs.items():
            taken = _step(run, _batch(run))
            if turn:  # the first one warms up
                times[kind].append(taken)
    return {kind: runs[kind].config.accumulate * median(found) for kind, found in times.items()}


def _step_flops(run: Run) -> int | None:
    """Count the matrix products of a step; None when the model does something that the counter does not follow."""
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False) as counter:
            _step(run, _batch(run))
    except Exception:  # the counter's own limits; the comparison stands without it
        return None
    return run.config.accumulate * int(counter.get_total_flops()) or None
