import pytest

from utils.ui.views import LiveCurve, in_notebook

ROWS = [
    {"step": 10, "split": "train", "loss": 2.0, "learning_rate": 1e-3},
    {"step": 10, "split": "validation", "loss": 2.1},
]


def test_a_test_is_no_notebook():
    assert not in_notebook()


def test_one_picture_is_redrawn_in_place(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown, updated = [], []

    class Handle:
        def update(self, image):
            updated.append(image.data)

    def fake_display(image, display_id=None):
        shown.append(image.data)
        return Handle()

    monkeypatch.setattr(display, "display", fake_display)
    curve = LiveCurve()
    curve.update(ROWS)
    curve.update(ROWS)
    assert len(shown) == 1
    assert updated == []
    curve.close(ROWS)
    assert len(shown) == len(updated) == 1
    LiveCurve().close([])
    assert len(shown) == 1
    assert shown[0].startswith(b"\x89PNG")
