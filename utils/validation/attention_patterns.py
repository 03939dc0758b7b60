"""Where does each head look? Entropy, distance, sink, previous token and redundancy of any attention.

Attentions are captured while the model runs (`utils.adapters.attention`), so it need not return them. Only sums are
kept, and the maps of the first sample for the pictures.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.adapters.attention import AttentionCall, record_attention
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import ConfigError
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.pictures import Picture, heat_grid, heat_map, line_chart
from utils.validation.probing import logits
from utils.validation.responses import affordable_samples, sample_inputs, text_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH = 32
WANTED_SAMPLES = 8
UNIFORM, SINGLE = 0.99, 0.01
"""Relative entropies beyond which a head looks everywhere alike, or always at one place."""
IDENTICAL = 1e-6
SHOWN_LAYERS, SHOWN_HEADS, LARGEST_MAP = 3, 8, 64
MOST_HEADS = 256


@dataclass
class HeadSums:
    """Running sums over the samples of one attention; every sum has one entry per head."""

    where: str
    """Module that computes it."""
    maps: Tensor
    """``(heads, query, key)``: weights of the first sample, on the CPU."""
    causal: bool
    """No query of the first sample looks ahead."""
    square: bool
    """Queries and keys are the same positions, as far as their number tells."""
    rows: int = 0
    """Samples seen."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Measure by name, summed over samples."""

    def add(self, weights: Tensor) -> None:
        """Take in ``(batch, heads, query, key)``."""
        self.rows += len(weights)
        for name, values in measures(weights, self.causal, self.square).items():
            total = values.sum(0).cpu()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def means(self) -> dict[str, list[float]]:
        """Return each measure per head."""
        return {name: (total / self.rows).tolist() for name, total in self.sums.items()}


def measures(weights: Tensor, causal: bool, square: bool) -> dict[str, Tensor]:
    """Measure attention weights.

    Args:
        weights: ``(batch, heads, query, key)``, each row of sum one.
        causal: Queries cannot look ahead, so that the largest possible entropy of query i is that of i + 1 keys.
        square: Queries and keys are the same positions.

    Returns:
        Each ``(batch, heads)``: ``entropy`` relative to its maximum; and where `square`, ``distance`` in positions,
        ``sink``, the share of the first key beyond the first query, and ``previous``, that of the key just before.
    """
    queries, keys = weights.shape[-2:]
    place = torch.arange(keys, device=weights.device)
    choices = place[:queries] + 1 if causal else torch.full((queries,), keys, device=weights.device)
    several = choices > 1
    entropy = torch.special.entr(weights.clamp_min(0)).sum(-1)[..., several] / choices[several].log()
    found = {"entropy": entropy.mean(-1)}
    if square:
        apart = (place[:, None] - place[None, :]).abs().to(weights.dtype)
        found["distance"] = (weights * apart).sum(-1).mean(-1)
        found["sink"] = weights[..., 1:, 0].mean(-1)
        found["previous"] = weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    return found


def similarity(maps: Tensor, causal: bool) -> Tensor:
    """Return how alike heads look: the cosine of what sets their weights apart from uniform ones.

    Args:
        maps: ``(heads, query, key)``.
        causal: Queries cannot look ahead.

    Returns:
        ``(heads, heads)``; 0 for a head that is uniform.
    """
    uniform = torch.ones(maps.shape[-2:], dtype=maps.dtype)
    uniform = uniform.tril() if causal else uniform
    apart = (maps - uniform / uniform.sum(-1, keepdim=True)).flatten(1)
    lengths = apart.norm(dim=1)
    # Rounding has a direction too, but says nothing.
    unit = apart / lengths.clamp_min(1e-30).unsqueeze(1) * (lengths > 1e-6 * maps.flatten(1).norm(dim=1)).unsqueeze(1)
    return unit @ unit.T


def gather(adapter: ModelAdapter, count: int, length: int | None) -> list[HeadSums]:
    """Run the model on random samples and return the sums of every attention with at least three keys, in order."""
    found: list[HeadSums] = []
    start, calls = 0, 0

    def take(call: AttentionCall) -> None:
        nonlocal calls
        weights = call.weights.detach()
        if weights.shape[-1] < 3 or not bool(torch.isfinite(weights).all()):
            return
        calls += 1
        if start == 0:
            square = weights.shape[-1] == weights.shape[-2]
            found.append(HeadSums(call.where or adapter.name, weights[0].cpu(), call.causal, square))
        if calls <= len(found) and weights.shape[1:] == found[calls - 1].maps.shape:
            found[calls - 1].add(weights)

    for start in range(0, count, 4):
        calls = 0
        inputs = sample_inputs(adapter, min(4, count - start), length, seed=start)
        record_attention(adapter.module, lambda batch=inputs: logits(adapter, batch), take)  # type: ignore[misc]
    return found


def check_attention_patterns(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure every head of every attention on random samples, and draw them.

    Heads with the same map, to rounding, are one head that costs several: ``symmetric_init``, a ``warn``. Heads that
    are uniform are left out of this, because queries that start at zero make them so on purpose.
    """
    length = text_length(adapter, LENGTH)
    count = affordable_samples(adapter, budget, passes=3, wanted=WANTED_SAMPLES)
    layers = gather(adapter, count, length)
    if not layers:
        raise Skipped("no attention was seen: nothing weights values by a softmax of queries times keys")
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for number, layer in enumerate(layers):
        alike = similarity(layer.maps, layer.causal)
        others = alike - 2 * torch.eye(len(alike))
        redundancy = others.amax(1).tolist() if len(alike) > 1 else [0.0]
        means = layer.means()
        for head, nearest in enumerate(redundancy):
            row = {"layer": number, "module": layer.where, "head": head, "redundancy": nearest}
            row |= {name: values[head] for name, values in means.items()}
            row["kind"] = "uniform" if row["entropy"] > UNIFORM else "single" if row["entropy"] < SINGLE else ""
            rows.append(row)
        if same := identical_heads(layer):
            findings.append(_collapsed(layer, same))
    uniform, single = (sum(row["kind"] == kind for row in rows) for kind in ("uniform", "single"))
    entropy = sum(row["entropy"] for row in rows) / len(rows)
    why = (
        f"{len(rows)} heads in {len(layers)} attentions: mean relative entropy {entropy:.2f}; {uniform} look "
        f"everywhere alike, {single} always at one place"
    )
    details = {"samples": count, "heads": rows}
    return Outcome(entropy, None, why, findings, details, _pictures(layers, rows))


def identical_heads(layer: HeadSums) -> list[int]:
    """Return heads whose maps equal that of an earlier head of the same attention, unless they are uniform."""
    entropy = layer.means()["entropy"]
    peaked = [head for head, value in enumerate(entropy) if value < UNIFORM]
    same = []
    for index, head in enumerate(peaked):
        earlier = peaked[:index]
        if earlier and float((layer.maps[earlier] - layer.maps[head]).abs().amax(dim=(1, 2)).min()) < IDENTICAL:
            same.append(head)
    return same


def _collapsed(layer: HeadSums, same: list[int]) -> Finding:
    """Describe heads that are copies."""
    numbers = ", ".join(str(head) for head in same[:8])
    message = (
        f"{len(same)} of {len(layer.maps)} heads ({numbers}) give exactly the weights of another head of the same layer"
    )
    hint = "Draw the rows of every head's query and key weights independently; do not share or copy them."
    return Finding("symmetric_init", "warn", layer.where, message, hint)


def _chosen(layers: list[HeadSums]) -> list[int]:
    """Return the first, the middle and the last attention."""
    return sorted({0, len(layers) // 2, len(layers) - 1})[:SHOWN_LAYERS]


def _pictures(layers: list[HeadSums], rows: list[dict[str, Any]]) -> list[Picture]:
    """Draw maps of heads, their likeness, and entropy by layer."""
    pictures = []
    for number in _chosen(layers):
        layer = layers[number]
        maps = {
            f"head {head}": layer.maps[head, :LARGEST_MAP, :LARGEST_MAP].sqrt().numpy()
            for head in range(min(SHOWN_HEADS, len(layer.maps)))
        }
        more = f" The first {SHOWN_HEADS} of {len(layer.maps)} heads." if len(layer.maps) > SHOWN_HEADS else ""
        caption = f"Rows look at columns, in one random sample; light is much, by the square root.{more}"
        pictures.append(heat_grid(maps, f"attention {number}: {layer.where}", caption))
    first = layers[0]
    alike = [layer.maps for layer in layers if layer.maps.shape[1:] == first.maps.shape[1:]]
    together = torch.cat(alike)[:MOST_HEADS]
    if len(together) > 1:
        matrix = similarity(together, first.causal).numpy()
        caption = "All heads in order against all: light squares are heads that look at the same places."
        pictures.append(heat_map(matrix, "likeness of heads", caption, -1.0, 1.0))
    entropies = [[row["entropy"] for row in rows if row["layer"] == number] for number in range(len(layers))]
    if len(layers) > 1:
        series = {
            "largest": [max(values) for values in entropies],
            "mean": [sum(values) / len(values) for values in entropies],
            "smallest": [min(values) for values in entropies],
        }
        caption = "1: looks everywhere alike. 0: always at one place."
        pictures.append(line_chart(range(len(layers)), series, "relative entropy of heads", "attention", caption))
    return pictures


def attention_figure(adapter: ModelAdapter, layer: int | None = None, seed: int = 0) -> "Figure":
    """Draw attention weights on one random sample.

    Args:
        adapter: The model.
        layer: Which attention, in order of execution; None draws one row of heads per attention.
        seed: Seed of the sample.

    Raises:
        Skipped: The model computes no attention.
        ConfigError: There is no such layer.
    """
    from matplotlib.figure import Figure

    inputs = sample_inputs(adapter, 1, text_length(adapter, LENGTH), seed)
    with adapter.isolated():
        calls = record_attention(adapter.module, lambda: logits(adapter, inputs))
    if not calls:
        raise Skipped("no attention was seen: nothing weights values by a softmax of queries times keys")
    if layer is not None and not 0 <= layer < len(calls):
        raise ConfigError(
            f"attention_figure was asked for layer {layer}.", f"The model has attentions 0 to {len(calls) - 1}."
        )
    chosen = calls if layer is None else [calls[layer]]
    maps = [call.weights[0].cpu() for call in chosen]
    if layer is None:
        columns, cells = max(len(item) for item in maps), [list(item) for item in maps]
    else:
        columns = math.ceil(math.sqrt(len(maps[0])))
        cells = [list(maps[0][start : start + columns]) for start in range(0, len(maps[0]), columns)]
    size = 1.2 if layer is None else 2.2
    figure = Figure(figsize=(size * columns + 1, size * len(cells) + 0.5), layout="constrained")
    axes = figure.subplots(len(cells), columns, squeeze=False)
    for place, row in enumerate(axes):
        for head, panel in enumerate(row):
            panel.set_xticks([])
            panel.set_yticks([])
            if head >= len(cells[place]):
                panel.set_axis_off()
                continue
            panel.imshow(cells[place][head].sqrt().numpy(), cmap="magma", vmin=0, aspect="auto")
            if layer is not None:
                panel.set_title(f"head {place * columns + head}", fontsize=8)
        if layer is None:
            row[0].set_ylabel(f"{place}", fontsize=8)
    title = f"{adapter.name}: rows are attentions, columns heads" if layer is None else f"{chosen[0].where}"
    figure.suptitle(f"{title}; queries look from rows to columns, light is much (square root)", fontsize=9)
    return figure
