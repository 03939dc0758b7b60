"""The same verbs without a notebook: ``python -m utils validate|train|resume|search|benchmark|export|...``.

``--config run.yaml`` says everything about a run in one file (`utils.training.run_file`); options override it.

Exit status: 0 when all is well, 1 when a model is not ready, an export failed or a run stopped before its end, 2 when
the input cannot be used, 130 after an interrupt that no run could turn into a clean stop, 141 when whoever reads the
output has gone.
"""

import argparse
import json
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

try:
    from utils.adapters.spec import ModelSpec
    from utils.runtime.errors import ConfigError, SeedbedError
    from utils.runtime.files import write_atomic
    from utils.runtime.project import VERSION
    from utils.runtime.settings import field_help
    from utils.training.config import TrainingConfig
    from utils.training.run_file import RunFile
    from utils.ui.command_options import (
        REFERENCE_HELP,
        add_loading_options,
        check_writable,
        in_options,
        load,
        needed,
        run_file,
        spec_of,
    )
    from utils.ui.shipping_verbs import add_shipping_verbs, run_bundle, run_export, run_generate, run_publish
except ModuleNotFoundError as missing:
    if __name__ != "__main__" or str(missing.name).startswith("utils"):
        raise
    print(
        f"{sys.executable} has no package {missing.name}. Expected the environment of this project. "
        "Run 'make environment' once, then '.venv/bin/python -m utils ...' or 'source .venv/bin/activate'.",
        file=sys.stderr,
    )
    sys.exit(2)

INTERRUPTED, NOBODY_READS = 130, 141
DATA = "builtin:python-docs"


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

    def training(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", nargs="?", help=REFERENCE_HELP)
        add_loading_options(sub)
        sub.add_argument(
            "--data", help="builtin:python-docs, builtin:python-code, builtin:digits, file:PATH or hub:OWNER/NAME "
            "(default: builtin:python-docs)",
        )  # fmt: skip
        sub.add_argument("--config", metavar="FILE", help="YAML file with everything; options override it")
        sub.add_argument("--preset", metavar="NAME", help="begin with the settings of a preset such as fast")
        settings = sub.add_argument_group("training settings")
        texts = field_help(TrainingConfig)
        for setting in fields(TrainingConfig):
            default = "" if setting.default in (None, MISSING) else f" (default: {setting.default})"
            settings.add_argument(
                f"--{setting.name.replace('_', '-')}", type=_value, metavar="VALUE", dest=f"setting_{setting.name}",
                help=f"{texts[setting.name].rstrip('.')}{default}".replace("%", "%%"),
            )  # fmt: skip

    validate = verb(
        "validate",
        "Say whether a model is sound, what is wrong and how to mend it",
        "validate example:gpt --html report.html",
    )
    validate.add_argument("model", help=REFERENCE_HELP)
    add_loading_options(validate)
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
    training(train)
    train.add_argument("--run-dir", metavar="DIR", help="a new or empty directory")
    train.add_argument("--mirror", metavar="DIR", help="keep a second copy of the run here")

    resume = verb("resume", "Continue a run exactly where it stopped", "resume runs/first")
    resume.add_argument("run_dir", metavar="DIR", nargs="?", help="the run's directory")
    resume.add_argument("--config", metavar="FILE", help="run file that names the directory and the second copy")
    resume.add_argument(
        "--trust", action="store_true", help="run the model's code even if the audit finds something in it"
    )
    resume.add_argument(
        "--time-budget-minutes", type=float, metavar="MINUTES", help="stop cleanly after so many minutes"
    )
    resume.add_argument("--devices", type=int, help="number of devices, when not as the run was started")
    resume.add_argument("--batch-size", type=int, help="samples per forward pass from now on; the steps stay the same")
    resume.add_argument("--strategy", help="how they share the work from now on: auto, ddp or fsdp")
    resume.add_argument("--mirror", metavar="DIR", help="keep a second copy of the run here")

    search = verb(
        "search",
        "Search for better settings; the same command continues a search or joins it",
        "search example:gpt --folder runs/search --space learning_rate=log_uniform:1e-4,1e-2 --trials 20",
    )
    training(search)
    search.add_argument("--folder", metavar="DIR", help="where the search is kept")
    search.add_argument(
        "--space", action="append", metavar="FIELD=KIND:A,B",
        help="what may change: uniform, log_uniform, integers or choice, such as batch_size=choice:8,16; repeatable",
    )  # fmt: skip
    search.add_argument("--trials", type=int, help="how many settings to try in all (default: 20)")
    search.add_argument("--pruner", help="median, hyperband or none (default: median)")
    search.add_argument("--search-seed", type=int, help="seed of the proposals (default: 0)")
    search.add_argument("--storage", metavar="URL", help="database that several machines share")
    search.add_argument("--best-dir", metavar="DIR", help="then train the best settings here, with the full max_steps")

    benchmark = verb(
        "benchmark",
        "Compare a model with a plain transformer of its size",
        "benchmark example:gpt --folder runs/benchmark --seeds 0,1,2",
    )
    training(benchmark)
    benchmark.add_argument("--folder", metavar="DIR", default="runs/benchmark", help="default: %(default)s")
    benchmark.add_argument("--seeds", default="0,1,2", help="separated by commas (default: %(default)s)")
    benchmark.add_argument("--html", metavar="FILE", help="also write the comparison as one HTML file")

    add_shipping_verbs(verb)

    report = verb("report", "Say how a run or a search stands", "report runs/first")
    report.add_argument("directory", metavar="DIR", nargs="?", help="the directory of a run or the folder of a search")
    report.add_argument("--config", metavar="FILE", help="run file that names the directory")
    report.add_argument("--html", metavar="FILE", help="also write it to this HTML file")

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
        verbs = {
            "validate": _validate, "train": _train, "resume": _resume, "search": _search, "benchmark": _benchmark,
            "export": _printed(run_export), "bundle": _printed(run_bundle), "publish": _printed(run_publish),
            "generate": _printed(run_generate), "report": _report, "link": _link,
        }  # fmt: skip
        status = verbs[options.verb](options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (SeedbedError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NOBODY_READS
        said = in_options(str(error))
        if options.json:
            print(json.dumps({"error": said, "kind": type(error).__name__}))
        else:
            print(f"{type(error).__name__}: {said}", file=sys.stderr)
        return 2


def _nobody_reads() -> bool:
    """Tell whether standard output has lost its reader, as in ``| head``; then nothing more is written to it."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    # What failed to be written may be gone, so that another flush proves nothing.
    watch = select.poll()
    watch.register(number, 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    # Python flushes once more at its end, and would complain.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return True


def _printed(verb: Callable[[argparse.Namespace], tuple[str, int]]) -> Callable[[argparse.Namespace], int]:
    """Return a verb that prints what it has to say and gives the exit status."""

    def run(options: argparse.Namespace) -> int:
        said, status = verb(options)
        print(said)
        return status

    return run


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """Show a warning's text without the line of code that raised it."""
    print(f"warning: {message}", file=sys.stderr)


def _validate(options: argparse.Namespace) -> int:
    from utils.tier1_critical_validation import validate

    tiers = [_value(part) for part in options.tiers.split(",")]
    check_writable("--html", options.html)
    check_writable("--badge", options.badge)
    model = load(options)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    spec = spec_of(options, model)
    report = validate(model, tiers, spec, None, options.time_budget, progress=not options.quiet)
    told = tuple(
        replace(
            result,
            why=in_options(result.why),
            findings=tuple(replace(f, message=in_options(f.message), hint=in_options(f.hint)) for f in result.findings),
        )
        for result in report.results
    )
    report = replace(report, results=told)
    # Minutes may have passed: the report comes first, whatever happens to the files.
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.text())
    if report.findings and not options.json:
        print(f"To see and reproduce a finding in Python, begin with:\n{_lines_to_load(options)}")
    written = True
    for path, write in ((options.html, report.to_html), (options.badge, report.badge)):
        if path:
            try:
                print(f"wrote {write(path).resolve()}", file=sys.stderr)
            except OSError as error:
                written = False
                print(f"{path} was not written: {error.strerror or error}.", file=sys.stderr)
    return (0 if report.passed else 1) if written else 2


def _train(options: argparse.Namespace) -> int:
    from utils.training.resume import train

    file = run_file(options)
    config = _config(options, file)
    run_dir = needed(options.run_dir or file.run_dir, "run_dir", "--run-dir DIR", options)
    model = load(options, file)
    run = train(
        model,
        options.data or file.data or DATA,
        config,
        run_dir,
        spec=spec_of(options, model, file.task),
        mirror=options.mirror or file.mirror,
        progress=not options.quiet,
    )
    return _show_run(run, options.json)


def _resume(options: argparse.Namespace) -> int:
    from utils.training.resume import resume
    from utils.training.run import RECORD
    from utils.training.run_report import read_facts

    file = run_file(options)
    directory = needed(options.run_dir or file.run_dir, "run_dir", "DIR", options)
    known = (Path(directory) / RECORD).is_file()
    before = read_facts(directory).summary.get("status") if known else None
    run = resume(
        directory,
        trust=options.trust,
        time_budget_minutes=options.time_budget_minutes,
        devices=options.devices,
        strategy=options.strategy,
        batch_size=options.batch_size,
        mirror=options.mirror or file.mirror,
        progress=not options.quiet,
    )
    if run.finished and before == run.status:
        run.notes.append("The run was finished already; nothing was trained.")
    return _show_run(run, options.json)


def _search(options: argparse.Namespace) -> int:
    from utils.training.search import hyperparameter_search

    file = run_file(options)
    said = dict(file.search)
    given = {
        "folder": options.folder, "trials": options.trials, "pruner": options.pruner, "seed": options.search_seed,
        "storage": options.storage, "best_dir": options.best_dir,
        "space": _space(options.space) if options.space else None,
    }  # fmt: skip
    said |= {name: value for name, value in given.items() if value is not None}
    folder = needed(said.pop("folder", None), "search.folder", "--folder DIR", options)
    best_dir = said.pop("best_dir", None)
    config, model, data = _config(options, file), load(options, file), options.data or file.data or DATA
    result = hyperparameter_search(
        model, data, folder=folder, config=config, spec=ModelSpec(task=options.task or file.task),
        progress=not options.quiet, **said,
    )  # fmt: skip
    run = None
    if best_dir is not None and result.best is not None:
        run = result.train_best(best_dir, model, progress=not options.quiet)
    if options.json:
        print(json.dumps({**result.to_dict(), "best_run": None if run is None else run.to_dict()}, indent=2))
    else:
        print(result.text() if run is None else f"{result.text()}\n{run}\n{run.directory}")
    ended = all(trial.state != "running" for trial in result.trials) and result.best is not None
    return 0 if ended and (run is None or run.finished) else 1


def _benchmark(options: argparse.Namespace) -> int:
    from utils.training.baseline import benchmark

    file = run_file(options)
    seeds = [_value(part) for part in options.seeds.split(",")]
    check_writable("--html", options.html)
    comparison = benchmark(
        load(options, file), options.data or file.data or DATA, _config(options, file), options.folder,
        seeds=seeds, spec=ModelSpec(task=options.task or file.task), progress=not options.quiet,
    )  # fmt: skip
    if options.html:
        comparison.to_html(options.html)
    print(json.dumps(comparison.to_dict(), indent=2) if options.json else comparison.text())
    return 0


def _report(options: argparse.Namespace) -> int:
    from utils.training.search_result import SEARCH, read_search

    file = run_file(options)
    directory = Path(needed(options.directory or file.run_dir, "run_dir", "DIR", options))
    if (directory / SEARCH).exists():
        result = read_search(directory)
        text, facts, fragment = result.text(), result.to_dict(), result._repr_html_()
    else:
        from utils.training.run_report import read_facts, run_report
        from utils.training.unfinished import unfinished_runs

        written, run = run_report(directory), read_facts(directory)
        summary, notes = dict(run.summary), []
        for waiting in unfinished_runs(directory):
            if waiting.status == "killed":
                # The session could not say how it ended; an older summary is that of another step.
                summary = {
                    "status": "killed, or still running",
                    "step": waiting.step,
                    "total_steps": waiting.total_steps,
                }
            notes = [f"continue with: python -m utils resume {directory}"]
        lines = [f"{name}  {value}" for name, value in summary.items() if value is not None]
        text = "\n".join([*lines, f"report  {written}", *written.notes, *notes])
        facts = {"report": str(written.path), "summary": summary, "config": run.settings,
                 "compared_with": list(written.neighbours), "notes": list(written.notes)}  # fmt: skip
        fragment = written._repr_html_()
    if options.html:
        page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><body>{fragment}</body></html>\n'
        write_atomic(Path(options.html), page)
    print(json.dumps(facts, indent=2) if options.json else text)
    return 0


def _link(options: argparse.Namespace) -> int:
    from utils.loading.links import model_link

    link = model_link(options.model, options.notebook, options.output, options.publish, options.replace)
    print(json.dumps(link.to_dict(), indent=2) if options.json else link)
    return 0


def _show_run(run: Any, as_json: bool) -> int:
    from utils.training.processes import is_started_here, rank_and_world

    rank, world = rank_and_world()
    if rank or is_started_here():
        pass  # The first of several processes speaks for all, or the one that started them.
    elif as_json:
        print(json.dumps({**run.to_dict(), "notes": run.notes}, indent=2))
    else:
        print("\n".join([str(run), str(run.directory), *run.notes]))
        if not run.finished:
            print(f"continue with: python -m utils resume {run.directory}", file=sys.stderr)
    # To torchrun a clean stop is a failure when the status says anything else: it would tell so, or start again.
    return 0 if run.finished or world > 1 else 1


def _config(options: argparse.Namespace, file: RunFile) -> TrainingConfig:
    """Put preset, run file and options together; the later ones win."""
    from utils.ui.presets import merged, preset

    lengths = {name: file.config[name] for name in ("max_steps", "max_epochs") if file.config.get(name) is not None}
    if len(lengths) == 2:
        # An option that contradicts the file is meant; a file that contradicts itself is told.
        TrainingConfig.from_dict(lengths)
    given = {
        name.removeprefix("setting_"): value for name, value in vars(options).items() if name.startswith("setting_")
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = {}
    if name := options.preset or file.preset:
        settings = preset(name).to_dict()
    return TrainingConfig.from_dict(merged(merged(settings, file.config), given))


def _space(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``FIELD=KIND:A,B`` into the form of a run file."""
    space: dict[str, Any] = {}
    for text in texts:
        name, found, rest = text.partition("=")
        kind, colon, values = rest.partition(":")
        if not found or not colon:
            raise ConfigError(
                f"--space {text} is no range.", "Expected FIELD=KIND:A,B, such as learning_rate=log_uniform:1e-4,1e-2."
            )
        if name in space:
            raise ConfigError(f"--space gives {name} twice.", "Expected each field once.")
        space[name] = {kind: [_value(value) for value in values.split(",")]}
    return space


def _lines_to_load(options: argparse.Namespace) -> str:
    """Return the lines of Python after which a report's lines run as they are."""
    given = {"config": options.model_config, "revision": options.revision, "trust": options.trust}
    said = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    lines = f"import utils\nmodel = utils.load_model({options.model!r}{said}).module"
    stated = [f"task={options.task!r}"] if options.task else []
    if options.example_inputs:
        lines += "\nfrom utils.loading.example_files import read_examples"
        stated.append(f"example_inputs=read_examples({options.example_inputs!r}, model)")
    return lines + (f"\nspec = utils.ModelSpec({', '.join(stated)})" if stated else "")


def _value(text: str) -> Any:
    """Read a setting: a number, null, true, false, settings within a setting as JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith(("{", "[")):
            raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
        return text


if __name__ == "__main__":
    sys.exit(main())
