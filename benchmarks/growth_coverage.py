"""Every operator of growth on architectures written by others: certified, or refused with the reason.

    python benchmarks/growth_coverage.py                                    all architectures, all operators
    python benchmarks/growth_coverage.py --only gpt2 --only "t5 seq2seq"    some of them
    python benchmarks/growth_coverage.py --operators depth feed_forward --json out.json
    python benchmarks/growth_coverage.py --from-json out.json               the tables of an earlier run again

Each cell of the table is one growth step of one fresh model whose weights were all moved, with an optimizer that has
taken steps. The verdict comes from `benchmarks/growth_trial.py` and not from the certificate:

    exact     every answer of the grown model has the bits of the old one's, in float32 and in float64
    within    every answer is within 1e-5 of the answers' size in float64
    refused   growth said no, and the model, its config and the optimizer are as they were
    WRONG     anything else
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS_PER_CELL = 120.0
SHORT = {"exact": "=", "within": "~", "refused": "-", "WRONG": "WRONG"}
SHARES = {"depth": ("exact",), "feed_forward": ("exact", "within")}
"""Of the causal language models: the operators that issue 5 counts, and the verdicts that count."""


def work(connection: Connection) -> None:
    """Answer with one cell after the other until the pipe closes."""
    import torch
    from transformers.utils import logging

    from benchmarks.growth_models import architectures, is_tied
    from benchmarks.growth_trial import attempt, prepared

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = {architecture.label: architecture for architecture in architectures()}
    try:
        while True:
            label, operation = connection.recv()
            try:
                if operation is None:
                    model, _ = prepared(known[label])
                    size = sum(parameter.numel() for parameter in model.parameters())
                    answer = {"built": True, "parameters": size, "tied": is_tied(model)}
                else:
                    answer = attempt(known[label], operation)
            except Exception as error:
                where = traceback.format_exc(limit=-4)
                answer = {"problems": [f"crash: {type(error).__name__}: {str(error)[:300]}"], "traceback": where}
            connection.send(answer)
    except EOFError:
        return


class Worker:
    """One process at a time; it is replaced when a model hangs or kills it."""

    def __init__(self, seconds: float) -> None:
        """Start nothing yet."""
        self.seconds = seconds
        self.process: Any = None

    def run(self, label: str, operation: str | None) -> dict[str, Any]:
        """Build a model, or make one cell, within a time limit."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs,))
            self.process.start()
            theirs.close()
        problem = f"no answer within {self.seconds:.0f} s"
        try:
            self.connection.send((label, operation))
            if self.connection.poll(self.seconds):
                return self.connection.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError, BrokenPipeError):
            self.process.join()
            problem = f"the process died with exit code {self.process.exitcode}"
        self.close()
        return {"problems": [f"crash: {problem}"]}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def examine(worker: Worker, label: str, family: str, operations: list[str]) -> dict[str, Any]:
    """Return all cells of one architecture."""
    row: dict[str, Any] = {"label": label, "family": family, "built": False, "cells": {}}
    row |= worker.run(label, None)
    if not row["built"]:
        return row
    for operation in operations:
        cell = worker.run(label, operation)
        if not cell.get("verdict"):
            cell["verdict"] = "WRONG"
        row["cells"][operation] = cell
        print(f"\r{label:40.40} {operation:14} {cell['verdict']:8}", end="", file=sys.stderr, flush=True)
    return row


def table(rows: list[dict[str, Any]], operations: list[str]) -> str:
    """Return one line per architecture: = exact, ~ within 1e-5, - refused."""
    lines = [f"{'architecture':38} {'family':21} tied " + " ".join(f"{name:>12}" for name in operations)]
    for row in rows:
        if row["built"]:
            marks = [SHORT[row["cells"][name]["verdict"]] for name in operations if name in row["cells"]]
            promised = [row["cells"][name].get("promise") == "gated" for name in operations if name in row["cells"]]
            cells = [mark + (" gated" if gated else "") for mark, gated in zip(marks, promised, strict=True)]
            tied = "yes" if row["tied"] else "no"
            lines.append(
                f"{row['label']:38.38} {row['family']:21} {tied:4} " + " ".join(f"{cell:>12}" for cell in cells)
            )
    return "\n".join(lines)


def refusals(rows: list[dict[str, Any]]) -> str:
    """Return the refusals by operator and by the first sentence of the reason, sizes and names left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for operation, cell in row["cells"].items():
            if cell["verdict"] == "refused":
                first = re.sub(r"\([^()]*\)", "", cell["reason"].split(". ")[0])[:220]
                kind = re.sub(r"(#[, ]*(and )?)+", "# ", re.sub(r"[\w.]*\.[\w.]+|\d[\d.e+-]*", "#", first))
                groups.setdefault((operation, kind), []).append(row["label"])
    lines = []
    for (operation, kind), labels in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        names = ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
        lines.append(f"{operation:12} {len(labels):3} x {kind}\n                   {names}")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], operations: list[str]) -> str:
    """Return the totals, the shares that issue 5 asks for, the seconds and everything that is wrong."""
    built = [row for row in rows if row["built"]]
    cells = [(row, name, cell) for row in built for name, cell in row["cells"].items()]
    lines = [f"not built: {row['label']}: {row['problems'][0]}" for row in rows if not row["built"]]
    for row, name, cell in cells:
        if cell["verdict"] == "WRONG":
            lines.append(f"WRONG: {row['label']}, {name}: {'; '.join(cell['problems'][:4])}")
    tied = sum(row["tied"] for row in built)
    lines.append(f"architectures {len(built)}, {tied} tied; cells {len(cells)}")
    for name in operations:
        counted = Counter(cell["verdict"] for _, operation, cell in cells if operation == name)
        seconds = [cell["seconds"] for _, op, cell in cells if op == name and cell["verdict"] in ("exact", "within")]
        median = f", median {statistics.median(seconds):.2f} s" if seconds else ""
        lines.append(f"{name:12} " + ", ".join(f"{kind} {counted[kind]}" for kind in SHORT) + median)
    causal = [row for row in built if row["family"] == "causal_lm"]
    for name, enough in SHARES.items():
        of = [row["cells"][name] for row in causal if name in row["cells"]]
        if of:
            good = [cell for cell in of if cell["verdict"] in enough]
            gated = sum(cell.get("promise") == "gated" for cell in good)
            besides = f", {gated} of them by a gate" if gated else ""
            lines.append(f"of {len(of)} causal ones {name} is {' or '.join(enough)} in {len(good)} "
                         f"({100 * len(good) / len(of):.0f}%){besides}")  # fmt: skip
    events = [cell["event_seconds"] for _, _, cell in cells if "event_seconds" in cell]
    whole = [cell["seconds"] for _, _, cell in cells if "event_seconds" in cell]
    if events:
        lines.append(
            f"seconds per event: median {statistics.median(whole):.2f} with planning, {statistics.median(events):.2f} "
            f"for the change and its certificate; most {max(whole):.1f}"
        )
    wrong = sum(cell["verdict"] == "WRONG" for _, _, cell in cells)
    lines.append(f"silently wrong: {wrong}")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; the exit code is 1 when a cell is WRONG."""
    from benchmarks.growth_models import architectures
    from benchmarks.growth_trial import OPERATIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="labels, families or the first word of labels; repeatable")
    parser.add_argument("--operators", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--timeout", type=float, default=SECONDS_PER_CELL, help="seconds for one cell")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--from-json", type=Path, action="append", help="print these results; later files win")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.from_json:
        known: dict[str, dict[str, Any]] = {}
        for path in arguments.from_json:
            for row in json.loads(path.read_text(encoding="utf-8")):
                cells = known.get(row["label"], {}).get("cells", {})
                known[row["label"]] = {**row, "cells": {**cells, **row["cells"]}}
        rows = list(known.values())
    else:
        worker, started = Worker(arguments.timeout), time.perf_counter()
        for architecture in architectures():
            label, family = architecture.label, architecture.family
            asked = arguments.only or [label]
            if label in asked or family in asked or label.split()[0].rstrip(",") in asked:
                rows.append(examine(worker, label, family, arguments.operators))
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        worker.close()
        print(f"\r{time.perf_counter() - started:.0f} s{'':60}", file=sys.stderr)
    print(table(rows, arguments.operators), refusals(rows), summary(rows, arguments.operators), sep="\n\n")
    return 1 if any(cell["verdict"] == "WRONG" for row in rows for cell in row["cells"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
