import pytest
import torch
from safetensors import safe_open
from torch import nn

from utils.runtime.errors import CheckpointError
from utils.training.weights import load_weights, read_weights, save_weights, weights_sha256


class Tied(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(10.0)[2:5])
        self.register_buffer("empty", torch.zeros(0))


def test_tied_tensors_are_stored_once_and_come_back_under_both_names(tmp_path):
    model, path = Tied(), tmp_path / "model.safetensors"
    save_weights(model, path)
    with safe_open(str(path), framework="pt") as stream:
        assert set(stream.keys()) == {"embedding.weight", "table", "empty"}
    assert torch.equal(read_weights(path)["head.weight"], model.embedding.weight)
    # The view of three numbers does not drag its ten into the file.
    assert read_weights(path)["table"].tolist() == [2, 3, 4]
    other = Tied()
    assert weights_sha256(other) != weights_sha256(model)
    load_weights(other, path)
    assert weights_sha256(other) == weights_sha256(model)
    assert other.head.weight is other.embedding.weight


def test_equal_weights_are_equal_files(tmp_path):
    model = Tied()
    for name in ("a", "b", "c", "d"):
        save_weights(model, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1


def test_weights_of_another_model_are_refused_with_the_difference(tmp_path):
    save_weights(Tied(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"another model .*embedding.weight is \(7, 4\) on disk and \(7, 5\)"):
        load_weights(Tied(5), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: bias, weight; not in the model: embedding.weight"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.safetensors")


def test_extra_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"count": 3}

    with pytest.raises(CheckpointError, match="keeps dict under '_extra_state'"):
        save_weights(Extra(2, 2), tmp_path / "a.safetensors")


def test_the_hash_sees_values_types_and_names():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_sha256(a) == weights_sha256(b)
    assert weights_sha256(a.double()) != weights_sha256(b)


def test_any_type_comes_back_through_the_librarys_own_reader(tmp_path):
    from safetensors.torch import load_file

    from utils.training.weights import TYPES, write_tensors

    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 3).t()}
    with open(tmp_path / "all.safetensors", "wb") as stream:
        write_tensors(tensors, {}, stream)
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        here, there = (value.contiguous().flatten().view(torch.uint8) for value in (tensor, loaded[name]))
        assert torch.equal(here, there), name
