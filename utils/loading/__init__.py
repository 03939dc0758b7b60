"""From a link to a model: parse the reference, fetch the source, read it, and only then run it."""

from utils.loading.audit import AuditItem, AuditReport, audit
from utils.loading.loaded_model import LoadedModel
from utils.loading.loader import load_model, read_code
from utils.loading.model_code import ModelCode
from utils.loading.reference import Reference, parse_reference
from utils.loading.source import example_names

__all__ = [
    "AuditItem",
    "AuditReport",
    "LoadedModel",
    "ModelCode",
    "Reference",
    "audit",
    "example_names",
    "load_model",
    "parse_reference",
    "read_code",
]
