import warnings

import pytest

import utils
from utils.runtime.errors import ConfigError
from utils.training.config import TrainingConfig
from utils.training.resume import train
from utils.ui import presets
from utils.ui.presets import ORDER, merged, preset, preset_about, preset_names, read_preset

MINIATURE = {
    "max_steps": 4, "batch_size": 2, "context_length": 16, "val_every_steps": 2, "log_every_steps": 2,
    "checkpoint_every_steps": 2,
}  # fmt: skip


def test_all_presets_are_there_and_valid():
    assert preset_names() == list(ORDER)
    for name in ORDER:
        assert isinstance(preset(name), TrainingConfig)
        assert 40 < len(preset_about(name)) < 140


def test_presets_say_only_what_differs_from_the_defaults_or_what_they_are_about():
    for name in ORDER:
        assert preset(name) != TrainingConfig()


@pytest.mark.parametrize("name", ORDER)
def test_every_preset_trains_in_miniature(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    loaded = utils.load_model(
        "example:gpt", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2, "num_layers": 2}
    )
    config = preset(name, **MINIATURE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = train(loaded, f"file:{text}", config, tmp_path / "run", progress=False)
    assert run.finished
    assert run.step == 4
    assert run.last("validation")["loss"] > 0


def test_a_change_replaces_the_other_way_to_say_how_long():
    assert (preset("fast", max_epochs=2.0).max_steps, preset("fast", max_epochs=2.0).max_epochs) == (None, 2.0)
    assert preset("fast", batch_size=3).batch_size == 3
    with pytest.raises(ConfigError, match=r"max_steps is 5 and max_epochs is 1\..*exactly one"):
        preset("fast", max_steps=5, max_epochs=1)


def test_a_batch_size_of_auto_keeps_the_samples_of_a_step():
    found = preset("tiny-gpu", batch_size="auto")
    assert (found.accumulate, found.step_samples) == (1, 32)
    assert found.samples_per_step == preset("tiny-gpu").samples_per_step
    assert preset("tiny-gpu", batch_size="auto", step_samples=64).samples_per_step == 64
    assert preset("quality", batch_size="auto").step_samples == 128
    assert merged({"batch_size": "auto", "step_samples": 64}, {"batch_size": 8}) == {
        "batch_size": 8, "step_samples": None,
    }  # fmt: skip
    assert merged({}, {"batch_size": "auto"})["step_samples"] is None
    with pytest.raises(ConfigError, match=r"accumulate is 'x'"):
        TrainingConfig.from_dict(merged({"accumulate": "x"}, {"batch_size": "auto"}))


def test_unknown_presets_and_settings_are_refused():
    with pytest.raises(ConfigError, match=r"no preset 'quick'\. Expected one of fast, balanced, quality, tiny-gpu"):
        preset("quick")
    with pytest.raises(ConfigError, match="no preset '../x'"):
        preset_about("../x")
    with pytest.raises(ConfigError, match="no setting 'batchsize'.*Did you mean 'batch_size'"):
        preset("fast", batchsize=2)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: Mine.\nsettings:\n  batch_size: 3\n")
    assert read_preset(path).batch_size == 3
    assert preset_names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: x\nsettings:\n  batch_size: 0\n", r"mine.yaml: TrainingConfig.batch_size is 0\. Expected a number"),
        ("about: x\nsettings:\n  batch_sise: 2\n", "mine.yaml: TrainingConfig has no setting 'batch_sise'"),
        ("about: x\nsettings: [1]\n", r"holds \['about', 'settings'\]\. Expected 'about', a sentence"),
        ("batch_size: 2\n", r"holds \['batch_size'\]"),
        ("- 1\n", "holds list"),
        ("about: [\n", r"is not YAML \(.*line 2.*Expected lines such as"),
        ("\xff", None),
    ],
)
def test_files_that_are_no_presets_are_explained(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message or r"cannot be read \(.*Expected a YAML file"):
        read_preset(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_preset(tmp_path / "none.yaml")


def test_the_folder_holds_nothing_else():
    assert {path.name for path in presets.FOLDER.iterdir()} == {f"{name}.yaml" for name in ORDER}
