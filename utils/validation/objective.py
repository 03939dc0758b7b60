"""Is the loss that the user will train on the right one?

Two questions. Does forward return what the loss expects, that is scores and no probabilities? And, where the model
takes labels, is the loss it returns the one of its own predictions, each paired with the right label?
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from utils.adapters.detection import kind_by_name
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.objectives import (
    IGNORED,
    REAL_VALUED,
    SHIFTED_BY_MODEL,
    OwnLoss,
    distinct_labels,
    labels_input,
    last_part,
    loss_site,
    output_site,
    own_loss,
)
from utils.runtime.errors import AdapterError
from utils.validation.builtin_loss import (
    Trial,
    binary_loss,
    by_value,
    called,
    label_example,
    like_the_example,
    looks_causal,
    pulled_rows,
    shift_of_own_targets,
    torn_rows,
    trial,
    untrained_parameters,
)
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.output_kind import SOFTMAX_HINT, Returned, ends_in_sigmoid, returned_kind
from utils.validation.probing import LANGUAGE_MODELS, ModelCrash, compares_samples, has_length, logits
from utils.validation.reproduction import class_label_lines, label_lines, own_shift_lines

LENGTH = 9
BATCH = 3
TEXTS = 2
"""Texts in a batch: with a label at every position two are enough."""
PAIRING_HINT = (
    "For next-token prediction pair logits[:, :-1] with labels[:, 1:] once: either in forward() (`labels` = input_ids) "
    "or in the data loader (`targets` already moved by one), never in both."
)
DETACHED_HINT = "Remove detach(), item() or no_grad() around the loss."
LOSS_HINT = "Use torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()) and its mean over labels."
SIGMOID_HINT = (
    "Compute the loss from the numbers before the sigmoid, which cross_entropy and binary_cross_entropy_with_logits "
    "expect; or, where several labels may hold at once, keep the sigmoid and use binary_cross_entropy."
)


class Fault(Protocol):
    """Makes a finding about the loss; it knows where the loss is computed."""

    def __call__(self, code: str, message: str, hint: str, severity: str = "fail", hidden: bool = False) -> Finding:
        """Return the finding; `hidden` says that it is about labels that mark what does not count."""


def check_objective(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Look at what forward returns, and at the loss it returns when it is given labels.

    Codes: ``double_softmax``, ``wrong_softmax_dim`` (at the output), ``wrong_builtin_loss``, ``label_shift``.
    """
    task = adapter.task.value
    name = labels_input(adapter)
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    tokens = has_length(adapter)
    inputs = adapter.example_inputs(
        TEXTS if tokens else BATCH, adapter.legal_length(_length(adapter)) if tokens else None
    )
    result = logits(adapter, inputs, whole=True)
    if (task in REAL_VALUED or result.dim() < 2 or result.shape[-1] < 2) and name is None:
        raise Skipped("the output is real-valued and forward takes no labels: any loss may be right")
    if name is None and compares_samples(adapter):
        raise Skipped("the output compares each sample with each other one: its loss is contrastive, not of classes")
    returned = Returned("scores")
    if task not in REAL_VALUED and result.dim() > 1 and result.shape[-1] > 1:
        returned = returned_kind(adapter, inputs, result)
    findings = [returned.finding] if returned.finding else []
    details: dict[str, object] = {"output": returned.kind}
    why = f"forward returns {returned.kind}" + ("" if name else " and takes no labels")
    if name is None and task == "causal_lm" and shift_of_own_targets(adapter, inputs) == 0:
        message = "the loss that forward returns pairs the scores at t with the token at t, which the model has read"
        lines = own_shift_lines(adapter, inputs)
        findings.append(Finding("label_shift", "fail", adapter.name, message, PAIRING_HINT, lines))
    wrong_axis = any(finding.code == "wrong_softmax_dim" for finding in findings)
    if name is not None and not wrong_axis:
        if result.dim() in (2, 3) and result.shape[-1] > 1 and task not in REAL_VALUED:
            found, words = _class_loss(adapter, inputs, result, returned)
        else:
            found, words = _real_loss(adapter, inputs, result)
        if ends_in_sigmoid(adapter, inputs):
            findings, found, words = _squashed(adapter, inputs, result, findings, found, words)
        # A model that takes the logarithm of its own probabilities is right by itself; only other losses are misled.
        if words == "negative log of the output" or words.startswith("binary cross-entropy of the output"):
            findings = [] if returned.kind in ("probabilities", "sigmoid") else findings
        if not any(finding.code == "double_softmax" for finding in findings):
            findings += found
        else:
            findings += [finding for finding in found if finding.code == "label_shift"]
        details["loss"] = words
        why += f"; the loss it returns for `{name}`: {words}"
    return Outcome(returned.kind, "scores and their own loss", why, findings, details)


def _squashed(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    result: Tensor,
    findings: list[Finding],
    found: list[Finding],
    words: str,
) -> tuple[list[Finding], list[Finding], str]:
    """Judge the loss of a model that ends in a sigmoid, where it takes that for scores; a loss made before it is sound.

    Args:
        adapter: The model.
        inputs: What it was judged on.
        result: Its output.
        findings: What the output alone gave rise to.
        found: What its loss gave rise to.
        words: What is known about its loss.
    """
    others = [finding for finding in findings if finding.code != "double_softmax"]
    # Where all scores are equal several losses have one gradient.
    uneven = result.dim() > 1 and result.shape[-1] > 1 and float(result.float().std(-1).min()) > 1e-3
    if uneven and words.split(",")[0] in ("cross-entropy", "binary cross-entropy"):
        classes = _classes(adapter, result)
        labels = distinct_labels(tuple(result.shape[:-1]), classes).to(result.device)
        message = (
            f"forward returns a sigmoid ({float(result.min()):.3g} to {float(result.max()):.3g}), and its own loss is "
            f"the {words} of that as if it were scores: it squashes them a second time"
        )
        shown = "print('loss', got.loss, 'of a second squashing', a.loss(y, t), 'y within', y.aminmax())"
        lines = class_label_lines(adapter, inputs, labels, classes, shown)
        again = Finding("double_softmax", "fail", output_site(adapter, inputs, result), message, SIGMOID_HINT, lines)
        return [*others, again], found, words
    binary = binary_loss(adapter, inputs, result)
    if binary is not None and binary.twice:
        return others, [_twice(adapter, inputs, result, binary.labels)], "binary cross-entropy of a second sigmoid"
    if binary is not None and binary.by_element and words.startswith("not judged"):
        # Its own loss has shown that several labels may hold at once.
        return others, found, "of several labels at once"
    return findings, found, words


def _twice(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, labels: Tensor) -> Finding:
    """Describe a loss that takes the sigmoid of an output which is a sigmoid already."""
    message = (
        f"the loss is binary_cross_entropy_with_logits of the output, which is a sigmoid already "
        f"({float(result.min()):.3g} to {float(result.max()):.3g}): it takes a second one, and even a certain and "
        f"right answer costs {math.log1p(math.exp(-1)):.2f} nats for yes and {math.log(2):.2f} for no"
    )
    made = f"t = (torch.arange({labels.numel()}) % 2).view({tuple(labels.shape)}).to(y)"
    usual = "u = torch.nn.functional.binary_cross_entropy_with_logits(y.view_as(t), t)"
    shown = f"{usual}; print('loss', got.loss, 'of a second sigmoid', u, 'y within', y.aminmax())"
    lines = label_lines(adapter, inputs, made, shown)
    return Finding("wrong_builtin_loss", "fail", loss_site(adapter, inputs, labels), message, SIGMOID_HINT, lines)


def _length(adapter: ModelAdapter) -> int:
    return min(LENGTH, adapter.max_length.value or LENGTH)


def _class_loss(
    adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, returned: Returned
) -> tuple[list[Finding], str]:
    """Judge the loss that a classifier or language model returns."""
    name = str(labels_input(adapter))
    classes = _classes(adapter, result)
    if adapter.config.get("problem_type") == "multi_label_classification":
        return [], "several labels at once, not judged"
    example = label_example(adapter, result)
    if example.whole:
        found, words = _real_loss(adapter, inputs, result)
        return found, f"not judged as one of single classes; {words}"
    if not example.fits:
        return [], "not judged, the example's labels are shaped otherwise than the scores"
    labels = distinct_labels(tuple(result.shape[:-1]), classes).to(result.device)
    try:
        with torch.enable_grad():
            got = called(adapter, inputs, labels, result)
    except ModelCrash as crash:
        return _crashed(adapter, crash)
    if got is None:
        return [], "no single number comes back, so there is no loss to judge"

    def fault(code: str, message: str, hint: str, severity: str = "fail", hidden: bool = False) -> Finding:
        moved = int(adapter.task.value == "causal_lm" and last_part(name) in SHIFTED_BY_MODEL)
        usual = f"a.loss(y[:, :-{moved}], t[:, {moved}:])" if moved else "a.loss(y, t)"
        shown = f"print('loss', got.loss, 'usual', {usual}.detach())"
        if code == "label_shift":
            pulled = "got.gradient[0].argmin(-1)" if got.gradient is not None and got.gradient.any() else ""
            losses = "{s: float(a.loss(y[:, : y.shape[1] - s], t[:, s:])) for s in (0, 1, 2)}"
            shown = f"print('labels', t[0], 'trained on', {pulled})" if pulled else f"print('loss', got.loss, {losses})"
        if hidden:
            shown = f"t[:, 2:5] = {IGNORED}; got = own_loss(a, x, t, y)"
            shown += "; print('loss', got.loss, got.gradient[0].norm(dim=-1))"
        lines = class_label_lines(adapter, inputs, labels, classes, shown)
        return Finding(code, severity, loss_site(adapter, inputs, labels), message, hint, lines)

    if not bool(torch.isfinite(got.loss)):
        return [], f"{float(got.loss)} for random labels; the check of finite numbers has the cause"
    trains = any(p.requires_grad for p in adapter.module.parameters())
    if not got.loss.requires_grad and trains and result_trains(adapter, inputs):
        message = f"the loss returned for `{name}` ({float(got.loss):.4g}) carries no gradient: backward() will fail"
        return [
            fault("wrong_builtin_loss", message, "Remove detach(), item() or no_grad() around the loss.")
        ], "detached"
    if got.scores is None or got.gradient is None or not bool(got.gradient.any()):
        return _judge_value(adapter, inputs, result, got, returned, fault)
    tried = trial(adapter, inputs, labels, got.scores, got.gradient)
    findings, words = _judge_gradient(adapter, inputs, result, tried, returned, fault)
    # A loss of whole sequences, such as a conditional random field's, has a gradient everywhere.
    if not findings and has_length(adapter) and labels.dim() == 2 and tried.pairing.shift is not None:
        findings = _judge_ignored(adapter, inputs, result, tried, fault)
    return findings, words


def _classes(adapter: ModelAdapter, result: Tensor) -> int:
    """Return how many labels are legal: a head that is padded has more columns than there are words."""
    vocabulary = adapter.vocab_size.value if adapter.task.value in LANGUAGE_MODELS else None
    return min(result.shape[-1], vocabulary or result.shape[-1])


def result_trains(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> bool:
    """Tell whether the logits carry a gradient, so that a loss without one lost it on its own."""
    with torch.enable_grad():
        return adapter.logits(inputs).requires_grad


def _crashed(adapter: ModelAdapter, crash: ModelCrash) -> tuple[list[Finding], str]:
    """Judge a crash with labels of the usual shape: a fault only where the loss itself raises."""
    frame, inside = crash.error.__traceback__, False
    while frame is not None:
        inside = inside or frame.tb_frame.f_code.co_name in ("cross_entropy", "nll_loss", "mse_loss", "l1_loss")
        frame = frame.tb_next
    # A model of texts with pictures may need both before its labels fit.
    others = [name for name in adapter.argument_names if kind_by_name(name) not in (None, "tokens")]
    if not inside or adapter.task.value not in LANGUAGE_MODELS or others:
        return [], f"not judged, labels of the usual shape raise ({crash})"
    message = f"the loss cannot be computed for labels shaped like the input: {crash}"
    return [Finding("wrong_builtin_loss", "fail", crash.where, message, LOSS_HINT)], "crashes"


def _judge_gradient(
    adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, tried: Trial, returned: Returned, fault: Fault
) -> tuple[list[Finding], str]:
    """Judge pairing, kind and reduction of a loss by its gradient."""
    name, pairing, known = str(labels_input(adapter)), tried.pairing, tried.known
    words = known.name or "of its own kind"
    rows = int(pairing.rows.sum())
    if pairing.shift is None:
        if torn := torn_rows(tried):
            message = f"the loss is the cross-entropy of rows torn out of the logits {tuple(result.shape)}: {torn}"
            return [fault("wrong_builtin_loss", message, LOSS_HINT)], "of torn rows"
        language = adapter.task.value in LANGUAGE_MODELS
        if pairing.foreign > 0.5 * rows and tried.labels.unique().numel() == tried.labels.numel():
            message = (
                f"{pairing.foreign} of {rows} rows of logits are trained on a label of another sample or position: "
                f"logits {tuple(result.shape)} and labels {tuple(tried.labels.shape)} are flattened in different orders"
            )
            return [fault("wrong_builtin_loss", message, LOSS_HINT)], "mixed pairs"
        if language:
            message = (
                f"in {rows} rows of logits the loss pulls up another score than the label's: it is no loss of these "
                f"predictions for `{name}`"
            )
            return [fault("wrong_builtin_loss", message, LOSS_HINT)], "unrelated to the labels"
        return [], words
    if pairing.reversed or known.weight < 0:
        message = f"the loss falls when the score of the right label falls, in all {rows} rows: its sign is wrong"
        return [
            fault("wrong_builtin_loss", message, "Minimise the negative log-likelihood; look for a lost minus.")
        ], words
    findings = _judge_kind(words, known.weight, rows, tried, returned, fault)
    findings += _judge_shift(adapter, inputs, result, pairing.shift, fault) if tried.labels.dim() == 2 else []
    counted, expected = rows, tried.labels.numel() - abs(pairing.shift) * len(tried.labels)
    if not findings and adapter.task.value in ("causal_lm", "seq2seq") and counted <= 0.5 * expected:
        message = f"only {counted} of {expected} positions with a label have any part in the loss"
        findings.append(fault("wrong_builtin_loss", message, LOSS_HINT))
    return findings, words + (f", logits at t with label t{pairing.shift:+d}" if pairing.shift else "")


def _judge_kind(words: str, weight: float, rows: int, tried: Trial, returned: Returned, fault: Fault) -> list[Finding]:
    """Judge which function of the scores the loss is, and whether it is a mean."""
    if words in ("cross-entropy of a softmax", "cross-entropy of a sigmoid") and returned.kind == "scores":
        second = words.rsplit(" ", 1)[-1]
        message = (
            f"the loss is the cross-entropy of a {second} of the logits: its gradient equals that of "
            f"cross_entropy({second}(logits)) in all {rows} rows, and not that of cross_entropy(logits)"
        )
        return [fault("double_softmax", message, SOFTMAX_HINT)]
    log_output = returned.kind == "log-probabilities"
    wrong = {
        "negative score": "nll_loss without log_softmax: minus the label's score, which has no lower bound",
        "negative probability": "minus the label's probability, without the logarithm",
        "squared error of the scores": "the squared error between scores and one-hot labels, no cross-entropy",
        "squared error of a softmax": "the squared error between probabilities and one-hot labels, no cross-entropy",
    }
    if words in wrong and not (words == "negative score" and log_output) and returned.kind != "probabilities":
        message = f"the loss is {wrong[words]} (gradient equal in all {rows} rows)"
        return [fault("wrong_builtin_loss", message, LOSS_HINT)]
    if words in ("cross-entropy", "negative score", "negative log of the output") and rows > 1:
        counts = {"all positions": rows, "the positions of a sample": rows / len(tried.labels)}
        for what, count in counts.items():
            if count >= 2 and abs(weight / count - 1) < 0.02:
                message = f"the loss is a sum over {what}, {count:g} times the mean: it grows with the batch"
                hint = "Use reduction='mean', or divide by the number of labels that count."
                return [fault("wrong_builtin_loss", message, hint)]
    return []


def _judge_shift(
    adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, shift: int, fault: Fault
) -> list[Finding]:
    """Judge which label each position is paired with, by the task and by what the argument's name promises."""
    name, task = last_part(str(labels_input(adapter))), adapter.task.value
    allowed: tuple[int, ...] = (0,)
    severity = "fail"
    if task == "seq2seq" or (task == "masked_lm" and hasattr(adapter.module, "generate")):
        # A model that can generate may shift, even if its name is an encoder's.
        allowed = (0, 1)
    elif task == "causal_lm":
        if _is_half(adapter) or not looks_causal(adapter, inputs, result):
            allowed = (0, 1)
        elif name in SHIFTED_BY_MODEL:
            allowed = (0, 1) if label_example(adapter, result).moved else (1,)
        elif shift == 1:
            severity = "warn"
    if shift in allowed:
        return []
    want = " or ".join(f"t{s:+d}" if s else "t" for s in allowed)
    copies = "; it learns to copy the token that it reads" if shift == 0 else ""
    message = f"the logits at position t are trained on `{name}` at t{shift:+d}, expected {want}{copies}"
    return [fault("label_shift", message, PAIRING_HINT, severity)]


def _is_half(adapter: ModelAdapter) -> bool:
    """Tell whether a causal model is half of a translation model: its input is moved by one, not its labels."""
    if adapter.config.get("decoder_start_token_id") is not None:
        return True
    return all(any(key.startswith(part) for key in adapter.config) for part in ("encoder_", "decoder_"))


def _judge_ignored(
    adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, tried: Trial, fault: Fault
) -> list[Finding]:
    """Judge whether positions labelled -100 stay out of the loss and of its mean."""
    name = last_part(str(labels_input(adapter)))
    labels, shift = tried.labels.clone(), tried.pairing.shift or 0
    hidden = slice(2, 5)
    if labels.shape[1] < 7 or not (name in SHIFTED_BY_MODEL or adapter.task.value == "masked_lm"):
        return []
    labels[:, hidden] = IGNORED
    hint = f"Pass ignore_index={IGNORED} (the default of cross_entropy), and divide by the labels that count."
    try:
        with torch.enable_grad():
            got = own_loss(adapter, inputs, labels, result)
    except Exception as error:
        # A loss of whole sequences counts transitions between labels, and leaves padding out by other means.
        if tried.known.name is None or _own_convention(adapter, inputs, result, tried.labels, hidden):
            return []
        first = (str(error).strip() or "no message").splitlines()[0][:120]
        message = f"labels of {IGNORED}, which mark padding, raise {type(error).__name__}: {first}"
        return [fault("wrong_builtin_loss", message, hint, hidden=True)]
    if got is None or got.gradient is None or got.scores is None:
        return []
    rows = pulled_rows(got.gradient.reshape(*labels.shape, -1))
    left_out = torch.zeros_like(rows)
    left_out[:, hidden.start - shift : hidden.stop - shift] = True
    if bool((rows & left_out & tried.pairing.rows).all(dim=0)[hidden.start - shift : hidden.stop - shift].all()):
        message = f"positions labelled {IGNORED} count in the loss: all {int(left_out.sum())} of them have a gradient"
        return [fault("wrong_builtin_loss", message, hint, hidden=True)]
    again = trial(adapter, inputs, labels, got.scores, got.gradient)
    before, kept = int(tried.pairing.rows.sum()), int(rows.sum())
    if again.known.name == tried.known.name == "cross-entropy" and kept < before and tried.known.weight > 0:
        ratio = again.known.weight / tried.known.weight
        if abs(ratio / (kept / before) - 1) < 0.02:
            message = (
                f"the loss is divided by all {before} positions although {before - kept} are labelled {IGNORED}: the "
                "more padding, the smaller the loss"
            )
            return [fault("wrong_builtin_loss", message, hint, hidden=True)]
    return []


def _own_convention(
    adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor, labels: Tensor, hidden: slice
) -> bool:
    """Tell whether another usual label, -1 or the padding id, is left out of the loss instead."""
    for ignored in (-1, adapter.pad_token_id.value, 0):
        if ignored is None:
            continue
        marked = labels.clone()
        marked[:, hidden] = ignored
        try:
            with torch.enable_grad():
                got = own_loss(adapter, inputs, marked, result)
        except Exception:
            continue
        if got is None or got.gradient is None:
            continue
        if int((~pulled_rows(got.gradient)).sum()) >= 3 * len(labels):
            return True
    return False


def _judge_value(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    result: Tensor,
    got: OwnLoss,
    returned: Returned,
    fault: Fault,
) -> tuple[list[Finding], str]:
    """Judge a loss that has no gradient by the returned scores, by its values."""
    name = str(labels_input(adapter))
    scores = result if got.scores is None else got.scores
    classes = _classes(adapter, result)
    known, shift, heard = by_value(adapter, inputs, scores, classes)
    if not heard:
        message = f"the loss is the same for four different `{name}`: the labels have no part in it"
        return [fault("wrong_builtin_loss", message, LOSS_HINT)], "deaf to the labels"
    if known in ("cross-entropy of a softmax", "cross-entropy of a sigmoid"):
        message = f"the loss equals the {known} of the logits for four draws of labels"
        return [fault("double_softmax", message, SOFTMAX_HINT)], known
    if known is None and returned.kind == "scores":
        labels = distinct_labels(tuple(scores.shape[:-1]), classes).to(scores.device)
        untrained = untrained_parameters(adapter, inputs, labels, scores)
        # Several streams of scores may share a head, of which only the first is returned.
        if untrained or (got.attached and adapter.task.value not in LANGUAGE_MODELS):
            proof = f"; {untrained[0]} makes the logits and gets no gradient from it" if untrained else ""
            message = (
                "the loss is computed from another tensor than the logits: it has no gradient by them, and equals no "
                f"usual loss of them for four draws of `{name}`{proof}"
            )
            return [fault("wrong_builtin_loss", message, LOSS_HINT)], "of another tensor"
    if known is not None and scores.dim() == 3 and (wrong := _judge_shift(adapter, inputs, scores, shift, fault)):
        return wrong, known
    return [], (known or "of its own kind") + (f", logits at t with label t{shift:+d}" if shift else "")


def _real_loss(adapter: ModelAdapter, inputs: dict[str, Tensor], result: Tensor) -> tuple[list[Finding], str]:
    """Judge the loss of a model with real-valued targets: it must hear its labels and carry a gradient."""
    name = str(labels_input(adapter))
    values: list[Tensor] = []
    pulls: list[Tensor | None] = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        known = like_the_example(adapter, len(result), seed) if result.dim() else None
        labels = torch.randn(result.shape, generator=generator).to(result) if known is None else known
        try:
            with torch.enable_grad():
                got = own_loss(adapter, inputs, labels, result)
        except Exception:
            return [], "not judged, labels shaped like the output raise"
        if got is None:
            return [], "no single number comes back, so there is no loss to judge"
        values.append(got.loss)
        pulls.append(got.gradient)
    lines = label_lines(
        adapter, inputs, "t = torch.randn_like(y)", "print('loss', got.loss, own_loss(a, x, -t, y).loss)"
    )
    if not values[0].requires_grad and result_trains(adapter, inputs):
        message = f"the loss returned for `{name}` carries no gradient: backward() will fail"
        site = loss_site(adapter, inputs, labels)
        return [Finding("wrong_builtin_loss", "fail", site, message, DETACHED_HINT, lines)], "detached"
    # Where all scores are 0, yes and no cost the same, and pull to different sides.
    first, second = pulls
    deaf = not adapter.loss_inputs if first is None or second is None else torch.equal(first, second)
    if deaf and bool(torch.isfinite(values[0])) and float(values[0].detach()) == float(values[1].detach()):
        message = (
            f"the loss is {float(values[0].detach()):.4g} for two different `{name}`: the labels have no part in it"
        )
        hint = "Compute the loss from the labels, for example with mse_loss(output, labels)."
        site = loss_site(adapter, inputs, labels)
        return [Finding("wrong_builtin_loss", "fail", site, message, hint, lines)], "deaf to the labels"
    return [], "follows its labels"
