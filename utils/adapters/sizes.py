"""The input size that a flattening was written for, solved from what inputs of other sizes do.

Behind ``x.view(-1, 400)`` or a linear layer after a flattening only one size fits. Another one is refused with the
numbers that it came to and those that were needed, or folded into the batch: then the rows of the output are not the
samples. Both say how far off the size was.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from utils.adapters.capture import named_tensors
from utils.adapters.detection import Detection
from utils.adapters.plans import LONGEST_STATED, InputPlan
from utils.adapters.troubles import memory_ran_out, none_succeeded
from utils.runtime.resources import is_out_of_memory

RESHAPED = re.compile(r"shape '\[([-\d, ]+)\]' is invalid for input of size (\d+)")
MULTIPLIED = re.compile(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)")
LARGEST_SIDE, LONGEST_SERIES = 640, 65536
TRIES = 12
"""Sizes that are tried to close in on the one that fits."""
STARVED_TRIES = 2
"""Trials with one kind of input that may run out of memory before no more are made."""


def needed_features(error: BaseException, batch: int) -> float | None:
    """Return how many times the features of a sample were needed, as a refusal says; None where it does not.

    Args:
        error: What the model raised.
        batch: Number of samples that it was given.
    """
    text = str(error)
    if found := MULTIPLIED.search(text):
        _, given, wanted, _ = (int(number) for number in found.groups())
        return wanted / given if given and wanted != given else None
    if found := RESHAPED.search(text):
        shape, given = [int(number) for number in found[1].split(",")], int(found[2])
        wanted = math.prod(size for size in shape if size > 0)
        if shape[0] == -1:
            wanted *= batch
        elif shape[0] != batch or -1 in shape:
            # A batch size that is written into the code is no matter of the input's size.
            return None
        return wanted / given if given and wanted != given else None
    return None


def folded_rows(output: Any, batch: int, positions: int) -> float | None:
    """Return how many times the features of a sample were needed, where samples were folded into other rows.

    Args:
        output: What forward returned.
        batch: Number of samples that it was given.
        positions: Numbers in the main input of all samples; a list of all positions has as many rows.

    Returns:
        None where some axis of the output is the samples or all their positions.
    """
    found = [tuple(tensor.shape) for _, tensor in named_tensors(output) if tensor.is_floating_point() and tensor.dim()]
    if isinstance(output, (list, tuple)) and len(output) == batch:
        # One answer per sample, in a list.
        return None
    if not found or any(size in (batch, positions) for shape in found for size in shape) or not found[0][0]:
        return None
    return batch / found[0][0]


class SizeSearch:
    """Passes plans on and, after those of one kind, adds plans of the size that their outcomes ask for.

    Attributes:
        first: The likeliest plan, or one that ran out of memory, which got further; None while there is none.
        sized: Whether what was refused depends on the input's size, so that some size may still fit.
    """

    def __init__(self, plans: Iterator[InputPlan], batch: int) -> None:
        """Take the plans.

        Args:
            plans: Ways of calling the model, the likeliest first.
            batch: Number of samples in each trial.
        """
        self._plans, self._batch = plans, batch
        self._need: float | None = None
        self._folded: InputPlan | None = None
        self._last = False
        self._tried: InputPlan | None = None
        self._hungry: Counter[str] = Counter()
        self._starved: BaseException | None = None
        self.first: InputPlan | None = None
        self.sized = False

    def __iter__(self) -> Iterator[InputPlan]:
        """Yield plans; after each, `refused` or `fits` is told how it went."""
        for plan in self._candidates():
            if self._hungry[plan.modality] < STARVED_TRIES:
                self._tried = plan
                yield plan

    def _candidates(self) -> Iterator[InputPlan]:
        """Yield the plans that were given, with those of other sizes in their places."""
        group: tuple[Any, ...] | None = None
        start: tuple[InputPlan, float] | None = None
        for plan in self._plans:
            self.first = self.first or plan
            size = plan.shape.value
            kind = (plan.modality, plan.names, len(size), size[:1] if len(size) > 1 else (), plan.labels_per_token)
            if kind != group:
                if start is not None:
                    yield from self._solve(*start)
                group, start = kind, None
            self._need = None
            yield plan
            if self._need is None or plan_size(plan) is None:
                continue
            self.sized = self.sized or (start is not None and start[1] != self._need)
            start = start or (plan, self._need)
        if start is not None:
            yield from self._solve(*start)
        if self._folded is not None:
            # Nothing else ran, so these rows are what the model makes of any input.
            self._last = True
            yield self._folded

    def refused(self, error: BaseException) -> None:
        """Note that the model raised."""
        self._need = needed_features(error, self._batch)
        if is_out_of_memory(error) and self._tried is not None:
            if self._starved is None:
                self.first, self._starved = self._tried, error
            self._hungry[self._tried.modality] += 1

    def failure(self, model: str, attempts: Sequence[str], names: Sequence[str] | None) -> str:
        """Say that no plan succeeded.

        Args:
            model: The model's name.
            attempts: Each plan with what it raised.
            names: The inputs that were made up; None where they were the user's own.
        """
        if self._starved is not None and self.first is not None:
            return memory_ran_out(model, self.first.description, self._starved)
        return none_succeeded(model, attempts, names, self.sized)

    def fits(self, plan: InputPlan, output: Any, positions: int) -> bool:
        """Tell whether the rows of an output are the samples, or there is no better plan left."""
        self._need = None if self._last or not plan.batched else folded_rows(output, self._batch, positions)
        if self._need is not None and self._folded is None:
            self._folded = plan
        return self._need is None

    def _solve(self, plan: InputPlan, need: float) -> Iterator[InputPlan]:
        """Yield plans of other sizes that close in on the one at which what is needed and what there is are equal."""
        size = plan_size(plan)
        if size is None:
            return
        image = plan.modality == "image"
        largest = LARGEST_SIDE if image else LONGEST_STATED if plan.modality == "tokens" else LONGEST_SERIES
        low: tuple[int, float] | None = None
        high: tuple[int, float] | None = None
        seen = {size}
        for _ in range(TRIES):
            # Features grow with the area of an image and with the length of anything else; here both are lengths.
            extent = (1 / need) ** (0.5 if image else 1.0)
            if extent < 1:
                low = (size, extent)
            else:
                high = (size, extent)
            if low and high:
                share = (1 - low[1]) / (high[1] - low[1])
                size = min(max(round(low[0] + share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
            else:
                size = max(1, round(size / extent))
                size += (size in seen) * (1 if extent < 1 else -1)
            if size in seen or not 0 < size <= largest:
                return
            seen.add(size)
            self._need = None
            yield _resized(plan, size)
            if self._need is None:
                return
            if self._need == need:
                # No size changes these numbers.
                return
            need, self.sized = self._need, True


def plan_size(plan: InputPlan) -> int | None:
    """Return the side or the length of one sample, None where there is no such choice."""
    shape = plan.shape.value
    if plan.modality == "tokens":
        return plan.length if not shape else None
    if plan.modality == "image":
        return shape[-1] if len(shape) == 3 and shape[-1] == shape[-2] else None
    return shape[-1] if len(shape) == 2 and "steps run" in plan.shape.reason else None


def _resized(plan: InputPlan, size: int) -> InputPlan:
    """Return a plan for another side or length."""
    reason = "the size that the first layer behind the flattening needs"
    if plan.modality == "tokens":
        return replace(plan, length=size, description=f"token ids (2, {size})")
    channels = plan.shape.value[0]
    shape = (channels, size, size) if plan.modality == "image" else (channels, size)
    kind = "images" if plan.modality == "image" else "features"
    return replace(plan, shape=Detection(shape, reason), description=f"{kind} {(2, *shape)}")
