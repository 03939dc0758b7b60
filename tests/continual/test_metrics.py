import copy
import importlib
import math
import subprocess
import sys
import textwrap

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from utils.continual import metrics
from utils.continual.accuracy_matrix import NUMBERS, AccuracyMatrix
from utils.continual.matrix_parts import MatrixError
from utils.continual.metrics import (
    UNTRAINED,
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    ContinualAccuracy,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    StabilityGap,
    WorstCaseAccuracy,
)
from utils.runtime.errors import MissingPackageError

SINGLE = (
    AverageAccuracy, AverageIncrementalAccuracy, BackwardTransfer, Forgetting, ForwardTransfer, LearningAccuracy,
    StabilityGap, WorstCaseAccuracy,
)  # fmt: skip
EIGHTHS = {UNTRAINED: (1, 2, 0), 0: (8, 2, 1), 1: (5, 7, 2), 2: (4, 6, 8)}
"""How many of eight samples of each task are right after which task."""
WITHIN = [(5, 1, (6,)), (7, 1, (3,)), (11, 2, (4, 3))]


def batch(right):
    """Classes of eight samples, of which some are right."""
    labels = torch.arange(8) % 3
    return torch.where(torch.arange(8) < right, labels, (labels + 1) % 3), labels


def fill(metric):
    """Count a whole stream, each cell in two batches."""
    for after, row in EIGHTHS.items():
        for task, right in enumerate(row):
            predictions, labels = batch(right)
            metric.update(predictions[:3], labels[:3], task=task, after=after)
            metric.update(predictions[3:], labels[3:], task=task, after=after)
    for step, during, scores in WITHIN:
        for task, right in enumerate(scores):
            predictions, labels = batch(right)
            metric.update(predictions[:5], labels[:5], task=task, during=during, step=step)
            metric.update(predictions[5:], labels[5:], task=task, during=during, step=step)
    return metric


EXPECTED = AccuracyMatrix(
    ("task 0", "task 1", "task 2"), tuple(tuple(n / 8 for n in EIGHTHS[i]) for i in range(3)),
    untrained=tuple(n / 8 for n in EIGHTHS[UNTRAINED]),
    within=tuple((step, during, tuple(n / 8 for n in scores)) for step, during, scores in WITHIN),
)  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE)
def test_every_metric_is_the_number_of_its_matrix(kind):
    metric = fill(kind(3))
    assert metric.matrix == EXPECTED
    value = metric.compute()
    assert value.shape == () and value.item() == getattr(EXPECTED, kind.number)
    assert kind.number in NUMBERS and metric.compute() is value


def test_all_numbers_at_once():
    found = fill(ContinualAccuracy(("task 0", "task 1", "task 2"))).compute()
    assert set(found) == set(NUMBERS) - {"intransigence"}
    assert {name: value.item() for name, value in found.items()} == {name: getattr(EXPECTED, name) for name in found}


def test_a_collection_of_them():
    together = MetricCollection([kind(3) for kind in SINGLE])
    fill(together)
    assert together["Forgetting"].compute().item() == EXPECTED.forgetting
    assert {k: v.item() for k, v in together.compute().items()}["StabilityGap"] == EXPECTED.stability_gap


def test_logits_names_and_ignored_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, -100, 4, 0])
    known = labels != -100
    by_name = AverageAccuracy(("first", "second"))
    by_name.update(logits, labels, task="first", after="first")
    assert by_name.compute().item() == pytest.approx((logits.argmax(1) == labels)[known].float().mean().item())


@pytest.mark.parametrize("axis", [-1, 1])
def test_losses_of_tokens(axis):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7, 5), torch.randint(0, 5, (4, 7))
    labels[1, 3:] = -100
    metric = AverageAccuracy(2, unit="nats")
    metric.update(logits.movedim(-1, axis), labels, task=0, after=0)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    assert metric.matrix.unit == "nats" and not metric.matrix.higher_is_better


def test_forgetting_in_nats_is_how_much_the_loss_rose():
    sure, unsure, labels = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    metric = Forgetting(2, unit="nats")
    for after, logits in enumerate((sure, unsure)):
        for task in range(2):
            metric.update(logits, labels, task=task, after=after)
    assert metric.compute().item() == pytest.approx(math.log(2) - math.log1p(math.exp(-9)), rel=1e-5)


def test_half_precision_is_summed_in_full():
    logits = torch.zeros(5000, 3, dtype=torch.bfloat16)
    metric = LearningAccuracy(1, unit="nats")
    metric.update(logits, torch.zeros(5000, dtype=torch.long), task=0, after=0)
    assert metric.compute().item() == pytest.approx(math.log(3), rel=1e-6)


def test_a_stream_that_has_just_begun():
    metric = AverageAccuracy(3)
    metric.update(*batch(4), task=0, after=UNTRAINED)
    assert math.isnan(metric.compute())
    metric.update(*batch(6), task=0, after=0)
    assert metric.compute().item() == 0.75
    assert math.isnan(Forgetting(3)(*batch(4), task=0, after=0))


def test_reset_state_and_copies():
    metric = fill(StabilityGap(3))
    again = StabilityGap(3)
    again.load_state_dict(copy.deepcopy(metric.state_dict()))
    assert again.matrix == EXPECTED
    again.update(*batch(0), task=0, during=2, step=13)
    assert again.compute() == 5 / 8 and metric.compute() == 5 / 8
    metric.reset()
    assert metric.matrix == AccuracyMatrix(EXPECTED.tasks)
    fill(metric)
    assert metric.matrix == EXPECTED and again.clone().compute() == again.compute()


def test_two_halves_are_the_whole():
    first, second = ContinualAccuracy(3), ContinualAccuracy(3)
    fill(first)
    fill(second)
    second.merge_state(first)
    assert second.matrix == EXPECTED
    assert second.counts.max() == 16


def test_forward_counts_and_returns_the_batch():
    metric = LearningAccuracy(2)
    assert metric(*batch(8), task=0, after=0).item() == 1.0
    assert metric(*batch(4), task=0, after=0).item() == 0.5
    assert metric.compute().item() == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 3}, "The argument task is 3. Expected a number from 0 to 1 or one of task 0, task 1. Name every"),
        ({"after": -2}, "The argument after is -2."),
        ({"after": "other"}, "The argument after is 'other'."),
        ({"after": None}, "A batch was measured after None, during None, at step None. Expected `after`, or"),
        ({"during": 1, "step": 3}, "A batch was measured after 0, during 1, at step 3."),
        ({"after": None, "during": 1}, "A batch was measured after None, during 1, at step None."),
        ({"after": None, "during": 1, "step": 1.5}, "The step is 1.5. Expected a whole number from 0."),
        ({"labels": torch.zeros(8)}, "the labels torch.float32 of shape (8,). Expected logits with one axis more"),
        ({"labels": torch.zeros(8, 3, dtype=torch.long)}, "The predictions are torch.int64 of shape (8,), the labels"),
        ({"predictions": torch.zeros(8)}, "or classes shaped as the labels. Give labels as integers"),
    ],
)  # fmt: skip
def test_wrong_batches(change, message):
    predictions, labels = batch(4)
    arguments = {"predictions": predictions, "labels": labels, "task": 0, "after": 0} | change
    metric = AverageAccuracy(2)
    with pytest.raises(MatrixError) as caught:
        metric.update(**arguments)
    assert message in str(caught.value)
    assert metric.counts.sum() == 0


def test_wrong_settings():
    with pytest.raises(MatrixError, match="The unit is 'rmse'. Expected 'accuracy' or 'nats'. Use AccuracyMatrix"):
        Forgetting(2, unit="rmse")
    with pytest.raises(MatrixError, match="There are no tasks"):
        Forgetting(0)
    with pytest.raises(MatrixError, match="'a' stand for several tasks"):
        Forgetting(("a", "a"))
    nats = Forgetting(2, unit="nats")
    with pytest.raises(MatrixError, match=r"classes last or second\. Give labels"):
        nats.update(*batch(4), task=0, after=0)


class Learner(pl.LightningModule):
    """A linear model that measures every task when it has learned one."""

    def __init__(self):
        super().__init__()
        self.layer, self.forgetting, self.now = nn.Linear(2, 2), Forgetting(2), 0
        self.after = UNTRAINED

    def training_step(self, samples):
        return nn.functional.cross_entropy(self.layer(samples[0]), samples[1])

    def validation_step(self, samples, _, dataloader_idx=0):
        self.forgetting.update(self.layer(samples[0]), samples[1], task=dataloader_idx, after=self.after)

    def on_validation_epoch_end(self):
        if self.after > 0:
            self.log("forgetting", self.forgetting.compute())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=5.0)


def test_inside_a_lightning_module_of_ones_own(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(64, 2)
    # The second task is the first with its labels turned round: learning it forgets the first.
    labels = (inputs[:, 0] > 0).long()
    tasks = [DataLoader([(inputs, right)], batch_size=None) for right in (labels, 1 - labels)]
    module = Learner()

    def trainer():
        return pl.Trainer(
            max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip

    for number, task in enumerate(tasks):
        trainer().fit(module, task)
        module.after = number
        seen = trainer()
        seen.validate(module, tasks, verbose=False)
    rows = module.forgetting.matrix.rows
    assert rows[0][0] > 0.9 and rows[0][1] == 1 - rows[0][0]
    assert seen.callback_metrics["forgetting"].item() == pytest.approx(rows[0][0] - rows[1][0]) and rows[1][0] < 0.1
    assert "forgetting.sums" in module.state_dict()


def test_without_torchmetrics_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingPackageError, match="pip install torchmetrics"):
        importlib.reload(metrics)


def test_importing_utils_and_the_matrix_needs_no_torchmetrics(root):
    code = """
        import sys
        sys.modules["torchmetrics"] = sys.modules["matplotlib"] = sys.modules["pytorch_lightning"] = None
        import utils
        from utils.continual.accuracy_matrix import AccuracyMatrix
        matrix = AccuracyMatrix(("a", "b"), ((0.9, 0.1), (0.5, 0.8)))
        print(matrix.forgetting, "pip install matplotlib" in matrix._repr_html_())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["0.4", "True"], done.stderr


@pytest.mark.slow
def test_two_processes_count_together(root, tmp_path):
    code = """
        import sys
        import torch
        from tests.continual.test_metrics import EXPECTED, WITHIN, EIGHTHS, batch
        from utils.continual.metrics import ContinualAccuracy
        rank = int(sys.argv[1])
        torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        metric = ContinualAccuracy(3)
        half = slice(0, 3) if rank == 0 else slice(3, 8)
        for after, row in EIGHTHS.items():
            for task, right in enumerate(row):
                predictions, labels = batch(right)
                metric.update(predictions[half], labels[half], task=task, after=after)
        # Only one of them measures within tasks.
        for step, during, scores in WITHIN if rank else ():
            for task, right in enumerate(scores):
                metric.update(*batch(right), task=task, during=during, step=step)
        found = metric.compute()
        for name, value in found.items():
            assert value.item() == getattr(EXPECTED, name), name
        assert metric.counts.max() < 8
        metric.sync()
        assert metric.matrix == EXPECTED
        metric.unsync()
        assert metric.counts.max() < 8
        print("equal")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], cwd=root, stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for process in started:
        out, error = process.communicate(timeout=120)
        assert out.split() == ["equal"], error
