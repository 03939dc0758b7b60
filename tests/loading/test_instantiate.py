"""Source becomes a model, or an error with the reason and the line."""

import html
import inspect
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils.adapters.location import code_location
from utils.loading import load_model, read_code
from utils.runtime.errors import AuditError, ConfigError, InstantiationError, ModelReferenceError

HEAD = "import torch\nfrom torch import nn\n"


def model(name: str = "Model", init: str = "self", body: str = "self.lin = nn.Linear(4, 4)", forward: str = "") -> str:
    return (
        f"class {name}(nn.Module):\n    def __init__({init}):\n        super().__init__()\n        {body}\n"
        + (forward or "    def forward(self, x):\n        return self.lin(x)\n")
    )  # fmt: skip


def write(folder: Path, source: str, config: Any = None, **others: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(HEAD + source)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, text in others.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("source", "config", "name"),
    [
        (model("A") + model("B"), {"model_name": "B"}, "B"),
        (model("A") + model("B") + "def build_model():\n    return A()\n", {"model_name": "?"}, "A"),
        (model("A") + model("Model"), {}, "Model"),
        (model("A") + model("CustomTransformer"), None, "CustomTransformer"),
        (model("Part") + model("Whole", body="self.lin = Part()"), {}, "Whole"),
        (model("Part") + "KINDS = {'p': Part}\n" + model("Whole", body="self.lin = KINDS['p']()"), {}, "Whole"),
        (model("Base") + "class Whole(Base):\n    pass\n", {}, "Whole"),
        ("from torch.nn import Linear\n" + model("Mine", body="self.lin = Linear(4, 4)"), {}, "Mine"),
        (model("Mine") + "def make() -> Mine:\n    return Mine()\n", {}, "Mine"),
    ],
)
def test_the_class_is_chosen_by_the_rules(tmp_path: Path, source: str, config: Any, name: str) -> None:
    loaded = load_model(write(tmp_path, source, config))
    assert loaded.name == name and loaded.module(torch.zeros(2, 4)).shape == (2, 4)


CONFIG = "from dataclasses import dataclass\n@dataclass\nclass Cfg_Config:\n    width: int = 4\n    bias: bool = True\n"


@pytest.mark.parametrize(
    ("source", "config", "width"),
    [
        (model(init="self, width, bias=True", body="self.lin = nn.Linear(width, width)"), {"width": 6, "x": 1}, 6),
        (model(init="self, **kw", body="self.lin = nn.Linear(kw['width'], kw['width'])"), {"width": 6, "x": 1}, 6),
        (model(init="self, config", body="self.lin = nn.Linear(config.width, config['width'])"), {"width": 6}, 6),
        (model(init="self, cfg: dict", body="self.lin = nn.Linear(cfg['width'], cfg['width'])"), {"width": 6}, 6),
        (CONFIG + model(init="self, args: Cfg_Config", body="self.lin = nn.Linear(args.width, args.width, args.bias)"),
         {"width": 6, "x": 1}, 6),
        (CONFIG + model(init="self, config: 'Cfg_Config | None' = None",
                        body="self.lin = nn.Linear(config.width, config.width, config.bias)"), {"width": 6}, 6),
        (CONFIG + model(init="self, config", body="self.lin = nn.Linear(config.width, config.width, config.bias)"),
         {"width": 6}, 6),
        (model(init="self, width, /", body="self.lin = nn.Linear(width, width)"), {"width": 6}, 6),
        (model(init="self, width", body="self.lin = nn.Linear(width, width)"),
         {"version": 2, "width": 8, "nodes": [{"params": {"width": 5}}, {"params": {"width": 6}}, {"id": 1}]}, 8),
        (model(init="self, width", body="self.lin = nn.Linear(width, width)"),
         {"nodes": [{"params": {"width": 5}}, {"params": {"width": 6}}]}, 6),
        (model(), {"width": 9}, 4),
        (CONFIG + model(init="self, args=Cfg_Config()", body="self.lin = nn.Linear(args.width, args.width)"),
         {"width": 6}, 6),
    ],
)  # fmt: skip
def test_the_constructor_gets_what_it_accepts(tmp_path: Path, source: str, config: Any, width: int) -> None:
    assert load_model(write(tmp_path, source, config)).module.lin.in_features == width


@pytest.mark.parametrize(
    ("source", "config", "error", "words"),
    [
        (model("A") + model("B"), {}, InstantiationError,
         ["2 classes that could be the model: A, B", '{"model_name": "B"}']),
        ("x = 1\n", {}, InstantiationError, ["defines no class derived from torch.nn.Module"]),
        ("from blocks import Inner\n", {}, InstantiationError, ["It imports Inner: set model_name"]),
        ("def f(:\n", {}, InstantiationError, ["model.py, line 3", "'def f(:'"]),
        ("x = 1 / 0\n", {}, InstantiationError, ["ZeroDivisionError", "(model.py, line 3: `x = 1 / 0`)"]),
        (model(body="raise ValueError('width must be even')"), {}, InstantiationError,
         ["The constructor of Model raised ValueError: width must be even",
          "(model.py, line 6: `raise ValueError('width must be even')`)"]),
        (model(body="raise SystemExit(3)"), {}, InstantiationError, ["raised SystemExit: 3"]),
        (model(init="self, width, depth"), {"width": 3}, InstantiationError,
         ["Model needs depth, which the config does not set; it sets width", "Add depth to config.json"]),
        (model(init="self, config", body="self.lin = nn.Linear(config.width, 1)"), {}, InstantiationError,
         ["AttributeError", "width"]),
        (model(forward="    def forward(self, x, mhsa_0_output, residual_0_output):\n        return x\n"), {},
         InstantiationError, ["requires mhsa_0_output, residual_0_output", "export is broken"]),
        (model(forward="    def forward(self, x):\n        return linear_3_out\n"), {}, InstantiationError,
         ["forward of Model uses linear_3_out, which nothing defines"]),
        (model(forward="    pass\n"), {}, InstantiationError, ["Model has no forward"]),
        ("def build_model():\n    return 3\n", {}, InstantiationError, ["build_model() returned a int"]),
        (model(), "{'a': 1}", ConfigError, ["config.json is not JSON", "line 1, column 2"]),
        (model(), " ", ConfigError, ["config.json is empty"]),
        (model(), "[1]", ConfigError, ["holds a JSON list"]),
        (model(body="torch.load('x')"), {}, AuditError, ["model.py:6  file: torch.load", "trust=True"]),
    ],
)  # fmt: skip
def test_refused_with_the_reason(
    tmp_path: Path, source: str, config: Any, error: type[Exception], words: list[str]
) -> None:
    before = set(sys.modules)
    with pytest.raises(error) as caught:
        load_model(write(tmp_path, source, config, blocks=HEAD + model("Inner")))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not [name for name in set(sys.modules) - before if name.startswith("seedbed_model")]


@pytest.mark.parametrize(
    ("source", "config", "used"),
    [
        (model("Foo"), {"model_name": "Bar"}, "Foo"),
        (model("Foo"), {"model_name": "My GPT"}, "Foo"),
        (model("Model"), {"model_name": "GPT"}, "Model"),
        (model("Foo") + "def build_model():\n    return Foo()\n", {"model_name": "x"}, "build_model"),
    ],
)
def test_a_title_in_model_name_is_noted(tmp_path: Path, source: str, config: Any, used: str) -> None:
    loaded = load_model(write(tmp_path, source, config))
    note = f'config.json names the model "{config["model_name"]}"; model.py has no class of that name: {used} was used.'
    assert loaded.notes == (note,) and loaded.to_dict()["notes"] == [note]
    assert html.escape(note) in loaded._repr_html_()


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn import Linear as Bar\n" + model("Foo", body="self.lin = Bar(4, 4)"),
        "class Bar:\n    pass\n" + model("Foo"),
        model("Foo") + "    class Bar(nn.Module):\n        pass\n",
    ],
)
def test_model_name_does_not_name_something_else(tmp_path: Path, source: str) -> None:
    with pytest.raises(InstantiationError, match='config.json names the class "Bar", and model.py defines Foo'):
        load_model(write(tmp_path, source, {"model_name": "Bar"}))


def test_a_part_that_model_name_names_is_loaded(tmp_path: Path) -> None:
    source = model("Part") + model("Whole", body="self.lin = Part()")
    loaded = load_model(write(tmp_path, source, {"model_name": "Part"}))
    assert loaded.name == "Part" and loaded.notes == ()


RESNET = model("Block", init="self, n") + (
    "class Net(nn.Module):\n    def __init__(self, block, sizes, classes=2):\n        super().__init__()\n"
    "        self.lin = self.make(block, sizes)\n    def make(self, block, sizes):\n"
    "        return nn.Sequential(*[block(size) for size in sizes])\n    def forward(self, x):\n"
    "        return self.lin(x)\ndef _net(sizes):\n    return Net(Block, sizes)\n"
    "def net3():\n    return _net([1, 1, 1])\ndef main():\n    print(net3())\n"
)


def test_a_model_built_from_a_class_says_how_to_load_it_and_loads_so(tmp_path: Path) -> None:
    with pytest.raises(InstantiationError) as caught:
        load_model(write(tmp_path, RESNET))
    message = str(caught.value)
    assert "Net needs block, sizes" in message and "The name of a class stands for the class in block." in message
    assert '{"model_name": "net3"}' in message and "utils.validate(net3())" in message and "main" not in message
    built = load_model(tmp_path, {"model_name": "net3"})
    assert built.name == "Net" and len(built.module.lin) == 3 and built.notes == ()
    assert same_weights(built.factory(), built.module)
    assert len(load_model(tmp_path, {"block": "Block", "sizes": [1, 1]}).module.lin) == 2
    open_question = RESNET.replace("return Net(Block, sizes)", "kind = Block\n    return Net(kind, sizes)")
    with pytest.raises(InstantiationError, match='Block, Net.*"net3".* a function that returns the model'):
        load_model(write(tmp_path, open_question))


@pytest.mark.parametrize("body", ["self.lin = KINDS[act]()", "act = KINDS[act]; self.lin = act()"])
def test_a_text_that_the_model_looks_up_itself_stays_a_text(tmp_path: Path, body: str) -> None:
    source = model("Act") + "KINDS = {'Act': Act}\n" + model("Net", init="self, act", body=body)
    assert load_model(write(tmp_path, source, {"act": "Act"})).name == "Net"


def test_a_misspelt_setting_is_noted(tmp_path: Path) -> None:
    def notes(source: str, config: dict[str, Any]) -> tuple[str, ...]:
        return load_model(write(tmp_path, source), config).notes

    source = model(init="self, image_size=4, *rest")
    note = ("Model takes no imagesize, which was left out; did you mean image_size?",)
    assert notes(source, {"imagesize": 8}) == note
    assert notes(source, {"imagesize": 8, "image_size": 4}) == notes(source, {"depth": 8}) == ()
    assert notes(model(init="self, image_size=4, **others"), {"imagesize": 8}) == ()
    assert notes(model(init="self, config"), {"imagesize": 8}) == ()
    assert notes(CONFIG + model(init="self, config: Cfg_Config"), {"widht": 8}) == (
        "Model takes no widht, which was left out; did you mean width?",
    )


def test_settings_that_the_constructor_reads_and_nobody_set_are_listed(tmp_path: Path) -> None:
    def said(body: str, config: Any = None) -> str:
        with pytest.raises(InstantiationError) as caught:
            load_model(write(tmp_path, model(init="self, cfg", body=body), config))
        return str(caught.value)

    first = said("self.lin = nn.Linear(cfg['width'], cfg.depth); cfg.get('x')")
    assert first.startswith("Model reads width, depth from cfg, and there is no config.json. The constructor of Model")
    assert "KeyError: 'width' (model.py, line 6" in first and "or config=, with these settings" in first
    assert "reads depth from cfg, and the config sets width." in said("cfg['width'], cfg.depth", {"width": 4})
    assert said("{}['other'], cfg['width']").startswith("The constructor of Model raised KeyError: 'other'")
    with pytest.raises(InstantiationError, match="^The constructor of Model raised KeyError"):
        load_model(write(tmp_path, CONFIG + model(init="self, cfg: Cfg_Config", body="cfg.width, {}['width']")))


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(InstantiationError, match="Install the package that provides flash_attn_absent"):
        load_model(write(tmp_path, "import flash_attn_absent\n" + model()), trust=True)


def test_trusted_code_runs(tmp_path: Path) -> None:
    source = "import os\n" + model(body="self.lin = nn.Linear(4, len(os.sep))")
    loaded = load_model(write(tmp_path, source), trust=True)
    assert loaded.module.lin.out_features == 1 and loaded.audit is not None and not loaded.audit.harmless


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.loading.instantiate.available_memory", lambda: 12_700_000_000)
    source = model(init="self, width", body="self.lin = nn.Linear(width, width, bias=False)")
    with pytest.raises(InstantiationError, match=r"Model needs 14\.4 GB .* this machine has 12\.7 GB"):
        load_model(write(tmp_path, source, {"width": 60_000}))


def test_a_model_that_meta_cannot_build_loads_with_a_note(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, model(body="self.lin = nn.Linear(4, int(torch.ones(4).sum().item()))")))
    assert loaded.module.lin.out_features == 4
    assert "memory needed is unknown" in loaded.notes[0]


def test_files_import_each_other_and_two_models_do_not_mix(tmp_path: Path) -> None:
    source = "import blocks\nfrom sizes import SIZE\n" + model(body="self.lin = blocks.make(SIZE)")
    path, late = list(sys.path), "def make(n):\n    from sizes import late\n    return late(n)\n"
    first, second = (
        load_model(
            write(tmp_path / str(size), source, blocks=late, sizes=HEAD + f"SIZE = {size}\ndef late(n):\n"
                  "    import blocks\n    assert blocks.make\n    return nn.Linear(4, n)\n")
        )
        for size in (3, 5)
    )  # fmt: skip
    assert (first.module.lin.out_features, second.module.lin.out_features) == (3, 5)
    assert sorted(first.files) == ["blocks.py", "model.py", "sizes.py"]
    assert sys.path == path and "blocks" not in sys.modules and "sizes" not in sys.modules


def test_classes_work_with_pickle_inspect_and_dataclasses(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, CONFIG + model(init="self, config: Cfg_Config")))
    assert same_weights(pickle.loads(pickle.dumps(loaded.module)), loaded.module)
    assert inspect.getsource(type(loaded.module)).startswith("class Model(nn.Module)")


def test_the_same_reference_gives_the_same_weights_and_leaves_the_streams_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, "torch.manual_seed(1)\ntorch.set_default_dtype(torch.float64)\n" + model())
    state = torch.get_rng_state()
    first, second, other = load_model(folder), load_model(folder), load_model(folder, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
    assert same_weights(first.module, second.module) and same_weights(first.factory(), first.module)
    assert not same_weights(first.module, other.module)


def test_bad_paths_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"x")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "foo.py").write_text("from model import X\n")
    (tmp_path / "big.py").write_text("x = 1\n" * 100)
    (tmp_path / "sub").mkdir()
    for reference, words in {
        tmp_path / "absent": "There is no file or folder",
        tmp_path / "w.bin": "is not Python source",
        tmp_path / "sub": "has no model.py; it has no files at all",
        tmp_path / "latin.py": "not UTF-8 text: byte 0xe9 in line 1",
        "gpd": "Did you mean example:gpt",
        "example:bret": "There is no example named 'bret'. Expected one of: bert, gpt, vit. Did you mean example:bert?",
    }.items():
        with pytest.raises(ModelReferenceError) as caught:
            load_model(reference)
        assert words in str(caught.value)
    with pytest.raises(ModelReferenceError, match=r"600 B.*max_bytes="):
        load_model(tmp_path / "big.py", max_bytes=500)
    (tmp_path / "model.py").write_text("X = 1\n")
    with pytest.raises(ModelReferenceError, match="not clear which of the two"):
        load_model(tmp_path / "foo.py")
    with pytest.raises(ModelReferenceError, match="Expected a revision only with"):
        load_model("example:gpt", revision="abc1234")
    with pytest.raises(ModelReferenceError, match="The reference is a int"):
        load_model(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (model(body="while True: pass"), "Model gave no answer within 1 s (net.py, line 6: `while True: pass`)"),
        (model(body="import time; time.sleep(1e6)"), "Model gave no answer within 1 s (net.py, line 6"),
        ("while True: pass\n", "The import of the source gave no answer within 1 s (net.py, line 3"),
        (model(body="import os; os._exit(0)"), "in a copy of this process, and the process was ended with"),
        (model(body="raise MemoryError"), "in a copy of this process, and memory ran out (net.py, line 6"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_come_back_is_stopped(tmp_path: Path, source: str, words: str) -> None:
    before = set(sys.modules)
    (tmp_path / "net.py").write_text(HEAD + source)
    with pytest.raises(InstantiationError) as caught:
        load_model(tmp_path / "net.py", trust=True, time_limit=1)
    assert words in str(caught.value)
    assert not [name for name in set(sys.modules) - before if name.startswith("seedbed_model")]


def test_a_slow_constructor_within_the_limit_loads(tmp_path: Path) -> None:
    folder = write(tmp_path, model(body="import time; time.sleep(0.1); self.lin = nn.Linear(4, 4)"))
    assert load_model(folder, trust=True, time_limit=5).name == "Model"
    with pytest.raises(ConfigError, match="time_limit is 0"):
        load_model(folder, time_limit=0)


def test_messages_name_the_file_as_its_author_does(tmp_path: Path) -> None:
    def said(text: str, **options: Any) -> str:
        (tmp_path / "vae.py").write_text(text)
        with pytest.raises((InstantiationError, ModelReferenceError, AuditError)) as caught:
            load_model(tmp_path / "vae.py", **options)
        return str(caught.value)

    assert said("class A(nn.Module:").startswith("vae.py, line 1: ")
    assert said(HEAD + "x = 1 / 0\n", trust=True).count("(vae.py, line 3: `x = 1 / 0`)") == 1
    assert said("x = 1\n").startswith("vae.py defines no class")
    assert said(HEAD + model("A") + model("B")).startswith("vae.py defines 2 classes")
    assert "vae.py:3  process: os._exit" in said(HEAD + "import os; os._exit(1)\n")
    assert said(" ") == (
        f"The file {tmp_path / 'vae.py'} is empty. Expected Python source that defines a torch.nn.Module. "
        "Export the model again, or check that the file was saved."
    )
    (tmp_path / "vae.py").write_text(HEAD + "from blocks import Inner\n" + model("A", body="self.lin = Inner()"))
    (tmp_path / "blocks.py").write_text(HEAD + model("Inner"))
    loaded = load_model(tmp_path / "vae.py")
    assert code_location(loaded.module, "A").startswith("vae.py:")
    assert code_location(loaded.module, "lin.lin").startswith("blocks.py:")
    assert sorted(loaded.files) == ["blocks.py", "model.py"]
    assert "--- vae.py" in read_code(tmp_path / "vae.py").text()
