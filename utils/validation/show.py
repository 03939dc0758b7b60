"""One finding, reproduced: a picture and the numbers behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.spec import ModelSpec
from utils.runtime.errors import ConfigError
from utils.runtime.isolation import preserved
from utils.runtime.optional import require
from utils.validation.causality import influence
from utils.validation.check import Budget, json_safe
from utils.validation.initialization import check_initialization
from utils.validation.probing import has_length

MATRIX_LENGTH = 24


@dataclass(frozen=True)
class Shown:
    """What `show` returns."""

    code: str
    """The finding's code."""
    figure: Any
    """A matplotlib figure; ``figure.savefig(path)`` writes it."""
    numbers: dict[str, Any]
    """The data in the picture."""
    text: str
    """What to see in it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers and the text as plain values."""
        return {"code": self.code, "numbers": json_safe(self.numbers), "text": self.text}

    def _repr_html_(self) -> str:
        import base64
        import io
        from html import escape

        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
        picture = base64.b64encode(stream.getvalue()).decode()
        image = f'<img alt="{escape(self.code)}" src="data:image/png;base64,{picture}">'
        return f"<figure>{image}<figcaption>{escape(self.text)}</figcaption></figure>"


def show(code: str, model: Any, spec: ModelSpec | None = None, config: Any = None) -> Shown:
    """Reproduce one finding as a picture with its numbers.

    Args:
        code: Code of the finding, for example ``"future_leakage"``.
        model: What `validate` takes.
        spec: Facts that override detection.
        config: Settings of the model.

    Raises:
        ConfigError: There is no picture for this code, or the model has no such property to draw.
    """
    if code not in PICTURES:
        raise ConfigError(
            f"There is no picture for {code!r}.",
            f"Pictures exist for {', '.join(PICTURES)}.",
            "The report has the numbers of all findings.",
        )
    figure_module = require("matplotlib.figure", "draw a finding", "matplotlib")
    adapter = model if isinstance(model, ModelAdapter) and spec is None else ModelAdapter(model, config, spec)
    with preserved(adapter.module, 0, "show"):
        adapter.module.eval()
        return PICTURES[code](adapter, figure_module.Figure)


def _influence(adapter: ModelAdapter, figure_class: Any) -> Shown:
    """Draw which input position changes which output position."""
    if not has_length(adapter) or adapter.task.value not in ("causal_lm", "masked_lm", "seq2seq"):
        raise ConfigError(
            f"{adapter.name} gives no logit per token ({adapter.task.value}).",
            "Influence between positions needs a language model.",
        )
    length = adapter.legal_length(min(MATRIX_LENGTH, adapter.max_length.value or MATRIX_LENGTH))
    matrix = influence(adapter, length).numpy()
    future = matrix[np.triu_indices(length, 1)]
    figure = figure_class(figsize=(5.6, 4.8))
    axes = figure.add_subplot()
    floor = max(matrix.max(), 1e-30) * 1e-8
    image = axes.imshow(np.log10(np.maximum(matrix, floor)), cmap="viridis", origin="upper")
    axes.plot([-0.5, length - 0.5], [-0.5, length - 0.5], color="white", linewidth=1)
    axes.set(xlabel="token that was changed", ylabel="logits that changed", title="above the white line: the future")
    figure.colorbar(image, label="log10 of the largest change")
    largest = float(future.max()) if future.size else 0.0
    text = (
        f"Largest change of an earlier logit by a later token: {largest:.3g} (by any: {matrix.max():.3g}). "
        "In a causal model everything above the white line is dark."
    )
    return Shown("future_leakage", figure, {"influence": matrix.tolist(), "largest_from_future": largest}, text)


def _scale(adapter: ModelAdapter, figure_class: Any, code: str) -> Shown:
    """Draw the signal's scale by depth."""
    scales: dict[str, float] = check_initialization(adapter, Budget(30)).details["scale_by_depth"]
    if not scales:
        raise ConfigError(
            f"{adapter.name} has no repeated blocks or layers to follow.", "Scale by depth needs at least one."
        )
    figure = figure_class(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    axes.plot(range(len(scales)), list(scales.values()), marker="o")
    axes.set_yscale("log")
    axes.set_xticks(range(len(scales)), list(scales), rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="root mean square", title="signal scale by depth")
    first, last = next(iter(scales.items())), next(reversed(scales.items()))
    return Shown(code, figure, {"scale_by_depth": scales}, f"{first[0]}: {first[1]:.3g}, {last[0]}: {last[1]:.3g}")


PICTURES: dict[str, Callable[[ModelAdapter, Any], Shown]] = {
    "future_leakage": _influence,
    "exploding_init": lambda adapter, figure_class: _scale(adapter, figure_class, "exploding_init"),
    "vanishing_init": lambda adapter, figure_class: _scale(adapter, figure_class, "vanishing_init"),
}
