"""The stream of a curriculum is exact: the same samples from any position, whatever the gates did."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.continual.curriculum import CurriculumConfig, Phase
from utils.continual.curriculum_stream import CurriculumStream
from utils.runtime.errors import DataError
from utils.training.augmentation import Augmentation


def rows(count):
    return {"x": torch.arange(float(count))[:, None], "labels": torch.arange(count)}


PHASES = (Phase("a", 0.4, "linear", steps=6), Phase("b", 0.6, "step", steps=6), Phase("c", 1.0, "root", steps=4))


def stream_of(count=40, batch=2, step=4, total=30, seed=0, hardest=False, augmentation=None, data=None):
    found = CurriculumStream(data or rows(count), CurriculumConfig(PHASES, "length", 0.2, hardest), total, step, batch,
                             seed, augmentation)  # fmt: skip
    found.put_in_order(torch.arange(float(count)))
    return found


def run(stream, steps, gates=()):
    """Hand out steps, with gates that open after some of them; return the labels of each step."""
    handed = []
    for _ in range(steps):
        labels = []
        for batch in stream.batches(stream.step_samples // stream.batch_size):
            labels += batch["labels"].tolist()
            stream.advance()
        handed.append(labels)
        if stream.over or (stream.phase < 2 and stream.step in gates):
            stream.go_on()
    return handed


def test_the_share_grows_phase_by_phase():
    stream = stream_of()
    handed = run(stream, 30)
    assert [(one.step, round(one.start, 6), one.length) for one in stream.began] == [
        (0, 0.2, 6),
        (6, 0.4, 6),
        (12, 0.6, 4),
    ]
    for step, labels in enumerate(handed):
        if step < 6:
            most = 40 * (0.2 + 0.2 * step / 6)
        elif step < 12:
            most = 24
        else:
            most = 40 * min(1, (0.36 + 0.64 * (step - 12) / 4)) ** 0.5
        assert step >= 16 or (max(labels) < most + 1 and len(set(labels)) == len(labels))
    # While the share stays, passes hand out every sample alike.
    assert Counter(one for labels in handed[6:12] for one in labels) == Counter(range(24))
    assert sorted(one for labels in handed[16:26] for one in labels) == list(range(40))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 29), st.sets(st.integers(1, 8), max_size=2), st.integers(0, 3))
def test_a_stream_goes_on_from_any_step_whatever_the_gates_did(place, gates, seed):
    whole = run(stream_of(seed=seed), 30, gates)
    part = stream_of(seed=seed)
    assert run(part, place, gates) == whole[:place]
    resumed = stream_of(seed=seed)
    resumed.scores = None
    resumed.load_state_dict(part.state_dict())
    assert resumed.phase == part.phase
    assert run(resumed, 30 - place, gates) == whole[place:]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_takes_the_same_samples_in_batches_of_any_size(batch):
    assert run(stream_of(batch=batch), 30) == run(stream_of(), 30)


def test_a_large_pool_is_drawn_from_without_shuffling_it():
    stream = stream_of(count=5000, step=8)
    labels = [one for step in run(stream, 6) for one in step]
    assert all(len(set(labels[n : n + 8])) == 8 for n in range(0, 48, 8)) and max(labels) < 2000
    assert len(set(labels)) > 44


def test_a_pool_smaller_than_a_step():
    handed = run(stream_of(count=3), 2)
    assert all(len(labels) == 4 and len(set(labels)) == 3 for labels in handed)


def test_the_hardest_first():
    assert min(run(stream_of(hardest=True), 1)[0]) >= 32


def test_what_is_behind_a_gate_is_not_made_again():
    stream = stream_of()
    run(stream, 8)
    with pytest.raises(DataError, match=r"Step 2 of the stream is before the present phase.*in its order"):
        stream.batch_at(8)
    fresh = CurriculumStream(rows(40), CurriculumConfig(PHASES), 30, 4, 2, 0)
    with pytest.raises(DataError, match="nothing is known about difficulty"):
        fresh.batch_at(0)


def test_images_are_augmented_by_step_and_sample():
    data = {"pixel_values": torch.rand(10, 1, 8, 8), "labels": torch.arange(10)}
    changed = Augmentation(0)
    batch = stream_of(count=10, augmentation=changed, data=data).batch_at(6)
    images, labels = data["pixel_values"][batch["labels"]], batch["labels"]
    assert torch.equal(batch["pixel_values"], changed(images, torch.full_like(labels, 1), labels))
