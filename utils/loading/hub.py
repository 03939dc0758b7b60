"""Models that transformers knows: from the Hub, or from a folder with a transformers config.json.

Code from the Hub never runs (``trust_remote_code=False``), and weights are read from safetensors only.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.loading.instantiate import Built, check_fits
from utils.loading.namespace import describe
from utils.runtime.dispatch import weightless
from utils.runtime.errors import FetchError, InstantiationError
from utils.runtime.optional import require
from utils.runtime.secrets import find_secret
from utils.runtime.seeding import isolated_streams


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder holds a transformers model: a config.json with ``model_type``, and no ``model.py``."""
    config = path / "config.json"
    if not config.is_file() or (path / "model.py").exists():
        return False
    try:
        value = json.loads(config.read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("model_type"), str)


def load_transformers(
    name: str, overrides: Mapping[str, Any], revision: str | None = None, token: str | None = None, seed: int = 0
) -> tuple[Built, dict[str, Any], str | None]:
    """Load a model through transformers: with its weights where there are any, else with fresh ones.

    Args:
        name: Hub name, or the path of a folder. A folder without weights gets seeded initial ones.
        overrides: Settings that replace those of the model's config.
        revision: Branch, tag or commit id on the Hub.
        token: Access token for the Hub. Default: ``HF_TOKEN`` from Colab's secrets, else from the environment, else
            what transformers finds by itself.
        seed: Seeds weights that are not loaded.

    Returns:
        The model, its config, and the commit id it was loaded from.

    Raises:
        FetchError: It cannot be fetched.
        InstantiationError: It was fetched, and cannot be built.
    """
    transformers = require("transformers", "load models from the Hub")
    local = Path(name).is_dir()
    common: dict[str, Any] = {"trust_remote_code": False}
    if not local:
        token = token or find_secret("HF_TOKEN").value
        common |= {"revision": revision or "main", "token": token}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **common, **overrides)
    except Exception as error:
        raise _explain(name, error, local) from None
    kind = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0], transformers.AutoModel)
    has_weights = not local or any(Path(name).glob("*.safetensors"))

    def fresh() -> nn.Module:
        with isolated_streams("instantiate", seed):
            # A model keeps its config and may change it; each instance gets one of its own.
            own = copy.deepcopy(config)
            return kind.from_config(own) if kind is transformers.AutoModel else kind(own)

    def build() -> nn.Module:
        if not has_weights:
            return fresh()
        with isolated_streams("instantiate", seed):
            own = copy.deepcopy(config)
            return kind.from_pretrained(name, config=own, use_safetensors=True, dtype=torch.float32, **common)

    notes: tuple[str, ...] = ()
    try:
        with weightless():
            empty = fresh()
    except Exception as error:
        notes = (f"The memory needed is unknown beforehand: no instance on the meta device ({describe(error)}).",)
    else:
        check_fits(empty, name)
    try:
        module = build()
    except Exception as error:
        raise _explain(name, error, local, built=True) from None
    commit = getattr(config, "_commit_hash", None)
    return Built(module, build, notes), config.to_dict(), commit if isinstance(commit, str) else revision


def _explain(name: str, error: Exception, local: bool, built: bool = False) -> FetchError | InstantiationError:
    """Turn what transformers raised into advice."""
    text, kind = str(error), type(error).__name__
    if "trust_remote_code" in text or "custom code" in text:
        return InstantiationError(
            f"{name} needs Python code from its own repository, which is not run.",
            "Expected an architecture that transformers contains.",
            "Download the code, read it, and load it as a folder with model.py and config.json.",
        )
    if built and ("safetensors" in text or "pytorch_model.bin" in text):
        return InstantiationError(
            f"{name} has no weights in the safetensors format ({describe(error)}).",
            "Expected model.safetensors; pickled weights are not read, because they can run code.",
            "Convert the weights to safetensors.",
        )
    if local or (built and not isinstance(error, OSError)):
        return InstantiationError(
            f"transformers cannot build {name}: {describe(error)}.",
            "Expected a config.json (and safetensors weights, if any) that this version of transformers understands.",
            "Check the file, or update transformers.",
        )
    if "gated" in text.lower() or "401" in text:
        advice = "It may be private or gated: accept its terms on the Hub and set HF_TOKEN, or pass token=."
    elif "not a valid model identifier" in text or "RepositoryNotFound" in kind:
        advice = "Check the spelling of owner/name; a private model needs HF_TOKEN or token=."
    else:
        advice = "Check the network; a folder with the model's files can be loaded by its path."
    return FetchError(f"The Hub model {name} cannot be fetched: {describe(error)}.", "Expected a public model.", advice)
