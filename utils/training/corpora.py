"""The built-in data: real text, images and tables that every machine already has.

Everything comes back as plain values in a deterministic order; tokenizing, splitting and packing happen elsewhere.
"""

import ast
import gc
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.training.references import describe_references
from utils.training.tables import Table

_SHORTEST_DOCSTRING = 40


def load_texts(reference: str) -> list[str]:
    """Return the documents of a built-in text, in a deterministic order, duplicates included.

    Raises:
        DataError: The reference is unknown.
    """
    if reference == "builtin:python-docs":
        with _without_collector():
            return [text for text in (*_topics(), *_docstrings()) if _is_storable(text)]
    if reference == "builtin:python-code":
        return [text for text in _library_sources() if text.strip() and _is_storable(text)]
    raise DataError(f"The data reference {reference!r} is not available.", describe_references())


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector, which costs as much as the parser itself while syntax trees are built."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics() -> list[str]:
    """Return the topics that ``help()`` shows, by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library in source order, parsed and never imported."""
    for source in _library_sources():
        if '"""' not in source and "'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # test data kept by a distribution, for another Python version
            continue
        for node in _definitions(tree):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and its classes and functions; expressions are not entered, which is most of the time saved."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                pending.extend(reversed(children))


def _library_sources() -> Iterator[str]:
    """Yield the sources of the standard library without tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if excluded.isdisjoint(path.relative_to(root).parts) and path.is_file():
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few old sources declare another encoding
                continue


def _is_storable(text: str) -> bool:
    """Tell whether a text has no lone surrogates, which a docstring's escapes can produce."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's images of handwritten digits: float32 (1797, 8, 8) in [0, 1] and int64 labels (1797,)."""
    require("sklearn", "load builtin:digits", "scikit-learn")
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)


def load_builtin_table(reference: str) -> Table:
    """Return one of scikit-learn's bundled tables; the last column, ``target``, is what to predict.

    Raises:
        DataError: The reference is unknown.
    """
    require("sklearn", f"load {reference}", "scikit-learn")
    from sklearn import datasets

    loaders = {"builtin:diabetes": datasets.load_diabetes, "builtin:wine": datasets.load_wine}
    if reference not in loaders:
        raise DataError(f"The data reference {reference!r} is not available.", describe_references())
    bunch = loaders[reference]()
    columns = {str(name): bunch.data[:, index].tolist() for index, name in enumerate(bunch.feature_names)}
    classes = {"target": [str(name) for name in bunch.target_names]} if hasattr(bunch, "target_names") else {}
    return Table({**columns, "target": bunch.target.tolist()}, reference, classes)


def without_duplicates(texts: Iterable[str]) -> list[str]:
    """Return the texts without exact repetitions (surrounding white space aside), in order of first appearance."""
    return list({text.strip(): text for text in reversed(list(texts))}.values())[::-1]
