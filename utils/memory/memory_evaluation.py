"""What a nearest-neighbour memory is worth: settings chosen on one split, measured on another, beside a control.

The control is the same memory with its tokens dealt out at random. It still knows how often each token occurs, which
helps a model in a domain it has not seen; so it gets settings of its own, chosen as those of the memory are, and what
the memory is worth beyond it is what looking up the right place is worth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.memory.datastore import Datastore
from utils.memory.key_reader import WHOLE
from utils.memory.nearest_neighbour_head import NearestNeighbourHead, check_head
from utils.memory.neighbour_mixture import Lookup, NeighbourConfig, check_lookup, fit_gate, mixed, window_hashes
from utils.runtime.arguments import LARGEST, described, whole
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.resources import format_bytes
from utils.runtime.seeding import derive_seed

NEIGHBOURS = (8, 32, 128, 256)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Tried temperatures, as shares of the mean squared distance of the neighbours."""
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FEW = 20
"""Groups below which an interval is called rough."""
CHOICES = ("auto", True, False)
"""Whether a gate is fitted: where it helps texts that it was not fitted on, always, or never."""
LEAST_SCALE = 1e-6
MOST_RESAMPLES = 1_000_000
"""A bootstrap takes memory for each."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two perplexities over the same tokens, with its 95% interval; below 1 the first is better."""

    ratio: float
    """As measured."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (95% {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Choice:
    """Settings, and how good they were on the development split that they were chosen on."""

    config: NeighbourConfig
    """The best settings."""
    ratio: float
    """Perplexity with the memory by the model's own, on the development split."""
    gate_ratio: float | None
    """The same with a gate, on texts that this gate was not fitted on; None where none was tried."""
    tokens: int
    """Predicted tokens of the development split."""
    tried: int
    """Settings that were compared."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True, repr=False)
class MemoryEvaluation:
    """What a memory does to the perplexity of a test split."""

    base: float
    """Perplexity of the model alone."""
    memory: float
    """With the memory."""
    shuffled: float
    """With the same memory and settings, the tokens dealt out at random."""
    shuffled_tuned: float
    """With shuffled tokens and settings chosen for them."""
    gain: Ratio
    """Memory by model alone."""
    control: Ratio
    """Shuffled memory, same settings, by model alone."""
    control_tuned: Ratio
    """Shuffled memory, settings of its own, by model alone."""
    beyond_control: Ratio
    """Memory by shuffled memory with settings of its own: what it is worth to find the right place."""
    median: float
    """Median over texts of the ratio of memory by model alone: a few texts that copy the memory do not move it."""
    improved: float
    """Share of texts whose perplexity the memory lowers."""
    tokens: int
    """Predicted tokens."""
    groups: int
    """Documents, or windows, that the intervals are drawn over."""
    keys: int
    """Memories."""
    nbytes: int
    """Bytes of memory and index."""
    search: str
    """How neighbours were searched."""
    config: NeighbourConfig
    """Settings of the memory."""
    control_config: NeighbourConfig
    """Settings of the shuffled memory."""
    notes: tuple[str, ...] = ()
    """What to know about these numbers."""

    @property
    def helps(self) -> bool:
        """Whether the memory lowers the perplexity, and more than a shuffled one, both beyond chance."""
        return self.gain.high < 1 and self.beyond_control.high < 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "notes": list(self.notes), "helps": self.helps}

    def rows(self) -> list[dict[str, str]]:
        """Return a row of text for each way of answering."""
        gain = "95% interval"
        rows = [{"answered by": "the model alone", "perplexity": f"{self.base:.2f}", "change": "", gain: ""}]
        for name, perplexity, ratio in (
            ("model and memory", self.memory, self.gain),
            ("control: shuffled memory, same settings", self.shuffled, self.control),
            ("control: shuffled memory, its own settings", self.shuffled_tuned, self.control_tuned),
        ):
            interval = f"{ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}"
            rows.append(
                {
                    "answered by": name,
                    "perplexity": f"{perplexity:.2f}",
                    "change": f"{ratio.ratio - 1:+.1%}",
                    gain: interval,
                }
            )
        return rows

    def __str__(self) -> str:
        """Return the numbers as a table."""
        table = [list(self.rows()[0]), *(list(row.values()) for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, *self._told()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the numbers as a table, and what they rest on."""
        rows = self.rows()
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
        body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row.values())}</tr>" for row in rows)
        told = "<br>".join(map(escape, self._told()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{told}</p>"

    def _told(self) -> list[str]:
        """Say what the numbers mean and rest on."""
        about = self.config
        share = "chosen for each token" if about.gate else f"{about.weight:g}"
        return [
            f"The memory {'helps' if self.helps else 'does not help beyond chance'}; perplexity with it by that of the "
            f"tuned control: {self.beyond_control}.",
            f"{self.keys:,} keys, {format_bytes(self.nbytes)}; {about.neighbours} neighbours, temperature "
            f"{about.temperature:.3g}, share {share}; {self.search}.",
            f"{self.tokens:,} tokens of {self.groups} texts, paired bootstrap over texts; lower in {self.improved:.0%} "
            f"of them, median {self.median - 1:+.1%}.",
            *self.notes,
        ]  # fmt: skip


def choose_settings(
    lookup: Lookup, groups: Sequence[int] | Tensor | None = None, gate: bool | str = "auto", seed: int = 0
) -> Choice:
    """Choose neighbours, temperature and share, and a gate where it helps, on a development split.

    Args:
        lookup: What `NearestNeighbourHead.lookup` found there, with as many neighbours as may be chosen.
        groups: A number for each window, the same for windows of one document; None takes each window as a document
            of its own. Gates are compared on documents that they were not fitted on.
        gate: ``"auto"``, True or False, see `CHOICES`.
        seed: Of the halves that gates are compared on.

    Raises:
        ConfigError: `lookup` is none, or `gate` or `seed` is out of range.
        DataError: `groups` does not fit the windows.
    """
    check_lookup(lookup, "The lookup")
    _check_gate(gate)
    seed = whole(seed, "The seed", -LARGEST, "0 is usual.")
    where, number = _grouped(lookup, groups)
    count = lookup.distances.shape[1]
    best, tried = (float("inf"), NeighbourConfig(min(NEIGHBOURS[0], count), 1.0, 0.0)), 0
    scale = max(float(lookup.distances.mean()), LEAST_SCALE)
    weights = torch.tensor(WEIGHTS)
    for neighbours in sorted({min(number, count) for number in NEIGHBOURS}):
        for temperature in (share * scale for share in TEMPERATURES):
            config = NeighbourConfig(neighbours, temperature, 0.0)
            memory = lookup.memory(config)
            for weight, logit in zip(WEIGHTS, weights.logit(), strict=True):
                loss = float(-mixed(lookup.model, memory, logit).double().mean())
                tried += 1
                if loss < best[0]:
                    best = loss, replace(config, weight=weight)
    loss, config = best
    base, gate_ratio = float(-lookup.model.double().mean()), None
    if gate and config.weight > 0:
        if number > 1:
            side = torch.from_numpy(np.random.default_rng(derive_seed(seed, "halves")).permutation(number) % 2)[where]
            unseen = torch.empty(len(side))
            for half in (0, 1):
                fitted = replace(config, gate=fit_gate(lookup.part(side != half), config))
                unseen[side == half] = lookup.part(side == half).log_probability(fitted)
            crossed = float(-unseen.double().mean())
            gate_ratio = float(np.exp(crossed - base))
            tried += 1
            gate = gate is True or crossed < loss
        if gate is True:
            config = replace(config, gate=fit_gate(lookup, config))
            loss = float(-lookup.log_probability(config).double().mean())
    return Choice(config, float(np.exp(loss - base)), gate_ratio, len(lookup.model), tried)


def evaluate_memory(
    head: NearestNeighbourHead,
    development: Lookup,
    test: Lookup,
    groups: Sequence[int] | Tensor | None = None,
    *,
    development_groups: Sequence[int] | Tensor | None = None,
    gate: bool | str = "auto",
    resamples: int = 5000,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> MemoryEvaluation:
    """Measure a memory on a test split with settings chosen on a development split.

    Args:
        head: Model and memory; its own settings are not used.
        development: What `NearestNeighbourHead.lookup` found on the development split.
        test: The same of the test split.
        groups: A number for each window of the test split, the same for windows of one document: intervals are drawn
            over documents, because tokens of one document go together. None takes each window as one.
        development_groups: The same of the development split.
        gate: Whether the memory's share may be chosen for each token, see `choose_settings`; never where the best share
            is 0.
        resamples: Of the bootstrap.
        seed: Of bootstrap and control.
        notes: What else to say about the numbers.

    Raises:
        ConfigError: A setting is out of range, or head or lookups are something else, or of another memory.
        DataError: The test split has fewer than two documents, `groups` does not fit, or memory, development and test
            split share windows: what was remembered or chosen on would be measured on.
    """
    resamples = whole(resamples, "resamples", 100, "5000 is usual.", most=MOST_RESAMPLES)
    seed = whole(seed, "The seed", -LARGEST, "0 is usual.")
    _check_gate(gate)
    if isinstance(notes, str) or not isinstance(notes, Sequence) or not all(isinstance(note, str) for note in notes):
        raise ConfigError(
            f"The notes are {described(notes)}.", "Expected a list of texts.", 'Give, for example, ["a first try"].'
        )
    check_head(head)
    for name, lookup in (("development", development), ("test", test)):
        check_lookup(lookup, f"The {name} split")
        _check_same(head.datastore, lookup, name)
    where, number = _grouped(test, groups)
    if number < 2:
        raise DataError(
            f"The test split has {number} document.", "Expected two at least, or there is no interval.",
            "Give more documents.",
        )  # fmt: skip
    _check_apart(head.datastore, {"development split": development, "test split": test})
    choice = choose_settings(development, development_groups, gate, seed)
    dealt = head.datastore.shuffled(seed).values
    control = choose_settings(development.with_values(dealt), development_groups, gate, seed)
    shuffled = test.with_values(dealt)
    answers = {
        "base": test.model,
        "memory": test.log_probability(choice.config),
        "shuffled": shuffled.log_probability(choice.config),
        "tuned": shuffled.log_probability(control.config),
    }
    sums = {name: _summed(value, where, number) for name, value in answers.items()}
    sizes = _summed(torch.ones(len(where)), where, number)
    generator = np.random.default_rng(derive_seed(seed, "bootstrap"))
    drawn = generator.multinomial(number, np.full(number, 1 / number), size=resamples)

    def ratio(first: str, second: str) -> Ratio:
        change = sums[second] - sums[first]
        means = (drawn @ change) / (drawn @ sizes)
        low, high = np.quantile(means, [0.025, 0.975])
        return Ratio(float(np.exp(change.sum() / sizes.sum())), float(np.exp(low)), float(np.exp(high)))

    own = (sums["base"] - sums["memory"]) / sizes
    told = [*notes]
    if not len(head.datastore.source):
        told.append("The datastore kept no text: whether it holds windows of the splits could not be checked.")
    if number < FEW:
        told.append(f"{number} texts are few: the intervals are rough.")
    perplexity = {name: float(np.exp(-value.sum() / sizes.sum())) for name, value in sums.items()}
    return MemoryEvaluation(
        perplexity["base"], perplexity["memory"], perplexity["shuffled"], perplexity["tuned"],
        ratio("memory", "base"), ratio("shuffled", "base"), ratio("tuned", "base"), ratio("memory", "tuned"),
        float(np.exp(np.median(own))), float((own < 0).mean()), len(where), number, len(head.datastore), head.nbytes,
        head.method, choice.config, control.config, tuple(told),
    )  # fmt: skip


def choose_memory(
    heads: Mapping[str, NearestNeighbourHead],
    ids: Tensor,
    labels: Tensor | None = None,
    groups: Sequence[int] | Tensor | None = None,
    *,
    gate: bool | str = "auto",
    seed: int = 0,
) -> tuple[str, dict[str, Choice]]:
    """Choose among memories that differ in layer or scaling, on a development split.

    Args:
        heads: The memories by name.
        ids: Token ids of the development split ``(n, length)``.
        labels: The token after each, as `pack_causal` returns them.
        groups: A number for each window, the same for windows of one document.
        gate: Whether the memory's share may be chosen for each token, see `choose_settings`.
        seed: Of the halves that gates are compared on.

    Returns:
        The name of the best, and the best settings of each.

    Raises:
        ConfigError: There is no memory to choose from, or a setting is out of range.
        DataError: A memory holds windows of the development split.
    """
    if not isinstance(heads, Mapping) or not heads:
        raise ConfigError(
            "There is no memory to choose from."
            if isinstance(heads, Mapping)
            else f"The heads are {described(heads)}.",
            "Expected one head at least, under its name.",
            'Give, for example, {"plain": head, "whitened": other}.',
        )
    for head in heads.values():
        check_head(head)
    choices = {}
    for name, head in heads.items():
        lookup = head.lookup(ids, labels, max(NEIGHBOURS))
        _check_apart(head.datastore, {"development split": lookup})
        choices[name] = choose_settings(lookup, groups, gate, seed)
    return min(choices, key=lambda name: choices[name].ratio), choices


def _check_gate(gate: Any) -> None:
    if not isinstance(gate, bool) and (not isinstance(gate, str) or gate not in CHOICES):
        raise ConfigError(
            f"gate is {described(gate)}.",
            "Expected auto, True or False.",
            '"auto" fits one where it helps texts that it has not seen.',
        )


def _check_same(datastore: Datastore, lookup: Lookup, name: str) -> None:
    """Refuse what was found in another memory."""
    rows = lookup.rows
    known = int(rows.max()) < len(datastore) and torch.equal(datastore.values.long()[rows], lookup.values)
    if not known:
        raise ConfigError(
            f"What was found for the {name} split is of another memory than the head's.",
            "Expected the tokens of this one.",
            "Look the text up again with this head: head.lookup(ids).",
        )


def _check_apart(datastore: Datastore, splits: Mapping[str, Lookup]) -> None:
    """Refuse splits that share windows with the memory, as far as it kept its text, or with each other.

    Windows that are mostly filling, as at the end of a text, do not count: their few tokens are equal by chance.
    """
    earlier = {"memory": window_hashes(datastore.source)}
    for name, lookup in splits.items():
        predicted = lookup.windows.bincount()
        whole = 2 * predicted[lookup.windows] >= predicted.max()
        for other, hashes in earlier.items():
            shared = lookup.windows[whole & torch.isin(lookup.hashes, hashes)].unique()
            if len(shared):
                shown = ", ".join(map(str, shared[:5].tolist())) + (", ..." if len(shared) > 5 else "")
                raise DataError(
                    f"{len(shared)} of {len(lookup.windows.unique())} windows of the {name} are in the {other} too: "
                    f"number {shown}.",
                    "Expected three splits without a window in common, or the measure is of repeating it.",
                    f"Take these windows out of the {name}, and split texts as a whole.",
                )
        earlier[name] = lookup.hashes


def _summed(values: Tensor, where: Tensor, number: int) -> np.ndarray:
    """Return the sum of values for each group, float64."""
    return torch.zeros(number, dtype=torch.float64).index_add_(0, where, values.double()).numpy()


def _grouped(lookup: Lookup, groups: Sequence[int] | Tensor | None) -> tuple[Tensor, int]:
    """Return the group of each place, from 0 on, and how many groups there are."""
    windows = lookup.windows
    if groups is not None:
        try:
            given = torch.as_tensor(groups).reshape(-1).cpu()
        except (TypeError, ValueError, RuntimeError):
            given = torch.empty(0)
        if given.dtype not in WHOLE or len(given) <= int(windows.max()):
            raise DataError(
                f"The groups are {described(groups)}, and there are windows up to number {int(windows.max())}.",
                "Expected a whole number for each window.",
                "Give the number of each window's document.",
            )
        windows = given[windows]
    _, where = windows.unique(return_inverse=True)
    return where, int(where.max()) + 1
