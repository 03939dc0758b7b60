"""What a user, a schedule or the controller asks for."""

from dataclasses import dataclass

from utils.growth.edits import GrowthRefusedError


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

    def added(self, size: int, what: str) -> int:
        """Return how much is added to a size.

        Raises:
            GrowthRefusedError: Nothing, or less than nothing.
        """
        wanted = self.amount if self.to is None else self.to - size
        if wanted is None or (self.amount is not None and self.to is not None) or wanted < 1:
            asked = f"to {self.to}" if self.to is not None else f"by {self.amount}"
            raise GrowthRefusedError(
                f"{self.operator} was to grow {asked}, and the model has {size} {what}.",
                "Expected more than there is, said by one of amount and to.",
            )
        return wanted
