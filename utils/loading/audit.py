"""Read a model's code before it runs, and say what it would touch.

An audit is a reader's aid, not a sandbox. It parses the source and never executes it; it knows what harmless model code
is made of, and refuses to call anything else harmless. Code that hides its intent well enough can still get past any
reader of text: run a stranger's model where there is nothing to lose.

Four rules carry the weight. Modules are refused unless listed. A module may be used only as ``module.name``, never as
a value, so it cannot travel to where its attributes are out of sight. Every dotted name is followed through the
modules already in memory, by dictionary look-up alone, so that ``torch.nn.functional.importlib`` is seen to be
importlib. And attributes that lead out of model code are refused on any value, whatever it is called, so an attribute
whose name is computed must begin in a way that none of these does.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from torch import Tensor, nn

from utils.loading import audit_rules as rules
from utils.loading.audit_attributes import plain_constructors, reaches_numpy
from utils.loading.audit_context import Context, constant_start, definitions, is_clear, is_main_guard, text_concerns
from utils.loading.audit_names import (
    COMPREHENSIONS,
    FUNCTIONS,
    dotted,
    hides_module,
    imported_names,
    is_installed,
    local_names,
    refused,
    resolve,
)
from utils.loading.audit_names import origin as find_origin
from utils.loading.audit_names import sibling as find_sibling
from utils.loading.audit_report import AuditItem, AuditReport
from utils.loading.source import MODEL_FILE
from utils.runtime.errors import InstantiationError


def parse(text: str, file: str) -> ast.Module:
    """Parse Python source.

    Raises:
        InstantiationError: It is not Python; the message has the line.
    """
    try:
        return ast.parse(text, file)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise InstantiationError(
            f"{file}, line {error.lineno or 1}: {error.msg}" + (f": {line[:120]!r}." if line else "."),
            "Expected Python source.",
            "Correct that line, or export the model again.",
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise InstantiationError(
            f"{file} cannot be parsed: {error or type(error).__name__}.", "Expected Python source."
        ) from None


def audit(files: Mapping[str, str], entry: str = MODEL_FILE) -> AuditReport:
    """Audit the Python files of a model without executing them.

    Args:
        files: Source text by file name; files that are not Python are passed over.
        entry: What its author calls ``model.py``.

    Raises:
        InstantiationError: A file is not Python.
    """
    sources = {name: text for name, text in files.items() if name.endswith(".py")}
    trees = {name: parse(text, entry if name == MODEL_FILE else name) for name, text in sources.items()}
    bindings = {name.removesuffix(".py"): imported_names(tree, set(trees)) for name, tree in trees.items()}
    items: list[AuditItem] = []
    defined = set().union(*(definitions(tree) for tree in trees.values()))
    numpy = reaches_numpy(trees, bindings)
    plain = set() if numpy else plain_constructors(trees, next(iter(bindings.values()), {}))
    for name, tree in trees.items():
        reader = _Reader(name, sources[name], bindings, defined, Context(tree), numpy, plain)
        if name != MODEL_FILE and hides_module(name.removesuffix(".py")):
            reader.note(tree, "import", f"this file stands before the module {name.removesuffix('.py')}: rename it")
        reader.read(tree)
        items += (replace(item, file=entry if name == MODEL_FILE else name) for item in reader.items)
    items.sort(key=lambda item: (item.file, item.line))
    return AuditReport(tuple(dict.fromkeys(items)), sum(len(text.splitlines()) for text in sources.values()))


class _Reader:
    """Walks one file and notes what it touches."""

    def __init__(
        self,
        file: str,
        text: str,
        bindings: Mapping[str, Mapping[str, set[str]]],
        defined: set[str],
        context: Context,
        numpy: bool,
        plain: set[int],
    ) -> None:
        self.file, self.lines, self.bindings = file, text.splitlines() or [""], bindings
        self.defined, self.context, self.numpy, self.plain = defined, context, numpy, plain
        self.names = bindings[file.removesuffix(".py")]
        self.scopes: list[tuple[set[str], set[str]]] = []
        self.items: list[AuditItem] = []
        self.aliases: set[int] = set()
        self.top: set[int] = set()

    def note(self, node: ast.AST, category: str, what: str, harmless: bool = False, *, missing: bool = False) -> None:
        line = getattr(node, "lineno", 1)
        source = self.lines[line - 1] if line <= len(self.lines) else ""
        self.items.append(AuditItem(category, self.file, line, source, what, harmless, missing))

    def read(self, tree: ast.Module) -> None:
        self.top = {id(statement) for statement in tree.body}
        # The body of `if __name__ == "__main__":` never runs in a model that is loaded, unless the name is tampered
        # with, which a mention of it other than reading gives away.
        bound = {
            name
            for node in ast.walk(tree)
            for name in (getattr(node, "arg", None), getattr(node, "name", None), getattr(node, "asname", None))
        } | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        for statement in tree.body:
            if "__name__" not in bound and is_main_guard(statement):
                for alternative in statement.orelse:  # type: ignore[attr-defined]
                    self.visit(alternative)
            else:
                self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        """Visit a node, its own rule first, then its children in the scope they belong to."""
        handler = getattr(self, f"on_{type(node).__name__.lower()}", None)
        if handler is not None and handler(node):
            return
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            # Decorators, bases, defaults and annotations are evaluated outside.
            body = node.body if isinstance(node.body, list) else [node.body]
            for child in ast.iter_child_nodes(node):
                if child not in body:
                    self.visit(child)
            self.within(local_names(node), body)
        elif isinstance(node, COMPREHENSIONS):
            targets = {n.id for g in node.generators for n in ast.walk(g.target) if _is_stored(n)}
            self.visit(node.generators[0].iter)
            first = node.generators[0].iter
            self.within((targets, set()), list(ast.iter_child_nodes(node)), skip=first)
        else:
            for child in ast.iter_child_nodes(node):
                self.visit(child)

    def within(self, names: tuple[set[str], set[str]], nodes: list[Any], skip: ast.AST | None = None) -> None:
        self.scopes.append(names)
        for node in nodes:
            if isinstance(node, ast.comprehension):
                for child in ast.iter_child_nodes(node):
                    if child is not skip:
                        self.visit(child)
            else:
                self.visit(node)
        self.scopes.pop()

    def is_local(self, name: str) -> bool:
        for local, shared in reversed(self.scopes):
            if name in local or name in shared:
                return name in local
        return False

    def note_import(self, node: ast.Import | ast.ImportFrom, module: str, passes: bool) -> None:
        """Note an import, telling a package that nobody has judged from a module known to reach further."""
        if passes or module.split(".")[0] in sys.stdlib_module_names or rules.module_allowed(module.split(".")[0]):
            self.note(node, "import", module, passes)
        else:
            missing = not is_installed(module)
            what = f"{module} is not known to be harmless" + (", and is not installed" if missing else "")
            self.note(node, "unknown import", what, missing=missing)

    def on_import(self, node: ast.Import) -> None:
        self.check_place(node)
        for alias in node.names:
            own = find_sibling(alias.name, {f"{name}.py" for name in self.bindings}) is not None
            self.note_import(
                node, alias.name, own or (rules.module_allowed(alias.name) and refused(alias.name) is None)
            )

    def check_place(self, node: ast.Import | ast.ImportFrom) -> None:
        """Check that an import does not make a module an attribute of a class, through which it could travel."""
        scope = self.context.parent(node)
        while scope is not None and not isinstance(scope, FUNCTIONS):
            if isinstance(scope, ast.ClassDef):
                self.note(node, "dynamic code", "an import in the body of a class")
                return
            scope = self.context.parent(scope)

    def on_importfrom(self, node: ast.ImportFrom) -> None:
        self.check_place(node)
        module = node.module or ""
        own = node.level > 0 or find_sibling(module, {f"{name}.py" for name in self.bindings}) is not None
        if any(alias.name == "*" for alias in node.names):
            self.note(node, "import", f"{module or '.'}.* (names that cannot be seen)")
            return
        if node.level > 1 or (node.level and module and module not in self.bindings):
            self.note(node, "import", f"{'.' * node.level}{module} outside the model's folder")
            return
        if own:
            self.note(node, "import", module or ".", True)
        elif not rules.module_allowed(module):
            self.note_import(node, module, False)
            return
        else:
            self.note(node, "import", module, True)
        for alias in node.names:
            base = "." + module if own else module
            target = f"{base.rstrip('.')}.{alias.name}"
            if (refusal := self.refusal(target)) is not None:
                self.note(node, *refusal)

    def on_name(self, node: ast.Name) -> None:
        if self.is_local(node.id):
            return
        if node.id.startswith("__") and node.id.endswith("__") and node.id not in rules.ALLOWED_DUNDERS:
            self.note(node, rules.DENIED_BUILTINS.get(node.id, "dynamic code"), node.id)
        elif node.id == "__name__" and not isinstance(node.ctx, ast.Load):
            self.note(node, "dynamic code", "changes __name__")
        elif not isinstance(node.ctx, ast.Load):
            if node.id in self.names and not self.is_fallback(node):
                self.note(node, "dynamic code", f"{node.id} is an import and something else")
        elif node.id in rules.DENIED_BUILTINS:
            self.note(node, rules.DENIED_BUILTINS[node.id], f"{node.id}()")
        elif node.id == "type" and not self.context.is_harmless_type_name(node):
            self.note(node, "dynamic code", "type as a value")
        elif node.id in ("getattr", "setattr", "delattr"):
            self.note(node, "dynamic code", f"{node.id} as a value")
        elif any(self.is_module(target) for target in self.names.get(node.id, ())):
            self.note(node, "dynamic code", f"the module {node.id} as a value")
        else:
            for target in sorted(self.names.get(node.id, ())):
                self.check_limits(node, target)

    def is_fallback(self, node: ast.Name) -> bool:
        """Whether an imported name is set to a constant or to what another import offers, as without a package."""
        parent = self.context.parent(node)
        if not isinstance(parent, ast.Assign) or len(parent.targets) != 1:
            return False
        value = parent.value
        chain = dotted(value)
        return isinstance(value, ast.Constant) or (len(chain) > 1 and id(parent) in self.top and chain[0] in self.names)

    def check_limits(self, node: ast.expr, target: str) -> None:
        """Check the uses of a function that is harmless in some of them only."""
        for name in sorted(self.own(target)):
            limits = rules.LIMITED | (rules.LIMITED_WITH_NUMPY if self.numpy else {})
            for known in {name, find_origin(name)} & limits.keys():
                if not self.context.is_limited_use(node, limits[known]):
                    self.note(node, *(limits[known].otherwise or ("dynamic code", f"{known} used in an unusual way")))
                    return

    def on_attribute(self, node: ast.Attribute) -> bool:
        chain = dotted(node)
        if not chain or chain[0] not in self.names or self.is_local(chain[0]):
            self.check_attribute(node, node.attr, node.value)
            if not isinstance(node.ctx, ast.Load):
                self.check_store(node, node.attr, node.value)
            return False
        for root in sorted(self.names[chain[0]]):
            target = ".".join((root, *chain[1:]))
            if (refusal := self.refusal(target)) is not None:
                self.note(node, *refusal)
            elif not isinstance(node.ctx, ast.Load) and not self.is_switch(node, target):
                self.note(node, "changes other code", f"assigns to {target}")
            elif isinstance(node.ctx, ast.Load) and self.is_module(target) and not self.is_alias(node):
                self.note(node, "dynamic code", f"the module {target} as a value")
            elif isinstance(node.ctx, ast.Load):
                self.check_limits(node, target)
                if node.attr == "__class__":
                    self.check_attribute(node, node.attr)
        return True

    def is_switch(self, node: ast.AST, target: str) -> bool:
        """Whether a constant is assigned to one of torch's switches."""
        parent = self.context.parent(node)
        return (
            target.startswith("torch.backends.")
            and isinstance(parent, ast.Assign | ast.AugAssign)
            and isinstance(parent.value, ast.Constant)
        )

    def on_subscript(self, node: ast.Subscript) -> None:
        chain = dotted(node.value)
        if not isinstance(node.ctx, ast.Load) and chain and chain[0] in self.names and not self.is_local(chain[0]):
            self.note(node, "changes other code", f"changes {'.'.join(chain)}")

    def check_store(self, node: ast.AST, name: str, value: ast.expr) -> None:
        """Check an assignment to an attribute, which on a class of torch would change every model."""
        method = callable(getattr(nn.Module, name, None)) or callable(getattr(Tensor, name, None))
        if name.startswith("_attn_implementation"):
            parent = self.context.parent(node)
            new = parent.value if isinstance(parent, ast.Assign) else None
            copied = isinstance(new, ast.Attribute) and new.attr == name
            if not copied and not (isinstance(new, ast.Constant) and new.value in rules.ATTENTION):
                self.note(node, "network", f".{name} can name code on the Hub")
        elif name == "num_workers" and not self.context.is_own(value):
            self.note(node, *(rules.LOADER.otherwise or ("process", name)))
        elif name.startswith("__") or name == "forward" or (method and not self.context.is_own(value)):
            self.note(node, "changes other code", f"assigns to .{name}")

    def is_alias(self, node: ast.Attribute) -> bool:
        """Whether a module's name stands on the right of a top-level assignment that `imported_names` follows."""
        return id(node) in self.aliases

    def on_assign(self, node: ast.Assign) -> None:
        chain = dotted(node.value)
        single = len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        if id(node) in self.top and single and len(chain) > 1 and node.targets[0].id in self.names:  # type: ignore[attr-defined]
            self.aliases.add(id(node.value))

    def check_attribute(self, node: ast.AST, name: str, value: ast.expr | None = None, called: bool = False) -> None:
        """Apply the rules that hold for an attribute of any value."""
        if name.startswith("__") and name.endswith("__"):
            on_super = (
                isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
            ) or (isinstance(value, ast.Name) and value.id == "object")
            if name not in rules.ALLOWED_DUNDERS and not (name in rules.SUPER_DUNDERS and on_super):
                self.note(node, "dynamic code", f".{name}")
            elif name == "__setattr__" and self.numpy:
                self.note(node, "dynamic code", f".{name}, which can set any name, beside numpy")
            elif name == "__class__" and not self.context.is_harmless_type(node):
                self.note(node, "dynamic code", ".__class__ as a value")
        elif name in rules.DENIED_ATTRIBUTES and not (called and name in rules.METHOD_NAMES):
            self.note(node, rules.DENIED_ATTRIBUTES[name], f".{name}")
        elif name in self.defined:
            return
        elif name in rules.DENIED_UNLESS_OWN:
            self.note(node, rules.DENIED_UNLESS_OWN[name], f".{name}")
        elif name.startswith("_") and name not in rules.ALLOWED_PRIVATE_ATTRIBUTES and name.strip("_"):
            self.note(node, "dynamic code", f".{name}, which is internal to something else")

    def on_call(self, node: ast.Call) -> bool:
        function = node.func
        self.check_keywords(node)
        if isinstance(function, ast.Name) and function.id == "type" and not self.is_local("type"):
            if not self.context.is_harmless_type(node):
                self.note(node, "dynamic code", "the type of a value as a value")
        elif isinstance(function, ast.Attribute) and function.attr == "format":
            text = function.value
            if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                self.note(node, "dynamic code", "format with a text that cannot be seen")
        if isinstance(function, ast.Name) and function.id in ("getattr", "setattr", "delattr"):
            if not self.is_local(function.id):
                self.check_named_access(node, function.id)
                return True
        elif isinstance(function, ast.Attribute) and function.attr in rules.METHOD_NAMES:
            chain = dotted(function)
            if not chain or chain[0] not in self.names or self.is_local(chain[0]):
                self.visit(function.value)
                for child in (*node.args, *node.keywords):
                    self.visit(child)
                return True
        return False

    def check_named_access(self, node: ast.Call, function: str) -> None:
        """Check ``getattr(value, name)`` and its relatives, then their arguments."""
        if len(node.args) < 2 or any(isinstance(argument, ast.Starred) for argument in node.args):
            self.note(node, "dynamic code", f"{function} with arguments that cannot be seen")
        else:
            value, name = node.args[0], node.args[1]
            chain = dotted(value)
            modules = () if not chain or self.is_local(chain[0]) else tuple(self.names.get(chain[0], ()))
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                if modules:
                    access = ast.Attribute(value, name.value, ast.Load() if function == "getattr" else ast.Store())
                    self.visit(ast.copy_location(access, node))
                else:
                    self.visit(value)
                    self.check_attribute(node, name.value, value)
                    if function != "getattr":
                        self.check_store(node, name.value, value)
                for concern in text_concerns(name.value):
                    self.note(node, "dynamic code", f"{concern} in a text")
            elif function == "setattr" and self.context.is_own(value) and self.context.function(node) in self.plain:
                pass
            elif modules or not is_clear(constant_start(name)):
                self.note(node, "dynamic code", f"{function} with a computed name")
            elif function != "getattr" and not self.context.is_own(value):
                self.note(node, "dynamic code", f"{function} with a computed name on something other than the model")
            if not modules and not isinstance(name, ast.Constant):
                self.visit(value)
                self.visit(name)
        for child in (*node.args[2:], *node.keywords):
            self.visit(child)

    def check_keywords(self, node: ast.Call) -> None:
        """Check arguments that turn a harmless call into one that writes, downloads or compiles."""
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "file" in keywords:
            self.note(node, "file", "file= of a call")
        if keywords.keys() & (rules.DENIED_ARGUMENTS - {"attn_implementation"}):
            self.note(node, "dynamic code", "an argument that runs other code")
        kind = keywords.get("attn_implementation")
        if kind is not None and not (isinstance(kind, ast.Constant) and kind.value in rules.ATTENTION):
            self.note(node, "network", "attn_implementation= can name code on the Hub")
        if isinstance(node.func, ast.Attribute) and node.func.attr in rules.LIMITED_METHODS:
            chain = dotted(node.func)
            if (not chain or chain[0] not in self.names) and not self.context.is_limited_use(
                node.func, rules.LIMITED_METHODS[node.func.attr]
            ):
                self.note(node, "dynamic code", f".{node.func.attr} used in an unusual way")

    def on_classdef(self, node: ast.ClassDef) -> None:
        self.check_definition(node, node.name)
        for keyword in node.keywords:
            if keyword.arg in (None, "metaclass"):
                chain = dotted(keyword.value)
                known = {".".join((root, *chain[1:])) for root in self.names.get(chain[0], ())} if chain else set()
                if known != {"abc.ABCMeta"}:
                    self.note(node, "dynamic code", "a metaclass")

    def on_functiondef(self, node: ast.FunctionDef) -> None:
        self.check_definition(node, node.name)

    def on_asyncfunctiondef(self, node: ast.AsyncFunctionDef) -> None:
        self.check_definition(node, node.name)

    def check_definition(self, node: ast.AST, name: str) -> None:
        if name.startswith("__") and name.endswith("__") and name not in rules.DEFINABLE_DUNDERS:
            self.note(node, "dynamic code", f"defines {name}")
        elif name == "__getattr__" and self.numpy:
            self.note(node, "dynamic code", f"defines {name}, which can answer to any name, beside numpy")

    def on_alias(self, node: ast.alias) -> None:
        self.check_definition(node, node.asname or "")

    def on_matchclass(self, node: ast.MatchClass) -> None:
        if node.patterns:
            # What they match is said by the class, in a list of names that may be computed.
            self.note(node, "dynamic code", "a class pattern without the names of its attributes")
        for name in node.kwd_attrs:
            self.check_attribute(node, name)

    def on_constant(self, node: ast.Constant) -> None:
        # Format strings such as "{0.__globals__}" reach attributes, and so do names that are looked up later.
        text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
        if isinstance(text, str):
            for concern in text_concerns(text):
                self.note(node, "dynamic code", f"{concern} in a text")
            if text in rules.DENIED_ARGUMENTS:
                self.note(node, "dynamic code", f"the argument {text} in a text")

    def own(self, target: str) -> set[str]:
        """Follow a dotted name that starts in one of the model's own files to what that file imported under it."""
        found, waiting, seen = set(), [target], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            parts = name.split(".")
            if parts[0] or len(parts) < 3:
                found.add(name)
                continue
            imported = self.bindings.get(parts[1], {}).get(parts[2])
            if imported is None:
                found.add(name)
            else:
                waiting += [".".join((origin, *parts[3:])) for origin in imported]
        return found

    def is_module(self, target: str) -> bool:
        """Whether a dotted name stands for a module."""
        return any(
            name.removeprefix(".") in self.bindings if name.startswith(".") else resolve(name)[1]
            for name in self.own(target)
        )

    def refusal(self, target: str) -> tuple[str, str] | None:
        """Return category and name of what a dotted name leads to if it is not allowed, else None."""
        for name in sorted(self.own(target)):
            parts = name.split(".")
            if not parts[0]:
                for part in parts[2:]:
                    if part in rules.DENIED_ATTRIBUTES:
                        return rules.DENIED_ATTRIBUTES[part], name.removeprefix(".")
                    if part.startswith("__") and part not in rules.ALLOWED_DUNDERS:
                        return "dynamic code", name.removeprefix(".")
                continue
            if (category := refused(name)) is not None:
                return category, name
        return None


def _is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
