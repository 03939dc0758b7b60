import pytest
import torch

from utils.concepts.content import Content, checked_groups, read_content
from utils.runtime.errors import DataError


def test_a_hash_is_of_the_content_alone():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    plain = read_content(ids).hashes()
    assert plain == read_content({"input_ids": ids.int()}).hashes()
    assert plain == read_content(ids[:, None]).hashes()
    assert plain != read_content(ids.float()).hashes()
    assert len({*plain}) == 2
    assert read_content(["a ", "b"]).hashes() == read_content(["a", " b\n"]).hashes()


def test_positions_that_a_mask_hides_do_not_count():
    ids, mask = torch.tensor([[1, 2, 9]]), torch.tensor([[1, 1, 0]])
    other = torch.tensor([[1, 2, 7]])
    assert (
        read_content({"input_ids": ids, "attention_mask": mask}).hashes()
        == read_content({"input_ids": other, "attention_mask": mask}).hashes()
        == read_content({"input_ids": other, "padding_mask": mask == 0}).hashes()
        == read_content(torch.tensor([[1, 2]])).hashes()
    )


def test_batches_are_joined():
    whole = read_content([{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 3)}])
    assert len(whole) == 3
    assert whole.nbytes == 36
    assert whole.given["x"].shape == (3, 3)
    assert read_content(whole) is whole
    assert len(read_content("one text")) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "There are no examples"),
        (torch.zeros(0, 3), "There are no examples"),
        (["a", "  "], "1 of the examples are empty"),
        (3, "of the type int"),
        (["a", torch.zeros(1)], "Among the examples is a str"),
        ({"x": 3}, "Among the examples is a dict"),
        (torch.tensor(1.0), "have the shapes ()"),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, "have the shapes"),
        (torch.tensor([[float("nan")]]), "not finite"),
        ([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}], "of shape (3,)"),
        (list(torch.zeros(4, 2, 3)), "a list of 4 tensors, of the shape (2, 3) at first"),
    ],
)
def test_what_is_no_example_is_refused(given, said):
    with pytest.raises(DataError, match="(?s)" + said.replace("(", r"\(").replace(")", r"\)")):
        read_content(given)


def test_kinds_do_not_mix():
    with pytest.raises(DataError, match="Some examples are texts and others"):
        Content(texts=("a",)).joined(read_content(torch.zeros(1, 2)))


def test_groups_are_as_many_as_samples():
    assert checked_groups(torch.tensor([1, 2]), 2, "examples") == ("1", "2")
    assert checked_groups(None, 2, "examples") == ()
    with pytest.raises(DataError, match="There are 1 groups for 2 examples"):
        checked_groups(["a"], 2, "examples")
