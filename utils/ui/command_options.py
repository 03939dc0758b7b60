"""What several verbs of the command line share: which run file, which model, and errors in the words of options."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from utils.adapters.spec import TASKS, ModelSpec
from utils.runtime.errors import ConfigError
from utils.training.run_file import RunFile, read_run_file

REFERENCE_HELP = (
    "the model: a Gist id or URL, a GitHub, raw or Colab URL, a file or folder, hub:owner/name, or example:gpt|bert|vit"
)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is loaded."""
    parser.add_argument("--model-config", metavar="FILE", help="JSON file with settings that replace the model's own")
    parser.add_argument("--revision", help="revision of a Gist or repository; the newest otherwise")
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code even if the audit finds something in it"
    )
    parser.add_argument("--task", choices=TASKS, help="what the model is for, when detection is wrong")
    parser.add_argument(
        "--example-inputs", metavar="FILE",
        help="arguments of forward() by name, batch first: .safetensors, .npz, or .json with lists of numbers",
    )  # fmt: skip
    parser.add_argument(
        "--load-time-limit", type=float, metavar="SECONDS", help="limit for running the model's code while it loads"
    )


def run_file(options: argparse.Namespace) -> RunFile:
    """Read the run file, if one was given."""
    return read_run_file(options.config) if options.config else RunFile()


def needed(value: Any, name: str, option: str, options: argparse.Namespace) -> str:
    """Return a value that the run file or an option must give.

    Raises:
        ConfigError: Neither does.
    """
    if value is None:
        place = f"{options.config} has no {name}" if options.config else "there is no --config"
        raise ConfigError(
            f"python -m utils {options.verb} was called without {option}, and {place}.",
            f"Expected {option}, or a run file with {name}.",
        )
    return str(value)


def load(options: argparse.Namespace, file: RunFile | None = None) -> Any:
    """Load the model that the options or the run file name."""
    from utils.loading import load_model

    file = file or RunFile()
    # An empty text is a reference that says nothing, and the loader tells so.
    reference = options.model if options.model is not None else needed(file.model, "model", "MODEL", options)
    # Another model than the file's does not take the settings of that one.
    own = file if options.model in (None, file.model) else RunFile()
    config = _read_json(options.model_config) if options.model_config else own.model_config
    limit = {} if options.load_time_limit is None else {"time_limit": options.load_time_limit}
    return load_model(reference, config=config, revision=options.revision or own.revision, trust=options.trust, **limit)


def spec_of(options: argparse.Namespace, model: Any, task: str | None = None) -> ModelSpec:
    """Return what the options say about a model; `task` is what a run file says."""
    from utils.loading.example_files import read_examples

    examples = read_examples(options.example_inputs, model) if options.example_inputs else None
    return ModelSpec(task=options.task or task, example_inputs=examples)


def check_writable(option: str, path: str | None) -> None:
    """Make sure, before anything takes time, that a file can be written.

    Raises:
        ConfigError: The path is a folder, or its folder cannot be written.
    """
    if path is None:
        return
    target = Path(path)
    if not path or target.is_dir():
        action = f"Add a name, such as {option} {target / option.strip('-')}." if path else "Give one, or leave it out."
        raise ConfigError(f"{option} {path!r} is {'a folder' if path else 'empty'}.", "Expected a file's path.", action)
    # Folders that are missing are made.
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} {path}: {folder} is no folder that can be written.", "Expected one.", "Choose another."
        )


def in_options(text: str) -> str:
    """Return a message with the command line's options for the arguments of Python functions that it names."""

    def examples(match: re.Match[str]) -> str:
        names = ", ".join(re.findall(r"'(\w+)'", match[1]))
        return "--example-inputs FILE (.safetensors, .npz or .json" + (f" with {names})" if names else ")")

    text = re.sub(r"ModelSpec\(example_inputs=\{([^}]*)\}\)", examples, text)
    text = re.sub(r"ModelSpec\.example_inputs|\bexample_inputs(?=[ ,.])", "--example-inputs", text)
    text = re.sub(r"ModelSpec\(task='?([\w.]+?)'?\)", lambda m: f"--task {m[1].strip('.') or 'NAME'}", text)
    text = re.sub(r"\bconfig=\{'(\w+)': \.\.\.\}", r'--model-config FILE with {"\1": ...}', text)
    text = re.sub(r"\bconfig=(?=[ .])", "--model-config", text)
    text = re.sub(r"\bweights='(\w+)'", r"--weights \1", text)
    text = text.replace("utils.bundle(run, directory)", "python -m utils bundle RUN DIRECTORY")
    text = text.replace("dry_run=False", "--yes")
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
