"""Run a model's source as a package of its own, in memory.

Every load gets a fresh package name, so two models may both have a ``blocks.py``, and ``sys.path`` stays as it is. The
modules are real ones (in ``sys.modules``, with a loader that knows their text), so dataclasses, pickle, inspect and
tracebacks work. Imports between the files are rewritten to relative ones before they are compiled.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import itertools
import linecache
import sys
import traceback
from collections.abc import Sequence
from types import CodeType, ModuleType

from utils.loading.audit import parse
from utils.loading.source import MODEL_FILE, Source
from utils.runtime.errors import InstantiationError
from utils.runtime.watchdog import TimedOut, time_limit

_counter = itertools.count(1)


class _Relative(ast.NodeTransformer):
    """Rewrites ``import blocks`` and ``from blocks import X`` to relative imports."""

    def __init__(self, siblings: set[str]) -> None:
        self.siblings = siblings

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        """Split an import into its parts, those of siblings made relative."""
        statements: list[ast.stmt] = []
        for alias in node.names:
            own = alias.name in self.siblings
            part: ast.stmt = ast.ImportFrom(None, [alias], 1) if own else ast.Import([alias])
            statements.append(ast.copy_location(part, node))
        return statements

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """Make an import from a sibling relative."""
        if node.level == 0 and node.module in self.siblings:
            node.level = 1
        return node


class _Loader(importlib.abc.InspectLoader):
    """Loads the modules of one package from text."""

    def __init__(self, package: str, source: Source) -> None:
        self.package, self.source = package, source
        self.files = {name.removesuffix(".py"): text for name, text in source.files.items() if name.endswith(".py")}

    def is_package(self, fullname: str) -> bool:
        return fullname == self.package

    def get_source(self, fullname: str) -> str:
        return "" if fullname == self.package else self.files[fullname.rpartition(".")[2]]

    def filename(self, fullname: str) -> str:
        return f"<{self.package}>/{self.source.shown(fullname.rpartition('.')[2] + '.py')}"

    def get_code(self, fullname: str) -> CodeType:
        text, filename = self.get_source(fullname), self.filename(fullname)
        tree = _Relative(set(self.files)).visit(parse(text, filename.partition("/")[2]))
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        return compile(ast.fix_missing_locations(tree), filename, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of all packages made here."""

    def __init__(self) -> None:
        self.loaders: dict[str, _Loader] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        loader = self.loaders.get(package)
        if loader is None or (name and name not in loader.files):
            return None
        spec = importlib.machinery.ModuleSpec(fullname, loader, origin=loader.filename(fullname), is_package=not name)
        spec.has_location = bool(name)
        return spec


_finder = _Finder()


def execute(source: Source, seconds: float) -> ModuleType:
    """Execute a model's source and return the module of ``model.py``.

    Raises:
        InstantiationError: The source is not Python, raised when it ran or took longer than `seconds`; nothing of it
            stays behind.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)
    package = f"seedbed_model_{source.sha256[:12]}_{next(_counter)}"
    _finder.loaders[package] = _Loader(package, source)
    try:
        with time_limit(seconds):
            return importlib.import_module(f"{package}.{MODEL_FILE.removesuffix('.py')}")
    except InstantiationError:
        forget(package)
        raise
    except TimedOut as error:
        location = locate(error, package)
        forget(package)
        raise late("The import of the source", seconds, location) from None
    except (Exception, SystemExit) as error:
        location = locate(error, package)
        forget(package)
        raise InstantiationError(
            f"The source failed when it was imported: {describe(error)}{location}.",
            "Expected source that can be imported on this machine.",
            f"Install the package that provides {error.name}."
            if isinstance(error, ModuleNotFoundError)
            else "Correct that line, or export the model again.",
        ) from error
    except BaseException:
        forget(package)
        raise


def forget(package: str) -> None:
    """Remove a package and its modules."""
    _finder.loaders.pop(package, None)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def late(what: str, seconds: float, location: str) -> InstantiationError:
    """Return the error for code that does not come back."""
    return InstantiationError(
        f"{what} gave no answer within {seconds:.3g} s{location}.",
        "Expected a model that is built in that time.",
        "Look for a loop whose condition never changes, and for waiting; if it only takes long, pass time_limit=.",
    )


def describe(error: BaseException) -> str:
    """Return an exception's type and message in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def locate(error: BaseException, package: str) -> str:
    """Return `` (model.py, line 12: `the line`)`` for the innermost line of the model's source, or nothing."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f"<{package}>/")]
    if not frames:
        return ""
    frame = frames[-1]
    return f" ({frame.filename.partition('/')[2]}, line {frame.lineno}: `{(frame.line or '').strip()[:120]}`)"
