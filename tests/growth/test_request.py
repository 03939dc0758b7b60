import pytest

from utils.growth.edits import GrowthRefusedError
from utils.growth.request import Request


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({}, "amount is None and to is None. Expected exactly one"),
        ({"amount": 1, "to": 4}, "amount is 1 and to is 4. Expected exactly one"),
        ({"amount": 0}, "amount is '0'. Expected a whole number from 1"),
        ({"amount": -1}, "amount is '-1'"),
        ({"amount": 1.5}, "amount is '1.5'"),
        ({"amount": "3"}, "amount is '3'"),
        ({"amount": True}, "amount is 'True'"),
        ({"amount": 10**30}, "amount is '10000"),
        ({"to": "full"}, "to is 'full'"),
        ({"amount": 1, "where": True}, "where is True. Expected the name of a block"),
        ({"amount": 1, "where": 1.0}, "where is 1.0"),
    ],
)
def test_what_is_no_wish_is_refused(wish, words):
    with pytest.raises(GrowthRefusedError, match=words):
        Request("depth", **wish)


def test_how_much_is_added():
    assert Request("depth", amount=3).added(2, "blocks") == 3
    assert Request("depth", to=5).added(2, "blocks") == 3
    with pytest.raises(GrowthRefusedError, match="to grow to 2, and the model has 2 blocks. .* Say to=3 or more"):
        Request("depth", to=2).added(2, "blocks")
