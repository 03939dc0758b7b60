"""A run's report: one HTML file that loads nothing from anywhere, and compares the run with its neighbours.

Neighbours are the runs in the same parent folder. The file is written again at the end of every session, so that the
newest run's report always shows all runs that were there by then.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from utils.runtime.errors import SeedbedError
from utils.runtime.files import write_atomic
from utils.training.config import TrainingConfig
from utils.training.figures import METRICS as HELD_OUT_NUMBERS
from utils.training.figures import metric_of, trend
from utils.training.growth_rows import GrowthRows, growth_table, read_growth
from utils.training.line_chart import Series, line_chart
from utils.training.metrics import read_metrics
from utils.training.prepared_data import planned_samples
from utils.training.run import METRICS, RECORD, REPORT, SUMMARY, read_record
from utils.training.task_rows import MATRIX, TaskRows, read_tasks, said_method, tasks_table

MOST_NEIGHBOURS = 7
"""Curves beside the run's own; the table lists `MOST_LISTED` runs."""
MOST_LISTED = 30
LONGEST_SETTING = 80
"""Characters of a setting in which another run differs."""
STYLE = """
.seedbed-run{--ink:#1c2024;--soft:#5b6570;--line:#d8dde3;--grid:#e9edf1;--paper:#fff;--card:#f6f8fa;--good:#1a7f37;
--c0:#d1662c;--c1:#4878b0;--c2:#3a8f5c;--c3:#8a63b8;--c4:#a8862c;--c5:#b8527a;--c6:#3e8f95;--c7:#7a8088;
color:var(--ink);background:var(--paper);font:14px/1.5 system-ui,sans-serif;max-width:1180px;padding:20px;
box-sizing:border-box;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){.seedbed-run{--ink:#e6e9ec;--soft:#9aa5b1;--line:#3a424b;--grid:#262c33;
--paper:#16191d;--card:#1f242a;--good:#6fcf87;--c0:#f08f57;--c1:#7fa8d8;--c2:#70c492;--c3:#b695e0;--c4:#d8b75c;
--c5:#e288ad;--c6:#74c5cb;--c7:#a4abb4}}
.seedbed-run h1{font-size:20px;margin:0 0 2px}.seedbed-run h2{font-size:15px;margin:26px 0 8px;
border-bottom:1px solid var(--line);padding-bottom:3px}
.seedbed-run .soft{color:var(--soft)}.seedbed-run p{margin:4px 0}
.seedbed-run .tiles{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.seedbed-run td,.seedbed-run .tile{overflow-wrap:normal}
.seedbed-run .tile{background:var(--card);border-radius:6px;padding:8px 14px;min-width:104px}
.seedbed-run .tile b{display:block;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
.seedbed-run .tile span{color:var(--soft);font-size:12px}
.seedbed-run .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px 24px}
.seedbed-run svg{width:100%;height:auto;display:block}
.seedbed-run svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.seedbed-run svg text.title{fill:var(--ink);font-size:12.5px;font-weight:600}
.seedbed-run svg polyline{fill:none;stroke-width:1.5;stroke-linejoin:round}
.seedbed-run svg polyline.main{stroke-width:2.4}.seedbed-run svg polyline.faint{stroke-width:1;opacity:.35}
.seedbed-run svg .grid{stroke:var(--grid)}.seedbed-run svg .baseline{stroke:var(--soft);stroke-dasharray:5 4}
.seedbed-run svg .mark{stroke:var(--c3);stroke-dasharray:4 3}
.seedbed-run i.mark{display:inline-block;height:12px;border-left:2px dashed var(--c3);vertical-align:-2px;
margin-right:7px}
.seedbed-run .legend{font-size:12px;padding-left:40px}.seedbed-run .legend span{margin-right:16px}
.seedbed-run .scroll{overflow-x:auto}
.seedbed-run table{border-collapse:collapse;background:none;color:inherit;font-size:13px}
.seedbed-run th,.seedbed-run td{text-align:left;vertical-align:top;padding:4px 14px 4px 0;
border-bottom:1px solid var(--line);background:none;color:inherit;white-space:nowrap}
.seedbed-run th{color:var(--soft);font-weight:500}
.seedbed-run td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:220px}
.seedbed-run td.number,.seedbed-run th.number{text-align:right;font-variant-numeric:tabular-nums}
.seedbed-run .tasks td,.seedbed-run .tasks th{padding-left:10px;padding-right:10px}
.seedbed-run tr.own td{font-weight:600}.seedbed-run td.best{color:var(--good)}
.seedbed-run i.key{display:inline-block;width:14px;height:3px;vertical-align:middle;margin-right:7px;border-radius:2px}
.seedbed-run details{margin:8px 0}.seedbed-run summary{cursor:pointer;color:var(--soft)}
"""
COLOUR_STYLE = "".join(
    f".seedbed-run svg .c{i}{{stroke:var(--c{i})}}.seedbed-run svg .c{i}.dot{{fill:var(--c{i})}}"
    f".seedbed-run i.c{i}{{background:var(--c{i})}}"
    for i in range(8)
)


@dataclass(frozen=True)
class RunFacts:
    """What is on disk about a run, read without loading its model or data."""

    directory: Path
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    growth: GrowthRows = field(default_factory=GrowthRows)

    @property
    def parameters(self) -> int:
        """How many parameters the model has, as far as it has grown."""
        return int(self.growth.parameters or self.record["model"].get("parameters") or 0)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.directory.name

    def last(self, split: str, name: str) -> float | None:
        """Return the newest value of a number."""
        return next((r[name] for r in reversed(self.rows) if r["split"] == split and name in r), None)

    def points(self, split: str, name: str) -> list[tuple[float, float]]:
        """Return a number over the steps."""
        return [(float(r["step"]), float(r[name])) for r in self.rows if r["split"] == split and name in r]

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest held-out loss and its step; the last of a run that learns task after task."""
        points = self.points("validation", "loss")
        if self.settings.get("continual"):
            # The earlier ones are means over fewer tasks, and lower for that alone.
            points = points[-1:]
        return min(((loss, int(step)) for step, loss in points), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings."""
        return dict(self.record["config"])

    @property
    def comparable(self) -> tuple[Any, ...]:
        """Runs whose losses mean the same have this in common: the data and the task."""
        return (self.record["data"]["reference"], self.record["data"].get("task"))


@dataclass(frozen=True, repr=False)
class RunReport:
    """A report that was written; shows itself in a notebook."""

    path: Path
    fragment: str = field(repr=False)
    neighbours: tuple[str, ...] = ()
    """Names of the runs that it is compared with."""
    notes: tuple[str, ...] = ()
    """Folders that were left out, and why."""

    def __str__(self) -> str:
        """Say where it is."""
        return f"{self.path}, compared with {len(self.neighbours)} other run{'s' * (len(self.neighbours) != 1)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return self.fragment


def read_facts(directory: str | Path) -> RunFacts:
    """Read what is on disk about a run.

    Raises:
        RunError: The directory holds no run.
    """
    directory = Path(directory)
    record = read_record(directory)
    try:
        rows = read_metrics(directory / METRICS)
    except (OSError, ValueError, KeyError):
        rows = []
    try:
        summary = dict(json.loads((directory / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        summary = {}
    growth = read_growth(directory, record["model"].get("parameters"))
    return RunFacts(directory, record, summary, rows, growth)


def run_report(directory: str | Path) -> RunReport:
    """Write ``report.html`` into a run's directory and return it.

    Args:
        directory: The run.

    Raises:
        RunError: The directory holds no run.
        OSError: The file cannot be written.
    """
    own = read_facts(directory)
    neighbours, notes = [], []
    for path in sorted(own.directory.absolute().parent.iterdir()):
        if path == own.directory.absolute() or not (path / RECORD).is_file():
            continue
        try:
            neighbours.append(read_facts(path))
        except SeedbedError as error:
            notes.append(f"{path.name} is left out: {error.found}")
    fragment = report_fragment(own, neighbours, notes)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(own.name)}</title>'
        "<style>body{margin:0;background:#fff}@media (prefers-color-scheme:dark){body{background:#16191d}}"
        f".seedbed-run{{margin:0 auto}}</style></head><body>{fragment}</body></html>\n"
    )
    path = own.directory / REPORT
    write_atomic(path, page)
    return RunReport(path, fragment, tuple(run.name for run in neighbours), tuple(notes))


def report_fragment(own: RunFacts, neighbours: Sequence[RunFacts], notes: Sequence[str] = ()) -> str:
    """Return the report as one element with its own scoped style."""
    related = [run for run in neighbours if run.comparable == own.comparable and run.points("validation", "loss")]
    related.sort(key=lambda run: run.best or (float("inf"), 0))
    shown = related[:MOST_NEIGHBOURS]
    colours = {run.name: index + 1 for index, run in enumerate(shown)} | {own.name: 0}
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    model = own.record["model"]
    parts = [
        f"<style>{STYLE}{COLOUR_STYLE}</style>",
        f"<h1>{escape(own.name)}</h1>",
        f'<p class="soft">{escape(str(model["class"]))}, {own.parameters:,} parameters, on '
        f"{escape(str(own.record['data']['reference']))}. Written {written}.</p>",
        _tiles(own),
        _charts(own, shown),
        _growth(own.growth),
        _tasks(read_tasks(own.directory), said_method(own.settings)),
        _table(own, neighbours, colours),
        *(f'<p class="soft">{escape(note)}</p>' for note in notes),
        _settings(own),
    ]
    return f'<div class="seedbed-run">{"".join(parts)}</div>'


def _tiles(own: RunFacts) -> str:
    """Return the numbers that matter most."""
    summary = own.summary
    tiles = [("status", str(summary.get("status", "killed, or still running")))]
    step = own.rows[-1]["step"] if own.rows else 0
    tiles.append(("steps", f"{step:,} of {_planned(own):,}"))
    if (loss := own.last("validation", "loss")) is not None:
        tiles.append(("held-out loss", f"{loss:.4f}"))
    if own.best is not None and own.best[0] != loss:
        tiles.append((f"best held-out loss, step {own.best[1]:,}", f"{own.best[0]:.4f}"))
    metric = metric_of(list(map(dict, own.rows)))
    if metric:
        value = own.last("validation", metric)
        assert value is not None
        tiles.append((metric.replace("_", " "), f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"))
    if metric == "bits_per_byte" and summary.get("zlib_bits_per_byte") is not None:
        tiles.append(("zlib -9, bits per byte", f"{summary['zlib_bits_per_byte']:.3f}"))
    if own.rows and "seconds" in own.rows[-1]:
        tiles.append(("time trained", _time(own.rows[-1]["seconds"])))
    if summary.get("sessions"):
        tiles.append(("sessions" if summary["sessions"] > 1 else "session", str(summary["sessions"])))
    cells = "".join(f'<div class="tile"><b>{escape(text)}</b><span>{escape(name)}</span></div>' for name, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _planned(own: RunFacts) -> int:
    config = TrainingConfig.from_dict(own.settings)
    return config.total_steps(planned_samples(own.record["data"]))


def _charts(own: RunFacts, shown: Sequence[RunFacts]) -> str:
    """Return the curves, those of the neighbours beneath."""
    raw = own.points("train", "loss")
    smooth = list(zip([x for x, _ in raw], trend([y for _, y in raw]), strict=True))
    training = [Series("each row", raw, 7, faint=True), Series("training, smoothed", smooth, 1, main=True),
                Series("held out", own.points("validation", "loss"), 0, main=True)]  # fmt: skip
    marks = own.growth.marks
    charts = [line_chart(training, "Loss of this run", marks=marks) + _legend(training, grew=bool(marks))]
    if shown:
        overlaid = _overlaid(own, shown, "loss")
        beside = line_chart(overlaid, "Held-out loss beside other runs", marks=marks)
        charts.append(beside + _legend(overlaid, grew=bool(marks)))
    metric = metric_of(list(map(dict, own.rows)))
    if metric:
        zlib = own.summary.get("zlib_bits_per_byte") if metric == "bits_per_byte" else None
        title = HELD_OUT_NUMBERS[metric] + (", beside other runs" if shown else "")
        baseline = ("zlib -9", float(zlib)) if zlib is not None else None
        charts.append(line_chart(_overlaid(own, shown, metric), title, baseline=baseline))
    charts.append(
        line_chart([Series("learning rate", own.points("train", "learning_rate"), 1, main=True)], "Learning rate")
    )
    norms = own.points("train", "gradient_norm")
    smoothed = list(zip([x for x, _ in norms], trend([y for _, y in norms]), strict=True))
    charts.append(
        line_chart([Series("gradient norm", norms, 7, faint=True), Series("smoothed", smoothed, 1, main=True)],
                   "Gradient norm before clipping", marks=marks)
    )  # fmt: skip
    speed = own.points("train", "samples_per_second")
    charts.append(line_chart([Series("samples per second", speed, 1, main=True)], "Samples per second"))
    drawn = "".join(f"<div>{chart}</div>" for chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="soft">Nothing was measured yet.</p>'


def _growth(growth: GrowthRows) -> str:
    """Return through which events the model grew; empty when it never did."""
    if growth.problem is not None:
        return f'<h2>Growth</h2><p class="soft">{escape(growth.problem)}</p>'
    if not growth.rows:
        return ""
    return (
        '<h2>Growth</h2><p class="soft">What the model grew through, and by how much its answers, as a share of their '
        f"size, and its loss, in nats, changed at that moment.</p>{growth_table(growth.rows)}"
    )


def _tasks(tasks: TaskRows, method: str) -> str:
    """Return how good the model was at every task after each that it learned; empty for a run without tasks."""
    if tasks.problem is not None:
        return f'<h2>Tasks</h2><p class="soft">{escape(tasks.problem)}</p>'
    if not tasks.rows:
        return ""
    said = f"<p>{escape(f'{tasks.sentence} ({method}).')}</p>" if tasks.newest else ""
    what = (
        "A row holds the score on each task after the one that it names was learned, faint on those still to come."
        if tasks.shown
        else f"A row holds the score on the task that it names, right after it was learned; {MATRIX} has those on all."
    )
    unit = "Accuracies are in percent" if tasks.unit == "accuracy" else f"Scores are in {tasks.unit}"
    return (
        f'<h2>Tasks</h2>{said}<p class="soft">{what} {escape(unit)}; the average is over the tasks learned, and '
        "forgetting is what was lost since the best earlier row. Held-out numbers elsewhere in this report are means "
        f"over the tasks begun by then.</p>{tasks_table(tasks)}"
    )


def _legend(series: Sequence[Series], grew: bool = False) -> str:
    """Name the curves of a chart by colour, and its vertical lines; empty when nothing is drawn."""
    drawn = [one for one in reversed(series) if one.points and not one.faint]
    names = "".join(f'<span><i class="key c{one.colour}"></i>{escape(one.name)}</span>' for one in drawn)
    names += '<span><i class="mark"></i>the model grew</span>' if names and grew else ""
    return f'<p class="legend soft">{names}</p>' if names else ""


def _overlaid(own: RunFacts, shown: Sequence[RunFacts], name: str) -> list[Series]:
    """Return a held-out number of this run and of others."""
    others = [Series(run.name, run.points("validation", name), index + 1) for index, run in enumerate(shown)]
    return [*others, Series(own.name, own.points("validation", name), 0, main=True)]


def _table(own: RunFacts, neighbours: Sequence[RunFacts], colours: Mapping[str, int]) -> str:
    """Return all runs of the folder, the best first, with the settings in which they differ from this one."""
    if not neighbours:
        return '<h2>Runs in this folder</h2><p class="soft">This is the only one so far.</p>'
    runs = sorted([own, *neighbours], key=lambda run: (run.comparable != own.comparable, run.best or (float("inf"), 0)))
    cut = runs[:MOST_LISTED]
    if own not in cut:
        cut = [*cut[:-1], own]
    best = next((run.name for run in cut if run.comparable == own.comparable and run.best), None)
    rows = []
    for run in cut:
        key = f'<i class="key c{colours[run.name]}"></i>' if run.name in colours else '<i class="key"></i>'
        loss = run.best
        metric = metric_of(list(map(dict, run.rows)))
        value = run.last("validation", metric) if metric else None
        seconds = run.rows[-1].get("seconds") if run.rows else None
        other = "" if run.comparable == own.comparable else f"other data: {run.record['data']['reference']}; "
        rows.append(
            f"<tr{' class=own' if run is own else ''}><td>{key}{escape(run.name)}</td>"
            f"<td>{escape(str(run.summary.get('status', 'killed, or still running')))}</td>"
            f'<td class="number">{run.rows[-1]["step"] if run.rows else 0:,}</td>'
            f'<td class="number{" best" if run.name == best else ""}">{f"{loss[0]:.4f}" if loss else ""}</td>'
            f'<td class="number">{_metric(metric, value)}</td>'
            f'<td class="number">{_time(seconds) if seconds is not None else ""}</td>'
            f'<td class="number">{run.parameters:,}</td>'
            f'<td class="wrap soft">{escape(other + _differences(own, run))}</td></tr>'
        )
    hidden = len(runs) - len(cut)
    more = f'<p class="soft">{hidden} more runs are not listed.</p>' if hidden else ""
    return (
        f"<h2>Runs in this folder</h2>"
        '<p class="soft">Losses compare only between runs on the same data, with the same tokenizer.</p>'
        '<div class="scroll"><table><thead><tr><th>run</th><th>status</th><th class="number">steps</th>'
        '<th class="number">best loss</th><th class="number">last metric</th><th class="number">time</th>'
        f'<th class="number">parameters</th><th>unlike this run</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"</div>{more}"
    )


def _metric(name: str | None, value: float | None) -> str:
    if name is None or value is None:
        return ""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f} {'bpb' if name == 'bits_per_byte' else name}"


def _differences(own: RunFacts, run: RunFacts) -> str:
    """Name the settings in which another run differs."""
    if run is own:
        return ""
    parts = []
    if run.record["model"]["sha256"] != own.record["model"]["sha256"]:
        parts.append(f"model {run.record['model']['class']}")
    elif run.record["model"]["config"] != own.record["model"]["config"]:
        parts.append("the model's config")
    mine, other = own.settings, run.settings
    ignored = ("time_budget_minutes", "session_limit_minutes")
    parts += [
        f"{name} {_short(other.get(name))}"
        for name in mine
        if name not in ignored and other.get(name) != mine.get(name)
    ]
    return ", ".join(parts) or "nothing"


def _short(value: Any) -> str:
    """Return a setting as text; one that holds many others is cut."""
    text = str(value)
    return text if len(text) <= LONGEST_SETTING else f"{text[: LONGEST_SETTING - 1]}…"


def _settings(own: RunFacts) -> str:
    """Return all settings and the machine, folded away."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in own.settings.items()
    )
    machine = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in own.record["machine"].items()
    )
    return (
        f"<details><summary>all settings</summary><table><tbody>{cells}</tbody></table></details>"
        f"<details><summary>the machine it was started on</summary><table><tbody>{machine}</tbody></table></details>"
    )


def _time(seconds: float) -> str:
    """Say how long something took."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
