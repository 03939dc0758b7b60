"""The checks that all settings share, and their messages."""

from dataclasses import dataclass

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
