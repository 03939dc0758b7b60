"""One finding, reproduced: its check runs again, alone, and the evidence is shown as numbers and pictures."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import ConfigError
from utils.runtime.isolation import preserved
from utils.validation.causality import influence
from utils.validation.check import Check, CheckResult, json_safe
from utils.validation.html import result_html
from utils.validation.pictures import Picture, heat_map, line_chart
from utils.validation.probing import has_length
from utils.validation.runner import run_check

MATRIX_LENGTH = 24
ANYWHERE = ("process_died", "timed_out")
"""Codes that no check looks for and that any pass of a model can meet."""
SECONDS = 30.0


@dataclass(frozen=True)
class Shown:
    """What `utils.show` returns."""

    code: str
    """The finding's code."""
    found: bool
    """Whether the model has the fault now."""
    text: str
    """What there is to see."""
    numbers: dict[str, Any]
    """The evidence."""
    pictures: tuple[Picture, ...]
    """The evidence, drawn; possibly none."""
    results: tuple[CheckResult, ...]
    """What the checks that look for this code say."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers and the text as plain values."""
        return {"code": self.code, "found": self.found, "text": self.text, "numbers": json_safe(self.numbers)}

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"

    def _repr_html_(self) -> str:
        drawn = "".join(picture.html() for picture in self.pictures)
        tables = "".join(result_html(result) for result in self.results)
        head = f"<p><b>{escape(self.code)}</b> {escape(self.text)}</p>"
        return f'{tables}<div class="seedbed-report">{head}<div class="pictures">{drawn}</div></div>'


def reproduce(code: str, adapter: ModelAdapter, checks: Sequence[Check]) -> Shown:
    """Run the checks that can find a code and collect their evidence; see `utils.show`.

    Args:
        code: Code of the finding.
        adapter: The model.
        checks: Every check there is.

    Raises:
        ConfigError: No check looks for this code.
    """
    wanted = [check for check in checks if code in check.codes or code in ANYWHERE]
    if not wanted:
        raise _unknown(code, checks)
    results = tuple(run_check(adapter, check, SECONDS / len(wanted)) for check in wanted)
    findings = [finding for result in results for finding in result.findings if finding.code == code]
    numbers: dict[str, Any] = {result.check: result.details for result in results}
    pictures = [picture for result in results for picture in result.pictures]
    if code in PICTURES and adapter.failure is None:
        with preserved(adapter.module, 0, "show"):
            adapter.module.eval()
            more, drawn = PICTURES[code](adapter, numbers)
        numbers, pictures = numbers | more, [*drawn, *pictures]
    text = "; ".join(f"{finding.where}: {finding.message}" for finding in findings)
    return Shown(code, bool(findings), text or "not found in this model", numbers, tuple(pictures), results)


def _unknown(code: str, checks: Sequence[Check]) -> ConfigError:
    """Return the error for a code that there is not, with the one that was probably meant."""
    known = sorted({*ANYWHERE, *(name for check in checks for name in check.codes)})
    found, listed = f"No check looks for {code!r}.", f"The codes are {', '.join(known)}."
    # The name of a check is what the report's first column shows.
    named = next((check.codes for check in checks if check.id == code), ())
    if named:
        return ConfigError(f"{found} It is the name of a check.", f"Its codes are {', '.join(named)}.")
    close = difflib.get_close_matches(str(code), known, n=1)
    return ConfigError(found, listed, f"Did you mean {close[0]!r}?" if close else "")


def _influence(adapter: ModelAdapter, numbers: dict[str, Any]) -> tuple[dict[str, Any], list[Picture]]:
    """Draw which input position changes which output position."""
    if not has_length(adapter) or adapter.task.value not in ("causal_lm", "masked_lm", "seq2seq"):
        return {}, []
    matrix = influence(
        adapter, adapter.legal_length(min(MATRIX_LENGTH, adapter.max_length.value or MATRIX_LENGTH))
    ).numpy()
    future = matrix[np.triu_indices(len(matrix), 1)]
    floor = max(float(matrix.max()), 1e-30) * 1e-8
    caption = "Row: position of the logits; column: token that was changed; log10 of the largest change. In a causal"
    caption += " model everything above the diagonal is dark;"
    picture = heat_map(np.log10(np.maximum(matrix, floor)), "which token changes which logits", caption)
    return {"influence": matrix.tolist(), "largest_from_future": float(future.max(initial=0.0))}, [picture]


def _scale(adapter: ModelAdapter, numbers: dict[str, Any]) -> tuple[dict[str, Any], list[Picture]]:
    """Draw the signal's scale by depth."""
    scales: dict[str, float] = numbers.get("initialization", {}).get("scale_by_depth", {})
    if len(scales) < 2:
        return {}, []
    logs = [float(np.log10(max(value, 1e-30))) for value in scales.values()]
    ends = f"{next(iter(scales))} to {next(reversed(scales))}"
    chart = line_chart(range(len(logs)), {"log10 of root mean square": logs}, "signal scale by depth", "layer", ends)
    return {"scale_by_depth": scales}, [chart]


PICTURES: dict[str, Callable[[ModelAdapter, dict[str, Any]], tuple[dict[str, Any], list[Picture]]]] = {
    "future_leakage": _influence,
    "exploding_init": _scale,
    "vanishing_init": _scale,
}
"""Codes with a picture of their own, beside what their checks draw."""
