"""A few lines for nearly every kind of finding that show it on ``model``: to paste, run and look at.

A check that knows better lines gives its own. Where a model was validated with a ``spec`` or a ``config``, the lines
use those names too. In all of them `a` is the adapter, `m` the module and `x` its inputs. Lines that do more than read
values work on a copy, `trial`: whoever pastes them keeps the model as it is.
"""

import ast
import copy
from collections.abc import Callable
from dataclasses import fields

from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import content_input, has_length

WIDTH = 107
COPY = "import copy; trial = copy.deepcopy(model)"
UNCOPIED = "# model cannot be copied: these lines change it\n"
READERS = {
    "buffers", "get_buffer", "get_parameter", "get_submodule", "modules", "named_buffers", "named_modules",
    "named_parameters", "parameters", "state_dict",
}  # fmt: skip
"""Methods of a module that lines may call on the model itself."""
BACKWARD = "y = a.logits(x); a.loss(y, a.random_labels(y)).backward()"
GRADIENTS = "print({n: float(p.grad.norm()) for n, p in m.named_parameters() if p.grad is not None})"

OTHER_TOKENS = "# These are other tokens than the check's, so the number differs. It is about 0 where nothing leaks."


def default_lines(adapter: ModelAdapter, finding: Finding) -> str:
    """Return lines that show a finding, empty where there are none for its code.

    Args:
        adapter: The model.
        finding: What was found in it.
    """
    if adapter.failure is not None:
        if finding.code in ("shape_crash", "vocab_mismatch", "hardcoded_device"):
            return f"from utils import ModelAdapter\nprint({_adapter(adapter)}.failure)"
        return ""
    make = LINES.get(finding.code)
    body = make(adapter, finding) if make is not None else ""
    return fitted(f"{opening(adapter)}\n{body}") if body else ""


def fitted(lines: str) -> str:
    """Return lines of which those that are too wide for a report are broken between statements."""
    narrow: list[str] = []
    for line in lines.splitlines():
        narrow.append("")
        for statement in line.split("; "):
            if narrow[-1] and len(narrow[-1]) + len(statement) + 2 > WIDTH:
                narrow.append("")
            narrow[-1] += f"; {statement}" if narrow[-1] else statement
    return "\n".join(narrow)


def copyable(adapter: ModelAdapter) -> bool:
    """Tell whether `copy.deepcopy` can copy what the adapter was made from; its values are not copied for that."""
    values = [*adapter.module.parameters(), *(buffer for buffer in adapter.module.buffers() if buffer.is_leaf)]
    try:
        copy.deepcopy(adapter.origin, {id(value): value for value in values})
    except Exception:
        return False
    return True


def on_a_copy(lines: str, possible: bool = True) -> str:
    """Return lines that do the same to a copy of ``model``; those that only read its values stay as they are.

    Args:
        lines: What shows a fault on ``model``.
        possible: Whether the model can be copied; if not, the lines say that they change it.
    """
    tree = ast.parse(lines)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "model"]
    reading = {id(_root(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    reading -= {
        id(_root(node.func))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr in READERS)
    }
    if all(id(node) in reading for node in names) or "copy.deepcopy(model)" in lines or lines.startswith(UNCOPIED):
        return lines
    if not possible:
        return UNCOPIED + lines
    rows = [row.encode() for row in lines.splitlines()]
    for node in names:
        # Both names are equally long, so that what stands behind them keeps its place.
        row, start = rows[node.lineno - 1], node.col_offset
        rows[node.lineno - 1] = row[:start] + b"trial" + row[start + len(b"model") :]
    first, *others = (row.decode() for row in rows)
    simple = not hasattr(tree.body[0], "body") and len(COPY) + 2 + len(first) <= WIDTH
    return "\n".join([f"{COPY}; {first}" if simple else f"{COPY}\n{first}", *others])


def _root(node: ast.expr) -> ast.expr:
    """Return what a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def opening(adapter: ModelAdapter, length: int | None = None, samples: int = 2) -> str:
    """Return the lines that make the adapter `a`, its module `m` and its inputs `x`."""
    made = f"a = {_adapter(adapter)}; m = a.module.eval(); x = {_inputs(adapter, length, samples)}"
    return f"import torch; from utils import ModelAdapter\n{made}"


def reordered(adapter: ModelAdapter, length: int, tiles: int | None = None) -> str:
    """Return lines that reorder what lies between the first and the last token, or the tiles of an image."""
    name = adapter.main_input
    if tiles is not None:
        rows = f"torch.cat(x[{name!r}].chunk({tiles}, -2)[::-1], -2)"
        other = f"torch.cat({rows}.chunk({tiles}, -1)[::-1], -1)"
    else:
        other = f"torch.cat([(i := x[{name!r}])[:, :1], i[:, 1:-1].flip(1), i[:, -1:]], 1)"
    last = "[:, -1]" if adapter.task.value in ("causal_lm", "masked_lm") else ""
    changed = f"y = a.logits({{**x, {name!r}: {other}}}){last}"
    return fitted(f"{opening(adapter, length, 1)}\n{changed}; print((a.logits(x){last} - y).abs().max())")


def ignored(adapter: ModelAdapter, name: str, value: Tensor) -> str:
    """Return lines that replace one input.

    Args:
        adapter: The model.
        name: The input.
        value: An example of it.
    """
    if value.is_floating_point():
        other = f"torch.randn_like(x[{name!r}])"
    elif value.unique().numel() == 1:
        other = f"(x[{name!r}] == 0).to(x[{name!r}].dtype)"
    else:
        other = f"x[{name!r}].roll(1, -1)"
    return f"{opening(adapter)}\nprint((a.logits(x) - a.logits({{**x, {name!r}: {other}}})).abs().max())"


def more_arguments(adapter: ModelAdapter) -> str:
    """Return what is to be written behind ``model`` where a model was validated with a config or a spec."""
    stated = any(getattr(adapter.spec, field.name) is not field.default for field in fields(adapter.spec))
    bare = isinstance(adapter.origin, nn.Module) and adapter.config and not hasattr(adapter.module, "config")
    return (", config=config" if bare else "") + (", spec=spec" if stated else "")


def _adapter(adapter: ModelAdapter) -> str:
    """Return the expression for the adapter, with what the user stated."""
    return f"ModelAdapter(model{more_arguments(adapter)})"


def _inputs(adapter: ModelAdapter, length: int | None = None, samples: int = 2) -> str:
    """Return the expression for inputs, as long as those of most checks."""
    if has_length(adapter) and length is None:
        length = training_inputs(adapter)[adapter.main_input].shape[1]
    return f"a.example_inputs({samples}{f', {length}' if length else ''})"


def _chosen(adapter: ModelAdapter, finding: Finding) -> str:
    """Return the condition that picks the parameters of a finding by their name `n`."""
    names = dict(adapter.module.named_parameters())
    if finding.where in names:
        return f"n == {finding.where!r}"
    inside = any(name.startswith(f"{finding.where}.") for name in names)
    return f"n.startswith({finding.where + '.'!r})" if inside else "True"


def _mode(finding: Finding) -> str:
    return "m.train(); " if "in train mode" in finding.message else ""


def _no_gradient(adapter: ModelAdapter, finding: Finding) -> str:
    missing = f"[n for n, p in m.named_parameters() if {_chosen(adapter, finding)} and p.grad is None]"
    return f"m.zero_grad(); y = a.logits(x).square().mean(); y.requires_grad and y.backward(); print({missing})"


def _gradients(adapter: ModelAdapter, finding: Finding) -> str:
    return f"{_mode(finding)}{BACKWARD}; {GRADIENTS}"


def _not_finite(adapter: ModelAdapter, finding: Finding) -> str:
    bad = "[n for n, p in m.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]"
    return f"{_mode(finding)}{BACKWARD}; print(y.isfinite().all(), {bad})"


def _crash_backward(adapter: ModelAdapter, finding: Finding) -> str:
    mode = "m.train(); " if "in train mode raises" in finding.message else ""
    steps = "[a.loss(y, a.random_labels(y)).backward() for y in map(a.logits, (x, x))]"
    return f"{mode}{steps}"


def _first_loss(adapter: ModelAdapter, finding: Finding) -> str:
    return "y = a.logits(x); print(y.std(), a.loss(y, a.random_labels(y)))"


def _other_samples(adapter: ModelAdapter, finding: Finding) -> str:
    if "alone" in finding.message:
        alone = "a.logits({k: v[-1:] for k, v in x.items()})"
        return f"x = {_inputs(adapter, samples=4)}; print((a.logits(x)[-1:] - {alone}).abs().max())"
    others = "{k: v[[0, 1, 1, 1]] for k, v in x.items()}"
    return f"x = {_inputs(adapter, samples=4)}; print((a.logits(x) - a.logits({others}))[0].abs().max())"


def _two_samples(adapter: ModelAdapter, finding: Finding) -> str:
    return "y = a.logits(x); print((y[0] - y[1]).abs().max())"


def _later_tokens(adapter: ModelAdapter, finding: Finding) -> str:
    name = content_input(adapter)
    value = training_inputs(adapter)[name]
    cut = value.shape[1] // 2
    later = f"(i[:, {cut}:] + 1) % {adapter.readable_ids(name)}"
    if value.is_floating_point():
        later = f"torch.randn_like(i[:, {cut}:])"
    other = f"torch.cat([(i := x[{name!r}])[:, :{cut}], {later}], 1)"
    return f"print((a.logits(x) - a.logits({{**x, {name!r}: {other}}}))[:, :{cut}].abs().max())\n{OTHER_TOKENS}"


def _padding_row(adapter: ModelAdapter, finding: Finding) -> str:
    if not isinstance(dict(adapter.module.named_modules()).get(finding.where), nn.Embedding):
        return ""
    table = f"t = m.get_submodule({finding.where!r})"
    return f"{table}; print(t.padding_idx, t.weight[t.padding_idx].norm(), a.pad_token_id.value)"


def _part_gradients(adapter: ModelAdapter, finding: Finding) -> str:
    norms = f"{{n: float(p.grad.norm()) for n, p in m.named_parameters() if {_chosen(adapter, finding)}}}"
    return f"m.zero_grad(); {BACKWARD}; print({norms})"


def _equal_rows(adapter: ModelAdapter, finding: Finding) -> str:
    if finding.where not in dict(adapter.module.named_parameters()):
        return ""
    return f"w = m.get_parameter({finding.where!r}); print((w - w[:1]).abs().max())"


def _zeros(adapter: ModelAdapter, finding: Finding) -> str:
    return f"print({{n: float(p.abs().max()) for n, p in m.named_parameters() if {_chosen(adapter, finding)}}})"


def _twice(adapter: ModelAdapter, finding: Finding) -> str:
    return "print(torch.equal(a.logits(x), a.logits(x)))"


def _alone(adapter: ModelAdapter, finding: Finding) -> str:
    alone = "a.logits({k: v[:1] for k, v in x.items()})"
    return f"{_mode(finding)}print((a.logits(x)[:1] - {alone}).abs().max())"


def _made_late(adapter: ModelAdapter, finding: Finding) -> str:
    return "n = len(list(m.parameters())); y = a.forward(x); print(len(list(m.parameters())) - n)"


def _trainable(adapter: ModelAdapter, finding: Finding) -> str:
    return "print([n for n, p in m.named_parameters() if p.requires_grad])"


def _last_id(adapter: ModelAdapter, finding: Finding) -> str:
    last = f"x[{adapter.main_input!r}].fill_(a.vocab_size.value - 1)"
    return f"print(a.logits(x).shape[-1], a.vocab_size.value); {last}; print(a.logits(x).shape)"


def _half(adapter: ModelAdapter, finding: Finding) -> str:
    kind = "bfloat16" if "bfloat16" in finding.message else "half"
    inputs = f"x = {{k: v.{kind}() if v.is_floating_point() else v for k, v in x.items()}}"
    return f"y = a.logits(x); m.{kind}(); {inputs}; print((a.logits(x) - y).abs().max(), y.std())"


def _smallest(adapter: ModelAdapter, finding: Finding) -> str:
    largest = "max(float(p.grad.abs().max()) for p in m.parameters() if p.grad is not None)"
    return f"m.zero_grad(); {BACKWARD}; print({largest})"


LINES: dict[str, Callable[[ModelAdapter, Finding], str]] = {
    "backward_crash": _crash_backward,
    "batch_leakage": _other_samples,
    "constant_output": _two_samples,
    "dead_relu": _part_gradients,
    "detached_submodule": _no_gradient,
    "exploding_gradient": _gradients,
    "exploding_init": _first_loss,
    "frozen_parameter": _trainable,
    "future_leakage": _later_tokens,
    "lazy_parameter": _made_late,
    "low_precision_unsafe": _half,
    "nan_output": _not_finite,
    "padding_idx_wrong": _padding_row,
    "state_across_calls": _twice,
    "symmetric_init": _equal_rows,
    "train_eval_ignored": _alone,
    "unused_parameter": _no_gradient,
    "vanishing_gradient": _gradients,
    "vanishing_init": _first_loss,
    "vocab_mismatch": _last_id,
    "zero_gradient": _smallest,
    "zero_init": _zeros,
}
"""What makes the last lines for a code."""


def label_lines(adapter: ModelAdapter, inputs: dict[str, Tensor], labels: str, last: str) -> str:
    """Return lines that call a model with labels and then show something of what it `got`.

    Args:
        adapter: The model.
        inputs: What it was judged on.
        labels: The statement that makes the labels `t`, to which the logits `y` are known.
        last: The last statement.
    """
    main = inputs[adapter.main_input]
    start = opening(adapter, main.shape[1] if has_length(adapter) else None, len(main))
    call = "from utils.adapters.objectives import own_loss; got = own_loss(a, x, t, y)"
    return fitted(f"{start}\ny = a.logits(x); {labels}; {call}\n{last}")


def class_label_lines(adapter: ModelAdapter, inputs: dict[str, Tensor], labels: Tensor, classes: int, last: str) -> str:
    """Return such lines for labels that count through the classes."""
    return label_lines(
        adapter, inputs, f"t = torch.arange({labels.numel()}).view({tuple(labels.shape)}) % {classes}", last
    )


def own_shift_lines(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> str:
    """Return lines that show by how much the targets are moved that a model makes of its own tokens."""
    ids = inputs[adapter.main_input]
    shown = "print('label shift', shift_of_own_targets(a, x), 'expected 1')"
    start = opening(adapter, ids.shape[1], len(ids))
    return fitted(f"{start}\nfrom utils.validation.builtin_loss import shift_of_own_targets; {shown}")
