"""Is the row that a token table keeps for padding the padding's?

`nn.Embedding(padding_idx=i)` gives row i no gradient: if padding has another id, the token i never learns, and the
padding is learned as if it were content. Only what the user or the config says about the padding id can contradict a
table; without either there is nothing to hold it against.
"""

import torch
from torch import nn

from utils.adapters.detection import config_number, embedding_uses
from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import has_length, logits
from utils.validation.untrained import looks_untrained

HINT = "Build the table with padding_idx=config.pad_token_id, and pad with that id."
ROW_HINT = "After your own initialization, zero the row again: table.weight.data[padding_idx].zero_()."


def check_padding_row(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Compare each token table's `padding_idx` with the padding id, and look at the row itself.

    Code: ``padding_idx_wrong``.
    """
    if not has_length(adapter):
        raise Skipped("the input is no sequence of tokens")
    inputs = adapter.example_inputs()
    uses = embedding_uses(adapter.module, lambda: logits(adapter, inputs), inputs, adapter.main_input)
    tables = [use for use in uses if use.reads in adapter.input_names and use.padding_idx is not None]
    tables = [use for use in tables if use.reads_tokens or use.reads in ("decoder_input_ids", "tgt", "trg")]
    if not tables:
        raise Skipped("no token table keeps a row for padding")
    stated = adapter.spec.pad_token_id
    if stated is None and (found := config_number(adapter.config, "pad_token_id")) is not None and found.value >= 0:
        stated = found.value
    findings = []
    for use in tables:
        if stated is not None and use.padding_idx != stated:
            message = (
                f"`{use.name}` keeps row {use.padding_idx} for padding (padding_idx), but the padding id is {stated}: "
                f"token {use.padding_idx} gets no gradient, and row {stated} is learned as content"
            )
            findings.append(Finding("padding_idx_wrong", "fail", use.name or adapter.name, message, HINT))
        elif looks_untrained(adapter.module) and (size := _row_size(adapter, use.name, use.padding_idx)) > 0.1:
            message = (
                f"row {use.padding_idx} of `{use.name}`, kept for padding, is not zero but {size:.2g} times as large "
                "as the others, and without a gradient it stays so"
            )
            findings.append(Finding("padding_idx_wrong", "warn", use.name or adapter.name, message, ROW_HINT))
    what = ", ".join(f"`{use.name}` keeps row {use.padding_idx}" for use in tables)
    why = f"{what} for padding" + (", as stated" if stated is not None else "; no padding id is stated")
    return Outcome([use.padding_idx for use in tables], stated, why, findings)


def _row_size(adapter: ModelAdapter, name: str, row: int | None) -> float:
    """Return the root mean square of a table's row beside that of the whole table; 0 where that is zero."""
    table = adapter.module.get_submodule(name)
    if not isinstance(table, nn.Embedding) or row is None:
        return 0.0
    weight = table.weight.detach().float()
    whole = float(weight.square().mean().sqrt())
    return float(weight[row].square().mean().sqrt()) / whole if whole > 0 and torch.isfinite(weight).all() else 0.0
