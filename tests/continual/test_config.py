"""The settings of continual learning say what is wrong with them."""

import pytest

from utils.continual.config import ContinualConfig
from utils.runtime.errors import ConfigError


def test_settings_go_through_a_dict():
    config = ContinualConfig(method="replay", tasks=3, boundaries=False, blur=0.5)
    assert ContinualConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "color"}, r"split is 'color'.*labels, permutation, parts"),
        ({"setting": None}, "setting is None.*class, task, domain"),
        ({"policy": "newest"}, "policy is 'newest'.*balanced"),
        ({"boundaries": 1}, "boundaries is 1.*true or false"),
        ({"tasks": 0}, "tasks is 0.*whole number from 1 or None"),
        ({"tasks": 2.5}, "tasks is 2.5.*whole number"),
        ({"buffer": None}, "buffer is None.*whole number from 1"),
        ({"buffer": True}, "buffer is True"),
        ({"temperature": 0}, "temperature is 0.*above 0"),
        ({"penalty": -1.0}, "penalty is -1.0.*from 0"),
        ({"kept_share": 1.5}, "kept_share is 1.5"),
        ({"blur": 2.0, "boundaries": False}, "blur is 2.0.*a number from 0"),
        ({"blur": float("nan"), "boundaries": False}, "blur is nan"),
        ({"blur": 0.2}, "blur is 0.2 and boundaries is True.*boundaries=False.*blur=0.0"),
        ({"method": ""}, "method is ''.*joined by"),
        ({"split": "permutation"}, "permutation.*setting is 'class'.*setting='domain'"),
        ({"boundaries": False, "setting": "task"}, "boundaries is False and setting is 'task'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ContinualConfig(**settings)


def test_an_unknown_setting_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no setting 'bufer'.*Did you mean 'buffer'"):
        ContinualConfig.from_dict({"bufer": 3})
    with pytest.raises(ConfigError, match="no setting 'qqq'"):
        ContinualConfig.from_dict({"qqq": 3})
