"""What a user, a schedule or the controller asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.growth.edits import GrowthRefusedError
from utils.training.config import LARGEST


@dataclass(frozen=True)
class Request:
    """One wish."""

    operator: str
    """One of `utils.growth.config.OPERATORS`."""
    amount: int | None = None
    """How much is added: blocks, hidden units, heads, lanes, rows, experts or channels."""
    to: int | None = None
    """The size to reach instead."""
    where: str | int | None = None
    """A block or module by name, or a block by number; None lets the operator choose."""
    drawn: bool = False
    """New blocks draw their matrices anew instead of copying those of the block they are modelled on."""
    approximate: bool = False
    """Where nothing exact exists, allow a change of the function, which a short distillation takes back."""
    gated: bool = True
    """Allow a gate where nothing exact exists."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            GrowthRefusedError: One is no size, or no place.
        """
        for name in ("amount", "to"):
            value = getattr(self, name)
            if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST):
                continue
            raise GrowthRefusedError(
                f"{name} is {str(value)[:40]!r}.",
                f"Expected a whole number from 1 to {LARGEST:,}.",
                "Say how much is added with amount, or the size to reach with to.",
            )
        if (self.amount is None) == (self.to is None):
            raise GrowthRefusedError(
                f"amount is {self.amount} and to is {self.to}.",
                "Expected exactly one of them.",
                "Say how much is added with amount, or the size to reach with to.",
            )
        if self.where is not None and (isinstance(self.where, bool) or not isinstance(self.where, (str, int))):
            raise GrowthRefusedError(
                f"where is {self.where!r}.",
                "Expected the name of a block or module, or the number of a block.",
                "Leave it at None to let the operator choose.",
            )

    def place(self, blocks: Sequence[str]) -> str | None:
        """Return where, by name: a number counts the blocks.

        Raises:
            GrowthRefusedError: There is no block of that number.
        """
        if not isinstance(self.where, int):
            return self.where
        if not -len(blocks) <= self.where < len(blocks):
            raise GrowthRefusedError(
                f"Block {self.where} was asked for, and there are {len(blocks)}.",
                f"Expected a number from 0 to {len(blocks) - 1}." if blocks else "Expected blocks that have numbers.",
                "Set where to the name of a module, or leave it at None.",
            )
        return blocks[self.where]

    def added(self, size: int, what: str) -> int:
        """Return how much is added to a size.

        Raises:
            GrowthRefusedError: Nothing, or less than nothing.
        """
        wanted = self.amount if self.to is None else self.to - size
        assert wanted is not None
        if wanted < 1:
            raise GrowthRefusedError(
                f"{self.operator} was to grow to {self.to}, and the model has {size} {what}.",
                "Expected more than there is.",
                f"Say to={size + 1} or more.",
            )
        return wanted
