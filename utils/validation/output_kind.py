"""Does forward return scores, or has a softmax or sigmoid already been at them?

Cross-entropy takes scores. Probabilities betray themselves by arithmetic that scores do not obey by chance: rows that
are non-negative and add up to one for random inputs. Log-probabilities are harmless: log_softmax leaves them alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.objectives import output_site
from utils.runtime.seeding import seed_streams
from utils.validation.check import Finding

SOFTMAX_HINT = (
    "Return the scores before it: cross_entropy applies log_softmax itself. Apply softmax outside, for reading only."
)

VIEWS = (
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Select", "Slice",
    "Clone", "Alias", "T", "ToCopy",
)  # fmt: skip
"""Operations of the graph that only arrange."""


@dataclass(frozen=True)
class Returned:
    """What kind of numbers forward returns, and the finding that goes with it."""

    kind: str
    """``"scores"``, ``"probabilities"``, ``"log-probabilities"`` or ``"sigmoid"``."""
    finding: Finding | None = None


def returned_kind(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor) -> Returned:
    """Tell scores from probabilities, by arithmetic that scores do not obey by chance."""
    coarse = 2e-2 if result.dtype in (torch.float16, torch.bfloat16) else 1e-4
    values = result.detach().double()
    if not bool(torch.isfinite(values).all()):
        return Returned("scores")
    axis = _normalised_axis(values, coarse)
    if axis is None:
        return _sigmoid(adapter, inputs, result)
    positive = bool((values >= 0).all())
    kind = "probabilities" if positive else "log-probabilities"
    if axis == values.dim() - 1:
        if not positive:
            return Returned(kind)
        trained = _train_output(adapter, inputs)
        if trained is not None and _normalised_axis(trained.double(), coarse) is None:
            return Returned("probabilities in eval mode only")
        where = output_site(adapter, inputs, result)
        sums = values.sum(-1)
        message = (
            f"forward returns probabilities: every one of {sums.numel()} rows over {values.shape[-1]} classes is "
            f"non-negative and adds up to 1 (within {float((sums - 1).abs().max()):.0e}); cross-entropy takes the "
            "softmax a second time"
        )
        check = f"print(model(**inputs){_path(adapter)}.sum(-1))  # rows add up to 1"
        return Returned(
            kind, Finding("double_softmax", "fail", where, message, SOFTMAX_HINT, reproduction(adapter, check))
        )
    along = "the batch" if axis == 0 else "the positions"
    total = values.sum(axis) if positive else values.exp().sum(axis)
    where = output_site(adapter, inputs, result)
    message = (
        f"the output's {kind} add up to 1 over {along} (axis {axis} of {tuple(values.shape)}, within "
        f"{float((total - 1).abs().max()):.0e}) and not over the {values.shape[-1]} classes"
    )
    hint = "Drop the softmax from forward(); where one is needed, write softmax(dim=-1)."
    check = f"print(model(**inputs){_path(adapter)}.sum({axis}))  # add up to 1 over axis {axis}"
    return Returned(kind, Finding("wrong_softmax_dim", "fail", where, message, hint, reproduction(adapter, check)))


def _normalised_axis(values: Tensor, tolerance: float) -> int | None:
    """Return the axis over which values are probabilities or their logarithms, the classes first; None if none."""
    if bool((values >= 0).all()):
        parts = values
    elif bool((values <= tolerance).all()):
        parts = values.exp()
    else:
        return None
    for axis in reversed(range(values.dim())):
        if values.shape[axis] > 1 and bool(((parts.sum(axis) - 1).abs() < tolerance).all()):
            return axis
    return None


def _train_output(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return the output in train mode, or None where that does not run."""
    modes = [(child, child.training) for child in adapter.module.modules()]
    adapter.module.train()
    try:
        seed_streams(0, "forward")
        with torch.no_grad():
            return adapter.logits(inputs)
    except Exception:
        return None
    finally:
        for child, mode in modes:
            child.training = mode


def _sure(adapter: ModelAdapter) -> str:
    """Return how a sigmoid counts: several labels may hold at once, unless somebody said that one class does."""
    return "fail" if adapter.spec.task is not None and adapter.spec.task.endswith("classification") else "warn"


def _reconstructs(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor) -> bool:
    """Tell whether there is one number out for each one in, as an autoencoder has it; flattened images count."""
    main = inputs[adapter.main_input]
    stated = adapter.spec.task is not None or adapter.spec.num_labels is not None
    return not stated and main.is_floating_point() and main[0].numel() == result[0].numel() > 2


def ends_in_sigmoid(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> bool:
    """Tell whether a sigmoid is the last arithmetic of the output."""
    try:
        seed_streams(0, "forward")
        with torch.enable_grad():
            node = adapter.logits(inputs).grad_fn
    except Exception:
        return False
    while node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SigmoidBackward")


def _sigmoid(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor) -> Returned:
    """Recognise a sigmoid as the last arithmetic of a classifier with one label of several."""
    if float(result.min()) <= 0 or float(result.max()) >= 1:
        return Returned("scores")
    if _reconstructs(adapter, inputs, result):
        return Returned("a reconstruction of the input")
    if adapter.config.get("problem_type") == "multi_label_classification" or result.shape[-1] < 3:
        return Returned("scores")
    if not ends_in_sigmoid(adapter, inputs):
        return Returned("scores")
    trained = _train_output(adapter, inputs)
    if trained is not None and (float(trained.min()) < 0 or float(trained.max()) > 1):
        return Returned("scores")
    where = output_site(adapter, inputs, result)
    message = (
        f"forward returns a sigmoid: all {result.numel()} scores lie between {float(result.min()):.3g} and "
        f"{float(result.max()):.3g}; cross-entropy over {result.shape[-1]} classes squashes them a second time, and "
        f"cannot fall below {_floor(result.shape[-1]):.2f} nats"
    )
    check = f"print(model(**inputs){_path(adapter)}.aminmax())  # all within (0, 1)"
    hint = f"{SOFTMAX_HINT} For several labels at once say problem_type='multi_label_classification' in the config."
    return Returned(
        "sigmoid", Finding("double_softmax", _sure(adapter), where, message, hint, reproduction(adapter, check))
    )


def _floor(classes: int) -> float:
    """Return the least cross-entropy that scores between 0 and 1 can reach."""
    return float(torch.tensor([1.0] + [0.0] * (classes - 1)).log_softmax(0)[0].neg())


def _path(adapter: ModelAdapter) -> str:
    """Return how code reaches the logits in the output."""
    parts = (adapter.output.value or "").split(".") if adapter.output.value else []
    return "".join(f"[{part}]" if part.isdigit() else f"[{part!r}]" for part in parts)


def reproduction(adapter: ModelAdapter, last: str, samples: int = 3) -> str:
    """Return code that makes inputs and then runs the last line."""
    start = "import torch; from utils.adapters import ModelAdapter"
    return f"{start}\ninputs = ModelAdapter(model).example_inputs({samples}, 9)\n{last}"
