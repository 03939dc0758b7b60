import torch

from tests.memory.buffers import add
from utils.memory import EpisodicBuffer


def test_it_shows_itself():
    buffer = EpisodicBuffer(8, policy="balanced", source="<b>")
    assert "EpisodicBuffer(balanced, 0 of 8 samples, 0 seen)" in buffer._repr_html_()
    assert "0 of unknown samples" in repr(EpisodicBuffer(max_bytes=100))
    assert buffer.to_dict()["oldest"] is None
    add(buffer, 10, time=3)
    add(buffer, 10, 10, time=9)
    buffer.sample(4, 0)
    facts = buffer.to_dict()
    assert facts["groups"] == {"0": 4, "1": 4} and facts["seen"] == 20 and facts["rehearsals"] == 4
    assert (facts["oldest"], facts["newest"]) == tuple(buffer.about()["times"].aminmax())
    assert facts["fields"]["images"] == "uint8 [2, 3]"
    page = buffer._repr_html_()
    assert "<td>1</td><td>4</td>" in page and "&lt;b&gt;" in page and "time-stamps" in page
    many = EpisodicBuffer(60, max_bytes=10**6)
    many.add({"x": torch.arange(60)}, groups=torch.arange(60))
    assert "the 40 largest of 60 groups" in many._repr_html_() and "of at most 1.0 MB" in many._repr_html_()
