"""The audit lets ordinary model code pass, and nothing that reaches further."""

import pytest
import torch  # noqa: F401  (the audit follows names through the modules in memory)

from utils.loading.audit import audit
from utils.loading.source import example_names, read_example
from utils.runtime.errors import AuditError, InstantiationError

ATTACKS = [
    "import os",
    "import os as m",
    "from os import path",
    "import subprocess, torch",
    "from builtins import eval as e",
    "eval('1')",
    "exec('x')",
    "e = eval",
    "map(compile, [])",
    "open('/etc/passwd')",
    "x = __import__('os')",
    "__builtins__['eval']",
    "globals()['x']",
    "breakpoint()",
    "import importlib",
    "import ctypes",
    "import pickle",
    "import marshal",
    "import sys; sys.modules",
    "import socket",
    "import urllib.request",
    "import requests",
    "import pathlib",
    "import threading",
    "import torch; torch.load('x')",
    "import torch as t; t.save(1, 'x')",
    "from torch import load",
    "from torch import load as relu",
    "from torch import hub",
    "import torch.hub",
    "import torch; torch.hub.load('a', 'b')",
    "import torch; torch.ops.load_library('x')",
    "import torch.utils.cpp_extension",
    "from torch.utils import cpp_extension",
    "import torch; torch.utils.cpp_extension.load_inline()",
    "import torch.distributed",
    "import torch.multiprocessing as mp",
    "import torch; torch.multiprocessing.spawn(print)",
    "import torch; torch.jit.load('x')",
    "import torch; torch.package",
    "import torch; torch.serialization.os.system('x')",
    "import torch; torch.utils.data._utils.worker.os",
    "import torch; torch._C",
    "import torch; torch.fx.symbolic_trace",
    "import torch.nn.functional as F; F.importlib.import_module('os')",
    "from torch.nn.functional import importlib",
    "from torch.nn import functional as F; F.warnings.sys",
    "import torch; getattr(torch, 'lo' + 'ad')('x')",
    "import torch; getattr(torch, 'load')('x')",
    "import torch; m = torch; m.load('x')",
    "import torch; f = lambda t: t.load('x'); f(torch)",
    "import torch; [torch][0].load('x')",
    "import torch\nload = torch.serialization\nload.load('x')",
    "import torch; torch.load = print",
    "from torch import nn; nn.Linear.forward = print",
    "from torch.nn import Linear; Linear.forward = print",
    "import torch; setattr(torch, 'load', print)",
    "import torch; del torch.load",
    "import numpy as np; np.load('x')",
    "import numpy as np; np.fromfile('x')",
    "import numpy as np; np.ctypeslib",
    "from numpy import memmap",
    "().__class__.__base__.__subclasses__()",
    "(lambda: 0).__globals__",
    "getattr((), '__class__').mro()",
    "getattr((), '__subclasses__')",
    "x = getattr",
    "import functools; functools.reduce(getattr, ['a'], 1)",
    "getattr(1, *['a'])",
    "match 1:\n    case object(__globals__=g): pass",
    "'{0.__globals__}'.format(print)",
    "import typing; typing.get_type_hints(print)",
    "import dataclasses; dataclasses.sys",
    "import logging; logging.FileHandler('x')",
    "import warnings; warnings.sys.modules",
    "import inspect; inspect.currentframe()",
    "import types; types.FunctionType",
    "import json; json.load(1)",
    "import contextlib; contextlib.os.getcwd()",
    "from transformers import pipeline",
    "from transformers import AutoModel; AutoModel.from_pretrained('x')",
    "from torch import *",
    "from .. import x",
    "@eval\ndef f(): pass",
    "def f(x=open('x')): pass",
    "class A:\n    x = eval('1')",
    "f'{eval(1)}'",
    "[eval(x) for x in '1']",
    "def f(x: eval('1')): pass",
    "import torch\n[torch.load('x') or (torch := 1) for _ in '1']",
    "import torch\ndef f():\n    class A:\n        torch = 1\n    torch.load('x')",
    "import torch\ndef f():\n    [0 for torch in []]\n    return torch.load('x')",
    "import torch\ndef f():\n    global torch\n    torch = torch.load('x')",
    "def f(__name__='__main__'): pass\nif __name__ == '__main__':\n    eval('1')",
    "__name__ = '__main__'\nif __name__ == '__main__':\n    eval('1')",
    "if __name__ == '__main__':\n    pass\nelse:\n    eval('1')",
    "if __name__ != '__main__':\n    eval('1')",
    "def f(x):\n    return x.tofile('y')",
    "import torch; torch.UntypedStorage.from_file('x')",
    "import torch; torch.cuda.os",
    "import torch\nx = {}\n[0 for x[torch.load('x')] in '1']",
    "import torch\ndef f():\n    torch = 1\n    def g():\n        global torch\n        torch.load('x')",
    "def f():\n    torch = 1\n    def g():\n        import torch\n        torch.load('x')",
    "import torch\ndef f():\n    torch = 1\n    class A:\n        global torch\n        torch.load('x')",
    "def f():\n    torch = 1\n    class A:\n        import torch\n        torch.load('x')",
    "import torch\nm = torch.nn\nclass A:\n    m = torch.nn",
]
ORDINARY = '''
from __future__ import annotations
import copy, logging, math, warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Optional
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

logger = logging.getLogger(__name__)
ACT = {"gelu": F.gelu, "relu": F.relu, "silu": nn.SiLU}
Norm = nn.LayerNorm
fun = torch.nn.functional
torch.backends.cuda.matmul.allow_tf32 = True

@dataclass
class Config:
    """{"a": 1}"""
    d_model: int = 8
    extra: dict = field(default_factory=dict)

class Old(PretrainedConfig):
    def __init__(self, **kwargs):
        for key, value in kwargs.items():
            setattr(self, key, value)
        self.__dict__.update(kwargs)
        super().__init__()

class Model(nn.Module):
    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__()
        B, T, F_ = 1, 2, 3
        for i in range(2):
            setattr(self, f"layer_{i}", nn.Linear(8, 8))
        self.drop = getattr(config, "dropout", 0.1)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)), persistent=False)
        self.scale = np.sqrt(config.d_model)
        self.apply(self._init)
        for m in self.modules():
            nn.init.zeros_(m.weight) if hasattr(m, "weight") else None
        print("built", type(self).__name__, self.__class__.__name__)
        assert torch.cuda.is_available() or True
        warnings.warn("careful")

    def _init(self, module: nn.Module) -> None:
        pass

    @torch.no_grad()
    def generate(self, input, vars=None, compile=False):
        return input, vars, compile, [getattr(self, f"layer_{i}") for i in range(2)]

    def forward(self, input: Tensor, open: Optional[Tensor] = None) -> Tensor:
        B, T, F = input.shape
        input = input.view(B, T * F) + T + F
        with torch.autocast("cpu"), torch.cuda.amp.autocast(enabled=False):
            x = torch.nn.functional.scaled_dot_product_attention(input, input, input, is_causal=True)
        return checkpoint(self.layer_0, x, use_reentrant=False) / math.sqrt(8) * torch.finfo(x.dtype).eps

if __name__ == "__main__":
    import argparse, os, sys
    torch.save(Model(Config()).state_dict(), sys.argv[1])
'''


@pytest.mark.parametrize("source", ATTACKS)
def test_an_attack_is_not_harmless(source: str) -> None:
    assert not audit({"model.py": source}).harmless


def test_ordinary_model_code_is_harmless() -> None:
    report = audit({"model.py": ORDINARY})
    assert report.harmless, report.text()
    assert "einops" in report.text()


@pytest.mark.parametrize("name", example_names())
def test_the_examples_are_harmless(name: str) -> None:
    assert audit(read_example(name).files).harmless


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("from blocks import torch as t\nt.load('x')", "import torch"),
        ("import blocks\nblocks.torch.load('x')", "import torch"),
        ("from . import blocks\nblocks.torch.load('x')", "import torch"),
        ("from blocks import torch\nf(torch)", "import torch"),
        ("from blocks import *", "import torch"),
        ("from blocks import x", "x = eval('1')"),
        ("import blocks\nblocks.__builtins__", ""),
        ("import blocks\nx = blocks", ""),
    ],
)
def test_nothing_hides_behind_a_second_file(model: str, other: str) -> None:
    assert not audit({"model.py": model, "blocks.py": other}).harmless


def test_files_may_import_each_other() -> None:
    files = {"model.py": "from blocks import Block\nimport blocks\nx = blocks.Block", "blocks.py": "class Block: pass"}
    assert audit(files).harmless


def test_the_report_shows_file_line_and_source_and_escapes_them() -> None:
    report = audit({"model.py": "import torch\nx = eval('<script>')\n"})
    (concern,) = report.concerns
    assert (concern.file, concern.line, concern.category) == ("model.py", 2, "dynamic code")
    assert "model.py:2  dynamic code: eval()" in report.text() and "x = eval('<script>')" in report.text()
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()
    assert report.to_dict()["harmless"] is False and len(report.to_dict()["items"]) == 2
    with pytest.raises(AuditError, match=r"(?s)model.py:2.*eval.*trust=True"):
        report.require_harmless()


@pytest.mark.parametrize("source", ["def f(:\n  pass", "x = '\0'", "(" * 5000 + ")" * 5000])
def test_source_that_is_not_python(source: str) -> None:
    with pytest.raises(InstantiationError, match=r"model\.py.*Expected Python source"):
        audit({"model.py": source})
