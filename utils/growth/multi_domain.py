"""Several clones of one parent as one model, with a router that sends each sample to the clone of its domain.

The router has one linear row per domain. Each row is a parameter of its own, so a further domain leaves the others'
logits as they are, bit for bit, and an optimizer keeps what it knows of them. Its features are taken from the parent
without gradients and in eval mode.

A mean over a whole text sees its end: for a language model a forward pass without ``domain`` is not causal. Name the
domain while training, and in generation take it from the prompt (`MultiDomainModel.route`).
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import tensor_at
from utils.growth.clone_record import CloneError, DomainClone, freeze
from utils.growth.router_features import Enough, evaluating, place, pooled, stop
from utils.training.weights import weights_sha256

ROUTES = ("hard", "soft")
CLOSED = -1e4
"""Bias of a row that is not fitted yet, beside rows that are: its domain is not chosen, and its probability is 0."""


@dataclass(frozen=True)
class DomainAdded:
    """One domain of a model."""

    domain: str
    """Its name."""
    row: int
    """Its row of the router."""
    record: dict[str, Any] | None
    """Where its clone comes from; None for the parent itself."""
    fitted_before: bool
    """The router had been fitted when it was added, and has to be fitted again to choose it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)


class MultiDomainModel(nn.Module):
    """A model that answers each sample with the clone of its domain: takes what the parent does, returns its logits.

    ``forward`` has the parent's arguments and one more, ``domain``: a name for all samples, a list with one per sample,
    or None to let the router decide. Hard routing answers with the likeliest domain's clone; the samples of a clone
    run as one batch. Soft routing answers with sum_d p_d(x) f_d(x) over all clones (Jacobs et al., 1991, equation 1).

    Attributes:
        parent: What the clones were made from; it makes the router's features.
        experts: The clones, in the order of `domains`.
        rows: The router's rows, in the same order.
        domains: Names.
        route_by: ``"hard"`` or ``"soft"``.
        features_at: The module of the parent whose answer (or, for a head, input) the router reads.
        lineage: How each domain came in.
        spec: What is known of the parent, for ``ModelAdapter(model, spec=model.spec)``.
    """

    def __init__(
        self,
        clones: Sequence[DomainClone],
        route_by: str = "hard",
        *,
        parent_domain: str | None = None,
        features_at: str | None = None,
        adapter: ModelAdapter | None = None,
    ) -> None:
        """Put clones together.

        Args:
            clones: Clones of one parent, each for another domain.
            route_by: ``"hard"`` or ``"soft"``.
            parent_domain: A domain for which the parent itself answers.
            features_at: The module of the parent whose answer the router reads (default: the cut of the clones if all
                have the same, else the last block, else what the head is given).
            adapter: An adapter of the parent, where its inputs cannot be guessed.

        Raises:
            CloneError: The clones do not belong together, or the parent gives nothing to route by.
        """
        super().__init__()
        if not clones:
            raise CloneError("No clone was given.", "Expected at least one.", "Make one with clone_for_domain.")
        if route_by not in ROUTES:
            raise CloneError(f"route_by is {route_by!r}.", f"Expected one of {', '.join(ROUTES)}.", "Correct it.")
        self.parent = clones[0].parent
        if "domain" in (known := inspect.signature(self.parent.forward).parameters):
            raise CloneError(
                f"{type(self.parent).__name__}.forward() has an argument `domain` of its own.",
                f"Expected it free for the router, beside {', '.join(known)}.",
                "Rename it.",
            )
        if (config := getattr(self.parent, "config", None)) is not None:
            self.config = config
        self.route_by = route_by
        self.domains: list[str] = []
        self.lineage: tuple[DomainAdded, ...] = ()
        self.experts, self.rows = nn.ModuleList(), nn.ModuleList()
        adapter = ModelAdapter(self.parent) if adapter is None else adapter
        if adapter.module is not self.parent:
            raise CloneError(
                f"The adapter is of another {adapter.name}.",
                f"Expected one of the parent of the clones, a {type(self.parent).__name__}.",
                "Pass ModelAdapter(clone.parent, spec=...).",
            )
        self._path = adapter.output.value or ""
        # The parent's class name and signature may have told its task; a wrapper's do not.
        self.spec = replace(adapter.spec, task=adapter.task.value, frozen=(), factory=None)
        few, more = adapter.example_inputs(2), adapter.example_inputs(3)
        sizes = {name: (few[name].shape[:1], more[name].shape[:1]) for name in few}
        self._seen = frozenset(few)
        self._by_sample = frozenset(name for name, size in sizes.items() if size == ((2,), (3,)))
        self.features_at, self._given = place(adapter, clones, features_at)
        with adapter.isolated():
            shapes = [tuple(adapter.logits(inputs).shape[:1]) for inputs in (few, more)]
            states = [tuple(self._state(partial(adapter.forward, inputs)).shape) for inputs in (few, more)]
        if shapes != [(2,), (3,)] or [state[:1] for state in states] != shapes or len(states[0]) < 2:
            raise CloneError(
                f"Of 2 and 3 samples {adapter.name} returns {shapes[0]} and {shapes[1]} answers, and "
                f"{self.features_at} returns the shapes {states[0]} and {states[1]}.",
                "Expected samples on the first axis of both, and features for each.",
                "Choose another module with features_at=..., or transpose in forward().",
            )
        self._width = states[0][1] if len(states[0]) > 3 else states[0][-1]
        if parent_domain is not None:
            self._add(parent_domain, self.parent, None)
        for clone in clones:
            self.add_domain(clone)

    @property
    def forward(self) -> Callable[..., Tensor]:  # type: ignore[override]
        """Answer a batch; the signature is the parent's with ``domain=None`` added.

        Returns:
            Logits as the parent's, batch first.
        """
        call: Any = partial(self._answer)
        known = list(inspect.signature(self.parent.forward).parameters.values())
        extra = inspect.Parameter("domain", inspect.Parameter.KEYWORD_ONLY, default=None)
        at = len(known) - (bool(known) and known[-1].kind is inspect.Parameter.VAR_KEYWORD)
        call.__signature__ = inspect.Signature([*known[:at], extra, *known[at:]])
        return call

    @property
    def fitted(self) -> bool:
        """Whether any row of the router has learnt something."""
        return any(bool(row.weight.detach().any()) for row in self.router_rows())

    def add_domain(self, clone: DomainClone) -> None:
        """Add a domain; the router grows by one row, and the others' logits stay as they are.

        Beside fitted rows the new domain is not chosen before `fit_router` has run again.

        Raises:
            CloneError: The clone has another parent, another kind of answer, or a domain that is there already.
        """
        if clone.parent is not self.parent:
            raise CloneError(
                f"The clone for {clone.domain!r} has another parent, whose weights have the SHA-256 "
                f"{weights_sha256(clone.parent)}.",
                f"Expected the parent of the others, whose weights have {weights_sha256(self.parent)}.",
                "Make or load all clones with one and the same parent object.",
            )
        self._add(clone.domain, clone.module, clone)

    def _add(self, domain: str, expert: nn.Module, clone: DomainClone | None) -> None:
        """Add a domain after a trial."""
        if not isinstance(domain, str) or not domain.strip() or domain in self.domains:
            raise CloneError(
                f"The domain {domain!r} is {'there already' if domain in self.domains else 'no name'}.",
                f"Expected a name beside {', '.join(self.domains) or 'none yet'}.",
                "Make the clone for another domain.",
            )
        adapter = ModelAdapter(self.parent, spec=self.spec)
        example, view = adapter.example_inputs(3), copy.copy(adapter)
        with adapter.isolated():
            expected = tuple(adapter.logits(example).shape)
        view.module = expert
        try:
            with view.isolated():
                shape: Any = tuple(view.logits(example).shape)
        except Exception as error:
            shape = f"{type(error).__name__}: {error}"
        if shape != expected:
            raise CloneError(
                f"The clone for {domain!r} answers the parent's example with {shape}.",
                f"Expected {expected}, as the parent does: one vocabulary, or one set of classes, for all domains.",
                "Use clones whose vocabulary and head have not changed.",
            )
        fitted = self.fitted
        row = nn.utils.skip_init(nn.Linear, self._width, 1, device=adapter.device)
        nn.init.zeros_(row.weight)
        nn.init.constant_(row.bias, CLOSED if fitted else 0.0)
        record = None if clone is None else clone.record.to_dict()
        self.lineage = (*self.lineage, DomainAdded(domain, len(self.rows), record, fitted))
        self.domains.append(domain)
        self.experts.append(expert)
        self.rows.append(row)
        # The parent's own answer may be nobody's: what only its features need is not for training.
        used = {id(parameter) for module in self.experts for parameter in module.parameters()}
        freeze(self.parent, [name for name, p in self.parent.named_parameters() if id(p) not in used])

    def features(self, *args: Any, **inputs: Any) -> Tensor:
        """Return what the router reads, ``(batch, width)``: the mean over places, brought to mean 0 and variance 1.

        Places that an attention mask leaves out do not count. The parent runs no further than it must.
        """
        with torch.no_grad(), evaluating(self.parent):
            state = self._state(partial(self.parent, *args, **inputs)).detach().float()
        names = dict(zip(inspect.signature(self.parent.forward).parameters, args, strict=False)) | inputs
        return F.layer_norm(pooled(state, names), (self._width,))

    def _state(self, call: Callable[[], Any]) -> Tensor:
        """Run the parent until it has made what the router reads."""
        module = self.parent.get_submodule(self.features_at)
        register: Any = module.register_forward_pre_hook if self._given else module.register_forward_hook
        handle = register(stop, with_kwargs=True)
        try:
            call()
        except Enough as enough:
            return enough.state
        finally:
            handle.remove()
        raise CloneError(
            f"{self.features_at} did not run, or has no tensor of numbers to read.",
            "Expected both in every forward pass: the router reads its answer.",
            "Choose another module with MultiDomainModel(features_at=...).",
        )

    def router_logits(self, *args: Any, **inputs: Any) -> Tensor:
        """Return one logit per sample and domain, ``(batch, domains)``."""
        return self._scores(self.features(*args, **inputs))

    def route(self, *args: Any, **inputs: Any) -> list[str]:
        """Return the likeliest domain of each sample."""
        return [self.domains[number] for number in self.router_logits(*args, **inputs).argmax(dim=-1).tolist()]

    def _scores(self, features: Tensor) -> Tensor:
        # One product per row: a wider one would round otherwise.
        return torch.cat([row(features.to(row.weight.dtype)) for row in self.router_rows()], dim=-1)

    def router_rows(self) -> Iterator[nn.Linear]:
        """Yield the router's rows in the order of `domains`: linear, from the features to one logit."""
        for row in self.rows:
            assert isinstance(row, nn.Linear)
            yield row

    def _answer(self, *args: Any, domain: str | Sequence[str] | None = None, **inputs: Any) -> Tensor:
        """Answer a batch; see `forward`."""
        if isinstance(domain, str):
            return self._logits(self.experts[self._number(domain)], args, inputs)
        if domain is None and len(self.domains) > 1 and not self.fitted:
            warnings.warn(
                f"The router between {', '.join(self.domains)} is not fitted and cannot tell them apart: "
                "call fit_router, or name the domain.",
                stacklevel=2,
            )
        batch = len(next(value for value in (*args, *inputs.values()) if isinstance(value, Tensor)))
        if domain is not None:
            if len(domain) != batch:
                raise CloneError(
                    f"{len(domain)} domains were given for {batch} samples.",
                    "Expected one name for all, or a list with one per sample.",
                    "Correct it, or leave it out to let the router decide.",
                )
            chosen = torch.tensor([self._number(name) for name in domain], dtype=torch.long)
        elif self.route_by == "soft":
            shares = self.router_logits(*args, **inputs).softmax(dim=-1)
            answers = [self._logits(expert, args, inputs) for expert in self.experts]
            parts = (s.to(a).reshape(-1, *[1] * (a.dim() - 1)) * a for s, a in zip(shares.T, answers, strict=True))
            return torch.stack(list(parts)).sum(dim=0)
        else:
            chosen = self.router_logits(*args, **inputs).argmax(dim=-1).cpu()
        order, parts_by_domain = [], []
        for number in chosen.unique().tolist() or [0]:
            members = (chosen == number).nonzero().flatten()
            given = (args, inputs) if len(members) == batch else self._some(args, inputs, members, batch)
            parts_by_domain.append(self._logits(self.experts[number], *given))
            order.append(members)
        answer = torch.cat(parts_by_domain)
        return answer if len(order) == 1 else answer[torch.cat(order).argsort().to(answer.device)]

    def _number(self, domain: str) -> int:
        if domain not in self.domains:
            raise CloneError(
                f"The domain {domain!r} is unknown.",
                f"Expected one of {', '.join(self.domains)}.",
                "Add a clone for it with add_domain.",
            )
        return self.domains.index(domain)

    def _some(
        self, args: tuple[Any, ...], inputs: Mapping[str, Any], members: Tensor, batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for some of the samples."""
        names = list(inspect.signature(self.parent.forward).parameters)

        def rows(name: str, value: Any) -> Any:
            # Arguments that the examples do not show go by their size.
            mine = name in self._by_sample or name not in self._seen
            if not isinstance(value, Tensor) or not mine or value.shape[:1] != (batch,):
                return value
            return value[members.to(value.device)]

        few = tuple(rows(names[place] if place < len(names) else "", value) for place, value in enumerate(args))
        return few, {name: rows(name, value) for name, value in inputs.items()}

    def _logits(self, expert: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Tensor:
        output = expert(*args, **inputs)
        try:
            return tensor_at(output, self._path)
        except KeyError:
            raise CloneError(
                f"A clone returned {type(output).__name__} without `{self._path}`.",
                "Expected the logits where the parent has them.",
                "Return the same structure for every input.",
            ) from None
