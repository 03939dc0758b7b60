"""What products, convolutions, tables and attention do to lanes: they unite what is summed over and make new ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from utils.adapters.contractions import factors, first_of_many
from utils.adapters.lane_labels import Operand, Slots, contracted, joined, varying
from utils.adapters.lane_notes import Note, operand, without
from utils.adapters.lane_operations import given_arguments


class WeightOperations:
    """Labels what weights make."""

    def __init__(self, slots: Slots, note: Callable[[Tensor], Note], remember: Callable[[Tensor, Note], None]) -> None:
        """Share a tracer's knowledge.

        Args:
            slots: What was found.
            note: Returns what is known about a tensor.
            remember: Keeps what is known about one.
        """
        self.slots, self._note, self._remember = slots, note, remember

    def labels(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor
    ) -> tuple[Tensor, ...] | None:
        """Label the result of products, convolutions, tables and attention; None for anything else.

        Args:
            name: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            made: Its result.
        """
        if name == "linear":
            given = given_arguments(name, args, kwargs)
            x, weight, bias = given["input"], given["weight"], given.get("bias")
            lead = "abcdefgh"[: x.dim() - 1]
            letters = (f"{lead}i", "oi"[2 - weight.dim() :], lead + "o"[: weight.dim() - 1])
            # Learned vectors that a layer reads are activations as any other.
            if not self._note(x).live:
                self.slots.play([one for one in self._note(x).labels if x.dim() - 1 in varying(one)], "writer")
            sides = (replace(operand(x, self._note(x)), live=True), operand(weight, self._note(weight)))
            return self._biased(contracted(self.slots, *sides, letters), made, bias, made.dim() - 1)
        if name.startswith("conv"):
            return self._convolved(name, given_arguments(name, args, kwargs), made)
        if name == "embedding":
            given = given_arguments(name, args, kwargs)
            return self._looked_up(given["weight"], made, given.get("max_norm"))
        if name == "prelu":
            given = given_arguments(name, args, kwargs)
            x, weight = given["input"], given["weight"]
            shape = [weight.numel() if axis == 1 else 1 for axis in range(x.dim())]
            self.slots.play(self._note(weight).labels, "pointwise")
            scale = operand(weight, self._note(weight), shape)
            return joined(self.slots, [operand(x, self._note(x)), scale])
        if name == "scaled_dot_product_attention":
            return self._attended(given_arguments(name, args, kwargs), made)
        while name == "einsum" and (many := first_of_many(args)) is not None:
            equation, (one, two, *others), rest = many
            between = torch.einsum(equation, one, two)
            labels = self.labels("einsum", (equation, one, two), {}, between)
            self._remember(between, Note(self._note(one).live or self._note(two).live, labels or ()))
            args = (rest, between, *others)
        if (pair := factors(name, args, kwargs)) is not None:
            names = pair.labels
            labels = self._product(pair.left, pair.right, (names.left, names.right, names.out))
            bias = args[0] if name in ("addmm", "baddbmm") else None
            return self._biased(labels, made, bias, made.dim() - 1)
        return None

    def _product(self, left: Tensor, right: Tensor, letters: tuple[str, str, str]) -> tuple[Tensor, ...]:
        sides = (operand(left, self._note(left)), operand(right, self._note(right)))
        return contracted(self.slots, *sides, letters)

    def _biased(self, labels: tuple[Tensor, ...], made: Tensor, bias: Tensor | None, axis: int) -> tuple[Tensor, ...]:
        """Add a bias that lies along one axis."""
        if bias is None:
            return labels
        note = self._note(bias)
        if not note.live:
            self.slots.play(note.labels, "pointwise")
        shape = tuple(bias.shape)
        if bias.dim() == 1:
            shape = tuple(bias.shape[0] if a == axis else 1 for a in range(made.dim()))
        own = tuple(one.reshape(shape) if bias.dim() == 1 else one for one in note.labels)
        return joined(self.slots, [Operand(tuple(made.shape), labels, True), Operand(shape, own, note.live)])

    def _convolved(self, name: str, given: dict[str, Any], made: Tensor) -> tuple[Tensor, ...]:
        """Label the result of a convolution: only its channels are lanes."""
        x, weight, groups = given["input"], given["weight"], given.get("groups", 1)
        dims = weight.dim() - 2
        batch = "b"[: x.dim() - dims - 1]
        channel = len(batch)
        space, kernel, after = "stu"[:dims], "klm"[:dims], "xyz"[:dims]
        transposed = "transpose" in name
        note, own = self._note(x), self._note(weight)
        labels = without(self.slots, note.labels, frozenset(range(channel + 1, x.dim())), name)
        left, right = Operand(tuple(x.shape), labels, True), operand(weight, own)
        if groups == 1:
            names = (f"{batch}c{space}", ("co" if transposed else "oc") + kernel, f"{batch}o{after}")
            out = contracted(self.slots, left, right, names)
        elif groups == x.shape[channel] and not transposed:
            # Each channel by itself: filters scale lanes, and several filters per channel make several of each.
            times = weight.shape[0] // groups
            shape = tuple(size * times if a == channel else size for a, size in enumerate(x.shape))
            repeated = tuple(
                one.repeat_interleave(times, channel) if channel in varying(one) else one for one in labels
            )
            left = Operand(shape, repeated, True)
            out = contracted(self.slots, left, right, (f"{batch}o{space}", f"oi{kernel}", f"{batch}o{after}"), False)
        else:
            reason = f"a convolution in {groups} groups touches it"
            for one in (*labels, *own.labels):
                self.slots.fix(one, reason)
            axis = 1 if transposed else 0
            vector = next((one.reshape(-1) for one in own.labels if varying(one) == {axis}), None)
            if vector is None or vector.numel() != made.shape[channel]:
                return ()
            self.slots.play([vector], "writer")
            out = (vector.reshape([-1 if a == channel else 1 for a in range(made.dim())]),)
        return self._biased(out, made, given.get("bias"), channel)

    def _looked_up(self, weight: Tensor, made: Tensor, max_norm: float | None) -> tuple[Tensor, ...]:
        """Label rows of a table that were chosen by index."""
        found = []
        for one in self._note(weight).labels:
            if varying(one) == {1} and max_norm is None:
                self.slots.play([one], "writer")
                found.append(one.reshape((1,) * (made.dim() - 1) + (-1,)))
            else:
                self.slots.fix(one, "rows of the table are chosen by number" if max_norm is None else "`max_norm`")
        return tuple(found)

    def _attended(self, given: dict[str, Any], made: Tensor) -> tuple[Tensor, ...]:
        """Label the result of fused attention: the lanes of its values."""
        query, key, value = given["query"], given["key"], given["value"]
        lead = "abcdefgh"[: query.dim() - 2]
        # Queries of a group share keys and values: those are repeated as torch does.
        times = query.shape[-3] // key.shape[-3] if given.get("enable_gqa") and query.dim() > 2 else 1
        sides = []
        for tensor in (query, key, value):
            note = self._note(tensor)
            for one in note.labels:
                self.slots.fix(one, "inside `scaled_dot_product_attention`")
            labels = note.labels if tensor is query or times == 1 else tuple(
                one.repeat_interleave(times, -3) if one.shape[-3] > 1 else one for one in note.labels
            )  # fmt: skip
            shape = tuple(query.shape[:-2]) + tuple(tensor.shape[-2:])
            sides.append(Operand(shape, labels, note.live))
        contracted(self.slots, sides[0], sides[1], (f"{lead}ld", f"{lead}sd", f"{lead}ls"))
        return without(self.slots, sides[2].labels, frozenset({value.dim() - 2}), "scaled_dot_product_attention")
