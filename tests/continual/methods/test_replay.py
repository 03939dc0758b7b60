import torch
from torch.nn.functional import cross_entropy

from tests.continual.methods.toy_streams import (
    check_equal,
    config_of,
    fresh,
    in_sessions,
    plain_loop,
    same_weights,
    train,
)
from utils.continual.extension import make_extension


def test_a_stream_with_replay_is_a_plain_loop_with_replay(tmp_path):
    run = train(fresh(), config_of("replay", label_weight=0.7), tmp_path)

    def replay(module, draw):
        old = draw("replay")
        return 0.7 * cross_entropy(module(old["pixel_values"]), old["labels"])

    check_equal(run.model, plain_loop(run, fresh(), replay))


def test_its_memory_is_a_reservoir_unless_the_settings_say_otherwise():
    assert make_extension(config_of("er")).memory.policy == "reservoir"
    assert make_extension(config_of("er", policy="balanced")).memory.policy == "balanced"


def test_a_run_that_stops_in_the_middle_of_tasks_ends_like_one_that_does_not(tmp_path):
    config = config_of("replay", accumulate=2)
    whole = train(fresh(), config, tmp_path / "whole")
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 3, 18, 27).model, whole.model)


def test_so_many_old_samples_are_replayed_as_the_settings_say(tmp_path, monkeypatch):
    counts = []
    from utils.continual.learner import Learner

    original = Learner.remembered
    monkeypatch.setattr(Learner, "remembered", lambda s, c, p="replay": counts.append(c) or original(s, c, p))
    train(fresh(), config_of("replay", replayed=3), tmp_path)
    assert set(counts) == {3}
    assert len(counts) == 39


def test_replay_holds_old_tasks_better_than_nothing(tmp_path):
    def old(method):
        run = train(fresh(), config_of(method, buffer=100), tmp_path / method)
        return make_matrix(run).average_accuracy

    assert old("replay") > old("naive") + 0.1


def make_matrix(run):
    from utils.continual.accuracy_matrix import read_matrix

    assert torch.is_grad_enabled()
    return read_matrix(run.directory)
