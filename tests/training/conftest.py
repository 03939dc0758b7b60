import pytest

import utils
from utils.training import TrainingConfig

TINY_GPT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}
TINY_BERT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A real text of 60 kB: topics of Python's own documentation."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    return path


@pytest.fixture
def tiny_gpt():
    return utils.load_model("example:gpt", config=TINY_GPT)


@pytest.fixture
def quick():
    """Settings of a run of a second or two, with everything due at coinciding and at different steps."""
    return TrainingConfig(
        max_steps=24, batch_size=4, log_every_steps=5, val_every_steps=6, checkpoint_every_steps=4, learning_rate=3e-3
    )
