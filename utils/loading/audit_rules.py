"""What the audit lets pass and what it does not; every list here is data.

Modules are refused unless listed. Within a listed module everything passes except what is named here, what is private,
and whatever turns out to be another module that is not listed.
"""

import re
from dataclasses import dataclass

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
    "torch.compiler",
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
    "inspect": {"signature", "Parameter", "isclass", "isfunction"},
    "abc": {"ABC", "ABCMeta", "abstractmethod", "abstractproperty", "abstractclassmethod", "abstractstaticmethod"},
    "contextlib": {"contextmanager", "nullcontext", "suppress", "ExitStack", "AbstractContextManager", "closing"},
    "copy": {"copy", "deepcopy"},
    "dataclasses": {"dataclass", "field", "asdict", "astuple", "replace", "is_dataclass", "KW_ONLY", "InitVar"},
    "einops": {
        "rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "asnumpy", "parse_shape", "layers", "__version__",
    },
    "enum": {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag", "auto", "unique"},
    "functools": {
        "partial", "partialmethod", "lru_cache", "cache", "wraps", "reduce", "cached_property", "total_ordering",
        "cmp_to_key",
    },
    "json": {"loads", "dumps", "JSONDecodeError"},
    "logging": {
        "getLogger", "Logger", "NullHandler", "debug", "info", "warning", "error", "DEBUG", "INFO", "WARNING", "ERROR",
        "CRITICAL",
    },
    "torch.backends": {"cuda", "cudnn", "mps", "mkldnn", "mkl", "openmp", "cpu", "opt_einsum"},
    "torch.compiler": {"is_compiling", "is_dynamo_compiling", "is_exporting"},
    "torch.jit": {"ignore", "unused", "export", "is_scripting", "is_tracing", "Final", "Ignored"},
    "torch.utils": {"checkpoint", "data"},
    "torch.utils.data": {"Dataset", "IterableDataset", "TensorDataset", "DataLoader", "Subset", "random_split"},
    "transformers.activations": {"ACT2FN", "ACT2CLS", "get_activation"},
    "transformers.modeling_utils": {"PreTrainedModel", "ALL_ATTENTION_FUNCTIONS"},
    "types": {"SimpleNamespace", "MappingProxyType", "NoneType"},
    "warnings": {"warn", "filterwarnings", "simplefilter", "catch_warnings"},
}  # fmt: skip

# What passes elsewhere in transformers: configs, models, their outputs and activations. Tokenizers, trainers and the
# Auto classes read files, write them, or download.
TRANSFORMERS = re.compile(
    r"(?!Auto|TF|Flax)(\w+Config|\w+Model|\w+For[A-Z]\w+|\w+LMHead\w*|\w+Output\w*|\w*Activation|\w+GELU"
    r"|ACT2FN|activations|configuration_utils|modeling_outputs|modeling_utils|models|__version__)"
)

# Modules whose classes and functions are refused even where a listed module offers them under its own name.
DENIED_HOMES = (
    "torch._dynamo", "torch._inductor", "torch.autograd.profiler", "torch.export", "torch.fx", "torch.hub",
    "torch.library", "torch.multiprocessing", "torch.onnx", "torch.package", "torch.profiler", "torch.serialization",
    "torch.utils.cpp_extension", "logging.config", "logging.handlers",
)  # fmt: skip
# Modules written in C that stand behind the listed ones.
PRIVATE_HOMES = {
    "_abc", "_bisect", "_collections", "_collections_abc", "_functools", "_heapq", "_json", "_operator", "_random",
    "_statistics", "_warnings", "_weakrefset",
}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """How a function that can also do harm may be used."""

    positional: int = 0
    """Most positional arguments."""
    keywords: frozenset[str] = frozenset()
    """Keywords that pass; empty for any."""
    bare: bool = False
    """Whether it may decorate without being called."""
    place: str = ""
    """"decorator", "class" (value of an annotated class variable), "metaclass", or nothing for anywhere."""
    unset: frozenset[str] = frozenset()
    """Keywords that pass only as the constants 0 and None."""
    otherwise: tuple[str, str] | None = None
    """Category and words for any other use; by default an unusual way of using it is dynamic code."""


# dataclass and signature can evaluate text, wraps copies attributes by name, compile hands code to a backend.
LIMITED = {
    "abc.ABCMeta": Limit(place="metaclass"),
    "dataclasses.dataclass": Limit(bare=True, place="decorator"),
    "dataclasses.field": Limit(place="class"),
    "functools.wraps": Limit(1, frozenset({"wrapped"})),
    "inspect.signature": Limit(1, frozenset({"obj"})),
    "torch.compile": Limit(1, frozenset({"mode", "fullgraph", "dynamic", "disable"}), bare=True),
}
# With workers a loader starts processes; its first five arguments do not say how many.
LOADER = Limit(
    5,
    unset=frozenset({"num_workers", "multiprocessing_context"}),
    otherwise=("process", "a DataLoader that may start processes (num_workers other than 0)"),
)
LIMITED["torch.utils.data.dataloader.DataLoader"] = LOADER
# Where arrays of numpy are in reach, nothing may set an attribute whose name cannot be seen: an object that answers
# to `__array_interface__` opens the memory of the process.
LIMITED_WITH_NUMPY = {
    "types.SimpleNamespace": Limit(),
    "torch.nn.modules.container.ParameterDict": Limit(),
}
NUMPY_ATTRIBUTES = {"numpy", "np", "asnumpy"}
LIMITED_METHODS = {"compile": LIMITED["torch.compile"]}
ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None}

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
            "memmap", "DataSource", "source", "info", "lookfor", "safe_eval", "recfromcsv", "recfromtxt", "ctypeslib",
            "f2py", "distutils", "lib", "testing", "compat", "show_config", "test", "random.test", "fft.test",
            "linalg.test",
        )
    },
    "string.Formatter": "dynamic code",
    "random.SystemRandom": "process",
    "typing.get_args": "dynamic code",
    "typing_extensions.get_args": "dynamic code",
    "typing.get_type_hints": "dynamic code",
    "typing.ForwardRef": "dynamic code",
    "typing_extensions.get_type_hints": "dynamic code",
    "typing_extensions.ForwardRef": "dynamic code",
    "typing_extensions.evaluate_forward_ref": "dynamic code",
    "torch.autograd.profiler": "file",
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
    "dir": "dynamic code",
    "memoryview": "dynamic code",
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
            "func_code", "mro", "attrgetter", "methodcaller", "inspect", "linecache", "runpy", "pkgutil",
            "threading", "tempfile", "pathlib", "copyreg", "posix", "ag_await",
            "cr_await", "cr_origin", "gi_yieldfrom", "f_code", "f_lasti", "f_trace", "f_lineno", "tb_lasti",
            "tb_lineno", "handlers", "addHandler", "loggerDict", "lastResort", "vformat", "get_field",
            "get_value", "format_map", "get_type_hints", "singledispatch",
            "_module", "_os", "_sys", "_io", "_evaluate", "_getframe", "_current_frames", "_thread", "_eval_type",
            "set_attn_implementation", "register_for_auto_class", "makeRecord", "showwarning",
            # An AttributeError carries the module that lacked the attribute.
            "obj", "register_module_forward_hook", "register_module_forward_pre_hook", "load_custom_generate",
            "register_module_full_backward_hook", "register_module_full_backward_pre_hook",
            "register_module_backward_hook", "register_module_buffer_registration_hook",
            "register_module_module_registration_hook", "register_module_parameter_registration_hook",
            "CUDAPluggableAllocator", "change_current_allocator", "cudart",
        ),
        "dynamic code",
    ),
    **dict.fromkeys(
        (
            "tofile", "fromfile", "from_file", "memmap", "dump", "dumps_to", "write_text", "write_bytes", "read_text",
            "read_bytes", "unlink", "rmdir", "rmtree", "makedirs", "save_pretrained", "savez", "loadtxt", "savetxt",
            "genfromtxt", "fromregex", "to_json_file", "from_json_file", "save_to_json", "load_from_json",
            "save_vocabulary", "save_model", "load_adapter", "save_adapter", "share_memory", "share_memory_",
            "export_chrome_trace", "export_stacks", "FileHandler", "RotatingFileHandler", "basicConfig", "fileConfig",
            "dictConfig", "savez_compressed", "DataSource", "_dict_from_json_file", "load_tf_weights",
        ),
        "file",
    ),
    **dict.fromkeys(
        (
            "from_pretrained", "push_to_hub", "get_config_dict", "_get_config_dict", "load_state_dict_from_url",
            "urlopen", "urlretrieve",
        ),
        "network",
    ),
    **dict.fromkeys(("system", "popen", "Popen", "execv", "execve", "fork", "check_output", "_exit"), "process"),
    **dict.fromkeys(("load_library", "load_inline", "unpickle", "Unpickler"), "dynamic code"),
}  # fmt: skip
# Refused on any value unless the model's own source defines an attribute of that name.
DENIED_UNLESS_OWN = {
    **dict.fromkeys(("load", "save", "open", "raw", "stream", "stdout", "stderr"), "file"),
    **dict.fromkeys(("gc", "io", "nt", "operator", "manager"), "dynamic code"),
}
# Private attributes that models share with their base classes; others pass where the model's own source defines them.
ALLOWED_PRIVATE_ATTRIBUTES = {
    "_modules", "_parameters", "_buffers", "_init_weights", "_is_hf_initialized", "_attn_implementation", "_version",
    "_load_from_state_dict", "_register_load_state_dict_pre_hook", "_register_state_dict_hook", "_replace", "_asdict",
    "_fields", "_gradient_checkpointing_func", "_backward_compatibility_gradient_checkpointing",
    "_non_persistent_buffers_set", "_no_split_modules", "_tied_weights_keys", "_get_name", "_from_config",
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
    "__copy__", "__deepcopy__", "__post_init_post_parse__", "__license__",
    "__jit_unused_properties__", "__jit_ignored_attributes__", "__torch_function__",
}  # fmt: skip
# They set or read one attribute by name; fine on super() and object, which cannot reach a module.
SUPER_DUNDERS = {"__setattr__", "__getattr__", "__delattr__", "__init_subclass__"}
SHOWN_DUNDERS = {"__name__", "__qualname__", "__module__", "__doc__"}
# Methods that a class may define; the others steer pickle, numpy's memory access or attribute look-up.
DEFINABLE_DUNDERS = ALLOWED_DUNDERS | SUPER_DUNDERS | {
    "__getstate__", "__setstate__", "__get__", "__set__", "__delete__", "__set_name__", "__class_getitem__",
    "__index__", "__pow__", "__mod__", "__floordiv__", "__rsub__", "__rtruediv__", "__rmatmul__", "__iadd__",
    "__isub__", "__imul__", "__itruediv__", "__and__", "__or__", "__xor__", "__invert__", "__pos__",
    "__abs__", "__round__", "__format__", "__missing__", "__reversed__", "__del__", "__prepare_scriptable__",
    "__extra_repr__", "__rpow__", "__radd__", "__rfloordiv__", "__rmod__", "__lshift__", "__rshift__",
    "__length_hint__", "__bytes__", "__complex__", "__aenter__", "__aexit__", "__await__", "__aiter__",
    "__anext__", "__getnewargs__",
}  # fmt: skip
# Wherever they occur in a text, even in pieces of one that is put together later.
DENIED_WORDS = (
    "__globals__", "__builtins__", "__subclasses__", "__getattribute__", "__import__", "__loader__", "__code__",
    "__closure__", "__reduce", "__mro__", "__bases__", "__base__", "__annotations__", "__dataclass_fields__",
    "__array_interface__",
)  # fmt: skip
# Arguments that make transformers run code from elsewhere, as texts that are put into a dict of arguments.
DENIED_ARGUMENTS = {"trust_remote_code", "custom_generate", "attn_implementation", "eval_str", "use_kernels"}
# A computed name must not begin like one of these.
UNCLEAR = {
    *NUMPY_ATTRIBUTES,
    *DENIED_ATTRIBUTES,
    *DENIED_UNLESS_OWN,
    *METHOD_NAMES,
    *DENIED_BUILTINS,
    "forward",
    "func_",
}
ALLOWED_PRIVATE = {
    "torch.__version__", "numpy.__version__", "transformers.__version__", "einops.__version__",
    "torch.nn.init._calculate_fan_in_and_fan_out", "torch.nn.init._calculate_correct_fan",
    "torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.conv._ConvNd", "torch.nn.modules.utils._pair",
    "torch.nn.common_types._size_1_t", "torch.nn.common_types._size_2_t", "torch.nn.common_types._size_3_t",
    "torch.nn.common_types._size_any_t", "torch.optim.lr_scheduler._LRScheduler",
}  # fmt: skip


def module_allowed(name: str) -> bool:
    """Say whether model code may import the module of this dotted name."""
    return name in ALLOWED_MODULES or any(
        name == pattern[:-2] or name.startswith(pattern[:-1]) for pattern in ALLOWED_MODULES if pattern.endswith(".*")
    )
