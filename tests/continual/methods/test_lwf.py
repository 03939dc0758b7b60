import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import utils
import utils.continual.methods.lwf as lwf_module
from tests.continual.methods.plain_loop import distance, doubled, killed_at, labelled, plain, run_of, same_weights
from tests.continual.test_fisher import learner_of
from tests.continual.toys import net, settings
from utils.continual.methods.lwf import LwF
from utils.runtime.errors import ConfigError
from utils.training.resume import open_run, train
from utils.training.state import MigrationError, ModelChange

LIMITED = {"samples_per_task": 20}


def softened(logits, temperature):
    """Return probabilities raised to 1/T and brought back to a sum of one, as the paper writes it."""
    powers = logits.softmax(-1) ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "temperature", "weight"),
    [({}, 2.0, 1.0), ({"temperature": 1.0, "logit_weight": 3.0}, 1.0, 3.0), ({"setting": "task"}, 2.0, 1.0)],
)
def test_a_stream_ends_like_a_plain_loop_over_the_equations(tmp_path, digits, options, temperature, weight):
    digits = doubled(digits)
    run = run_of(tmp_path / "run", digits, "lwf", continual={**LIMITED, **options})
    memory = {}

    def loss(model, number, batch, tasks):
        logits, labels = model(batch["pixel_values"]), batch["labels"]
        if options.get("setting") == "task":
            own = list(tasks[number].classes)
            total = functional.cross_entropy(logits[:, own], labels - min(own))
            groups = [list(task.classes) for task in tasks[:number]]
        else:
            total = functional.cross_entropy(logits, labels)
            groups = [[one for task in tasks[:number] for one in task.classes]]
        if number:
            with torch.no_grad():
                old = memory["teacher"](batch["pixel_values"])
            for group in groups:
                kept = softened(old[:, group], temperature) * softened(logits[:, group], temperature).log()
                total = total - weight * kept.sum(-1).mean()
        return total

    def end_task(model, task):
        memory["teacher"] = copy.deepcopy(model).eval()

    config = settings("lwf", continual=LIMITED)
    assert distance(run, plain(digits, config, loss, end_task)) < 1e-6
    assert distance(run, plain(digits, config, labelled)) > 1e-3


@pytest.mark.parametrize("step", [20, 24])
def test_a_run_that_is_killed_ends_bit_for_bit_like_one_that_is_not(tmp_path, digits, step):
    changes = {"checkpoint_every_steps": 4, "val_every_steps": 7}
    whole = run_of(tmp_path / "whole", digits, "lwf", **changes)
    assert same_weights(whole, killed_at(step, tmp_path / "whole", tmp_path / "part"))


def test_it_keeps_running_statistics_and_modes_and_counts_what_it_keeps(tmp_path, digits):
    model = net(norm=True)
    run = run_of(tmp_path / "run", digits, "lwf", model=model)
    state = open_run(tmp_path / "run", model=net(norm=True))[1]["continual"]["methods"]["lwf"]["teacher"]
    assert state.keys() == run.model.state_dict().keys()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in state.items())
    assert int(state["net.2.num_batches_tracked"]) == 50


@pytest.mark.parametrize("operator", [("depth", 1), ("channels", 8)])
def test_the_old_model_grows_with_the_new_one_also_when_killed_after_it(tmp_path, digits, operator):
    growth = {"schedule": [{"at": 25, "operator": operator[0], "amount": operator[1]}]}
    whole = run_of(tmp_path / "whole", digits, "lwf", growth=growth, checkpoint_every_steps=4)
    assert whole.adapter.num_parameters > 2410
    assert same_weights(whole, killed_at(28, tmp_path / "whole", tmp_path / "part"))


def test_growth_that_would_change_the_old_answers_is_refused_and_taken_back(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(lwf_module, "SAME", -1.0)
    growth = {"schedule": [{"at": 25, "operator": "channels", "amount": 8}]}
    with pytest.warns(UserWarning, match=r"old model that LwF asks cannot follow channels: an answer changed by"):
        run = run_of(tmp_path / "run", digits, "lwf", growth=growth)
    monkeypatch.undo()
    assert run.adapter.num_parameters == 2410
    assert same_weights(run, run_of(tmp_path / "plain", digits, "lwf"))


def test_growth_before_the_old_model_was_asked_is_refused():
    method = LwF()
    assert method.migrate(ModelChange("depth", 1)) is None
    method.load_state_dict({"teacher": {"weight": torch.zeros(2)}})
    with pytest.raises(MigrationError, match=r"has not asked its old model since it was kept.*a step later"):
        method.migrate(ModelChange("depth", 1))
    assert method.stored_floats == 2


def test_accumulated_passes_weigh_as_one_and_it_goes_with_replay(tmp_path, digits):
    whole = run_of(tmp_path / "whole", digits, "lwf", continual=LIMITED)
    parts = run_of(tmp_path / "parts", digits, "lwf", continual=LIMITED, batch_size=8, accumulate=2)
    assert distance(whole, parts.model) < 1e-4
    # Replay runs the model between, with other outputs masked.
    first = run_of(tmp_path / "first", digits, "lwf+replay", continual={"setting": "task"})
    second = run_of(tmp_path / "second", digits, "replay+lwf", continual={"setting": "task"})
    assert distance(first, second.model) < 1e-5


def test_tasks_that_share_outputs_keep_all_of_them(digits):
    learner = learner_of(digits, method="lwf", split="permutation", setting="domain")
    learner.task = learner.tasks[3]
    assert LwF().groups(learner) == [list(range(10))]


@pytest.mark.parametrize(
    ("task", "message"),
    [("regression", "Expected a model that scores classes or tokens"), ("masked_lm", "each pass hides other tokens")],
)
def test_what_it_cannot_keep_is_refused(digits, task, message):
    learner = learner_of(digits, method="lwf")
    learner.data = replace(digits, task=task)
    with pytest.raises(ConfigError, match=rf"is 'lwf' and the task is {task}.*{message}.*Use ewc, si or replay"):
        LwF().check(learner)


def test_a_single_score_is_a_choice_of_two():
    rows = lwf_module._rows(torch.tensor([[1.5], [-2.0]]))
    torch.testing.assert_close(rows.softmax(-1)[:, 1], torch.tensor([1.5, -2.0]).sigmoid())


@pytest.mark.parametrize("method", ["lwf", "ewc", "si"])
def test_language_models_learn_part_after_part(tmp_path, text_file, method):
    shape = {"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    loaded = utils.load_model("example:gpt", config=shape)
    text = text_file.read_text(encoding="utf-8")
    for name, part in (("one", text[:15_000]), ("two", text[15_000:30_000])):
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    data = [f"file:{tmp_path / name}.txt" for name in ("one", "two")]
    continual = {"split": "parts", "setting": "domain", "fisher_samples": 5}
    run = train(loaded, data, settings(method, continual=continual, batch_size=4, max_steps=12), tmp_path / "run",
                progress=False)  # fmt: skip
    assert run.finished
    if method == "ewc":
        computed = open_run(tmp_path / "run")[1]["continual"]["methods"]["ewc"]["computed"]
        assert [one["kind"] for one in computed] == ["drawn", "drawn"]
