"""Where in a file an expression stands, which decides whether it may stand there."""

import ast
import re
from collections.abc import Iterator

from utils.loading import audit_rules as rules
from utils.loading.audit_names import FUNCTIONS, local_names

_REGISTERS = {"register_buffer", "register_parameter", "add_module", "register_module"}
_SHOWS = {"isinstance", "issubclass", "print", "str", "repr", "id", "hash", "super"}
_SHOWING_METHODS = {"format", "get", "debug", "info", "warning", "error"}
_FIELD = re.compile(r"\{([^{}]*)\}")


def definitions(tree: ast.AST) -> set[str]:
    """Return the attribute names that a file itself defines, as methods, class variables or by assignment."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        if isinstance(node, ast.ClassDef):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _REGISTERS:
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def constant_start(name: ast.expr) -> str:
    """Return the text that a computed name is known to begin with, or nothing."""
    if isinstance(name, ast.Constant):
        return name.value if isinstance(name.value, str) else ""
    if isinstance(name, ast.JoinedStr):
        return constant_start(name.values[0]) if name.values else ""
    if isinstance(name, ast.BinOp) and isinstance(name.op, ast.Add):
        return constant_start(name.left)
    if isinstance(name, ast.BinOp) and isinstance(name.op, ast.Mod):
        return constant_start(name.left).split("%")[0]
    if isinstance(name, ast.Call) and isinstance(name.func, ast.Attribute) and name.func.attr == "format":
        return constant_start(name.func.value).split("{")[0]
    return ""


def is_clear(start: str) -> bool:
    """Whether no refused attribute can have a name that begins so, whatever follows."""
    return len(start) >= 3 and start[0].isalpha() and not any(name.startswith(start) for name in rules.UNCLEAR)


def text_concerns(text: str) -> Iterator[str]:
    """Yield the names in a text that lead into the interpreter when it is used as a name or as a format."""
    yield from (word for word in rules.DENIED_WORDS if word in text)
    for field in _FIELD.findall(text):
        for part in re.findall(r"\.(\w+)", field.split(":")[0].split("!")[0]):
            internal = part.startswith("_") and part not in rules.SHOWN_DUNDERS | {"__class__"}
            if internal or part in rules.DENIED_ATTRIBUTES:
                yield f".{part}"


def is_main_guard(node: ast.stmt) -> bool:
    """Whether a statement is ``if __name__ == "__main__":``."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare):
        return False
    test = node.test
    return (
        isinstance(test.left, ast.Name)
        and test.left.id == "__name__"
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value == "__main__"
    )


def _is_unset(value: ast.expr) -> bool:
    """Whether an argument is 0 or None, to be read off the source."""
    return isinstance(value, ast.Constant) and (value.value is None or value.value == 0)


class Context:
    """The parents of the nodes of one file."""

    def __init__(self, tree: ast.AST) -> None:
        """Note the parent of every node."""
        self.parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def parent(self, node: ast.AST) -> ast.AST | None:
        """Return the node that holds another."""
        return self.parents.get(id(node))

    def is_own(self, value: ast.AST | None) -> bool:
        """Whether a value is the first parameter of the method around it, whatever that is called."""
        if not isinstance(value, ast.Name):
            return False
        scope = self.parent(value)
        while scope is not None:
            if isinstance(scope, FUNCTIONS) and value.id in local_names(scope)[0]:
                break
            scope = self.parent(scope)
        if not isinstance(scope, ast.FunctionDef) or not isinstance(self.parent(scope), ast.ClassDef):
            return False
        first = [*scope.args.posonlyargs, *scope.args.args][:1]
        stored = any(isinstance(n, ast.Name) and n.id == value.id and not isinstance(n.ctx, ast.Load)
                     for n in ast.walk(scope))  # fmt: skip
        return bool(first) and first[0].arg == value.id and not scope.decorator_list and not stored

    def function(self, node: ast.AST) -> int | None:
        """Return the id of the innermost function around a node."""
        scope = self.parent(node)
        while scope is not None and not isinstance(scope, FUNCTIONS):
            scope = self.parent(scope)
        return None if scope is None else id(scope)

    def in_annotation(self, node: ast.AST) -> bool:
        """Whether an expression is part of an annotation."""
        parent = self.parent(node)
        while isinstance(parent, ast.Subscript | ast.BinOp | ast.Tuple | ast.List):
            node, parent = parent, self.parent(parent)
        return (
            isinstance(parent, ast.arg)
            or (isinstance(parent, ast.AnnAssign) and parent.annotation is node)
            or (isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef) and parent.returns is node)
        )

    def is_compared_or_shown(self, node: ast.AST) -> bool:
        """Whether a type is only compared, looked up, or put into a text."""
        parent = self.parent(node)
        while isinstance(parent, ast.Tuple | ast.List | ast.BinOp):
            if isinstance(parent, ast.BinOp) and not isinstance(parent.op, ast.Mod | ast.BitOr):
                return False
            node, parent = parent, self.parent(parent)
        if isinstance(parent, ast.Call) and node is not parent.func:
            function = parent.func
            return (
                (isinstance(function, ast.Name) and function.id in _SHOWS)
                or (isinstance(function, ast.Attribute) and function.attr in _SHOWING_METHODS)
                or isinstance(self.parent(parent), ast.Raise)
            )
        subscripted = isinstance(parent, ast.Subscript) and parent.slice is node
        return subscripted or isinstance(parent, ast.Compare | ast.FormattedValue | ast.Expr | ast.Assert)

    def is_harmless_type(self, node: ast.AST) -> bool:
        """Whether ``type(x)`` or ``x.__class__`` is used without becoming a value, which could be a metaclass."""
        parent = self.parent(node)
        if isinstance(parent, ast.Attribute):
            return not parent.attr.startswith("__") or parent.attr in rules.SHOWN_DUNDERS
        if isinstance(parent, ast.Call) and parent.func is node:
            return len(parent.args) != 3 and not any(isinstance(a, ast.Starred) for a in parent.args)
        return self.is_compared_or_shown(node)

    def is_harmless_type_name(self, node: ast.Name) -> bool:
        """Whether the built-in ``type`` is called with one value, compared with, or an annotation."""
        parent = self.parent(node)
        if isinstance(parent, ast.Call) and parent.func is node:
            return len(parent.args) == 1 and not parent.keywords and not isinstance(parent.args[0], ast.Starred)
        return self.in_annotation(node) or self.is_compared_or_shown(node)

    def is_limited_use(self, node: ast.AST, limit: rules.Limit) -> bool:
        """Whether a function that is safe with certain arguments only is called with these."""
        parent = self.parent(node)
        if isinstance(parent, ast.keyword) and parent.value is node:
            return limit.place == "metaclass" and parent.arg == "metaclass"
        if limit.place == "metaclass":
            return False
        if self.is_decorator(node):
            return limit.bare
        if not isinstance(parent, ast.Call) or parent.func is not node:
            return self.in_annotation(node)
        if len(parent.args) > limit.positional or any(isinstance(a, ast.Starred) for a in parent.args):
            return False
        if any(k.arg is None or (limit.keywords and k.arg not in limit.keywords) for k in parent.keywords):
            return False
        if any(k.arg in limit.unset and not _is_unset(k.value) for k in parent.keywords):
            return False
        if limit.place == "decorator":
            return self.is_decorator(parent)
        if limit.place == "class":
            holder = self.parent(parent)
            return isinstance(holder, ast.AnnAssign) and isinstance(self.parent(holder), ast.ClassDef)
        return True

    def is_decorator(self, node: ast.AST) -> bool:
        """Whether an expression decorates a function or class."""
        return node in getattr(self.parent(node), "decorator_list", ())
