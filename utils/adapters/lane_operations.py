"""Operations by what they do to lanes, by name, and their arguments."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

SHAPING = frozenset((
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "atleast_2d",
))  # fmt: skip
"""Numbers stay in order; only the shape changes."""
MOVING = frozenset((
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint", "expand", "expand_as",
    "broadcast_to", "flip", "roll", "repeat", "repeat_interleave", "tile", "unfold", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "rot90",
))  # fmt: skip
"""Numbers are moved or repeated."""
CUTTING = frozenset((
    "getitem", "narrow", "select", "index_select", "chunk", "split", "tensor_split", "unbind", "hsplit", "vsplit",
    "dsplit", "split_with_sizes", "unsafe_chunk", "unsafe_split",
))  # fmt: skip
"""Some of the numbers are kept."""
ELEMENTWISE = frozenset((
    "add", "sub", "subtract", "radd", "iadd", "isub", "rsub", "mul", "multiply", "rmul", "imul", "div", "divide",
    "true_divide", "rdiv", "idiv", "truediv", "itruediv", "rtruediv", "floordiv", "floor_divide", "remainder", "fmod",
    "mod", "pow", "rpow", "ipow", "float_power", "square", "sqrt", "rsqrt", "reciprocal", "abs", "absolute", "neg",
    "negative", "positive", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh",
    "cosh", "tanh", "asin", "acos", "atan", "arctan", "atan2", "erf", "erfc", "sigmoid", "logit", "relu", "relu6",
    "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "softshrink",
    "hardshrink", "tanhshrink", "hardtanh", "hardswish", "hardsigmoid", "threshold", "logsigmoid", "log_sigmoid",
    "sign", "sgn", "round", "floor", "ceil", "trunc", "frac", "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num",
    "isnan", "isinf", "isfinite", "logical_not", "logical_and", "logical_or", "logical_xor", "bitwise_not",
    "bitwise_and", "bitwise_or", "and", "or", "xor", "invert", "eq", "ne", "lt", "le", "gt", "ge", "dropout",
    "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_alpha_dropout", "where",
    "masked_fill", "addcmul", "addcdiv", "lerp", "maximum", "minimum", "fmax", "fmin", "hypot", "xlogy", "sinc", "to",
    "float", "half", "double", "bfloat16", "type", "type_as", "cuda", "cpu", "contiguous", "clone", "detach", "alias",
    "requires_grad",
))  # fmt: skip
"""Each number of the result depends on the numbers at its place only."""
MEANS = frozenset(("mean", "var", "std", "var_mean", "std_mean"))
"""Statistics that stay when every lane is there twice."""
REDUCING = MEANS | frozenset((
    "sum", "amax", "amin", "max", "min", "prod", "norm", "linalg_vector_norm", "linalg_norm", "logsumexp", "any", "all",
    "median", "nansum", "nanmean", "cumsum", "cumprod", "normalize",
))  # fmt: skip
"""What mixes numbers along some axes only."""
SOFTMAXES = frozenset(("softmax", "log_softmax", "softmin"))
POOLING = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    "interpolate": 0,
    "upsample": 0,
    "grid_sample": 0,
}  # fmt: skip
"""What mixes numbers along the last axes, as many as stated; 0 for all axes after the first two."""
FACTORIES = frozenset((
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace",
))  # fmt: skip
"""What makes new numbers, at most of another tensor's shape."""
LEAVING = frozenset((
    "item", "tolist", "numpy", "float", "int", "bool", "complex", "index", "contains", "equal", "allclose",
    "is_nonzero", "setitem", "array",
))  # fmt: skip
"""What takes numbers to where they cannot be followed."""

ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "embedding": ("input", "weight", "padding_idx", "max_norm"),
    "prelu": ("input", "weight"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    **{f"conv{n}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for n in (1, 2, 3)},
    **{
        f"conv_transpose{n}d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
        for n in (1, 2, 3)
    },
}
"""Names of positional arguments."""
PLACES = {"norm": 2, "linalg_vector_norm": 2, "linalg_norm": 2, "normalize": 2}
"""Where an operation has its axes, if not second."""


def given_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name."""
    return {**dict(zip(ARGUMENTS[name], args, strict=False)), **kwargs}


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments and the lists in them, in order."""
    if isinstance(value, Tensor):
        return [value]
    members: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return [t for member in members for t in tensors_in(member)] if isinstance(value, (list, tuple, dict)) else []


def axes_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> frozenset[int]:
    """Return the axes along which an operation mixes numbers; all where it states none.

    Args:
        name: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dims: Number of axes of its input.
    """
    place = PLACES.get(name, 1)
    stated = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if stated is None and name in ("normalize", "glu"):
        stated = 1 if name == "normalize" else -1
    if isinstance(stated, int) and not isinstance(stated, bool):
        stated = (stated,)
    if isinstance(stated, (tuple, list)) and len(stated):
        return frozenset(axis % dims for axis in stated)
    return frozenset(range(dims))
