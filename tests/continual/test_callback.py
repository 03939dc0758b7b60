import pytest
import pytorch_lightning as pl
import torch

from tests.continual.toys import SPEC, Net, net, settings
from tests.continual.trainers import TASKS, Batches, Lit, Saving, fit, loader, made, of_task, scaled, weights
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.callback import ContinualCallback
from utils.continual.config import ContinualConfig
from utils.continual.extension import make_extension
from utils.continual.learner import LOGITS
from utils.continual.scenario import make_tasks
from utils.continual.task_stream import TaskStream, ends_of
from utils.runtime.errors import CheckpointError, ConfigError, DataError
from utils.training.resume import train
from utils.training.schedules import make_optimizer


def stream(digits, method, module=None, **changes):
    """Learn three tasks and return the module and the callback."""
    module = Lit(rate=1e-2) if module is None else module
    callback = made(method, module, **changes)
    held_out = [loader(digits, number, "validation") for number in range(TASKS)]
    for number in range(TASKS):
        fit(module, loader(digits, number), callback)
        callback.measure(held_out)
    return module, callback


def test_replay_forgets_less_than_naive_in_a_trainer_of_ones_own(digits):
    _, naive = stream(digits, "naive")
    _, replay = stream(digits, "replay")
    assert naive.matrix.trained == replay.matrix.trained == TASKS
    assert naive.matrix.forgetting > 0.5
    assert replay.matrix.forgetting < naive.matrix.forgetting - 0.3
    assert replay.matrix.ends == replay.ends == naive.ends
    assert len(replay.memory) == 60
    assert [task.name for task in replay.tasks] == ["task 1", "task 2", "task 3"]
    assert [task.classes for task in replay.tasks] == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("method", ["der++", "agem", "ewc", "si", "lwf", "consolidation", "ewc+replay", "lwf+si"])
def test_every_method_learns_a_stream_in_a_trainer_of_ones_own(digits, method):
    module, callback = stream(digits, method)
    assert callback.matrix.rows[0][0] >= 0.5
    assert callback.matrix.trained == TASKS
    assert not module.net._forward_hooks
    assert callback._extension.methods[0].stored_floats or len(callback.memory) == 60


def test_consolidation_keeps_what_naive_loses(digits):
    _, kept = stream(digits, "consolidation")
    assert kept.matrix.average_accuracy > 0.75


class AsTrain(Lit):
    """The optimizer of `utils.train`, the same one in every fit."""

    def __init__(self, config):
        super().__init__()
        self.kept = make_optimizer(self.net, config)

    def configure_optimizers(self):
        return self.kept


def both(digits, folder, method, **changes):
    """Train with `utils.train`, and with the same batches in a Trainer; return the runs."""
    config = settings(method, clip_norm=1e6, **changes)
    run = train(net(), digits, config, folder, spec=SPEC, progress=False)
    part = make_extension(config)
    tasks = make_tasks(digits, part.settings, config.seed)
    ends = ends_of(tasks, config.max_steps, config.samples_per_step)
    batches = TaskStream(digits.train, tasks, ends, config.batch_size, config.seed)
    module = AsTrain(config)
    own = {name: value for name, value in changes.get("continual", {}).items() if name != "samples_per_task"}
    callback = made(method, module, seed=config.seed, **own)
    for start, end in zip([0, *ends], ends, strict=False):
        own = [batches.batch_at(place) for place in range(start, end, config.batch_size)]
        fit(module, Batches((batch["pixel_values"], batch["labels"]) for batch in own), callback,
            accumulate_grad_batches=config.accumulate)  # fmt: skip
    return run, module, callback


@pytest.mark.parametrize("method", ["naive", "replay", "der++", "agem", "si", "lwf", "consolidation"])
def test_it_does_what_a_run_does(tmp_path, digits, method):
    run, module, callback = both(digits, tmp_path / "run", method)
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, module.net.state_dict()[name], atol=1e-5), name
    if method in ("naive", "replay"):
        assert all(torch.equal(value, module.net.state_dict()[n]) for n, value in run.model.state_dict().items())
    held = [loader(digits, number, "validation") for number in range(5)]
    assert callback.measure(held) == pytest.approx(read_matrix(tmp_path / "run").rows[-1], abs=1e-3)


def test_accumulated_passes_and_the_importance_of_weights_are_those_of_a_run(tmp_path, digits):
    run, module, _ = both(digits, tmp_path / "sum", "replay", batch_size=8, accumulate=2, max_steps=25)
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, module.net.state_dict()[name], atol=1e-5), name


def test_the_importance_of_weights_is_that_of_all_samples_of_the_task(digits):
    module = Lit()
    callback = made("ewc", module)
    fit(module, loader(digits, 0), callback, epochs=2)
    anchors = callback._extension.methods[0].anchors
    images, _ = of_task(digits, 0)
    wanted = torch.zeros_like(module.net.net[3].bias)
    probabilities = module.net(images).softmax(1).detach()
    for row in probabilities:
        for c in range(10):
            wanted += row[c] * (torch.eye(10)[c] - row) ** 2
    assert torch.allclose(anchors.importance["net.3.bias"], wanted / len(images), rtol=1e-3, atol=1e-7)
    before = weights(module)
    fit(module, loader(digits, 1), callback)
    assert torch.equal(anchors.anchor["net.3.bias"], before["net.3.bias"]) is False
    assert len(callback.ends) == 2


METHODS = ["replay", "der++", "agem", "ewc+replay", "si", "lwf", "consolidation"]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_in_the_middle_of_the_third_task_goes_on_bit_for_bit(tmp_path, digits, method):
    module = Lit()
    callback = made(method, module)
    for number in range(TASKS):
        saving = Saving(tmp_path / "middle.ckpt", 7 if number == 2 else -1)
        fit(module, Batches(loader(digits, number)), callback, saving)
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"]
    again = Lit(net(seed=1))
    second = made(method, again)
    fit(again, Batches(loader(digits, 2)), second, path=tmp_path / "middle.ckpt")
    assert second.ends == callback.ends
    assert [task.classes for task in second.tasks] == [task.classes for task in callback.tasks]
    for name, value in weights(module).items():
        assert torch.equal(value, weights(again)[name]), name
    fit(module, loader(digits, 3), callback)
    fit(again, loader(digits, 3), second)
    for name, value in weights(module).items():
        assert torch.equal(value, weights(again)[name]), name


def test_a_checkpoint_of_another_method_is_refused(tmp_path, digits):
    module = Lit()
    fit(module, loader(digits, 0), made("replay", module), Saving(tmp_path / "a.ckpt", 3))
    again = Lit()
    with pytest.raises(
        CheckpointError, match=r"made with method='replay' and seed=0\. Expected 'naive' and 0, .* Make"
    ):
        fit(again, loader(digits, 0), made("naive", again), path=tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="Expected 'replay' and 5"):
        fit(again, loader(digits, 0), made("replay", again, seed=5), path=tmp_path / "a.ckpt")


def test_tasks_are_named_and_change_in_the_middle_of_a_fit(digits):
    module = Lit()
    callback = made("replay", module)

    class Changing(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
            if number == 4:
                callback.begin("second")

    callback.begin("first")
    data = torch.utils.data.ConcatDataset([loader(digits, n, count=80).dataset for n in (0, 1)])
    fit(module, torch.utils.data.DataLoader(data, 16), callback, Changing())
    assert [(task.name, task.classes) for task in callback.tasks] == [("first", (0, 1)), ("second", (2, 3))]
    assert callback.ends == (5, 10)


def test_a_stream_without_boundaries_is_one(digits):
    module = Lit()
    callback = made("replay", module, boundaries=False)
    for number in range(2):
        fit(module, loader(digits, number), callback)
    assert [task.name for task in callback.tasks] == ["stream"]
    assert callback.ends == ()
    assert callback.step == sum(len(loader(digits, number)) for number in range(2))
    assert set(callback.memory.counts) == {0, 1, 2, 3}
    scores = callback.measure({"a": loader(digits, 0, "validation"), "b": loader(digits, 1, "validation")})
    assert len(scores) == 2
    assert callback.matrix.rows == ()
    with pytest.raises(ConfigError, match=r"'x' was to begin, and .*boundaries is False\. Expected .* Leave out"):
        callback.begin("x")


def test_only_a_tasks_own_classes_answer_where_the_task_is_known(digits):
    module = Lit(rate=1e-2)
    callback = made("der++", module, setting="task")
    held = [loader(digits, number, "validation") for number in range(2)]
    assert all(score != score for score in callback.measure(held))
    for number in range(2):
        callback.begin(f"digits {number}", classes=(2 * number, 2 * number + 1))
        fit(module, loader(digits, number), callback)
        callback.measure(held)
    assert min(callback.matrix.rows[-1]) > 0.8
    stored = callback.memory.read(callback.memory.slots)
    answered = stored[LOGITS] > torch.finfo(torch.float32).min
    assert torch.equal(answered.nonzero()[:, 1].view(-1, 2) // 2, (stored["labels"] // 2)[:, None].expand(-1, 2))
    with pytest.raises(ConfigError, match=r"'third' has 0 classes, and .* Expected two at least.* Call begin"):
        callback.begin("third")
    with pytest.raises(ConfigError, match="'task 3' has 0 classes"):
        fit(module, loader(digits, 2), callback)
    callback.begin("third", classes=(4, 12))
    with pytest.raises(
        ConfigError, match="the classes 4, 12, and the model gives 10 scores. Expected .* with 13 outputs"
    ):
        fit(module, loader(digits, 2), callback)
    callback.begin("third", classes=(6, 7))
    with pytest.raises(DataError, match="'third' has a sample of class 4. Expected 6, 7. Check"):
        fit(module, loader(digits, 2), callback)


class Skipping(Lit):
    def training_step(self, batch, number):
        return super().training_step(batch, number) if number % 2 else None


class Silent(Lit):
    def training_step(self, batch, number):
        return None


def test_a_batch_without_a_loss_is_left_out(digits):
    module = Skipping()
    callback = made("ewc+replay", module)
    fit(module, loader(digits, 0, count=64), callback)
    assert callback.step == 2
    assert callback.memory.seen == 32
    silent = Silent()
    with pytest.raises(DataError, match="'task 1' has ended without an optimizer step. Expected one .* Give it data"):
        fit(silent, loader(digits, 0), made("ewc", silent))


@pytest.mark.parametrize("method", ["replay", "ewc+replay", "agem"])
def test_a_gradient_scaler_changes_nothing_but_the_last_digits(digits, method):
    ends = []
    for options in ({"init_scale": 1.0, "growth_interval": 10**6}, {"init_scale": 1024.0, "growth_interval": 10**6}):
        module = Lit()
        module.configure_optimizers = lambda own=module: torch.optim.SGD(own.parameters(), 0.05, fused=False)
        callback = made(method, module)
        for number in range(2):
            fit(module, loader(digits, number, count=128), callback, **scaled(**options))
        ends.append(weights(module))
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=3e-3), name


def test_half_precision_without_a_scaler_trains(digits):
    module = Lit()
    callback = made("consolidation", module)
    for number in range(2):
        fit(module, loader(digits, number, count=64), callback, precision="bf16-mixed")
    assert callback.ends == (4, 8)


def test_an_interrupted_task_goes_on_in_the_next_fit(digits):
    class Falling(Lit):
        def training_step(self, batch, number):
            if number == 3 and not self.fell:
                self.fell = True
                raise RuntimeError("fell")
            return super().training_step(batch, number)

    module = Falling()
    module.fell = False
    callback = made("replay", module)
    with pytest.raises(RuntimeError, match="fell"):
        fit(module, loader(digits, 0), callback)
    assert callback.in_task
    assert not module.net._forward_hooks
    fit(module, loader(digits, 0), callback)
    assert [task.name for task in callback.tasks] == ["task 1"]
    assert callback.ends == (3 + len(loader(digits, 0)),)


def test_measuring_leaves_the_model_and_remembers_the_first_scores(digits):
    module = Lit()
    module.net.train()
    callback = made("naive", module)
    held = {"a": loader(digits, 0, "validation"), "b": loader(digits, 1, "validation")}
    before, state = weights(module), torch.get_rng_state()
    scores = callback.measure(held)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.net.training
    assert all(torch.equal(value, weights(module)[name]) for name, value in before.items())
    images, labels = of_task(digits, 0, "validation")
    assert scores[0] == pytest.approx(float((module.net(images).argmax(1) == labels).double().mean()))
    assert callback.matrix.untrained == scores
    fit(module, loader(digits, 0), callback)
    fit(module, loader(digits, 1), callback)
    callback.measure(held)
    assert callback.matrix.rows[0][0] != callback.matrix.rows[0][0]
    assert callback.measure(held) == callback.matrix.rows[1]
    with pytest.raises(ConfigError, match="The tasks a were to be measured. Expected a, b, as before. Give"):
        callback.measure({"a": held["a"]})
    with pytest.raises(DataError, match="was to be measured on no sample. Expected at least one. Give"):
        made("naive", module).measure([[]])


def test_the_anchors_of_a_run_are_those_of_a_trainer(tmp_path, digits):
    run, module, callback = both(digits, tmp_path / "run", "ewc", continual={"samples_per_task": 160})
    assert callback.step == 50
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, module.net.state_dict()[name], atol=1e-4), name


def test_a_settings_object_is_taken_as_it_is():
    config = ContinualConfig(method="replay")
    assert ContinualCallback(config, model=Net(), task="image_classification").settings is config
