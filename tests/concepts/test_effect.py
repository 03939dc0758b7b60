"""Erasing a concept inside a model, where it is known what the model reads."""

import json

import pytest
import torch
from torch import Tensor, nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.effect import erasure_effect, examine_concept
from utils.runtime.errors import ConfigError, DataError

WIDTH = 10


def reader():
    """A model whose answer reads the first number of its middle layer, and nothing else."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(WIDTH))
        model[0].bias.zero_()
        model[1].weight.zero_()
        model[1].bias.zero_()
        model[1].weight[0, 0], model[1].weight[1, 0] = -1.0, 1.0
    return ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.rand(2, WIDTH)}))


def examples(place, n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=g) + 3 * torch.eye(WIDTH)[place], torch.randn(n + 10, WIDTH, generator=g)


def test_what_the_answer_reads_is_lost_and_what_it_does_not_read_is_not():
    model = reader()
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    stream = torch.get_rng_state()
    read = erasure_effect(model, *examples(0), "0")
    assert read.before > 0.95
    assert read.after == pytest.approx(0.5, abs=0.12)
    assert read.p_value == pytest.approx(1 / 101) and read.found
    assert 0 < read.size < 1 and read.examples == 65 and read.layer == "0"
    unread = erasure_effect(model, *examples(3), "0")
    assert abs(unread.drop) < 0.1 and not unread.found
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert not model.module[0]._forward_hooks
    kept = json.loads(json.dumps(read.to_dict(), allow_nan=False))
    assert kept["found"] and len(kept["random"]) == 100
    assert "worst of 100 random directions" in str(read)


def test_a_behaviour_of_ones_own_is_given_the_samples_by_number():
    model = reader()
    positive, negative = examples(0)
    given = torch.cat([positive, negative])
    seen: list[Tensor] = []

    def balanced(logits: Tensor, numbers: Tensor) -> float:
        seen.append(numbers)
        own = given[numbers]
        if len(seen) == 1:
            with torch.no_grad():
                assert torch.allclose(logits, model.module(own), atol=1e-5)
        yes = numbers < len(positive)
        right = (logits.argmax(1) == 1) == yes
        return float(right[yes].float().mean() + right[~yes].float().mean()) / 2

    found = erasure_effect(model, positive, negative, "0", balanced, described="balanced accuracy", batch_size=8)
    assert found.behaviour == "balanced accuracy"
    assert found.before > 0.7 and found.after == pytest.approx(0.5, abs=0.12)
    assert len(seen) == 102
    assert all(torch.equal(numbers, seen[0]) for numbers in seen)
    assert len(seen[0]) == found.examples


def test_groups_stay_together():
    positive, negative = examples(0, 60)
    told = [n % 12 for n in range(60)], [100 + n % 14 for n in range(70)]
    own, seen = torch.tensor(told[0] + told[1]), []

    def behaviour(logits: Tensor, numbers: Tensor) -> float:
        seen.append(numbers)
        return float(logits.sum())

    erasure_effect(reader(), positive, negative, "0", behaviour, draws=20, groups=told)
    held = set(own[seen[0]].tolist())
    assert len(held) == 13 and all(
        set((own == name).nonzero()[:, 0].tolist()) <= set(seen[0].tolist()) for name in held
    )
    found, _ = examine_concept(reader(), positive, negative, "0", draws=20, groups=told)
    assert found.groups == (12, 14)


def test_random_labels_have_no_effect():
    model = reader()
    values = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))
    found = [erasure_effect(model, values[:200], values[200:], "0", seed=seed) for seed in range(3)]
    assert sum(effect.found for effect in found) == 0


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_answers_of_a_language_model_are_read_where_the_concept_is_erased(pool):
    torch.manual_seed(0)
    config = {"vocab_size": 60, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 1}
    model = ModelAdapter(utils.load_model("example:gpt", config=config))
    positive, negative = (torch.randint(start, start + 20, (60, 6)) for start in (1, 30))
    found = erasure_effect(model, positive, negative, pool=pool, draws=20)
    assert found.before > 0.75
    assert found.after == pytest.approx(0.5, abs=0.2)
    assert found.p_value == pytest.approx(1 / 21)


def test_examined_by_all_rules():
    model = reader()
    found, effect = examine_concept(model, *examples(0, 150), "0")
    assert found.effect == effect.p_value and found.accepted and found.layer == "0"
    # A direction as clear as the other, which the answers do not read, is refused for this reason alone.
    unread, effect = examine_concept(model, *examples(3, 150), "0", method="logistic")
    assert not unread.accepted and not effect.found and unread.method == "logistic"
    assert unread.found and unread.interval[0] > max(unread.controls) and unread.stability >= 0.8


def test_repeated_examples_count_once():
    model = reader()
    positive, negative = examples(0, 40)
    found = erasure_effect(model, positive.repeat(2, 1), negative, "0", batch_size=7)
    assert found.examples == 45
    with pytest.raises(DataError, match="8 different positive examples"):
        erasure_effect(model, positive[:8].repeat(4, 1), negative, "0")


def test_errors():
    model = reader()
    positive, negative = examples(0)
    with pytest.raises(ConfigError, match="20 at least, and 100"):
        erasure_effect(model, positive, negative, "0", draws=5)
    with pytest.raises(ConfigError, match="no layer"):
        erasure_effect(model, positive, negative, "7")
    with pytest.raises(DataError, match="2 different positive examples"):
        erasure_effect(model, positive[:2], negative, "0")
    with pytest.raises(DataError, match="measured as nan"):
        erasure_effect(model, positive, negative, "0", lambda logits, numbers: float("nan"))
    with pytest.raises(DataError, match="measured as 'much'"):
        erasure_effect(model, positive, negative, "0", lambda logits, numbers: "much")
