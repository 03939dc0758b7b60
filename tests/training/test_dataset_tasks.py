"""Each task's labels stand beside the sample they belong to: hand-made cases, and what evaluation makes of them."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.objectives import IGNORED
from utils.runtime.errors import DataError
from utils.training import TrainingConfig
from utils.training.batch_inputs import model_inputs
from utils.training.batching import collate
from utils.training.dataset_utilities import load_data, prepare_data
from utils.training.evaluation import evaluate, objective

WORDS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return f"file:{path}"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"file:{path}"


def both_sides(data):
    for split in (data.train, data.validation):
        batch = collate(split, torch.arange(len(next(iter(split.values())))))
        yield from ({name: tensor[i] for name, tensor in batch.items()} for i in range(len(batch["labels"])))


@pytest.fixture
def reviews(tmp_path):
    """Sixty texts, no two alike, whose first word says the class."""
    rows = [
        (number, f"{WORDS[number % 3]} " + " ".join(WORDS[: 1 + number % 7]) + f" {number}", 1 + number % 3)
        for number in range(60)
    ]
    return write_csv(tmp_path / "reviews.csv", ["id", "body", "stars"], rows)


def test_text_classification_keeps_each_label_with_its_text(reviews):
    data = load_data(
        f"{reviews}?text=body&label=stars", task="text_classification", vocab_size=300, max_length=64, num_labels=3
    )
    seen = 0
    for sample in both_sides(data):
        text = data.tokenizer.decode(sample["input_ids"][sample["attention_mask"] == 1].tolist())
        assert WORDS.index(text.split()[0]) == int(sample["labels"])
        assert (sample["input_ids"][sample["attention_mask"] == 0] == data.tokenizer.pad_id).all()
        seen += 1
    assert seen == 60
    assert data.facts["class_names"] == ["1", "2", "3"]
    assert data.report.classes == {"1": [16, 4], "2": [16, 4], "3": [16, 4]}
    assert "labels numbered in their order: 1 is 0, 2 is 1, 3 is 2" in data.text()


def test_columns_are_detected_and_the_reason_is_told(reviews):
    data = load_data(reviews, task="text_classification", vocab_size=300, max_length=64)
    assert data.facts["columns"] == {"text": "body", "label": "stars"}
    assert "text is the column 'body': by its usual name" in data.text()


def test_texts_in_class_folders(tmp_path):
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} film {number}", encoding="utf-8")
    data = load_data(f"file:{tmp_path}", task="text_classification", vocab_size=300, max_length=32, num_labels=2)
    assert data.facts["class_names"] == ["bad", "good"]
    for sample in both_sides(data):
        text = data.tokenizer.decode(sample["input_ids"][sample["attention_mask"] == 1].tolist())
        assert text.startswith(["bad", "good"][int(sample["labels"])])


def test_pairs_by_hand(tmp_path):
    rows = [{"en": f"{WORDS[n % 8]} {n}", "de": f"{n} {WORDS[n % 8].upper()}"} for n in range(30)]
    reference = write_jsonl(tmp_path / "pairs.jsonl", [{"translation": row} for row in rows])
    data = load_data(f"{reference}?source=en&target=de", task="seq2seq", vocab_size=300, max_length=32, pad_token_id=0)
    end, start = data.tokenizer.eos_id, data.facts["decoder_start"]
    assert (start, data.tokenizer.pad_id) == (0, 0)
    known = {row["en"]: row["de"] for row in rows}
    for sample in both_sides(data):
        source = sample["input_ids"][sample["attention_mask"] == 1].tolist()
        labels = sample["labels"][sample["labels"] != IGNORED].tolist()
        assert source[-1] == end
        assert labels[-1] == end
        target = data.tokenizer.decode(labels[:-1])
        assert known[data.tokenizer.decode(source[:-1])] == target
        # What the decoder reads at a position is what it had to say at the one before.
        assert sample["decoder_input_ids"][: len(labels)].tolist() == [start, *labels[:-1]]
        assert (sample["labels"][len(labels) :] == IGNORED).all()


def test_batches_are_as_wide_as_their_longest_text_needs(reviews):
    data = load_data(reviews, task="text_classification", vocab_size=300, max_length=64)
    lengths = data.train["lengths"]
    shortest = lengths.argsort()[:2]
    batch = collate(data.train, shortest)
    assert batch["input_ids"].shape[1] == -(-int(lengths[shortest].max()) // 8) * 8
    assert batch["input_ids"].shape[1] < data.train["input_ids"].shape[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths[shortest].tolist()
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_rows_of_numbers_and_words(tmp_path):
    rows = [(n, "" if n == 3 else n * n, ["x", "y"][n % 2], 2.0 * n + 1) for n in range(40)]
    reference = write_csv(tmp_path / "t.csv", ["a", "b", "c", "price"], rows)
    data = load_data(reference, task="regression", features=4)
    facts = data.facts
    assert facts["features"] == ["a", "b", "c=x", "c=y"]
    a = torch.cat([data.train["features"], data.validation["features"]])[:, 0]
    labels = torch.cat([data.train["labels"], data.validation["labels"]])[:, 0]
    # The target is a straight line in a, and stays one.
    slope = (labels - labels.mean()) / (a - a.mean())
    torch.testing.assert_close(slope, slope[0].expand_as(slope), rtol=1e-3, atol=1e-3)
    assert abs(float(data.train["labels"].mean())) < 1e-5
    assert float(data.train["labels"].std(correction=0)) == pytest.approx(1, abs=1e-4)
    restored = sorted((labels * facts["target_deviation"] + facts["target_mean"]).tolist())
    assert restored == pytest.approx([2.0 * n + 1 for n in range(40)], abs=1e-3)
    assert "1 missing values were filled" in data.text()
    with pytest.raises(DataError, match=r"has 4 features beside 'price' \(a, b, c=x, c=y\), and the model takes 5"):
        load_data(reference, task="regression", features=5)


@pytest.mark.parametrize(
    ("name", "task", "labels"), [("diabetes", "regression", 1), ("wine", "tabular_classification", 3)]
)
def test_bundled_tables_are_learned(name, task, labels, tmp_path):
    width = {"diabetes": 10, "wine": 13}[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, labels))
    adapter = ModelAdapter(model, spec=ModelSpec(task=task))
    config = TrainingConfig(max_steps=80, batch_size=32, learning_rate=1e-2, val_every_steps=80)
    run = utils.train(adapter, f"builtin:{name}", config, run_dir=tmp_path / "run", progress=False)
    measured = run.last("validation")
    if task == "regression":
        assert measured["r2"] > 0.3
        assert 40 < measured["rmse"] < 70
    else:
        assert measured["accuracy"] > 0.9


class Fixed(nn.Module):
    """Answers what it is told to, to have known numbers to measure."""

    def __init__(self, answers):
        super().__init__()
        self.answers = nn.Parameter(answers)

    def forward(self, features):
        return self.answers[features[:, 0].round().long() % len(self.answers)]


def known_data(task, labels):
    from utils.training.prepared_data import PreparedData

    features = torch.arange(len(labels), dtype=torch.float32)[:, None].repeat(1, 4)
    samples = {"features": features, "labels": labels}
    return PreparedData("hand-made", task, samples, samples, None, {"target_deviation": 10.0})


def test_r2_and_rmse_by_hand():
    wanted = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    adapter = ModelAdapter(
        Fixed(wanted + torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])),
        spec=ModelSpec(task="regression", example_inputs={"features": torch.zeros(2, 4)}),
    )
    measured = evaluate(adapter, known_data("regression", wanted), batch_size=3)
    assert measured["loss"] == pytest.approx(1.0)
    assert measured["rmse"] == pytest.approx(10.0)
    assert measured["r2"] == pytest.approx(1 - 4 / 5)


def test_accuracy_by_hand_and_wrong_shapes():
    scores = torch.eye(4)[[0, 1, 2, 2]]
    spec = ModelSpec(task="tabular_classification", example_inputs={"features": torch.zeros(2, 4)})
    adapter = ModelAdapter(Fixed(scores), spec=spec)
    data = known_data("tabular_classification", torch.tensor([0, 1, 2, 3]))
    assert evaluate(adapter, data, batch_size=3)["accuracy"] == 0.75
    wrong = known_data("tabular_classification", torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"scores of shape \(4, 4\) for labels of shape \(4, 2\)"):
        objective(adapter, wrong, wrong.train, 0)


def test_one_score_is_a_yes_or_no():
    spec = ModelSpec(task="tabular_classification", example_inputs={"features": torch.zeros(2, 4)})
    adapter = ModelAdapter(Fixed(torch.tensor([[1.0], [-2.0], [3.0], [4.0]])), spec=spec)
    measured = evaluate(adapter, known_data("tabular_classification", torch.tensor([1, 0, 1, 0])), batch_size=2)
    assert measured["accuracy"] == 0.75
    assert math.isfinite(measured["loss"])


def bert(labels):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=300, max_position_embeddings=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=labels,
        )
    )  # fmt: skip


def test_padding_changes_no_answer_of_a_model_with_a_mask(reviews):
    adapter = ModelAdapter(bert(3))
    data = prepare_data(adapter, reviews)
    assert data.facts["mask_argument"] == "attention_mask"
    order = data.train["lengths"].argsort()
    short, both = order[:1], torch.stack([order[0], order[-1]])
    adapter.module.eval()
    with torch.no_grad():
        alone = adapter.logits(model_inputs(adapter, collate(data.train, short), data))
        padded = adapter.logits(model_inputs(adapter, collate(data.train, both), data))
    torch.testing.assert_close(alone[0], padded[0])


def test_a_model_without_a_mask_is_told_of(reviews):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(300, 8), nn.Linear(8, 3)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids).mean(1))

    data = prepare_data(Bag(), reviews)
    assert data.facts["mask_argument"] is None
    assert "which the model reads: it takes no mask" in data.text()


@pytest.mark.parametrize("kind", ["classification", "pairs"])
def test_other_tasks_resume_exactly(kind, reviews, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "pairs":
        reference = write_jsonl(
            tmp_path / "p.jsonl",
            [{"source": f"{n} {WORDS[n % 8]}", "target": f"{WORDS[n % 8]} {n}"} for n in range(40)],
        )
        config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)

    def model():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config) if kind == "pairs" else bert(3)

    reference = reference if kind == "pairs" else reviews
    config_all = TrainingConfig(max_steps=8, batch_size=4, val_every_steps=4, checkpoint_every_steps=3, keep_best=0)
    whole = utils.train(model(), reference, config_all, run_dir=tmp_path / "a", progress=False)
    utils.train(model(), reference, config_all, run_dir=tmp_path / "b", progress=False)
    newest = sorted(path for path in (tmp_path / "b" / "checkpoints").iterdir() if path.is_dir())[-1]
    import shutil

    shutil.rmtree(newest)
    resumed = utils.resume(tmp_path / "b", model=model(), progress=False)
    assert resumed.step == 8
    for first, second in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


NUMBERS = {"task": "regression", "num_labels": 1}


@pytest.mark.parametrize(
    ("header", "rows", "query", "arguments", "message"),
    [
        (["text", "label"], [("a", 0), ("b", 5)] * 9, "", {}, "has labels 0 to 5, and the model tells 3 classes apart"),
        (["text", "label"], list(zip("abcd", "xyzw", strict=True)), "", {}, r"holds 4 different labels \(w, x, y, z\)"),
        (["text", "label"], [("a", 1), ("b", 1)], "", {}, "holds the one label '1' for every row"),
        (["text", "label"], [("a", ""), ("b", "")], "", {}, "holds no label"),
        (["text", "label"], [("a", 0), ("b", 1)], "?text=body", {}, r"no column 'body'. Its columns are text, label"),
        (["one", "two", "three"], [(1, 2, 3)], "", {}, r"no column that is plainly text; its columns are one, two"),
        (["text", "label"], [("a", 0)], "", {}, "one label"),
        (["text", "label"], [("same", 0), ("same", 1)], "", {}, "holds 1 different sample"),
        (["text", "price"], [("a", "cheap"), ("b", "2")], "", NUMBERS, "holds 'cheap' in row 1"),
        (["text", "price"], [("a", 2), ("b", 2)], "", NUMBERS, "holds the number 2 in every row"),
        (["text", "text"], [("a", 2)], "", {}, "has the column 'text' twice"),
        (["text", "label"], [("a", 0, "more")], "", {}, "has more fields than the header"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(tmp_path, header, rows, query, arguments, message):
    reference = write_csv(tmp_path / "t.csv", header, rows)
    settings = {"task": "text_classification", "vocab_size": 300, "max_length": 32, "num_labels": 3} | arguments
    with pytest.raises(DataError, match=message):
        load_data(reference + query, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\"text\": 1\n", "Line 1 of .* is not JSON"),
        (b"3\n", "Line 1 of .* is a int"),
        (b"\n", "is empty"),
        (b"\0\0\n", "is a binary file"),
        (b"{\"text\": \"\xff\"}\n", "is not UTF-8"),
    ],
)  # fmt: skip
def test_damaged_jsonl_is_refused(tmp_path, content, message):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"file:{tmp_path}/t.jsonl", task="text_classification", vocab_size=300, max_length=32)


def test_parquet_and_jsonl_give_what_csv_gives(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"text": f"{WORDS[n % 8]} number {n}", "label": n % 2} for n in range(40)]
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    write_jsonl(tmp_path / "t.jsonl", rows)
    arguments = {"task": "text_classification", "vocab_size": 300, "max_length": 32}
    prints = {load_data(f"file:{tmp_path}/t.{end}", **arguments).fingerprint() for end in ("parquet", "csv", "jsonl")}
    assert len(prints) == 1
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_data(f"file:{tmp_path}/bad.parquet", **arguments)
    assert np.isclose(load_data(f"file:{tmp_path}/t.csv?samples=20", **arguments).train_samples, 16)
