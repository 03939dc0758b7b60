"""Streams of tasks made from data: every sample is where it belongs, and what cannot be divided is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import utils
from tests.continual.toys import QUICK, SPEC, net
from utils.continual.config import ContinualConfig
from utils.continual.scenario import check_outputs, make_tasks
from utils.runtime.errors import ConfigError, DataError
from utils.training.dataset_utilities import load_data
from utils.training.prepared_data import PreparedData


def rows(labels):
    return {"features": torch.arange(2.0 * len(labels)).view(-1, 2), "labels": torch.tensor(labels)}


def data(train, held=None, **facts):
    held = sorted(set(train)) if held is None else held
    return PreparedData("toy", "tabular_classification", rows(train), rows(held), None, facts)


def made(source, seed=0, **settings):
    return make_tasks(source, ContinualConfig(**settings), seed)


def message(source, **settings):
    with pytest.raises(DataError) as caught:
        made(source, **settings)
    assert caught.value.found and caught.value.expected and caught.value.action
    return str(caught.value)


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=8, max_size=40), st.integers(1, 7), st.booleans(), st.integers(0, 5))
def test_by_labels_every_sample_is_in_one_task_with_its_class(labels, count, shuffled, seed):
    classes = sorted(set(labels))
    if len(classes) < 2 or count > len(classes):
        return
    tasks = made(data(labels), seed, tasks=count, shuffle_classes=shuffled)
    assert sorted(one for task in tasks for one in task.train.tolist()) == list(range(len(labels)))
    assert sorted(one for task in tasks for one in task.validation.tolist()) == list(range(len(classes)))
    assert sorted(one for task in tasks for one in task.classes) == classes
    sizes = [len(task.classes) for task in tasks]
    assert max(sizes) - min(sizes) <= 1
    for task in tasks:
        assert {labels[one] for one in task.train.tolist()} == set(task.classes)


def test_by_labels_of_the_digits(digits):
    tasks = made(digits)
    assert [task.name for task in tasks] == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    assert all(not task.answers for task in tasks)
    assert [task.answers for task in made(digits, setting="task")] == [(n, n + 1) for n in range(0, 10, 2)]
    shuffled = made(digits, 3, shuffle_classes=True)
    assert [t.classes for t in shuffled] == [t.classes for t in made(digits, 3, shuffle_classes=True)]
    assert [t.classes for t in shuffled] != [t.classes for t in tasks]


def test_domains_share_their_outputs(digits):
    for task, own in zip(made(digits, setting="domain", tasks=5), range(0, 10, 2), strict=True):
        held = task.held_out(digits)
        assert task.classes == (0, 1)
        original = digits.validation["labels"][task.validation]
        assert torch.equal(held.validation["labels"], original - own)
    assert "divide evenly" in message(digits, setting="domain", tasks=3)


def test_permutations_show_the_same_pixels_in_another_order(digits):
    tasks = made(digits, split="permutation", setting="domain", tasks=3)
    assert [task.name for task in tasks] == ["as it is", "order 2", "order 3"]
    assert tasks[0].permutation is None
    images = digits.validation["pixel_values"]
    for task in tasks[1:]:
        shown = task.held_out(digits).validation["pixel_values"]
        # Normalised with the rest: the same values, so mean and deviation stay.
        assert torch.equal(shown.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
        assert not torch.equal(shown, images)
    again = made(digits, split="permutation", setting="domain", tasks=3)
    assert all(torch.equal(a.permutation, b.permutation) for a, b in zip(tasks[1:], again[1:], strict=True))
    other = made(digits, 1, split="permutation", setting="domain", tasks=3)
    assert not torch.equal(tasks[1].permutation, other[1].permutation)


def test_fewer_samples_of_each_task_are_drawn_from_the_seed(digits):
    tasks = made(digits, samples_per_task=20)
    whole = made(digits)
    assert all(len(task.train) == 20 == len(task.train.unique()) for task in tasks)
    assert all(torch.isin(t.train, w.train).all() for t, w in zip(tasks, whole, strict=True))
    assert torch.equal(tasks[2].train, made(digits, samples_per_task=20)[2].train)
    assert not torch.equal(tasks[2].train, made(digits, 1, samples_per_task=20)[2].train)
    assert [len(task.validation) for task in tasks] == [len(task.validation) for task in whole]


def test_parts_are_tasks(tmp_path):
    for name, labels in (("a", (0, 1)), ("b", (2, 3))):
        lines = [f"{name} text {n},{labels[n % 2]}" for n in range(20)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines))
    refs = [f"file:{tmp_path}/{name}.csv" for name in "ab"]
    source = load_data(refs, task="text_classification", vocab_size=300, max_length=16)
    tasks = made(source, split="parts", setting="task")
    assert [(t.name, t.classes, t.answers) for t in tasks] == [
        ("a.csv", (0, 1), (0, 1)), ("b.csv", (2, 3), (2, 3))
    ]  # fmt: skip
    assert all(not task.answers for task in made(source, split="parts"))
    for task, letter in zip(tasks, "ab", strict=True):
        for side, numbers in ((source.train, task.train), (source.validation, task.validation)):
            texts = [source.tokenizer.decode(ids, skip_special=True) for ids in side["input_ids"][numbers]]
            assert texts and all(text.startswith(f"{letter} text") for text in texts)
    assert sum(len(task.train) for task in tasks) == source.train_samples
    said = message(source, split="parts", setting="domain")
    assert "Task 2 (b.csv)" in said and "classes 2, 3, and the first has 0, 1" in said
    assert "2 parts" in message(source, split="parts", tasks=3)
    assert "is one part" in message(data([0, 1]), split="parts")


def test_data_that_makes_no_stream(digits):
    assert "one class 4" in message(data([4, 4, 4]))
    assert "labels from -1" in message(data([0, 1, 2], [-1, 0, 1]))
    said = message(data([0, 1, 0, 1], [0, 1, 5]))
    assert "class 5" in said and "none to train on" in said
    assert "2 classes" in message(data([0, 1]), tasks=3)
    assert "no sample to measure on" in message(data([0, 1, 2, 3], [0, 1]))
    said = message(data([0, 1, 2, 3]), tasks=4, setting="task")
    assert "Task 1 (0)" in said and "one class" in said and "'class'" in said
    assert "one class" in message(data([0, 1, 2, 3]), tasks=4, setting="domain")
    assert len(made(data([0, 1, 2, 3]), tasks=4)) == 4
    stream = replace(data([0, 1]), stream={"kind": "file"})
    assert "read while training" in message(stream)
    numbers = PreparedData("toy", "regression", rows([1.5, 2.5]), rows([1.5]), None, {})
    assert "samples have no class" in message(numbers)
    texts = {"input_ids": torch.ones(4, 8, dtype=torch.long), "labels": torch.tensor([0, 1, 0, 1])}
    source = PreparedData("toy", "text_classification", texts, texts, None, {})
    assert "the order of tokens" in message(source, split="permutation", setting="domain")


def test_a_part_without_samples_is_told():
    parts = [{"name": "a", "train": 2, "validation": 2}, {"name": "b", "train": 0, "validation": 0}]
    assert "Task 2 (b) of toy has no sample to train on" in message(data([0, 1], parts=parts), split="parts")


def test_a_head_has_an_output_for_every_class(digits):
    tasks = made(digits)
    check_outputs(tasks, 10, "toy")
    check_outputs(tasks, 64, "toy")
    check_outputs(tasks, 0, "toy")
    with pytest.raises(DataError, match=r"up to number 9.*gives 8 scores.*last task.*num_classes=10"):
        check_outputs(tasks, 8, "toy")
    with pytest.raises(DataError, match=r"gives 1 score; a single score"):
        check_outputs(made(data([0, 1]), setting="task"), 1, "toy")
    with pytest.raises(DataError, match=r"is unknown.*num_labels"):
        check_outputs(made(digits, setting="task"), 0, "toy")


def test_a_run_refuses_before_anything_is_written(tmp_path):
    small = replace(SPEC, num_labels=6)
    config = QUICK.with_changes(continual={"method": "naive"})
    with pytest.raises(DataError, match=r"6 classes.*num_classes=10"):
        utils.train(net(outputs=6), "builtin:digits", config, tmp_path / "a", progress=False, spec=small)
    with pytest.raises(ConfigError, match=r"has 4 steps.*5 tasks"):
        utils.train(
            net(), "builtin:digits", config.with_changes(max_steps=4), tmp_path / "b", progress=False, spec=SPEC
        )
    assert not (tmp_path / "a" / "run.json").exists() and not (tmp_path / "b" / "run.json").exists()


def test_domains_of_a_language_model_go_on_bit_for_bit(tmp_path, text_file):
    other = tmp_path / "ships.txt"
    other.write_text(" ".join(f"the {n} ships sailed home" for n in range(900)), encoding="utf-8")
    refs = [f"file:{text_file}", f"file:{other}"]
    shape = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1, "dropout": 0.1}
    config = QUICK.with_changes(
        max_steps=10, batch_size=4, checkpoint_every_steps=2, continual={"split": "parts", "method": "naive"}
    )
    whole = utils.train(utils.load_model("example:gpt", config=shape), refs, config, tmp_path / "run", progress=False)
    assert whole.finished and whole.data.reference == " + ".join(refs)
    assert [task["name"] for task in whole.data.facts["tasks"]] == ["topics.txt", "ships.txt"]
    for step in (2, 8):
        part = tmp_path / f"part-{step}"
        shutil.copytree(tmp_path / "run", part)
        for folder in (part / "checkpoints").iterdir():
            if folder.name.startswith("step") and int(folder.name.split("-")[-1]) > step:
                shutil.rmtree(folder)
        again = utils.resume(part, progress=False)
        assert again.sessions == 2
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (step, name)
