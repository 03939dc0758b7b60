"""Arrays that users give as examples."""

import numpy as np
import pytest
import torch

from utils.concepts.checks import with_tensors
from utils.concepts.content import read_content
from utils.runtime.errors import DataError


def test_arrays_of_texts_are_taken_whatever_their_type():
    texts = ["a b", "c é"]
    kinds = [object, str] + ([np.dtypes.StringDType()] if hasattr(np.dtypes, "StringDType") else [])
    for kind in kinds:
        assert read_content(np.array(texts, dtype=kind)).texts == tuple(texts)
    assert with_tensors({"text": np.array(texts, dtype=object), "x": np.zeros((2, 1))})["text"] == texts
    assert torch.equal(with_tensors(np.ones(2)), torch.ones(2))
    with pytest.raises(DataError, match="There are no examples"):
        read_content(np.array([], dtype=object))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a", None, 3.0], "NumPy array of object, 2 of them no texts but NoneType.* Leave those out"),
        ([np.zeros(2), np.zeros(3)], "NumPy array of object. .*np.stack"),
        ([1, 2], "NumPy array of object. .*np.stack"),
    ],
)
def test_arrays_of_other_objects_are_refused(entries, message):
    made = np.empty(len(entries), dtype=object)
    made[:] = entries
    with pytest.raises(DataError, match=message):
        read_content(made)


def test_texts_of_bytes_are_refused():
    with pytest.raises(DataError, match=r"NumPy array of \|S3. .*np.char.decode"):
        read_content(np.array(["a b", "c d"], dtype="S"))
