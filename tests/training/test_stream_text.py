"""Text that is read while training: the position is exact, whatever happens in between."""

import json

import numpy as np
import pytest
import torch

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, DataError
from utils.training import TrainingConfig, text_stream
from utils.training.dataset_utilities import load_data, load_prepared, prepare_data
from utils.training.splitting import is_held_out
from utils.training.text_stream import TextStream, open_stream, read_documents

WORDS = ["the", "model", "reads", "a", "page", "of", "text", "and", "learns", "what", "word", "comes", "next"]
CAUSAL = {"task": "causal_lm", "vocab_size": 300, "max_length": 16, "validation_share": 0.2}


def prose(lines, seed=0):
    generator = np.random.default_rng(seed)
    return "".join(" ".join(generator.choice(WORDS, 9)) + ".\n" for _ in range(lines))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_stream, "WINDOWS", 20)
    monkeypatch.setattr(text_stream, "TOGETHER", 3)


@pytest.fixture
def reference(tmp_path):
    rows = [{"text": prose(1 + number % 4, number)} for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{tmp_path}/rows.jsonl?stream=true"


def stream_of(data, rank=0, world=1, seed=3):
    return TextStream(data.stream, data, 6, seed, rank, world)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_stream_stopped_in_the_middle_continues_bit_for_bit(reference, task):
    data = load_data(reference, **CAUSAL | {"task": task})
    uninterrupted = list(stream_of(data).batches(60))
    for stop in (0, 1, 3, 4, 17, 40):
        first = stream_of(data)
        reader = first.batches(60)
        for _ in range(stop):
            next(reader)
            first.advance()
        if stop:
            next(reader)  # fetched and never trained on
        state = json.loads(
            json.dumps({k: v.tolist() if hasattr(v, "tolist") else v for k, v in first.state_dict().items()})
        )
        state["leftover"] = torch.tensor(state["leftover"], dtype=torch.int32)
        second = stream_of(data)
        second.load_state_dict(state)
        resumed = list(second.batches(60 - stop))
        for ours, theirs in zip(resumed, uninterrupted[stop:], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "labels"))
    assert first.state_dict()["passes"] >= 1, "the end was passed in between"


def test_every_training_document_is_seen_once_in_a_pass_and_no_other(reference, monkeypatch):
    data = load_data(reference, **CAUSAL)
    stream = stream_of(data)
    cursor, tokens = stream.cursor, [np.array([stream.end])]
    while cursor.passes == 0:
        block, following = stream._read_block(cursor)
        generator = torch.Generator().manual_seed(text_stream.derive_seed(3, "stream", cursor.block))
        back = torch.randperm(20, generator=generator).argsort()
        assert torch.equal(block[0][back].flatten()[1:], block[1][back].flatten()[:-1])
        tokens.append(block[1][back].flatten().numpy())
        cursor = following
    text = data.tokenizer.decode(np.concatenate(tokens))
    read = [part for part in text.split("<|endoftext|>") if part]
    expected = [text for text in read_documents(data.stream) if not is_held_out(text, 0.2, 0)]
    assert 0 < len(expected) < 50
    assert read[: len(expected)] == expected
    held = data.tokenizer.decode(data.validation["labels"][data.validation["labels"] >= 0].tolist())
    assert not set(held.split("<|endoftext|>")) & set(expected) - {""}


def test_processes_share_each_batch(reference):
    data = load_data(reference, **CAUSAL)
    whole = TextStream(data.stream, data, 12, 3).batches(5)
    parts = [stream_of(data, rank, 2).batches(5) for rank in range(2)]
    for together, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(together["input_ids"], torch.cat([first["input_ids"], second["input_ids"]]))


def test_streams_survive_saving_and_changed_files_are_refused(reference, tmp_path):
    data = load_data(reference, **CAUSAL)
    data.save(tmp_path / "data")
    loaded = load_prepared(tmp_path / "data")
    assert loaded.fingerprint() == data.fingerprint()
    ours, theirs = next(stream_of(loaded).batches(1)), next(stream_of(data).batches(1))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert "read while training" in loaded.text()
    with pytest.raises(DataError, match="has no batches by number|read in its order"):
        stream_of(loaded).batch_at(0)
    with open(tmp_path / "rows.jsonl", "a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl has .* bytes now, and had .* when the run began"):
        next(stream_of(loaded).batches(1))


def test_a_run_on_a_stream_resumes_bit_for_bit(reference, tmp_path, tiny_gpt):
    config = TrainingConfig(
        max_steps=14, batch_size=4, val_every_steps=5, checkpoint_every_steps=4, keep_best=0, validation_share=0.2,
        context_length=16, workers=2,
    )  # fmt: skip
    whole = utils.train(tiny_gpt, reference, config, run_dir=tmp_path / "a", progress=False)
    import shutil

    again = utils.load_model("example:gpt", config=tiny_gpt.config)
    utils.train(again, reference, config, run_dir=tmp_path / "b", progress=False)
    newest = sorted(path for path in (tmp_path / "b" / "checkpoints").iterdir() if path.is_dir())[-1]
    shutil.rmtree(newest)
    resumed = utils.resume(tmp_path / "b", progress=False)
    assert resumed.step == 14
    assert resumed.summary()["weights_sha256"] == whole.summary()["weights_sha256"]


def test_a_stream_has_no_number_of_passes(reference, tiny_gpt):
    config = TrainingConfig(max_steps=None, max_epochs=1, validation_share=0.2)
    with pytest.raises(ConfigError, match=r"max_epochs is 1, and .* is read while training.*Set max_steps"):
        prepare_data(tiny_gpt, reference, config)


def test_too_few_documents_to_split_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text(prose(50))
    with pytest.raises(
        DataError, match=r"one.txt\?stream=true holds one document\. .*at least 2: .* Leave out \?stream"
    ):
        load_data(f"file:{tmp_path}/one.txt?stream=true", **CAUSAL)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(prose(50, number))
    for share, words in ((1e-9, "and 0 held out.*a larger share"), (1 - 1e-9, "hold 0 documents.*a smaller share")):
        with pytest.raises(DataError, match=rf"{words}.*leave out \?stream=true"):
            load_data(f"file:{tmp_path}?stream=true", **CAUSAL | {"validation_share": share})


def test_augmenting_a_text_is_refused(reference):
    data = load_data(reference, **CAUSAL)
    with pytest.raises(DataError, match="augment is true, and the samples of .* are no images"):
        open_stream(data, TrainingConfig(augment=True))


def test_settings_that_do_not_go_with_a_stream_are_told(reference, tiny_gpt):
    config = TrainingConfig(max_steps=3, context_length=16, validation_share=0.2)
    with pytest.warns(UserWarning, match=r"TrainingConfig.workers is 2, and .*by the training process alone"):
        data = prepare_data(tiny_gpt, reference, config.with_changes(workers=2))
    with pytest.raises(ConfigError, match=r"max_epochs is 2.*nobody knows how long"):
        prepare_data(tiny_gpt, data, config.with_changes(max_steps=None, max_epochs=2))


def test_numbers_have_no_smoothed_labels(tmp_path):
    rows = "".join(f"{n},{n * 7 % 5},{n / 3}\n" for n in range(60))
    (tmp_path / "t.csv").write_text("a,b,target\n" + rows)
    data = load_data(f"file:{tmp_path}/t.csv?label=target", task="regression", features=2, num_labels=1)
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=r"label_smoothing is 0.1, and the labels of .* are numbers"):
        prepare_data(
            ModelAdapter(model, spec=ModelSpec(task="regression")),
            data,
            TrainingConfig(max_steps=1, label_smoothing=0.1),
        )
