"""One interface to any module: how to call it, where its logits are, what it is for.

The constructor runs the model a few times on tiny inputs and leaves it exactly as it was. Nothing here judges: a model
that no call could run still gets an adapter, and `ModelAdapter.failure` says what was tried.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors, tensor_at
from utils.adapters.description import facts, facts_page, summary
from utils.adapters.detection import (
    LABEL_INPUTS,
    Detection,
    EmbeddingUse,
    config_dict,
    config_number,
    embedding_uses,
    encoder_sign,
    forward_signature,
    given_config,
)
from utils.adapters.examples import call_arguments, check_examples, example_labels, made_up, set_aside, training_labels
from utils.adapters.facts import find_max_length, find_num_labels, find_pad_token_id, find_vocab_size, reads_columns
from utils.adapters.inputs import stretched
from utils.adapters.lengths import Lengths, legal_lengths
from utils.adapters.logits import USUAL, arranged, choose_logits, confirmed_arrangement
from utils.adapters.nesting import flattened
from utils.adapters.objectives import random_labels, task_loss
from utils.adapters.plans import InputPlan, all_plans
from utils.adapters.roles import is_content
from utils.adapters.sizes import SizeSearch
from utils.adapters.spec import ModelSource, ModelSpec
from utils.adapters.tasks import ASSUMED, check_task, find_content_input, find_task
from utils.adapters.troubles import first_line, gpu_missing, ids_unreadable, needs_gpu, tensor_missing
from utils.adapters.wrapping import compiled_parts, lazy_parameters, uncompiled, unwrapped
from utils.runtime.errors import AdapterError, SeedbedError
from utils.runtime.isolation import ModelChangedError, preserved
from utils.runtime.printing import captured_output
from utils.runtime.rehearsal import rehearse_once
from utils.runtime.seeding import isolated_streams

PROBE_BATCH = 2


class ModelAdapter:
    """What a module is and how to call it; every fact comes with its reason.

    Attributes:
        module: The model itself, never a copy (but see `lazy`).
        config: Its settings as a dict, possibly empty.
        spec: What the user stated.
        modality: ``"tokens"``, ``"image"`` or ``"features"``.
        input_names: Names of the inputs that `example_inputs` makes, the main one first.
        tables: The embedding tables seen at work: which read the token ids, which consecutive positions.
        origin: What the adapter was made from: a loaded model or a module.
        failure: Why no forward pass succeeded, or None.
        lazy: Names of the parameters that had no shape; `module` is then a copy in which a first call gave them one.
        changed: How a forward pass changed the model's own parameters, or None.
    """

    def __init__(self, model: Any, config: Any = None, spec: ModelSpec | None = None) -> None:
        """Find out how to call a model.

        Args:
            model: A module, a loaded model, or another adapter.
            config: Settings of the model in any usual form; adds to what the model carries.
            spec: Facts that override detection.

        Raises:
            AdapterError: `model` is no module, cannot train (TorchScript, exported, quantised, no values), has lazy
                layers and no call that runs, needs arguments that cannot be guessed, or returns nothing like logits.
        """
        rehearse_once(model, lambda: type(self)(model, config, spec), config=config, spec=spec)
        self.origin: Any = model.origin if isinstance(model, ModelAdapter) else model
        factory: Callable[[], nn.Module] | None = None
        if isinstance(model, ModelAdapter):
            spec = spec or model.spec
        if not isinstance(model, nn.Module) and isinstance(model, ModelSource):
            config = {**model.config, **config_dict(config)}
            # A loaded model that was given as a module has a factory that can only say so.
            factory = model.factory if getattr(model, "can_rebuild", True) else None
            model = model.module
        self.module: nn.Module = unwrapped(model)
        self.spec: ModelSpec = spec or ModelSpec()
        self.config = {**config_dict(getattr(self.module, "config", None)), **given_config(config)}
        self.factory: Callable[[], nn.Module] | None = self.spec.factory_for(self.module) or factory
        self.failure: str | None = None
        self.modality = "features"
        self.input_names: tuple[str, ...] = ()
        self.tables: list[EmbeddingUse] = []
        self._compiled = compiled_parts(self.module)
        self._signature = forward_signature(self.module)
        self.spec.check_against(self.module, *self._signature.demands)
        self._plan = InputPlan("unknown", self.modality, (), Detection((), "unknown"))
        self._labels_input: str | None = None
        self._ids_known, self._fixed_positions = False, False
        self._output: Detection[str | None] = Detection(None, "no forward pass succeeded")
        self._arrangement = USUAL
        self._probe_shape: tuple[int, ...] = ()
        self.changed: ModelChangedError | None = None
        self.lazy = lazy_parameters(self.module)
        if self.lazy:
            self._materialise()
        with self.isolated():
            if not self.lazy:
                self._find_inputs()
            if self.failure is None:
                self._find_output()
        check_task(self, self._probe_shape)

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
        held = (self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensors in held for tensor in tensors), torch.device("cpu"))

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
            seed: Of the random content.

        Returns:
            Keyword arguments of forward, batch first, on the model's device; token ids avoid the padding id.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.spec.example_inputs is not None:
            size = self.readable_ids(self.main_input) if self.modality == "tokens" and self._ids_known else None
            examples, main = flattened(self.spec.example_inputs), self.main_input
            rows = batch_size if self.batched else None
            whole = stretched(examples, main, self.modality, rows, length, size, generator, self.device)
            return {name: value for name, value in whole.items() if name not in self._plan.aside}

        draw_ids = partial(self._random_ids, generator=generator)
        plan, tokens = self._plan, length or self._plan.length
        return {
            name: made_up(plan, name, batch_size, tokens, draw_ids, self.real_dtype, generator).to(self.device)
            for name in self.input_names
        }

    def readable_ids(self, name: str | None = None) -> int:
        """Return how many ids an input (default: the main one) takes: the rows of the table that reads it, if seen."""
        rows = [use.rows for use in self.tables if use.reads == (name or self.main_input)]
        # A config may promise more ids than there are; ids 0 and 1 always exist and serve until the tables are known.
        return min([self.vocab_size.value or 2, *rows]) if self._ids_known else 2

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """Call the model on inputs by name and return its raw output."""
        given = call_arguments(self._plan, inputs, self.real_dtype)
        if self._signature.positional:
            with uncompiled(self._compiled):
                return self.module(*given.values())
        arguments = {**self._plan.constants, **given}
        if self._labels_input and self._labels_input not in arguments:
            main = inputs[self.main_input]
            per_sample = torch.zeros(main.shape[0], dtype=torch.long, device=main.device)
            arguments[self._labels_input] = main if self._plan.labels_per_token else per_sample
        with uncompiled(self._compiled):
            return self.module(**arguments)

    def forward_in_training(self, inputs: Mapping[str, Any]) -> Any:
        """As `forward`, for a model in train mode: labels that forward can take are given where it fails without."""
        try:
            return self.forward(inputs)
        except Exception:
            labels = {} if self._labels_input else training_labels(self, self._plan, self._signature, inputs)
            if not labels:
                raise
        return self.forward({**inputs, **labels})

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
            found_at = tensor_at(output, self._output.value or "")
        except KeyError:
            found = [path or "a tensor" for path, _ in named_tensors(output)]
            raise AdapterError(
                f"The model returned {', '.join(found) or type(output).__name__}.",
                f"Expected its logits at `{self._output.value}` as before.",
                "Return the same structure for every input.",
            ) from None
        return arranged(found_at, self._arrangement, inputs[self.main_input].shape[0])

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
        return find_vocab_size(self, self._probe_shape)

    @cached_property
    def pad_token_id(self) -> Detection[int | None]:
        """The token id that fills up short sequences."""
        return find_pad_token_id(self)

    @cached_property
    def max_length(self) -> Detection[int | None]:
        """Longest legal sequence in tokens; None when there is no known limit."""
        return find_max_length(self)

    @cached_property
    def num_labels(self) -> Detection[int | None]:
        """Number of classes or targets; None for language models."""
        return find_num_labels(self, self._probe_shape)

    @cached_property
    def content_input(self) -> str:
        """Name of the input whose positions the answer of an encoder-decoder follows: the decoder's."""
        return find_content_input(self, self._probe_shape)

    @property
    def batched(self) -> bool:
        """Whether the first axis of the inputs is samples, as many as wanted; else they are the user's own, whole."""
        return self._plan.batched

    @property
    def probe_length(self) -> int:
        """Tokens per sample of the first pass that succeeded."""
        return self._plan.length

    @property
    def input_reason(self) -> str:
        """How it is known what the main input takes."""
        return self._plan.shape.reason

    @property
    def loss_inputs(self) -> Mapping[str, Tensor]:
        """What only the loss reads, by name, with the example that was given of each: labels among the inputs."""
        return self._plan.aside

    def with_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with what only the loss reads, as the example has it."""
        return {**inputs, **example_labels(self._plan, inputs, self.real_dtype)}

    @property
    def unfilled_inputs(self) -> tuple[str, ...]:
        """Optional arguments of forward that carry content of their own and that `example_inputs` leaves out.

        A module that never runs may wait for one of them: a vision tower for pixels, a cross-attention for an encoder.
        """
        known = {*self.input_names, *self._plan.constants, *(self._plan.template or {}), self._labels_input}
        return tuple(n for n in self._signature.optional if n not in known and is_content(n))

    @cached_property
    def image_shape(self) -> Detection[tuple[int, int, int] | None]:
        """Shape of one image ``(channels, height, width)``."""
        if self.modality != "image":
            return Detection(None, f"the input is not an image but {self.modality}")
        channels, height, width = self._plan.shape.value
        return Detection((channels, height, width), self._plan.shape.reason)

    @cached_property
    def task(self) -> Detection[str]:
        """What the model is for, one of `utils.adapters.TASKS`."""
        return find_task(self, self._probe_shape, self.tables)

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
        return legal_lengths(self, self._fixed_positions)

    def legal_length(self, wanted: int) -> int:
        """Return the longest legal length that is not above `wanted`, or the shortest there is."""
        return self.lengths.value.legal(wanted)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Run a block in eval mode without gradients or output; `changed` notes what happened to the weights."""
        try:
            with captured_output(), preserved(self.module, "adapter"), torch.no_grad():
                self.module.eval()
                yield
        except ModelChangedError as error:
            self.changed = self.changed or error

    def describe(self) -> list[dict[str, Any]]:
        """Return every detected fact as a row ``{"name", "value", "reason"}``."""
        return facts(self)

    __repr__ = summary
    _repr_html_ = facts_page

    def _materialise(self) -> None:
        """Find the inputs on copies, so that the layers without shapes of the user's model stay as they are.

        Raises:
            AdapterError: No call ran, so nothing gives the parameters their shapes.
        """
        with captured_output(), isolated_streams("adapter"), torch.no_grad():
            self._find_inputs()
        if self.failure is not None or lazy_parameters(self.module):
            raise AdapterError(
                f"The parameter {self.lazy[0]} has no shape yet (a lazy module), and no call of the model ran.",
                "Expected a model whose parameters all exist, or ModelSpec(example_inputs={...}) that fit.",
                "Run one forward pass on real input before you validate or train it.",
            )

    def _find_inputs(self) -> None:
        """Try the likeliest inputs until a forward pass succeeds."""
        original = self.module
        attempts: list[str] = []
        plans = all_plans(self.module, self.name, self.config, self._signature, self.spec)
        for plan in (search := SizeSearch(plans, PROBE_BATCH)):
            self._follow(plan)
            try:
                if self.lazy:
                    # The first call decides the shapes for good: each try needs a copy of its own.
                    self.module = copy.deepcopy(original).eval()
                output = self.forward(inputs := self.example_inputs())
            except (SeedbedError, MemoryError):
                raise
            except Exception as error:
                if needs_gpu(error):
                    self._follow(replace(plan, shape=Detection(plan.shape.value, "not tried: a GPU is missing")))
                    self.failure = gpu_missing(self.name, self.device, error)
                    return
                attempts.append(f"{plan.description}: {first_line(error)}")
                search.refused(error)
                continue
            if not search.fits(plan, output, inputs[self.main_input].numel()):
                continue
            if next(named_tensors(output), None) is None:
                # It ran, so other inputs would not make it return more.
                self.failure = tensor_missing(self.name, output, plan.description)
            self._follow(set_aside(plan, self.spec, self.example_inputs, self._follow, self.forward))
            return
        if search.first is not None:
            untested = f"the likeliest kind of `{search.first.names[0]}`, but no forward pass succeeded"
            self._follow(replace(search.first, shape=Detection(search.first.shape.value, untested)))
        check_examples(self.module, self.spec, self.config)
        guessed = self.input_names if self.spec.example_inputs is None else None
        self.failure = search.failure(self.name, attempts, guessed)

    def _follow(self, plan: InputPlan) -> None:
        """Set the adapter up for one way of calling the model."""
        self._plan, self.modality, self.input_names = plan, plan.modality, plan.names
        self._labels_input = plan.labels
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
                self.tables = embedding_uses(self.module, partial(run, inputs), inputs, self.main_input)
            except Exception as error:
                self.failure = ids_unreadable(self.name, self.readable_ids(self.main_input), error)
                return
            self._ids_known = True
            self.__dict__.pop("vocab_size", None)
            self.__dict__.pop("pad_token_id", None)
            if reads_columns(self, inputs, outputs[-1]):
                self.modality, self.tables = "features", []
                break
        output = outputs[-1] if outputs else self.forward(inputs)
        self._output = self._choose_output(output, inputs)
        shape = tensor_at(output, self._output.value or "").shape
        # nanoGPT's output without targets covers the last position only.
        if self.modality == "tokens" and len(shape) == 3 and shape[1] == 1 < inputs[self.main_input].shape[1]:
            optional = next((name for name in LABEL_INPUTS if name in self._signature.optional), None)
            if optional is not None:
                self._labels_input = optional
                try:
                    output = self.forward(inputs)
                    self._output = self._choose_output(output, inputs)
                except Exception:
                    self._labels_input = None
                    output = self.forward(inputs)
        found = tensor_at(output, self._output.value or "")
        stated = config_number(self.config, "max_length")
        if self.modality == "tokens" and stated and self._plan.length != stated.value == (*found.shape, 0, 0)[1]:
            # Its queries are as many as its longest text has tokens: only that length gives one answer per token.
            self._plan, self._fixed_positions = replace(self._plan, length=stated.value), True
            inputs = self.example_inputs()
            found = tensor_at(self.forward(inputs), self._output.value or "")
        self._arrangement = self._confirmed_arrangement(tuple(found.shape), inputs)
        self._probe_shape = tuple(arranged(found, self._arrangement, inputs[self.main_input].shape[0]).shape)
        self.__dict__.pop("vocab_size", None)

    def _confirmed_arrangement(self, shape: tuple[int, ...], inputs: Mapping[str, Tensor]) -> str:
        """Tell how the output's axes are ordered, where another size has the same answer."""
        content = inputs.get("decoder_input_ids", inputs[self.main_input])
        if not self.batched or ((tokens := self.modality == "tokens") and content.dim() != 2):
            return USUAL

        def shape_at(samples: int, positions: int | None) -> tuple[int, ...]:
            found = self.forward(self.example_inputs(samples, positions))
            return tuple(tensor_at(found, self._output.value or "").shape)

        steps, vocabulary = (content.shape[1], self.vocab_size.value) if tokens else (None, None)
        how = confirmed_arrangement(shape, content.shape[0], steps, vocabulary, shape_at)
        if how != USUAL:
            self._output = Detection(self._output.value, f"{self._output.reason}, {how}")
        return how

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

    def run_length(self, length: int) -> None:
        """Run one sample of a length, as one trial of many."""
        with self.isolated():
            shape = self.logits(self.example_inputs(1, length)).shape
        if len(shape) == len(self._probe_shape) > 1 and self._probe_shape[0] == PROBE_BATCH and shape[0] != 1:
            raise AdapterError(f"One sample of {length} tokens gave {shape[0]} rows.")

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of real-valued inputs: that of the model's own parameters."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def _random_ids(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw token ids that the model can read, and avoid the padding id."""
        padding, top = self.pad_token_id.value, self.readable_ids(name)
        ids = torch.randint(top, shape, generator=generator)
        if padding is not None and top > 1 and self._ids_known:
            ids = torch.where(ids == padding, (ids + 1) % top, ids)
        return ids
