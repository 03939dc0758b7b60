"""Signals that fire when they should, an arbiter that waits, and states that repeat every decision."""

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.growth.benefit import LayerBenefit
from utils.growth.capacity import LayerCapacity
from utils.growth.config import GrowthConfig
from utils.growth.triggers import (
    Arbiter,
    Benefit,
    Observation,
    Plateau,
    Saturation,
    Signal,
    Uncertainty,
    make_triggers,
    predictive_entropy,
)


def fed(trigger, losses, rate=1.0):
    for step, loss in enumerate(losses):
        trigger.observe(Observation(step, loss=loss, rate_share=rate))
    return trigger.fires()


def test_a_plateau_needs_its_windows():
    plateau = Plateau(window=2, patience=2, improvement=0.01)
    assert fed(plateau, [4.0, 2.0]).why == "0 of 2 windows of 2 losses were judged"
    assert fed(plateau, [3.0, 3.0]).value is None
    signal = fed(plateau, [3.0, 3.0])
    assert (signal.fired, signal.value, signal.pressure) == (True, 0.0, 1e6)
    assert "improved the loss by 0.00%" in signal.why
    signal = fed(plateau, [2.7, 2.7])
    assert (signal.fired, signal.value) == (False, pytest.approx(0.1))
    assert signal.pressure == pytest.approx(0.1)
    assert not fed(plateau, [2.8, 2.8]).fired, "one of the last two windows improved"
    assert fed(plateau, [2.69, 2.69]).fired, "0.4 % better than the best, below 1 %"


def test_a_falling_loss_is_no_plateau_and_a_noisy_flat_one_is():
    noise = random.Random(0)
    falling = [3 * 0.9995**step + noise.gauss(0, 0.02) for step in range(600)]
    assert not fed(Plateau(), falling).fired
    assert fed(Plateau(), [2 + noise.gauss(0, 0.02) for _ in range(600)]).fired


def test_a_decayed_rate_does_not_look_like_a_plateau():
    """At a tenth of the rate a loss that falls a tenth as fast goes on as before."""
    slow = [3 * 0.9999 ** (step * 0.5) for step in range(400)]
    assert fed(Plateau(improvement=0.005), slow, rate=1.0).fired
    assert not fed(Plateau(improvement=0.005), slow, rate=0.1).fired
    nearly_off = Plateau()
    assert fed(nearly_off, [3.0] * 600, rate=0.04).value is None


def test_a_plateau_after_growth_is_judged_anew():
    plateau = Plateau(window=1, patience=2)
    assert fed(plateau, [3.0] * 4).fired
    plateau.reset()
    assert plateau.fires().value is None and plateau.best == 3.0
    assert not fed(plateau, [2.9, 2.8]).fired


def test_losses_that_are_missing_or_not_finite_do_not_count():
    plateau = Plateau(window=1, patience=1)
    assert not fed(plateau, [math.nan, math.inf, None]).fired
    assert plateau.best is None


def test_uncertainty_is_the_mean_of_three_measurements():
    trigger = Uncertainty(0.85)
    assert "no entropy was measured" in trigger.fires().why
    for entropy in (0.9, None, 0.8):
        trigger.observe(Observation(0, entropy=entropy))
    assert trigger.fires().why == "2 of 3 measurements"
    trigger.observe(Observation(0, entropy=0.88))
    signal = trigger.fires()
    assert signal.fired and signal.value == pytest.approx(0.86) and signal.pressure == pytest.approx(0.86 / 0.85)
    trigger.observe(Observation(0, entropy=0.5))
    assert not trigger.fires().fired
    assert "it fires from 0.85 on" in trigger.fires().why


def test_entropy_of_predictions():
    assert predictive_entropy("causal_lm", torch.zeros(2, 3, 7), torch.zeros(2, 3).long()) == pytest.approx(1)
    certain = torch.tensor([[[50.0, 0.0], [0.0, 0.0]]])
    assert predictive_entropy("causal_lm", certain, torch.tensor([[0, -100]])) == pytest.approx(0, abs=1e-9)
    assert predictive_entropy("causal_lm", certain, torch.tensor([[0, 1]])) == pytest.approx(0.5)
    assert predictive_entropy("causal_lm", certain, torch.tensor([[-100, -100]])) is None
    assert predictive_entropy("regression", torch.zeros(2, 1), torch.zeros(2, 1)) is None
    p = 1 / (1 + math.exp(-1.5))
    expected = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    single = predictive_entropy("text_classification", torch.full((4, 1), 1.5), torch.zeros(4).long())
    assert single == pytest.approx(expected)
    off = torch.tensor([[0.0, 0.0, -math.inf]])
    assert predictive_entropy("text_classification", off, torch.tensor([0])) == pytest.approx(math.log(2) / math.log(3))


def layer(share, where="b", width=16, dead=0.0, kind="block"):
    return LayerCapacity(where, kind, width, share * width, share, dead)


def saturated(trigger, *shares, **more):
    for share in shares:
        trigger.observe(Observation(0, capacity=[layer(share, **more)]))
    return trigger.fires()


def test_noise_at_the_start_is_no_saturation():
    trigger = Saturation(0.75)
    assert "none was found, or none yet" in trigger.fires().why
    signal = saturated(trigger, 0.91)
    assert (signal.fired, signal.value, signal.pressure) == (False, 0.0, 0.0)
    assert "no layer uses more of its width than in early training" in signal.why
    assert not saturated(trigger, 0.4, 0.6).fired
    signal = saturated(trigger, 0.8)
    assert signal.fired and signal.pressure == pytest.approx(0.8 / 0.75)
    assert signal.why == "the effective rank of what b returns is 80% of the width, full is 75%"


def test_a_layer_that_grew_is_calibrated_anew():
    trigger = Saturation(0.75)
    assert saturated(trigger, 0.4, 0.8).fired
    trigger.reset()
    assert trigger.fires().value is None
    assert saturated(trigger, 0.9, width=24).value == 0.0
    assert saturated(trigger, 0.5, 0.6, width=24).value == 0.6
    trigger.observe(Observation(0, capacity=[]))
    trigger.observe(Observation(0))
    assert trigger.value == 0.6


def test_a_layer_with_dead_units_has_room():
    trigger = Saturation(0.75, dead_share=0.05)
    saturated(trigger, 0.4, dead=0.1)
    assert saturated(trigger, 0.8, dead=0.14).fired
    assert not saturated(trigger, 0.8, dead=0.16).fired


def test_the_fullest_layer_is_named():
    trigger = Saturation(0.75)
    for shares in ((0.2, 0.3), (0.7, 0.9)):
        rows = [layer(shares[0]), layer(shares[1], "mlp", kind="feed_forward")]
        trigger.observe(Observation(0, capacity=rows))
    assert "the effective rank of the hidden units of mlp is 90%" in trigger.fires().why
    trigger.observe(Observation(0, capacity=[layer(math.nan), layer(0.8, "mlp", kind="feed_forward")]))
    assert trigger.value == 0.8


def test_benefit_sums_over_the_pairs():
    trigger = Benefit(1.5)
    assert "no feed-forward pair" in trigger.fires().why
    for score in (1.0, 2.0, 3.0):
        trigger.observe(Observation(0, benefit=[LayerBenefit("a", "feed_forward", score, 1.0)]))
    assert trigger.fires().value == pytest.approx(2.0) and trigger.fires().fired
    trigger.observe(Observation(0, benefit=[]))
    trigger.observe(Observation(0, benefit=[LayerBenefit("a", "feed_forward", math.nan, 1.0)]))
    assert trigger.fires().value == pytest.approx(2.0)
    trigger.reset()
    assert trigger.fires().value is None


def signal(name, pressure):
    fired = pressure is not None and pressure >= 1
    return Signal(name, fired, pressure, 1.0, pressure, f"{name} at {pressure}")


def signals(plateau=None, saturation=None, benefit=None):
    return [signal("plateau", plateau), signal("saturation", saturation), signal("benefit", benefit)]


def test_enough_triggers_must_agree():
    arbiter = Arbiter(needed=2, cooldown_steps=0)
    decision = arbiter.decide(50, signals(2.0, 0.5))
    assert not decision.grow
    assert decision.why == "1 of 3 triggers ask for growth, 2 are needed (plateau)."
    assert arbiter.decide(50, signals(2.0, 1.0)).grow
    assert "; 1 have a value so far" in arbiter.decide(50, signals(2.0)).why
    assert json.loads(json.dumps(decision.to_dict()))["signals"][0]["name"] == "plateau"


def test_growth_waits_for_the_cool_down():
    arbiter = Arbiter(needed=1, cooldown_steps=200, hysteresis=1.0)
    early = arbiter.decide(150, signals(2.0))
    assert not early.grow and "only 150 of 200 steps of cool-down have passed" in early.why
    decision = arbiter.decide(200, signals(2.0))
    assert decision.grow
    arbiter.note(decision, grew=True)
    assert (arbiter.last, arbiter.events) == (200, 1)
    arbiter.decide(250, signals(0.1))
    assert not arbiter.decide(399, signals(2.0)).grow
    assert arbiter.decide(400, signals(2.0)).grow


@pytest.mark.parametrize("grew", [True, False])
def test_a_trigger_must_be_quiet_before_it_counts_again(grew):
    arbiter = Arbiter(needed=1, cooldown_steps=0, hysteresis=0.9)
    decision = arbiter.decide(10, signals(2.0, 0.5))
    arbiter.note(decision, grew)
    assert arbiter.events == grew
    assert arbiter.disarmed == {"plateau"}
    held = arbiter.decide(20, signals(2.0))
    assert not held.grow and "plateau must be quiet once before counting again" in held.why
    for pressure in (0.95, None, 1.5):
        assert not arbiter.decide(30, signals(pressure)).grow
    assert arbiter.decide(30, signals(0.0, 1.0)).grow, "another trigger is not held"
    arbiter.decide(40, signals(0.9))
    assert arbiter.decide(50, signals(1.1)).grow


def test_a_scheduled_event_begins_the_cool_down_anew():
    arbiter = Arbiter(needed=1, cooldown_steps=10)
    assert arbiter.decide(20, signals(2.0)).grow
    arbiter.scheduled(20)
    assert not arbiter.decide(25, signals(2.0)).grow
    assert arbiter.decide(30, signals(2.0)).grow
    assert arbiter.events == 1


def test_triggers_are_made_from_the_settings():
    assert make_triggers(GrowthConfig()) == []
    config = GrowthConfig(operators=("depth",), triggers=("benefit", "plateau"), patience=5, benefit_threshold=7.0)
    benefit, plateau = make_triggers(config)
    assert (benefit.name, benefit.threshold) == ("benefit", 7.0)
    assert (plateau.name, plateau.window, plateau.patience) == ("plateau", 50, 5)
    every = GrowthConfig(operators=("depth",), triggers=("plateau", "uncertainty", "saturation", "benefit"))
    assert [trigger.name for trigger in make_triggers(every)] == list(every.triggers)


def watch():
    config = GrowthConfig(
        operators=("depth",), triggers=("plateau", "uncertainty", "saturation", "benefit"), check_every_steps=3,
        patience=2, cooldown_steps=5, improvement=0.05,
    )  # fmt: skip
    return make_triggers(config), Arbiter(2, 5, 0.9)


def live(parts, steps, seed):
    """Feed numbers that depend on the step alone, decide at every third step; return all decisions."""
    triggers, arbiter = parts
    decisions = []
    for step in steps:
        draw = random.Random(f"{seed} {step}")
        seen = Observation(step, 2 + draw.random() / 9, draw.random())
        if step % 3 == 0:
            rows = [layer(draw.random(), name, dead=draw.random() / 20) for name in "ab"]
            worth = [LayerBenefit("a", "feed_forward", 2 * draw.random(), draw.random())]
            seen = Observation(step, seen.loss, seen.rate_share, draw.random(), rows, worth)
        for trigger in triggers:
            trigger.observe(seen)
        if step % 3 == 0:
            decision = arbiter.decide(step, [trigger.fires() for trigger in triggers])
            decisions.append(decision)
            if decision.grow:
                arbiter.note(decision, grew=draw.random() < 0.5)
                for trigger in triggers:
                    trigger.reset()
    return decisions


@given(st.integers(0, 39), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_resumed_run_decides_bit_for_bit_as_the_uninterrupted_one(stop, seed):
    whole = live(watch(), range(40), seed)
    first = watch()
    before = live(first, range(stop), seed)
    states = [part.state_dict() for part in (*first[0], first[1])]
    second = watch()
    for part, state in zip((*second[0], second[1]), json.loads(json.dumps(states)), strict=True):
        part.load_state_dict(state)
        assert part.state_dict() == state
    assert before + live(second, range(stop, 40), seed) == whole
    assert any(decision.grow for decision in whole), "the schedule at least"
