"""The only way the rest of the package calls a model: what any `nn.Module` is, each fact with its reason.

Imports ``utils.runtime`` only. Adapters answer, they do not decide.
"""

from utils.adapters.detection import Detection
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.spec import TASKS, ModelSpec

__all__ = ["TASKS", "Detection", "ModelAdapter", "ModelSpec"]
