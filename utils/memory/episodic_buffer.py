"""Samples of a stream, kept for later within a fixed number of bytes.

What stays is decided by one of three rules (`utils.memory.replacement`): a uniform sample of the stream (Vitter 1985,
"Random sampling with a reservoir", ACM TOMS 11(1), algorithm R), one that is balanced between groups such as classes
(Chrysakis & Moens 2020, "Online continual learning from imbalanced data", ICML), or the highest priorities. What is
drawn for rehearsal is a function of a number, the seed and the content, so that a resumed run draws the same.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.memory.buffer_content import NOT_KEPT, Content, restored
from utils.memory.buffer_view import buffer_table, summary
from utils.memory.counter_stream import CounterStream, drawn
from utils.memory.entries import checked_priorities, listed_groups, whole_numbers
from utils.memory.ledger import FREE, Ledger
from utils.memory.replacement import RULES
from utils.memory.sample_storage import RESERVED, Layout, allocated, checked, checked_samples
from utils.runtime.arguments import LARGEST, described, instance_of, is_whole, one_of, whole
from utils.runtime.errors import CheckpointError, ConfigError, DataError
from utils.runtime.files import checked_path
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import shown

SLOTS = "Give slots that `add` or `sample` returned, before anything else was added or removed."


class EpisodicBuffer:
    """A bounded set of samples, each a row of named tensors, with group, time-stamp, priority and rehearsal count.

    Samples lie on the CPU in slots 0 to capacity - 1. A slot stands for a sample until the next `add` or `remove`, or
    until the buffer has to shrink (`update`, `widen`).

    The three policies:

    - ``"reservoir"``: of n samples seen, each is kept with probability capacity / n.
    - ``"balanced"``: groups are of equal size as far as the stream allows; within each group as above.
    - ``"priority"``: the highest priorities are kept (of equal ones the earliest) and drawn in proportion to them.

    A buffer that has free slots, at first or after `remove`, takes in whatever comes next. Decisions do not depend on
    how the stream is cut into batches.
    """

    def __init__(
        self,
        capacity: int | None = None,
        max_bytes: int | None = None,
        policy: str = "reservoir",
        seed: int = 0,
        directory: str | Path | None = None,
        source: str = "",
    ) -> None:
        """Start empty; the first samples say which fields there are.

        Args:
            capacity: Most samples.
            max_bytes: Most bytes for samples and what is known about each; the smaller of both bounds counts.
            policy: ``"reservoir"``, ``"balanced"`` or ``"priority"``.
            seed: Of all that is random.
            directory: Where samples lie in mapped files instead of main memory; nothing else changes. The files are
                gone when the process ends: what is to be kept is the state.
            source: What the samples depend on beside the data, such as a tokenizer's fingerprint; a state with another
                one is refused.

        Raises:
            ConfigError: No bound, a bound below 1, an unknown policy, or another argument of a wrong kind.
        """
        action = "Give another number, or leave it out and give the other bound."
        if capacity is not None:
            capacity = whole(capacity, "The capacity of the buffer", 1, action)
        if max_bytes is not None:
            max_bytes = whole(max_bytes, "The max_bytes of the buffer", 1, action)
        if capacity is None and max_bytes is None:
            raise ConfigError(
                "The buffer has neither a capacity nor max_bytes.",
                "Expected a bound, or it would grow with the stream.",
                "Give the most samples as capacity, the most bytes as max_bytes, or both.",
            )
        one_of(policy, "The policy of the buffer", RULES, 'Choose one of them, or leave it out for "reservoir".')
        seed = whole(seed, "The seed of the buffer", -LARGEST, "0 is usual.")
        instance_of(
            source, str, "The source of the buffer's samples", "Expected a text.", "Give one, such as a fingerprint."
        )
        self.max_bytes, self.policy, self.seed, self.source = max_bytes, policy, seed, source
        self.directory = None if directory is None else checked_path(directory, "the buffer's samples", ConfigError)
        self.seen = 0
        """Samples given to `add` so far."""
        self._most = capacity
        self._stream = CounterStream()
        self._key = derive_seed(seed, "buffer")
        self._content = Content(0, {}, Ledger(0), RULES[policy]())

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._content.ledger.occupied)

    @property
    def capacity(self) -> int | None:
        """Most samples; None when that follows from the bytes of the first sample, which has not come."""
        return self._content.capacity if self._content.fields else (None if self.max_bytes else self._most)

    @property
    def nbytes(self) -> int:
        """Bytes taken for samples and what is known about each, free slots included; never above `max_bytes`."""
        return self._content.capacity * self._content.bytes_for(self.layouts)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Shape and type of the fields of one sample, by name; empty before the first sample."""
        return dict(self._content.layouts)

    @property
    def slots(self) -> Tensor:
        """Slots that hold a sample, int64, ascending."""
        return torch.from_numpy(self._content.ledger.occupied.copy())

    @property
    def counts(self) -> dict[int, int]:
        """How many samples of each group there are."""
        groups, counts = np.unique(self._content.ledger.groups[self._content.ledger.occupied], return_counts=True)
        return dict(zip(groups.tolist(), counts.tolist(), strict=True))

    def about(self, slots: Tensor | None = None) -> dict[str, Tensor]:
        """Return what is known about samples, beside their fields.

        Args:
            slots: int64 [n]; all that hold a sample, ascending, by default.

        Returns:
            ``groups``, ``times``, ``rehearsals`` (how often drawn), ``priorities`` (float64) and ``arrivals`` (number
            in the stream), each [n].

        Raises:
            DataError: A slot that holds no sample.
        """
        places = self._content.ledger.occupied if slots is None else self._places(slots)[0]
        return {name: torch.from_numpy(column[places]) for name, column in self._content.ledger.columns.items()}

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """Return samples by their slots, int64 [n], without counting that as a rehearsal.

        Raises:
            DataError: A slot that holds no sample.
        """
        index = torch.from_numpy(self._places(slots)[0])
        return {name: field.index_select(0, index) for name, field in self._content.fields.items()}

    def add(
        self,
        samples: Mapping[str, Tensor],
        groups: Tensor | None = None,
        priorities: Tensor | None = None,
        time: int = 0,
    ) -> Tensor:
        """Offer samples of the stream.

        Args:
            samples: Fields by name, each [n, ...], on any device; names, shapes and types are those of the first call.
            groups: Whole numbers [n], such as classes or tasks; needed by the policy ``"balanced"``, otherwise 0.
            priorities: Numbers [n], at least 0; needed by the policy ``"priority"``, otherwise 1.
            time: Time-stamp of all of them, such as the step.

        Returns:
            The slot of each sample, int64 [n]; -1 for those that were not kept.

        Raises:
            DataError: Samples that do not fit those before, groups or priorities that are missing or no numbers, bytes
                for less than one sample, more groups than slots in a balanced buffer, no room in the directory. The
                buffer is as it was.
        """
        content = self._content
        layouts = content.layouts
        fields = checked_samples(samples, layouts)
        rows = next(iter(fields.values())).shape[0]
        kinds = self._groups(groups, rows)
        weights = checked_priorities(priorities, rows, self.policy == "priority")
        moment = whole(
            time, "The time-stamp", -LARGEST, "Give the number of the step, or leave it out.", error=DataError
        )
        slots = np.full(rows, NOT_KEPT, dtype=np.int64)
        if not rows:
            return torch.from_numpy(slots)
        capacity = content.capacity
        if not layouts:
            layouts = {name: Layout.of(values) for name, values in fields.items()}
            capacity = self._fitting(layouts)
        content.rule.check(kinds, capacity)
        if not content.fields:
            stored = {name: allocated(layout, capacity, self.directory) for name, layout in layouts.items()}
            content = self._content = Content(capacity, stored, Ledger(capacity), content.rule)
        uniforms = self._stream.uniforms(self._key, self.seen, rows)
        chosen = content.rule.place(content.ledger, kinds, weights, uniforms, self.seen)
        if chosen:
            places, picked = (np.fromiter(part, np.int64, len(chosen)) for part in (chosen.keys(), chosen.values()))
            index, source = torch.from_numpy(places), torch.from_numpy(picked)
            for name, values in fields.items():
                part = values.index_select(0, source.to(values.device)).cpu()
                content.fields[name].index_copy_(0, index, part)
            entries: dict[str, np.ndarray | int] = {
                "groups": kinds[picked],
                "times": moment,
                "rehearsals": 0,
                "priorities": weights[picked],
                "arrivals": self.seen + picked,
            }
            content.ledger.write(places, entries)
            slots[picked] = places
        self.seen += rows
        return torch.from_numpy(slots)

    def sample(
        self, count: int, draw: int, groups: Iterable[int] | None = None, without: Iterable[int] | None = None
    ) -> dict[str, Tensor]:
        """Draw samples for rehearsal, none twice.

        Args:
            count: How many; there are fewer when fewer fit.
            draw: Number of the draw, such as the step: the same number draws the same from the same content.
            groups: Only from these.
            without: Not from these.

        Returns:
            The fields, each [count, ...], in the order drawn, and ``slots``, int64 [count].

        Raises:
            DataError: There is nothing to draw from, or an argument is of a wrong kind.
        """
        count = whole(count, "The number of samples to draw", 1, "Draw one or more.", error=DataError)
        draw = whole(draw, "The number of the draw", -LARGEST, "Give that of the step.", error=DataError)
        ledger = self._content.ledger
        places = ledger.occupied
        for name, wanted, keep in (("groups", groups, True), ("without", without, False)):
            if wanted is not None:
                inside = np.isin(ledger.groups[places], listed_groups(wanted, name))
                places = places[inside if keep else ~inside]
        if not len(places):
            raise DataError(
                f"{count} samples were to be drawn, and none of the {len(self)} in the buffer fits.",
                "Expected one at least.",
                "Add samples first, or draw from other groups.",
            )
        weights = ledger.columns["priorities"][places] if self.policy == "priority" else None
        key = derive_seed(self.seed, "draw", draw)
        places = places[drawn(self._stream, key, min(count, len(places)), len(places), weights)]
        ledger.columns["rehearsals"][places] += 1
        index = torch.from_numpy(places)
        batch = {name: field.index_select(0, index) for name, field in self._content.fields.items()}
        batch[RESERVED] = index
        return batch

    def update(self, slots: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Write fields of samples anew, or give all samples a new field.

        Args:
            slots: int64 [n], none twice; rows whose slot is -1 are passed over, as `add` returns it.
            values: By name, each [n, ...]. A new field needs a row for every sample in the buffer; where `max_bytes`
                leaves no room for it, the buffer shrinks and gives up samples by the rule of its policy.

        Returns:
            Where the samples lie now, int64 [n]: `slots`, unless the buffer shrank; -1 for those that were given up.

        Raises:
            DataError: Slots or values that do not fit, or bytes for less than a sample or than the groups. The buffer
                is as it was.
        """
        layouts = self.layouts
        places, rows = self._places(slots)
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise DataError(
                f"The values are {described(values)}.",
                "Expected a dict of tensors by name, a row for each slot.",
                'Give, for example, {"logits": logits}.',
            )
        picked = torch.from_numpy(rows)
        fields = {
            name: checked(value, name, len(slots), layouts.get(name)).index_select(0, picked.to(value.device)).cpu()
            for name, value in values.items()
        }
        new = fields.keys() - layouts.keys()
        if new:
            if not layouts or RESERVED in new or len(places) != len(self):
                raise DataError(
                    f"The new fields {sorted(new)} are given for {len(places)} of {len(self)} samples.",
                    f"Expected a row for each sample in the buffer, one at least, and no field named {RESERVED!r}.",
                    "Give it for `buffer.slots`, or with the samples when they are added.",
                )
            order = torch.from_numpy(np.argsort(places))
            places = self._refit({name: fields[name].index_select(0, order) for name in sorted(new)})[places]
        left = np.flatnonzero(places != NOT_KEPT)
        index, source = torch.from_numpy(places[left]), torch.from_numpy(left)
        for name in fields.keys() - new:
            self._content.fields[name].index_copy_(0, index, fields[name].index_select(0, source))
        lie = torch.full((len(slots),), NOT_KEPT)
        lie[picked] = torch.from_numpy(places)
        return lie

    def prioritise(self, slots: Tensor, priorities: Tensor) -> None:
        """Give samples other priorities.

        Args:
            slots: int64 [n], none twice; rows whose slot is -1 are passed over.
            priorities: Numbers [n], at least 0.

        Raises:
            DataError: Slots or priorities that do not fit; nothing was changed.
        """
        places, rows = self._places(slots)
        values = checked_priorities(priorities, len(slots), needed=True)
        self._content.ledger.columns["priorities"][places] = values[rows]

    def remove(self, slots: Tensor) -> None:
        """Take samples out; their slots are free for whatever comes next.

        What comes next is then kept more often than the policy says, until the slots are filled.

        Args:
            slots: int64 [n], none twice; -1 is passed over.

        Raises:
            DataError: A slot that holds no sample; nothing was changed.
        """
        places, _ = self._places(slots)
        self._content.rule.forget(self._content.ledger.groups[places])
        self._content.ledger.clear(places)

    def widen(self, name: str, size: int, fill: float = 0.0) -> Callable[[], None]:
        """Pad the last dimension of a stored field at its end, as for logits of a head that grew.

        How many of the entries were real is for the caller to store, as a field of its own, when samples are added.
        Where `max_bytes` leaves no room, the buffer shrinks and gives up samples by the rule of its policy.

        Args:
            name: Of the field.
            size: New size of its last dimension, at least the present one.
            fill: Value of the new entries.

        Returns:
            What puts the buffer back as it was, the same tensors included, as long as nothing was added since: a
            `utils.training.state.Undo`.

        Raises:
            DataError: No such field, no dimension to pad, a smaller size, a fill that the type does not hold, or bytes
                for less than a sample or than the groups. The buffer is as it was.
        """
        layout = self.layouts.get(name) if isinstance(name, str) else None
        if layout is None or not layout.shape:
            raise DataError(
                f"The buffer has no field {shown(name)} with a dimension to widen.",
                f"Expected one of {sorted(name for name, layout in self.layouts.items() if layout.shape)}.",
                "Give the name under which it was added.",
            )
        present = layout.shape[-1]
        action = "Give the new size of the last dimension, not the difference: stored entries are never cut."
        size = whole(
            size, f"The new size of the field {name!r}, which is {present} wide,", present, action, error=DataError
        )
        number = isinstance(fill, (int, float)) and abs(fill) <= sys.float_info.max
        kept = torch.tensor(fill if number else math.nan, dtype=torch.float64).to(layout.dtype).double().item()
        if not number or not math.isfinite(kept) or (not layout.dtype.is_floating_point and kept != fill):
            raise DataError(
                f"The field {name!r} is to be filled with {described(fill)}.",
                f"Expected a finite value that {str(layout.dtype).removeprefix('torch.')} holds.",
                "Fill with zeros, and store how many entries are real as a field of its own.",
            )
        before = self._content
        if size > present:
            values = before.fields[name].index_select(0, self.slots)
            self._refit({name: torch.nn.functional.pad(values, (0, size - present), value=fill)})

        def undo() -> None:
            self._content = before

        return undo

    def state_dict(self) -> dict[str, Any]:
        """Return all there is, as numbers, texts and tensors that are copies; a buffer that loads it goes on alike."""
        return {"settings": self._settings(), "source": self.source, "seen": self.seen, **self._content.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            CheckpointError: It is of a buffer with other settings or another source, or does not hold together. The
                buffer is as it was.
            DataError: There is no room in the directory; the buffer is as it was.
        """
        try:
            if not isinstance(state, Mapping) or not isinstance(state["source"], str):
                raise TypeError("it is no dict with the source of the samples as a text")
            settings, source = dict(state["settings"]), state["source"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _torn(error) from error
        if settings != self._settings():
            raise CheckpointError(
                f"The saved buffer has the settings {settings}.",
                f"Expected those of this buffer, {self._settings()}.",
                "Resume with the settings that wrote it, or start with an empty buffer.",
            )
        if source != self.source:
            raise CheckpointError(
                f"The saved buffer holds samples made with {source or 'an unnamed source'!r}.",
                f"Expected {self.source or 'an unnamed source'!r}: ids of another tokenizer mean something else.",
                "Load the tokenizer that the samples were made with, or start with an empty buffer.",
            )
        try:
            content = restored(state, RULES[self.policy](), self.directory)
            fitting = self._fitting(content.layouts) if content.fields else 0
            seen = state["seen"]
            if content.capacity > fitting or not is_whole(seen, len(content.ledger.occupied)):
                raise ValueError("there is more in it than there may be")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            raise _torn(error) from error
        self._content, self.seen = content, seen

    def to_dict(self) -> dict[str, Any]:
        """Return what it holds as plain values."""
        return summary(self)

    def __repr__(self) -> str:
        most = "unknown" if self.capacity is None else self.capacity
        return f"EpisodicBuffer({self.policy}, {len(self)} of {most} samples, {self.seen} seen)"

    def _repr_html_(self) -> str:
        """Show in a notebook how full it is, with a bar for each group."""
        return buffer_table(self)

    def _settings(self) -> dict[str, Any]:
        return {"capacity": self._most, "max_bytes": self.max_bytes, "policy": self.policy, "seed": self.seed}

    def _fitting(self, layouts: Mapping[str, Layout]) -> int:
        """Return how many samples of these fields both bounds allow, at least 1."""
        each = self._content.bytes_for(layouts)
        bounds = [] if self._most is None else [self._most]
        bounds += [] if self.max_bytes is None else [self.max_bytes // each]
        if not min(bounds):
            raise DataError(
                f"A sample takes {each:,} bytes in the buffer, which may take {self.max_bytes:,}.",
                "Expected room for one sample at least.",
                "Raise max_bytes, or store less of each sample, for example pixels as uint8.",
            )
        return min(bounds)

    def _refit(self, rows: Mapping[str, Tensor]) -> np.ndarray:
        """Give all samples a new or wider field and shrink where the bytes ask for it, see `Content.refitted`."""
        layouts = self.layouts | {name: Layout.of(values) for name, values in rows.items()}
        capacity = min(self._content.capacity, self._fitting(layouts))
        key = derive_seed(self.seed, "shrink", self.seen, capacity)
        self._content, moved = self._content.refitted(rows, capacity, self.directory, self._stream, key)
        return moved

    def _groups(self, groups: Tensor | None, rows: int) -> np.ndarray:
        if groups is None and self.policy != "balanced":
            return np.zeros(rows, dtype=np.int64)
        return whole_numbers(groups, rows, "groups", "Give the class or the task of each sample.")

    def _places(self, slots: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots that are not -1, and their rows, after checking that each holds a sample."""
        given = whole_numbers(slots, len(slots) if isinstance(slots, Tensor) and slots.ndim else 0, "slots", SLOTS)
        rows = np.flatnonzero(given != NOT_KEPT)
        places = given[rows]
        inside = (places >= 0) & (places < self._content.capacity)
        holds = inside.copy()
        holds[inside] = self._content.ledger.columns["arrivals"][places[inside]] != FREE
        bad = places[~holds].tolist()
        if bad or len(np.unique(places)) != len(places):
            raise DataError(
                f"The slots {bad[:5]} hold no sample." if bad else "Some slots are given twice.",
                "Expected slots that hold samples, each once.",
                SLOTS,
            )
        return places, rows


def _torn(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The state of the buffer does not hold together: {type(error).__name__}: {error}.",
        "Expected what `EpisodicBuffer.state_dict` returned.",
        "Load another checkpoint, or start with an empty buffer.",
    )
