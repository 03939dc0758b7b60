"""What the audit lets pass and what it does not; every list here is data.

Modules are refused unless listed. Within a listed module everything passes except what is named here, what is private,
and whatever turns out to be another module that is not listed.
"""

# Modules that model code may import. A trailing ".*" admits the submodules too.
ALLOWED_MODULES = (
    "__future__",
    "abc",
    "bisect",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "einops",
    "einops.layers.torch",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "inspect",
    "itertools",
    "json",
    "logging",
    "math",
    "numbers",
    "numpy",
    "numpy.fft",
    "numpy.linalg",
    "numpy.random",
    "numpy.typing",
    "random",
    "re",
    "statistics",
    "string",
    "time",
    "torch",
    "torch.amp",
    "torch.autograd",
    "torch.autograd.function",
    "torch.backends.*",
    "torch.cuda",
    "torch.cuda.amp",
    "torch.distributions.*",
    "torch.fft",
    "torch.func",
    "torch.jit",
    "torch.linalg",
    "torch.nested",
    "torch.nn.*",
    "torch.optim.*",
    "torch.random",
    "torch.sparse",
    "torch.special",
    "torch.utils",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "transformers",
    "transformers.activations",
    "transformers.configuration_utils",
    "transformers.modeling_outputs",
    "transformers.modeling_utils",
    "transformers.models.*",
    "types",
    "typing",
    "typing_extensions",
    "warnings",
)

# Where most of a module is off limits, only these names pass.
ONLY = {
    "inspect": {"signature", "Parameter", "Signature", "isclass", "isfunction"},
    "json": {"loads", "dumps", "JSONDecodeError"},
    "logging": {
        "getLogger", "Logger", "NullHandler", "debug", "info", "warning", "error", "DEBUG", "INFO", "WARNING", "ERROR",
        "CRITICAL",
    },
    "torch.jit": {"ignore", "unused", "export", "is_scripting", "is_tracing", "Final", "Ignored"},
    "torch.utils": {"checkpoint", "data"},
    "torch.utils.data": {"Dataset", "IterableDataset", "TensorDataset", "DataLoader", "Subset", "random_split"},
    "types": {"SimpleNamespace", "MappingProxyType", "NoneType"},
}  # fmt: skip

# Functions of allowed modules that read or write files, reach other code, or evaluate text.
DENIED_NAMES = {
    **{
        f"torch.{name}": "file"
        for name in (
            "load", "save", "from_file", "PyTorchFileReader", "PyTorchFileWriter", "import_ir_module",
            "import_ir_module_from_buffer", "FileCheck", "get_file_path", "ScriptModule", "ScriptFunction",
            "parse_ir", "parse_schema", "parse_type_comment", "merge_type_from_type_comment", "CompilationUnit",
        )
    },
    **{
        f"numpy.{name}": "file"
        for name in (
            "load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt", "fromfile", "fromregex",
            "memmap", "DataSource", "ctypeslib", "f2py", "distutils", "lib", "testing", "compat", "show_config",
        )
    },
    "typing.get_type_hints": "dynamic code",
    "typing.ForwardRef": "dynamic code",
    "typing_extensions.get_type_hints": "dynamic code",
    "typing_extensions.ForwardRef": "dynamic code",
    "typing_extensions.evaluate_forward_ref": "dynamic code",
    "dataclasses.make_dataclass": "dynamic code",
    "contextlib.chdir": "file",
    "torch.autograd.profiler": "file",
    "warnings.warn_explicit": "dynamic code",
    "transformers.pipeline": "network",
}  # fmt: skip

# Built-in functions that are refused wherever they are mentioned, called or not.
DENIED_BUILTINS = {
    "eval": "dynamic code",
    "exec": "dynamic code",
    "compile": "dynamic code",
    "__import__": "dynamic code",
    "globals": "dynamic code",
    "locals": "dynamic code",
    "vars": "dynamic code",
    "breakpoint": "process",
    "exit": "process",
    "quit": "process",
    "open": "file",
    "input": "process",
    "help": "process",
    "copyright": "file",
    "credits": "file",
    "license": "file",
}

# Attributes that are refused on any value, because they lead out of model code.
DENIED_ATTRIBUTES = {
    **dict.fromkeys(
        (
            "os", "sys", "subprocess", "builtins", "importlib", "ctypes", "ctypeslib", "pickle", "socket", "shutil",
            "modules", "meta_path", "multiprocessing", "cpp_extension", "f_globals", "f_locals", "f_builtins", "f_back",
            "gi_frame", "cr_frame", "ag_frame", "gi_code", "cr_code", "ag_code", "tb_frame", "tb_next", "func_globals",
            "func_code", "mro", "attrgetter", "methodcaller",
        ),
        "dynamic code",
    ),
    **dict.fromkeys(
        (
            "tofile", "fromfile", "from_file", "memmap", "dump", "dumps_to", "write_text", "write_bytes", "read_text",
            "read_bytes", "unlink", "rmdir", "rmtree", "makedirs", "save_pretrained", "savez", "loadtxt", "savetxt",
            "genfromtxt",
        ),
        "file",
    ),
    **dict.fromkeys(
        ("from_pretrained", "push_to_hub", "load_state_dict_from_url", "urlopen", "urlretrieve"), "network"
    ),
    **dict.fromkeys(("system", "popen", "Popen", "execv", "execve", "fork", "check_output"), "process"),
    **dict.fromkeys(("load_library", "load_inline", "unpickle", "Unpickler"), "dynamic code"),
}  # fmt: skip
# Every nn.Module has a method modules(); only as a method call does it pass.
METHOD_NAMES = {"modules"}

# Double-underscore names that ordinary classes mention; all others lead to the interpreter's internals.
ALLOWED_DUNDERS = {
    "__init__", "__post_init__", "__new__", "__name__", "__qualname__", "__module__", "__doc__", "__class__", "__len__",
    "__getitem__", "__setitem__", "__delitem__", "__iter__", "__next__", "__contains__", "__call__", "__repr__",
    "__str__", "__eq__", "__ne__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__",
    "__mul__", "__rmul__", "__truediv__", "__matmul__", "__neg__", "__bool__", "__int__", "__float__", "__enter__",
    "__exit__", "__all__", "__version__", "__author__", "__file__", "__slots__", "__version_info__", "__constants__",
    "__annotations__", "__copy__", "__deepcopy__", "__dataclass_fields__", "__post_init_post_parse__", "__license__",
    "__jit_unused_properties__", "__jit_ignored_attributes__", "__torch_function__",
}  # fmt: skip
# They set or read one attribute by name; fine on super() and object, which cannot reach a module.
SUPER_DUNDERS = {"__setattr__", "__getattr__", "__delattr__", "__init_subclass__", "__getstate__", "__setstate__"}
ALLOWED_PRIVATE = {"torch.__version__", "numpy.__version__", "transformers.__version__", "einops.__version__"}


def module_allowed(name: str) -> bool:
    """Say whether model code may import the module of this dotted name."""
    return name in ALLOWED_MODULES or any(
        name == pattern[:-2] or name.startswith(pattern[:-1]) for pattern in ALLOWED_MODULES if pattern.endswith(".*")
    )
