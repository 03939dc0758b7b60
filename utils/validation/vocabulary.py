"""Can every legal token id be read, and be predicted?"""

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.objectives import output_site
from utils.validation.check import Finding
from utils.validation.probing import LANGUAGE_MODELS, ModelCrash, content_input, logits, short_length


def check_vocabulary(adapter: ModelAdapter, reference: tuple[int, ...]) -> list[Finding]:
    """Compare the logits' width with the vocabulary, and try the first and the last id."""
    vocabulary = adapter.vocab_size.value
    if vocabulary is None:
        return []
    findings = []
    task = adapter.task.value
    if task in LANGUAGE_MODELS and reference[-1] != vocabulary:
        width = reference[-1]
        rows = {m.weight.shape[0] for m in adapter.module.modules() if isinstance(m, torch.nn.Embedding)}
        # Where the table that reads the ids is as wide as the scores, only the config counts another vocabulary.
        agree = width > vocabulary and any(use.reads_tokens and use.rows == width for use in adapter.tables)
        if agree:
            return []
        if not (task == "seq2seq" and width in rows) and not _padded(width, vocabulary):
            message = f"logits are {width} wide, the vocabulary has {vocabulary} ({adapter.vocab_size.reason})"
            hint = (
                "Give the output layer as many rows as the vocabulary; correct vocab_size in the config if it is wrong."
            )
            findings.append(Finding("vocab_mismatch", "fail", _head(adapter, width), message, hint))
    decoder = content_input(adapter)
    if decoder != adapter.main_input:
        findings += _predictable(adapter, decoder, reference[-1])
    own = decoder != adapter.main_input and vocabulary == reference[-1] == adapter.readable_ids(decoder)
    # What counts the ids that are predicted need not count those of the source, which has a vocabulary of its own.
    last = (adapter.readable_ids() if own else vocabulary) - 1
    for token in (0, last):
        inputs = adapter.example_inputs(2, short_length(adapter))
        inputs[adapter.main_input] = torch.full_like(inputs[adapter.main_input], token)
        try:
            logits(adapter, inputs, f"token id {token}")
        except ModelCrash as crash:
            readable = adapter.readable_ids()
            table = f"; the embedding has {readable} rows" if readable < vocabulary else ""
            message = f"the legal id {token} of a vocabulary of {vocabulary} crashes{table}: {crash}"
            hint = f"The embedding needs {vocabulary} rows (vocab_size: {adapter.vocab_size.reason})."
            findings.append(Finding("vocab_mismatch", "fail", crash.where, message, hint))
    return findings


def _predictable(adapter: ModelAdapter, decoder: str, width: int) -> list[Finding]:
    """Feed the last id that a decoder can predict back to it, as generation will."""
    rows = adapter.readable_ids(decoder)
    if rows != width and _padded(rows, width):
        return []
    inputs = adapter.example_inputs(2, short_length(adapter))
    inputs[decoder] = torch.full_like(inputs[decoder], width - 1)
    try:
        logits(adapter, inputs, f"`{decoder}` of {width - 1}")
    except ModelCrash as crash:
        message = f"the decoder predicts ids up to {width - 1} and cannot read that one back: {crash}"
        hint = f"The decoder's embedding needs {width} rows, as many as there are scores."
        return [Finding("vocab_mismatch", "fail", crash.where, message, hint)]
    return []


def _head(adapter: ModelAdapter, width: int) -> str:
    """Return the module that makes the logits, or the last one that is `width` wide by the shape of its weight."""
    inputs = adapter.example_inputs(2, short_length(adapter))
    found = output_site(adapter, inputs, logits(adapter, inputs))
    if found != adapter.name:
        # A norm makes nothing wide; where its output is returned, forward() forgot the head.
        makes = any(p.dim() > 1 for p in adapter.module.get_submodule(found).parameters())
        return found if makes else adapter.name
    for name, child in adapter.module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and width in weight.shape:
            found = name or adapter.name
    return found


def _padded(width: int, vocabulary: int) -> bool:
    """Tell whether one size is the other one, padded to a multiple of 64 for speed; that only wastes a few rows."""
    larger, smaller = max(width, vocabulary), min(width, vocabulary)
    return larger % 64 == 0 and larger < min(smaller + 64, 1.05 * smaller)
