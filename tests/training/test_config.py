import dataclasses

import pytest

from utils.runtime.errors import ConfigError
from utils.runtime.settings import field_help
from utils.training import TrainingConfig


def test_every_field_has_a_line_of_help():
    texts = field_help(TrainingConfig)
    assert list(texts) == [field.name for field in dataclasses.fields(TrainingConfig)]
    assert all(text.strip().endswith((".", ")")) for text in texts.values())


def test_round_trip_through_a_dict():
    config = TrainingConfig(max_steps=None, max_epochs=2, batch_size=8, seed=3)
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_epochs": 1}, ["max_steps is 300", "max_epochs is 1", "exactly one"]),
        ({"max_steps": None}, ["max_steps is None", "exactly one"]),
        ({"max_steps": 0}, ["max_steps is 0", "above 0"]),
        ({"batch_size": 2.5}, ["batch_size is 2.5", "whole number"]),
        ({"batch_size": True}, ["batch_size is True", "whole number"]),
        ({"learning_rate": 1e9}, ["learning_rate", "at most 1", "1e-4 to 3e-3"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan", "above 0"]),
        ({"learning_rate": "fast"}, ["learning_rate is 'fast'", "a number"]),
        ({"warmup_share": 1.5}, ["warmup_share is 1.5", "0 to 1"]),
        ({"validation_share": 0.0}, ["validation_share is 0.0", "held-out"]),
        ({"precision": "fp8"}, ["precision is 'fp8'", "bf16-mixed"]),
        ({"devices": 0}, ["devices is 0", "above 0"]),
        ({"strategy": "fsdp"}, ["strategy is 'fsdp'", "one of auto, ddp"]),
        ({"schedule": "steps"}, ["schedule is 'steps'", "cosine, linear, wsd, constant"]),
        ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, ["warmup_share is 0.5", "decay_share is 0.6"]),
        ({"keep_best": -1}, ["keep_best is -1", "0 or more"]),
        ({"compile": "yes"}, ["compile is 'yes'", "true or false"]),
        ({"ema_decay": 1.5}, ["ema_decay is 1.5", "0 to 1"]),
        ({"growth": {"at": [10]}}, ["growth is set", "not available in this version"]),
        ({"continual": {"method": "ewc"}}, ["continual is set", "not available in this version"]),
        ({"tracking": "mlflow"}, ["tracking is 'mlflow'", "wandb, tensorboard"]),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(changes, words):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**changes)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(ConfigError, match="no setting 'learning_rat'.*Did you mean 'learning_rate'"):
        TrainingConfig.from_dict({"learning_rat": 1e-3})


def test_epochs_become_steps():
    config = TrainingConfig(max_steps=None, max_epochs=1.5, batch_size=10, accumulate=2)
    assert config.total_steps(200) == 15
    assert TrainingConfig(max_steps=7).total_steps(200) == 7


def test_a_session_must_be_longer_than_the_time_kept_for_saving():
    from utils.training.clean_stop import MARGIN_MINUTES

    assert TrainingConfig(session_limit_minutes=720).session_limit_minutes == 720
    with pytest.raises(ConfigError, match=rf"session_limit_minutes is 15.*Expected more than {MARGIN_MINUTES}"):
        TrainingConfig(session_limit_minutes=15)
