"""Packed documents: positions, and who sees whom."""

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter
from utils.runtime.seeding import isolated_streams
from utils.training import batch_inputs
from utils.training.batch_inputs import boundary_facts, model_inputs, moved
from utils.training.dataset_utilities import load_data, prepare_data

transformers = pytest.importorskip("transformers")


def llama():
    with isolated_streams(0):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=300, max_position_embeddings=64, hidden_size=32, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=32,
            )
        ).eval()  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " + "speaks of itself alone " * 20)
    return f"file:{tmp_path}"


def test_a_document_in_a_window_is_answered_as_if_it_stood_alone(texts):
    adapter = ModelAdapter(llama())
    data = prepare_data(adapter, texts)
    assert data.facts["positions_argument"] == "position_ids"
    assert "no token sees another document" in data.text()
    end = data.tokenizer.eos_id
    first, second = torch.tensor([[end, 5, 6, 7]]), torch.tensor([[end, 9, 10, 11, 12]])
    with torch.no_grad():
        packed = adapter.logits(model_inputs(adapter, {"input_ids": torch.cat([first, second], 1)}, data))
        alone = [adapter.logits(model_inputs(adapter, {"input_ids": ids}, data)) for ids in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_a_model_without_positions_is_told_of(texts, tiny_gpt):
    data = prepare_data(tiny_gpt, texts)
    assert data.facts["positions_argument"] is None
    assert "a token also sees the end of the document before" in data.text()
    adapter = ModelAdapter(tiny_gpt)
    assert list(model_inputs(adapter, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}, data)) == [
        adapter.main_input
    ]


def test_positions_that_do_not_keep_documents_apart_are_left_alone(texts):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.place = nn.Embedding(300, 16), nn.Embedding(64, 16)
            self.head = nn.Linear(16, 300)

        def forward(self, input_ids, position_ids=None):
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])
            return self.head((self.token(input_ids) + self.place(position_ids)).cumsum(1))

    adapter = ModelAdapter(Learned())
    data = load_data(texts, task="causal_lm", vocab_size=300, max_length=32)
    assert boundary_facts(adapter, data)["positions_argument"] is None


def test_a_run_on_packed_documents_measures_and_resumes(texts, tmp_path, quick):
    run = utils.train(llama(), texts, quick.with_changes(max_steps=6), run_dir=tmp_path / "run", progress=False)
    assert run.last("validation")["bits_per_byte"] > 0
    assert run.data.facts["positions_argument"] == "position_ids"


def test_no_bits_per_byte_where_characters_are_unknown(tmp_path):
    (tmp_path / "t.txt").write_text("".join(chr(97 + (n * n) % 26) + chr(200 + n % 150) for n in range(4000)))
    model = utils.load_model(
        "example:gpt", config={"vocab_size": 40, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 1}
    )
    from utils.training.evaluation import evaluate

    data = prepare_data(model, f"file:{tmp_path}/t.txt")
    assert data.facts["validation_unknown"] > 0.2
    measured = evaluate(ModelAdapter(model), data, 8)
    assert set(measured) == {"loss"}
    assert "unknown" in data.text()


class SilentAttention(nn.Module):
    """Sees all tokens before, whatever the positions say, once its last weights are no longer zero."""

    def __init__(self):
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(300, 32), nn.Embedding(64, 32), nn.Linear(32, 300)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True, bias=False)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, input_ids, position_ids=None):
        length = input_ids.shape[1]
        places = torch.arange(length).expand_as(input_ids) if position_ids is None else position_ids
        hidden = self.token(input_ids) + self.place(places)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.head(hidden + self.attention(hidden, hidden, hidden, attn_mask=later, need_weights=False)[0])


def test_weights_that_are_zero_at_first_prove_nothing(texts):
    data = prepare_data(SilentAttention(), texts)
    assert data.facts["positions_argument"] is None
    assert "a token also sees the end of the document before" in data.text()


@pytest.mark.parametrize("limit", [10**9, 0])
def test_moved_weights_come_back_as_the_same_tensors(monkeypatch, limit):
    monkeypatch.setattr(batch_inputs, "COPY_BYTES", limit)
    model = SilentAttention()
    before = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    with moved(model):
        assert bool(model.attention.out_proj.weight.any())
        assert torch.equal(model.token.weight, before[0][2]) is (limit == 0)
        first = model.attention.out_proj.weight.clone()
    for parameter, place, values in before:
        assert parameter.data_ptr() == place and torch.equal(parameter, values)
    with pytest.raises(ZeroDivisionError), moved(model):
        assert torch.equal(model.attention.out_proj.weight, first)
        raise ZeroDivisionError
    assert not model.attention.out_proj.weight.any()


def test_data_that_was_prepared_for_another_model_is_fed_as_this_one_takes_it(texts, tiny_gpt):
    data = prepare_data(llama(), texts)
    assert data.facts["positions_argument"] == "position_ids"
    assert prepare_data(tiny_gpt, data).facts["positions_argument"] is None
