"""Older layouts of run directories and checkpoints, brought to the present one while they are read.

Nothing on disk is changed: a run that an older version started keeps its ``run.json`` and its checkpoints as they are,
and the checkpoints written from now on are of the present version. Each table holds, for a version, the function that
makes the next one of it; a change of the layout raises `FORMAT_VERSION` and adds one function.

Version 2: settings for schedules, averages, retention, workers and several devices; the best held-out loss is counted.
Version 3: losses that wait for their row of metrics are kept by step, not by batch; a model's generators and containers
are kept too.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

FORMAT_VERSION = 3
"""Version of the layout that is written; all from 1 on are read."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]


def _settings_of_version_2(record: dict[str, Any]) -> dict[str, Any]:
    """Say in the settings what version 1 always did."""
    did = {
        "beta2": 0.95,
        "schedule": "cosine",
        "label_smoothing": 0.0,
        "ema_decay": None,
        "early_stopping_patience": None,
        "gradient_checkpointing": False,
        "compile": False,
        "augment": False,
        "workers": 0,
        "keep_best": 0,
        "keep_every_steps": None,
        "tracking": None,
    }
    return {**record, "config": {**did, **record["config"]}}


def _counters_of_version_2(states: dict[str, Any]) -> dict[str, Any]:
    """Begin to count held-out losses; the checkpoint of step 0 has no counters at all."""
    if "progress" not in states:
        return states
    counted = {"measured": float("nan"), "measured_step": -1, "best": float("inf"), "since_best": 0}
    return {**states, "progress": {**counted, **states["progress"]}}


def _same(record: dict[str, Any]) -> dict[str, Any]:
    return record


def _losses_of_version_3(states: dict[str, Any]) -> dict[str, Any]:
    """Take the mean of the batches of each step."""
    if "memory" in states:
        states = {**states, "memory": {"objects": {}, **states["memory"]}}
    if "progress" not in states:
        return states
    progress = states["progress"]
    # What a session on other devices left before may be of steps cut otherwise: the newest are of these batches.
    passes = max(1, progress["batches"] // max(1, progress["step"]))
    pieces = progress["pending"].flip(0).split(passes)
    means = [piece.mean() for piece in reversed(pieces) if len(piece)]
    pending = torch.stack(means) if means else torch.zeros(0)
    return {**states, "progress": {**progress, "pending": pending}}


RECORDS: Mapping[int, Migration] = {1: _settings_of_version_2, 2: _same}
"""Functions from the contents of a version's ``run.json`` to those of the next."""
STATES: Mapping[int, Migration] = {1: _counters_of_version_2, 2: _losses_of_version_3}
"""Functions from the states in a version's checkpoint to those of the next."""


def is_known(version: Any) -> bool:
    """Tell whether this version of Seedbed can read a layout."""
    return isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION


def migrated(value: dict[str, Any], version: int, table: Mapping[int, Migration]) -> dict[str, Any]:
    """Bring what a version wrote to the present layout.

    Args:
        value: Contents of ``run.json`` or states of a checkpoint; left as they are.
        version: The version that wrote them.
        table: `RECORDS` or `STATES`.
    """
    for number in range(version, FORMAT_VERSION):
        value = table[number](copy.copy(value))
    return value
