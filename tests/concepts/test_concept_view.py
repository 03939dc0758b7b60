"""Pictures of concepts: they hold what was measured, light and dark."""

import builtins
import json

import pytest
import torch

from utils.concepts.autoencoder import AutoencoderConfig, fit_autoencoder
from utils.concepts.concept_view import (
    autoencoder_figure,
    direction_figure,
    effect_figure,
    feature_figure,
    figure_png,
    similarity_figure,
)
from utils.concepts.direction import concept_direction
from utils.concepts.effect import ErasureEffect
from utils.concepts.features import Feature, FeatureView, Strongest, strongest_features
from utils.concepts.similarity import similarity
from utils.runtime.errors import ConfigError, MissingPackageError

EFFECT = ErasureEffect("accuracy", 0.9, 0.4, tuple(0.9 - 0.001 * i for i in range(100)), 0.3, 50, "body.3")


@pytest.fixture(scope="module")
def values():
    return torch.randn(120, 8, generator=torch.Generator().manual_seed(0))


def texts(figure):
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_is_drawn(values, dark):
    found = concept_direction(values[:40] + 2, values[40:])
    fit = fit_autoencoder(values, AutoencoderConfig(features=16, active=2, steps=5))
    view = strongest_features(fit, values, count=3, top=4)
    images = torch.rand(120, 1, 6, 6)
    pair = similarity(values, values + 1)
    figures = [
        direction_figure(found, dark), effect_figure(EFFECT, dark), autoencoder_figure(fit, dark),
        similarity_figure(pair, dark), similarity_figure([[pair, pair], [pair, pair]], dark),
        feature_figure(view, images, dark), feature_figure(view, torch.rand(120, 3, 6, 6), dark),
    ]  # fmt: skip
    titles = [figure.get_suptitle() for figure in figures]
    assert titles[0].startswith("Concept found, effect not measured: cosine of two halves 0.9")
    assert titles[1] == "Erased in body.3: 0.500 lost, p = 0.0099"
    assert "more alike than chance (p = 0.005)" in titles[3]
    assert texts(figures[4]).count("1.00*") == 4
    assert figure_png(lambda dark: figures[0]).startswith(b"\x89PNG")
    for result in (found, EFFECT, fit, view, pair):
        assert "<" in result._repr_html_()


def test_text_of_a_user_is_escaped():
    place = Strongest(0, 1, 1.0, ("<script>", "<b>", "&"))
    view = FeatureView((Feature(0, 0.5, 1.0, 1.0, (place,)),), 1, "<layer>")
    shown = view._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown and "&lt;layer&gt;" in shown
    assert "[<b>]" in str(view)
    assert json.dumps(view.to_dict())


def test_errors(values):
    view = FeatureView((Feature(0, 0.5, 1.0, 1.0, (Strongest(7, -1, 1.0),)),), 1)
    with pytest.raises(ConfigError, match="features of example 7"):
        feature_figure(view, torch.rand(7, 6, 6))
    with pytest.raises(ConfigError, match="images of the shape \\(9, 6\\)"):
        feature_figure(view, torch.rand(9, 6))
    with pytest.raises(ConfigError, match="no similarities to draw"):
        similarity_figure([])


def test_without_matplotlib_there_are_words(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name, *rest: refuse(name))
    with pytest.raises(MissingPackageError, match="matplotlib"):
        effect_figure(EFFECT)
    assert "pip install matplotlib" in EFFECT._repr_html_()
    assert "worst of 100 random directions" in EFFECT._repr_html_()
