"""The same verbs without a notebook: ``python -m utils validate|train|resume|export|link``.

Exit status: 0 when all is well, 1 when a model is not ready, an export failed or a run stopped before its end, 2 when
the input cannot be used, 130 after Ctrl-C.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from utils.adapters.spec import TASKS, ModelSpec
from utils.runtime.errors import ConfigError, SeedbedError
from utils.runtime.optional import require
from utils.runtime.project import VERSION
from utils.runtime.settings import field_help
from utils.training.config import NOT_YET, TrainingConfig

INTERRUPTED = 130
REFERENCE_HELP = (
    "the model: a Gist id or URL, a GitHub, raw or Colab URL, a file or folder, hub:owner/name, or example:gpt|bert|vit"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils",
        description="Validate a PyTorch model, train it so that nothing is lost when a machine vanishes, export it.",
        epilog="Start with: python -m utils validate example:gpt",
    )
    parser.add_argument("--version", action="version", version=f"Seedbed {VERSION}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=summary, description=f"{summary}.", epilog=f"Example: python -m utils {example}"
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.add_argument("--quiet", action="store_true", help="show no progress")
        return sub

    def loading(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model-config", metavar="FILE", help="JSON file with settings that replace the model's own")
        sub.add_argument("--revision", help="revision of a Gist or repository; the newest otherwise")
        sub.add_argument(
            "--trust", action="store_true", help="run the model's code even if the audit finds something in it"
        )
        sub.add_argument("--task", choices=TASKS, help="what the model is for, when detection is wrong")
        sub.add_argument(
            "--example-inputs", metavar="FILE",
            help="arguments of forward() by name, batch first: .safetensors, .npz, or .json with lists of numbers",
        )  # fmt: skip
        sub.add_argument(
            "--load-time-limit", type=float, metavar="SECONDS", help="limit for running the model's code while it loads"
        )

    validate = verb(
        "validate",
        "Say whether a model is sound, what is wrong and how to mend it",
        "validate example:gpt --html report.html",
    )
    validate.add_argument("model", help=REFERENCE_HELP)
    loading(validate)
    validate.add_argument("--time-budget", type=float, metavar="SECONDS", help="sample less to stay within this time")
    validate.add_argument("--html", metavar="FILE", help="also write the report as one HTML file")
    validate.add_argument("--badge", metavar="FILE", help="also write the verdict as a small SVG picture")
    validate.add_argument(
        "--tiers", default="1", help="1 judges, 2 describes; separated by commas (default: %(default)s)"
    )

    train = verb(
        "train",
        "Train a model and keep everything in a run directory",
        "train example:gpt --run-dir runs/first --max-steps 200",
    )
    train.add_argument("model", help=REFERENCE_HELP)
    loading(train)
    train.add_argument(
        "--data", default="builtin:python-docs",
        help="builtin:python-docs, builtin:python-code, builtin:digits or file:PATH (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--run-dir", required=True, metavar="DIR", help="a new or empty directory")
    train.add_argument("--config", metavar="FILE", help="JSON file with training settings; options below override it")
    settings = train.add_argument_group("training settings")
    texts = field_help(TrainingConfig)
    for setting in fields(TrainingConfig):
        if setting.name in NOT_YET:
            continue
        default = "" if setting.default in (None, MISSING) else f" (default: {setting.default})"
        settings.add_argument(
            f"--{setting.name.replace('_', '-')}", type=_value, metavar="VALUE", dest=f"setting_{setting.name}",
            help=f"{texts[setting.name].rstrip('.')}{default}".replace("%", "%%"),
        )  # fmt: skip

    resume = verb("resume", "Continue a run exactly where it stopped", "resume runs/first")
    resume.add_argument("run_dir", metavar="DIR", help="the run's directory")
    resume.add_argument(
        "--trust", action="store_true", help="run the model's code even if the audit finds something in it"
    )
    resume.add_argument(
        "--time-budget-minutes", type=float, metavar="MINUTES", help="stop cleanly after so many minutes"
    )

    export = verb("export", "Write a model in formats that others can run, each checked", "export runs/first exported")
    export.add_argument("model", help=f"the directory of a run, or {REFERENCE_HELP}")
    export.add_argument("directory", help="where the files go")
    loading(export)
    export.add_argument(
        "--formats", default="safetensors,onnx,torch_export", help="separated by commas (default: %(default)s)"
    )

    link = verb(
        "link",
        "Make a link that opens a notebook with a model already filled in",
        "link 0123456789abcdef0123456789abcdef --publish",
    )
    link.add_argument("model", help=REFERENCE_HELP)
    link.add_argument(
        "--notebook", choices=("template", "training"), default="template", help="which one (default: %(default)s)"
    )
    link.add_argument("--output", metavar="DIR", default=".", help="where the copy is written (default: here)")
    link.add_argument(
        "--publish", action="store_true", help="also add the copy to the Gist; needs GITHUB_TOKEN with the scope gist"
    )
    link.add_argument("--replace", action="store_true", help="replace a notebook of that name in the Gist")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    options = build_parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        verbs = {"validate": _validate, "train": _train, "resume": _resume, "export": _export, "link": _link}
        return verbs[options.verb](options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (SeedbedError, OSError) as error:
        said = _in_options(str(error))
        if options.json:
            print(json.dumps({"error": said, "kind": type(error).__name__}))
        else:
            print(f"{type(error).__name__}: {said}", file=sys.stderr)
        return 2


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """Show a warning's text without the line of code that raised it."""
    print(f"warning: {message}", file=sys.stderr)


def _validate(options: argparse.Namespace) -> int:
    from utils.tier1_critical_validation import validate

    tiers = [_value(part) for part in options.tiers.split(",")]
    model = _load(options)
    spec = _spec(options, model)
    report = validate(model, tiers, spec, None, options.time_budget, progress=not options.quiet)
    told = tuple(
        replace(
            result,
            why=_in_options(result.why),
            findings=tuple(
                replace(f, message=_in_options(f.message), hint=_in_options(f.hint)) for f in result.findings
            ),
        )
        for result in report.results
    )
    report = replace(report, results=told)
    for path, write in ((options.html, report.to_html), (options.badge, report.badge)):
        if path:
            print(f"wrote {write(path).resolve()}", file=sys.stderr)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.text())
    if report.findings and not options.json:
        print(f"To see and reproduce a finding in Python, begin with:\n{_lines_to_load(options)}")
    return 0 if report.passed else 1


def _train(options: argparse.Namespace) -> int:
    from utils.training.resume import train

    settings = _read_json(options.config) if options.config else {}
    given = {
        name.removeprefix("setting_"): value for name, value in vars(options).items() if name.startswith("setting_")
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    if "max_epochs" in settings and "max_steps" not in settings:
        settings["max_steps"] = None
    config = TrainingConfig.from_dict(settings)
    model = _load(options)
    run = train(
        model,
        options.data,
        config,
        options.run_dir,
        spec=_spec(options, model),
        progress=not options.quiet,
    )
    return _show_run(run, options.json)


def _resume(options: argparse.Namespace) -> int:
    from utils.training.resume import resume

    run = resume(
        options.run_dir,
        trust=options.trust,
        time_budget_minutes=options.time_budget_minutes,
        progress=not options.quiet,
    )
    return _show_run(run, options.json)


def _export(options: argparse.Namespace) -> int:
    from utils.training.export_utilities import export

    if (Path(options.model) / "run.json").exists():
        from utils.training.resume import open_run

        model: Any = open_run(options.model, trust=options.trust)[0]
    else:
        model = _load(options)
    formats = tuple(name.strip() for name in options.formats.split(",") if name.strip())
    spec = _spec(options, model) if options.task or options.example_inputs else None
    report = export(model, options.directory, formats, spec=spec, progress=not options.quiet)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.text())
    return 0 if report.passed else 1


def _link(options: argparse.Namespace) -> int:
    from utils.loading.links import model_link

    link = model_link(options.model, options.notebook, options.output, options.publish, options.replace)
    print(json.dumps(link.to_dict(), indent=2) if options.json else link)
    return 0


def _show_run(run: Any, as_json: bool) -> int:
    print(json.dumps(run.to_dict(), indent=2) if as_json else f"{run}\n{run.directory}")
    return 0 if run.finished else 1


def _load(options: argparse.Namespace) -> Any:
    from utils.loading import load_model

    config = _read_json(options.model_config) if options.model_config else None
    limit = {} if options.load_time_limit is None else {"time_limit": options.load_time_limit}
    return load_model(options.model, config=config, revision=options.revision, trust=options.trust, **limit)


def _spec(options: argparse.Namespace, model: Any) -> ModelSpec:
    """Return what the options say about a model."""
    examples = _read_examples(options.example_inputs, model) if options.example_inputs else None
    return ModelSpec(task=options.task, example_inputs=examples)


def _read_examples(path: str, model: Any) -> dict[str, Any]:
    """Read arguments of forward from a file without running anything in it; a model's real numbers have its dtype."""
    import numpy
    import torch

    kind = Path(path).suffix
    if kind not in (".safetensors", ".npz", ".json"):
        raise ConfigError(f"{path} ends in {kind or 'nothing'}.", "Expected a .safetensors, .npz or .json file.")
    try:
        if kind == ".safetensors":
            return dict(require("safetensors.torch", "read this file").load_file(path))
        if kind == ".npz":
            with numpy.load(path, allow_pickle=False) as held:
                read = {name: torch.from_numpy(held[name]) for name in held.files}
        else:
            values = _read_json(path).items()
            read = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in values}
    except SeedbedError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.", "Expected the arguments of forward() by name, numbers only."
        ) from error
    module = getattr(model, "module", model)
    real = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(real) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in read.items()
    }


def _lines_to_load(options: argparse.Namespace) -> str:
    """Return the lines of Python after which a report's lines run as they are."""
    given = {"config": options.model_config, "revision": options.revision, "trust": options.trust}
    said = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    lines = f"import utils\nmodel = utils.load_model({options.model!r}{said}).module"
    return lines + (f"\nspec = utils.ModelSpec(task={options.task!r})" if options.task else "")


def _in_options(text: str) -> str:
    """Return a message with the command line's options for the arguments of Python functions that it names."""

    def examples(match: re.Match[str]) -> str:
        names = ", ".join(re.findall(r"'(\w+)'", match[1]))
        return "--example-inputs FILE (.safetensors, .npz or .json" + (f" with {names})" if names else ")")

    text = re.sub(r"ModelSpec\(example_inputs=\{([^}]*)\}\)", examples, text)
    text = re.sub(r"ModelSpec\.example_inputs|\bexample_inputs(?=[ ,.])", "--example-inputs", text)
    text = re.sub(r"ModelSpec\(task='?([\w.]+?)'?\)", lambda m: f"--task {m[1].strip('.') or 'NAME'}", text)
    text = re.sub(r"\bconfig=\{'(\w+)': \.\.\.\}", r'--model-config FILE with {"\1": ...}', text)
    text = re.sub(r"\bconfig=(?=[ .])", "--model-config", text)
    return text.replace("trust=True", "--trust").replace("time_limit=", "--load-time-limit")


def _read_json(path: str) -> dict[str, Any]:
    """Read a JSON object from a file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as JSON: {error}.", "Expected a file with one JSON object."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}.", "Expected one JSON object of names and values.")
    return value


def _value(text: str) -> Any:
    """Read a setting: a number, null, true, false, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
