"""From a link to a model: parse the reference, fetch the source, read it, and only then run it."""

from utils.loading.audit import AuditItem, AuditReport, audit
from utils.loading.loaded_model import LoadedModel
from utils.loading.loader import load_model
from utils.loading.reference import Reference, parse_reference
from utils.loading.source import example_names

__all__ = [
    "AuditItem",
    "AuditReport",
    "LoadedModel",
    "Reference",
    "audit",
    "example_names",
    "load_model",
    "parse_reference",
]
