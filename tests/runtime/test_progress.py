"""Bars count when shown, are silent when not, and do without tqdm."""

import sys

from utils.runtime.progress import progress_bar


def use(enabled):
    with progress_bar(3, "Working", enabled=enabled) as bar:
        bar.set_description_str("Still working")
        bar.set_postfix_str("loss 1.0")
        bar.update()
        bar.update(2)
        return bar


def test_a_silent_bar_writes_nothing(capsys):
    use(False)
    assert capsys.readouterr() == ("", "")


def test_a_shown_bar_counts():
    assert use(True).n == 3


def test_without_tqdm_the_description_is_printed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    use(True)
    assert capsys.readouterr().err == "Working ...\n"
