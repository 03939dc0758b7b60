import math

import pytest

from utils.training.metrics import MetricsLog, bits_per_byte, read_metrics


def rows(count: int) -> list[dict]:
    return [{"step": i, "split": "train", "loss": math.pi / (i + 1), "seconds": 0.1 * i} for i in range(count)]


def test_numbers_come_back_bit_for_bit(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    for row in rows(5):
        log.append(row)
    assert read_metrics(log.path) == log.rows == rows(5)


def test_loading_a_state_cuts_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    for row in rows(5):
        log.append(row)
    resumed = MetricsLog(log.path)
    resumed.load_state_dict({"rows": 3})
    resumed.append({"step": 3, "split": "validation", "loss": 1.5})
    assert read_metrics(log.path) == [*rows(3), {"step": 3, "split": "validation", "loss": 1.5}]


def test_a_torn_last_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    for row in rows(3):
        log.append(row)
    log.path.write_text(log.path.read_text()[:-7])
    assert read_metrics(log.path) == rows(2)


def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    log.append(rows(1)[0])
    good = log.path
    log.path = tmp_path / "file" / "metrics.csv"
    (tmp_path / "file").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="metrics.csv cannot be written .*kept in memory"):
        log.append(rows(2)[1])
    log.append(rows(3)[2])
    log.path = good
    log.append(rows(4)[3])
    assert read_metrics(good) == rows(4)


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown metrics \['los'\]"):
        MetricsLog(tmp_path / "metrics.csv").append({"step": 1, "los": 2.0})


def test_bits_per_byte_of_a_uniform_guess_over_bytes():
    # 100 bytes, each guessed with probability 1/256: eight bits per byte.
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)
