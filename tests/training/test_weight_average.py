import pytest
import torch
from torch import nn

import utils
from utils.training.resume import resume, train
from utils.training.state import Insertion, ModelChange, TensorChange
from utils.training.weight_average import WeightAverage


class Counting(nn.Module):
    """Weights, a running value and a count."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("running", torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(0))


def test_the_average_is_the_closed_form():
    torch.manual_seed(0)
    module, decay = Counting(), 0.9
    average = WeightAverage(module, decay)
    expected = module.weight.detach().double().clone()
    for step in range(1, 121):
        with torch.no_grad():
            module.weight.add_(torch.randn(2) * 0.1)
            module.count += 1
        average.update()
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * module.weight.detach().double()
    assert torch.allclose(average.average["weight"].double(), expected, atol=1e-6)
    assert int(average.average["count"]) == 120


def test_weights_that_stand_still_are_their_own_average():
    module = Counting()
    average = WeightAverage(module, 0.5)
    for _ in range(5):
        average.update()
    assert torch.equal(average.average["weight"], module.weight)


def test_the_average_is_in_the_model_only_inside_the_block():
    module = Counting()
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
        module.count.fill_(3)
    with pytest.raises(KeyError), average.applied():
        assert module.weight.tolist() == [1.0, -2.0]
        assert int(module.count) == 0
        raise KeyError
    assert module.weight.tolist() == [7.0, 7.0]
    assert int(module.count) == 3
    assert module.weight.requires_grad


def test_its_state_comes_back():
    module = Counting()
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
    average.update()
    other = WeightAverage(Counting(), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert torch.equal(other.average["weight"], average.average["weight"])


def test_it_follows_a_model_that_grows_and_goes_back():
    module = nn.Linear(2, 2, bias=False)
    average = WeightAverage(module, 0.9)
    average.average["weight"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    before = average.average
    module.weight = nn.Parameter(torch.full((3, 2), 7.0))
    widened = TensorChange(source="weight", insertions=(Insertion(0, ((1, 1),)),), factor=2.0)
    change = ModelChange("widen", 1, dict(module.named_parameters()), changes={"weight": widened})
    undo = average.migrate(change)
    assert average.average["weight"].tolist() == [[2.0, 4.0], [7.0, 7.0], [6.0, 8.0]]
    undo()
    assert average.average is before


def test_what_it_never_saw_begins_with_its_present_value():
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    average = WeightAverage(module, 0.9)
    module.append(nn.Linear(1, 1, bias=False))
    change = ModelChange("insert", 1, dict(module.named_parameters()), changes={"1.weight": TensorChange()})
    average.migrate(change)
    assert torch.equal(average.average["1.weight"], module[1].weight)
    assert average.average["1.weight"].data_ptr() != module[1].weight.data_ptr()


def test_the_average_is_what_is_measured_and_survives_a_stop(tmp_path, text_file, tiny_gpt, quick):
    config = quick.with_changes(ema_decay=0.9)
    whole = train(tiny_gpt, f"file:{text_file}", config, tmp_path / "whole", progress=False)
    bare = utils.load_model(tmp_path / "whole" / "model")
    plain = train(bare, f"file:{text_file}", quick, tmp_path / "plain", progress=False)
    assert whole.last("train")["loss"] == plain.last("train")["loss"], "the average does not change the training"
    assert whole.last("validation")["loss"] != plain.last("validation")["loss"]
    (tmp_path / "whole/summary.json").unlink()
    newest = tmp_path / "whole/checkpoints/step-00000024"
    (newest / "state.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="does not verify"):
        again = resume(tmp_path / "whole", progress=False)
    assert again.last("validation")["loss"] == whole.last("validation")["loss"]


def test_masks_stay_and_what_is_computed_anew_is_copied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            self.register_buffer("running", torch.zeros(2))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    module = Model()
    average = WeightAverage(module, 0.5)
    with torch.no_grad():
        module.weight += 1
        module.running += 1
        module.cache += 1
    average.update()
    share = 2 / 11
    assert average.average["weight"].tolist() == average.average["running"].tolist()
    assert average.average["weight"][0] == pytest.approx(1 - share)
    assert average.average["cache"].tolist() == [1, 1]
    assert average.average["mask"].tolist() == [0, float("-inf")]
    module.running[0] = float("nan")
    average.update()
    module.running[0] = 3.0
    average.update()
    assert average.average["running"].tolist()[0] == 3.0, "what was no number is forgotten"
    # Made, and made larger, while training; a fresh model has none of it yet.
    with average.applied():
        module.register_buffer("rope", torch.ones(3), persistent=False)
    average.update()
    module.rope = torch.ones(5)
    with average.applied():
        assert module.rope.tolist() == [1] * 5
    average.update()
    assert average.average["rope"].shape == (5,)
    fresh = Model()
    other = WeightAverage(fresh, 0.5)
    other.load_state_dict(average.state_dict())
    with other.applied():
        assert fresh.weight.tolist() == average.average["weight"].tolist()
    other.update()
    assert other.updates == average.updates + 1
