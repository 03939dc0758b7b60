import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.training.stream import SampleStream


def stream(samples: int, batch_size: int, seed: int = 0) -> SampleStream:
    return SampleStream({"input_ids": torch.arange(samples), "labels": -torch.arange(samples)}, batch_size, seed)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 40), batch_size=st.integers(1, 50), before=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_a_resumed_stream_hands_out_what_an_uninterrupted_one_would(samples, batch_size, before, seed):
    uninterrupted = [batch["input_ids"] for batch in stream(samples, batch_size, seed).batches(before + 5)]
    first = stream(samples, batch_size, seed)
    for _ in first.batches(before):
        first.advance()
    second = stream(samples, batch_size, seed)
    second.load_state_dict(first.state_dict())
    resumed = [batch["input_ids"] for batch in second.batches(5)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, uninterrupted[before:], strict=True))


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_every_pass_sees_every_sample_once(samples, batch_size, seed):
    batches = list(stream(samples, batch_size, seed).batches(-(-3 * samples // batch_size)))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert all(len(batch["input_ids"]) == batch_size for batch in batches)
    for number in range(3):
        one_pass = ids[number * samples : (number + 1) * samples]
        assert sorted(one_pass.tolist()) == list(range(samples))
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), -ids)


def test_passes_are_shuffled_differently_and_seeds_differ():
    ids = torch.cat([batch["input_ids"] for batch in stream(100, 100).batches(2)])
    assert not torch.equal(ids[:100], ids[100:])
    other = next(stream(100, 100, seed=1).batches(1))["input_ids"]
    assert not torch.equal(ids[:100], other)


def test_passes_counts_how_often_the_data_was_seen():
    data = stream(10, 4)
    for _ in data.batches(5):
        data.advance()
    assert data.passes == 2.0
