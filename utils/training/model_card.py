"""The model card of a bundle: what the model is, what it learned from, how well, and what is not known about it.

Every number is read from the run and from the export; what nobody measured is not in the card.
"""

import json
from pathlib import Path
from typing import Any

from utils.adapters import ModelAdapter
from utils.runtime.project import VERSION
from utils.runtime.resources import format_bytes, format_count
from utils.training.export_report import ExportReport, quality_text
from utils.training.export_weights import ChosenWeights
from utils.training.task_rows import TaskRows, read_tasks, said_method

PIPELINES = {
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "text_classification": "text-classification",
    "image_classification": "image-classification",
    "audio_classification": "audio-classification",
    "tabular_classification": "tabular-classification",
}
"""The Hub's names of tasks."""
NUMBERS = (
    ("loss", "held-out loss (nats)"), ("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"), ("rmse", "rmse"),
    ("r2", "r2"),
)  # fmt: skip


def model_card(
    adapter: ModelAdapter,
    report: ExportReport,
    chosen: ChosenWeights,
    inference: dict[str, Any],
    run: Any = None,
    licence: str | None = None,
) -> str:
    """Return a model card in Markdown, with the header that the Hub reads.

    Args:
        adapter: The model.
        report: What was exported.
        chosen: Which weights.
        inference: ``runtime``, ``difference`` and ``why`` of the script beside the card.
        run: The training run, when there is one.
        licence: The licence's identifier on the Hub; None says that none was chosen.
    """
    blocks = [_header(report, licence), f"# {adapter.name}", _summary(adapter, report, chosen)]
    blocks += ["## Use", _use(report, inference)]
    if run is not None:
        blocks += ["## Data", f"```\n{_without_folders(run.data.text(), run)}\n```", "## Training", _training(run)]
        blocks += ["## Results", _results(run, report, chosen)]
    blocks += ["## Files", _files(report), "## Limits", _limits(adapter, run, report), "## Licence", _licence(licence)]
    return "\n\n".join(blocks) + "\n"


def _without_folders(text: str, run: Any) -> str:
    """Return a text in which the run's data is named without the folders of the machine that it was read from."""
    reference = str(run.data.reference)
    kind, separator, path = reference.partition(":")
    return text.replace(reference, f"{kind}:{Path(path).name}") if separator and kind == "file" else text


def _header(report: ExportReport, licence: str | None) -> str:
    lines = ["---", "tags:", "- seedbed", "- pytorch"]
    if any(result.format.startswith("onnx") and result.files for result in report.results):
        lines.append("- onnx")
    if report.task in PIPELINES:
        lines.append(f"pipeline_tag: {PIPELINES[report.task]}")
    if licence is not None:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "---"])


def _summary(adapter: ModelAdapter, report: ExportReport, chosen: ChosenWeights) -> str:
    rows = [
        ("task", report.task.replace("_", " ")),
        ("parameters", f"{report.parameters:,} ({format_count(report.parameters)})"),
    ]
    if adapter.modality == "tokens":
        rows.append(("vocabulary", f"{adapter.vocab_size.value:,}" if adapter.vocab_size.value else "unknown"))
        rows.append(("longest input", f"{adapter.max_length.value or 'no known limit'} tokens"))
    elif adapter.image_shape.value is not None:
        rows.append(("input", " x ".join(map(str, adapter.image_shape.value)) + " (channels, height, width)"))
    if chosen.text:
        rows.append(("weights", chosen.text))
    return _table(("", ""), rows)


def _use(report: ExportReport, inference: dict[str, Any]) -> str:
    if inference["runtime"] is None:
        return f"There is no `inference.py`: {inference['why']} `config.json` and `model.safetensors` hold the model."
    install = "onnxruntime" if inference["runtime"] == "onnxruntime" else "torch"
    lines = [
        f"`inference.py` needs one package and no other: `pip install {install}`.",
        "```\npython inference.py --check\n"
        + ('python inference.py "Once upon a time" --tokens 50\n' if report.task == "causal_lm" else "")
        + "python inference.py --inputs inputs.json\n```",
        f"`--check` compares with the original model's logits; here the largest difference was "
        f"{inference['difference']:.1e}.",
    ]
    return "\n\n".join(lines + ([inference["why"]] if inference["why"] else []))


def _training(run: Any) -> str:
    config = run.config
    length = f" with {config.accumulate} forward passes each" if config.accumulate > 1 else ""
    packed = run.data.task in ("causal_lm", "masked_lm")
    long = run.data.facts.get("length") if packed else None
    tokens = f" of {long} tokens ({run.step * config.samples_per_step * long:,} tokens in all)" if long else ""
    lines = [
        f"Trained with Seedbed {VERSION}: {run.step:,} of {run.total_steps:,} planned steps{length}, "
        f"{config.samples_per_step:,} samples a step{tokens}, in {run.sessions} session(s); status: {run.status}.",
        f"AdamW, peak learning rate {config.learning_rate:g}, {config.schedule} schedule after a warm-up over "
        f"{config.warmup_share:.0%} of the steps, weight decay {config.weight_decay:g}, gradients clipped at "
        f"{config.clip_norm:g}, precision {config.precision}, seed {config.seed}.",
        "<details><summary>All settings</summary>\n\n```json\n"
        + json.dumps(config.to_dict(), indent=2, default=str)
        + "\n```\n\n</details>",
    ]
    return "\n\n".join(lines)


def _results(run: Any, report: ExportReport, chosen: ChosenWeights) -> str:
    measured = [row for row in run.metrics if row["split"] == "validation"]
    tasks, blocks = read_tasks(run.directory), []
    learned = _learned(tasks, run, chosen)
    if measured:
        best = min(measured, key=lambda row: row["loss"])
        # The loss over a stream's first task says nothing beside that over all: none of them is the best.
        stream = bool(tasks.learned)
        picked = {row["step"]: row for row in (measured[0], *(() if stream else (best,)), measured[-1])}
        names = [(key, title) for key, title in NUMBERS if any(key in row for row in measured)]
        rows = [
            (f"{step:,}", *(f"{row[key]:.4f}" if key in row else "" for key, _ in names))
            for step, row in sorted(picked.items())
        ]
        blocks.append(
            "Measured on the held-out data of the tasks begun by then, at the first and the last measurement:"
            if stream
            else "Measured on all held-out data at the first, the best and the last measurement:"
        )
        blocks.append(_table(("step", *(title for _, title in names)), rows))
        blocks += learned
        if not chosen.measured:
            blocks.append(
                "These were measured with the moving average of the weights; the exported weights are the plain ones."
            )
        elif chosen.step not in {row["step"] for row in measured}:
            blocks.append(f"The exported weights are of step {chosen.step:,}, at which nothing was measured.")
    else:
        blocks += learned
    last = run.last("train")
    if "loss" in last:
        blocks.append(f"Training loss over the last logged steps: {last['loss']:.4f} nats.")
    if "zlib_bits_per_byte" in run.data.facts:
        blocks.append(
            f"`zlib -9` needs {run.data.facts['zlib_bits_per_byte']:.4f} bits per byte for the held-out text."
        )
    if report.held_out:
        rows = [("original", quality_text(report.held_out))]
        rows += [(result.format, quality_text(result.held_out)) for result in report.results if result.held_out]
        blocks.append("The exported weights before and after export, on the first held-out samples:")
        blocks.append(_table(("format", "measured"), rows))
    return "\n\n".join(blocks)


def _learned(tasks: TaskRows, run: Any, chosen: ChosenWeights) -> list[str]:
    """Say how a stream of tasks was learned; nothing for a run without one."""
    if tasks.newest is None:
        return []
    said = f"{tasks.sentence} ({said_method(run.config.to_dict())})."
    step = tasks.newest["step"]
    if None not in (step, chosen.step) and step != chosen.step:
        said += f" This was measured at step {step:,}; the exported weights are of step {chosen.step:,}."
    return [said]


def _files(report: ExportReport) -> str:
    rows = []
    for result in report.results:
        names = ", ".join(f"`{file.name}`" for file in result.files) or "-"
        shapes = ", ".join("x".join(map(str, check.shape)) for check in result.checks if check.difference is not None)
        difference = "-" if result.max_difference is None else f"{result.max_difference:.1e}"
        status = result.status.replace("_", " ")
        rows.append((result.format, status, difference, shapes or "-", format_bytes(result.bytes), names))
    table = _table(("format", "status", "largest difference of the logits", "at shapes", "size", "files"), rows)
    notes = [f"- {result.format}: {result.why}" for result in report.results if result.why]
    equal = f"Differences up to {report.tolerance:.1e} count as equal ({report.tolerance_reason})."
    return "\n\n".join([table, *(["\n".join(notes)] if notes else []), equal])


def _limits(adapter: ModelAdapter, run: Any, report: ExportReport) -> str:
    lines = []
    if run is not None:
        name = _without_folders(str(run.data.reference), run)
        lines.append(f"- It knows nothing but its training data, {name}, and what its weights held before.")
    else:
        lines.append("- It was exported without a training run: how it was trained is not known here.")
    if adapter.modality == "tokens" and adapter.max_length.value:
        lines.append(f"- It sees at most {adapter.max_length.value} tokens at once.")
    if run is not None and run.data.tokenizer is not None and not run.data.tokenizer.lossless:
        lines.append("- Its tokenizer does not keep every character; see the data above.")
    if any(result.status == "fixed_shape" for result in report.results):
        lines.append("- Some of its files run at one input shape only; see the table above.")
    lines.append("- Nothing was measured on other data, nor about safety, bias or facts.")
    return "\n".join(lines)


def _licence(licence: str | None) -> str:
    if licence is not None:
        return licence
    return "None was chosen. Whoever publishes this says here what others may do with it, and under which the data was."


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )
