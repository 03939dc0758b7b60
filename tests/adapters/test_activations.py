"""What a layer makes of samples, as a table of vectors."""

import pytest
import torch
from torch import Tensor, nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.activations import default_layer, layer_named, layer_names, representations
from utils.runtime.errors import AdapterError, ConfigError, DataError

TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


class Convolutions(nn.Module):
    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.shuffle = Last() if channels_last else nn.Identity()
        self.head = nn.Linear(3, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        made = self.shuffle(self.convolution(pixel_values).relu())
        return self.head(made.mean((1, 2)) if isinstance(self.shuffle, Last) else made.mean((2, 3)))


class Last(nn.Module):
    def forward(self, made: Tensor) -> Tensor:
        return made.movedim(1, -1)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def image_adapter(model: nn.Module) -> ModelAdapter:
    return ModelAdapter(
        model, spec=ModelSpec(task="image_classification", example_inputs={"pixel_values": torch.rand(2, 1, 8, 8)})
    )


def test_by_default_what_the_head_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.rand(2, 5)}))
    batches = [torch.rand(4, 5), torch.rand(3, 5)]
    found = representations(adapter, batches)
    assert (found.layer, found.side, found.pool) == ("2", "input", "mean")
    assert "output is the logits" in found.reason
    assert torch.allclose(found.values, model[:2](torch.cat(batches)), atol=1e-6)
    assert found.samples.tolist() == list(range(7))
    assert set(found.positions.tolist()) == {-1}


def test_tokens_are_pooled_over_those_that_are_real():
    torch.manual_seed(0)
    adapter = ModelAdapter(Masked())
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    table = adapter.module.table.weight.detach()
    mean = representations(adapter, [batch], "table").values
    assert torch.allclose(mean[0], table[[1, 2, 3]].mean(0), atol=1e-6)
    assert torch.allclose(mean[1], table[[4, 5, 6, 7]].mean(0), atol=1e-6)
    last = representations(adapter, [batch], "table", "last")
    assert torch.equal(last.values, table[[3, 7]])
    each = representations(adapter, [batch, batch], "table", "positions")
    assert torch.equal(each.values[:7], table[[1, 2, 3, 4, 5, 6, 7]])
    assert each.samples.tolist() == [0] * 3 + [1] * 4 + [2] * 3 + [3] * 4
    assert each.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] * 2
    assert representations(adapter, [batch], "table", "flat").values.shape == (2, 24)


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_of_an_image_are_found(channels_last):
    torch.manual_seed(0)
    model = Convolutions(channels_last)
    adapter = image_adapter(model)
    images = torch.rand(2, 1, 8, 12)
    made = model.convolution(images).relu().detach()
    found = representations(adapter, [images], "shuffle")
    assert torch.allclose(found.values, made.mean((2, 3)), atol=1e-6)
    assert f"axis {3 if channels_last else 1} holds the features" in found.reason
    stated = representations(adapter, [images], "shuffle", channels=-1 if channels_last else 1)
    assert torch.equal(stated.values, found.values)


def test_layers_that_put_positions_first():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.head = nn.Embedding(11, 4), nn.GRU(4, 5), nn.Linear(5, 11)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.table(input_ids).transpose(0, 1))[0].transpose(0, 1))

    model = Recurrent()
    ids = torch.randint(11, (3, 7))
    found = representations(ModelAdapter(model), [ids], "rnn", "last")
    expected = model.rnn(model.table(ids).transpose(0, 1))[0][-1].detach()
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert "positions come before samples" in found.reason


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)).train()
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"input": torch.rand(2, 5)}))
    before = torch.random.get_rng_state()
    first, second = (representations(adapter, [torch.ones(2, 5)]).values for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert all(module.training for module in model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model[2]._forward_pre_hooks


def test_a_language_model_has_a_vector_for_each_text():
    adapter = ModelAdapter(utils.load_model("example:gpt", config=TINY).module)
    ids = adapter.example_inputs(2)[adapter.main_input]
    found = representations(adapter, [ids])
    assert found.values.shape == (2, TINY["d_model"])
    assert found.side == "input"


def test_what_cannot_be_read():
    adapter = image_adapter(Convolutions())
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(ConfigError, match="no layer 'convolutoin'.*such as convolution"):
        representations(adapter, [images], "convolutoin")
    with pytest.raises(ConfigError, match="no layer ''.*convolution, shuffle, head"):
        layer_named(adapter.module, "")
    assert layer_names(adapter.module) == ["convolution", "shuffle", "head"]
    with pytest.raises(ConfigError, match="pool is 'median'.*one of auto, mean, last, positions, flat"):
        representations(adapter, [images], pool="median")
    with pytest.raises(ConfigError, match="no samples to represent"):
        representations(adapter, [])
    with pytest.raises(ConfigError, match="axis of features of `convolution` is given as 4"):
        representations(adapter, [images], "convolution", channels=4)
    with pytest.raises(ConfigError, match=r"are \[48, 75\] wide.*one width"):
        representations(adapter, [images, torch.rand(1, 1, 10, 10)], "convolution", "flat")
    with pytest.raises(AdapterError, match=r"does not run on a batch of pixel_values \(2, 1, 8, 8\) int64: .*Expected"):
        representations(adapter, [images.long()], "convolution")
    adapter.module.spare = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="`spare` of Convolutions was not called"):
        representations(adapter, [images], "spare")

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.total = nn.Linear(4, 3), nn.Identity()

        def forward(self, features: Tensor) -> Tensor:
            made = self.line(features)
            self.total(made.sum(0, keepdim=True).repeat(5, 1))
            return made

    mixed = ModelAdapter(Mixed(), spec=ModelSpec(example_inputs={"features": torch.rand(2, 4)}))
    with pytest.raises(AdapterError, match=r"`total` gives a tensor of shape \(5, 3\) for 2 samples"):
        representations(mixed, [torch.rand(2, 4)], "total")


class Tied(nn.Module):
    """Logits by a product with the table, which no module makes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(blocks))

    def forward(self, input_ids: Tensor) -> Tensor:
        made = self.table(input_ids)
        for block in self.blocks:
            made = made + block(made)
        return made @ self.table.weight.T


def test_a_model_whose_logits_no_layer_makes():
    assert default_layer(ModelAdapter(Tied(3)))[:2] == ("blocks.2", "output")
    with pytest.raises(AdapterError, match="no layer whose output is its logits.*no repeated blocks.*Name a layer"):
        default_layer(ModelAdapter(Tied(0)))


def test_a_mask_that_does_not_fit_the_layer_is_named():
    class Halved(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool1d(2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            self.pool(self.table(input_ids).transpose(1, 2))
            return self.head(self.table(input_ids))

    adapter = ModelAdapter(Halved())
    batch = {"input_ids": torch.randint(11, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    assert len(representations(adapter, [batch], "pool", channels=1).values) == 2  # it hides nothing
    batch["attention_mask"][0, 5:] = 0
    with pytest.raises(DataError, match=r"In `pool` `attention_mask` of shape \(2, 8\) does not fit 2 x 4 positions"):
        representations(adapter, [batch], "pool", channels=1)
    assert len(representations(adapter, [batch], "pool", "flat", channels=1).values) == 2
    assert len(representations(adapter, [batch], "table").values) == 2


def test_layers_inside_a_fused_encoder_are_read():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.table, self.encoder = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.encoder(self.table(input_ids)).mean(1))

    # In eval mode torch runs such a layer as one operator that calls no part of it.
    model = Encoder().eval()
    found = representations(ModelAdapter(model), [torch.ones(2, 5, dtype=torch.long)], "encoder.layers.0.linear1")
    assert found.values.shape == (2, 16)
