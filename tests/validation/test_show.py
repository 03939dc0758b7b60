"""Findings as pictures."""

import numpy as np
import pytest

from utils.runtime.errors import ConfigError
from utils.validation.report import SHOWABLE
from utils.validation.show import PICTURES, show


def test_influence_matrix_of_a_leak(tiny):
    """The future of the leaking model is bright, that of the sound one is dark."""
    leaking, sound = (show("future_leakage", tiny.GPT(mask=mask)) for mask in ("none", "causal"))
    matrix = np.array(sound.numbers["influence"])
    assert matrix.shape == (24, 24) and np.diag(matrix).min() > 1e-4
    assert sound.numbers["largest_from_future"] < 1e-6 < leaking.numbers["largest_from_future"]
    assert "Largest change of an earlier logit" in leaking.text


def test_picture_renders(tiny, tmp_path):
    """The figure can be saved and shown in a notebook, and no global figure is left behind."""
    import matplotlib.pyplot as plt

    shown = show("future_leakage", tiny.GPT(mask="none"))
    shown.figure.savefig(tmp_path / "leak.png")
    assert (tmp_path / "leak.png").stat().st_size > 5000 and plt.get_fignums() == []
    assert 'src="data:image/png;base64,' in shown._repr_html_()
    assert shown.to_dict()["code"] == "future_leakage"


def test_scale_by_depth(tiny):
    """The signal after each block."""
    assert list(show("exploding_init", tiny.GPT()).numbers["scale_by_depth"]) == ["blocks.0", "blocks.1"]


def test_unknown_code(tiny):
    """The error lists what there is."""
    with pytest.raises(
        ConfigError, match=r"no picture for 'nan_output'. Pictures exist for future_leakage, exploding_init"
    ):
        show("nan_output", tiny.GPT())


def test_model_without_positions(tiny):
    """An image classifier has no influence between positions."""
    with pytest.raises(ConfigError, match="Influence between positions needs a language model"):
        show("future_leakage", tiny.ConvNet())


def test_the_report_names_exactly_the_codes_with_pictures():
    """The two lists agree."""
    assert set(SHOWABLE) == set(PICTURES)
