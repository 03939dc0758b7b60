import json
from dataclasses import replace

import pytest
import torch

from tests.concepts.transfer_toys import QUICK, samples, student, teacher
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts import verification
from utils.concepts.content import read_content
from utils.concepts.extraction import extract_concept
from utils.concepts.package import PackageError
from utils.concepts.transfer_config import TransferConfig
from utils.concepts.unseen_samples import unseen_by, unseen_tests
from utils.concepts.verification import verify_transfer
from utils.concepts.verification_view import save_verification_figure, verification_figure
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.files import null_nonfinite
from utils.validation.statistics import Interval

OWN = torch.cat(samples(400, seed=7))
TEST = samples(400, seed=9)
OTHER = torch.cat(samples(2000, seed=11))
READ = TransferConfig(steps=0)


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "DRAWS", 4000)
        yield


@pytest.fixture(scope="module")
def package():
    return extract_concept(teacher(), "one sign", *samples(300))


@pytest.fixture(scope="module")
def verified(package):
    students = [student(seed) for seed in range(5)]
    other = OTHER, (OTHER[:, 2] > 0).long()
    return verify_transfer(
        package, teacher(), students, *TEST, config=QUICK, retention=OWN, other_task=other,
    )  # fmt: skip


def test_a_package_is_verified_with_all_that_belongs_to_it(verified):
    assert verified.verified, str(verified)
    assert verified.undefined is None
    assert verified.value.low > 0.8
    assert verified.junk.low < 0 < verified.junk.high
    assert verified.interference.low > -1
    assert verified.taught.low > 0.1
    assert verified.before.low < verified.before.mean < verified.value.mean
    assert verified.seeds == 5
    assert verified.test == (len(TEST[0]), len(TEST[1]))
    assert set(verified.scores) == {"package", "shuffled", "junk", "labels_only", "before"}
    means = {name: sum(row) / 5 for name, row in verified.scores.items()}
    way = verified.intervals["teacher"].mean - means["shuffled"]
    assert verified.value.mean == pytest.approx((means["package"] - means["shuffled"]) / way)
    assert verified.labels_only.mean == pytest.approx((means["labels_only"] - means["shuffled"]) / way)
    assert verified.beyond_labels.mean == pytest.approx(means["package"] - means["labels_only"])
    assert verified.fidelity.overall > 0.8
    assert verified.neighbours["p_value"] <= 0.05
    assert all(share <= QUICK.budget for share in verified.changed)


def test_it_shows_itself(verified, tmp_path):
    text = str(verified)
    assert text.startswith("one sign, Teacher to Student: verified, V = ")
    assert "student + shuffled package" in text
    assert "V of the student as it was" in text
    json.dumps(null_nonfinite(verified.to_dict()))
    assert len(verification_figure(verified, dark=True).axes) == 2
    assert save_verification_figure(verified, tmp_path / "v.svg").read_bytes().startswith(b"<?xml")
    html = verified._repr_html_()
    assert html.count("data:image/png") == 2
    assert "labels alone" in html
    with pytest.raises(ValueError, match="not 'gif'"):
        save_verification_figure(verified, tmp_path / "v.gif")
    undefined = replace(verified, value=None, junk=None, labels_only=None, before=None, undefined="nobody knows")
    assert "V is undefined: nobody knows" in str(undefined)
    assert len(verification_figure(undefined).axes) == 2


def test_a_verdict_needs_every_rule(verified):
    low = Interval(0.6, 0.4, 0.8, 5)
    for change, said in (
        ({"value": low}, "not above 0.5"),
        ({"taught": Interval(0.0, -0.1, 0.1, 5)}, "the lower bound is not above 0."),
        ({"interference": None}, "was not measured"),
        ({"interference": Interval(-1.0, -1.5, 0.0, 5)}, "not above -1"),
        ({"junk": Interval(0.5, 0.4, 0.6, 5)}, "not 0 as"),
        ({"junk": None}, "baselines were left out"),
    ):
        changed = replace(verified, **change)
        assert not changed.verified
        assert any(said in reason for reason in changed.reasons)


def test_where_nothing_is_taught_nothing_is_verified(package):
    """Students as they were, read off as well as the package allows: random features tell much of anything."""
    students = [wide_student(seed) for seed in range(5)]
    own = OTHER[:400]
    other = own, (own[:, 2] > 0).long(), [n // 10 for n in range(400)]
    found = verify_transfer(package, teacher(), students, *TEST, config=READ, other_task=other)
    assert found.value.low > 0.5 and found.junk.low <= 0 <= found.junk.high and found.interference.low > -1
    assert found.value == found.before and (found.taught.low, found.taught.high) == (0, 0)
    assert not found.verified
    assert sum(not held for held, _ in found._rules()) == 1
    assert f"whose V is {found.before.mean:.3f}" in found.reasons[1]


def wide_student(seed):
    """A student whose random features are enough for a readout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 400), torch.nn.ReLU(), torch.nn.Linear(400, 2))
    return ModelAdapter(model, spec=ModelSpec(task="tabular_classification", num_labels=2))


def test_the_other_task_is_drawn_by_groups(package):
    """Twenty sources of fifty samples, all of a source changed alike: an interval of twenty, not of a thousand."""
    inputs = torch.randn(1000, 8, generator=torch.Generator().manual_seed(5))
    groups = [str(n // 50) for n in range(1000)]
    change = torch.randn(20, generator=torch.Generator().manual_seed(1)).double().repeat_interleave(50)
    correct, labels = [change] * 5, torch.zeros(1000).long()
    nothing = unseen_tests(package, *TEST, None)
    other = unseen_by(package, nothing, None, (inputs, labels), None)
    alone = verification._interference(correct, other, nothing, 0)
    told = verification._interference(correct, replace(other, groups=tuple(groups)), nothing, 0)
    assert told.mean == alone.mean and told.high - told.low > 4 * (alone.high - alone.low)
    known = replace(nothing, content=read_content(inputs), clusters=tuple(groups))
    assert verification._interference(correct, other, known, 0) == told


def test_a_shuffled_package_in_its_place_scores_nothing(package):
    found = verify_transfer(
        package.shuffled(99), teacher(), student(), *TEST, config=READ, baselines=False, metric="balanced_accuracy"
    )
    assert found.value.low < 0 < found.value.high
    assert not found.verified
    assert (found.junk, found.labels_only, found.fidelity, found.neighbours) == (None, None, None, None)


def test_meaningless_packages_score_nothing_however_they_are_dealt(package):
    """Each is dealt once for all students: most of what it scores is the luck of its deal."""
    for seed in range(4):
        found = verify_transfer(
            package.shuffled(seed), teacher(), student(), *TEST, config=READ, baselines=False, seed=seed
        )
        assert found.value.low <= 0 <= found.value.high, (seed, found.value)


def test_junk_that_says_something_fails_the_verdict(package, monkeypatch):
    """A baseline that leaks half of the package is none: the verdict has to notice."""
    lessons = verification._lessons

    def leaking(own, seed, baselines):
        made = lessons(own, seed, baselines)
        junk, kept = made["junk"][0], torch.arange(len(own)) % 2 == 0
        targets = torch.where(kept, own.soft_targets, junk.soft_targets)
        return made | {"junk": (replace(junk, soft_targets=targets), False)}

    monkeypatch.setattr(verification, "_lessons", leaking)
    found = verify_transfer(package, teacher(), wide_student(0), *TEST, config=READ)
    assert found.junk.low > 0
    assert any("not 0 as" in reason for reason in found.reasons)


def test_the_concept_itself_is_no_other_task(package):
    held, labels = torch.cat(TEST), torch.arange(len(torch.cat(TEST))) < len(TEST[0])
    nearly = 3 * (~labels).long()
    nearly[:3] = 7
    for inputs, others in (
        (held, nearly),
        (torch.cat([held, OTHER[:50]]), torch.cat([nearly, torch.zeros(50).long()])),
    ):
        with pytest.raises(DataError, match="part 99% of the test samples among its samples as the concept does"):
            verify_transfer(package, teacher(), student(), *TEST, config=READ, other_task=(inputs, others))
    finer = torch.arange(len(held)) % 2 + 2 * labels.long()
    shown = unseen_tests(package, *TEST, None)
    assert unseen_by(package, shown, None, (held, finer), None) is not None


def test_without_a_teacher_that_knows_there_is_no_score():
    given = torch.cat(samples(300))
    made = extract_concept(teacher(), "nothing", given[::2], given[1::2])
    held = torch.cat(TEST)
    found = verify_transfer(made, teacher(), student(), held[::2], held[1::2], config=READ)
    assert found.value is None
    assert "the teacher does not have the concept" in found.undefined
    assert not found.verified
    assert "undefined" in str(found)
    assert "V is undefined" in found._repr_html_()


def test_a_student_that_knew_before_has_no_score(package):
    found = verify_transfer(package, teacher(), teacher(), *TEST, config=READ)
    assert found.value is None
    assert "the student knew the concept before" in found.undefined


def test_the_test_set_must_be_unseen(package):
    given, model, one = samples(300), teacher(), student()
    mixed = torch.cat([TEST[0], given[0][:3]]), TEST[1]
    with pytest.raises(DataError, match="3 test samples are in the package"):
        verify_transfer(package, model, one, *mixed)
    with pytest.raises(DataError, match="1 test samples are among the samples to be retained"):
        verify_transfer(package, model, one, *TEST, retention=torch.cat([OWN, TEST[0][:1]]))
    with pytest.raises(DataError, match="2 test examples are among the test counter-examples"):
        verify_transfer(package, model, one, TEST[0], torch.cat([TEST[1], TEST[0][:2]]))
    with pytest.raises(DataError, match="samples of the other task are among those the student learns from"):
        verify_transfer(package, model, one, *TEST, retention=OWN, other_task=(OWN, OWN[:, 0].long()))
    with pytest.raises(DataError, match="There are 5 different test counter-examples"):
        verify_transfer(package, model, one, TEST[0], TEST[1][:5])
    shown = torch.cat([TEST[0], given[0]])[: len(TEST[0])], TEST[1]
    with pytest.raises(DataError, match="are among the student's exemplars"):
        verify_transfer(package, model, one, *TEST, student_test=shown, student_examples=(TEST[0][:147], TEST[1][:153]))
    with pytest.raises(DataError, match="test samples for the student"):
        verify_transfer(package, model, one, *TEST, student_test=(TEST[0][:30], TEST[1][:30]))


def test_groups_must_be_on_one_side():
    made, given = extract_grouped(), samples(300)
    own = [[f"new {n % 40}" for n in range(len(side))] for side in TEST]
    with pytest.raises(DataError, match="the test samples come without"):
        verify_transfer(made, teacher(), student(), *TEST)
    with pytest.raises(DataError, match="1 groups of the test samples are in the package"):
        verify_transfer(made, teacher(), student(), *TEST, groups=(["7", *own[0][1:]], own[1]))
    plain = extract_concept(teacher(), "one sign", *given)
    with pytest.raises(DataError, match="does not tell those of its exemplars"):
        verify_transfer(plain, teacher(), student(), *TEST, groups=own)
    found = verify_transfer(made, teacher(), student(), *TEST, groups=own, config=READ, baselines=False)
    assert found.value is not None


def extract_grouped():
    given = samples(300)
    return extract_concept(teacher(), "one sign", *given, groups=[[str(n % 30) for n in range(len(s))] for s in given])


def test_what_cannot_be_measured_is_refused(package):
    with pytest.raises(ConfigError, match="The number of seeds is 4. Expected a whole number, at least 5"):
        verify_transfer(package, teacher(), student(), *TEST, seeds=4)
    with pytest.raises(ConfigError, match="The number of students is 2"):
        verify_transfer(package, teacher(), [student(), student(1)], *TEST)
    with pytest.raises(ConfigError, match="The metric is 'luck'"):
        verify_transfer(package, teacher(), student(), *TEST, metric="luck")
    with pytest.raises(PackageError, match="Give the teacher as it was"):
        verify_transfer(package, student(), student(), *TEST)
    with pytest.raises(ConfigError, match="other_task is a Tensor"):
        verify_transfer(package, teacher(), student(), *TEST, other_task=OTHER)
    with pytest.raises(DataError, match="There are 1 groups for 2000 samples of the other task"):
        verify_transfer(package, teacher(), student(), *TEST, other_task=(OTHER, torch.zeros(2000).long(), ["a"]))
    with pytest.raises(DataError, match="labels of the other task are of the type float32"):
        verify_transfer(package, teacher(), student(), *TEST, other_task=(OTHER, torch.zeros(2000)))
    with pytest.raises(ConfigError, match="other_task is a tuple without a tensor of classes"):
        verify_transfer(package, teacher(), student(), *TEST, other_task=(OTHER, [1, 2]))
    with pytest.raises(DataError, match="groups"):
        verify_transfer(extract_grouped(), teacher(), student(), *TEST, groups=5)
    with pytest.raises(ConfigError, match="student_test is a int"):
        verify_transfer(package, teacher(), student(), *TEST, student_test=5)
    none = torch.full((2000,), 7)
    with pytest.raises(DataError, match="none of the 2000 samples of the other task right"):
        verify_transfer(package, teacher(), student(), *TEST, config=READ, other_task=(OTHER, none))
    with pytest.raises(DataError, match="2000 samples, and labels of the shape"):
        verify_transfer(package, teacher(), student(), *TEST, other_task=(OTHER, torch.zeros(3)))
    with pytest.raises(DataError, match="The student answers"):
        labels = torch.zeros(2000, 2, dtype=torch.long)
        verify_transfer(package, teacher(), student(), *TEST, config=READ, other_task=(OTHER, labels))
