import dataclasses

import pytest

from utils.runtime.errors import ConfigError
from utils.runtime.settings import field_help
from utils.training import TrainingConfig

INF = float("inf")


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
        ({"strategy": "deepspeed"}, ["strategy is 'deepspeed'", "one of auto, ddp, fsdp"]),
        ({"schedule": "steps"}, ["schedule is 'steps'", "cosine, linear, wsd, constant"]),
        ({"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, ["warmup_share is 0.5", "decay_share is 0.6"]),
        ({"keep_best": -1}, ["keep_best is -1", "0 or more"]),
        ({"compile": "yes"}, ["compile is 'yes'", "true or false"]),
        ({"ema_decay": 1.5}, ["ema_decay is 1.5", "0 to 1"]),
        ({"beta2": 1.0}, ["beta2 is 1", "below 1", "0.95 to 0.999"]),
        ({"max_steps": None, "max_epochs": INF}, ["max_epochs is inf", "at most 2,147,483,647"]),
        ({"max_steps": None, "max_epochs": 1e300}, ["max_epochs is 1e+300", "at most 2,147,483,647"]),
        ({"max_steps": 2**63}, ["max_steps is 9223372036854775808", "at most 2,147,483,647"]),
        ({"max_steps": 10**400}, ["max_steps is a number of 1329 bits", "at most 2,147,483,647"]),
        ({"batch_size": 2**31}, ["batch_size is 2147483648", "at most 2,147,483,647"]),
        ({"workers": 2000}, ["workers is 2000", "at most 1,024"]),
        ({"seed": 2**64}, ["seed is 18446744073709551616", "at most 18,446,744,073,709,551,615"]),
        ({"seed": -(2**64)}, ["seed is -18446744073709551616", "at least -9,223,372,036,854,775,808"]),
        ({"clip_norm": INF}, ["clip_norm is inf", "at most 1e+300"]),
        ({"clip_norm": 10**400}, ["clip_norm is a number of 1329 bits", "at most 1e+300"]),
        ({"checkpoint_every_minutes": INF}, ["checkpoint_every_minutes is inf", "at most 1e+300"]),
        ({"time_budget_minutes": INF}, ["time_budget_minutes is inf", "None for no limit"]),
        ({"session_limit_minutes": INF}, ["session_limit_minutes is inf", "None for no limit"]),
        ({"learning_rate": INF}, ["learning_rate is inf", "at most 1"]),
        ({"growth": "depth"}, ["growth is 'depth'", "names and values", "or None"]),
        ({"continual": "ewc"}, ["continual is 'ewc'", "names and values", "or None"]),
        ({"curriculum": "easy"}, ["curriculum is 'easy'", "names and values", "or None"]),
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
