"""The order of a stream of tasks: a pure function of the position that hands every sample out as often as it should."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.continual.task import Task, permuted
from utils.continual.task_stream import TaskStream, ends_of
from utils.runtime.errors import ConfigError
from utils.training.augmentation import Augmentation
from utils.training.batching import collate


def tasks_of(sizes):
    """Return tasks of neighbouring samples."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        Task(number, str(number), torch.arange(start, start + size), torch.tensor([0]))
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def rows_of(sizes):
    return {"features": torch.arange(float(sum(sizes)))[:, None], "labels": torch.arange(sum(sizes))}


def all_of(stream, batches):
    return [batch["labels"].tolist() for batch in stream.batches(batches)]


shapes = st.tuples(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 30))


@settings(max_examples=120, deadline=None)
@given(shapes, st.integers(0, 3))
def test_every_sample_of_a_task_is_handed_out_as_often_as_any_other(shape, seed):
    sizes, batch, extra = shape
    tasks, steps = tasks_of(sizes), len(sizes) + extra
    ends = ends_of(tasks, steps, batch)
    stream = TaskStream(rows_of(sizes), tasks, ends, batch, seed)
    assert ends[-1] == steps * batch and all(end % batch == 0 for end in ends)
    start = 0
    for task, end in zip(tasks, ends, strict=True):
        assert end > start
        handed = [one for place in range(start, end, batch) for one in stream.batch_at(place)["labels"].tolist()]
        counts = Counter(handed)
        # Whole passes, and a part of one: no batch holds a sample of another task.
        assert set(counts) <= set(task.train.tolist())
        whole, rest = divmod(end - start, len(task.train))
        assert (
            sorted(counts[one] for one in task.train.tolist())
            == [whole] * (len(task.train) - rest) + [whole + 1] * rest
        )
        for number in range(whole):
            assert sorted(handed[number * len(task.train) : (number + 1) * len(task.train)]) == task.train.tolist()
        start = end


@settings(max_examples=80, deadline=None)
@given(shapes, st.data(), st.sampled_from(["in turn", "together", "blurred"]))
def test_a_stream_is_the_same_from_any_position(shape, data, kind):
    sizes, batch, extra = shape
    tasks, steps = tasks_of(sizes), len(sizes) + extra
    ends = ends_of(tasks, steps, batch, kind == "together")

    def fresh():
        return TaskStream(
            rows_of(sizes), tasks, ends, batch, 1, None, kind == "together", True, 0.8 * (kind == "blurred")
        )

    whole = all_of(fresh(), steps)
    place = data.draw(st.integers(0, steps - 1))
    resumed = fresh()
    resumed.load_state_dict({"consumed": place * batch, "samples": sum(sizes)})
    assert all_of(resumed, steps - place) == whole[place:]
    order = data.draw(st.permutations(range(steps)))
    again = fresh()
    assert [again.batch_at(number * batch)["labels"].tolist() for number in order] == [
        whole[number] for number in order
    ]


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_together_all_tasks_are_mixed_evenly(shape):
    sizes, batch, extra = shape
    tasks, steps = tasks_of(sizes), len(sizes) + extra
    stream = TaskStream(rows_of(sizes), tasks, ends_of(tasks, steps, batch, True), batch, 0, together=True)
    handed = [one for rows in all_of(stream, steps) for one in rows]
    counts = Counter(dict.fromkeys(range(sum(sizes)), 0))
    counts.update(handed)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(row["features"][:, 0].tolist() == row["labels"].tolist() for row in stream.batches(2))


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.05, 1))
def test_blurred_borders_hand_out_the_same_samples_in_all(shape, blur):
    sizes, batch, extra = shape
    tasks, steps = tasks_of(sizes), len(sizes) + extra
    ends = ends_of(tasks, steps, batch)
    plain = TaskStream(rows_of(sizes), tasks, ends, batch, 2)
    blurred = TaskStream(rows_of(sizes), tasks, ends, batch, 2, blur=blur)
    before, after = ([one for rows in all_of(each, steps) for one in rows] for each in (plain, blurred))
    assert sorted(before) == sorted(after)
    near = set()
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for end, one, other in zip(ends[:-1], lengths[:-1], lengths[1:], strict=True):
        width = int(blur * min(one, other) / 2)
        near |= set(range(end - width, end + width))
    assert all(before[place] == after[place] for place in range(len(before)) if place not in near)


def test_a_blurred_border_is_half_and_half_and_fades():
    sizes, batch = (4000, 4000), 10
    tasks = tasks_of(sizes)
    stream = TaskStream(rows_of(sizes), tasks, [4000, 8000], batch, 0, blur=1.0)
    foreign = torch.tensor([rows["labels"].ge(4000).float().mean() for rows in stream.batches(800)])
    assert foreign[:200].max() == 0 and foreign[600:].min() == 1
    assert foreign[390:410].mean() == pytest.approx(0.5, abs=0.08)
    # The share of the other task falls linearly to nothing over the width of 2000 samples: a quarter of them in all.
    assert foreign[200:400].mean() == pytest.approx(0.25, abs=0.04)
    assert foreign[200:600].mean() == pytest.approx(0.5, abs=1e-6)


def test_tasks_together_are_shown_each_in_its_way():
    rows = {"features": torch.arange(24.0).view(6, 4), "labels": torch.tensor([0, 1, 2, 3, 2, 0])}
    order = permuted(4, 1)
    tasks = [
        Task(0, "a", torch.tensor([0, 1, 5]), torch.tensor([0]), relabelled=(0, 1)),
        Task(1, "b", torch.tensor([2, 3, 4]), torch.tensor([0]), relabelled=(3, 2), permutation=order),
    ]
    stream = TaskStream(rows, tasks, [12], 6, 0, together=True)
    for batch in stream.batches(2):
        assert len(batch["labels"]) == 6
        for row, label in zip(batch["features"], batch["labels"], strict=True):
            number = int(row.min()) // 4
            own = next(task for task in tasks if number in task.train)
            expected = own.shown(collate(rows, torch.tensor([number])))
            assert torch.equal(row, expected["features"][0]) and label == expected["labels"][0]


def test_pairs_of_texts_of_different_lengths_are_mixed_without_inventing_labels():
    lengths = torch.tensor([3, 20, 9, 31])
    labels = torch.where(torch.arange(40) < lengths[:, None], 5, -100)
    rows = {
        "input_ids": torch.full((4, 40), 7), "lengths": lengths, "decoder_input_ids": torch.full((4, 40), 7),
        "labels": labels, "target_lengths": lengths,
    }  # fmt: skip
    stream = TaskStream(rows, tasks_of((2, 2)), [8], 4, 0, together=True)
    for batch in stream.batches(2):
        assert sorted((batch["labels"] == 5).sum(1).tolist()) == [3, 9, 20, 31]
        assert set(batch["labels"].unique().tolist()) == {5, -100}
        assert sorted(batch["attention_mask"].sum(1).tolist()) == [3, 9, 20, 31]


def test_augmentation_comes_before_a_permutation():
    rows = {"pixel_values": torch.rand(5, 1, 8, 8), "labels": torch.arange(5)}
    changed, order = Augmentation(0), permuted(64, 5)
    tasks = [Task(0, "a", torch.arange(5), torch.tensor([0]), permutation=order)]
    batch = TaskStream(rows, tasks, [5], 5, 0, changed).batch_at(0)
    images = changed(rows["pixel_values"][batch["labels"]], torch.zeros(5, dtype=torch.long), batch["labels"])
    assert torch.equal(batch["pixel_values"], images.flatten(1)[:, order].view_as(images))


def test_the_present_task_and_where_the_schedule_begins_anew():
    stream = TaskStream(rows_of((4, 4)), tasks_of((4, 4)), [6, 12], 2, 0)
    assert [stream.task_at(place).number for place in (0, 5, 6, 11, 12)] == [0, 0, 1, 1, 1]
    assert stream.restarts == (6,)
    assert TaskStream(rows_of((4, 4)), tasks_of((4, 4)), [6, 12], 2, 0, restart=False).restarts == ()


def test_steps_are_divided_as_samples_are():
    assert ends_of(tasks_of((10, 30)), 8, 2) == [4, 16]
    assert ends_of(tasks_of((1, 1000, 1)), 5, 1) == [1, 4, 5]
    with pytest.raises(ConfigError, match=r"has 2 steps.*3 tasks.*at least one step.*Train for more steps"):
        ends_of(tasks_of((1, 1, 1)), 2, 1)
