"""The value that comes out of `load_model`, the built-in examples, and models from transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils.loading import example_names, load_model, read_code
from utils.runtime.errors import ConfigError, FetchError, InstantiationError


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["gpt", "bert", "vit"])
def test_an_example_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    loaded = load_model(f"example:{name}", config={"num_layers": 2})
    assert (loaded.kind, loaded.reference, loaded.notes) == ("example", f"example:{name}", ())
    loaded.save_source(tmp_path)
    again = load_model(tmp_path)
    assert again.name == loaded.name and again.config == loaded.config and again.config["num_layers"] == 2
    assert same_weights(again.module, loaded.module) and same_weights(loaded.factory(), loaded.module)


def test_a_config_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text('{"d_model": 64}')
    loaded = load_model("example:gpt", config=path)
    assert loaded.config["d_model"] == 64 and loaded.module.embed.embedding_dim == 64
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_model("example:gpt", config=tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="The config is a int"):
        load_model("example:gpt", config=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has the key 1"):
        load_model("example:gpt", config={1: 2})  # type: ignore[dict-item]


def test_a_value_that_json_cannot_hold_is_refused_when_saving(tmp_path: Path) -> None:
    loaded = load_model("example:vit", config={"num_layers": 1, "extra": torch.float32})
    with pytest.raises(InstantiationError, match="config of ViT cannot be saved"):
        loaded.save_source(tmp_path)


def test_a_module_is_kept_as_it_is(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    loaded = load_model(module, config={"a": 1})
    assert loaded.module is module and (loaded.kind, loaded.files, loaded.config) == ("module", {}, {"a": 1})
    assert not loaded.can_rebuild
    with pytest.raises(InstantiationError, match="Pass a link or a file to load_model instead"):
        loaded.save_source(tmp_path)
    with pytest.raises(InstantiationError, match=r"ModelSpec\(factory="):
        loaded.factory()


def test_a_loaded_model_describes_itself() -> None:
    loaded = load_model("example:gpt", config={"note": "<b>"})
    described = json.loads(json.dumps(loaded.to_dict()))
    assert described["parameters"] == 1_053_440 and described["files"] == ["config.json", "model.py"]
    assert described["audit"]["harmless"] is True and len(described["sha256"]) == 64
    page = loaded._repr_html_()
    assert "1.1M parameters" in page and "harmless" in page and "<b>&quot;" not in page and "&lt;b&gt;" in page


def test_a_representation_is_one_short_line() -> None:
    assert repr(load_model("example:gpt")) == "LoadedModel(GPT, 1.1M parameters, from example:gpt)"
    assert repr(load_model(nn.Linear(2, 2))) == "LoadedModel(Linear, 6 parameters, from a module)"
    assert repr(read_code("example:gpt")) == "ModelCode(example:gpt, 2 files, harmless)"
    assert repr(read_code("hub:owner/name")) == "ModelCode(hub:owner/name, built by transformers)"


def test_gpt_is_causal_and_reads_positions() -> None:
    model = load_model("example:gpt").module.eval()
    ids = torch.randint(0, 2048, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 2048
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-4)
    # At initialisation attention is almost uniform, so the order shows in the last digits only.
    assert not torch.equal(model(ids)[0, -1], model(torch.cat((ids[:, 1:-1], ids[:, :1], ids[:, -1:]), 1))[0, -1])


def test_bert_ignores_padding_and_stays_finite() -> None:
    model = load_model("example:bert").module.eval()
    ids = torch.randint(0, 2048, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6 + [0] * 4, [0] * 10])
    changed = ids.clone()
    changed[:, 6:] = 0
    out = model(ids, mask)
    assert torch.allclose(out[0, :6], model(changed, mask)[0, :6], atol=1e-6) and out.isfinite().all()
    assert torch.allclose(model(ids), model(ids, torch.ones(2, 10)), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "bert", "vit"])
def test_an_example_exports_with_dynamic_shapes(name: str) -> None:
    model = load_model(f"example:{name}", config={"num_layers": 1}).module.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    if name == "vit":
        inputs: tuple[torch.Tensor, ...] = (torch.randn(2, 1, 16, 16),)
        other: tuple[torch.Tensor, ...] = (torch.randn(5, 1, 16, 16),)
        shapes: Any = ({0: batch},)
    else:
        length = torch.export.Dim("length", min=2, max=128)
        inputs, other = (torch.randint(0, 2048, (2, 16)),), (torch.randint(0, 2048, (5, 31)),)
        shapes = ({0: batch, 1: length},)
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    assert torch.allclose(exported(*other), model(*other), atol=1e-5)


def test_examples_are_found_by_their_folders() -> None:
    assert {"bert", "gpt", "vit"} <= set(example_names())


@pytest.fixture
def tiny_gpt2(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_transformers_folder_without_weights_gets_seeded_ones(tiny_gpt2: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_gpt2)
    assert (loaded.name, loaded.kind, loaded.audit) == ("GPT2LMHeadModel", "path", None)
    assert same_weights(loaded.module, loaded.factory())
    loaded.save_source(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.name == loaded.name and same_weights(again.module, loaded.module)
    assert load_model(tiny_gpt2, config={"n_layer": 2}).config["n_layer"] == 2


def test_a_transformers_folder_with_weights_loads_them(tiny_gpt2: Path) -> None:
    module = load_model(tiny_gpt2, seed=5).module
    module.save_pretrained(tiny_gpt2)
    loaded = load_model(tiny_gpt2)
    assert same_weights(loaded.module, module) and same_weights(loaded.factory(), module)


def test_a_transformers_model_that_does_not_fit(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.loading.instantiate.available_memory", lambda: 1000)
    with pytest.raises(InstantiationError, match=r"this machine has 1\.0 kB"):
        load_model(tiny_gpt2)


def test_a_transformers_config_that_is_unknown_or_needs_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(InstantiationError, match="transformers cannot build"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InstantiationError, match="which is not run"):
        load_model(tmp_path)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"The Hub model nobody/nothing cannot be fetched.*loaded by its path"):
        load_model("hub:nobody/nothing")


def test_the_hub_token_comes_from_the_secrets_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    seen: list[Any] = []

    def refuse(name: str, **options: Any) -> None:
        seen.append(options["token"])
        raise OSError("401 Client Error")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for value, given, expected in ((None, None, None), ("hf_set", None, "hf_set"), ("hf_set", "hf_given", "hf_given")):
        if value:
            monkeypatch.setenv("HF_TOKEN", value)
        with pytest.raises(FetchError, match="set HF_TOKEN, or pass token=") as caught:
            load_model("hub:owner/name", token=given)
        assert seen[-1] == expected and "hf_" not in str(caught.value)


def test_what_is_printed_while_loading_becomes_a_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to whoever loads, such as a command that prints JSON."""
    lines = "from torch import nn\n\nprint('imported')\n\n\nclass Talker(nn.Module):\n    def __init__(self):\n"
    lines += "        super().__init__()\n        self.layer = nn.Linear(2, 2)\n        print('built')\n\n"
    lines += "    def forward(self, x):\n        return self.layer(x)\n"
    (tmp_path / "model.py").write_text(lines)
    loaded = load_model(tmp_path)
    assert capfd.readouterr().out == ""
    assert loaded.notes[-1] == "It printed while it was built: imported"
