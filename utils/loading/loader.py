"""`load_model`: from whatever the user pastes to a model that is ready to be validated."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from utils.loading.audit import audit
from utils.loading.config import parse_config, read_overrides
from utils.loading.gist import fetch_gist
from utils.loading.github_api import DEFAULT_TIMEOUT, GitHubClient
from utils.loading.hub import is_transformers_folder, load_transformers
from utils.loading.instantiate import LOADING_SECONDS, instantiate
from utils.loading.loaded_model import LoadedModel
from utils.loading.model_code import ModelCode
from utils.loading.reference import EXPECTED, Reference, check_revision, parse_reference
from utils.loading.repository import fetch_repository
from utils.loading.source import CONFIG_FILE, DEFAULT_MAX_BYTES, Source, read_example, read_path
from utils.runtime.errors import ConfigError, ModelReferenceError
from utils.runtime.printing import captured_output, first_printed


def load_model(
    reference: str | os.PathLike[str] | nn.Module | ModelCode,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust: bool = False,
    *,
    token: str | None = None,
    api: str | None = None,
    seed: int = 0,
    timeout: float = DEFAULT_TIMEOUT,
    deadline: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    time_limit: float = LOADING_SECONDS,
) -> LoadedModel:
    """Load a model from a link, a path, the Hub, an example, or a module.

    Source is audited before it runs, and runs only when it is harmless or trusted. The same reference gives the same
    initial weights every time. Nothing is ever put in the place of a model that cannot be loaded.

    Args:
        reference: Gist id or link, GitHub link, path of a file or folder, ``hub:owner/name``, ``example:NAME``, a
            module, or what `read_code` returned.
        config: Settings that override those of config.json: a dict, or the path of a JSON file. ``model_name``
            names the class that is the model, or the function that returns it.
        revision: Commit id (Gist), or branch, tag or commit id (GitHub, Hub) to load.
        trust: Run code that the audit does not know to be harmless.
        token: Access token for GitHub or the Hub. Default: ``GITHUB_TOKEN`` or ``HF_TOKEN`` from Colab's secrets, else
            from the environment, else none.
        api: Base address of GitHub's API. Default: the environment's ``SEEDBED_GITHUB_API``, else GitHub's own.
        seed: Seeds the initial weights.
        timeout: Seconds that one attempt to fetch may take.
        deadline: Seconds that all attempts to fetch one file may take together. Default: 30, or `timeout` if larger.
        max_bytes: Largest size of the source, in bytes.
        time_limit: Seconds that the import of the source and the constructor may take, each; large models get more.

    Raises:
        ModelReferenceError: The reference is not understood, does not exist, or is no model.
        FetchError: The files cannot be fetched.
        ConfigError: The config is not a JSON object, or the limit is no positive number.
        AuditError: The code needs the user's consent; the message shows the lines.
        InstantiationError: No model can be built from the source.
    """
    if not time_limit > 0:
        raise ConfigError(f"time_limit is {time_limit!r}.", "Expected seconds, more than 0.")
    overrides = read_overrides(config)
    if isinstance(reference, nn.Module):
        return LoadedModel(reference, overrides)
    if isinstance(reference, ModelCode):
        code = reference
    else:
        code = read_code(
            reference, revision, token=token, api=api, timeout=timeout, deadline=deadline, max_bytes=max_bytes
        )
    if code.source is None or code.audit is None:
        return _through_transformers(code.reference, overrides, revision or code.reference.revision, token, seed)
    files = code.source.files
    settings = {**(parse_config(files[CONFIG_FILE]) if CONFIG_FILE in files else {}), **overrides}
    if not trust:
        code.audit.require_harmless()
    with captured_output() as printed:
        built = instantiate(code.source, settings, seed, time_limit)
    said = first_printed(printed)
    return LoadedModel(
        module=built.module,
        config=settings,
        files=files,
        kind=code.reference.kind,
        reference=code.reference.text,
        revision=code.source.revision,
        sha256=code.source.sha256,
        audit=code.audit,
        notes=built.notes + ((f"It printed while it was built: {said}",) if said else ()),
        build=built.build,
    )


def read_code(
    reference: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | None = None,
    api: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    deadline: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> ModelCode:
    """Fetch and audit a model's code without running it; see `load_model` for the arguments.

    Raises:
        ModelReferenceError: The reference is not understood, does not exist, or is no model.
        FetchError: The files cannot be fetched.
    """
    if isinstance(reference, os.PathLike):
        parsed = Reference("path", str(Path(reference).expanduser()))
    elif isinstance(reference, str):
        parsed = parse_reference(reference)
    else:
        raise ModelReferenceError(f"The reference is a {type(reference).__name__}.", EXPECTED)
    revision = revision or parsed.revision
    if parsed.kind in ("path", "example") and revision:
        raise ModelReferenceError(
            f"The revision {revision!r} was given for {parsed.text!r}.",
            "Expected a revision only with a Gist, a GitHub or a Hub reference.",
            "Leave it out.",
        )
    if revision:
        revision = check_revision(revision, parsed.kind)
    if parsed.kind == "hub" or (parsed.kind == "path" and is_transformers_folder(Path(parsed.target))):
        return ModelCode(parsed)
    client = (
        GitHubClient(api, token, timeout, max_bytes, deadline=deadline) if parsed.kind in ("gist", "github") else None
    )
    source = _read(parsed, revision, client, max_bytes)
    return ModelCode(parsed, source, audit(source.files, source.entry))


def _read(parsed: Reference, revision: str | None, client: GitHubClient | None, max_bytes: int) -> Source:
    """Read the files that a reference stands for."""
    if parsed.kind == "example":
        return read_example(parsed.target)
    if client is None:
        return read_path(Path(parsed.target), max_bytes)
    if parsed.kind == "gist":
        return fetch_gist(parsed.target, revision, client)
    return fetch_repository(parsed.target, parsed.path, revision, client)


def _through_transformers(
    parsed: Reference, overrides: dict[str, Any], revision: str | None, token: str | None, seed: int
) -> LoadedModel:
    built, config, commit = load_transformers(parsed.target, overrides, revision, token, seed)
    files = {CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"}
    return LoadedModel(
        module=built.module,
        config=json.loads(files[CONFIG_FILE]),
        files=files,
        kind=parsed.kind,
        reference=parsed.text,
        revision=commit,
        sha256=Source(files).sha256,
        notes=built.notes,
        build=built.build,
    )
