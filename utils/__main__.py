"""The same verbs without a notebook: ``python -m utils validate|train|resume|export|link``.

Exit status: 0 when all is well, 1 when a model is not ready, an export failed or a run stopped before its end, 2 when
the input cannot be used, 130 after Ctrl-C.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from utils.adapters.spec import TASKS, ModelSpec
from utils.runtime.errors import ConfigError, SeedbedError
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
        if options.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """Show a warning's text without the line of code that raised it."""
    print(f"warning: {message}", file=sys.stderr)


def _validate(options: argparse.Namespace) -> int:
    from utils.tier1_critical_validation import validate

    tiers = [_value(part) for part in options.tiers.split(",")]
    report = validate(
        _load(options), tiers, ModelSpec(task=options.task), None, options.time_budget, progress=not options.quiet
    )
    if options.html:
        report.to_html(options.html)
    if options.badge:
        report.badge(options.badge)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.text())
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
    run = train(
        _load(options),
        options.data,
        config,
        options.run_dir,
        spec=ModelSpec(task=options.task),
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
    report = export(
        model, options.directory, formats, spec=ModelSpec(task=options.task) if options.task else None,
        progress=not options.quiet,
    )  # fmt: skip
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
    return load_model(options.model, config=config, revision=options.revision, trust=options.trust)


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
