import pytest

from tests.training.conftest import text_file
from utils.training.dataset_utilities import load_data

__all__ = ["text_file"]


@pytest.fixture(scope="session")
def digits():
    """The images that scikit-learn brings, as tensors."""
    return load_data("builtin:digits", task="image_classification", num_labels=10, image_shape=(1, 8, 8))
