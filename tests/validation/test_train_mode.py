"""Models that train in one mode or at one length only."""

from torch import nn

from tests.validation.faulty_modes import result_of
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.learnability import check_learnability
from utils.validation.memory_footprint import check_memory_footprint
from utils.validation.signal_propagation import check_signal_propagation


class Filled(nn.Module):
    """Trains only on texts of the full length, and in train mode only, as reversible layers with axial positions do."""

    def __init__(self, trains):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.config, self.trains = {"max_position_embeddings": 64}, trains

    def forward(self, input_ids):
        if self.training and (input_ids.shape[1] != 64 or not self.trains):
            raise ValueError("fill the sequence up to 64")
        result = self.head(self.words(input_ids))
        if not self.training and result.requires_grad:
            result.register_hook(self.refuse)
        return result

    def refuse(self, gradient):
        raise AssertionError("use train mode")


def test_training_that_asks_for_the_full_length():
    result = result_of(check_gradient_flow, Filled(True))
    assert result.status == "warn" and [(f.code, f.where) for f in result.findings] == [("backward_crash", "Filled")]
    result = result_of(check_gradient_flow, Filled(False))
    assert result.status == "fail" and [(f.code, f.where) for f in result.findings] == [("backward_crash", "Filled")]
    for check in (check_signal_propagation, check_learnability, check_memory_footprint):
        assert not result_of(check, Filled(True)).could_not_run
