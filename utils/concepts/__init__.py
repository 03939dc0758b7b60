"""Concepts: found in any layer of any model, ordered, handed from one model to another, each step beside a control."""

from utils.concepts.extraction import extract_concept
from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.package import ConceptPackage
from utils.concepts.transfer import transfer_concept

__all__ = ["ConceptHierarchy", "ConceptPackage", "extract_concept", "transfer_concept"]
