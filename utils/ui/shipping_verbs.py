"""The verbs of the command line that bring a trained model to others: export, bundle, publish, generate."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.adapters.spec import ModelSpec
from utils.runtime.errors import ConfigError, RunError
from utils.training.run_file import RunFile
from utils.ui.command_options import REFERENCE_HELP, add_loading_options, in_options, load, needed, run_file, spec_of

FORMATS = "safetensors,onnx,torch_export"
BUNDLE_FORMATS = "safetensors,onnx"
NewVerb = Callable[[str, str, str], argparse.ArgumentParser]


def add_shipping_verbs(verb: NewVerb) -> None:
    """Add the parsers of the four verbs; `verb` makes one from a name, a summary and an example."""
    export = verb("export", "Write a model in formats that others can run, each checked", "export runs/first exported")
    _add_model(export, "run file that names the run and the directory")
    export.add_argument("--formats", help=f"separated by commas (default: {FORMATS})")

    bundle = verb(
        "bundle",
        "Make a folder for others: the export, a model card, and a script that needs one package",
        "bundle runs/first bundled --licence mit",
    )
    _add_model(bundle, "run file that names the run, and in its section bundle the rest")
    bundle.add_argument("--formats", help=f"separated by commas (default: {BUNDLE_FORMATS})")
    bundle.add_argument("--licence", metavar="ID", help="licence named in the model card, such as mit")

    publish = verb(
        "publish",
        "Show what sending a bundle to the Hugging Face Hub would send; send it with --yes",
        "publish bundled owner/name --yes",
    )
    publish.add_argument("directory", nargs="?", help="the folder that bundle made")
    publish.add_argument("repo_id", metavar="OWNER/NAME", nargs="?", help="made when it does not exist")
    publish.add_argument("--config", metavar="FILE", help="run file whose section bundle names both")
    publish.add_argument("--yes", action="store_true", help="send it; the token is the environment's HF_TOKEN")
    publish.add_argument("--public", action="store_true", help="make a new repository public; private otherwise")

    generate = verb("generate", "Let a trained language model go on from a prompt", 'generate runs/first "A list is"')
    generate.add_argument("run_dir", metavar="RUN", nargs="?", help="the run's directory")
    generate.add_argument("prompt", nargs="?", help="text to go on from; '' is a document's start")
    generate.add_argument("--config", metavar="FILE", help="run file that names the run; then PROMPT can stand alone")
    generate.add_argument("--trust", action="store_true", help="run the model's code even if the audit finds something")
    generate.add_argument("--tokens", type=int, default=100, help="how many to write at most (default: %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)"
    )
    generate.add_argument(
        "--top-k", type=int, default=50, help="draw from the so many likeliest tokens; 0 draws from all (default: 50)"
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the drawing (default: %(default)s)")
    _add_weights(generate)


def _add_model(parser: argparse.ArgumentParser, about_config: str) -> None:
    parser.add_argument("model", nargs="?", help=f"the directory of a run, or {REFERENCE_HELP}")
    parser.add_argument("directory", nargs="?", help="where the files go")
    parser.add_argument("--config", metavar="FILE", help=about_config)
    _add_weights(parser)
    add_loading_options(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="WHICH",
        help="which weights of the run: last, best or average (default: its average where it kept one, else the last)",
    )  # fmt: skip


def run_export(options: argparse.Namespace) -> tuple[str, int]:
    """Export a model or run; return what to print, and 1 when a format failed, else 0."""
    from utils.training.export_utilities import export

    file = run_file(options)
    said = file.export
    directory = needed(options.directory or said.get("directory"), "export.directory", "DIRECTORY", options)
    weights = _weights(options, said)
    model, spec = _model(options, file)
    formats = _formats(options.formats or said.get("formats") or FORMATS)
    report = export(model, directory, formats, spec=spec, weights=weights, progress=not options.quiet)
    return _said(options, report.to_dict(), report.text()), 0 if report.passed else 1


def run_bundle(options: argparse.Namespace) -> tuple[str, int]:
    """Make a bundle; return what to print, and 1 when its script does not give the original's answers, else 0."""
    from utils.training.bundle import bundle

    file = run_file(options)
    said = file.bundle
    directory = needed(options.directory or said.get("directory"), "bundle.directory", "DIRECTORY", options)
    # Weights that the file chose for the export are meant for whatever is given to others.
    weights = _weights(options, {"weights": file.export.get("weights"), **said})
    model, spec = _model(options, file)
    made = bundle(
        model, directory, _formats(options.formats or said.get("formats") or BUNDLE_FORMATS), weights=weights,
        licence=options.licence or said.get("licence"), spec=spec, progress=not options.quiet,
    )  # fmt: skip
    return _said(options, made.to_dict(), made.text()), 0 if made.passed else 1


def run_publish(options: argparse.Namespace) -> tuple[str, int]:
    """Show what would be sent, or send it; return what to print, and 0."""
    from utils.training.publish import publish

    said = run_file(options).bundle
    directory = needed(options.directory or said.get("directory"), "bundle.directory", "DIRECTORY", options)
    repo_id = needed(options.repo_id or said.get("repo_id"), "bundle.repo_id", "OWNER/NAME", options)
    result = publish(directory, repo_id, dry_run=not options.yes, private=not options.public)
    return _said(options, result.to_dict(), in_options(result.text())), 0


def run_generate(options: argparse.Namespace) -> tuple[str, int]:
    """Write text with the model of a run; return it, and 0."""
    from utils.training.export_weights import chosen_weights
    from utils.training.generation import generate
    from utils.training.resume import open_run

    run_dir, prompt, named = options.run_dir, options.prompt, run_file(options).run_dir
    if prompt is None and named is not None:
        # The file names the run, so what stands alone is the prompt.
        run_dir, prompt = named, run_dir
    directory = needed(run_dir or named, "run_dir", "RUN", options)
    if prompt is None:
        raise ConfigError(
            "python -m utils generate was called without PROMPT.",
            "Expected a text to go on from.",
            "Add one in quotes; '' starts where a document starts.",
        )
    weights = _weights(options, {})
    run = open_run(directory, trust=options.trust)[0]
    with chosen_weights(run, weights) as chosen:
        made = generate(
            run, prompt, options.tokens, temperature=options.temperature, top_k=options.top_k or None,
            seed=options.seed,
        )  # fmt: skip
    return _said(options, {**made.to_dict(), "weights": chosen.text}, str(made)), 0


def _said(options: argparse.Namespace, facts: dict[str, Any], text: str) -> str:
    return json.dumps(facts, indent=2) if options.json else text


def _model(options: argparse.Namespace, file: RunFile) -> tuple[Any, ModelSpec | None]:
    """Open the run, or load the model, that the options or the run file name."""
    reference = needed(options.model or file.run_dir, "run_dir", "MODEL", options)
    if (Path(reference) / "run.json").exists():
        from utils.training.resume import open_run

        model: Any = open_run(reference, trust=options.trust)[0]
    elif options.model is None:
        raise RunError(
            f"{options.config} names the run {reference}, and there is none.",
            "Expected a directory with run.json.",
            "Train it first: python -m utils train --config FILE.",
        )
    elif _is_missing(reference):
        raise RunError(
            f"There is no run in {reference}, and no file or folder of that name.",
            "Expected the directory of a run, or a model.",
            "Check the path.",
        )
    else:
        model = load(options, file)
    task = options.task or file.task
    return model, spec_of(options, model, task) if task or options.example_inputs else None


def _is_missing(reference: str) -> bool:
    """Tell whether a reference can only be a path, and nothing is there."""
    from utils.loading.reference import parse_reference

    meant = parse_reference(reference)
    return meant.kind == "path" and not Path(meant.target).exists()


def _weights(options: argparse.Namespace, said: dict[str, Any]) -> str | None:
    """Return which weights are wanted, before anything is loaded."""
    from utils.training.export_weights import CHOICES

    weights = options.weights or said.get("weights")
    if weights is not None and weights not in CHOICES:
        raise ConfigError(f"--weights is {weights}.", f"Expected one of {', '.join(CHOICES)}.")
    return weights


def _formats(said: Any) -> tuple[str, ...]:
    """Return the formats out of a list or a text with commas."""
    return tuple(said) if isinstance(said, list) else tuple(n.strip() for n in str(said).split(",") if n.strip())
