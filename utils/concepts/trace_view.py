"""A reasoning trace as a picture, as a page and as text."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.concepts.concept_view import HEADLINE, figure_png
from utils.concepts.trace_parts import ReasoningTrace
from utils.continual.matrix_view import page_html, picture_html, table_html
from utils.growth.lineage_view import DARK
from utils.runtime.files import saving, write_atomic
from utils.runtime.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PLACES = 24
"""Columns of the lens: the last ones."""
MOST_SOURCES = 64
"""Places that the attention flow shows."""
LABEL, LAYER_LABEL = 8, 18
"""Characters of a token and of a layer's name."""
SCROLL = "overflow-x:auto;max-width:100%"
"""Style of the table of steps: what does not fit is scrolled to."""
WRAP = "white-space:normal;overflow-wrap:anywhere;min-width:14em;max-width:40em"
"""Style of a step's text in it."""
TITLE = 14
"""Characters per inch that surely fit at the size of a panel's title."""
BESIDE = 1.2
"""Inches of the names left of a panel, over which its title does not reach."""
COLUMN, ROW = 0.62, 0.3
"""Inches of a cell of the lens."""
BLUE, ORANGE = "#4878b0", "#d1662c"


def trace_figure(trace: ReasoningTrace, dark: bool = False) -> "Figure":
    """Draw what each layer would have said, what memories gave, and where attention brought things from.

    What the trace does not hold is not drawn; its notes say why, beneath the picture.

    Args:
        trace: What was recorded.
        dark: Light on dark.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "draw a reasoning trace")
    import matplotlib.style
    from matplotlib.figure import Figure

    places, targets = _places(trace)
    heights: dict[str, float] = {}
    if trace.lens is not None:
        heights["lens"] = 1.3 + ROW * len(trace.lens.layers)
    if any(token.log_probability is not None for token in trace.tokens) and trace.task == "causal_lm":
        heights["shares"] = 1.6
    if trace.attention is not None:
        heights["flow"] = 1.4 + min(4.0, max(1.6, 0.16 * len(targets)))
    notes = [*trace.notes] or ["nothing is missing"]
    width = max(7.0, 2.6 + COLUMN * len(places))
    wrapped = _wrapped(notes, int(width * 15))
    with matplotlib.style.context(["dark_background", DARK] if dark else "default"):
        below = 0.17 * len(wrapped) + 0.15
        figure = Figure(figsize=(width, sum(heights.values()) + below + 0.5), layout="constrained")
        panels: Any = figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights.values(), below], squeeze=False)
        for name, panel in zip(heights, panels[:, 0], strict=False):
            axis = panel.subplots()
            axis.set_facecolor("none")
            axis.spines[["top", "right"]].set_visible(False)
            {"lens": _draw_lens, "shares": _draw_shares, "flow": _draw_flow}[name](axis, trace, places, targets)
        axis = panels[-1, 0].add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        axis.text(0.01, 0.95, "\n".join(wrapped), fontsize=7.5, va="top", alpha=0.8)
        headline = "\n".join(_wrapped([_headline(trace)], int(width * HEADLINE)))
        figure.suptitle(headline, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def save_trace_figure(trace: ReasoningTrace, path: str | Path) -> Path:
    """Draw a trace into a PNG file, and return its path.

    Raises:
        MissingPackageError: matplotlib is not installed.
        CheckpointError: The file cannot be written.
    """
    picture = figure_png(partial(trace_figure, trace))
    with saving(path, "the picture") as file:
        write_atomic(file, picture)
    return file


def trace_html(trace: ReasoningTrace) -> str:
    """Return the picture and a table of the steps."""
    drawn = picture_html(partial(figure_png, partial(trace_figure, trace)), "what each layer would have answered")
    # Steps are text, which wraps; the style of the reports keeps the words of a table on one line.
    table = table_html(step_rows(trace)).replace('<div class="scroll">', f'<div class="scroll" style="{SCROLL}">', 1)
    return page_html(drawn + table.replace("<td>", f'<td style="{WRAP}">'))


def step_rows(trace: ReasoningTrace) -> list[dict[str, str]]:
    """Return a row of text for each step."""
    rows = []
    for step in trace.steps:
        row = {
            "step": step.text.strip(), "tokens": str(step.end - step.begin),
            "mean log probability": _said(step.mean_log_probability), "mean entropy": _said(step.mean_entropy),
        }  # fmt: skip
        if any(one.memory_share is not None for one in trace.steps):
            row["from memory"] = "" if step.memory_share is None else f"{step.memory_share:.0%}"
            row["memories"] = " | ".join(f"…{memory.text[-40:]}" for memory in step.memories)
        rows.append(row)
    return rows


def trace_text(trace: ReasoningTrace) -> str:
    """Return the answer step by step, and what is missing."""
    lines = [_headline(trace)]
    if trace.prompt:
        lines.append(f"prompt: {_short(trace.prompt, 100)}")
    for number, row in enumerate(step_rows(trace), 1):
        told = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("step", "memories") and value)
        lines.append(f"{number}. {_short(row['step'], 100)}  ({told})")
    if trace.lens is not None:
        lines.append(f"lens over {len(trace.lens.layers)} layers: {trace.lens.reason}")
    if trace.attention is not None:
        lines.append(f"attention flow: {trace.attention.reason}")
    return "\n".join([*lines, *(f"note: {note}" for note in trace.notes)])


def _places(trace: ReasoningTrace) -> tuple[list[int], list[int]]:
    """Return which places are shown, those at which something was written if there are any, and what they led to."""
    count = len(trace.tokens)
    if trace.task != "causal_lm" or not trace.steps:
        shown = list(range(count))[-MOST_PLACES:]
        return shown, shown
    targets = [place for place, token in enumerate(trace.tokens) if token.written and place][-MOST_PLACES:]
    return [place - 1 for place in targets], targets


def _draw_lens(axis: "Axes", trace: ReasoningTrace, places: list[int], targets: list[int]) -> None:
    """Draw the likeliest answer of each layer at each place, the darker the surer; frames where it is what came."""
    lens = trace.lens
    assert lens is not None
    layers, alone = range(len(lens.layers)), len(places) == 1
    # A single place leaves room for all guesses beside each other.
    cells = [
        list(lens.guesses[layer][places[0]]) if alone else [lens.guesses[layer][p][0] for p in places]
        for layer in layers
    ]
    table = [[guess.probability for guess in row] for row in cells]
    image = axis.imshow(table, aspect="auto", origin="lower", cmap="YlGnBu", vmin=0, vmax=1)
    figure: Any = axis.figure
    figure.colorbar(image, ax=axis, label="probability", pad=0.01, fraction=0.03)
    written = trace.task == "causal_lm"
    for layer in layers:
        for column, guess in enumerate(cells[layer]):
            place, target = (places[0], targets[0]) if alone else (places[column], targets[column])
            came = written and target != place and guess.id == trace.tokens[target].id
            said = _short(_visible(guess.text), LABEL) + (f": {guess.probability:.0%}" if alone else "")
            axis.text(
                column, layer, said, ha="center", va="center", fontsize=7,
                color="white" if guess.probability > 0.55 else "#14181c", fontweight="bold" if came else "normal",
            )  # fmt: skip
            if came:
                from matplotlib.patches import Rectangle

                axis.add_patch(Rectangle((column - 0.46, layer - 0.43), 0.92, 0.86, fill=False, ec=ORANGE, lw=1.3))
    names = [_end(name, LAYER_LABEL) for name in lens.layers]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    read = [trace.tokens[place].text if written else str(place) for place in places]
    read = (
        ["likeliest", "second", "third"][: len(cells[0])] if alone else [_short(_visible(text), LABEL) for text in read]
    )
    axis.set_xticks(range(len(read)), read, fontsize=7, rotation=0 if alone else 45)
    what = "" if alone else "the token read at each place" if written else "place of the answer"
    axis.set_xlabel(what, fontsize=8)
    kind = "what each layer would say next; framed: what was written" if trace.steps else "what each layer would say"
    if any(token.memory_share is not None for token in trace.tokens):
        kind += ", which memories had a part in"
    mark = "" if lens.faithful else " (not faithful, see below)"
    _entitle(axis, f"Logit lens: {kind}{mark}")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _draw_shares(axis: "Axes", trace: ReasoningTrace, places: list[int], targets: list[int]) -> None:
    """Draw the probability of each token, and how much of it memories gave."""
    shown = targets if trace.steps else places
    tokens = [trace.tokens[place] for place in shown]
    chances = [0.0 if t.log_probability is None else math.exp(t.log_probability) for t in tokens]
    axis.bar(range(len(tokens)), chances, color="#a9b3bc", width=0.7, label="by the model")
    if any(token.memory_share is not None for token in tokens):
        parts = [chance * (token.memory_share or 0.0) for chance, token in zip(chances, tokens, strict=True)]
        axis.bar(range(len(tokens)), parts, color=BLUE, width=0.7, label="from memories")
        axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.0))
    axis.set_ylim(0, 1.02)
    axis.set_xlim(-0.5, len(tokens) - 0.5)
    axis.set_xticks(range(len(tokens)), [_short(_visible(t.text), LABEL) for t in tokens], fontsize=7, rotation=45)
    what = "written" if trace.steps else "read"
    _entitle(axis, f"Probability of each token that was {what}")
    axis.set_ylabel("probability", fontsize=8)


def _draw_flow(axis: "Axes", trace: ReasoningTrace, places: list[int], targets: list[int]) -> None:
    """Draw from where what is read at each place came, the square root of the rollout."""
    flow = trace.attention
    assert flow is not None
    size, same = len(flow.rollout), len(flow.rollout) == len(trace.tokens)
    rows = places if same else list(range(size))[-MOST_SOURCES:]
    columns = list(range(size))[-MOST_SOURCES:]
    table = [[math.sqrt(max(0.0, flow.rollout[row][column])) for column in columns] for row in rows]
    image = axis.imshow(table, aspect="auto", cmap="magma", vmin=0)
    figure: Any = axis.figure
    figure.colorbar(image, ax=axis, label="√ share", pad=0.01, fraction=0.03)

    def named(numbers: list[int]) -> list[str]:
        if not same or trace.task != "causal_lm":
            return [str(number) for number in numbers]
        return [_short(_visible(trace.tokens[number].text), LABEL) for number in numbers]

    step = max(1, math.ceil(len(rows) / 24))
    axis.set_yticks(range(0, len(rows), step), named(rows[::step]), fontsize=7)
    step = max(1, math.ceil(len(columns) / 40))
    axis.set_xticks(range(0, len(columns), step), named(columns[::step]), fontsize=7, rotation=90)
    axis.set_xlabel("came from", fontsize=8)
    axis.set_ylabel("read at", fontsize=8)
    part = f", in part: {len(flow.unseen)} blocks unseen" if flow.unseen else ""
    _entitle(axis, f"Attention flow (rollout of {len(flow.modules)} attentions{part})")


def _entitle(axis: "Axes", title: str) -> None:
    """Put a title over a panel, on as many lines as its width asks for."""
    panel: Any = axis.figure
    inches = panel.bbox.width / panel.dpi - BESIDE
    axis.set_title("\n".join(_wrapped([title], int(inches * TITLE))), loc="left", fontsize=9)


def _headline(trace: ReasoningTrace) -> str:
    written = sum(token.written for token in trace.tokens)
    if trace.task != "causal_lm":
        best = trace.tokens[0]
        sure = "" if best.log_probability is None else f", {math.exp(best.log_probability):.0%} sure"
        return f"{trace.model} answers {best.text}{sure}" if written == 1 else f"{trace.model}: {written} places"
    return f"{trace.model} wrote {written} tokens in {len(trace.steps)} step{'s' * (len(trace.steps) != 1)}"


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _visible(text: str) -> str:
    """Show white space, and keep what a picture would read as a formula from being one."""
    shown = text.replace("\n", "⏎").replace("\t", "→").replace("$", r"\$")
    shown = "".join(letter if letter.isprintable() else "�" for letter in shown)
    return shown.replace(" ", "·") if not text.strip(" ") else shown


def _short(text: str, most: int) -> str:
    text = " ".join(text.split()) if len(text) > most else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _wrapped(notes: list[str], width: int) -> list[str]:
    import textwrap

    return [line for note in notes for line in textwrap.wrap(note, width)]
