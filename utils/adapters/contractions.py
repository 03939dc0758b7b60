"""Which axes of two tensors a product sums over, in one notation for matmul, bmm, baddbmm and einsum."""

from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

MATRIX_PRODUCTS = {"matmul": (0, 1), "bmm": (0, 1), "mm": (0, 1), "mv": (0, 1), "baddbmm": (1, 2), "addmm": (1, 2)}
"""Functions by name, with the places of the two factors among their arguments."""


@dataclass(frozen=True)
class Labels:
    """One letter per axis, as in einsum."""

    left: str
    """Axes of the first factor."""
    right: str
    """Axes of the second factor."""
    out: str
    """Axes of the result."""

    @property
    def contracted(self) -> str:
        """Letters summed over."""
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.out)

    @property
    def shared(self) -> str:
        """Letters of both factors that stay, in the order of the result."""
        return "".join(letter for letter in self.out if letter in self.left and letter in self.right)

    def own(self, left: bool) -> str:
        """Return the letters of the result that only one factor has."""
        mine, other = (self.left, self.right) if left else (self.right, self.left)
        return "".join(letter for letter in self.out if letter in mine and letter not in other)


@dataclass(frozen=True)
class Factors:
    """Two tensors and how they are multiplied."""

    left: Tensor
    right: Tensor
    labels: Labels


def factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors | None:
    """Read a call of a matrix product or of einsum; None when it is no product of two tensors.

    Args:
        name: Name of the function, without underscores around it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if name == "einsum":
        return _einsum(args)
    if name not in MATRIX_PRODUCTS:
        return None
    first, second = MATRIX_PRODUCTS[name]
    left = args[first] if len(args) > first else kwargs.get("batch1", kwargs.get("mat1", kwargs.get("input")))
    right = args[second] if len(args) > second else next(
        (kwargs[key] for key in ("batch2", "mat2", "other", "vec") if key in kwargs), None
    )  # fmt: skip
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or not left.dim() or not right.dim():
        return None
    return Factors(left, right, _matrix_labels(left.dim(), right.dim()))


def summed(pair: tuple[Tensor, Tensor], shape: torch.Size) -> Factors:
    """Read ``(a * b).sum(-1)``, whose product has this shape, as a product of the two; broadcast axes belong to one."""
    letters = ascii_letters[: len(shape)]
    sides = []
    for tensor in pair:
        whole = tensor.detach()[(None,) * (len(shape) - tensor.dim())]
        kept = [axis for axis, size in enumerate(whole.shape) if size == shape[axis]]
        index = tuple(slice(None) if axis in kept else 0 for axis in range(len(shape)))
        sides.append((whole[index], "".join(letters[axis] for axis in kept)))
    (left, first), (right, second) = sides
    return Factors(left, right, Labels(first, second, letters[:-1]))


def first_of_many(args: tuple[Any, ...]) -> tuple[str, list[Tensor], str] | None:
    """Take an einsum of three or more tensors apart: the product of the first two, and what is left to do.

    Args:
        args: Arguments of the einsum.

    Returns:
        The equation of the first product, all tensors, and the equation in which its result takes the place of the
        two; None for other calls, and for equations with an ellipsis or without an arrow.
    """
    if len(args) < 2 or not isinstance(args[0], str) or "." in args[0] or "->" not in args[0]:
        return None
    tensors = list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])
    given, _, out = args[0].replace(" ", "").partition("->")
    left, right, *others = given.split(",") if "," in given else (given, "")
    if not others or len(tensors) != len(others) + 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    needed = set("".join(others) + out)
    between = "".join(letter for letter in dict.fromkeys(left + right) if letter in needed)
    return f"{left},{right}->{between}", tensors, f"{','.join((between, *others))}->{out}"


def _matrix_labels(left: int, right: int) -> Labels:
    """Return the labels of a matrix product of tensors with so many axes; missing leading axes broadcast."""
    summed, rows, columns = "xyz"
    leading = ascii_letters[: max(left, right, 2) - 2]
    a = leading[max(0, len(leading) - max(0, left - 2)) :] + (rows if left > 1 else "") + summed
    b = leading[max(0, len(leading) - max(0, right - 2)) :] + summed + (columns if right > 1 else "")
    return Labels(a, b, leading + (rows if left > 1 else "") + (columns if right > 1 else ""))


def _einsum(args: tuple[Any, ...]) -> Factors | None:
    """Read the two factors off an einsum with a string equation."""
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(operands) != 2 or not all(isinstance(operand, Tensor) for operand in operands):
        return None
    given, arrow, out = args[0].replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != 2:
        return None
    named = [sum(letter.isalpha() for letter in term) for term in terms]
    extra = [operand.dim() - count for operand, count in zip(operands, named, strict=True)]
    free = [letter for letter in ascii_letters if letter not in given]
    leading = "".join(free[: max(*extra, 0)])
    left, right = (
        t.replace("...", leading[len(leading) - n :] if n > 0 else "") for t, n in zip(terms, extra, strict=True)
    )
    if not arrow:
        both = left + right
        out = leading + "".join(sorted(letter for letter in set(both) - set(leading) if both.count(letter) == 1))
    out = out.replace("...", leading)
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None
    return Factors(operands[0], operands[1], Labels(left, right, out))
