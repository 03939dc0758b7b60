from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import utils
from tests.continual.methods.toy_streams import (
    check_equal,
    config_of,
    fresh,
    in_sessions,
    plain_loop,
    same_weights,
    train,
)
from tests.training.conftest import TINY_GPT
from utils.continual.config import ContinualConfig
from utils.continual.extension import make_extension
from utils.continual.learner import LOGITS
from utils.continual.method import method_classes
from utils.continual.methods.der import DarkReplay, distance
from utils.runtime.errors import ConfigError
from utils.training import TrainingConfig
from utils.training.resume import open_run

LOWEST = torch.finfo(torch.float32).min


def test_a_stream_is_a_plain_loop_with_both_terms(tmp_path):
    run = train(fresh(), config_of("der++", logit_weight=0.3), tmp_path)

    def replay(module, draw):
        dark, old = draw("stored logits"), draw("replay")
        return (0.3 * mse_loss(module(dark["pixel_values"]), dark["logits"])
                + 0.5 * cross_entropy(module(old["pixel_values"]), old["labels"]))  # fmt: skip

    check_equal(run.model, plain_loop(run, fresh(), replay))


@pytest.mark.parametrize("name", ["der", "derpp", "der++", "DER++"])
def test_it_goes_by_all_names_of_the_field(name):
    assert method_classes(name) == [DarkReplay]
    assert make_extension(config_of(name)).memory.policy == "reservoir"


def test_it_goes_with_naive_in_no_order():
    for names in ("der+++replay", "replay+der++", "der++ + replay"):
        with pytest.raises(ConfigError, match=r"both replay the memory"):
            method_classes(names)


def test_without_labels_it_is_der_and_without_logits_replay(tmp_path):
    config = config_of("der++", logit_weight=0, label_weight=1)
    same_weights(
        train(fresh(), config, tmp_path / "one").model, train(fresh(), config_of("replay"), tmp_path / "two").model
    )
    run = train(fresh(), config_of("der++", label_weight=0), tmp_path / "der")

    def replay(module, draw):
        dark = draw("stored logits")
        return 0.5 * mse_loss(module(dark["pixel_values"]), dark["logits"])

    check_equal(run.model, plain_loop(run, fresh(), replay))
    nothing = train(fresh(), config_of("der++", label_weight=0, logit_weight=0), tmp_path / "nothing")
    same_weights(nothing.model, train(fresh(), config_of("naive"), tmp_path / "naive").model)


def test_only_what_was_answered_is_compared():
    logits = torch.randn(3, 5, requires_grad=True)
    stored = torch.randn(3, 4)
    stored[:, 1] = LOWEST
    labels = torch.zeros(3, dtype=torch.long)
    kept = [0, 2, 3]
    value = distance(logits, stored, labels)
    assert torch.allclose(value, (logits[:, kept] - stored[:, kept]).square().mean())
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.allclose(gradient[:, kept], 2 * (logits - torch.cat([stored, stored[:, :1]], 1)).detach()[:, kept] / 9)
    assert float(gradient[:, [1, 4]].abs().sum()) == 0
    assert float(distance(logits.detach(), torch.full((3, 5), LOWEST), labels)) == 0


def test_positions_that_do_not_count_are_left_out():
    logits, stored = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    rows = labels != -100
    assert torch.allclose(distance(logits, stored, labels), (logits[rows] - stored[rows]).square().mean())


def test_numbers_are_compared_too():
    logits, stored = torch.randn(4, 1), torch.randn(4, 1)
    assert torch.allclose(distance(logits, stored, torch.randn(4, 1)), mse_loss(logits, stored))


def test_tasks_with_outputs_of_their_own_compare_only_these(tmp_path):
    train(fresh(), config_of("der++", setting="task"), tmp_path)
    memory = open_run(tmp_path, model=fresh())[1]["continual"]["memory"]
    extension = make_extension(config_of("der++", setting="task"))
    extension.memory.load_state_dict(memory)
    rows = extension.memory.read(extension.memory.slots)
    assert bool(((rows[LOGITS] != LOWEST).sum(1) == 2).all())


def test_a_run_that_stops_in_the_middle_of_tasks_ends_like_one_that_does_not(tmp_path):
    config = config_of("der++", accumulate=2)
    whole = train(fresh(), config, tmp_path / "whole")
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 3, 18).model, whole.model)


def test_a_head_that_grows_in_the_stream_keeps_what_was_stored(tmp_path):
    growth = {"schedule": [{"at": 20, "operator": "classes", "amount": 3}]}
    config = config_of("der++", growth=growth)
    run = train(fresh(), config, tmp_path / "whole")
    assert run.model.head.out_features == 13
    memory = make_extension(config).memory
    memory.load_state_dict(open_run(tmp_path / "whole", model=fresh())[1]["continual"]["memory"])
    stored, about = memory.read(memory.slots)[LOGITS], memory.about()["arrivals"]
    narrow = (stored[:, 10:] == LOWEST).all(1)
    assert stored.shape[1] == 13
    # The step at which it grew had been made with the old head.
    assert torch.equal(narrow, about < 20 * 8)
    assert 0 < int(narrow.sum()) < len(narrow)
    same_weights(in_sessions(fresh(), fresh, config, tmp_path / "parts", 18, 21).model, run.model)


def learner(task="causal_lm", outputs=50_000, length=1024, tasks=3, **settings):
    data = SimpleNamespace(task=task, train={"labels": torch.zeros(2, length, dtype=torch.int16)})
    return SimpleNamespace(
        data=data, outputs=outputs, tasks=[None] * tasks, settings=ContinualConfig(**settings)
    )  # fmt: skip


def test_logits_that_are_too_large_are_refused_with_their_size():
    with pytest.raises(ConfigError, match=r"take 204.8 MB, those of .*buffer=500 samples 102,400 MB.*1,000 MB"):
        DarkReplay().check(learner())
    with pytest.raises(ConfigError, match=r"take 204.8 MB, and ContinualConfig.buffer_mb is 500.*each of the 3 tasks"):
        DarkReplay().check(learner(buffer_mb=500))
    DarkReplay().check(learner(buffer_mb=700))
    DarkReplay().check(learner(outputs=100, length=32))


def test_hidden_words_are_refused():
    with pytest.raises(ConfigError, match="guesses hidden words.*replay or consolidation"):
        DarkReplay().check(learner(task="masked_lm"))


def test_a_language_model_keeps_the_logits_of_every_token(tmp_path, text_file):
    halves = [tmp_path / "a.txt", tmp_path / "b.txt"]
    text = text_file.read_text(encoding="utf-8")
    for half, part in zip(halves, (text[:20_000], text[20_000:40_000]), strict=True):
        half.write_text(part, encoding="utf-8")
    continual = {"method": "der++", "split": "parts", "setting": "domain", "buffer": 8}
    config = TrainingConfig(max_steps=12, batch_size=4, continual=continual)
    model = utils.load_model("example:gpt", config=TINY_GPT)
    run = utils.train(model, [f"file:{half}" for half in halves], config, tmp_path / "run", progress=False)
    assert run.finished
    memory = make_extension(config).memory
    state = open_run(tmp_path / "run")[1]["continual"]["memory"]
    memory.source = state["source"]
    memory.load_state_dict(state)
    assert tuple(memory.layouts[LOGITS].shape) == (32, 300)
