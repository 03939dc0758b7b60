"""The checks that all settings share, and their messages."""

import json
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
import pytest

from utils.runtime.errors import ConfigError
from utils.runtime.settings import check_names, check_ranges, field_help, settings_of, shown

RANGES = {
    "steps": (1, 2**31 - 1, True, False),
    "share": (0, 1, False, True),
    "limit": (0, 1e300, False, False),
}


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    share: float
    """A share."""
    steps: int = 5
    """Steps."""
    limit: float | None = 2.0
    """A limit, or None."""

    def __post_init__(self):
        check_ranges(self, RANGES)


def test_what_is_in_range_passes():
    assert Settings(1, 2**31 - 1, None).limit is None
    assert Settings(0.5, 1, 0).limit == 0
    assert field_help(Settings) == {"share": "A share.", "steps": "Steps.", "limit": "A limit, or None."}


def test_numbers_of_numpy_become_pythons():
    for share, steps, limit in (
        (np.float32(0.5), np.int64(3), np.float64(2)),
        (np.float16(0.5), np.uint8(3), np.int8(2)),
        (Fraction(1, 2), np.int32(3), np.float32(2)),
    ):
        made = Settings(share, steps, limit)
        assert made == Settings(0.5, 3, 2) and json.loads(json.dumps(asdict(made))) == asdict(made)
        assert type(made.share) is float and type(made.steps) is int and type(made.limit) in (int, float)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "given",
    [
        (0.5, np.float64(3)),
        (0.5, np.bool_(True)),
        (0.5, np.int64(2**31)),
        (0.5, np.int8(0)),
        (0.5, np.array([3])),
        (np.float32("nan"),),
        (np.float16("inf"),),
        (np.complex64(0.5),),
        (0.5, 1, np.float32("inf")),
        (0.5, 1, Fraction(10**400)),
    ],
)
def test_numbers_of_numpy_have_the_same_ranges(given):
    with pytest.raises(ConfigError, match="Expected a .*number"):
        Settings(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0.5, 0), "Settings.steps is 0. Expected a whole number from 1. Choose one; left out it is 5."),
        ((0.5, 1.0), "Settings.steps is 1.0. Expected a whole number from 1. Choose one; left out it is 5."),
        ((0.5, True), "Settings.steps is True. Expected a whole number from 1. Choose one; left out it is 5."),
        ((0.5, None), "Settings.steps is None. Expected a whole number from 1. Choose one; left out it is 5."),
        ((0.5, 2**31), "Settings.steps is 2147483648. Expected a whole number from 1 and at most 2147483647."),
        ((0.5, 10**9999), "Settings.steps is a whole number of 33216 bits. Expected a whole number from 1 and at most"),
        ((0, 1), "Settings.share is 0. Expected a number above 0 to 1. Choose one."),
        ((float("nan"),), "Settings.share is nan. Expected a number above 0 to 1. Choose one."),
        (("a" * 100,), f"Settings.share is '{'a' * 59}.... Expected a number above 0 to 1. Choose one."),
        ((0.5, 1, -1), "Settings.limit is -1. Expected a number from 0 or None. Choose one; left out it is 2.0."),
        ((0.5, 1, float("inf")), "Settings.limit is inf. Expected a number from 0 and at most 1e+300 or None."),
    ],
)
def test_what_is_out_of_range_is_told_in_three_parts(given, message):
    with pytest.raises(ConfigError) as caught:
        Settings(*given)
    assert str(caught.value).startswith(message)
    assert caught.value.found and caught.value.expected and caught.value.action


def test_settings_are_given_as_such_as_names_or_not_at_all():
    made = Settings(0.5)
    assert settings_of(Settings, made) is made
    assert settings_of(Settings, {"share": 0.5, "steps": 3}) == Settings(0.5, 3)

    @dataclass(frozen=True)
    class Plain:
        number: int = 1

    assert settings_of(Plain, None) == settings_of(Plain, {}) == Plain()
    with pytest.raises(ConfigError, match=r"settings are of the type list.*Expected a Plain, a mapping.*Write Plain\("):
        settings_of(Plain, [1])
    with pytest.raises(ConfigError, match="Plain has no setting 'numbre'.*Did you mean 'number'"):
        settings_of(Plain, {"numbre": 1})
    with pytest.raises(ConfigError, match="has no setting 'qqq'"):
        check_names(Plain, {"qqq": 1})
    with pytest.raises(ConfigError, match="Settings needs share.*Give"):
        settings_of(Settings, {"steps": 3})


def test_values_are_shown_briefly():
    assert shown("a") == "'a'" and shown("b" * 100) == f"'{'b' * 59}..." and shown(-(2**200)).endswith("201 bits")
