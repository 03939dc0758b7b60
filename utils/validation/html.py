"""The report as HTML: one small file, light and dark, nothing loaded from anywhere, every text escaped.

All styles are scoped to the class ``seedbed-report``, so a report shown in a notebook leaves the notebook's own alone.
"""

import json
import math
from html import escape
from typing import TYPE_CHECKING

from utils.validation.check import CheckResult, Finding, json_safe
from utils.validation.codes import MEANING
from utils.validation.svg import bar_chart

if TYPE_CHECKING:
    from utils.validation.report import ValidationReport

RULES = """
.seedbed-report{--ink:#1c2024;--soft:#5b6570;--line:#d8dde3;--paper:#fff;--card:#f6f8fa;--fail:#b42318;--warn:#8a5a00;
--pass:#1a7f37;--skip:#5b6570;--bar:#4878b0;color:var(--ink);background:var(--paper);font:14px/1.5 system-ui,sans-serif;
max-width:1000px;padding:16px;box-sizing:border-box}
@media (prefers-color-scheme:dark){.seedbed-report{--ink:#e6e9ec;--soft:#9aa5b1;--line:#3a424b;--paper:#16191d;
--card:#1f242a;--fail:#ff8a80;--warn:#e8b44a;--pass:#6fcf87;--skip:#9aa5b1;--bar:#7fa8d8}}
.seedbed-report .verdict{font-size:18px;margin:0 0 2px}
.seedbed-report .verdict b{margin-right:10px}
.seedbed-report .soft{color:var(--soft)}
.seedbed-report .fail{color:var(--fail)}.seedbed-report .warn{color:var(--warn)}
.seedbed-report .pass{color:var(--pass)}.seedbed-report .skip{color:var(--skip)}
.seedbed-report .finding{background:var(--card);border-left:4px solid var(--line);padding:8px 12px;margin:10px 0;
border-radius:0 4px 4px 0}
.seedbed-report .finding.is-fail{border-left-color:var(--fail)}
.seedbed-report .finding.is-warn{border-left-color:var(--warn)}
.seedbed-report .finding p{margin:2px 0}
.seedbed-report code,.seedbed-report pre{font:12.5px/1.45 ui-monospace,monospace;background:none;color:inherit;
overflow-wrap:anywhere;padding:0}
.seedbed-report pre{white-space:pre-wrap;margin:6px 0;max-height:320px;overflow:auto}
.seedbed-report table{border-collapse:collapse;table-layout:auto;width:100%;margin:14px 0;background:none;color:inherit;
font-size:inherit}
.seedbed-report thead,.seedbed-report tr,.seedbed-report tbody tr:hover{border:none;background:none}
.seedbed-report th,.seedbed-report td{text-align:left;vertical-align:top;padding:5px 10px 5px 0;line-height:inherit;
border:none;border-bottom:1px solid var(--line);background:none;color:inherit}
.seedbed-report td:first-child code{white-space:nowrap}
.seedbed-report td.number,.seedbed-report th.number{text-align:right;max-width:130px;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
.seedbed-report td.pass,.seedbed-report td.fail,.seedbed-report td.warn,.seedbed-report td.skip{font-weight:600}
.seedbed-report td.pass{color:var(--pass)}.seedbed-report td.fail{color:var(--fail)}
.seedbed-report td.warn{color:var(--warn)}.seedbed-report td.skip{color:var(--skip)}
.seedbed-report details{margin:4px 0 0}
.seedbed-report summary{cursor:pointer;color:var(--soft)}
.seedbed-report td p{margin:2px 0}
.seedbed-report td details{margin:0;font-size:12.5px}
.seedbed-report h3{font-size:14px;margin:18px 0 4px;border-bottom:1px solid var(--line)}
.seedbed-report .pictures{display:flex;flex-wrap:wrap;gap:8px 28px}
.seedbed-report figure{margin:6px 0;max-width:640px}.seedbed-report figure>b,.seedbed-report figure>img{display:block}
.seedbed-report figcaption{color:var(--soft);font-size:12.5px}
.seedbed-report svg{max-width:100%;height:auto;display:block}
@media (max-width:700px){.seedbed-report{padding:10px}.seedbed-report th.number,.seedbed-report td.number{display:none}}
.seedbed-report svg rect{fill:var(--bar)}.seedbed-report svg text{fill:var(--soft);font:10px system-ui,sans-serif}
"""
STYLE = RULES.replace(".seedbed-report", 3 * ".seedbed-report")
"""The rules, each more specific than what Jupyter says of tables: two classes, a pseudo-class at most, two elements."""
VERDICT_CLASS = {"READY": "pass", "DESCRIBED": "skip", "NOT READY": "fail", "INCOMPLETE": "warn"}
BADGE_COLOURS = {"pass": "#1a7f37", "fail": "#b42318", "warn": "#8a5a00", "skip": "#5b6570"}


def report_page(report: "ValidationReport") -> str:
    """Return a whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(report.verdict)}: {escape(report.model)}</title>"
        "<style>body{margin:0;background:#fff}@media (prefers-color-scheme:dark){body{background:#16191d}}"
        ".seedbed-report{margin:0 auto}</style></head><body>"
        f"{report_fragment(report)}</body></html>\n"
    )


def report_fragment(report: "ValidationReport") -> str:
    """Return the report as one element with its own scoped style, for a notebook."""
    from utils.validation.report import folded

    parts = [
        f"<style>{STYLE}</style>",
        f'<p class="verdict"><b class="{VERDICT_CLASS[report.verdict]}">{escape(report.verdict)}</b>'
        f"{escape(report.sentence)}</p>",
        f'<p class="soft">{escape(report.scope)}</p>',
        *(finding_html(finding, report.arguments) for finding in report.findings),
        "<table><thead><tr><th>check</th><th>status</th><th class='number'>value</th>"
        "<th class='number'>threshold</th><th class='number'>seconds</th><th>why</th></tr></thead><tbody>",
        *(_row(result, told=True) for result in folded(report.results)),
        "</tbody></table>",
        *(_pictures(result) for result in report.results),
        _detections(report),
    ]
    return f'<div class="seedbed-report">{"".join(parts)}</div>'


def badge(report: "ValidationReport") -> str:
    """Return the verdict as an SVG picture of one line: a grey label and the verdict in its colour."""
    faults = sum(finding.severity == "fail" for finding in report.findings)
    words = report.verdict.lower() + (f", {faults} fault{'s' if faults > 1 else ''}" if faults else "")
    left, right = 64, 16 + 7 * len(words)
    text = 'fill="#fff" font-family="Verdana,sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="seedbed: {escape(words)}"><title>{escape(report.sentence)}</title>'
        f'<rect width="{left}" height="20" fill="#444c56"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{BADGE_COLOURS[VERDICT_CLASS[report.verdict]]}"/>'
        f'<text x="8" y="14" {text}>seedbed</text><text x="{left + 8}" y="14" {text}>{escape(words)}</text></svg>\n'
    )


def result_html(result: CheckResult) -> str:
    """Return one check's result as an element with its own scoped style."""
    body = "".join(finding_html(finding) for finding in result.findings)
    table = f"<table><tbody>{_row(result, told=True)}</tbody></table>{_pictures(result)}"
    return f'<div class="seedbed-report"><style>{STYLE}</style>{body}{table}</div>'


def finding_html(finding: Finding, arguments: str = "") -> str:
    """Return one finding: what, where, evidence, why it matters, what to do.

    Args:
        finding: What was found.
        arguments: What `utils.show` takes beside the model.
    """
    lines = [
        f'<p><b class="{finding.severity}">{finding.severity}</b> <b>{escape(finding.code)}</b> '
        f"<code>{escape(finding.where)}</code></p>",
        f"<p>{escape(finding.message)}</p>",
    ]
    if finding.code in MEANING:
        lines.append(f'<p class="soft">{escape(MEANING[finding.code])}</p>')
    lines.append(f"<p><b>Fix:</b> {escape(finding.hint)}</p>")
    if finding.location:
        lines.append(f"<p><b>Code:</b> <code>{escape(finding.location)}</code></p>")
    lines.append(f"<p><b>See it:</b> <code>utils.show(&quot;{escape(finding.code)}&quot;, model{arguments})</code></p>")
    if finding.reproduction:
        lines.append(f"<details><summary>reproduce it</summary><pre>{escape(finding.reproduction)}</pre></details>")
    return f'<div class="finding is-{finding.severity}">{"".join(lines)}</div>'


def _row(result: CheckResult, told: bool = False) -> str:
    """Return a table row with the evidence folded away.

    Args:
        result: What the row is about.
        told: Whether its findings stand above the table.
    """
    from utils.validation.report import short_text

    notes = "".join(f'<p class="soft">reduced: {escape(note)}</p>' for note in result.details.get("reduced", ()))
    colour = "warn" if result.could_not_run else result.status
    why = "see above" if told and result.findings else result.why
    return (
        f"<tr><td><code>{escape(result.check)}</code></td><td class='{colour}'>{result.status}</td>"
        f"<td class='number'>{escape(short_text(result.value))}</td>"
        f"<td class='number'>{escape(short_text(result.threshold))}</td>"
        f"<td class='number'>{result.seconds:.2f}</td>"
        f"<td>{escape(why)}{notes}{_evidence(result)}</td></tr>"
    )


def _evidence(result: CheckResult) -> str:
    """Return a check's details, with a picture where numbers per layer exist."""
    if not result.details:
        return ""
    picture = ""
    for key, title in (("norms", "gradient norm per parameter"), ("scale_by_depth", "signal scale by depth")):
        series = result.details.get(key)
        if isinstance(series, dict) and len(series) > 1:
            values = [float(value) for value in series.values()]
            if any(math.isfinite(value) and value > 0 for value in values):
                picture += bar_chart(list(series), values, title)
    text = json.dumps(json_safe(result.details), indent=1, ensure_ascii=False)
    if len(text) > 20_000:
        text = text[:20_000] + "\n(shortened; to_json() has everything)"
    return f"<details><summary>evidence</summary>{picture}<pre>{escape(text)}</pre></details>"


def _pictures(result: CheckResult) -> str:
    """Return a check's pictures under its name, side by side where they fit."""
    if not result.pictures:
        return ""
    drawn = "".join(picture.html() for picture in result.pictures)
    return f'<section><h3><code>{escape(result.check)}</code></h3><div class="pictures">{drawn}</div></section>'


def _detections(report: "ValidationReport") -> str:
    """Return what was found out about the model, folded away."""
    rows = "".join(
        f"<tr><td><code>{escape(str(fact['name']))}</code></td><td>{escape(str(fact['value']))}</td>"
        f"<td class='soft'>{escape(str(fact['reason']))}</td></tr>"
        for fact in report.detections
    )
    table = f"<table><tbody>{rows}</tbody></table>"
    return f"<details><summary>what was found out about this model</summary>{table}</details>" if rows else ""
