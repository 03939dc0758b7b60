"""Add tokens to a vocabulary, and classes to a head: new rows are the mean of the old ones.

Old logits stay as they are; probabilities do not, since the new logits enter the softmax. A row that is the mean of all
rows gives the mean of all logits, and by Jensen's inequality n of them raise the logarithm of the softmax's sum by at
most ``log(1 + n / V)`` (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021). Where the
head has a bias, that of the new outputs is lower by as much as it takes to keep the rise, and with it the loss, within
`SHIFT` nats: they are all but never predicted, and a label that asks for one still gives its row the full gradient.

Rows drawn at random have no such bound: their logits grow with the norm of the features, and may win. New tokens read
the mean of what the table holds; tied rows could be nothing else, and untied ones begin where a typical token is. The
row of the padding token stays where it is, and its gradient stays zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from utils.adapters.capture import named_tensors
from utils.adapters.structure import EmbeddingTable, Structure
from utils.growth.edits import Edit, GrowthRefusedError, Plan, Widen
from utils.growth.numbers import owned_sizes, settled
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery
from utils.runtime.printing import captured_output

SHIFT = 1e-4
"""Nats by which new outputs of a head with a bias raise the loss at most."""
VOCABULARY_WORDS = ("vocab_size", "vocab", "vocabulary", "vocabulary_size", "num_tokens", "n_tokens", "ntoken")
"""How the names end of numbers that count tokens."""
CLASS_WORDS = ("num_labels", "n_labels", "classes", "num_class", "n_class")
"""How the names end of numbers that count classes."""
LABELS = ("labels", "label", "targets", "target")
"""Names of arguments for which a forward returns a loss."""
LANGUAGE = ("causal_lm", "masked_lm", "seq2seq")
Check = Callable[[Surgery], str | None]


def plan_vocabulary(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan more rows in the token table, and in the head that predicts tokens.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many tokens; `where` names a table where there are several vocabularies.

    Raises:
        GrowthRefusedError: There is no token table, or the old logits would change.
    """
    module, adapter = scratch.module, scratch.adapter
    tables = _tables(found, request)
    size, width = tables[0].rows, scratch.expected.shape[-1]
    added = request.added(size, "tokens")
    predicts = width == size
    if not predicts and adapter.task.value in LANGUAGE and request.where is None:
        raise GrowthRefusedError(
            f"{tables[0].name} has {size} rows, and the model has {width} outputs.",
            "Expected as many outputs as tokens.",
            "Name one table by `where` to grow it alone.",
        )
    grown: set[int] = set()
    edits = [edit for table in tables for edit in _rows(module, f"{table.name}.weight", size, added, grown)]
    reasons = (found.embeddings.reason, "new rows are the mean of the old ones")
    where = [table.name for table in tables]
    where += [found.head.value] if predicts and found.head.value is not None else []
    plan = Plan("vocabulary", tuple(dict.fromkeys(where)), tuple(edits), size, size + added, "bounded",
                size if predicts else None, reasons)  # fmt: skip
    checks = [_reads(scratch, tables, size + added), _loses(scratch, size if predicts else None, added)]
    if predicts:
        made = _needed(scratch, plan, _outputs(module, found.head.value, size, added, set(grown), False), checks[1])
        alone = scratch.attempt(replace(plan, edits=(*plan.edits, *made)), also=_wide(scratch, plan.after, checks[1]))
        if alone.problem is not None:
            # Vectors elsewhere that happen to be as long are tried only where the head's own are not enough.
            options = _outputs(module, found.head.value, size, added, grown, anywhere=True)
            made = _needed(scratch, plan, options, checks[1])
        limit, how = _bound(made, size, added)
        plan = replace(plan, edits=(*plan.edits, *made), reasons=(*reasons, how))
        checks.append(_bounded(scratch, size, added, limit))
    return settled(scratch, plan, [(size, size + added)], VOCABULARY_WORDS, _all(checks), learns=predicts)


def plan_classes(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan more outputs of a classifier's head.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many classes; `where` names the head where it is not found.

    Raises:
        GrowthRefusedError: The outputs are no classes, or the old logits would change.
    """
    size, task = scratch.expected.shape[-1], scratch.adapter.task.value
    if task in LANGUAGE:
        raise GrowthRefusedError(
            f"The {size} outputs are tokens ({scratch.adapter.task.reason}).",
            "Expected a model that tells classes apart.",
            "Grow the vocabulary.",
        )
    if size == 1 or task in ("regression", "embedding"):
        raise GrowthRefusedError(
            f"The model has {size} {'output' if size == 1 else 'outputs'} and its task is {task}.",
            "Expected one output per class, and at least two.",
            "Grow another part.",
        )
    added = request.added(size, "classes")
    head = request.where if isinstance(request.where, str) else found.head.value
    if head is None or head not in dict(scratch.module.named_modules()):
        raise GrowthRefusedError(
            f"There is no head: {found.head.reason}." if head is None else f"There is no module {head!r}.",
            "Expected the module whose output is the logits.",
            "Name it by `where`.",
        )
    options = _outputs(scratch.module, head, size, added, set(), anywhere=False)
    if not options:
        raise GrowthRefusedError(
            f"No parameter of {head or 'the model itself'} has {size} rows.",
            "Expected a linear layer whose outputs are the logits.",
            "Name such a layer by `where`, or leave it at None.",
        )
    loses = _loses(scratch, size, added)
    plan = Plan("classes", (head,), (), size, size + added, "bounded", size)
    made = _needed(scratch, plan, options, loses)
    limit, how = _bound(made, size, added)
    plan = replace(plan, edits=tuple(made), reasons=(found.head.reason, how))
    checks = [loses, _bounded(scratch, size, added, limit)]
    return settled(scratch, plan, [(size, size + added)], CLASS_WORDS, _all(checks))


def _tables(found: Structure, request: Request) -> list[EmbeddingTable]:
    """Return the token tables that grow: those of one vocabulary."""
    tables = [table for table in found.embeddings.value if table.kind == "token"]
    if not tables:
        raise GrowthRefusedError(
            "No table reads tokens.", "Expected an embedding that is asked for token ids.", "Grow the classes."
        )
    if request.where is None:
        return [table for table in tables if table.rows == tables[0].rows]
    named = [table for table in tables if table.name == request.where]
    if not named:
        raise GrowthRefusedError(
            f"There is no token table {request.where!r}.",
            f"Expected one of {', '.join(t.name for t in tables)}.",
            "Name one of these, or leave where at None.",
        )
    return named


def _rows(module: nn.Module, name: str, size: int, added: int, grown: set[int]) -> list[Edit]:
    """Return the edits that add mean rows to a matrix, unless that was done under another name."""
    tensor = module.get_parameter(name)
    if id(tensor) in grown:
        return []
    grown.add(id(tensor))
    axis = 0 if tensor.shape[0] == size else 1
    return [Widen(name, axis, ((size, added),), "mean"), *owned_sizes(module, name, axis, size, size + added)]


def _outputs(
    module: nn.Module, head: str | None, size: int, added: int, grown: set[int], anywhere: bool
) -> list[list[Edit]]:
    """Return what may have to grow for a head to have more outputs, one list of edits per tensor.

    Args:
        module: The model.
        head: The module that makes the logits.
        size: How many there are.
        added: How many more.
        grown: Tensors that have grown already.
        anywhere: Vectors of that size outside the head may be biases of it too.
    """
    options: list[list[Edit]] = []
    prefix = f"{head}." if head else ""
    place, lowered = ((size, added),), False
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
        inside = head is not None and name.startswith(prefix) and "." not in name.removeprefix(prefix)
        if id(tensor) in grown or not tensor.is_floating_point():
            continue
        if tensor.numel() == size and tensor.shape[-1:] == (size,) and (inside or anywhere):
            grown.add(id(tensor))
            low = isinstance(tensor, nn.Parameter) and not lowered
            lowered = lowered or low
            value = float(tensor.detach().double().mean()) - _margin(size, added) if low else 0.0
            options.append([Widen(name, tensor.dim() - 1, place, "value" if low else "mean", value)])
        elif inside and tensor.dim() > 1 and size in tensor.shape[:2]:
            options.append(_rows(module, name, size, added, grown))
    return options


def _margin(size: int, added: int) -> float:
    """Return by how much the bias of new outputs is below the mean: then they raise the loss by `SHIFT` at most."""
    return max(0.0, math.log(added / (size * SHIFT)))


def _bound(edits: Sequence[Edit], size: int, added: int) -> tuple[float, str]:
    """Return by how much the loss may rise, and why."""
    lowered = any(isinstance(edit, Widen) and edit.fill == "value" for edit in edits)
    limit = SHIFT if lowered else math.log1p(added / size)
    below = f", their bias {_margin(size, added):.2f} below it" if lowered else ""
    return limit, f"new outputs begin at the mean of the old ones{below}: the loss rises by at most {limit:.1e}"


def _wide(scratch: Scratch, outputs: int, check: Check) -> Check:
    """Return a check that the model has so many outputs, and then another."""

    def also(surgery: Surgery) -> str | None:
        width = scratch.adapter.logits(scratch.inputs).shape[-1]
        return check(surgery) if width == outputs else f"the model still has {width} outputs"

    return also


def _needed(scratch: Scratch, plan: Plan, options: Sequence[list[Edit]], check: Check) -> list[Edit]:
    """Leave out what need not grow, such as a table of places that happens to have as many rows."""
    also = _wide(scratch, plan.after, check)
    kept = list(options)
    for option in options:
        fewer = [other for other in kept if other is not option]
        tried = replace(plan, edits=(*plan.edits, *(edit for other in fewer for edit in other)))
        if scratch.attempt(tried, also=also, learns=False).problem is None:
            kept = fewer
    return [edit for option in kept for edit in option]


def _all(checks: Sequence[Check]) -> Check:
    def first(surgery: Surgery) -> str | None:
        return next((problem for check in checks if (problem := check(surgery)) is not None), None)

    return first


def _reads(scratch: Scratch, tables: Sequence[EmbeddingTable], size: int) -> Check:
    """Check that the last of the new tokens can be read, and that its row learns from that."""

    def check(_surgery: Surgery) -> str | None:
        adapter = scratch.adapter
        asked = {adapter.main_input, adapter.content_input} & scratch.inputs.keys()
        weights = [scratch.module.get_submodule(table.name).get_parameter("weight") for table in tables]
        trained = [weight for weight in weights if weight.requires_grad]
        problem: str | None = "no new token can be read"
        for name in sorted(asked):
            ids = scratch.inputs[name]
            if ids.is_floating_point() or ids.dim() < 2:
                continue
            given = ids.clone()
            given[:, given.shape[1] // 2] = size - 1
            try:
                output = adapter.logits({**scratch.inputs, name: given})
            except IndexError:
                # Another side of the model with a vocabulary of its own.
                continue
            if not bool(torch.isfinite(output[..., 0]).any()):
                return "a new token makes the output infinite"
            if not trained:
                return None
            mixed = (output * torch.linspace(0.5, 1.5, output.shape[-1]).to(output))[torch.isfinite(output)].sum()
            gradients = torch.autograd.grad(mixed, trained, allow_unused=True)
            if any(g is not None and bool(g[size - 1].abs().sum() > 0) for g in gradients):
                problem = None
        return problem

    return check


def _loses(scratch: Scratch, size: int | None, added: int) -> Check:
    """Check that a forward that returns a loss still does, with a label that is new."""
    name = next((name for name in LABELS if name in scratch.adapter.argument_names), None)
    if name is None or size is None:
        return lambda _surgery: None
    try:
        works = _loss(scratch, name, size - 1) is not None
    except Exception:
        works = False

    def check(_surgery: Surgery) -> str | None:
        try:
            loss = _loss(scratch, name, size + added - 1)
        except Exception as error:
            return f"the loss fails for a new label ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        return None if loss is not None and math.isfinite(loss) else "the loss for a new label is not finite"

    return check if works else lambda _surgery: None


def _loss(scratch: Scratch, name: str, label: int) -> float | None:
    """Return the loss of the example when all of its labels are the same; None where forward returns none."""
    labels = torch.full(scratch.expected.shape[:-1], label, dtype=torch.long)
    with torch.no_grad(), captured_output():
        output = scratch.adapter.forward({**scratch.inputs, name: labels})
    scalars = [tensor for _, tensor in named_tensors(output) if tensor.dim() == 0]
    return float(scalars[0]) if scalars else None


def _bounded(scratch: Scratch, size: int, added: int, limit: float) -> Check:
    """Check on the example that the new outputs raise the logarithm of the softmax's sum no more than promised."""

    def check(_surgery: Surgery) -> str | None:
        with torch.no_grad():
            output = scratch.adapter.logits(scratch.inputs).double()
        if output.shape[-1] != size + added:
            return f"the model has {output.shape[-1]} outputs then, and not {size + added}"
        rise = float((output.logsumexp(-1) - output[..., :size].logsumexp(-1)).nan_to_num(0.0).max())
        if rise > limit * (1 + 1e-3) + 1e-6:
            return f"the new outputs raise the loss by {rise:.2g} and not by at most {limit:.2g}"
        return None

    return check
