import json

import pytest
import torch

import utils
from utils.growth.edits import LineageError
from utils.growth.growing import grow
from utils.growth.lineage import LINEAGE, GrowthEvent, lineage_of, read_lineage, rebuild, remember, save_lineage

GPT = {"vocab_size": 60, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 2}


def model():
    torch.manual_seed(0)
    return utils.load_model("example:gpt", config=GPT).module


@pytest.fixture
def grown():
    module = model()
    grow(module, "depth", 1, where=0)
    grow(module, "feed_forward", 8, where=1)
    grow(module, "channels", 4)
    return module


def test_a_model_is_built_again_from_its_source_and_lineage(grown, tmp_path):
    save_lineage(tmp_path, lineage_of(grown))
    events = read_lineage(tmp_path)
    assert [event.plan.operator for event in events] == ["depth", "feed_forward", "channels"]
    assert [event.plan for event in events] == [event.plan for event in lineage_of(grown)]
    again = model()
    rebuild(again, events)
    again.load_state_dict(grown.state_dict())
    tokens = torch.randint(0, 60, (2, 9))
    assert torch.equal(again.eval()(tokens), grown.eval()(tokens))
    assert lineage_of(again) == tuple(events)


def test_a_model_that_came_part_of_the_way_goes_on_from_there(grown):
    events = lineage_of(grown)
    again = model()
    rebuild(again, events[:1])
    rebuild(again, events)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in grown.named_parameters()}


def test_another_model_is_refused(grown):
    other = utils.load_model("example:gpt", config={**GPT, "d_model": 32}).module
    with pytest.raises(LineageError, match=r"begins with 8,2\d\d parameters|begins with .* parameters"):
        rebuild(other, lineage_of(grown))
    with pytest.raises(LineageError, match="3 growth events behind it; the lineage has 1"):
        rebuild(grown, lineage_of(grown)[1:2])


def test_an_event_that_does_not_fit_is_named(grown):
    events = list(lineage_of(grown))
    text = json.dumps(events[1].to_dict()).replace("blocks.1.mlp.0.weight", "blocks.7.mlp.0.weight")
    broken = GrowthEvent.from_dict(json.loads(text))
    with pytest.raises(LineageError, match=r"Event 2 of the lineage \(step 1\) cannot be repeated"):
        rebuild(model(), [events[0], broken])
    counted = GrowthEvent.from_dict({**events[0].to_dict(), "parameters_after": 5})
    with pytest.raises(LineageError, match="Expected 5, as it did the first time"):
        rebuild(model(), [counted])


def test_what_is_no_lineage_is_said(tmp_path, grown):
    assert read_lineage(tmp_path) == []
    (tmp_path / LINEAGE).write_text("{")
    with pytest.raises(LineageError, match="cannot be read"):
        read_lineage(tmp_path)
    good = lineage_of(grown)[0].to_dict()
    with pytest.raises(LineageError, match="KeyError"):
        GrowthEvent.from_dict({name: value for name, value in good.items() if name != "plan"})
    with pytest.raises(LineageError, match="growth step of the kind 'shrink'"):
        GrowthEvent.from_dict({**good, "plan": {**good["plan"], "edits": [{"kind": "shrink"}]}})
    with pytest.raises(LineageError, match="TypeError"):
        GrowthEvent.from_dict({**good, "plan": {**good["plan"], "edits": [{"kind": "scale", "colour": 1}]}})


def test_an_event_says_itself_in_one_line(grown):
    said = lineage_of(grown)[0].describe()
    assert said.startswith("step 0: depth from 2 to 3 in blocks.1 (exact; ")
    assert "kept: bit-equal" in said


def test_a_lineage_lives_as_long_as_its_model():
    module = model()
    remember(module, [])
    assert lineage_of(module) == ()
    assert lineage_of(model()) == ()
