"""A reasoning trace as plain values: what it holds, and how it is written to JSON and read again, checked."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.memory.memory_generation import UsedMemory
from utils.runtime.errors import CheckpointError
from utils.runtime.files import checked_path, null_nonfinite, own_hash, saving, write_json
from utils.runtime.settings import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "seedbed reasoning trace", 2


@dataclass(frozen=True)
class Guess:
    """One of the likeliest answers of a layer."""

    id: int
    """The token or class."""
    text: str
    """The same as text."""
    probability: float
    """Of it."""


@dataclass(frozen=True)
class Lens:
    """What each layer would answer at each place, see `utils.concepts.logit_lens`."""

    layers: tuple[str, ...]
    """From what goes into the first block to the last block."""
    faithful: bool
    """Whether the model's answer is a function of the last block's output alone."""
    difference: float
    """How much the answer moves when all else changes, as a share of the largest logit."""
    reason: str
    """How that is known."""
    guesses: tuple[tuple[tuple[Guess, ...], ...], ...]
    """By layer and place, the likeliest first. A token's place is where it was read; the guess is about the next."""
    final: tuple[tuple[float, ...], ...]
    """By layer and place, the probability of what came next; where nothing did, of the model's own answer."""


@dataclass(frozen=True)
class AttentionFlow:
    """Attention rollout, see `utils.concepts.attention_flow`."""

    modules: tuple[str, ...]
    """The attentions that were joined."""
    unseen: tuple[str, ...]
    """Blocks in which no attention was seen."""
    rollout: tuple[tuple[float, ...], ...]
    """``(places, places)``: how much of each place came from which."""
    reason: str
    """What was seen and what was not."""


@dataclass(frozen=True)
class TracedToken:
    """A token of prompt or answer; of a sample that is no text, the answer."""

    id: int
    """Its id, or the class."""
    text: str
    """Its text."""
    written: bool
    """Whether the model wrote it."""
    log_probability: float | None
    """Of it, given what stands before it, in nats; None for the first."""
    entropy: float | None
    """Of the answer that it was drawn from, in nats."""
    memory_share: float | None = None
    """Share of its probability that came from memories; None where none were asked."""
    memories: tuple[UsedMemory, ...] = ()
    """The memories that counted most."""


@dataclass(frozen=True)
class StepMemory:
    """A memory that a step drew on."""

    row: int
    """Its number in the datastore."""
    text: str
    """Its text and its token."""
    weight: float
    """Sum over the step's tokens of its share of their probability."""


@dataclass(frozen=True)
class ReasoningStep:
    """A line or a sentence of the answer."""

    text: str
    """It."""
    begin: int
    """Its first token, counted from the first one written."""
    end: int
    """The token after its last."""
    mean_log_probability: float | None
    """Over its tokens, in nats."""
    mean_entropy: float | None
    """Over its tokens, in nats: high where the model was of several minds."""
    memory_share: float | None
    """Mean share of its tokens' probability that came from memories."""
    memories: tuple[StepMemory, ...] = ()
    """The memories that supported it most."""


@dataclass(frozen=True, repr=False)
class ReasoningTrace:
    """What a model computed on the way to an answer; make one with `record_trace`."""

    model: str
    """Class of the model."""
    task: str
    """What it is for."""
    prompt: str
    """What it was given; empty for a sample that is no text."""
    text: str
    """What it wrote; empty without a tokenizer."""
    tokens: tuple[TracedToken, ...]
    """Prompt and answer; of a sample that is no text, what it answers at each place."""
    lens: Lens | None
    """What each layer would have answered; None where that cannot be read."""
    attention: AttentionFlow | None
    """Where things came from; None where no attention was seen."""
    steps: tuple[ReasoningStep, ...]
    """The steps of the answer."""
    notes: tuple[str, ...]
    """What is missing, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReasoningTrace":
        """Make a trace of what `to_dict` returned.

        Raises:
            CheckpointError: It is of another format or version, or does not hold together.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise CheckpointError(
                "This is no reasoning trace.", f"Expected the format {FORMAT!r}.", "Give what `save` wrote."
            )
        if values.get("version") != VERSION:
            raise CheckpointError(
                f"The trace is of version {shown(values.get('version'))}.",
                f"Expected version {VERSION}; files of version 1 carry no hash, so that no change is noticed.",
                "Read it with the Seedbed that wrote it, or record it again.",
            )
        try:
            trace = _read(values)
            _check(trace)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The trace does not hold together: {type(error).__name__}: {error}.",
                "Expected what `save` wrote, unchanged.",
                "Give another copy, or record it again.",
            ) from error
        return trace

    def save(self, path: str | Path) -> Path:
        """Write the trace as JSON with a hash of its content, atomically, and return the path.

        Raises:
            CheckpointError: The file cannot be written; what was there is still there.
        """
        values = null_nonfinite(self.to_dict())
        with saving(path, "the trace") as file:
            write_json(file, values | {"sha256": own_hash(values)})
        return file

    @classmethod
    def load(cls, path: str | Path) -> "ReasoningTrace":
        """Read a trace that `save` wrote.

        Raises:
            CheckpointError: There is none, or it is damaged, changed, of another format or another version.
        """
        file = checked_path(path, "the trace")
        try:
            values = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a trace ({type(error).__name__}: {error}).",
                "Expected a JSON file that `ReasoningTrace.save` wrote.",
                "Give another copy, or record it again.",
            ) from error
        trace = cls.from_dict(values)
        if values.get("sha256") != own_hash(values):
            why = "was changed after it was written: its hash is another" if "sha256" in values else "carries no hash"
            raise CheckpointError(
                f"{path} {why}.",
                "Expected a JSON file that `ReasoningTrace.save` wrote, unchanged.",
                "Give another copy, or record it again.",
            )
        return trace

    def figure(self, dark: bool = False) -> "Figure":
        """Return `utils.concepts.trace_view.trace_figure`."""
        from utils.concepts.trace_view import trace_figure

        return trace_figure(self, dark)

    def save_figure(self, path: str | Path) -> Path:
        """Draw the trace into a PNG file, and return its path.

        Raises:
            MissingPackageError: matplotlib is not installed.
            CheckpointError: The file cannot be written.
        """
        from utils.concepts.trace_view import save_trace_figure

        return save_trace_figure(self, path)

    def __str__(self) -> str:
        """Return the answer step by step, and what is missing."""
        from utils.concepts.trace_view import trace_text

        return trace_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show picture and steps."""
        from utils.concepts.trace_view import trace_html

        return trace_html(self)


def _read(values: Mapping[str, Any]) -> ReasoningTrace:
    """Return the trace, unchecked but for its structure."""
    lens, flow = values["lens"], values["attention"]
    guesses = () if lens is None else tuple(
        tuple(tuple(Guess(**guess) for guess in place) for place in layer) for layer in lens["guesses"]
    )  # fmt: skip
    tokens = tuple(
        TracedToken(**{**token, "memories": tuple(UsedMemory(**memory) for memory in token["memories"])})
        for token in values["tokens"]
    )
    steps = tuple(
        ReasoningStep(**{**step, "memories": tuple(StepMemory(**memory) for memory in step["memories"])})
        for step in values["steps"]
    )
    read_lens = None
    if lens is not None:
        table = {"layers": tuple(lens["layers"]), "guesses": guesses, "final": tuple(map(tuple, lens["final"]))}
        read_lens = Lens(**{**lens, **table})
    read_flow = None
    if flow is not None:
        names = {name: tuple(flow[name]) for name in ("modules", "unseen")}
        read_flow = AttentionFlow(**{**flow, **names, "rollout": tuple(map(tuple, flow["rollout"]))})
    words = {name: str(values[name]) for name in ("model", "task", "prompt", "text")}
    return ReasoningTrace(
        **words, tokens=tokens, lens=read_lens, attention=read_flow, steps=steps, notes=tuple(values["notes"])
    )


def _check(trace: ReasoningTrace) -> None:
    """Raise ValueError unless the parts fit together and every number is one."""
    lens, flow = trace.lens, trace.attention
    if lens is not None:
        places = len(trace.tokens)
        shapes = [*(len(layer) for layer in lens.guesses), *(len(layer) for layer in lens.final)]
        if set(shapes) != {places} or len(lens.guesses) != len(lens.layers) or len(lens.final) != len(lens.layers):
            raise ValueError("the lens has other layers or places than the text")
        if not all(place for layer in lens.guesses for place in layer):
            raise ValueError("the lens has a place without a guess")
        for number in (
            *(p for layer in lens.final for p in layer),
            *(g.probability for a in lens.guesses for b in a for g in b),
        ):
            _number(number, 0, 1.0001)
    if flow is not None:
        size = len(flow.rollout)
        if not size or any(len(row) != size for row in flow.rollout):
            raise ValueError("the attention flow is not square")
        for row in flow.rollout:
            for number in row:
                _number(number, 0, 1.0001)
    for token in trace.tokens:
        for value in (token.log_probability, token.entropy, token.memory_share):
            if value is not None:
                _number(value, -math.inf, math.inf)
    written = sum(token.written for token in trace.tokens)
    begin = 0
    for step in trace.steps:
        if not step.begin == begin < step.end <= written:
            raise ValueError("the steps do not cover what was written")
        begin = step.end


def _number(value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{value!r} is no number from {low} to {high}")
