"""The audit lets ordinary model code pass, and nothing that reaches further."""

import pytest
import torch  # noqa: F401  (the audit follows names through the modules in memory)

from utils.loading.audit import audit
from utils.loading.source import example_names, read_example
from utils.runtime.errors import AuditError, InstantiationError

PRELUDE = "import warnings\nfrom torch import nn\ndef g(): yield\nclass A:\n    pass\n"
LOADER = "from torch.utils.data import DataLoader\n"
ATTACKS = [
    LOADER + "def run(d): return DataLoader(d, num_workers=2)",
    LOADER + "def run(d, n): return DataLoader(d, num_workers=n)",
    LOADER + "def run(d): return DataLoader(d, 1, False, None, None, 2)",
    LOADER + "def run(d, k): return DataLoader(d, **k)",
    LOADER + "def run(d): d = DataLoader(d); d.num_workers = 2",
    "import torch\ndef run(d): return torch.utils.data.DataLoader(d, num_workers=1)",
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
    "class A:\n    def a(self, n): return getattr(self, f'f_{n}')",
    "class A:\n    def a(self, n): return getattr(self, f'gi_{n}')",
    "class A:\n    def a(self, n): return getattr(self, f'm{n}')",
    "class A:\n    def a(self, n): return getattr(self, f'o{n}')",
    "class A:\n    def a(self, n): return getattr(self, f'_{n}')",
    "class A:\n    def a(self, n): return getattr(self, '__' + n)",
    "class A:\n    def a(self, n): return getattr(self, 'tb_%s' % n)",
    "class A:\n    def a(self, n): return getattr(self, 'cr_{}'.format(n))",
    "class A:\n    def a(self, n): return getattr(self, 'ag_' + n)",
    "class A:\n    def a(self, n): return getattr(self, f'func_{n}')",
    "class A:\n    def a(self, n): return getattr(self, f'save{n}')",
    "class A:\n    def a(self, n): return getattr(self, n)",
    "def a(self, n): return getattr(self, f'f_{n}')",
    "def d(self): return self.__dict__",
    "class A:\n    def d(self): return self.__dict__",
    "import warnings; warnings.catch_warnings()._module",
    "import warnings\nclass A:\n    def f(self):\n        self._module = 1\nwarnings.catch_warnings()._module",
    "d['__builtins__']",
    "d[b'__builtins__'.decode()]",
    "def f():\n    '''__globals__'''",
    "x = '__subclasses__'",
    "def put(self, n, v): setattr(self, n, v)",
    "class A:\n    def put(self, n, v): setattr(self, n, v)",
    "def put(self, n, v): setattr(self, f'layer_{n}', v)",
    "class A:\n    @staticmethod\n    def put(self, n, v): setattr(self, f'layer_{n}', v)",
    "class A:\n    def put(self, n, v):\n        def g(self): setattr(self, f'layer_{n}', v)",
    "class A:\n    def put(self, n, v):\n        self = n\n        setattr(self, f'layer_{n}', v)",
    "class A:\n    def put(self, n, v): setattr(self, f'for{n}', v)",
    "from torch import nn\ndef put(c): c.forward = print\nput(nn.Linear)",
    "from torch import nn\ndef put(c): setattr(c, 'forward', print)\nput(nn.Linear)",
    "import torch\ndef put(c): c.matmul = print\nput(torch.Tensor)",
    "def put(c, d): c.__class__ = d",
    "type(x).forward = print",
    "import transformers; transformers.PretrainedConfig().to_json_file('x')",
    "import transformers; transformers.PretrainedConfig.from_json_file('/etc/passwd')",
    "import transformers; transformers.PretrainedConfig().save_pretrained('x')",
    "import transformers; transformers.PretrainedConfig().push_to_hub('x')",
    "import transformers; transformers.GPT2Model.from_pretrained('/tmp/x')",
    "import transformers; transformers.GPT2Config.get_config_dict('x')",
    "import transformers; transformers.GPT2Config._dict_from_json_file('x')",
    "import transformers; transformers.TrainerState().save_to_json('x')",
    "import transformers; transformers.GPT2Tokenizer(vocab_file='/etc/passwd')",
    "from transformers import Trainer",
    "from transformers import AutoTokenizer",
    "from transformers import AutoModel; AutoModel.from_config(c, trust_remote_code=True)",
    "from transformers import PreTrainedTokenizerFast as GPT2Model",
    "import transformers.models.gpt2.tokenization_gpt2",
    "from transformers.models.gpt2 import tokenization_gpt2",
    "from transformers.modeling_utils import load_state_dict",
    "from transformers.utils import cached_file",
    "from transformers import GPT2Config; GPT2Config(attn_implementation='owner/kernels')",
    "def f(m): m.set_attn_implementation('owner/kernels')",
    "def f(t): t.save_vocabulary('x')",
    "import torch; torch.from_file('x')",
    "import torch; torch.ones(1).share_memory_()",
    "def f(m): m.save('x')",
    "def f(m): return m.load('x')",
    "import numpy as np; np.savetxt('x', [])",
    "import numpy as np; np.genfromtxt('x')",
    "import numpy as np; np.lib.npyio",
    "import numpy as np; np.rec.fromfile('x')",
    "import numpy as np; np.info(np, output=f)",
    "import dataclasses; dataclasses.inspect",
    "import enum; enum.sys",
    "import typing; typing.sys",
    "import functools; functools.namedtuple",
    "import collections; collections._sys",
    "import copy; copy.copyreg",
    "import copy; copy.dispatch_table",
    "import re; re.enum.sys",
    "import random; random._os",
    "import statistics; statistics.sys",
    "import logging; logging.os",
    "import logging.config",
    "import logging; logging.basicConfig(filename='x')",
    "import logging; logging.getLogger('x').root.handlers[0].stream",
    "import logging; logging.lastResort.stream.buffer",
    "import warnings; warnings.showwarning = print",
    "import warnings; warnings.linecache.getlines('/etc/passwd')",
    "import operator",
    "from operator import attrgetter",
    "x.__getattribute__('y')",
    "object.__getattribute__(x, 'y')",
    "object.__getstate__(x)",
    "class A:\n    def g(self): return super().__getattribute__('x')",
    "'{0.__class__.__init__}'.format(x)",
    "'{0._module}'.format(x)",
    "'{0[a].gi_frame}'.format(x)",
    "('{0._' + '_globals_' + '_}').format(x)",
    "f = '{}'.format_map",
    "str.format('x', y)",
    "import string; string.Formatter().get_field('0.x', (print,), {})",
    "type('A', (), {'__red' + 'uce__': print})",
    "T = type",
    "class M(type): pass",
    "class A(metaclass=M): pass",
    "from abc import ABCMeta as M; M('A', (), {})",
    "from abc import ABCMeta\nclass M(ABCMeta): pass",
    "type[int]('A', (), {})",
    "x = type(A)",
    "type(A)('B', (), {})",
    "type(A)(*x)",
    "type(A).__call__('B', (), {})",
    "x = A.__class__\nx('B', (), {})",
    "vars(x)",
    "locals()",
    "dir(x)",
    "input()",
    "help()",
    "print('x', file=f)",
    "match x:\n    case A(gi_frame=g): pass",
    "match x:\n    case A(_module=g): pass",
    "(e := eval)('1')",
    "f = lambda x=eval: x",
    "@exec\n@str\nclass A: pass",
    "def f():\n    from torch import relu as eval\neval('1')",
    "class A:\n    __annotations__ = {'x=print()': int}",
    "A.__annotations__['x'] = 1",
    "A.__dataclass_fields__",
    "import dataclasses\ndataclasses.fields(A)[0].name = 'x=print()'",
    "from dataclasses import field\nf = field()\nf.name = 'x=print()'",
    "from dataclasses import dataclass\ndataclass(A)",
    "from dataclasses import dataclass\nmake = [dataclass]",
    "import functools; functools.update_wrapper(a, b, ['x'])",
    "from functools import wraps\nwraps(f, assigned=['__glo' + 'bals__'])(g)",
    "from functools import wraps, partial\npartial(wraps, assigned=a)",
    "from functools import singledispatch",
    "from torch.nn.modules.module import wraps",
    "import inspect; inspect.signature(f, eval_str=True)",
    "import inspect; inspect.Signature.from_callable(f, eval_str=True)",
    "import inspect; inspect.signature(f, **k)",
    "import typing; typing.get_args(typing.Optional['print()'])[0]._evaluate(None, None, set())",
    "import typing; typing.ForwardRef('print()')",
    "class A:\n    def __reduce__(self): return print, ()",
    "class A:\n    def __reduce_ex__(self, p): return print, ()",
    "class A:\n    @property\n    def __dict__(self): return {}",
    "class A:\n    @property\n    def __array_interface__(self): return {}",
    "import torch; torch.compile(f, backend=g)",
    "import torch; torch.compile(f, **k)",
    "import functools, torch; functools.partial(torch.compile, backend=g)",
    "class A:\n    def f(self): self.compile(backend=g)",
    "import torch; torch._dynamo.config",
    "import torch; torch.fx.Graph()",
    "import torch; torch.classes.load_library('x')",
    "import torch; torch.ops.aten.from_file",
    "import torch; torch.library.infer_schema(f)",
    "import torch; torch.compiler.disable",
    "import torch; torch.export.save(1, 'x')",
    "import torch; torch.autograd.profiler.profile().export_chrome_trace('x')",
    "from torch.autograd import profiler",
    "import torch; torch.profiler.profile().export_chrome_trace('x')",
    "import torch; torch.utils.tensorboard",
    "import torch; torch.utils.model_zoo.load_url('x')",
    "import torch; torch.backends.xeon.run_cpu.main()",
    "import math, warnings\nmath = warnings.catch_warnings()",
    "import math\nfor math in x: math.y",
    "import math\nwith x as math: math.y",
    "def g(): yield\ng().gi_frame.f_builtins",
    "try: f()\nexcept Exception as e: e.__traceback__.tb_frame",
    "async def f(): pass\nf().cr_frame",
    "import torch\ntry: torch.nope\nexcept AttributeError as e: m = e.obj",
    "match x:\n    case AttributeError(obj=m): pass",
    "import torch; torch.nn.modules.module.register_module_forward_hook(f)",
    "import torch; torch.cuda.memory.CUDAPluggableAllocator('x.so', 'a', 'b')",
    "import torch; torch.cuda.cudart()",
    "import torch; torch.UntypedStorage._new_shared_filename_cpu",
    "import einops; einops.parsing.warnings",
    "from transformers.activations import ACT2FN; ACT2FN['gelu'] = f",
    "import torch; torch.backends.cuda.sdp_kernel = f",
    "from transformers import GPT2Config; GPT2Config(**{'attn_implementation': 'owner/kernels'})",
    "def f(m): m.generate(custom_generate='owner/code')",
    "def f(config): config._attn_implementation = 'owner/kernels'",
    "import transformers.models.gpt2.modeling_gpt2 as g; g.os",
    "import torch\nfor torch.nn.Linear.forward in [f]: pass",
    "import torch\nwith x as torch.nn.functional.relu: pass",
    "getattr(f, 'gi' + '_frame')",
    "class A:\n    x = (lambda s, n: getattr(s, f'{n}'))",
    PRELUDE + "    def attr(self, n): return getattr(self, f'f_{n}')\nx = A.attr(g(), 'builtins')['exec']",
    PRELUDE + "    def frame(self): return getattr(self, f\"gi_{'frame'}\")\nA.frame(g())",
    PRELUDE + "def d(self): return self.__dict__\nd(warnings.catch_warnings()._module)['__builtins__']['exec']",
    PRELUDE + "def put(self, n, v): setattr(self, n, v)\nput(nn.Linear, 'forward', print)",
]
ORDINARY = '''
from __future__ import annotations
import copy, logging, math, warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from enum import Enum, auto
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any, Optional
import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

try:
    from torch.nn import RMSNorm
except ImportError:
    RMSNorm = None

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
        self.options = dict(kwargs)
        super().__init__(**kwargs)

class Mixed(ABC):
    @abstractmethod
    def width(self) -> int: ...

class Kind(Enum):
    A = auto()

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
        warnings.warn("careful {}".format(type(self)))
        assert type(self.drop) is float and isinstance(self, (type(self), nn.Module)), f"{type(self)}"
        self.other = self.__class__(config) if type(self) in () else type(self)(config) if kwargs else None
        self.half = self._width = config.d_model // 2
        self.head = getattr(self, "layer_" + str(0)) or getattr(self, "layer_%d" % 0)
        self.last = getattr(self, "layer_{}".format(1), None)
        self.head.weight = self.layer_0.weight
        setattr(self.head, "bias", None)
        for p in self.parameters():
            p.data.normal_(0, 0.02 / math.sqrt(self._width))
        nn.init._calculate_fan_in_and_fan_out(self.head.weight)
        if type(self.scale) is str:
            raise TypeError("no number", type(self.scale))
        np.random.permutation(4)
        self._attn_implementation = config._attn_implementation

def timed(function):
    @wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

@torch.compile
def fused(x, kind: type = int): return x.to(torch.float32).type_as(x)

class Rest(nn.Module):
    @torch.compile(mode="reduce-overhead")
    def run(self, x): return x

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


def test_a_loader_without_workers_is_harmless() -> None:
    """Only workers start processes, and that is what the report says."""
    quiet = "def run(d: DataLoader): return DataLoader(d, 2, True, num_workers=0, pin_memory=True)\n"
    own = "class A:\n    def __init__(self, n): self.num_workers = n\n"
    assert audit({"model.py": LOADER + quiet + own}).harmless
    (concern,) = audit({"model.py": LOADER + "def run(d): return DataLoader(d, num_workers=2)"}).concerns
    assert concern.category == "process" and "may start processes" in concern.what


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
