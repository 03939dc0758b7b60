"""The tiny runs of the training tests serve here too."""

from tests.training.conftest import quick, text_file, tiny_gpt

__all__ = ["quick", "text_file", "tiny_gpt"]
