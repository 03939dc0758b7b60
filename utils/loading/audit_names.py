"""What the names in a source text stand for, found out without executing it."""

import ast
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.loading import audit_rules as rules

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sibling(module: str, files: set[str]) -> str | None:
    """Return the dotted name of a module of the model itself, marked with a leading dot, or None."""
    top, _, rest = module.partition(".")
    return f".{module}" if f"{top}.py" in files and not rest else None


def imported_names(tree: ast.Module, files: set[str]) -> dict[str, set[str]]:
    """Map every name that an import anywhere in a file binds to the dotted names it may stand for.

    Names of the model's own files start with a dot. A plain assignment of a dotted module name, such as
    ``nn = torch.nn``, binds a name in the same way.
    """
    names: dict[str, set[str]] = {}

    def bind(name: str, target: str) -> None:
        names.setdefault(name, set()).add(target)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.asname else alias.name.split(".")[0]
                # `import torch.nn` binds torch itself, even beside a file torch.py.
                bind(alias.asname or target, sibling(alias.name, files) or target)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            base = "." + module if node.level else (sibling(module, files) or module)
            for alias in node.names:
                if alias.name != "*":
                    bind(alias.asname or alias.name, f"{base.rstrip('.')}.{alias.name}")
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            left, chain = statement.targets[0], dotted(statement.value)
            if isinstance(left, ast.Name) and len(chain) > 1 and chain[0] in names:
                for root in tuple(names[chain[0]]):
                    bind(left.id, ".".join((root, *chain[1:])))
    return names


def dotted(node: ast.expr) -> tuple[str, ...]:
    """Return ``("a", "b", "c")`` for the expression ``a.b.c``, and nothing for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


def local_names(scope: ast.AST) -> tuple[set[str], set[str]]:
    """Tell which names a function or class body makes its own, and which it takes from elsewhere.

    Names of nested functions, classes and comprehensions are theirs. What a class body stores is not seen by its
    methods, so it counts as nobody's own.

    Returns:
        Names that are certainly local (arguments and names stored to), and names that are certainly not (imported or
        declared ``global`` or ``nonlocal``).
    """
    local: set[str] = set()
    if isinstance(scope, FUNCTIONS):
        arguments = scope.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        local = {argument.arg for argument in every if argument is not None}
    shared: set[str] = set()
    body = scope.body  # type: ignore[attr-defined]
    waiting: list[ast.AST] = list(body) if isinstance(body, list) else [body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Global | ast.Nonlocal):
            shared.update(node.names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            shared.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and isinstance(scope, FUNCTIONS):
            local.add(node.id)
        elif isinstance(node, (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef)):
            continue
        waiting += ast.iter_child_nodes(node)
    return local - shared, shared


def refused(name: str) -> str | None:
    """Return the category under which a dotted name of another package is refused, or None when it passes."""
    parts = name.split(".")
    if name in rules.ALLOWED_PRIVATE:
        return None
    for end in range(1, len(parts)):
        # The module that a prefix leads to decides, as `torch.nn.functional.torch` is torch.
        prefix, part = ".".join(parts[:end]), parts[end]
        real_prefix, in_module = resolve(prefix)
        prefix = real_prefix if in_module else prefix
        dotted = f"{prefix}.{part}"
        if dotted in rules.DENIED_NAMES:
            return rules.DENIED_NAMES[dotted]
        if part in rules.DENIED_ATTRIBUTES:
            return rules.DENIED_ATTRIBUTES[part]
        if part.startswith("_") and (in_module or (part.startswith("__") and part not in rules.ALLOWED_DUNDERS)):
            return "dynamic code"
        if part.startswith("_") and not part.startswith("__") and part not in rules.ALLOWED_PRIVATE_ATTRIBUTES:
            return "dynamic code"
        if in_module and prefix in rules.ONLY and part not in rules.ONLY[prefix]:
            return "dynamic code"
        if in_module and prefix.startswith("transformers") and not _passes_in_transformers(prefix, dotted, part):
            return "network"
    real, is_module = resolve(name)
    # A name that leads through a listed module to another module counts as an import of that one.
    for end in range(1, len(parts) + 1):
        step, step_is_module = resolve(".".join(parts[:end]))
        if step_is_module and not rules.module_allowed(step) and not _is_parent(step):
            return "import"
    if not is_module and real:
        # The same class or function under another name, as `torch.nn.modules.module.wraps` is functools.wraps.
        original = origin(name)
        home_rules = rules.ONLY.get(real)
        if original in rules.DENIED_NAMES:
            return rules.DENIED_NAMES[original]
        if not _home_allowed(real):
            return "import"
        if home_rules is not None and original and original[len(real) + 1 :].split(".")[0] not in home_rules:
            return "dynamic code"
    return None


def _passes_in_transformers(prefix: str, dotted: str, part: str) -> bool:
    if prefix in rules.ONLY:
        return True
    if resolve(dotted)[1] and prefix.startswith("transformers.models"):
        leaf = prefix.split(".")
        return len(leaf) == 2 or part.startswith(("modeling_", "configuration_"))
    return rules.TRANSFORMERS.fullmatch(part) is not None


def origin(name: str) -> str:
    """Return the dotted name under which a class or function was defined, or "" when it cannot be told."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        home, is_module = resolve(".".join(parts[:end]))
        if is_module:
            return ""
        if home:
            container = resolve_value(".".join(parts[:end]))
            qualified = getattr(container, "__qualname__", None)
            return f"{home}.{qualified}" if isinstance(qualified, str) else ""
    return ""


def resolve_value(name: str) -> Any:
    """Return what a dotted name stands for in the modules in memory, or None; dictionary look-up alone."""
    first, *parts = name.split(".")
    current: Any = sys.modules.get(first)
    for part in parts:
        if not isinstance(current, ModuleType):
            return None
        current = vars(current).get(part, sys.modules.get(f"{current.__name__}.{part}"))
    return current


def _is_parent(name: str) -> bool:
    return any(allowed.startswith(name + ".") for allowed in rules.ALLOWED_MODULES)


def _home_allowed(home: str) -> bool:
    """Whether the module that defines a class or function belongs to a package that model code may use."""
    if any(home == refused or home.startswith(refused + ".") for refused in rules.DENIED_HOMES):
        return False
    top = home.split(".")[0]
    return (
        top in {name.split(".")[0] for name in rules.ALLOWED_MODULES}
        or home in rules.PRIVATE_HOMES
        or top == "builtins"
    )


def resolve(name: str) -> tuple[str, bool]:
    """Follow a dotted name through the modules in memory, by look-up in their dictionaries.

    Returns:
        For a module its real name and True; for anything else the name of the module that defines it, or "" when that
        is unknown, and False.
    """
    parts = name.split(".")
    if parts[0] not in sys.modules:
        # Not in memory: a listed module is what it says, and so is a prefix of one. A name in capitals is a class.
        if parts[-1][:1].isupper():
            return "", False
        return (name, True) if rules.module_allowed(name) or _is_parent(name) or len(parts) == 1 else ("", False)
    current: Any = sys.modules[parts[0]]
    for position, part in enumerate(parts[1:], 2):
        if not isinstance(current, ModuleType):
            return "", False
        dotted = f"{current.__name__}.{part}"
        if part in vars(current):
            current = vars(current)[part]
        elif dotted in sys.modules:
            current = sys.modules[dotted]
        elif _exists(dotted):
            # What a module that is not in memory contains is unknown, short of its submodules.
            whole = ".".join((dotted, *parts[position:]))
            listed = rules.module_allowed(whole) and not parts[-1][:1].isupper()
            return (whole, True) if whole == dotted or listed else ("", False)
        else:
            return "", False
    if isinstance(current, ModuleType):
        return str(vars(current).get("__name__", name)), True
    home = getattr(current, "__module__", None) if isinstance(current, type) or callable(current) else None
    return (home if isinstance(home, str) else ""), False


def hides_module(name: str) -> bool:
    """Whether a file of this name stands before a module of Python or of an installed package."""
    if name in sys.stdlib_module_names or name in {allowed.split(".")[0] for allowed in rules.ALLOWED_MODULES}:
        return True
    if name == __name__.partition(".")[0]:
        # Seedbed's own package; a model may well have a file of that name, and cannot import the package.
        return False
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return importlib.machinery.PathFinder.find_spec(name, installed) is not None


def is_installed(module: str) -> bool:
    """Whether the package that a module belongs to can be found; nothing is executed by asking."""
    top = module.split(".")[0]
    return top in sys.modules or _exists(top)


def _exists(module: str) -> bool:
    """Whether a submodule exists that is not in memory; its parents are, so nothing is executed by asking."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False
