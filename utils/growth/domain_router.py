"""Several clones of one parent as one model, with a router that sends each sample to the clone of its domain.

The router reads what the parent's trunk makes of a sample, as the mean over its places, and has one linear row per
domain. Each row is a parameter of its own, so a further domain leaves the others' logits as they are, bit for bit, and
an optimizer keeps what it knows of them. The features are taken without gradients and in eval mode.

A mean over a whole text sees its end: for a language model a forward pass without ``domain`` is not causal. Name the
domain while training, and in generation take it from the prompt (`MultiDomainModel.route`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, tensor_at
from utils.adapters.roles import role_of
from utils.adapters.structure import structure
from utils.growth.clone_record import CloneError, DomainClone
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
            raise CloneError(f"route_by is {route_by!r}.", f"Expected one of {', '.join(ROUTES)}.")
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
        self._path = adapter.output.value or ""
        few, more = adapter.example_inputs(2), adapter.example_inputs(3)
        self._by_sample = {name for name in few if few[name].dim() and few[name].shape[:1] != more[name].shape[:1]}
        self._example = {name: value.cpu() for name, value in more.items()}
        with adapter.isolated():
            self._shape = tuple(adapter.logits(more).shape)
        self.features_at, self._given = _place(adapter, clones, features_at)
        self._check_features(adapter, few, more)
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
        return any(bool(row.weight.detach().any()) for row in self._rows())

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
        held = next(iter(self.parent.parameters()))
        try:
            with torch.no_grad(), _evaluating(expert):
                example = {name: value.to(held.device) for name, value in self._example.items()}
                shape: Any = tuple(self._logits(expert, (), example).shape)
        except CloneError:
            raise
        except Exception as error:
            shape = f"{type(error).__name__}: {error}"
        if shape != self._shape:
            raise CloneError(
                f"The clone for {domain!r} answers the parent's example with {shape}.",
                f"Expected {self._shape}, the answer of {', '.join(self.domains) or 'the parent'}: one vocabulary, or "
                "one set of classes, for all.",
                "Use clones whose vocabulary and head have not changed.",
            )
        fitted = self.fitted
        row = nn.Linear(self._width, 1, device=held.device)
        nn.init.zeros_(row.weight)
        nn.init.constant_(row.bias, CLOSED if fitted else 0.0)
        record = None if clone is None else clone.record.to_dict()
        self.lineage = (*self.lineage, DomainAdded(domain, len(self.rows), record, fitted))
        self.domains.append(domain)
        self.experts.append(expert)
        self.rows.append(row)
        # The parent's own answer may be nobody's: what only its features need is not for training.
        used = {id(parameter) for module in self.experts for parameter in module.parameters()}
        for parameter in self.parent.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)

    def features(self, *args: Any, **inputs: Any) -> Tensor:
        """Return what the router reads, ``(batch, width)``: the mean over places, brought to mean 0 and variance 1.

        Places that an attention mask leaves out do not count. The parent runs no further than it must.
        """
        module = self.parent.get_submodule(self.features_at)
        module_hook = module.register_forward_pre_hook if self._given else module.register_forward_hook
        handle = module_hook(partial(_stop, self._given), with_kwargs=True)
        try:
            with torch.no_grad(), _evaluating(self.parent):
                self.parent(*args, **inputs)
        except _Enough as enough:
            state = enough.state
        else:
            raise CloneError(
                f"{self.features_at} did not run for this input.",
                "Expected it in every forward pass: the router reads its answer.",
                "Choose another module with MultiDomainModel(features_at=...).",
            )
        finally:
            handle.remove()
        bound = self._bound(args, inputs)
        return F.layer_norm(_pooled(state.detach().float(), bound), (self._width,))

    def router_logits(self, *args: Any, **inputs: Any) -> Tensor:
        """Return one logit per sample and domain, ``(batch, domains)``."""
        return self._scores(self.features(*args, **inputs))

    def route(self, *args: Any, **inputs: Any) -> list[str]:
        """Return the likeliest domain of each sample."""
        return [self.domains[number] for number in self.router_logits(*args, **inputs).argmax(dim=-1).tolist()]

    def _scores(self, features: Tensor) -> Tensor:
        # One product per row: a wider one would round otherwise.
        return torch.cat([row(features) for row in self._rows()], dim=-1)

    def _rows(self) -> Iterator[nn.Linear]:
        for row in self.rows:
            assert isinstance(row, nn.Linear)
            yield row

    def _answer(self, *args: Any, domain: str | Sequence[str] | None = None, **inputs: Any) -> Tensor:
        """Answer a batch; see `forward`."""
        batch = len(next(value for value in (*args, *inputs.values()) if isinstance(value, Tensor)))
        if isinstance(domain, str):
            return self._logits(self.experts[self._number(domain)], args, inputs)
        if domain is not None:
            if len(domain) != batch:
                raise CloneError(
                    f"{len(domain)} domains were given for {batch} samples.",
                    "Expected one name for all, or a list with one per sample.",
                )
            chosen = torch.tensor([self._number(name) for name in domain])
        elif self.route_by == "soft":
            shares = self.router_logits(*args, **inputs).softmax(dim=-1)
            answers = [self._logits(expert, args, inputs) for expert in self.experts]
            parts = (s.to(a).reshape(-1, *[1] * (a.dim() - 1)) * a for s, a in zip(shares.T, answers, strict=True))
            return torch.stack(list(parts)).sum(dim=0)
        else:
            chosen = self.router_logits(*args, **inputs).argmax(dim=-1).cpu()
        order, parts_by_domain = [], []
        for number in chosen.unique().tolist():
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
            mine = name in self._by_sample or name not in self._example
            if not isinstance(value, Tensor) or not mine or value.shape[:1] != (batch,):
                return value
            return value[members.to(value.device)]

        few = tuple(rows(name, value) for name, value in zip(names, args, strict=False))
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
