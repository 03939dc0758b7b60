"""What arguments are for, by name, and what a forward reads from a dict."""

from typing import Any

import pytest
from torch import Tensor, nn

from utils.adapters.roles import are_twins, is_content, role_of, string_keys


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("attention_mask", "mask"),
        ("src_key_padding_mask", "padding"),
        ("x_lens", "lengths"),
        ("batch.position_ids", "positions"),
        ("token_type_ids", "segments"),
        ("hidden", "state"),
        ("return_hidden", "flag"),
        ("timesteps", "steps"),
        ("labels", "labels"),
        ("input_ids", None),
        ("camera", None),
    ],
)
def test_roles(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_annotations_tell_flags() -> None:
    assert role_of("anything", bool) == role_of("anything", "bool") == "flag"
    assert role_of("anything", Tensor) is None


def test_twins() -> None:
    assert are_twins("x1", "x2")
    assert are_twins("anchor", "positive")
    assert are_twins("query", "document")
    assert not are_twins("x", "edge_index")
    assert not are_twins("x1", "x1")


def test_content() -> None:
    names = ("pixel_values", "encoder_hidden_states", "attention_mask", "inputs_embeds", "num_items_in_batch", "use_x")
    assert [is_content(name) for name in names] == [True, True, False, False, False, False]


def test_keys_that_forward_reads() -> None:
    class Reader(nn.Module):
        def forward(self, batch: Any, other: Any) -> Any:
            return batch["ids"] + batch.pop("mask") + other["x"] + batch["ids"] + batch.get("maybe", 0)

    assert string_keys(Reader(), "batch") == ("ids", "mask")
    assert string_keys(Reader(), "missing") == ()
    assert string_keys(nn.Linear(1, 1), "input") == ()
