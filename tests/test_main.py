import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from utils.__main__ import build_parser, main
from utils.training import TrainingConfig

TINY = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 1}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture
def text(tmp_path):
    from pydoc_data.topics import topics

    path = tmp_path / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])
    return f"file:{path}"


def test_tier_2_and_the_badge(tmp_path, tiny, capsys):
    badge = tmp_path / "badge.svg"
    validate = ["validate", "example:gpt", "--model-config", tiny, "--quiet", "--json"]
    assert main([*validate, "--tiers", "2", "--time-budget", "3", "--badge", str(badge)]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "DESCRIBED"
    assert ">described</text>" in badge.read_text()
    assert main([*validate, "--tiers", "two"]) == 2
    assert "Tier 'two' was asked for" in capsys.readouterr().out


def test_validate_train_resume_export(tmp_path, tiny, text, capsys):
    page = tmp_path / "report.html"
    assert main(["validate", "example:gpt", "--model-config", tiny, "--html", str(page), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "READY"
    assert "<html" in page.read_text()
    run = str(tmp_path / "run")
    train = ["train", "example:gpt", "--model-config", tiny, "--data", text, "--run-dir", run, "--batch-size", "4"]
    assert main([*train, "--max-steps", "6", "--time-budget-minutes", "1e-9", "--quiet"]) == 1
    assert "stopped by its time budget at step 1 of 6" in capsys.readouterr().out
    assert main(["report", run]) == 0
    said = capsys.readouterr().out
    assert "status  stopped by its time budget" in said and f"continue with: python -m utils resume {run}" in said
    # What a kill leaves: checkpoints, and no word on how the session ended.
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["report", run]) == 0
    said = capsys.readouterr().out
    assert "status  killed, or still running\nstep  1\ntotal_steps  6\n" in said
    assert f"continue with: python -m utils resume {run}" in said
    assert main(["resume", run, "--time-budget-minutes", "60", "--json", "--quiet"]) == 0
    ended = json.loads(capsys.readouterr().out)
    assert ended["status"] == "finished" and ended["notes"] == []
    assert main(["resume", run, "--quiet"]) == 0
    assert "The run was finished already; nothing was trained." in capsys.readouterr().out
    assert main(["report", run]) == 0
    assert "continue with" not in capsys.readouterr().out
    assert main(["export", run, str(tmp_path / "out"), "--formats", "safetensors", "--quiet"]) == 0
    assert "safetensors" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_fault_gives_status_1_and_the_finding(tmp_path, capsys):
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n\nclass Leaky(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.embed = nn.Embedding(50, 16)\n"
        "        self.mix = nn.LSTM(16, 8, bidirectional=True, batch_first=True)\n"
        "        self.head = nn.Linear(16, 50)\n\n"
        "    def forward(self, input_ids):\n        return self.head(self.mix(self.embed(input_ids))[0])\n"
    )
    assert main(["validate", str(tmp_path), "--task", "causal_lm", "--quiet"]) == 1
    output = capsys.readouterr().out
    assert output.startswith("NOT READY")
    assert "future_leakage" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "example:gtp"], "There is no example named 'gtp'"),
        (["resume", "nowhere"], "RunError: There is no directory nowhere"),
        (["validate", "example:gpt", "--model-config", "absent.json"], "absent.json cannot be read as JSON"),
        (["validate", ""], "ModelReferenceError: The reference is empty. "),
        (
            ["validate", "example:gpt", "--html", "."],
            "--html '.' is a folder. Expected a file's path. Add a name, such as",
        ),
        (["validate", "example:gpt", "--badge", ""], "--badge '' is empty. Expected a file's path. Give one"),
        (["benchmark", "example:gpt", "--html", f"{__file__}/x"], "test_main.py is no folder that can be written."),
        (["train", "example:gpt", "--run-dir", "x", "--learning-rate", "1e9"], "learning_rate is 1000000000.0"),
        (["train", "example:gpt", "--run-dir", "x", "--max-epochs", "1", "--max-steps", "3"], "exactly one of them"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(arguments, words, capsys):
    assert main([*arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_ctrl_c_is_one_line_and_status_130(tiny, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.tier1_critical_validation.validate", interrupted)
    assert main(["validate", "example:gpt", "--model-config", tiny, "--quiet"]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Interrupted.\n")


def test_what_loading_found_is_told_before_the_model_is_validated(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.tier1_critical_validation.validate", interrupted)
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, width=4):\n"
        "        super().__init__(width, width)\n"
    )
    (tmp_path / "own.json").write_text('{"widht": 8}')
    arguments = ["validate", str(tmp_path / "net.py"), "--model-config", str(tmp_path / "own.json"), "--json"]
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert "note: Net takes no widht, which was left out; did you mean width?" in captured.err and not captured.out


def test_errors_as_json(capsys):
    assert main(["resume", "nowhere", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "RunError"


def test_settings_come_from_a_file_and_options_override_it(tmp_path, tiny, text, capsys):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"max_steps": 50, "batch_size": 4, "seed": 3}))
    run = tmp_path / "run"
    arguments = ["train", "example:gpt", "--model-config", tiny, "--data", text, "--run-dir", str(run)]
    assert main([*arguments, "--config", str(settings), "--max-steps", "2", "--json", "--quiet"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["max_steps"], config["batch_size"], config["seed"]) == (2, 4, 3)
    settings.write_text("[]")
    assert main([*arguments, "--config", str(settings)]) == 2
    assert "holds list" in capsys.readouterr().err


RUN_FILE = """
model: example:gpt
model_config: {{vocab_size: 300, d_model: 16, nhead: 1, num_layers: 1}}
data: {text}
run_dir: {folder}/run
mirror: {folder}/copy
config:
  max_steps: 6
  batch_size: 4
  learning_rate: 1e-3
  val_every_steps: 3
search:
  folder: {folder}/search
  trials: 2
  space:
    learning_rate: {{log_uniform: [1e-4, 1e-2]}}
    schedule: [cosine, linear]
export:
  directory: {folder}/out
  formats: [safetensors]
"""


def test_one_file_drives_every_verb_and_options_override_it(tmp_path, text, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE.format(text=text, folder=tmp_path))
    said = ["--config", str(file), "--quiet"]
    assert main(["train", *said, "--max-steps", "4", "--time-budget-minutes", "1e-9", "--json"]) == 1
    run = json.loads(capsys.readouterr().out)
    assert run["status"] == "stopped by its time budget"
    assert (run["config"]["max_steps"], run["config"]["learning_rate"]) == (4, 1e-3)
    assert (tmp_path / "copy" / "run.json").exists()
    assert main(["resume", *said, "--time-budget-minutes", "9"]) == 0
    assert "finished at step 4 of 4" in capsys.readouterr().out
    assert main(["export", *said]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["report", *said]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    page = tmp_path / "page.html"
    assert main(["search", *said, "--space", "clip_norm=uniform:0.5,2", "--best-dir", str(tmp_path / "best"),
                 "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert set(found["space"]) == {"clip_norm"} and len(found["trials"]) == 2
    assert found["best_run"]["status"] == "finished"
    assert main(["report", str(tmp_path / "search"), "--html", str(page)]) == 0
    assert capsys.readouterr().out.startswith("Search for GPT")
    assert "<table>" in page.read_text()


@pytest.mark.slow
def test_a_model_is_compared_with_a_transformer_of_its_size(tmp_path, text, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE.format(text=text, folder=tmp_path))
    page = tmp_path / "page.html"
    arguments = ["benchmark", "--config", str(file), "--folder", str(tmp_path / "out"), "--seeds", "0,1", "--quiet"]
    assert main([*arguments, "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [0, 1]
    assert page.stat().st_size > 5000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: example:gpt\nmax_steps: 3", "setting 'max_steps' beside the section 'model'"),
        ("model: example:gpt\nserch: {}", "has 'serch', which is unknown.*Did you mean 'search'"),
        ("modell: example:gpt", "has 'modell', which is unknown.*Did you mean 'model'"),
        ("config: {max_step: 3}", "no setting 'max_step'.*Did you mean 'max_steps'"),
        ("config: {max_steps: 3, max_epochs: 2}", "max_steps is 3 and max_epochs is 2"),
        ("search: {trial: 3}", "The section search of .* has 'trial'.*Did you mean 'trials'"),
        ("config: 3", "has config: 3"),
        ("model: [1]", r"has model: \[1\]"),
        ("config: {seed: 1, seed: 2}", "has 'seed' twice"),
        ("model: {a", "cannot be read"),
        ("", "holds nothing"),
        ("model: example:gpt", "without --run-dir DIR, and .* has no run_dir"),
        ("run_dir: x", "without MODEL, and .* has no model"),
        ("run_dir: x\nmodel: example:gpt\npreset: fsat", "fsat"),
    ],
)
def test_a_run_file_that_is_wrong_names_what_is_wrong(tmp_path, content, words, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file), "--quiet"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_preset_is_changed_by_the_file_and_the_file_by_options(tmp_path):
    from utils.__main__ import _config
    from utils.training.run_file import read_run_file
    from utils.ui.presets import preset

    file = tmp_path / "run.yaml"
    file.write_text("preset: fast\nconfig: {max_epochs: 2, batch_size: 3}")
    options = build_parser().parse_args(["train", "--config", str(file), "--batch-size", "5"])
    config = _config(options, read_run_file(file))
    assert (config.max_steps, config.max_epochs, config.batch_size) == (None, 2, 5)
    assert config.learning_rate == preset("fast").learning_rate


def test_a_space_on_the_command_line_is_checked(capsys, tmp_path):
    search = ["search", "example:gpt", "--folder", str(tmp_path / "search"), "--quiet"]
    assert main([*search, "--space", "learning_rate"]) == 2
    assert "--space learning_rate is no range" in capsys.readouterr().err
    assert main([*search, "--space", "seed=integers:1,2"]) == 2
    assert "choose luck" in capsys.readouterr().err
    twice = ["--space", "beta2=uniform:0.9,0.95", "--space", "beta2=uniform:0.8,0.9"]
    assert main([*search, *twice]) == 2
    assert "gives beta2 twice" in capsys.readouterr().err


def test_an_interrupt_before_there_is_a_run_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.__main__.load", interrupted)
    assert main(["validate", "example:gpt"]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_interrupt_saves_and_says_how_to_continue(tmp_path, root, tiny, text):
    run = tmp_path / "run"
    arguments = ["train", "example:gpt", "--model-config", tiny, "--data", text, "--run-dir", str(run)]
    settings = ["--batch-size", "4", "--max-steps", "100000", "--log-every-steps", "5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "utils", *arguments, *settings, "--quiet"], cwd=root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not ((run / "metrics.csv").exists() and "train" in (run / "metrics.csv").read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted at step" in output
    assert "Traceback" not in errors and f"continue with: python -m utils resume {run}" in errors
    step = int(re.search(r"at step (\d+)", output)[1])
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir(), "the step under way was saved"


def test_help_explains_every_verb_and_every_setting(capsys):
    for verb in ("validate", "train", "resume", "search", "benchmark", "export", "bundle", "publish", "generate",
                 "report", "link"):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            build_parser().parse_args([verb, "--help"])
        assert left.value.code == 0
        output = capsys.readouterr().out
        assert "Example: python -m utils" in output
        if verb == "train":
            for name in TrainingConfig().to_dict():
                assert f"--{name.replace('_', '-')} " in output, name


def test_it_runs_as_a_module(root):
    result = subprocess.run([sys.executable, "-m", "utils", "--version"], cwd=root, capture_output=True, text=True)
    assert result.stdout.startswith("Seedbed 0.")


def test_without_torch_it_says_which_environment_to_use(root):
    """The first command on a new machine, before anything is installed: no site-packages, as in a bare Python."""
    result = subprocess.run([sys.executable, "-S", "-m", "utils"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert " has no package " in result.stderr and "Run 'make environment' once, then " in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error(root, tmp_path, unbuffered):
    """As in ``| head``, whether it is noticed at once or at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "utils", "link", "example:gpt", "--output", str(tmp_path)]
    buffering = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, cwd=root, env=buffering, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_report_is_printed_even_if_its_file_cannot_be_written(tmp_path, tiny, capsys, monkeypatch):
    """The disk may fill up while the checks run."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.validation.report.write_atomic", full)
    page = str(tmp_path / "x.html")
    validate = ["validate", "example:gpt", "--model-config", tiny, "--quiet", "--tiers", "2", "--time-budget", "1"]
    assert main([*validate, "--html", page, "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "DESCRIBED"
    assert captured.err == f"{page} was not written: No space left on device.\n"


RECOMMENDER = """from torch import nn

class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(30, 8), nn.Embedding(40, 8)

    def forward(self, user, item):
        return (self.users(user) * self.items(item)).sum(-1)
"""


@pytest.mark.parametrize("kind", ["json", "npz", "safetensors"])
def test_example_inputs_come_from_a_file(tmp_path, capsys, kind):
    import numpy

    model = tmp_path / "recommender.py"
    model.write_text(RECOMMENDER)
    validate = ["validate", str(model), "--quiet"]
    assert main(validate) == 2
    said = capsys.readouterr().err
    assert "Pass --example-inputs FILE (.safetensors, .npz or .json with user, item)" in said
    assert "ModelSpec" not in said
    values = {"user": [1, 2, 3], "item": [4, 5, 6]}
    path = tmp_path / f"inputs.{kind}"
    if kind == "json":
        path.write_text(json.dumps(values))
    elif kind == "npz":
        numpy.savez(path, **values)
    else:
        pytest.importorskip("safetensors.numpy").save_file({n: numpy.array(v) for n, v in values.items()}, path)
    assert main([*validate, "--example-inputs", str(path)]) == 0
    assert capsys.readouterr().out.startswith("READY  Recommender")


def test_lines_to_begin_with_define_the_spec_that_a_finding_uses(tmp_path, capsys):
    source = "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    source += "        self.lin = nn.Linear(8, 8)\n\n    def forward(self, x):\n        return self.lin(x)\n"
    (tmp_path / "net.py").write_text(source)
    (tmp_path / "x.json").write_text('{"x": [[1.0, 2.0], [3.0, 4.0]]}')
    arguments = ["validate", str(tmp_path / "net.py"), "--quiet", "--example-inputs", str(tmp_path / "x.json")]
    assert main(arguments) == 1
    told, _, lines = capsys.readouterr().out.partition("To see and reproduce a finding in Python, begin with:\n")
    scope = {}
    exec(lines, scope)
    assert 'utils.show("shape_crash", model, spec=spec)' in told and scope["spec"].example_inputs["x"].shape == (2, 2)


def test_example_inputs_are_never_unpickled(tmp_path, capsys):
    import numpy

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    numpy.savez(tmp_path / "evil.npz", user=numpy.array([Evil()], dtype=object))
    (tmp_path / "made").unlink(missing_ok=True)
    (tmp_path / "text.json").write_text('{"x": [["a"]]}')
    (tmp_path / "x.pt").write_bytes(b"")
    validate = ["validate", "example:vit", "--quiet", "--example-inputs"]
    for name, words in (("evil.npz", "cannot be read"), ("text.json", "cannot be read"), ("x.pt", "ends in .pt")):
        assert main([*validate, str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_messages_name_options_and_a_report_can_be_pasted(tmp_path, capsys):
    source = "import os\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, width):\n"
    source += "        super().__init__()\n        self.lin = nn.Linear(width, width)\n\n    def forward(self, x):\n"
    source += "        return nn.functional.dropout(self.lin(x))\n"
    (tmp_path / "net.py").write_text(source)
    validate = ["validate", str(tmp_path / "net.py"), "--quiet"]
    assert main(validate) == 2
    assert "load again with --trust." in capsys.readouterr().err
    assert main([*validate, "--trust"]) == 2
    assert 'pass --model-config FILE with {"width": ...}.' in capsys.readouterr().err
    (tmp_path / "c.json").write_text('{"width": 8}')
    config, page = str(tmp_path / "c.json"), tmp_path / "new" / "page.html"
    assert main([*validate, "--trust", "--model-config", config, "--html", str(page)]) == 1
    captured = capsys.readouterr()
    assert f"wrote {page}" in captured.err and "Code: net.py:9" in captured.out
    lines = captured.out.partition("begin with:\n")[2]
    scope = {}
    exec(lines, scope)
    assert type(scope["model"]).__name__ == "Net" and "trust=True" in lines
