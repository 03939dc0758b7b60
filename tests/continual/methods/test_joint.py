import torch

from tests.continual.methods.toy_streams import (
    check_equal,
    config_of,
    fresh,
    in_sessions,
    plain_loop,
    same_weights,
    train,
)
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.extension import make_extension


def test_every_batch_is_of_all_tasks(tmp_path):
    run = train(fresh(), config_of("joint"), tmp_path)
    stream = make_extension(run.config).open_stream(run)
    labels = torch.cat([stream.batch_at(8 * step)["labels"] for step in range(20)])
    assert labels.unique().tolist() == list(range(10))
    assert labels[:40].unique().numel() > 6
    check_equal(run.model, plain_loop(run, fresh()))
    assert read_matrix(tmp_path).joint is not None


def test_it_goes_on_in_the_middle(tmp_path):
    whole = train(fresh(), config_of("joint"), tmp_path / "whole")
    same_weights(in_sessions(fresh(), fresh, config_of("joint"), tmp_path / "parts", 9).model, whole.model)
