"""One interface to any module: how to call it, where its logits are, what it is for.

The constructor runs the model a few times on tiny inputs and leaves it exactly as it was. Nothing here judges: a model
that no call could run still gets an adapter, and `ModelAdapter.failure` says what was tried.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, tensor_at
from utils.adapters.description import facts_table
from utils.adapters.detection import (
    LABEL_INPUTS,
    Detection,
    EmbeddingUse,
    config_dict,
    config_number,
    embedding_uses,
    encoder_sign,
    forward_signature,
)
from utils.adapters.inputs import longest_length, stretched
from utils.adapters.lengths import Lengths, find_lengths
from utils.adapters.logits import choose_logits
from utils.adapters.objectives import random_labels, task_loss
from utils.adapters.plans import PROBE_LENGTHS, InputPlan, example_plan, input_plans
from utils.adapters.spec import ModelSource, ModelSpec
from utils.adapters.tasks import ASSUMED, LANGUAGE_MODELS, find_task
from utils.adapters.wrapping import unwrapped
from utils.runtime.errors import AdapterError, SeedbedError
from utils.runtime.isolation import ModelChangedError, preserved

PROBE_BATCH = 2


class ModelAdapter:
    """What a module is and how to call it; every fact comes with its reason.

    Attributes:
        module: The model itself, never a copy.
        config: Its settings as a dict, possibly empty.
        spec: What the user stated.
        modality: ``"tokens"``, ``"image"`` or ``"features"``.
        input_names: Names of the inputs that `example_inputs` makes, the main one first.
        origin: What the adapter was made from: a loaded model or a module.
        failure: Why no forward pass succeeded, or None.
        changed: How a forward pass changed the model's own parameters, or None.
    """

    def __init__(self, model: Any, config: Any = None, spec: ModelSpec | None = None) -> None:
        """Find out how to call a model.

        Args:
            model: A module, a loaded model, or another adapter.
            config: Settings of the model in any usual form; adds to what the model carries.
            spec: Facts that override detection.

        Raises:
            AdapterError: `model` is no module, is a TorchScript module, has uninitialised parameters, needs arguments
                that cannot be guessed, or returns nothing that could be logits.
        """
        self.origin: Any = model.origin if isinstance(model, ModelAdapter) else model
        factory: Callable[[], nn.Module] | None = None
        if isinstance(model, ModelAdapter):
            given: ModelAdapter = model
            spec = spec or given.spec
        if not isinstance(model, nn.Module) and isinstance(model, ModelSource):
            config = {**model.config, **config_dict(config)}
            # A loaded model that was given as a module has a factory that can only say so.
            factory = model.factory if getattr(model, "can_rebuild", True) else None
            model = model.module
        if isinstance(config, (str, bytes, int, float, list, tuple)):
            raise AdapterError(
                f"A {type(config).__name__} was given as the config.",
                "Expected a dict, a dataclass or a transformers config.",
                "For a JSON file, pass what json.load returns.",
            )
        self.module: nn.Module = unwrapped(model)
        self.spec: ModelSpec = spec or ModelSpec()
        self.config = {**config_dict(getattr(self.module, "config", None)), **config_dict(config)}
        self.factory: Callable[[], nn.Module] | None = self.spec.factory or factory
        self.failure: str | None = None
        self.modality = "features"
        self._signature = forward_signature(self.module)
        self._labels_input: str | None = None
        self._labels_per_token = True
        self._shape: Detection[tuple[int, ...]] = Detection((), "unknown")
        self._probe_length = PROBE_LENGTHS[0]
        self._embedding_uses: list[EmbeddingUse] = []
        self._ids_known = False
        self.input_names: tuple[str, ...] = ()
        self._output: Detection[str | None] = Detection(None, "no forward pass succeeded")
        self._probe_shape: tuple[int, ...] = ()
        self.changed: ModelChangedError | None = None
        with self.isolated():
            self._find_inputs()
            if self.failure is None:
                self._find_output()

    @property
    def name(self) -> str:
        """The model's class name."""
        return type(self.module).__name__

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters; a tensor used in several places counts once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter or buffer is; the CPU when it has none."""
        tensors: Iterator[Tensor] = chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def argument_names(self) -> tuple[str, ...]:
        """All names that forward takes."""
        return self._signature.names

    @property
    def main_input(self) -> str:
        """Name of the input that carries the content."""
        return self.input_names[0]

    def example_inputs(
        self, batch_size: int = PROBE_BATCH, length: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Make valid inputs, the same for the same seed.

        Args:
            batch_size: Number of samples.
            length: Tokens per sample for token models (default: a short length that runs); ignored by others.
            seed: Seed of the random content.

        Returns:
            Keyword arguments of forward, batch first, on the model's device: token ids ``(batch, seq)`` that avoid the
            padding id, images ``(batch, channels, height, width)``, or features.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.spec.example_inputs is not None:
            size = self.readable_ids(self.main_input) if self.modality == "tokens" and self._ids_known else None
            examples, main = self.spec.example_inputs, self.main_input
            return stretched(examples, main, self.modality, batch_size, length, size, generator, self.device)
        inputs: dict[str, Tensor] = {}
        tokens_shape = (batch_size, length or self._probe_length)
        for name in self.input_names:
            if name == "attention_mask" or name.endswith("_mask"):
                value = torch.ones(tokens_shape, dtype=torch.long)
            elif name == "token_type_ids":
                value = torch.zeros(tokens_shape, dtype=torch.long)
            elif name == "position_ids":
                value = torch.arange(tokens_shape[1]).expand(tokens_shape)
            elif self.modality == "tokens" or name.endswith("_ids"):
                value = self._random_ids(name, tokens_shape, generator)
            else:
                value = torch.randn((batch_size, *self._shape.value), generator=generator, dtype=self._real_dtype)
            inputs[name] = value.to(self.device)
        return inputs

    def readable_ids(self, name: str | None = None) -> int:
        """Return how many ids an input (default: the main one) takes: the rows of the table that reads it, if seen."""
        rows = [use.rows for use in self._embedding_uses if use.reads == (name or self.main_input)]
        # A config may promise more ids than there are; ids 0 and 1 always exist and serve until the tables are known.
        return min([self.vocab_size.value or 2, *rows]) if self._ids_known else 2

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """Call the model on inputs by name and return its raw output."""
        if self._signature.positional:
            return self.module(*inputs.values())
        arguments = dict(inputs)
        if self._labels_input and self._labels_input not in arguments:
            main = inputs[self.main_input]
            per_sample = torch.zeros(main.shape[0], dtype=torch.long, device=main.device)
            arguments[self._labels_input] = main if self._labels_per_token else per_sample
        return self.module(**arguments)

    def forward_in_training(self, inputs: Mapping[str, Any]) -> Any:
        """As `forward`, for a model in train mode: labels that forward can take are given where it fails without."""
        name = next((name for name in LABEL_INPUTS if name in self._signature.optional), None)
        try:
            return self.forward(inputs)
        except Exception:
            if name is None or self._labels_input is not None or self._signature.positional:
                raise
        labels = self.example_inputs(len(inputs[self.main_input]), seed=1)[self.main_input]
        if self.modality != "tokens":
            labels = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        return self.module(**inputs, **{name: labels})

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Call the model and return its main output.

        Returns:
            ``(batch, seq, vocab)`` for language models, ``(batch, num_labels)`` for classifiers, else what there is.

        Raises:
            AdapterError: No forward pass succeeded when the adapter was made, or the output has another structure now.
        """
        if self.failure is not None:
            raise AdapterError(self.failure)
        output = self.forward(inputs)
        try:
            return tensor_at(output, self._output.value or "")
        except KeyError:
            found = [path or "a tensor" for path, _ in named_tensors(output)]
            raise AdapterError(
                f"The model returned {', '.join(found) or type(output).__name__}.",
                f"Expected its logits at `{self._output.value}` as before.",
                "Return the same structure for every input.",
            ) from None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the task's mean loss in nats; see `utils.adapters.objectives.task_loss`."""
        return task_loss(self.task.value, logits, labels)

    def random_labels(self, logits: Tensor, seed: int = 0) -> Tensor:
        """Draw labels that fit these logits; see `utils.adapters.objectives.random_labels`."""
        return random_labels(self.task.value, logits, seed)

    @property
    def output(self) -> Detection[str | None]:
        """Path of the logits in the model's output; empty when the output is the logits."""
        return self._output

    @cached_property
    def vocab_size(self) -> Detection[int | None]:
        """Number of legal token ids."""
        if self.spec.vocab_size is not None:
            return Detection(self.spec.vocab_size, "stated in ModelSpec")
        if self.modality != "tokens":
            return Detection(None, f"the input is not token ids but {self.modality}")
        if (found := config_number(self.config, "vocab_size")) is not None:
            return Detection(found.value, found.reason)
        for use in self._embedding_uses:
            if use.reads_tokens:
                tie = " and the output is as wide" if self._probe_shape[-1:] == (use.rows,) else ""
                return Detection(
                    use.rows, f"rows of the embedding `{use.name or self.name}` that reads the token ids{tie}"
                )
        if len(self._probe_shape) == 3 and self._probe_shape[-1] > 2:
            return Detection(self._probe_shape[-1], "width of the output; no embedding was seen reading the token ids")
        return Detection(None, "no config entry, and no embedding was seen reading the token ids")

    @cached_property
    def pad_token_id(self) -> Detection[int | None]:
        """The token id that fills up short sequences."""
        if self.spec.pad_token_id is not None:
            return Detection(self.spec.pad_token_id, "stated in ModelSpec")
        if (found := config_number(self.config, "pad_token_id")) is not None and found.value >= 0:
            return Detection(found.value, found.reason)
        for use in self._embedding_uses:
            if use.reads_tokens and use.padding_idx is not None:
                return Detection(use.padding_idx, f"padding_idx of the embedding `{use.name}`")
        return Detection(None, "no config entry and no padding_idx")

    @cached_property
    def max_length(self) -> Detection[int | None]:
        """Longest legal sequence in tokens; None when there is no known limit."""
        if self.spec.max_length is not None:
            return Detection(self.spec.max_length, "stated in ModelSpec")
        if self.modality != "tokens":
            return Detection(None, f"the input is not a sequence of tokens but {self.modality}")
        tables = [use for use in self._embedding_uses if use.offset is not None and not use.reads_tokens]
        configured = config_number(self.config, "max_length")
        if configured is not None:
            for use in tables:
                # Tables like RoBERTa's reserve their first rows, and the config counts these too.
                if use.offset and use.rows == configured.value:
                    return Detection(
                        use.rows - use.offset, f"{configured.reason}, less the {use.offset} first rows of `{use.name}`"
                    )
            return Detection(configured.value, configured.reason)
        if tables:
            table = min(tables, key=lambda use: use.rows - (use.offset or 0))
            return Detection(table.rows - (table.offset or 0), f"rows of the position embedding `{table.name}`")
        return self._longest_that_runs()

    @cached_property
    def num_labels(self) -> Detection[int | None]:
        """Number of classes or targets; None for language models."""
        if self.spec.num_labels is not None:
            return Detection(self.spec.num_labels, "stated in ModelSpec")
        if self.task.value in LANGUAGE_MODELS:
            return Detection(None, "a language model predicts tokens")
        if (found := config_number(self.config, "num_labels")) is not None:
            return Detection(found.value, found.reason)
        if self._probe_shape:
            width = self._probe_shape[-1] if len(self._probe_shape) > 1 else 1
            return Detection(width, "width of the output")
        return Detection(None, "no config entry, and no forward pass succeeded")

    @cached_property
    def image_shape(self) -> Detection[tuple[int, int, int] | None]:
        """Shape of one image ``(channels, height, width)``."""
        if self.modality != "image":
            return Detection(None, f"the input is not an image but {self.modality}")
        channels, height, width = self._shape.value
        return Detection((channels, height, width), self._shape.reason)

    @cached_property
    def task(self) -> Detection[str]:
        """What the model is for, one of `utils.adapters.TASKS`."""
        return find_task(self, self._probe_shape, self._embedding_uses)

    @property
    def task_assumed(self) -> bool:
        """Whether a model counts as causal although no name or setting says so and it sees later tokens."""
        return self.task.reason.startswith(ASSUMED)

    @cached_property
    def encoder_sign(self) -> str | None:
        """What speaks for a model that may see every position, where nothing states its task; None if nothing."""
        return encoder_sign(self.module, self.config)

    @cached_property
    def lengths(self) -> Detection[Lengths]:
        """Which lengths below `max_length` are legal, found by trying."""
        if self.modality != "tokens" or self.failure is not None:
            return Detection(Lengths(), "not asked: no sequence of tokens, or no forward pass succeeded")
        if self.example_inputs(1)[self.main_input].dim() != 2:
            return Detection(Lengths(), "the token ids have no length")
        with self.isolated():
            found = find_lengths(self._run_length, self._probe_length)
        return Detection(found, "found by trying")

    def legal_length(self, wanted: int) -> int:
        """Return the longest legal length that is not above `wanted`, or the shortest there is."""
        return self.lengths.value.legal(wanted)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Run a block in eval mode without gradients inside `preserved`; `changed` notes what happened to weights."""
        try:
            with preserved(self.module, "adapter"), torch.no_grad():
                self.module.eval()
                yield
        except ModelChangedError as error:
            self.changed = self.changed or error

    def describe(self) -> list[dict[str, Any]]:
        """Return every detected fact as a row ``{"name", "value", "reason"}``."""
        rows: list[dict[str, Any]] = [
            {"name": "inputs", "value": ", ".join(self.input_names), "reason": self._shape.reason},
            {"name": "parameters", "value": self.num_parameters, "reason": "tensors used twice count once"},
        ]
        for name in ("task", "output", "vocab_size", "max_length", "num_labels", "pad_token_id", "image_shape"):
            detection: Detection[Any] = getattr(self, name)
            value = "the output itself" if name == "output" and detection.value == "" else detection.value
            if value is not None:
                rows.append({"name": name, "value": value, "reason": detection.reason})
        if self.lengths.value != Lengths():
            rows.append({"name": "lengths", "value": str(self.lengths.value), "reason": self.lengths.reason})
        return rows

    def _repr_html_(self) -> str:
        """Show the facts and their reasons in a notebook."""
        return facts_table(self.name, self.describe(), str(self.module))

    def _find_inputs(self) -> None:
        """Try the likeliest inputs until a forward pass succeeds."""
        attempts: list[str] = []
        if self.spec.example_inputs is not None:
            plans: Iterator[InputPlan] = iter([example_plan(self.spec.example_inputs)])
        else:
            plans = input_plans(self.module, self.name, self.config, self._signature)
        first: InputPlan | None = None
        for plan in plans:
            first = first or plan
            self._follow(plan)
            try:
                output = self.forward(self.example_inputs())
            except (SeedbedError, MemoryError):
                raise
            except Exception as error:
                first_line = (str(error).strip() or "no message").splitlines()[0]
                attempts.append(f"{plan.description}: {type(error).__name__}: {first_line[:160]}")
                continue
            if next(named_tensors(output), None) is None:
                attempts.append(f"{plan.description}: forward returned {type(output).__name__} and no tensor")
                continue
            return
        if first is not None:
            untested = f"the likeliest kind of `{first.names[0]}`, but no forward pass succeeded"
            self._follow(replace(first, shape=Detection(first.shape.value, untested)))
        if self.spec.example_inputs is not None:
            advice = "Correct ModelSpec.example_inputs so that model(**example_inputs) is a valid call."
        else:
            advice = "If the model is sound, pass ModelSpec(example_inputs={...}) with arguments that it accepts."
        shown = "; ".join(dict.fromkeys(attempts[:1] + attempts[-3:])) if len(attempts) > 4 else "; ".join(attempts)
        self.failure = f"No forward pass of {self.name} succeeded ({len(attempts)} tried). {shown}. {advice}"

    def _follow(self, plan: InputPlan) -> None:
        """Set the adapter up for one way of calling the model."""
        self.modality, self.input_names, self._shape = plan.modality, plan.names, plan.shape
        self._probe_length, self._labels_input, self._labels_per_token = plan.length, plan.labels, plan.labels_per_token
        # What was looked up for another way of calling it may not hold for this one.
        self.__dict__.pop("vocab_size", None)
        self.__dict__.pop("pad_token_id", None)

    def _find_output(self) -> None:
        """Find the logits by their shape, and the embeddings that read tokens and positions."""
        inputs = self.example_inputs()
        outputs: list[Any] = []

        def run(arguments: Mapping[str, Any]) -> None:
            outputs[:] = [self.forward(arguments)]

        # The first pass finds the tables with ids that always exist. The second reads them with ids that avoid the
        # padding, which tables of positions skip.
        for _ in range(2 if self.modality == "tokens" else 0):
            inputs = self.example_inputs()
            try:
                self._embedding_uses = embedding_uses(self.module, partial(run, inputs), inputs, self.main_input)
            except Exception as error:
                self.failure = (
                    f"{self.name} runs, but not with token ids below {self.readable_ids(self.main_input)}: "
                    f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}. "
                    "Correct vocab_size in the config, or pass ModelSpec(vocab_size=...)."
                )
                return
            self._ids_known = True
            self.__dict__.pop("vocab_size", None)
            self.__dict__.pop("pad_token_id", None)
        output = outputs[-1] if outputs else self.forward(inputs)
        self._output = self._choose_output(output, inputs)
        if self.modality == "tokens" and self._shortened(output, inputs):
            optional = next((name for name in LABEL_INPUTS if name in self._signature.optional), None)
            if optional is not None:
                self._labels_input = optional
                try:
                    output = self.forward(inputs)
                    self._output = self._choose_output(output, inputs)
                except Exception:
                    self._labels_input = None
                    output = self.forward(inputs)
        self._probe_shape = tuple(tensor_at(output, self._output.value or "").shape)
        self.__dict__.pop("vocab_size", None)

    def _shortened(self, output: Any, inputs: Mapping[str, Tensor]) -> bool:
        """Tell whether the output covers the last position only, as nanoGPT's does without targets."""
        shape = tensor_at(output, self._output.value or "").shape
        length = inputs[self.main_input].shape[1]
        return len(shape) == 3 and shape[1] == 1 and length > 1

    def _choose_output(self, output: Any, inputs: Mapping[str, Tensor]) -> Detection[str | None]:
        """Choose the tensor that is the logits."""
        content = inputs.get("decoder_input_ids", inputs[self.main_input])
        labels = self.spec.num_labels or (d.value if (d := config_number(self.config, "num_labels")) else None)
        return choose_logits(
            output,
            batch=content.shape[0],
            positions=content.shape[1] if self.modality == "tokens" and content.dim() > 1 else None,
            vocabulary=self.vocab_size.value,
            labels=labels,
            model=self.name,
        )

    def _longest_that_runs(self) -> Detection[int | None]:
        """Find the longest legal sequence by trying, for models that state no limit."""
        if self.failure is not None:
            return Detection(None, "no forward pass succeeded")
        with self.isolated():
            return longest_length(self._run_length, self._probe_length)

    def _run_length(self, length: int) -> None:
        """Run one sample of a length, as one trial of many."""
        with self.isolated():
            self.logits(self.example_inputs(1, length))

    @property
    def _real_dtype(self) -> torch.dtype:
        """The dtype of real-valued inputs: that of the model's own parameters."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def _random_ids(self, name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw token ids that the model can read, and avoid the padding id."""
        padding, top = self.pad_token_id.value, self.readable_ids(name)
        ids = torch.randint(top, shape, generator=generator)
        if padding is not None and top > 1 and self._ids_known:
            ids = torch.where(ids == padding, (ids + 1) % top, ids)
        return ids
