"""The settings of a curriculum, and how fast its share of samples grows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.continual.curriculum import PACINGS, CurriculumConfig, Phase, share_at
from utils.runtime.errors import ConfigError
from utils.training import TrainingConfig


def test_settings_go_through_a_dict_and_json():
    import json

    config = CurriculumConfig((Phase("a", 0.3, "linear", 0.2, "accuracy", 0.9, 2), Phase("b")), "length", 0.2, True)
    assert CurriculumConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainingConfig(curriculum=config).curriculum == config.to_dict()


def test_shares_by_hand():
    assert share_at("linear", 0.1, 0.5, 0.25) == pytest.approx(0.2)
    # Platanios et al.: c(t) = sqrt(t (1 - c0^2) / T + c0^2).
    assert share_at("root", 0.1, 1.0, 0.5) == pytest.approx(math.sqrt(0.5 * (1 - 0.01) + 0.01))
    assert share_at("exponential", 0.1, 1.0, 0.5) == pytest.approx(math.sqrt(0.1))
    assert share_at("step", 0.1, 0.7, 0.0) == 0.7


@given(st.sampled_from(PACINGS), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 2), st.floats(0, 2))
def test_a_share_only_rises_between_its_ends(pacing, start, part, one, other):
    end = start + (1 - start) * part
    low, high = (share_at(pacing, start, end, done) for done in sorted((one, other)))
    assert start - 1e-12 <= low <= high + 1e-12 and high <= end + 1e-12
    assert share_at(pacing, start, end, 1.0) == end
    if pacing != "step":
        assert share_at(pacing, start, end, 0.0) == pytest.approx(start)


def test_steps_are_numbers_shares_or_even():
    config = CurriculumConfig((Phase("a", 0.2, steps=7), Phase("b", 0.5, steps=0.5), Phase("c")))
    assert config.lengths(100) == [7, 50, 43]
    assert CurriculumConfig((Phase("a", 0.2), Phase("b", 0.5), Phase("c", steps=5))).lengths(30) == [10, 10, 5]
    with pytest.raises(ConfigError, match=r"take 57 steps, and the run has 50.*at least one.*shorter"):
        CurriculumConfig((Phase("a", 0.2, steps=7), Phase("b", 0.5, steps=50), Phase("c"))).lengths(50)


def test_a_gate_knows_which_way_is_better():
    up, down = Phase(metric="accuracy", threshold=0.8), Phase(metric="loss", threshold=0.8)
    assert up.holds(0.8) and up.holds(0.9) and not up.holds(0.7) and not up.holds(math.nan)
    assert down.holds(0.8) and down.holds(0.7) and not down.holds(0.9) and not down.holds(math.nan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": " "}, "name is ' '.*a text"),
        ({"share": 0}, "share is 0.*above 0"),
        ({"share": 1.5}, "share is 1.5.*to 1"),
        ({"pacing": "cubic"}, "pacing is 'cubic'.*step, linear, root, exponential"),
        ({"steps": 0}, "steps is 0.*whole number from 1, a share"),
        ({"steps": True}, "steps is True"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"patience": 0}, "patience is 0.*whole number"),
        ({"metric": "loss"}, r"metric is 'loss' and threshold is None.*both.*metric='accuracy'"),
        ({"metric": "speed", "threshold": 1}, "metric is 'speed'.*loss"),
        ({"metric": "loss", "threshold": "low"}, "threshold is 'low'.*a number"),
    ],
)
def test_a_phase_says_what_is_wrong(settings, message):
    with pytest.raises(ConfigError, match=message):
        Phase.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": []}, r"phases is \[\].*list of phases"),
        ({"phases": [3]}, r"phases is \[3\]"),
        ({"phases": [{"shar": 1}]}, r"Phase has no setting 'shar'.*'share'"),
        ({"phase": ()}, r"CurriculumConfig has no setting 'phase'.*'phases'"),
        ({"difficulty": 3}, "difficulty is 3.*length, loss.*register_difficulty"),
        ({"begin": 0.0}, "begin is 0.0.*above 0"),
        ({"hardest_first": "no"}, "hardest_first is 'no'"),
        ({"phases": [{"share": 0.5}, {}]}, "have the name 'all'"),
        ({"phases": [{"share": 0.5}, {"name": "b", "share": 0.4}]}, "'b'.*0.4, and begins with 0.5.*never fall.*Raise"),
        ({"phases": [{"share": 0.05}]}, "begins with 0.1"),
        ({"phases": [{"metric": "loss", "threshold": 1}]}, "last phase.*has a gate.*Add a phase"),
    ],
)
def test_a_curriculum_says_what_is_wrong(settings, message):
    with pytest.raises(ConfigError, match=message):
        CurriculumConfig.from_dict(settings)
