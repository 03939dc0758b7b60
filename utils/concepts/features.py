"""Features of a layer of a model, found by a sparse autoencoder, and the examples that each is strongest on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from utils.adapters.activations import representations
from utils.concepts.autoencoder import READ_AT_A_TIME, AutoencoderConfig, AutoencoderFit, fit_autoencoder
from utils.concepts.checks import SIDES, as_tensor, check_choice, check_count, check_kind, read_table
from utils.concepts.examples import BATCH_SIZE, example_batches
from utils.memory.key_reader import adapter_of, tokenizer_of
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.settings import settings_of, shown

POOLS = ("positions", "flat")
"""Poolings of which a reconstruction can be put back into the model."""
AROUND = 6
"""Tokens before and after a position that are shown with it."""


@dataclass(frozen=True)
class Strongest:
    """A place where a feature is strong."""

    example: int
    """Number of the example, as given."""
    position: int
    """Its position; -1 where there is none."""
    strength: float
    """How active the feature is, in units of the normalised vectors."""
    text: tuple[str, str, str] = ("", "", "")
    """The text before, at and after the position; empty without texts."""


@dataclass(frozen=True)
class Feature:
    """A feature of a sparse autoencoder."""

    number: int
    """Its row in the encoder and the decoder."""
    density: float
    """Share of vectors on which it is active."""
    mean: float
    """Mean strength where it is active."""
    energy: float
    """Its share of the squared strengths of all features."""
    strongest: tuple[Strongest, ...]
    """Where it is strongest, one place for each example at most, strongest first."""


@dataclass(frozen=True, repr=False)
class FeatureView:
    """The features of a layer that matter most."""

    features: tuple[Feature, ...]
    """Those with the largest energy first, or those asked for."""
    total: int
    """How many features there are."""
    layer: str = ""
    """The layer, if a model was read."""

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values that JSON can hold."""
        rows = []
        for feature in self.features:
            places = [{**vars(place), "text": list(place.text)} for place in feature.strongest]
            rows.append({**vars(feature), "strongest": places})
        return {"layer": self.layer, "total": self.total, "features": rows}

    def __str__(self) -> str:
        lines = [f"{len(self.features)} of {self.total} features{f' of `{self.layer}`' if self.layer else ''}"]
        for feature in self.features:
            places = "; ".join(_said(place) for place in feature.strongest[:3])
            lines.append(f"{feature.number:5d}  active on {feature.density:.2%}, energy {feature.energy:.1%}: {places}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show a table of the features."""
        from utils.concepts.concept_view import feature_html

        return feature_html(self)


def fit_layer_autoencoder(
    model: Any, examples: Any, layer: str | None = None, config: AutoencoderConfig | Mapping[str, Any] | None = None,
    *, pool: str = "positions", side: str = "output", channels: int | None = None, tokenizer: Any = None,
    batch_size: int = BATCH_SIZE,
) -> AutoencoderFit:  # fmt: skip
    """Fit a sparse autoencoder to what a layer makes of examples; the model is left as it was.

    Equal examples are trained on, or held out, together: they count as one where it is measured what was learned.

    Args:
        model: A run, a loaded model, an adapter or a module.
        examples: Texts or model inputs; see `utils.concepts.examples.example_batches`.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        config: Settings, or their names and values; None takes the defaults.
        pool: ``"positions"`` for a vector at each position of a sample, or ``"flat"`` for one with all of them.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        channels: The axis of features, where the shape leaves it open.
        tokenizer: For texts; None takes the run's.
        batch_size: Samples that go through the model at a time.

    Raises:
        ConfigError: No such layer, pool or side, or examples of no known kind.
        DataError: Too few different examples or vectors, not finite or all equal.
        AdapterError: The model cannot be called, or the layer makes nothing of each sample.
    """
    config = settings_of(AutoencoderConfig, config)
    check_choice("side", side, SIDES)
    if not isinstance(pool, str) or pool not in POOLS:
        raise ConfigError(
            f"The pool is {pool!r}.",
            f"Expected one of {', '.join(POOLS)}: a reconstruction of means cannot be put back into the model.",
            "Choose one.",
        )
    adapter = adapter_of(model)
    made = example_batches(model, examples, tokenizer, batch_size)
    # An example that is there again must not be held out while its twin is trained on.
    first: dict[bytes, int] = {}
    same = torch.tensor([first.setdefault(key, number) for number, key in enumerate(made.keys(adapter.main_input))])
    read = representations(adapter, made.batches, layer, pool, side=side, channels=channels)
    fit = fit_autoencoder(read.values, config, same[made.order[read.samples]])
    return replace(fit, layer=read.layer, side=read.side, pool=read.pool)


def strongest_features(
    fit: AutoencoderFit, values: Tensor, samples: Tensor | None = None, positions: Tensor | None = None, *,
    count: int = 12, top: int = 6, numbers: list[int] | None = None,
) -> FeatureView:  # fmt: skip
    """Return the features of most energy with the places where each is strongest.

    Args:
        fit: The autoencoder.
        values: ``(n, width)``, of the layer that it was fitted on.
        samples: int64 ``(n,)``: which sample each is of; None takes each as one.
        positions: int64 ``(n,)``: its position in it; None for none.
        count: How many features.
        top: How many examples for each.
        numbers: These features instead.

    Raises:
        ConfigError: The values have another width, a feature does not exist, or a number is below 1.
        DataError: There are no values, or `samples` and `positions` do not match them.
    """
    check_fit(fit)
    chosen = _chosen(fit, count, top, numbers)
    made = fit.autoencoder
    values = read_table(values, made.width, "the autoencoder")
    samples, positions = as_tensor(samples), as_tensor(positions)
    whole = torch.arange(len(values))
    samples = whole if samples is None else samples
    positions = torch.full_like(whole, -1) if positions is None else positions
    if not len(values) or any(getattr(own, "shape", None) != whole.shape for own in (samples, positions)):
        kinds = [f"of the shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
                 for v in (samples, positions)]  # fmt: skip
        raise DataError(
            f"There are {len(values)} vectors, samples {kinds[0]} and positions {kinds[1]}.",
            "Expected one vector at least, and one sample and position for each.",
            "Give what `representations` returned.",
        )
    codes = torch.cat([made.encode(part.float().cpu()) for part in values.split(READ_AT_A_TIME)])
    energies = codes.square().sum(0)
    if chosen is None:
        chosen = energies.argsort(descending=True, stable=True)[:count].tolist()
        chosen = [number for number in chosen if float(energies[number]) > 0]
    rows = []
    for number in chosen:
        strengths = codes[:, number]
        on = strengths > 0
        places: dict[int, Strongest] = {}
        for row in strengths.argsort(descending=True, stable=True)[: int(on.sum())].tolist():
            own = int(samples[row])
            if own not in places:
                places[own] = Strongest(own, int(positions[row]), float(strengths[row]))
            if len(places) == top:
                break
        mean = float(strengths[on].mean()) if bool(on.any()) else 0.0
        share = float(energies[number] / energies.sum().clamp_min(1e-30))
        rows.append(Feature(number, float(on.float().mean()), mean, share, tuple(places.values())))
    return FeatureView(tuple(rows), made.features, fit.layer)


def layer_features(
    model: Any, fit: AutoencoderFit, examples: Any, *, count: int = 12, top: int = 6, numbers: list[int] | None = None,
    channels: int | None = None, tokenizer: Any = None, batch_size: int = BATCH_SIZE,
) -> FeatureView:  # fmt: skip
    """Return the features of most energy with the examples that each is strongest on.

    Args:
        model: What the autoencoder was fitted on.
        fit: From `fit_layer_autoencoder`.
        examples: Texts or model inputs, the same or others.
        count: How many features.
        top: How many examples for each.
        numbers: These features instead.
        channels: As it was when the autoencoder was fitted, and so the next two.
        tokenizer: See there.
        batch_size: See there.

    Raises:
        ConfigError: The autoencoder was not fitted on a layer, a feature does not exist, or a number is below 1.
        DataError: There is no example.
    """
    check_layer(fit)
    _chosen(fit, count, top, numbers)
    adapter = adapter_of(model)
    made = example_batches(model, examples, tokenizer, batch_size)
    read = representations(adapter, made.batches, fit.layer, fit.pool, side=fit.side, channels=channels)
    view = strongest_features(
        fit, read.values, made.order[read.samples], read.positions, count=count, top=top, numbers=numbers
    )
    known = tokenizer_of(model, tokenizer)
    if known is None or adapter.modality != "tokens" or fit.pool != "positions":
        return view
    ids = dict(zip(made.order.tolist(), (row for b in made.batches for row in b[adapter.main_input]), strict=True))
    features = []
    for feature in view.features:
        shown = tuple(replace(place, text=_around(known, ids[place.example], place)) for place in feature.strongest)
        features.append(replace(feature, strongest=shown))
    return replace(view, features=tuple(features))


def check_fit(fit: Any) -> None:
    """Check that this is a fitted autoencoder.

    Raises:
        ConfigError: It is something else.
    """
    check_kind(fit, AutoencoderFit, "autoencoder", "Give what fit_layer_autoencoder or load_autoencoder returned.")


def _chosen(fit: AutoencoderFit, count: Any, top: Any, numbers: Any) -> list[int] | None:
    """Check what is asked for, and return the numbers of features; None for those of most energy."""
    check_count("count", count, 1)
    check_count("top", top, 1)
    if numbers is None:
        return None
    features = fit.autoencoder.features
    numbers = as_tensor(numbers)
    if isinstance(numbers, Tensor) and numbers.layout == torch.strided:
        numbers = numbers.flatten().tolist()
    given = list(numbers) if isinstance(numbers, (list, tuple, range)) else [numbers]
    for number in given:
        if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= int(number) < features:
            raise ConfigError(
                f"There is no feature {shown(number)}.",
                f"Expected a list of whole numbers from 0 to {features - 1}.",
                "Choose among them.",
            )
    return [int(number) for number in given]


def check_layer(fit: Any) -> None:
    """Check that an autoencoder was fitted on a layer.

    Raises:
        ConfigError: It is none, or was fitted on vectors that were given as such.
    """
    check_fit(fit)
    if not fit.layer or fit.pool not in POOLS:
        raise ConfigError(
            "The autoencoder was fitted on vectors of no known layer.",
            "Expected one from `fit_layer_autoencoder`.",
            "Fit it on a layer of the model.",
        )


def _around(tokenizer: Any, ids: Tensor, place: Strongest) -> tuple[str, str, str]:
    """Return the text before, at and after a place."""
    at, row = place.position, ids.tolist()
    parts = row[max(0, at - AROUND) : at], row[at : at + 1], row[at + 1 : at + 1 + AROUND]
    before, here, after = (tokenizer.decode(part) for part in parts)
    return before, here, after


def _said(place: Strongest) -> str:
    if any(place.text):
        before, here, after = place.text
        return f"{before}[{here}]{after}".replace("\n", " ")
    where = f", position {place.position}" if place.position >= 0 else ""
    return f"example {place.example}{where} ({place.strength:.2f})"
