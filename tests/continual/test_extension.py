import itertools
import shutil

import pytest
import torch

import utils
from tests.continual.toys import SPEC, net, settings
from utils.continual.accuracy_matrix import read_matrix
from utils.memory import EpisodicBuffer
from utils.runtime.errors import ConfigError, SeedbedError
from utils.training.resume import resume, train


def trained(folder, digits, method, **changes):
    """Train a stream of five tasks and return the run."""
    return train(net(), digits, settings(method, **changes), folder, spec=SPEC, progress=False)


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_a_stream_is_forgotten_task_after_task_and_replay_helps(tmp_path, digits):
    naive = trained(tmp_path / "naive", digits, "naive", max_steps=300, learning_rate=5e-3)
    replay = trained(tmp_path / "replay", digits, "replay", max_steps=300, learning_rate=5e-3)
    rows = read_matrix(tmp_path / "naive").rows
    assert [row[number] > 0.8 for number, row in enumerate(rows)] == [True] * 5
    assert max(rows[-1][:-1]) < 0.2
    assert read_matrix(tmp_path / "replay").average_accuracy > read_matrix(tmp_path / "naive").average_accuracy + 0.3
    assert naive.finished
    assert replay.finished


def test_the_rows_of_the_matrix_are_those_of_a_measurement_by_hand(tmp_path, digits):
    run = trained(tmp_path / "run", digits, "naive")
    images, labels = digits.validation["pixel_values"], digits.validation["labels"]
    with torch.no_grad():
        right = run.model(images).argmax(1) == labels
    by_hand = [float(right[(labels // 2) == task].double().mean()) for task in range(5)]
    assert read_matrix(tmp_path / "run").rows[-1] == pytest.approx(by_hand)


@pytest.mark.parametrize("step", [4, 20, 24, 40, 44])
def test_a_run_goes_on_from_the_middle_and_the_border_of_a_task_bit_for_bit(tmp_path, digits, step):
    whole = trained(tmp_path / "whole", digits, "replay", val_every_steps=7, checkpoint_every_steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for folder in (tmp_path / "part" / "checkpoints").iterdir():
        if folder.name.startswith("step") and int(folder.name.split("-")[-1]) > step:
            shutil.rmtree(folder)
    part = resume(tmp_path / "part", model=net(seed=1), progress=False)
    assert part.sessions == 2
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(part)[name]), name
    first, second = read_matrix(tmp_path / "whole"), read_matrix(tmp_path / "part")
    assert (first.rows, first.within, first.ends) == (second.rows, second.within, second.ends)


def test_accumulated_passes_take_part_as_one_step(tmp_path, digits):
    run = trained(tmp_path / "run", digits, "replay", batch_size=8, accumulate=2, max_steps=50)
    assert run.finished
    assert read_matrix(tmp_path / "run").ends[-1] == 50


def test_only_outputs_of_the_task_answer_when_it_is_known(tmp_path, digits):
    trained(tmp_path / "run", digits, "naive", max_steps=100, continual={"setting": "task"})
    matrix = read_matrix(tmp_path / "run")
    # Two classes in each task: nobody who picks one of them at random is below a half for long.
    assert min(matrix.untrained) > 0.1
    assert matrix.average_accuracy > 0.5


def test_all_tasks_at_once_end_well_above_one_after_the_other(tmp_path, digits):
    trained(tmp_path / "run", digits, "joint", max_steps=100)
    matrix = read_matrix(tmp_path / "run")
    assert matrix.rows == ()
    assert min(matrix.joint) > 0.8


def test_the_held_out_rows_of_a_run_are_of_the_tasks_so_far(tmp_path, digits):
    run = trained(tmp_path / "run", digits, "naive", max_steps=100, val_every_steps=20)
    rows = [row for row in run.metrics if row["split"] == "validation"]
    assert rows[0]["accuracy"] > 0.9
    assert rows[-1]["accuracy"] < 0.4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"continual": {"method": "nothing"}}, "'nothing' is no method"),
        ({"continual": {"method": "naive+replay"}}, "naive does not go with another"),
        ({"continual": {"method": "replay+er"}}, "each method once"),
        ({"continual": {"methods": "naive"}}, "Did you mean 'method'"),
        ({"devices": 2}, "one device"),
        ({"early_stopping_patience": 3}, "early_stopping_patience is 3"),
        ({"continual": {"setting": "task"}, "label_smoothing": 0.1}, "setting is 'task' and .*label_smoothing is 0.1"),
        ({"continual": {"method": "consolidation"}, "label_smoothing": 0.1}, "'consolidation' and .*label_smoothing"),
        ({"continual": {"split": "permutation"}}, "permuted tasks have the same classes"),
        ({"continual": {"boundaries": False, "setting": "task"}}, "nobody says which one it is"),
    ],
)
def test_settings_that_contradict_are_told_before_anything_is_written(tmp_path, digits, changes, said):
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "run", digits, changes.get("continual", {}).get("method", "replay"), **changes)
    assert not (tmp_path / "run").exists()


def test_data_without_classes_does_not_divide_by_labels(tmp_path, text_file):
    with pytest.raises(SeedbedError, match="samples have no class"):
        utils.train("example:gpt", f"file:{text_file}", settings("replay"), tmp_path / "run", progress=False)


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "priority"])
def test_every_policy_keeps_a_memory_of_its_size(tmp_path, digits, policy):
    run = trained(tmp_path / "run", digits, "replay", max_steps=30, continual={"policy": policy, "buffer": 20})
    memory = EpisodicBuffer(20, policy=policy, seed=0)
    memory.load_state_dict(run.checkpoints.latest().states()["continual"]["memory"])
    assert run.finished
    assert len(memory) == 20
    assert memory.seen == 30 * 16


def test_a_stream_without_boundaries_tells_no_method_of_them(tmp_path, digits):
    with pytest.raises(ConfigError, match="acts where a task ends"):
        trained(tmp_path / "ewc", digits, "ewc", continual={"boundaries": False})
    run = trained(tmp_path / "run", digits, "replay", continual={"boundaries": False})
    assert run.finished


def test_a_memory_smaller_than_the_classes_is_refused_before_the_run(tmp_path, digits):
    with pytest.raises(ConfigError, match="10 classes"):
        trained(tmp_path / "run", digits, "consolidation", continual={"buffer": 5})
    assert not (tmp_path / "run").exists()


def test_only_classes_that_came_up_answer_when_a_task_is_measured(tmp_path, digits):
    """Consolidation leaves outputs out that never came up: nothing has pushed them down."""
    trained(tmp_path / "run", digits, "consolidation", max_steps=100, learning_rate=5e-3)
    matrix = read_matrix(tmp_path / "run")
    assert matrix.rows[0][0] > 0.97
    assert max(matrix.rows[0][1:]) == 0


def test_outputs_that_may_not_answer_a_task_are_never_stored(tmp_path, digits):
    run = trained(tmp_path / "run", digits, "consolidation", continual={"setting": "task"})
    memory = EpisodicBuffer(60, policy="balanced", seed=0)
    memory.load_state_dict(run.checkpoints.latest().states()["continual"]["memory"])
    stored = memory.read(memory.slots)["logits"]
    assert ((stored > torch.finfo(stored.dtype).min).sum(1) == 2).all()


def test_weights_are_put_right_before_anything_is_measured(tmp_path, digits):
    trained(
        tmp_path / "run", digits, "packnet", max_steps=60, val_every_steps=3, learning_rate=1e-2, weight_decay=0.1,
        continual={"setting": "task"},
    )  # fmt: skip
    matrix = read_matrix(tmp_path / "run")
    for moment in matrix.within:
        for task in range(moment.task):
            assert moment.scores[task] == matrix.rows[task][task]


def test_texts_whose_task_is_known_are_replayed_with_the_outputs_of_their_task(tmp_path, text_file):
    parts = {"one": f"file:{text_file}", "two": f"file:{text_file}"}
    config = settings("replay", continual={"split": "parts", "setting": "task", "buffer": 8}, max_steps=8)
    run = utils.train("example:gpt", parts, config.with_changes(context_length=16), tmp_path / "run", progress=False)
    assert run.finished


def test_all_tasks_at_once_learn_also_where_the_task_is_known(tmp_path, digits):
    trained(tmp_path / "run", digits, "joint", max_steps=100, continual={"setting": "task"})
    assert min(read_matrix(tmp_path / "run").joint) > 0.9


def test_too_few_megabytes_are_told_before_the_run(tmp_path, digits):
    for megabytes, said in ((0.003, "room for 7 samples.*10 classes"), (0.0001, "room for 0 samples")):
        with pytest.raises(ConfigError, match=said):
            trained(tmp_path / "run", digits, "consolidation", continual={"buffer_mb": megabytes})
    with pytest.raises(ConfigError, match="at least one sample"):
        trained(tmp_path / "run", digits, "replay", continual={"buffer_mb": 0.0001})
    assert not (tmp_path / "run").exists()


def test_a_task_with_hardly_any_step_is_told(tmp_path, digits):
    with pytest.warns(UserWarning, match="Of 10 steps"):
        trained(tmp_path / "run", digits, "naive", max_steps=10)


def test_a_model_whose_answers_need_the_task_is_not_exported(tmp_path, digits):
    run = trained(tmp_path / "run", digits, "packnet", continual={"setting": "task"})
    with pytest.raises(ConfigError, match=r"learned with packnet.*answering\(run, task\)"):
        utils.export(run, tmp_path / "out", formats=("safetensors",))


def test_a_schedule_begins_anew_only_where_the_task_is_told(tmp_path, digits):
    rates = []
    for name, boundaries in (("told", True), ("untold", False)):
        run = trained(tmp_path / name, digits, "naive", schedule="cosine", log_every_steps=1, max_steps=30,
                      continual={"boundaries": boundaries})  # fmt: skip
        rates.append([row["learning_rate"] for row in run.metrics if row["split"] == "train"])
    rises = [sum(after > before for before, after in itertools.pairwise(one)) for one in rates]
    assert rises == [4, 0]
