"""What is known about one tensor of a forward pass: the notes that `utils.adapters.provenance` keeps."""

from dataclasses import dataclass

from torch import Tensor, nn

from utils.adapters.contractions import Factors


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a linear layer: a product with a parameter."""

    where: str
    """Module whose own code calls it; for nn.Linear, that module."""
    weight: nn.Parameter
    """The parameter."""
    out_axis: int
    """Its axis of outputs."""
    output: Tensor
    """What it returns, detached."""
    start: int = 0
    """First index along `out_axis` that this call uses; a part of one parameter may serve as a layer."""


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two activations, as in q k^T."""

    factors: Factors
    """What was multiplied."""
    factor: float
    """Product of all constants by which the two were multiplied since they left their layers."""
    bounded: bool
    """One of them is normalised or scaled by something learned."""
    projected: bool
    """Both leave linear layers."""
    upcast: bool
    """Both were cast to float32 for this product."""
    layers: "tuple[Layer | None, Layer | None]" = (None, None)
    """The linear layers that the two leave."""


@dataclass(frozen=True, eq=False)
class Softmax:
    """One softmax."""

    where: str
    """Module whose own code calls it."""
    kind: str
    """``"softmax"`` or ``"scaled_dot_product_attention"``."""
    dim: int
    """Its axis, counted from the end."""
    weights: Tensor
    """Its result, detached."""
    scores: "Trace"
    """What is known about its input."""


@dataclass(frozen=True, eq=False)
class Contraction:
    """A sum of values weighted by a softmax."""

    softmax: Softmax
    """Where the weights come from."""
    where: str
    """Module whose own code does the sum."""
    weights: Tensor
    """The weights as they are used, in the layout of the sum."""
    axes: tuple[int, ...]
    """Axes of `weights` that are summed over."""
    exact: bool
    """The weights are the softmax's result, at most rearranged."""
    multiplied: bool
    """It is written as a multiplication and a sum, not as a matrix product."""
    values: Tensor | None = None
    """What is weighted, if it is known."""
    values_layer: Layer | None = None
    """The linear layer that the values leave."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known about one tensor."""

    live: bool = False
    """It depends on the model's input; else on parameters only."""
    parameter: nn.Parameter | None = None
    """The parameter of which it is a view."""
    layer: Layer | None = None
    """The linear layer that it leaves, with only rearrangement, rotation, norms and constants since."""
    last: frozenset[Layer] = frozenset()
    """The linear layers that it leaves, with anything elementwise since, such as an activation or a gate."""
    straight: Layer | None = None
    """The one linear layer among the two factors of a gate that passed no activation."""
    mixed: Softmax | None = None
    """The softmax that weighted the values whose sum it is."""
    factor: float = 1.0
    """Product of the constants by which it was multiplied since the layer or product that it comes from."""
    projected: bool = False
    """It leaves a linear layer, with nothing but rearrangement, rotation and constants since."""
    bounded: bool = False
    """It is normalised, passes a bounded function, or is multiplied by something that is not constant."""
    casts: int = 0
    """How often it was cast since the last arithmetic."""
    upcast: bool = False
    """The only cast was one to float32."""
    product: Product | None = None
    """The product of activations that it is, up to constants, masks and additions."""
    axes: tuple[int, int] | None = None
    """Axes of the product's first and second factor, counted from the end."""
    biased: bool = False
    """Something learned or computed is added to the product."""
    softmax: Softmax | None = None
    """The softmax that it is, up to rearrangement, or a change of numbers if not `exact`."""
    exact: bool = False
    """See `softmax`."""
    logarithm: Softmax | None = None
    """The softmax of which it is the logarithm."""
    pair: tuple[Tensor, Tensor] | None = None
    """The two activations of which it is the elementwise product."""
    weighted: tuple[Tensor, ...] = ()
    """Softmax weights by which values were multiplied to give this."""
    exponential: "Trace | None" = None
    """What it is the exponential of."""
    normaliser: "tuple[Trace, int] | None" = None
    """The exponential of which it is the sum, and along which axis, counted from the end."""
