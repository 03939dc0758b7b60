"""What every method against forgetting looks like, and where to find it by name.

A method sees the stream through a `Learner` and acts at six points; what it does not use it leaves out. It never owns
the training loop: growth, exact resume, mixed precision and checkpoints are those of any run.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from utils.runtime.errors import ConfigError
from utils.training.state import ModelChange, Undo

if TYPE_CHECKING:
    from utils.continual.learner import Learner

METHODS: Mapping[str, str] = {
    "naive": "naive.Naive",
    "joint": "joint.Joint",
    "replay": "replay.Replay",
    "der++": "der.DarkReplay",
    "agem": "agem.AveragedGem",
    "ewc": "ewc.EWC",
    "si": "si.SI",
    "lwf": "lwf.LwF",
    "packnet": "packnet.PackNet",
    "columns": "columns.Columns",
    "consolidation": "consolidation.Consolidation",
}
"""Name of each method, and the class in `utils.continual.methods`."""
OTHER_NAMES = {
    "er": "replay", "finetune": "naive", "der": "der++", "derpp": "der++", "a-gem": "agem", "progressive": "columns",
}  # fmt: skip
"""Names that the field uses too."""


class Method:
    """A method that does nothing; others override what they need.

    Attributes:
        name: As the settings call it.
        remembers: It replays samples from the memory.
        needs_boundaries: It must be told where tasks begin and end.
        needs_task: It must be told which task a sample is of, when the model answers too.
        alone: It does not go with another method.
        lowers: It lowers some outputs in the loss of new samples.
        projects: It turns the gradient, when all others have added to it.
        holds: It holds weights, as strongly as `ContinualConfig.penalty` says.
        answers_kept: It keeps answers, as strongly as `ContinualConfig.logit_weight` says.
        policy: What stays in a full memory when the settings leave it to the method.
    """

    name: ClassVar[str] = "naive"
    remembers: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    lowers: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    answers_kept: ClassVar[bool] = False
    policy: ClassVar[str] = "balanced"

    def check(self, learner: "Learner") -> None:
        """Make sure that it can work on this model and stream.

        Raises:
            SeedbedError: It cannot.
        """

    def begin_task(self, learner: "Learner") -> None:
        """Get ready for a task, before its first step."""

    def end_task(self, learner: "Learner") -> None:
        """Keep what later tasks must not destroy, after the last step of a task."""

    def keeps_logits(self, learner: "Learner") -> bool:
        """Tell whether the memory is to keep what the model answered when it saw a sample."""
        return False

    def lowered(self, learner: "Learner", labels: Tensor) -> Tensor | None:
        """Return what is added to the logits of new samples in their loss, ``(outputs,)``; None for nothing.

        Args:
            learner: The stream.
            labels: Those of the new samples.
        """
        return None

    def new_pass(self, learner: "Learner") -> None:
        """Get ready for a pass on new samples, forward and backward."""

    def extra_loss(self, learner: "Learner", batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return what is added to the loss of a batch, with its graph.

        Args:
            learner: The stream.
            batch: New samples.
            logits: The model's answers to them, with their graph.
            labels: What was to be answered, `utils.adapters.objectives.IGNORED` where nothing is predicted.
        """
        return None

    def change_gradient(self, learner: "Learner") -> None:
        """Change the gradient of a whole step, before it is measured and clipped."""

    def after_step(self, learner: "Learner") -> None:
        """Act on the weights after an optimizer step."""

    @contextmanager
    def as_of(self, learner: "Learner", task: int) -> Iterator[None]:
        """Let the model answer as it does for a task, while the block runs."""
        yield

    def end(self, learner: "Learner") -> None:
        """Let go of the model at the end of a session, also one that an error ended; may be called twice."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers: nested dicts and lists of numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""

    def migrate(self, change: ModelChange) -> Undo | None:
        """Follow a change of the model.

        Returns:
            What puts everything back; None when there was nothing to do.

        Raises:
            MigrationError: It cannot, and has changed nothing.
        """
        return None

    @property
    def stored_floats(self) -> int:
        """How many numbers it keeps beside the model and the memory."""
        return 0


def method_classes(names: str) -> list[type[Method]]:
    """Return the classes of methods joined by ``+``.

    Raises:
        ConfigError: A name is unknown, or they do not go together.
    """
    # The plus signs of der++ join nothing.
    given = [name.strip() for name in names.lower().replace("der++", "derpp").split("+")]
    chosen = [OTHER_NAMES.get(name, name) for name in given]
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(
                f"ContinualConfig.method is {names!r}, and {name!r} is no method.",
                f"Expected some of {', '.join(METHODS)}, joined by +.",
                f"Did you mean {near[0]!r}?" if (near := get_close_matches(name, METHODS, n=1)) else "",
            )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"ContinualConfig.method is {names!r}.", "Expected each method once.")
    found: list[type[Method]] = []
    for name in chosen:
        file, _, kind = METHODS[name].partition(".")
        found.append(getattr(importlib.import_module(f"utils.continual.methods.{file}"), kind))
    lonely = [kind.name for kind in found if kind.alone]
    if lonely and len(found) > 1:
        raise ConfigError(
            f"ContinualConfig.method is {names!r}, and {lonely[0]} does not go with another method.",
            "Expected it alone.",
            f"Set method={lonely[0]!r}, or leave it out.",
        )
    for shared, what in (
        ("remembers", "replay the memory"), ("holds", "hold weights"), ("answers_kept", "keep answers"),
    ):  # fmt: skip
        both = [kind.name for kind in found if getattr(kind, shared)]
        if len(both) > 1:
            raise ConfigError(
                f"ContinualConfig.method is {names!r}: {' and '.join(both)} both {what}.",
                "Expected one of them: done twice it would count twice, by one setting.",
                f"Leave out {' or '.join(both)}.",
            )
    return found


@contextmanager
def all_as_of(methods: Sequence[Method], learner: "Learner", task: int) -> Iterator[None]:
    """Let the model answer as it does for a task, whatever the methods do for it."""
    with ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.as_of(learner, task))
        yield
