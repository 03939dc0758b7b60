"""What an argument of forward beside the main one is for, by its name and annotation: a length, a mask, a flag, a twin.

Only roles whose value follows from the main input are here; what a graph or a camera matrix holds nobody can guess.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

ROLES = {
    "labels": re.compile(r"^(targets|labels|target|y)$"),
    "padding": re.compile(r"^(\w+_)?(padding_mask|pad_mask)$"),
    "mask": re.compile(r"^(\w+_)?(attention_mask|mask)$"),
    "lengths": re.compile(r"^(\w+_)?(lengths?|lens?|seqlens?)$"),
    "positions": re.compile(r"^(position_ids|positions|pos_ids|pos)$"),
    "segments": re.compile(r"^(token_type_ids|segment_ids|segments)$"),
    "state": re.compile(r"^(hidden|hx|h_?0|h|c_?0|states?|hidden_states?|cache|past\w*|mems?|memory|kv_cache)$"),
    "flag": re.compile(
        r"^(training|train|is_train\w*|use_\w+|return_\w+|output_\w+|need_\w+|is_causal|causal|verbose)$"
    ),
    "steps": re.compile(r"^(t|timesteps?|time_steps?|diffusion_steps?|sigmas?|noise_levels?)$"),
}
"""Names by role."""

TWINS = re.compile(
    r"^(\w*?(left|right|first|second|anchor|positive|negative|pos|neg|query|document|passage|candidate|premise|hypothesis)"
    r"\w*|\w*?_?(a|b|1|2|3))$"
)
"""Names of inputs that are all of one kind, as siamese and triplet models take them."""


LABELS = re.compile(r"^((\w+_)?(labels?|targets?|gold|truth|y_true)|y|start_positions|end_positions)$")
"""Names of what may be labels; a trial tells whether they are."""

PLAIN = re.compile(
    r"^(\w*inputs_embeds|\w*head_mask|logits_to_keep|num_\w+|cache_\w+|labels_?\w*|\w*_(size|id|type|scale))$"
)
"""Optional arguments that are only another form, a part or a setting of what is there already."""


def role_of(name: str, annotation: Any = None) -> str | None:
    """Return what an argument is for; None where nobody can know.

    Args:
        name: The argument's name; of a nested one the last part counts.
        annotation: Its annotation, a class or a string, if it has one.
    """
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if kind == "bool":
        return "flag"
    last = name.rsplit(".", 1)[-1]
    return next((role for role, pattern in ROLES.items() if pattern.match(last)), None)


def is_content(name: str) -> bool:
    """Tell whether an optional argument carries content of its own, such as an image beside a text."""
    return role_of(name) is None and not PLAIN.match(name)


def may_be_labels(name: str) -> bool:
    """Tell whether an argument, or an entry of one, has a name that labels have."""
    return bool(LABELS.match(name.rsplit(".", 1)[-1]))


def is_text(name: str, value: Any) -> bool:
    """Tell whether an input is token ids ``(batch, seq)``, rather than a mask, positions or a number per sample.

    What is named as labels and is an input all the same is a text that the model reads, as the target of a translation.
    """
    whole = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return whole and value.dim() == 2 and role_of(name) in (None, "labels")


def are_twins(first: str, second: str) -> bool:
    """Tell whether two arguments are named as inputs of one kind."""
    return first != second and bool(TWINS.match(first) and TWINS.match(second))


def string_keys(module: nn.Module, argument: str) -> tuple[str, ...]:
    """Return the string keys under which a forward reads one of its arguments, in order: ``batch["input_ids"]``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found: dict[tuple[int, int], str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == argument:
            key: ast.expr = node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and (node.func.value.id, node.func.attr) in ((argument, "pop"), (argument, "__getitem__"))
            and node.args
        ):
            key = node.args[0]
        else:
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found[node.lineno, node.col_offset] = key.value
    return tuple(dict.fromkeys(found[place] for place in sorted(found)))
