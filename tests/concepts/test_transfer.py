import json

import pytest
import torch
from torch import nn

from tests.concepts.transfer_toys import QUICK, WIDTH, Student, samples, student, teacher
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.extraction import extract_concept
from utils.concepts.ranking import auroc
from utils.concepts.transfer import transfer_concept
from utils.concepts.transfer_config import TransferConfig
from utils.runtime.errors import ConfigError, DataError
from utils.training.weights import weights_sha256

OWN = torch.cat(samples(400, seed=7))


@pytest.fixture(scope="module")
def package():
    return extract_concept(teacher(), "one sign", *samples(300))


def reached(readout):
    held = samples(400, seed=9)
    return auroc(readout.score(held[0]), readout.score(held[1]))


def test_a_student_learns_what_it_could_not_read_and_keeps_what_it_knew(package):
    given = student()
    given.module.train()
    given.module.out.weight.grad = kept = torch.ones_like(given.module.out.weight)
    before = weights_sha256(given.module)
    made = transfer_concept(package, given, QUICK, retention=OWN)
    assert weights_sha256(given.module) == before
    assert given.module.training
    assert given.module.out.weight.grad is kept
    assert reached(made.before) < 0.85
    assert reached(made.readout) > 0.93
    assert made.changed <= QUICK.budget
    assert made.measured_on == 80
    assert made.student(OWN).shape == given.module(OWN).shape
    first, last = made.history[0], made.history[-1]
    assert last["concept"] < first["concept"]
    assert last["alignment"] < first["alignment"]
    assert last["step"] == QUICK.steps
    assert "parameters took part" in str(made)
    json.dumps(made.to_dict())
    again = transfer_concept(package, given, QUICK, retention=OWN)
    assert torch.equal(again.readout.vector, made.readout.vector)


def test_a_shuffled_package_teaches_nothing(package):
    made = transfer_concept(package.shuffled(0), student(), QUICK, retention=OWN)
    assert abs(reached(made.readout) - 0.5) < 0.2


def test_the_labels_alone_are_a_baseline(package):
    made = transfer_concept(package, student(), QUICK, retention=OWN, labels_only=True)
    assert "alignment" not in made.history[0]
    assert reached(made.readout) > 0.85


def test_weights_go_back_until_the_budget_holds(package):
    freely = TransferConfig(**QUICK.to_dict() | {"retention": 0.0, "budget": None, "learning_rate": 5e-2})
    free = transfer_concept(package, student(), freely, retention=OWN)
    assert free.mixture == 1
    assert free.changed == free.changed_unbounded > 0.02
    strictly = TransferConfig(**freely.to_dict() | {"budget": 0.02})
    bound = transfer_concept(package, student(), strictly, retention=OWN)
    assert bound.changed_unbounded == free.changed_unbounded
    assert bound.changed <= 0.02
    assert bound.mixture < 1
    assert "Unbounded it would have been" in str(bound)


def test_the_student_itself_is_changed_where_that_is_asked_for(package):
    given = student()
    made = transfer_concept(package, given, QUICK, in_place=True)
    assert made.student is given.module
    assert reached(made.readout) > 0.9
    assert reached(made.before) < 0.85


def test_without_steps_or_free_parameters_it_is_only_read(package):
    frozen = Student()
    frozen.requires_grad_(False)
    settings = {"task": "tabular_classification", "num_labels": 2}
    for model, config in (
        (student(), TransferConfig(steps=0)),
        (ModelAdapter(frozen, spec=ModelSpec(**settings)), QUICK),
    ):
        made = transfer_concept(package, model, config)
        assert made.history == ()
        assert made.changed == 0
        assert torch.equal(made.readout.vector, made.before.vector)


class Numbers(nn.Module):
    """Answers with two numbers, through a norm over the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.out = nn.Linear(16, 2)

    def forward(self, rows):
        return self.out(self.body(rows))


def test_outputs_that_are_numbers_are_kept_and_means_stay(package):
    given = ModelAdapter(Numbers(), spec=ModelSpec(task="regression"))
    config = TransferConfig(**QUICK.to_dict() | {"budget": 0.1})
    made = transfer_concept(package, given, config, retention=OWN)
    assert 0 < made.changed <= 0.1
    assert torch.equal(made.student.body[1].running_mean, given.module.body[1].running_mean)


def test_a_student_that_reads_otherwise_gets_its_own_form(package):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.out = nn.Linear(WIDTH, 32), nn.Linear(32, 2)

        def forward(self, left, right):
            return self.out(self.body(torch.cat([left, right], 1)).tanh())

    given = samples(300)
    shown = [{"left": side[:, :4], "right": side[:, 4:]} for side in given]
    spec = ModelSpec(task="tabular_classification", example_inputs={n: v[:2] for n, v in shown[0].items()})
    halves = ModelAdapter(Halves(), spec=spec)
    nothing = transfer_concept(package, halves, QUICK, student_examples=tuple(shown))
    assert nothing.mixture == 0
    assert "Nothing of the training was kept" in str(nothing)
    config = TransferConfig(**QUICK.to_dict() | {"budget": None})
    made = transfer_concept(package, halves, config, student_examples=tuple(shown))
    held = [{"left": side[:, :4], "right": side[:, 4:]} for side in samples(400, seed=9)]
    assert auroc(made.readout.score(held[0]), made.readout.score(held[1])) > 0.85
    with pytest.raises(DataError, match="There are 5 and 5 examples for the student"):
        transfer_concept(
            package, halves, QUICK, student_examples=tuple({n: v[:5] for n, v in s.items()} for s in shown)
        )
    with pytest.raises(ConfigError, match="student_examples is a Tensor"):
        transfer_concept(package, halves, QUICK, student_examples=given[0])


def test_texts_are_read_by_each_with_its_own_tokenizer():
    from utils.tokenization import choose_tokenizer

    class Bag(nn.Module):
        def __init__(self, size, width):
            super().__init__()
            torch.manual_seed(width)
            self.table, self.out = nn.Embedding(size, width), nn.Linear(width, 2)

        def forward(self, input_ids):
            return self.out(self.table(input_ids).mean(1))

    words = ["red", "green", "blue", "grey", "one", "two", "three"]
    texts = [f"{a} {b} {c} {a}" for a in words for b in words for c in words]
    warm = [text for text in texts if text.count("red") > 0][:60]
    cold = [text for text in texts if "red" not in text][:90]
    models, tokenizers = [], []
    for size, width in ((300, 32), (40, 24)):
        tokenizers.append(choose_tokenizer(texts, size))
        spec = ModelSpec(task="text_classification", vocab_size=size, num_labels=2)
        models.append(ModelAdapter(Bag(size, width), spec=spec))
    made = extract_concept(models[0], "red", warm, cold, tokenizer=tokenizers[0])
    assert made.content.texts[: len(warm)] == tuple(warm)
    learned = transfer_concept(made, models[1], TransferConfig(steps=5), tokenizer=tokenizers[1])
    assert learned.readout.score(texts[:9], tokenizers[1]).shape == (9,)
    with pytest.raises(DataError, match="there is no tokenizer"):
        transfer_concept(made, models[1])


def test_what_does_not_fit_is_said(package):
    other = ModelAdapter(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ConfigError, match="does not take the exemplars of the package, tensors of shape .8,."):
        transfer_concept(package, other)
    with pytest.raises(ConfigError, match="The package is a str"):
        transfer_concept("package", student())
    with pytest.raises(ConfigError, match="does not take the samples to be retained"):
        transfer_concept(package, student(), retention=torch.zeros(4, 3))
    with pytest.raises(ConfigError, match="has no layer 'bdoy'.* body"):
        transfer_concept(package, student(), TransferConfig(layer="bdoy"))
    stuck = student()
    stuck.module.lock = (number for number in range(3))
    with pytest.raises(ConfigError, match="cannot be copied"):
        transfer_concept(package, stuck)
    with pytest.raises(DataError, match="The loss of step .* is not finite"):
        broken = student()
        with torch.no_grad():
            broken.module.out.weight.fill_(torch.nan)
        transfer_concept(package, broken, QUICK)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": -1}, "steps is -1.* Expected a whole number from 0"),
        ({"learning_rate": 0}, "learning_rate is 0.* Expected a number above 0 to 10"),
        ({"budget": 2}, "budget is 2.* from 0 to 1 or None"),
        ({"side": "left"}, "side is 'left'"),
        ({"layer": 3}, "layer is 3"),
        ({"temprature": 1}, "no setting 'temprature'.*'temperature'"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ConfigError, match=said):
        TransferConfig.from_dict(settings)
    assert TransferConfig.from_dict(QUICK.to_dict()) == QUICK


class HalfStudent(Student):
    def forward(self, features):
        return super().forward(features.half())


def test_a_student_in_half_precision_is_not_trained(package):
    half = ModelAdapter(HalfStudent().half(), spec=ModelSpec(task="tabular_classification", num_labels=2))
    with pytest.raises(ConfigError, match="has weights of float16.*float32 or bfloat16"):
        transfer_concept(package, half, QUICK)
