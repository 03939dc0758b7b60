"""Settings of growth: what is accepted, what is refused with which words, and the early form."""

import json
import warnings
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.growth.config import OPERATORS, TRIGGERS, GrowthConfig, ScheduledGrowth
from utils.runtime.errors import ConfigError
from utils.runtime.settings import field_help


def test_defaults_grow_nothing():
    config = GrowthConfig()
    assert config.schedule == () and not config.automatic
    assert GrowthConfig.from_dict({}) == config


def test_every_field_has_help():
    for kind in (GrowthConfig, ScheduledGrowth):
        assert list(field_help(kind)) == [field.name for field in fields(kind)]


def test_round_trip_through_json():
    config = GrowthConfig(
        schedule=(ScheduledGrowth(0.3, "depth", to=4), ScheduledGrowth(10, "heads", 2, where="blocks.1")),
        operators=("feed_forward", "depth"),
        triggers=("plateau", "uncertainty"),
        max_parameters=10**6,
        probe_steps=20,
        new_second_moment="mean",
        on_refusal="stop",
    )
    assert GrowthConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    st.one_of(st.integers(1, 10**6), st.floats(0.001, 0.999)), st.sampled_from(OPERATORS), st.integers(1, 99),
    st.booleans(), st.one_of(st.none(), st.integers(-3, 9), st.text(max_size=5)),
)  # fmt: skip
def test_events_survive_json(at, operator, size, added, where):
    event = ScheduledGrowth(at, operator, **{"amount" if added else "to": size}, where=where)
    assert ScheduledGrowth.from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert event.step(1000) >= 1


def test_steps_and_shares():
    assert ScheduledGrowth(7, "depth", 1).step(100) == 7
    assert ScheduledGrowth(0.3, "depth", 1).step(1000) == 300
    assert ScheduledGrowth(0.001, "depth", 1).step(10) == 1


def test_progressive():
    config = GrowthConfig.progressive(2, at=0.3, max_parameters=10**7)
    assert config.schedule == (ScheduledGrowth(0.3, "depth", to="full"),)
    assert config.begin_blocks == 2
    assert config.max_parameters == 10**7
    assert GrowthConfig.progressive(4, at=200).schedule[0].step(1000) == 200


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"at": 0, "operator": "depth", "amount": 1}, "at is 0. Expected a step, a whole number from 1, or a share"),
        ({"at": 1.0, "operator": "depth", "amount": 1}, "at is 1.0"),
        ({"at": True, "operator": "depth", "amount": 1}, "at is True"),
        ({"at": "0.3", "operator": "depth", "amount": 1}, "at is '0.3'"),
        ({"at": 2**31, "operator": "depth", "amount": 1}, "at is 2147483648"),
        ({"at": float("nan"), "operator": "depth", "amount": 1}, "at is nan"),
        ({"at": 5, "operator": "dept", "amount": 1}, "operator is 'dept'. Expected one of depth, .* 'depth'"),
        ({"at": 5, "operator": "depth"}, "amount is None and to is None. Expected exactly one"),
        ({"at": 5, "operator": "depth", "amount": 1, "to": 2}, "amount is 1 and to is 2. Expected exactly one"),
        ({"at": 5, "operator": "depth", "amount": 0}, "amount is 0. Expected a whole number of 1 or more, at most"),
        ({"at": 5, "operator": "depth", "to": 2.5}, "to is 2.5. Expected a whole number or None"),
        ({"at": 5, "operator": "depth", "amount": True}, "amount is True. Expected a whole number"),
        ({"at": 5, "operator": "depth", "amount": 1, "where": 1.5}, "where is 1.5. Expected a name, an index or None"),
        ({"operator": "depth", "amount": 1}, "lacks at: .* Expected for example"),
        ({"amount": 1}, "lacks at and operator"),
        ({"at": 5, "operator": "depth", "amout": 1}, "ScheduledGrowth has no setting 'amout'.*Did you mean 'amount'"),
    ],
)
def test_events_are_checked(event, message):
    with pytest.raises(ConfigError, match=message):
        GrowthConfig.from_dict({"schedule": [event]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cooldown": 3}, "GrowthConfig has no setting 'cooldown'.*Did you mean 'cooldown_steps'"),
        ({"zzz": 3}, r"has no setting 'zzz'. Expected one of begin_blocks, schedule, .*tolerance\. Use one of"),
        ({3: 3}, "has no setting 3"),
        ({"schedule": "depth"}, "schedule is 'depth'. Expected a list of events such as"),
        ({"schedule": [3]}, r"schedule is \(3,\)"),
        ({"operators": ["width"]}, r"operators is \('width',\). Expected a list of some of depth, feed_forward"),
        ({"operators": "depth"}, "operators is 'depth'. Expected a list"),
        ({"operators": ["depth", "depth"]}, "operators is .* each once"),
        ({"triggers": [["plateau"]]}, "triggers is .* some of plateau, uncertainty"),
        ({"needed": 0}, "needed is 0. Expected a whole number of 1 or more"),
        ({"needed": 1.0}, "needed is 1.0. Expected a whole number"),
        ({"operators": ["depth"], "needed": 4}, "needed is 4 and triggers has 3.*never grow. Set needed to 3"),
        ({"operators": ["depth"], "triggers": []}, "triggers has 0.* Set needed to 1 or name more"),
        ({"check_every_steps": 0}, "check_every_steps is 0"),
        ({"cooldown_steps": -1}, "cooldown_steps is -1. Expected a whole number of 0 or more"),
        ({"probe_steps": True}, "probe_steps is True"),
        ({"distill_steps": None}, "distill_steps is None. Expected a whole number"),
        ({"patience": 0}, "patience is 0"),
        ({"hysteresis": 0}, "hysteresis is 0. Expected a number above 0, at most 1"),
        ({"hysteresis": 1.1}, "hysteresis is 1.1"),
        ({"saturation_threshold": 90}, "saturation_threshold is 90. Expected a number above 0, at most 1"),
        ({"uncertainty_threshold": float("nan")}, "uncertainty_threshold is nan"),
        ({"dead_share": -0.1}, "dead_share is -0.1. Expected a number of 0 or more, at most 1"),
        ({"improvement": "0.1"}, "improvement is '0.1'. Expected a number"),
        ({"benefit_threshold": 0}, r"benefit_threshold is 0. Expected a number above 0\.$"),
        ({"amount_share": float("inf")}, "amount_share is inf"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"max_parameters": 0}, "max_parameters is 0. Expected a whole number of 1 or more or None"),
        ({"max_events": 1.5}, "max_events is 1.5. Expected a whole number or None"),
        ({"max_memory_gb": 0}, "max_memory_gb is 0. Expected a number above 0 or None"),
        ({"max_flops_share": 0.9}, "max_flops_share is 0.9. Expected a number of 1 or more or None"),
        ({"new_second_moment": "man"}, "new_second_moment is 'man'. Expected one of zero, mean. Did you mean 'mean'"),
        ({"on_refusal": []}, r"on_refusal is \[\]. Expected one of continue, stop"),
        ({"approximate": 1}, "approximate is 1. Expected true or false"),
        ({"strategy": "entropy"}, "strategy is 'entropy'. Expected 'uncertainty', .* Name what to watch with triggers"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        GrowthConfig.from_dict(settings)


def test_settings_must_have_names():
    with pytest.raises(ConfigError, match=r"The settings of growth are \[1\]. Expected names and values"):
        GrowthConfig.from_dict([1])


def test_the_early_form_is_read_with_a_warning():
    with pytest.warns(UserWarning, match="only near random guessing") as caught:
        config = GrowthConfig.from_dict({"threshold": 0.8, "strategy": "uncertainty"})
    assert caught[0].filename == __file__
    assert config == GrowthConfig(operators=("depth",), triggers=("uncertainty",), needed=1, uncertainty_threshold=0.8)
    with pytest.warns(UserWarning, match="threshold=0.85"):
        config = GrowthConfig.from_dict({"strategy": "uncertainty", "operators": ["feed_forward"], "max_events": 2})
    assert config.operators == ("feed_forward",) and config.max_events == 2
    with (
        pytest.warns(UserWarning, match="threshold=85"),
        pytest.raises(ConfigError, match="uncertainty_threshold is 85"),
    ):
        GrowthConfig.from_dict({"threshold": 85})


def test_the_usual_form_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GrowthConfig.from_dict({"operators": ["depth"], "triggers": list(TRIGGERS)})
