import numpy as np
import pytest
import torch

from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError
from utils.tokenization import mask_tokens, pack_causal, pack_masked

DOCUMENTS = [np.array([5, 6, 7]), np.array([8, 9])]


def test_hand_made_causal_windows():
    # stream: 0 5 6 7 0 8 9 0
    inputs, labels = pack_causal(DOCUMENTS, 3, eos_id=0)
    assert inputs.tolist() == [[0, 5, 6], [7, 0, 8], [9, 0, 0]]
    assert labels.tolist() == [[5, 6, 7], [0, 8, 9], [0, IGNORED, IGNORED]]
    assert inputs.dtype == labels.dtype == torch.int64


def test_hand_made_masked_windows_and_another_fill():
    inputs, labels = pack_masked(DOCUMENTS, 3, eos_id=0, fill_id=1)
    assert inputs.tolist() == [[0, 5, 6], [7, 0, 8], [9, 0, 1]]
    assert labels.tolist() == [[0, 5, 6], [7, 0, 8], [9, 0, IGNORED]]


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 100])
def test_every_token_is_predicted_exactly_once(length):
    inputs, labels = pack_causal(DOCUMENTS, length, eos_id=0)
    predicted = labels[labels != IGNORED].tolist()
    assert predicted == [5, 6, 7, 0, 8, 9, 0]
    flat = inputs.flatten().tolist()
    assert flat[1 : len(predicted)] == predicted[:-1], "an input is the previous label"


def test_window_length_is_checked():
    with pytest.raises(DataError, match="window length is 0"):
        pack_causal(DOCUMENTS, 0, eos_id=0)


def test_masking_follows_the_80_10_10_rule():
    ids = torch.randint(3, 50, (400, 500), generator=torch.Generator().manual_seed(0))
    ids[:, ::10] = 0
    inputs, labels = mask_tokens(ids, mask_id=2, vocab_size=50, special_ids=(0, 1), seed=1)
    ordinary, chosen = ids >= 3, labels != IGNORED
    assert not (chosen & ~ordinary).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    count = int(chosen.sum())
    assert count / int(ordinary.sum()) == pytest.approx(0.15, abs=0.004)
    masked, kept = inputs[chosen] == 2, inputs[chosen] == ids[chosen]
    assert int(masked.sum()) / count == pytest.approx(0.8, abs=0.01)
    # One in 47 replacements draws the original token again.
    assert int(kept.sum()) / count == pytest.approx(0.1 + 0.1 / 47, abs=0.01)
    replaced = inputs[chosen][~masked]
    assert set(replaced.tolist()) == set(range(3, 50)), "replacements use every ordinary id and no special one"


def test_masking_is_exact_for_a_seed_and_leaves_the_input_alone():
    ids = torch.arange(3, 43).view(2, 20)
    before = ids.clone()
    first, again = mask_tokens(ids, 2, 50, seed=7), mask_tokens(ids, 2, 50, seed=torch.Generator().manual_seed(7))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], mask_tokens(ids, 2, 50, seed=8)[1])
    assert torch.equal(ids, before)


def test_at_least_one_token_is_to_be_guessed():
    ids = torch.tensor([[0, 0, 9, 0]])
    for seed in range(20):
        _, labels = mask_tokens(ids, 2, 50, (0,), seed=seed, probability=0.01)
        assert labels.tolist() == [[IGNORED, IGNORED, 9, IGNORED]]
    inputs, labels = mask_tokens(torch.zeros(1, 4, dtype=torch.int64), 2, 50, (0,))
    assert (labels == IGNORED).all()
    assert (inputs == 0).all()


def test_impossible_ids_are_refused():
    ids = torch.tensor([[1, 2]])
    with pytest.raises(DataError, match="do not fit a vocabulary of 10"):
        mask_tokens(ids, 10, 10)
    with pytest.raises(DataError, match="All 3 ids are special"):
        mask_tokens(ids, 0, 3, (1, 2))
