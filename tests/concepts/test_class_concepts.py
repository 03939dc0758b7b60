import json

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.class_concepts import ConceptSamples, concept_readings, concept_samples, concept_task
from utils.concepts.hierarchy_discovery import discover_hierarchy
from utils.runtime.errors import ConfigError, DataError
from utils.training.prepared_data import PreparedData

CONCEPTS = {"low": [0, 1], "even": [0, 2], "zero": [0]}


def blobs(count=400, seed=0):
    """Four clouds of points, and the class of each point."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centres = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]])
    return centres[labels] + 0.7 * torch.randn(count, 2, generator=generator), labels


@pytest.fixture
def data():
    points, labels = blobs()
    split = {"train": slice(0, 200), "validation": slice(200, None)}
    parts = {name: {"features": points[part], "labels": labels[part]} for name, part in split.items()}
    facts = {
        "classes": 4,
        "class_names": list("abcd"),
        "largest_class": 0.25,
        "report": {"unit": "rows"},
        "sha256": "x",
    }
    return PreparedData("test:blobs", "text_classification", **parts, facts=facts)


@pytest.fixture
def model():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 4))
    return ModelAdapter(module, spec=ModelSpec(example_inputs={"input": torch.zeros(2, 2)}))


def test_parts_are_disjoint_and_held_out(data):
    parts = concept_samples(data, CONCEPTS, parts=3)
    rows = torch.cat([part.given for part in parts])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, data.validation["features"].tolist()))
    assert [len(part) for part in parts] == [67, 67, 66]
    again = concept_samples(data, CONCEPTS, parts=3)
    assert torch.equal(parts[0].given, again[0].given)
    assert not torch.equal(parts[0].given, concept_samples(data, CONCEPTS, parts=3, seed=1)[0].given)
    (trained,) = concept_samples(data, CONCEPTS, trained=True)
    assert sorted(trained.given.flatten().tolist()) == sorted(data.train["features"].flatten().tolist())
    assert repr(parts[0]) == "67 samples (features 2) with 3 concepts"


def test_sides_and_facts(data):
    (samples,) = concept_samples(data, CONCEPTS)
    assert torch.equal(samples.present("even"), samples.labels % 2 == 0)
    there, not_there = samples.sides("zero")
    assert torch.equal(there, samples.given[samples.labels == 0]) and len(there) + len(not_there) == len(samples)
    item = samples.items()[0]
    own = [name for name, classes in CONCEPTS.items() if item["class"] in classes]
    assert item == {"sample": 0, "class": int(samples.labels[0]), "concepts": ", ".join(own)}
    both = ConceptSamples({"a": torch.zeros(2, 1), "b": torch.ones(2, 1)}, torch.tensor([0, 1]), {"x": (0,)})
    assert set(both.given) == {"a", "b"} and both.sides("x")[0]["b"].shape == (1, 1)


def test_a_task_asks_one_question(data):
    task = concept_task(data, "even", [0, 2])
    assert torch.equal(task.train["labels"], (data.train["labels"] % 2 == 0).long())
    assert torch.equal(task.validation["features"], data.validation["features"])
    facts = {"classes": 2, "class_names": ["not even", "even"], "largest_class": 0.5, "sha256": task.fingerprint()}
    assert task.facts == facts and "even or not" in str(task)
    assert task.reference == "test:blobs, even or not" and data.train["labels"].max() == 3
    assert task.fingerprint() != data.fingerprint()


def test_readings_are_those_of_the_other_half(data, model):
    (samples,) = concept_samples(data, CONCEPTS)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    stream = torch.get_rng_state()
    readings = concept_readings(model, samples)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert readings.layer == "2" and readings.names == tuple(CONCEPTS)
    assert all(row["auroc"] > 0.99 and row["wrong"] < 0.05 for row in readings.rows())
    assert torch.equal(readings.present, readings.scores > 0)
    assert torch.equal(concept_readings(model, samples).scores, readings.scores)
    found = discover_hierarchy(readings.present, readings.names, controls=0)
    assert {(one.concept, one.parent) for one in found.evidence} == {("zero", "low"), ("zero", "even")}
    json.dumps(readings.to_dict())
    assert "zero" in str(readings) and "read wrongly" in readings._repr_html_()


def test_a_concept_that_is_not_in_the_layer_is_read_no_better_than_chance(model):
    points, labels = blobs()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    samples = ConceptSamples({"features": points}, shuffled, {"low": (0, 1)})
    (row,) = concept_readings(model, samples, "0").rows()
    assert 0.4 < row["auroc"] < 0.6


@pytest.mark.parametrize(
    ("concepts", "said"),
    [
        ({"none": []}, "'none' has no class"),
        ({"all": [0, 1, 2, 3]}, "'all' has all classes"),
        ({"strange": [0, 7]}, r"'strange' has the classes \[7\], which do not occur"),
    ],
)
def test_concepts_are_checked(data, concepts, said):
    with pytest.raises(ConfigError, match=said):
        concept_samples(data, concepts)


def test_other_errors(data, model):
    (samples,) = concept_samples(data, CONCEPTS)
    with pytest.raises(ConfigError, match="There is no concept 'evn' among 3. Near to it are: 'even'"):
        samples.sides("evn")
    with pytest.raises(ConfigError, match="parts is 0"):
        concept_samples(data, CONCEPTS, parts=0)
    with pytest.raises(DataError, match="divided into 201 parts"):
        concept_samples(data, CONCEPTS, parts=201)
    zeros, odd = (samples.labels == 0).nonzero()[:3, 0], (samples.labels % 2 == 1).nonzero()[:, 0]
    few = samples.chosen(torch.cat([zeros, odd]))
    with pytest.raises(DataError, match="'even' has 3 samples on one side"):
        concept_readings(model, few)
    numbers = {
        name: {**part, "labels": part["labels"].double()} for name, part in vars(data).items() if name == "train"
    }
    with pytest.raises(DataError, match="Expected one class per sample"):
        concept_samples(PreparedData("test:x", "regression", numbers["train"], numbers["train"]), CONCEPTS)
