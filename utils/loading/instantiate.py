"""Build a model from source that may run: first without memory, to see whether it fits, then for real."""

import builtins
import contextlib
import dis
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from utils.loading.arguments import bind, config_reads, misspelt
from utils.loading.config import constructor_settings
from utils.loading.namespace import describe, execute, forget, late, locate
from utils.loading.selection import choose
from utils.loading.source import CONFIG_FILE, Source
from utils.runtime.dispatch import weightless
from utils.runtime.errors import InstantiationError, SeedbedError
from utils.runtime.rehearsal import Notes, rehearse
from utils.runtime.resources import LARGE_MODEL, available_memory, format_bytes, is_out_of_memory
from utils.runtime.seeding import isolated_streams
from utils.runtime.watchdog import TimedOut, limited, time_limit

# What a broken export leaves behind: inner results of the graph that became inputs of forward.
_INNER_OUTPUT = re.compile(r"\w+_output")
_REAL_INPUTS = {"encoder_output"}
LOADING_SECONDS, SECONDS_PER_BILLION = 60.0, 60.0
"""Limit for the import of a model's source and for its constructor, and what a billion of parameters adds to it."""


@dataclass(frozen=True)
class Built:
    """A model and how to build another."""

    module: nn.Module
    """The model."""
    build: Callable[[], nn.Module]
    """Builds another instance with the same settings and the same initial weights."""
    notes: tuple[str, ...] = ()
    """What could not be found out beforehand, and why."""


@contextlib.contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """Restore the default dtype and the grad mode, which source code may change."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def memory_needed(module: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values() if not is_lazy(t))


def check_fits(module: nn.Module, name: str) -> None:
    """Raise an error when a model built on the meta device needs more memory than there is."""
    needed, available = memory_needed(module), available_memory()
    if needed > available:
        raise InstantiationError(
            f"{name} needs {format_bytes(needed)} for its parameters and buffers; "
            f"this machine has {format_bytes(available)}.",
            "Expected a model that fits into memory.",
            "Use a machine with more memory, or pass config= with fewer layers or a smaller width.",
        )


def probe_on_meta(build: Callable[[], nn.Module], name: str) -> tuple[str, ...]:
    """Build a model without memory to see whether the real one fits.

    Returns:
        Nothing, or one note that says why the model could not be built on the meta device.

    Raises:
        InstantiationError: The model does not fit.
    """
    try:
        # What the constructor prints appears once, in the real build.
        with weightless(), contextlib.redirect_stdout(io.StringIO()):
            module = build()
    except (Exception, SystemExit) as error:
        return (f"The memory needed is unknown beforehand: no instance on the meta device ({describe(error)}).",)
    if isinstance(module, nn.Module):
        check_fits(module, name)
    return ()


def instantiate(source: Source, config: Mapping[str, Any], seed: int = 0, seconds: float = LOADING_SECONDS) -> Built:
    """Execute a model's source and build the model.

    Args:
        source: The files; the caller has audited or trusts them.
        config: Flat settings, see `utils.loading.config`.
        seed: Seeds the initial weights.
        seconds: Limit for running the source, and for building the model.

    Raises:
        InstantiationError: No model could be built; the message has the reason and the line.
    """
    with _torch_settings_kept(), isolated_streams("import", seed):
        entry = execute(source, seconds)
    package = entry.__name__.partition(".")[0]
    try:
        maker, said = choose(entry, source, config)
        name = maker.__name__
        settings = constructor_settings(config)

        def build() -> nn.Module:
            with _torch_settings_kept(), isolated_streams("instantiate", seed):
                # Bound anew each time: a model may keep and change its config object.
                arguments, keywords = bind(maker, settings, entry)
                return maker(*arguments, **keywords)

        # A missing setting is known before anything is built.
        if isinstance(maker, type):
            _check_inputs(maker)
        _guarded(lambda: bind(maker, settings, entry), name, package, seconds)
        said += misspelt(maker, settings, entry)
        _rehearse(build, name, package, seconds)
        sizes: list[int] = []

        def sized() -> nn.Module:
            module = build()
            sizes.append(_size(module))
            return module

        notes = said + _guarded(lambda: probe_on_meta(sized, name), name, package, seconds)
        building = seconds + SECONDS_PER_BILLION * sum(sizes) / 1e9
        try:
            module = _guarded(build, name, package, building)
        except InstantiationError as error:
            raise _unset(error, maker, settings, entry, source) or error from error.__cause__
        if not isinstance(module, nn.Module):
            raise InstantiationError(
                f"{name}() returned a {type(module).__name__}.", "Expected a torch.nn.Module.", "Correct its return."
            )
        _check_forward(module, entry)
    except BaseException:
        forget(package)
        raise
    return Built(module, lambda: _guarded(build, name, package, building), notes)


def _unset(
    error: InstantiationError,
    maker: Callable[..., Any],
    settings: Mapping[str, Any],
    entry: ModuleType,
    source: Source,
) -> InstantiationError | None:
    """Return a better error when the constructor failed on a setting that it reads from its config, and nobody set."""
    cause = error.__cause__
    name, reads = config_reads(maker, entry)
    unset = [key for key in reads if key not in settings]
    missed = cause.args[0] if isinstance(cause, KeyError) and cause.args else getattr(cause, "name", None)
    if not isinstance(cause, KeyError | AttributeError) or missed not in unset:
        return None
    have = ", ".join(sorted(settings)) or "nothing"
    where = f"the config sets {have}" if settings or CONFIG_FILE in source.files else f"there is no {CONFIG_FILE}"
    return InstantiationError(
        f"{maker.__name__} reads {', '.join(unset)} from {name}, and {where}. {error.found}",
        f"Expected {CONFIG_FILE} beside {source.entry}, or config=, with these settings.",
        f"For example config={{{missed!r}: ...}}.",
    )


def _size(module: Any) -> int:
    """Return the number of parameters that have a shape already."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def _rehearse(build: Callable[[], nn.Module], name: str, package: str, seconds: float) -> None:
    """Build a model in a copy of this process first: one that ends the process or takes all memory does no harm there.

    A large model is built there without memory only.

    Raises:
        InstantiationError: It does not come back from its constructor.
    """
    if limited():
        return

    def act(notes: Notes) -> None:
        def attempt() -> int:
            # What it raises it will raise again here; but whoever is out of memory will not always hear of it.
            try:
                with time_limit(seconds):
                    return _size(build())
            except TimedOut as error:
                notes.where = locate(error, package)
                raise
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    notes.where = locate(error, package)
                    raise
                return 0

        with weightless():
            size = attempt()
        if size < LARGE_MODEL:
            attempt()

    result = rehearse(act, 2 * seconds + 5)
    if result.outcome == "timed_out" and result.busy:
        raise late(f"The constructor of {name}", seconds, result.where)
    if result.outcome in ("died", "out_of_memory"):
        ended = f"the process {result.reason}" if result.outcome == "died" else "memory ran out"
        raise InstantiationError(
            f"The constructor of {name} was run in a copy of this process, and {ended}{result.where}.",
            "Expected a model that can be built.",
            "Look for loops that never end, os._exit, os.kill and code outside Python.",
        )


def _guarded(call: Callable[[], Any], name: str, package: str, seconds: float) -> Any:
    """Run the model's own code; what it raises becomes an error with the line of the source."""
    try:
        with time_limit(seconds):
            return call()
    except TimedOut as error:
        raise late(f"The constructor of {name}", seconds, locate(error, package)) from None
    except SeedbedError:
        raise
    except (Exception, SystemExit) as error:
        raise InstantiationError(
            f"The constructor of {name} raised {describe(error)}{locate(error, package)}.",
            "Expected a model that can be built from its config.",
            "Correct the line or the setting it uses; config= overrides settings of config.json.",
        ) from error


def _check_inputs(kind: type[nn.Module]) -> None:
    """Refuse a forward whose required inputs are inner results of an exported graph."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return
    broken = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY, parameter.KEYWORD_ONLY)
        and _INNER_OUTPUT.fullmatch(parameter.name)
        and parameter.name not in _REAL_INPUTS
    ]
    if broken:
        raise InstantiationError(
            f"forward of {kind.__name__} requires {', '.join(broken)}: results of its own inner nodes became inputs.",
            "Expected a forward that computes them from the model's real inputs.",
            "The export is broken: export the model again with a newer version of the exporter.",
        )


def _check_forward(module: nn.Module, entry: ModuleType) -> None:
    """Refuse a model without forward, and one whose forward uses names that do not exist."""
    if type(module).forward is nn.Module.forward:
        raise InstantiationError(
            f"{type(module).__name__} has no forward.",
            "Expected a method forward(self, ...).",
            "Add it, or name the right class.",
        )
    _check_inputs(type(module))
    package = entry.__name__.partition(".")[0]
    for kind in dict.fromkeys(type(child) for child in module.modules()):
        forward = inspect.unwrap(kind.forward)
        if not getattr(forward, "__module__", "").startswith(package + ".") or not inspect.isfunction(forward):
            continue
        undefined = sorted(set(_global_names(forward.__code__)) - forward.__globals__.keys() - vars(builtins).keys())
        if undefined:
            raise InstantiationError(
                f"forward of {kind.__name__} uses {', '.join(undefined)}, which nothing defines.",
                "Expected every name to be an input, a variable or an import.",
                "The source is incomplete: correct it, or export the model again.",
            )


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
