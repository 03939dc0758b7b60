"""How much each weight matters for a model's answers: the diagonal of the Fisher information.

F_i = E_x sum_c p(c|x) (d log p(c|x) / d theta_i)^2, over all classes and single samples. Van de Ven, On the Computation
of the Fisher Information in Continual Learning (arXiv:2502.11756), compares this with what is often taken for it (the
label's gradient, or the square of a batch's mean gradient): EWC does best with it.

For every distribution here F is a sum of squares (J^T v)^2 with the Jacobian J of the scores and a few vectors v for
each sample: sqrt(p_c) (e_c - p) for class c of a softmax. Three ways compute it, the fastest that agrees on two samples
with the slowest is taken: layer by layer, where a matrix needs only the squares of its inputs and of the gradients of
its outputs; each sample's gradient by `torch.func.vmap`; and one sample after another.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.continual.learner import Learner
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training.batch_inputs import model_inputs
from utils.training.evaluation import masked

MOST_CLASSES = 32
"""Up to so many scores of a sample all are gone through; of more, one answer is drawn for each."""
ELEMENTS = 2**24
"""Numbers that a pass or a block of single gradients holds at once, about."""
MOST_ROWS = 256
CHECKED = 2
AGREES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of two ways, as a share of the norm; 0.05 in half precision."""

Batch = dict[str, Tensor]
Answer = Callable[[Batch], Tensor]
Vectors = Callable[[Tensor, slice], list[Tensor]]


@dataclass(frozen=True)
class Fisher:
    """The importance of weights, and how it was computed."""

    values: Mapping[str, Tensor]
    """One number for each entry of each trained parameter, by name, in nats per squared unit of the weight."""
    kind: str
    """``exact``: all answers counted as the model's own probabilities say; ``drawn``: one drawn from them."""
    way: str
    """``layers``, ``vmap`` or ``single``."""
    why: str
    """Why no faster way was taken; empty for the fastest."""
    samples: int
    """How many samples it is the mean of."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the values."""
        return {"kind": self.kind, "way": self.way, "why": self.why, "samples": self.samples}


class _OtherWayError(Exception):
    """A way cannot compute it."""


def fisher_of_task(learner: Learner) -> Fisher:
    """Return the importance of the trained weights for the present task; the model is left as it was.

    Computed in eval mode on `ContinualConfig.fisher_samples` of the task's training samples, drawn when it has more,
    with the outputs that may answer in the task, without augmentation or mixed precision.
    """
    task, data, adapter = learner.task, learner.data, learner.adapter
    rows = task.train
    if len(rows) > learner.settings.fisher_samples:
        generator = torch.Generator().manual_seed(learner.number("fisher samples"))
        rows = rows[torch.randperm(len(rows), generator=generator)[: learner.settings.fisher_samples]]
    seed = learner.number("fisher")

    def batch_of(start: int, end: int) -> Batch:
        batch = task.batch(data.train, rows[start:end])
        hidden = masked(data, batch, [derive_seed(seed, "masking", int(row)) for row in rows[start:end]])
        return {name: value.to(adapter.device) for name, value in hidden.items()}

    def answer(batch: Batch) -> Tensor:
        return learner.masked.logits(model_inputs(adapter, batch, data))

    before = learner.masked.answers, learner.masked.lowered
    learner.masked.lowered = None
    learner.masked.answers = learner.allowed(task.answers) if learner.settings.setting == "task" else None
    try:
        return diagonal_fisher(learner.module, answer, batch_of, len(rows), data.task in REAL_VALUED, seed)
    finally:
        learner.masked.answers, learner.masked.lowered = before


def diagonal_fisher(
    module: nn.Module, answer: Answer, batch_of: Callable[[int, int], Batch], count: int, real: bool = False,
    seed: int = 0,
) -> Fisher:  # fmt: skip
    """Return the diagonal Fisher information of a model's trained parameters; the model is left as it was.

    Args:
        module: The model.
        answer: Runs it on a batch: scores ``(batch, ..., classes)``, or numbers of any shape when `real`.
        batch_of: Makes a batch of the samples from one number up to another; ``labels`` tell by
            `utils.adapters.objectives.IGNORED` which positions do not count.
        count: How many samples there are, at least one.
        real: The answers are means of normal distributions whose deviation makes the squared error a likelihood.
        seed: Seed of answers that are drawn.

    Returns:
        The mean over samples, or over positions that count where a sample has several.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with preserved(module, seed, "fisher"), torch.enable_grad(), eager:
        module.eval()
        few = batch_of(0, min(CHECKED, count))
        logits, width = _measured(module, answer, few)
        exact = _is_exact(logits, real)
        given = _vectors(logits, slice(None), few["labels"], real, exact, seed)

        def fixed(scores: Tensor, part: slice) -> list[Tensor]:
            return [vector[part] for vector in given]

        rows = max(1, min(MOST_ROWS, ELEMENTS // width))
        reasons: list[str] = []
        reference = _single(module, answer, few, fixed, trained)
        for way, compute in (("layers", _by_layers), ("vmap", _by_vmap), ("single", _single)):
            try:
                if way != "single":
                    _compare(compute(module, answer, few, fixed, trained), reference)
                values, counted = _zeros(trained), 0
                for start in range(0, count, rows):
                    batch = batch_of(start, min(start + rows, count))
                    vectors = partial(
                        _vectors,
                        labels=batch["labels"],
                        real=real,
                        exact=exact,
                        seed=derive_seed(seed, "answers", start),
                    )
                    found = compute(module, answer, batch, vectors, trained)
                    torch._foreach_add_(list(values.values()), list(found.values()))
                    counted += len(batch["labels"]) if real else int((batch["labels"] != IGNORED).sum())
                break
            except Exception as error:
                # Whatever a model's own code makes of hooks or vmap: the next way does without them.
                if way == "single":
                    raise
                kind = "" if isinstance(error, _OtherWayError) else f"{type(error).__name__}: "
                reasons.append(f"{way}: {kind}{str(error).strip().split(chr(10))[0]}")
        torch._foreach_div_(list(values.values()), float(max(1, counted)))
    return Fisher(values, "exact" if exact else "drawn", way, "; ".join(reasons), count)


def _measured(module: nn.Module, answer: Answer, batch: Batch) -> tuple[Tensor, int]:
    """Return the scores of samples that are each alone in a batch, and how many numbers modules return for one."""
    sizes = [1]

    def note(child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel())

    handles = [child.register_forward_hook(note) for child in module.modules()]
    try:
        with torch.no_grad():
            rows = range(len(batch["labels"]))
            logits = torch.cat([answer({name: v[row : row + 1] for name, v in batch.items()}) for row in rows])
    finally:
        for handle in handles:
            handle.remove()
    return logits, (sum(sizes) + logits.numel()) // len(logits)


def _may_answer(logits: Tensor) -> Tensor:
    """Return the classes that are not ruled out, int64 ``(classes,)``."""
    ruled_out = (logits <= torch.finfo(logits.dtype).min).flatten(0, -2).all(0)
    return (~ruled_out).nonzero().flatten()


def _is_exact(logits: Tensor, real: bool) -> bool:
    """Tell whether a sample's answers are few enough to go through all."""
    if real:
        return logits[0].numel() <= MOST_CLASSES
    return logits[0].numel() == logits.shape[-1] and len(_may_answer(logits)) <= MOST_CLASSES


def _vectors(logits: Tensor, part: slice, labels: Tensor, real: bool, exact: bool, seed: int) -> list[Tensor]:
    """Return the vectors v of each sample, each tensor shaped as the scores; see the module.

    Of many answers one is drawn, in each position apart: what positions have in common is zero in the mean.

    Args:
        logits: The scores of a part of a batch.
        part: Which.
        labels: Those of the whole batch.
        real: See `diagonal_fisher`.
        exact: All answers, not one.
        seed: Of the batch.
    """
    scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    generator = torch.Generator().manual_seed(derive_seed(seed, part.start or 0))
    if real:
        each = scores[0].numel()
        # The mean of squares over k numbers is the likelihood of normal distributions of variance k / 2.
        size = math.sqrt(2 / each)
        if exact:
            units = torch.eye(each, device=scores.device, dtype=scores.dtype) * size
            return [unit.view(scores[0].shape).expand_as(logits).to(logits) for unit in units]
        return [(torch.randn(scores.shape, generator=generator) * size).to(logits)]
    counts = (labels[part] != IGNORED).reshape(*scores.shape[:-1], 1)
    if scores.shape[-1] == 1:
        p = scores.sigmoid()
        if exact:
            return [((p * (1 - p)).sqrt() * counts).to(logits)]
        return [((torch.rand(p.shape, generator=generator).to(p) < p).to(p) - p).mul(counts).to(logits)]
    p = scores.softmax(-1)
    if exact:
        units = torch.eye(p.shape[-1], device=p.device, dtype=p.dtype)
        chosen = _may_answer(logits).tolist()
        return [(p[..., c : c + 1].sqrt() * (units[c] - p) * counts).to(logits) for c in chosen]
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).to(p.device)
    unit = torch.zeros_like(p).view(-1, p.shape[-1]).scatter_(1, drawn, 1.0).view_as(p)
    return [((unit - p) * counts).to(logits)]


def _compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a way that gives something else."""
    for name, value in wanted.items():
        bound = AGREES.get(value.dtype, 0.05) * float(value.norm()) + 1e-20
        if not float((found[name] - value).norm()) <= bound:
            raise _OtherWayError(f"{name} comes out differently than one sample at a time")


def _zeros(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a sum that is still zero for each parameter, at least in float32."""
    return {
        name: torch.zeros(p.shape, device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in trained.items()
    }


def _pulled(logits: Tensor, vector: Tensor, wanted: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
    """Return J^T v for each of some tensors; None where the scores do not depend on it."""
    # With a gradient given from outside, torch imports a package for symbolic shapes, which takes longer than all this.
    return torch.autograd.grad((logits * vector).sum(), list(wanted), retain_graph=keep, allow_unused=True)


def _single(
    module: nn.Module, answer: Answer, batch: Batch, vectors: Vectors, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Go through the samples one by one."""
    total = _zeros(trained)
    for row in range(len(batch["labels"])):
        part = slice(row, row + 1)
        logits = answer({name: value[part] for name, value in batch.items()})
        for vector in vectors(logits, part):
            gradients = _pulled(logits, vector, list(trained.values()), keep=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.to(total[name]).square()
    return total


class _Whole(nn.Module):
    """A model together with the way in which it is asked, so that its parameters can be given from outside."""

    def __init__(self, module: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.inner, self.answer = module, answer

    def forward(self, batch: Batch) -> Tensor:
        return self.answer(batch)


def _by_vmap(
    module: nn.Module, answer: Answer, batch: Batch, vectors: Vectors, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Compute the gradients of many single samples at once."""
    with torch.no_grad():
        of_all = vectors(answer(batch), slice(None))
    whole = _Whole(module, answer)
    given = {f"inner.{name}": p.detach() for name, p in trained.items()}

    def one(row: Batch, own: list[Tensor]) -> dict[str, Tensor]:
        alone = {name: value[None] for name, value in row.items()}
        pull: Callable[..., Any] = vjp(lambda values: functional_call(whole, values, (alone,))[0], given)[1]
        squares: dict[str, Tensor] = {}
        for vector in own:
            for name, gradient in pull(vector)[0].items():
                square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
                squares[name] = squares[name] + square if name in squares else square
        return squares

    total = _zeros(trained)
    for part in _blocks(len(batch["labels"]), sum(p.numel() for p in trained.values())):
        with warnings.catch_warnings():
            # An operator without a rule of its own is called sample by sample: what the next way would do too.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            squares = vmap(one)({name: value[part] for name, value in batch.items()}, [v[part] for v in of_all])
        for name in trained:
            total[name] += squares[f"inner.{name}"].sum(0)
    return total


def _blocks(rows: int, numbers: int) -> Iterator[slice]:
    """Divide samples so that their single gradients fit into memory."""
    size = max(1, ELEMENTS // max(1, numbers))
    return (slice(start, start + size) for start in range(0, rows, size))


def _by_layers(
    module: nn.Module, answer: Answer, batch: Batch, vectors: Vectors, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Compute it from the inputs of the modules that hold parameters, and the gradients of their outputs.

    The gradient of a matrix for one sample is an outer product g a^T, so the sum of its squares over samples and
    classes is (sum_c g_c^2)^T a^2: no single gradient is ever made. Of other modules, single gradients are made by
    `torch.func.vmap`, module by module.
    """
    names = {id(p): name for name, p in trained.items()}
    owned = {
        child: {own: names[id(p)] for own, p in child.named_parameters(recurse=False) if id(p) in names}
        for child in module.modules()
    }
    held = [name for own in owned.values() for name in own.values()]
    if len(held) > len(set(held)):
        raise _OtherWayError("modules share a parameter")
    total = _zeros(trained)
    with _watched({child for child, own in owned.items() if own}, len(batch["labels"])) as calls:
        logits = answer(batch)
    of_all = vectors(logits, slice(None))
    outputs = [output for _, output in calls.values()]
    squares: dict[nn.Module, Tensor] = {}
    for number, vector in enumerate(of_all):
        gradients = _pulled(logits, vector, outputs, keep=number + 1 < len(of_all))
        for (child, (given, _)), gradient in zip(calls.items(), gradients, strict=True):
            if gradient is None:
                continue
            if _is_matrix(child, owned[child], given):
                # Not in place: the gradient of the last layer is the vector itself.
                square = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square()
                squares[child] = squares[child].add_(square) if child in squares else square
            else:
                _add_single(child, owned[child], given, gradient, total)
    for child, square in squares.items():
        for own, name in owned[child].items():
            given = calls[child][0].to(square)
            total[name] += square.sum(0) if own == "bias" else square.T @ given.square()
    return total


def _is_matrix(child: nn.Module, own: Mapping[str, str], given: Tensor) -> bool:
    """Tell whether a module multiplies each sample once; what it really does is compared, see `diagonal_fisher`."""
    return isinstance(child, nn.Linear) and given.dim() == 2 and own.keys() <= {"weight", "bias"}


@contextmanager
def _watched(children: set[nn.Module], rows: int) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Note the input and the output of modules that are each called once, with one row for each sample."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(child: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor:
        plain = len(given) == 1 and not named and isinstance(given[0], Tensor) and isinstance(output, Tensor)
        if not plain or not all(t.dim() and len(t) == rows for t in (given[0], output)):
            raise _OtherWayError(f"{type(child).__name__} takes or returns more than one row for each sample")
        if child in calls:
            raise _OtherWayError(f"{type(child).__name__} is called twice")
        calls[child] = given[0].detach(), output
        # What comes next may change it in place; its gradient is then that of something else.
        return output.clone()

    handles = [child.register_forward_hook(note, with_kwargs=True) for child in children]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _add_single(
    child: nn.Module, own: Mapping[str, str], given: Tensor, gradient: Tensor, total: dict[str, Tensor]
) -> None:
    """Add the squares of a module's gradients for single samples."""
    values = {local: child.get_parameter(local).detach() for local in own}

    def one(row: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        pull: Callable[..., Any] = vjp(lambda parameters: functional_call(child, parameters, (row[None],))[0], values)[
            1
        ]
        return dict(pull(wanted)[0])

    for part in _blocks(len(given), sum(value.numel() for value in values.values())):
        for local, found in vmap(one)(given[part], gradient[part]).items():
            total[own[local]] += found.to(total[own[local]]).square().sum(0)
