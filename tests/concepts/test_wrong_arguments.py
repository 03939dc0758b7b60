"""What a user gives by mistake is told: what was found, what was expected, what to do."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.concepts.transfer_toys import samples, student, teacher
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.activations import counted_positions
from utils.concepts.autoencoder import AutoencoderConfig, fit_autoencoder
from utils.concepts.autoencoder_files import load_autoencoder, save_autoencoder
from utils.concepts.class_concepts import concept_readings, concept_samples
from utils.concepts.concept_view import feature_figure, transfer_html
from utils.concepts.content import read_content
from utils.concepts.direction import concept_direction, find_direction
from utils.concepts.effect import erasure_effect, examine_concept
from utils.concepts.erasure import fit_eraser
from utils.concepts.examples import example_batches, read_sides
from utils.concepts.extraction import extract_concept
from utils.concepts.features import fit_layer_autoencoder, layer_features, strongest_features
from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_parts import Relation
from utils.concepts.package import PackageError
from utils.concepts.package_files import MANIFEST, load_package, package_sha256, save_package
from utils.concepts.patching import pooled_answers
from utils.concepts.recovery import recovery
from utils.concepts.similarity import model_similarity, similarity
from utils.concepts.transfer import transfer_concept
from utils.concepts.transfer_config import TransferConfig
from utils.runtime.errors import AdapterError, CheckpointError, ConfigError, DataError, SeedbedError
from utils.training.prepared_data import PreparedData

WIDTH = 6
CONFIG = AutoencoderConfig(features=8, active=2, steps=2)


def drawn(n=60, seed=0):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    spec = ModelSpec(task="tabular_classification", example_inputs={"input": torch.rand(2, WIDTH)})
    return ModelAdapter(module, spec=spec)


@pytest.fixture(scope="module")
def fit(model):
    return fit_layer_autoencoder(model, drawn(), "0", CONFIG)


@pytest.fixture(scope="module")
def package():
    return extract_concept(teacher(), "one sign", *samples(80))


def refused(error, message, call):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call()
    assert caught.value.found and caught.value.expected and caught.value.action


def test_tables_of_vectors(fit):
    eraser = fit_eraser(drawn(), torch.arange(60) % 2)
    direction = concept_direction(drawn(30) + 2, drawn(30, 1))
    made = fit.autoencoder
    for read in (eraser.apply, eraser.change, direction.score, made.encode, made):
        refused(
            ConfigError, "The values are of the type list.*Convert a list with torch.tensor", lambda r=read: r([[1.0]])
        )
        refused(ConfigError, r"The values are None", lambda r=read: r(None))
        refused(ConfigError, rf"the shape \(3, 5\).* the width {WIDTH}.*Take them", lambda r=read: r(torch.rand(3, 5)))
        refused(ConfigError, "the shape", lambda r=read: r(torch.tensor(1.0)))
        refused(
            ConfigError, r"of the type int64.*values\.float", lambda r=read: r(torch.ones(3, WIDTH, dtype=torch.long))
        )
    refused(ConfigError, "the decoder is for the width 8", lambda: made.decode(torch.rand(2, WIDTH)))
    refused(ConfigError, "of the type list", lambda: made.decode([[0.0] * 8]))
    assert eraser.apply(torch.rand(2, 3, WIDTH)).shape == (2, 3, WIDTH)


def test_numpy_arrays_are_taken_like_tensors(model, fit):
    rows, labels = drawn(), torch.arange(60) % 2
    array = rows.numpy()
    eraser = fit_eraser(array, labels.numpy())
    assert torch.equal(eraser.apply(array), fit_eraser(rows, labels).apply(rows))
    found = concept_direction(array[:30] + 2, array[30:])
    assert found.to_dict() == concept_direction(rows[:30] + 2, rows[30:]).to_dict()
    assert torch.equal(fit.autoencoder.encode(array), fit.autoencoder.encode(rows))
    assert fit_autoencoder(array, CONFIG).to_dict() == fit_autoencoder(rows, CONFIG).to_dict()
    assert similarity(array, array[::-1]).score == similarity(rows, rows.flip(0)).score
    # NumPy's own default is float64, and models are of float32.
    for given in (array, array.astype(np.float64), {"input": array.astype(">f8")}, [{"input": array}]):
        assert read_content(given).hashes() == read_content(rows).hashes()
        assert torch.equal(example_batches(model, given).batches[0]["input"], rows[:64])
    assert read_content(np.array(["one", "two"])).texts == ("one", "two")
    refused(DataError, "a list of 2 tensors", lambda: read_content([array, array]))
    refused(DataError, "is a NumPy array of complex128.*np.stack", lambda: read_content(np.array([1j])))
    layers = {"layers": ["0"], "second_layers": ["0"]}
    assert model_similarity(model, model, array, **layers)[0][0].score == pytest.approx(1)
    assert recovery(model, fit, array, labels.numpy()).loss > 0
    feature_figure(strongest_features(fit, array), np.random.default_rng(0).random((60, 4, 4)))


def test_settings_objects(model):
    made = fit_autoencoder(drawn(), {"features": 8, "active": 2, "steps": 2})
    assert made.config == CONFIG
    assert fit_layer_autoencoder(model, drawn(), "0", CONFIG.to_dict()).config == CONFIG
    refused(ConfigError, "settings are of the type int.*AutoencoderConfig.*Write", lambda: fit_autoencoder(drawn(), 5))
    refused(ConfigError, "settings are of the type str", lambda: fit_layer_autoencoder(model, drawn(), "0", "fast"))
    for settings, message in (
        ({"active": 0}, "active is 0. Expected a whole number from 1. Choose one; left out it is 8"),
        ({"features": 2.0}, "features is 2.0. Expected a whole number from 1 or None"),
        ({"held_out": 1}, "held_out is 1. Expected a number above 0 to 0.9. Choose one; left out it is 0.1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"steps": 10**12}, "steps is 1000000000000. Expected a whole number from 1 and at most"),
    ):
        refused(ConfigError, message, lambda s=settings: AutoencoderConfig(**s))
    refused(ConfigError, "TransferConfig.steps is -1.*left out it is [0-9]+", lambda: TransferConfig(steps=-1))
    assert TransferConfig(budget=None, channels=None).budget is None


def test_features(model, fit):
    for settings, message in (
        ({"count": -1}, "count is -1.*at least 1. Write for example count=1"),
        ({"count": "a"}, "count is 'a'"),
        ({"top": 0}, "top is 0"),
        ({"numbers": ["a"]}, "There is no feature 'a'.*whole numbers from 0 to 7"),
        ({"numbers": 9}, "There is no feature 9"),
        ({"numbers": [True]}, "There is no feature True"),
    ):
        refused(ConfigError, message, lambda s=settings: layer_features(model, fit, drawn(), **s))
    assert len(layer_features(model, fit, drawn(), numbers=3).features) == 1
    assert len(layer_features(model, fit, drawn(), count=np.int64(2), numbers=np.arange(2)).features) == 2
    for call in (lambda: layer_features(model, None, drawn()), lambda: recovery(model, None, drawn()),
                 lambda: strongest_features(None, drawn())):  # fmt: skip
        refused(ConfigError, "The autoencoder is None. Expected an AutoencoderFit. Give what", call)
    refused(DataError, "samples a list", lambda: strongest_features(fit, drawn(), [1]))
    refused(DataError, "the labels are a list", lambda: recovery(model, fit, drawn(), [1]))
    refused(DataError, "A label is -5", lambda: recovery(model, fit, drawn(), torch.full((60,), -5)))
    view = strongest_features(fit, drawn())
    refused(ConfigError, "The images are a NoneType", lambda: feature_figure(view, None))


def test_repeated_examples_are_no_new_ones(model):
    """One sample shown again and again is told from memory, whatever is measured on it."""
    torch.manual_seed(0)
    spec = ModelSpec(task="image_classification", example_inputs={"input": torch.rand(2, 1, 9, 9)})
    module = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    images = torch.rand(1, 1, 9, 9).repeat(40, 1, 1, 1)
    adapter = ModelAdapter(module, spec=spec)
    refused(
        DataError,
        "All vectors are of one sample, given once or repeated.*two different samples.*Give more",
        lambda: fit_layer_autoencoder(adapter, images, "0", CONFIG, batch_size=7),
    )
    refused(
        DataError,
        "There are 3 vectors different among 60.*50 different ones",
        lambda: fit_autoencoder(drawn()[:3].repeat(20, 1), CONFIG),
    )
    # Of samples that are there twice, none is trained on and held out.
    twice = fit_layer_autoencoder(model, drawn(50).repeat(2, 1), "0", CONFIG)
    assert sum(twice.vectors) == 100 and twice.vectors[1] % 2 == 0
    assert sum(fit_autoencoder(drawn(50).repeat(2, 1), CONFIG).vectors) == 100


def test_groups(model):
    rows = drawn(60)
    for groups, message in (
        (5, "groups are of the type int and not a pair.*Write groups="),
        (([1], [2]), "There are 1 groups for 30"),
        ((5, [1] * 30), "The groups of 30 .* are 5."),
        (({1}, [1] * 30), "are of the type set"),
        ((torch.zeros(30, 2), [1] * 30), r"are a tensor of the type float32 and the shape \[30, 2\]"),
    ):
        refused(DataError, message, lambda g=groups: extract_concept(model, "x", rows[:30], rows[30:], groups=g))
        refused(DataError, message, lambda g=groups: concept_direction(rows[:30], rows[30:], groups=g))
    numbers = np.arange(30) % 10
    assert concept_direction(rows[:30] + 2, rows[30:], groups=(numbers, torch.arange(30))).groups == (10, 30)
    refused(DataError, "the groups are a list", lambda: fit_autoencoder(rows, CONFIG, [1] * 60))


def test_behaviours(model):
    sides = drawn(30) + 2, drawn(30, 1)
    for behaviour, message in (
        (5, "The behaviour is a int.*Expected a function of logits"),
        (lambda logits: 1.0, "does not take two arguments.*Write for example"),
        ("accuracy", "The behaviour is a str"),
    ):
        for call in (erasure_effect, examine_concept):
            refused(ConfigError, message, lambda c=call, b=behaviour: c(model, *sides, "0", b))
    refused(DataError, "measured as", lambda: erasure_effect(model, *sides, "0", lambda x, n: x, draws=20))
    refused(ConfigError, "5 random directions.*Draw more", lambda: examine_concept(model, *sides, "0", draws=5))


def test_an_examination_is_a_pair_that_shows_itself(model):
    made = examine_concept(model, drawn(30) + 2, drawn(30, 1), "0", draws=20)
    direction, effect = made
    assert made.direction is direction and made.effect is effect and direction.effect == effect.p_value
    assert made._repr_html_().count("<picture>") == 2 and "random directions costs" in str(made)
    assert json.dumps(made.to_dict())


def test_names_and_counts_of_extraction(model):
    rows = drawn(60)
    for settings, message in (
        ({"name": None}, "The name is None. Expected a text of 1 to 200 characters. Write one, such as name="),
        ({"name": "x" * 201}, "The name is 'xxx"),
        ({"licence": 3}, "The licence is 3"),
        ({"anchors": 1.5}, "anchors is 1.5"),
        ({"traces": True}, "traces is True"),
        ({"method": None}, "The method is None"),
    ):
        given = {"name": "x", **settings}
        refused(ConfigError, message, lambda g=given: extract_concept(model, g.pop("name"), rows[:30], rows[30:], **g))


def test_choices_and_kinds(model, fit):
    rows = drawn(60)
    strange = np.arange(3)
    for name in ("pool", "side", "method"):
        for call in (find_direction, examine_concept):
            message = f"The {name} is a NumPy array.*Expected one of .*Choose"
            refused(ConfigError, message, lambda c=call, n=name: c(model, rows[:30], rows[30:], "0", **{n: strange}))
        refused(
            ConfigError,
            f"The {name} is 'x'.*Choose",
            lambda n=name: extract_concept(model, "x", rows[:30], rows[30:], **{n: "x"}),
        )
    refused(ConfigError, "The measure is None", lambda: model_similarity(model, model, rows, measure=None))
    refused(ConfigError, "The pool is 3", lambda: model_similarity(model, model, rows, pool=3))
    refused(ConfigError, "The side is 'left'", lambda: fit_layer_autoencoder(model, rows, "0", CONFIG, side="left"))
    refused(ConfigError, "The tokenizer is 5, without `encode`", lambda: example_batches(model, ["a"], tokenizer=5))
    refused(
        ConfigError,
        "The tokenizer is 'bert', without `encode`",
        lambda: find_direction(model, ["a"], ["b"], "0", tokenizer="bert"),
    )
    single = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
    refused(DataError, "does not encode 1 texts at once", lambda: example_batches(model, ["a"], tokenizer=single))
    sparse = "a tensor of the type float32, sparse_coo.*to_dense"
    refused(DataError, sparse, lambda: find_direction(model, rows.to_sparse(), rows, "0"))
    refused(DataError, sparse, lambda: read_content({"input": rows.to_sparse()}))
    refused(AdapterError, "does not run on a batch of input .2, 4.", lambda: recovery(model, fit, torch.rand(9, 4)))
    refused(DataError, "the labels are a Tensor|of the shape", lambda: fit_eraser(rows, torch.ones(60).to_sparse()))


def test_a_mask_on_one_side_alone(model):
    ids, mask = drawn(20), torch.ones(20, WIDTH)
    masked = {"input": ids, "attention_mask": mask}
    refused(
        DataError,
        "positive examples have the inputs input, attention_mask and the negative ones input.*on both sides or on nei",
        lambda: read_sides(model, masked, drawn(20, 1), "0"),
    )
    refused(DataError, "Some examples are", lambda: extract_concept(model, "x", masked, drawn(20, 1)))
    refused(
        ConfigError,
        "Some examples have the inputs input, attention_mask and others input",
        lambda: example_batches(model, [masked, {"input": ids}]),
    )


class Halving(nn.Module):
    """Makes one position of two, so that the mask of its input fits nothing that it makes."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, WIDTH), nn.Linear(2 * WIDTH, 5)

    def forward(self, input_ids, attention_mask=None):
        state = self.embed(input_ids)
        return self.out(state.reshape(len(state), -1, 2 * WIDTH))


def test_a_mask_that_does_not_fit_is_refused_where_it_hides_something():
    adapter = ModelAdapter(Halving(), spec=ModelSpec(task="text_classification"))
    ids, mask = torch.randint(0, 11, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": mask}
    whole = pooled_answers(adapter, given)
    assert torch.allclose(whole, adapter.module(ids).mean(1), atol=1e-5)
    hidden = {"input_ids": ids, "attention_mask": mask.triu(-1)}
    refused(DataError, r"does not fit 3 x 4 positions.*Name a layer", lambda: pooled_answers(adapter, hidden))
    assert counted_positions(hidden, torch.zeros(3, 8, 2), "x").sum() == mask.triu(-1).sum()
    # Which position sees which is no statement about padding.
    pattern = {"input_ids": ids, "attention_mask": torch.ones(3, 8, 8).tril()}
    assert counted_positions(pattern, torch.zeros(3, 4, 2), "x").all()
    padding = {"input_ids": ids, "padding_mask": mask == 0}
    assert counted_positions(padding, torch.zeros(3, 4, 2), "x").all()
    refused(
        DataError, "`padding_mask` of shape", lambda: counted_positions({**padding, "padding_mask": mask == 1},
                                                                         torch.zeros(3, 4, 2), "x")
    )  # fmt: skip


def test_relations_of_bad_shapes():
    for given, message in (
        (5, "The relations are 5.*Expected a list of sentences.*Write for example"),
        (None, "The relations are None"),
        ("abc", "The relations are 'abc'"),
        ({"a": 1}, "The relations are {'a': 1}"),
        (["abc"], "'abc' is no relation.*Three names"),
        ([("a", "b")], r"\('a', 'b'\) is no relation"),
        ([("a", "requires", ["b"])], "The name of a concept is a list"),
        ([("a", "knows", "b")], "There is no relation 'knows'"),
        ([Relation("a", "requires", 3)], "The name of a concept is a int"),
    ):
        refused(HierarchyError, message, lambda g=given: ConceptHierarchy.from_relations(g))
        refused(HierarchyError, message, lambda g=given: ConceptHierarchy.from_relations([]).relate_all(g))
    made = ConceptHierarchy.from_relations([Relation("poodle", "is-a", "dog"), ["dog", "is-a", "animal"]])
    assert len(made) == 3
    refused(HierarchyError, "names of concepts are 5", lambda: made.learning_order(goals=5))
    refused(HierarchyError, "names of concepts are None", lambda: made.restricted(None))
    refused(HierarchyError, "no list of concepts", lambda: ConceptHierarchy.from_dict(None))


def test_lists_of_layers_and_samples(model):
    refused(ConfigError, "The layers are 5.*a list of names", lambda: model_similarity(model, model, drawn(), layers=5))
    refused(
        ConfigError, r"The second_layers are \[\]", lambda: model_similarity(model, model, drawn(), second_layers=[])
    )
    refused(ConfigError, "The data is None.*PreparedData", lambda: concept_samples(None, {"x": [0]}))
    part = {"input": drawn(8), "labels": torch.arange(8) % 4}
    data = PreparedData("test:x", "tabular_classification", part, part)
    refused(ConfigError, "The concepts are 5.*Write for example", lambda: concept_samples(data, 5))
    refused(ConfigError, "The concepts are {}", lambda: concept_samples(data, {}))
    refused(ConfigError, r"'x' has the classes \['a'\]", lambda: concept_samples(data, {"x": ["a"]}))
    refused(ConfigError, "'x' has the classes 3", lambda: concept_samples(data, {"x": 3}))
    refused(ConfigError, "parts is 1.5", lambda: concept_samples(data, {"x": [0]}, parts=1.5))
    refused(ConfigError, "The samples argument is None", lambda: concept_readings(model, None))


def test_paths(fit, package, tmp_path):
    below = tmp_path / "file" / "folder"
    (tmp_path / "file").write_text("mine")
    for error, save, thing, name in (
        (PackageError, save_package, package, "concept package"),
        (CheckpointError, save_autoencoder, fit, "autoencoder"),
    ):  # fmt: skip
        refused(error, f"The {name} cannot be saved as .*not below a file.*Choose", lambda s=save, t=thing: s(t, below))
        for path in (None, 5, "", "a\0b"):
            refused(error, f"The path of the {name} is .*Give one", lambda s=save, t=thing, p=path: s(t, p))
    refused(PackageError, "The package is None.*extract_concept", lambda: save_package(None, tmp_path / "x"))
    refused(ConfigError, "The autoencoder is of the type str|is 'a'", lambda: save_autoencoder("a", tmp_path / "x"))
    for error, load in (
        (PackageError, load_package),
        (PackageError, package_sha256),
        (CheckpointError, load_autoencoder),
    ):
        refused(error, "is None. Expected a path", lambda f=load: f(None))
    assert not (tmp_path / "x").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_package_of_something_else_stays(package, tmp_path):
    folder = save_package(package, tmp_path / "kept")
    assert save_package(package.shuffled(0), folder) == folder, "the same concept of the same teacher"
    other = extract_concept(teacher(), "another", *samples(80))
    refused(
        PackageError, "holds the package of the concept 'one sign' of a Teacher.*another folder, or write replace=True",
        lambda: save_package(other, folder),
    )  # fmt: skip
    retrained = extract_concept(student(), "one sign", *samples(80))
    refused(PackageError, "and this one is of 'one sign' of a ", lambda: save_package(retrained, folder))
    assert load_package(folder).name == "one sign"
    assert load_package(save_package(other, folder, replace=True)).name == "another"
    (folder / MANIFEST).write_text("{")
    refused(PackageError, "cannot be told apart.*damaged.*replace=True", lambda: save_package(other, folder))
    assert load_package(save_package(other, folder, replace=True)).name == "another"
    deep = '{"format": 2, "sha256": "", "x": ' + "[" * 992 + "]" * 992 + "}"
    for text in ("[" * 100_000, deep):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(SeedbedError):
            load_package(folder)


def test_results_show_themselves(model, package):
    html = package._repr_html_()
    assert "<table" in html and "one sign" in html and "held-out AUROC" in html
    readout = package.readout(teacher())
    assert "<table" in readout._repr_html_() and "Reads a concept off the input of `head`" in str(readout)
    made = transfer_concept(package, student(), TransferConfig(steps=2))
    assert "answers of its own that changed" in transfer_html(made) and "loss, concept" in transfer_html(made)
    eraser = fit_eraser(drawn(), torch.arange(60) % 2)
    assert "<table" in eraser._repr_html_() and repr(eraser) == f"Eraser of 1 of {WIDTH} dimensions"
    table = model_similarity(model, model, drawn(), layers=["0", "1"], second_layers=["0", "2"])
    assert "<table" in table._repr_html_() and "<th" in table._repr_html_() and isinstance(table, list)
    assert "0: 0 1.000*, 2 " in str(table) and json.dumps(table.to_dict())
    same = model_similarity(model, model, drawn(), second_layers=["2", "2"])
    assert "1: 2 " in str(same) and "2: 2 " in str(same) and "no similarities" in str(type(same)())
