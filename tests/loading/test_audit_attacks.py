"""Models that were written to get past the audit: none runs, and their harmless relatives do."""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  (the audit follows names through the modules in memory)

from utils.loading import audit, load_model, loader
from utils.runtime.errors import AuditError

CONFIG = "class C:\n    def __init__(self, **kw):\n        for k, v in kw.items():\n            setattr(self, k, v)\n"
ATTACKS = [
    # A module that another module happens to have imported.
    "import torch.nn.functional as F; F.torch.save({}, 'x')",
    "import torch; torch.distributions.constraints.torch.save({}, 'x')",
    "import torch.nn.functional as F; F.torch.load('x', weights_only=False)",
    "import torch.nn.functional as F; F.torch.PyTorchFileWriter('x')",
    "import torch\nS = torch.nn.functional.torch\nS.save({}, 'x')",
    "from torch.nn.functional import torch as t; t.save({}, 'x')",
    "import torch as t; dict(t.inspect.getmembers(lambda: 0))['__glo' + 'bals__']['__builtins__']['open']",
    "import torch as t; dict(t.inspect.getmembers(lambda: 0))['__glo' + 'bals__']",
    # A module as an attribute of a class.
    "class A:\n    import torch as t\nA.t.save({}, 'x')",
    "class A:\n    import numpy\nA.numpy.save('x', [])",
    "class A:\n    import torch\nA.torch.hub.load('d', 'x', source='local')",
    "class A:\n    import torch\nA.torch.jit",
    "class A:\n    if True:\n        from torch import nn\nx = A.nn",
    # Functions that evaluate text or read attributes by name.
    "import inspect; inspect.signature(f, eval_str=True)",
    "import functools\n@functools.singledispatch\ndef f(x): pass\n@f.register\ndef g(x: \"open('x', 'w')\"): pass",
    "from dataclasses import dataclass, InitVar\n@dataclass\nclass A:\n"
    "    __annotations__[\"y=open('x', 'w')):\\n#\"] = InitVar[int]",
    "import string; string.Formatter().get_field('0.__glo' + 'bals__', (f,), {})",
    "import functools\nclass W: pass\n"
    "functools.update_wrapper(W(), f, assigned=('__glo' + 'bals__',), updated=())",
    "class M(type):\n    def __instancecheck__(c, o): return True\n"
    "class P(metaclass=M):\n    __match_args__ = ('__glo' + 'bals__',)\nmatch f:\n    case P(g): pass",
    "from abc import ABC\nfrom collections.abc import Generator\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P(ABC):\n    gi_frame: int\nP.register(Generator)\nmatch g():\n    case P(x): pass",
    # Files.
    "import contextlib\nr = contextlib.redirect_stdout(None); r.__enter__(); o = r._old_targets[0]\n"
    "type(o.buffer.raw)('x', 'w')",
    "def f(o): return type(o.buffer.raw)('x', 'w')",
    "import transformers; transformers.PretrainedConfig().to_json_file('x')",
    "from transformers import GPT2Config; GPT2Config(n_embd=4).save_pretrained('x')",
    "import transformers; transformers.AutoModel.from_config(cfg, trust_remote_code=True)",
    "from transformers import AutoModel; AutoModel.from_config(cfg)",
    "import transformers; transformers.BertTokenizer(vocab_file='/etc/hostname')",
    "import numpy as np; np.test()",
    "import numpy as np; np.random.test(verbose=2)",
    "import numpy as np; np.linalg.test()",
    "from numpy.fft import test as t; t()",
    # Other code, and memory.
    "from torch import nn\nfor L in [nn.Linear]: L.forward = print",
    "type('X', (), {'__array_interface__': {'data': (id(object), True)}})",
    "type('X', (), {'__array_inter' + 'face__': {'data': (id(object), True)}})",
    "import numpy as np\nclass X:\n    def __getattr__(self, n): return d\nnp.asarray(X())",
    "import numpy as np\nfrom types import SimpleNamespace\nnp.asarray(SimpleNamespace(**d))",
    "import torch\nfrom types import SimpleNamespace\ntorch.ones(1).numpy() + SimpleNamespace(**d)",
    "import torch\nfrom types import SimpleNamespace\ngetattr(torch.ones(1), 'num' + 'py')() + SimpleNamespace(**d)",
    "import numpy as np\nfrom torch import nn\nnp.asarray(nn.ParameterDict(d))",
    "import numpy as np\nclass X: pass\nobject.__setattr__(X(), n, d)",
    CONFIG + "import numpy as np\nnp.asarray(C(**d))",
    # The constructor of a plain class, given another object.
    "from torch import nn\n" + CONFIG + "C.__init__(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "put = C.__init__\nput(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "put = getattr(C, '__init__')\nput(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "    put = __init__\nC.put(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "match C:\n    case object(__init__=put): put(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "class D(C):\n    def f(self, *a, **k): super().__init__(*a, **k)\n"
    "D.f(D, nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "B = C\nclass D(B):\n    def f(self, *a, **k): super().__init__(*a, **k)\n"
    "D.f(D, nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG + "def super(): return C\nsuper().__init__(nn.Linear, forward=print)",
    "from torch import nn\n" + CONFIG.replace("C:", "C(nn.Module):"),
    CONFIG.replace("    def", "    @keep\n    def"),
    "@keep\n" + CONFIG,
]  # fmt: skip


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> AuditError:
    """Load a model that must be refused, and return the error; that nothing ran is checked too."""
    for name, text in files.items():
        (folder / name).write_text(text)

    def run(*_: Any) -> None:
        raise AssertionError("the source would have run")

    monkeypatch.setattr(loader, "instantiate", run)
    before = set(sys.modules)
    with pytest.raises(AuditError) as caught:
        load_model(folder)
    assert not [name for name in set(sys.modules) - before if name.startswith("seedbed_model")]
    return caught.value


@pytest.mark.parametrize("source", ATTACKS)
def test_an_attack_does_not_run(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not audit({"model.py": source}).harmless
    refused(tmp_path, monkeypatch, {"model.py": source})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torch", "import torch.nn; torch.save({}, 'x')"),
        ("torch", "import torch\nimport torch.nn\ntorch.save({}, 'x')"),
        ("numpy", "import numpy.linalg; numpy.save('x', [])"),
        ("math", "import math"),
        ("os", "import os.path; os.remove('x')"),
        ("os", "from os import remove"),
        ("pytest", "import pytest"),
    ],
)
def test_a_file_that_hides_a_module_is_refused(
    module: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(tmp_path, monkeypatch, {"model.py": source, f"{module}.py": "x = 1"})
    assert f"{module}.py:1  import: this file stands before the module {module}: rename it" in str(error)


def test_files_with_ordinary_names_are_not() -> None:
    for name in ("utils", "blocks", "layers", "attention_layers", "my_config"):
        assert audit({"model.py": f"from {name} import x", f"{name}.py": "x = 1"}).harmless


ORDINARY = """
from types import SimpleNamespace
import torch
from torch import nn

class Config:
    width = 8
    def __init__(self, **kwargs):
        for k, v in kwargs.items():
            setattr(self, k, v)

class Attr(dict):
    def __getattr__(self, name):
        return self[name]

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.tables = nn.ParameterDict(config)

class Model(Block):
    def __init__(self, config):
        super().__init__(config)
        self.other = Config(width=4, **config)

    def forward(self, x):
        match x.dim():
            case 2 | 3: return x
"""


def test_a_plain_config_class_may_take_any_setting() -> None:
    report = audit({"model.py": ORDINARY})
    assert report.harmless, report.text()


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit", "t5"])
def test_models_of_transformers_show_no_false_alarm(name: str) -> None:
    pytest.importorskip("transformers")
    spec = importlib.util.find_spec(f"transformers.models.{name}.modeling_{name}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    # Its imports lead into transformers' own machinery, which is not for model code.
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.level)]
    report = audit({"model.py": ast.unparse(tree)})
    assert report.harmless, report.text()


def test_a_class_of_transformers_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    source = "from transformers.models.gpt2.modeling_gpt2 import GPT2Model\nclass Model(GPT2Model): pass"
    assert audit({"model.py": source}).harmless
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert audit({"model.py": source}).harmless


@pytest.mark.parametrize(
    ("module", "words", "absent"),
    [
        (
            "nonexistent_pkg_q",
            [
                "imports a package that is not known to be harmless",
                "model.py:1  unknown import: nonexistent_pkg_q is not known to be harmless, and is not installed",
                "That alone will not help: install nonexistent_pkg_q first",
            ],
            ["more than model code needs"],
        ),
        ("pytest", ["pytest is not known to be harmless", "trust=True"], ["installed", "will not help"]),
        ("subprocess", ["more than model code needs", "import: subprocess"], ["not known to be harmless\n"]),
    ],
)
def test_an_unknown_import_is_not_called_malice(module: str, words: list[str], absent: list[str]) -> None:
    for source in (f"import {module}", f"from {module} import x"):
        with pytest.raises(AuditError) as caught:
            audit({"model.py": source}).require_harmless()
        assert all(word in str(caught.value) for word in words), caught.value
        assert not any(word in str(caught.value) for word in absent), caught.value
