import pytest
import torch

from tests.concepts.transfer_toys import WIDTH, Teacher, samples, teacher
from utils.concepts.extraction import extract_concept, relations
from utils.concepts.ranking import auroc
from utils.runtime.errors import ConfigError, DataError
from utils.training.weights import weights_sha256


def test_a_package_holds_what_the_teacher_knows():
    given, model = samples(200), teacher()
    before = weights_sha256(model.module)
    made = extract_concept(model, "one sign", *given, anchors=32)
    assert weights_sha256(model.module) == before == made.provenance.weights_sha256
    assert (made.provenance.positive, made.provenance.negative) == tuple(map(len, given))
    assert made.provenance.layer == "head"
    assert made.found and not made.direction.accepted
    assert auroc(made.soft_targets[made.labels], made.soft_targets[~made.labels]) > 0.97
    assert list(made.traces)[-1] == "head"
    held = samples(200, seed=1)
    readout = made.readout(model)
    assert float((readout.probability(held[0]) > 0.5).float().mean()) > 0.9
    assert float((readout.probability(held[1]) > 0.5).float().mean()) < 0.1
    rows = torch.cat(given)
    hidden = model.module.first(rows).relu().detach()
    torch.testing.assert_close(made.prototypes[0], hidden[: len(given[0])].mean(0))
    torch.testing.assert_close(made.traces["head"], relations(hidden, made.anchors), atol=1e-5, rtol=1e-4)
    other = extract_concept(model, "one sign", *given, anchors=32)
    assert torch.equal(other.soft_targets, made.soft_targets)
    given[0].zero_()
    assert float(made.content.given.abs().sum()) > 0


def test_no_target_repeats_the_label_of_its_own_example():
    """Labels drawn at random in a wide layer: a probe repeats those that it saw, and knows nothing of the others."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(WIDTH, 256), torch.nn.Tanh(), torch.nn.Linear(256, 2))
    rows = torch.cat(samples(100))
    rows = rows[torch.randperm(100)]
    made = extract_concept(wide, "nothing", rows[:50], rows[50:], layer="1")
    values = wide[:2](rows).detach()
    assert auroc(made.direction.score(values[:50]), made.direction.score(values[50:])) > 0.9
    assert auroc(made.soft_targets[:50], made.soft_targets[50:]) < 0.7
    assert not made.found


def test_examples_of_one_group_stay_together():
    """Copies with a little noise in one group: no fold sees the label of another copy."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    rows = torch.randn(40, WIDTH).repeat_interleave(4, 0) + 1e-3 * torch.randn(160, WIDTH)
    groups = [n // 4 for n in range(80)], [20 + n // 4 for n in range(80)]
    apart = extract_concept(wide, "nothing", rows[:80], rows[80:], layer="1", groups=groups)
    mixed = extract_concept(wide, "nothing", rows[:80], rows[80:], layer="1")
    assert auroc(mixed.soft_targets[:80], mixed.soft_targets[80:]) > 0.8
    assert auroc(apart.soft_targets[:80], apart.soft_targets[80:]) < 0.65
    assert not apart.found and apart.direction.groups == (20, 20)
    with pytest.raises(DataError, match="All positive examples are of one group"):
        extract_concept(wide, "nothing", rows[:80], rows[80:], layer="1", groups=([0] * 80, [1] * 80))
    lone = [0] * 78 + [2, 2], [1] * 78 + [3, 3]
    with pytest.raises(DataError, match="Without one of 4 parts of the examples there is no direction"):
        extract_concept(wide, "nothing", rows[:80], rows[80:], layer="1", groups=lone)


def test_what_makes_no_concept_is_refused():
    positive, negative = samples(80)
    with pytest.raises(DataError, match="There is 1 different example. Expected 16"):
        extract_concept(teacher(), "x", positive[:1], negative)
    with pytest.raises(DataError, match="There are 3 different counter-examples"):
        extract_concept(teacher(), "x", positive, negative[:3].repeat(9, 1))
    with pytest.raises(DataError, match=r"20 of 20 examples are among the counter-examples"):
        extract_concept(teacher(), "x", positive[:20], positive)
    with pytest.raises(ConfigError, match="has no layer 'frist'.* first"):
        extract_concept(teacher(), "x", positive, negative, layer="frist")
    with pytest.raises(DataError, match="There are 2 groups for"):
        extract_concept(teacher(), "x", positive, negative, groups=(["a", "b"], ["c"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "positions"}, "The pool is 'positions'"),
        ({"side": "left"}, "The side is 'left'"),
        ({"method": "guess"}, "The method is 'guess'"),
        ({"anchors": 1}, "anchors is 1. Expected .* at least 2. Write for example anchors=2"),
        ({"traces": -1}, "traces is -1"),
        ({"date": "yesterday"}, "The date is 'yesterday'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        extract_concept(Teacher(), "x", *samples(80), **settings)
