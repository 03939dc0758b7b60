import json
import subprocess
import sys

import pytest
import torch

import utils
from tests.training.test_publish import TOKEN, server  # noqa: F401
from utils.__main__ import main
from utils.runtime.errors import ExportError
from utils.training import TrainingConfig
from utils.training.resume import train

TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a language model that kept an average, and one of an image model that kept none."""
    from pydoc_data.topics import topics

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])
    config = TrainingConfig(
        max_steps=12, batch_size=4, val_every_steps=4, checkpoint_every_steps=4, learning_rate=1e-2, ema_decay=0.9
    )
    train(utils.load_model("example:gpt", config=TINY), f"file:{text}", config, folder / "gpt", progress=False)
    pictures = utils.load_model(
        "example:vit",
        config={"image_size": 8, "num_channels": 1, "d_model": 16, "nhead": 2, "num_layers": 1},
    )
    train(pictures, "builtin:digits", TrainingConfig(max_steps=1), folder / "vit", progress=False)
    return folder


@pytest.fixture(scope="module")
def bundled(runs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / "out"
    said = ["bundle", str(runs / "gpt"), str(directory), "--licence", "mit", "--weights", "last", "--quiet"]
    assert main([*said, "--formats", "safetensors, torch_export"]) == 0
    return directory


def test_a_bundle_holds_the_weights_and_the_licence_that_were_asked_for(bundled):
    card = (bundled / "README.md").read_text()
    assert 'license: "mit"' in card and "the weights after step 12" in card
    assert {"inference.py", "model.pt2", "model.safetensors", "bundle.json"} <= {f.name for f in bundled.iterdir()}


def test_export_takes_weights(runs, tmp_path, capsys):
    said = ["export", str(runs / "gpt"), str(tmp_path / "out"), "--formats", "safetensors", "--json", "--quiet"]
    assert main(said) == 0
    assert json.loads(capsys.readouterr().out)["weights"].startswith("the moving average")
    assert main([*said, "--weights", "last"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "the weights after step 12"


def test_one_file_drives_bundle_publish_and_generate(runs, bundled, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run_dir: {runs / 'gpt'}\nexport: {{directory: {tmp_path / 'out'}, formats: [safetensors], weights: last}}\n"
        f"bundle: {{directory: {bundled}, formats: [safetensors, onnx], repo_id: me/model}}\n"
    )
    assert main(["export", "--config", str(file), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "the weights after step 12"
    assert main(["publish", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repo_id"] == "me/model"
    assert main(["generate", "--config", str(file), "The", "--tokens", "3", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["prompt"] == "The" and len(written["ids"]) <= 3


def test_a_bundle_takes_the_weights_of_the_section_export_unless_its_own_says_others(runs, tmp_path, monkeypatch):
    asked = []

    def stop(*arguments, weights, **more):
        asked.append(weights)
        raise ExportError("Nothing is made.", "Expected nothing.")

    monkeypatch.setattr("utils.training.bundle.bundle", stop)
    file = tmp_path / "run.yaml"
    said = f"run_dir: {runs / 'gpt'}\nexport: {{weights: best}}\nbundle: {{directory: {tmp_path / 'out'}"
    for more in ("", ", weights: last"):
        file.write_text(f"{said}{more}}}\n")
        assert main(["bundle", "--config", str(file), "--quiet"]) == 2
    assert main(["bundle", "--config", str(file), "--weights", "average", "--quiet"]) == 2
    assert asked == ["best", "last", "average"]


def test_publish_works_in_a_process_that_has_imported_nothing_else(bundled, root):
    command = [sys.executable, "-m", "utils", "publish", str(bundled), "me/model"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Would send" in result.stdout


def test_publish_shows_and_sends_with_yes_and_never_says_the_token(bundled, server, capsys):  # noqa: F811
    assert main(["publish", str(bundled), "me/model"]) == 0
    shown = capsys.readouterr()
    assert "Would send" in shown.out and "model.safetensors" in shown.out
    assert "Nothing was sent. Send it with --yes." in shown.out
    assert server.asked == []
    assert main(["publish", str(bundled), "me/model", "--yes", "--public"]) == 0
    sent = capsys.readouterr()
    assert "Sent" in sent.out and server.commit and server.repository["visibility"] == "public"
    assert TOKEN not in shown.out + shown.err + sent.out + sent.err


def test_publish_without_a_token_says_where_one_is_looked_for(bundled, server, monkeypatch, capsys):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["publish", str(bundled), "me/model", "--yes"]) == 2
    assert "There is no token for the Hugging Face Hub. Expected the secret HF_TOKEN" in capsys.readouterr().err
    assert server.asked == []


def test_publish_refuses_what_is_no_bundle_or_no_name(runs, bundled, capsys):
    assert main(["publish", str(runs / "gpt"), "me/model"]) == 2
    said = capsys.readouterr().err
    assert "is no bundle" in said and "Make one: python -m utils bundle RUN DIRECTORY" in said
    assert main(["publish", str(bundled), "model"]) == 2
    assert "repo_id is 'model': there is no owner in it" in capsys.readouterr().err
    assert main(["publish", str(bundled)]) == 2
    assert "without OWNER/NAME" in capsys.readouterr().err


def test_generate_goes_on_from_a_prompt_the_same_for_a_seed(runs, capsys):
    said = ["generate", str(runs / "gpt"), "The value", "--tokens", "12", "--temperature", "1.5"]

    def written(*more):
        assert main([*said, *more]) == 0
        return capsys.readouterr().out

    first = written("--seed", "1")
    assert first.startswith("The value") and len(first) > len("The value\n")
    assert written("--seed", "1") == first
    assert written("--seed", "2") != first
    assert written("--seed", "1", "--top-k", "0") != first


def test_generate_takes_the_weights_that_were_asked_for(runs, capsys):
    texts = {}
    for weights in ("last", "best", "average"):
        said = ["generate", str(runs / "gpt"), "The", "--weights", weights, "--temperature", "1", "--json"]
        assert main(said) == 0
        texts[weights] = json.loads(capsys.readouterr().out)
    assert texts["last"]["weights"] == "the weights after step 12"
    assert texts["average"]["weights"].startswith("the moving average (decay 0.9) of the weights at step 12")
    assert "lowest held-out loss" in texts["best"]["weights"]
    assert texts["last"]["ids"] != texts["average"]["ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{missing}", "A"], "RunError: There is no directory"),
        (["bundle", "{missing}", "{out}"], "There is no run in .*missing, and no file or folder of that name"),
        (["export", "{missing}", "{out}"], "There is no run in .*missing, and no file or folder of that name"),
        (["generate", "{gpt}", "A", "--weights", "bset"], "--weights is bset. Expected one of last, best, average"),
        (["bundle", "{gpt}", "{out}", "--weights", "bset"], "--weights is bset. Expected one of last, best, average"),
        (["export", "{gpt}", "{out}", "--weights", "bset"], "--weights is bset. Expected one of last, best, average"),
        (["export", "{vit}", "{out}", "--weights", "average"], "the run kept no average"),
        (["export", "example:gpt", "{out}", "--weights", "best"], "the model is not a training run"),
        (["generate", "{vit}", "A"], "is no causal language model but for image_classification"),
        (["generate", "{gpt}", "A", "--tokens", "0"], "tokens is 0. Expected a whole number above 0"),
        (["generate", "{gpt}", "A", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "{gpt}", "A", "--top-k", "-1"], "top_k is -1"),
        (["generate"], "without RUN, and there is no --config"),
        (["generate", "{gpt}"], "without PROMPT. Expected a text to go on from"),
        (["generate", "--config", "{file}"], "without PROMPT. Expected a text to go on from"),
        (["bundle", "{gpt}"], "without DIRECTORY, and there is no --config"),
        (["bundle", "{gpt}", "{out}", "--formats", "gguf"], "The export format 'gguf' is unknown"),
        (["bundle", "--config", "{file}"], "names the run .*missing, and there is none"),
    ],
)
def test_bad_input_is_told_in_words(runs, tmp_path, capsys, arguments, words):
    import re

    file = tmp_path / "run.yaml"
    file.write_text(f"run_dir: {tmp_path / 'missing'}\nbundle: {{directory: {tmp_path / 'out'}}}\n")
    places = {
        "gpt": runs / "gpt", "vit": runs / "vit", "out": tmp_path / "out", "missing": tmp_path / "missing",
        "file": file,
    }  # fmt: skip
    assert main([*(part.format(**places) for part in arguments), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err), captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
