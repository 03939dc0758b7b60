"""How often unrelated representations count as alike, and how often related ones do: calibrated and usual scores.

    python benchmarks/concepts_similarity.py                             about two minutes of one CPU core
    python benchmarks/concepts_similarity.py --trials 400 --json out.json

Unrelated: two random two-layer networks, each given samples of its own, of equal and of unequal widths, with fewer and
with more samples than numbers in a vector. The error of the first kind is the share of pairs with a calibrated score
above 0, which is a p value of at most 0.05. Beside it the usual, uncorrected linear CKA of the same pairs, and how many
of them reach 0.5. Related: two random networks of the same width given noisy versions of the same samples; the share
that is found is the power.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils.concepts.similarity import MEASURES, similarity
from utils.runtime.seeding import derive_seed

CELLS = [(64, 16, 16), (64, 64, 64), (64, 256, 256), (64, 1024, 1024), (64, 16, 1024), (128, 16, 16), (128, 64, 64)]
"""Samples and the two widths."""
INPUTS = 32
NOISE = 1.0
"""Deviation of what is added to each side's samples, whose own is 1, in the related pairs."""


def network(samples: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return what a random two-layer network makes of samples."""
    made = samples
    for size in (width, width):
        weights = torch.randn(made.shape[1], size, generator=generator) / made.shape[1] ** 0.5
        made = (made @ weights).relu()
    return made


def pair(count: int, widths: tuple[int, int], related: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the representations of two random networks, of the same noisy samples or of samples of their own."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, INPUTS, generator=generator)
    sides = []
    for width in widths:
        own = torch.randn(count, INPUTS, generator=generator)
        sides.append(network(shared + NOISE * own if related else own, width, generator))
    return sides[0], sides[1]


def measured(count: int, widths: tuple[int, int], related: bool, trials: int) -> dict[str, Any]:
    """Return the share of pairs that count as alike by either measure, and their usual CKA."""
    alike = dict.fromkeys(MEASURES, 0)
    usual, calibrated = [], []
    for trial in range(trials):
        seed = derive_seed("concepts_similarity", count, *widths, int(related), trial)
        first, second = pair(count, widths, related, seed)
        for measure in MEASURES:
            found = similarity(first, second, measure, seed=trial)
            alike[measure] += found.significant
            if measure == "cka":
                usual.append(found.uncorrected)
                calibrated.append(found.calibrated)
    return {
        "samples": count, "widths": list(widths), "related": related, "trials": trials,
        "alike": {measure: number / trials for measure, number in alike.items()},
        "usual_cka": statistics.fmean(usual), "usual_above_half": sum(value >= 0.5 for value in usual) / trials,
        "calibrated_cka": statistics.fmean(calibrated),
    }  # fmt: skip


def said(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    first, second = row["widths"]
    error = 1.96 * math.sqrt(0.05 * 0.95 / row["trials"])
    shares = "  ".join(f"{row['alike'][measure]:7.1%}" for measure in MEASURES)
    chance = "" if row["related"] else f"   (5% +- {error:.1%} by chance)"
    return (
        f"{row['samples']:7d}  {first:5d} {second:5d}  {shares}  {row['calibrated_cka']:10.3f}  "
        f"{row['usual_cka']:9.3f}  {row['usual_above_half']:8.0%}{chance}"
    )


def main() -> int:
    """Measure and print both tables; fail where the error of the first kind is outside of 3 to 7 percent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="pairs for each cell")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.process_time(), []
    head = "samples  widths       cka  neighbours  calibrated  usual CKA  over 0.5"
    for related, title in ((False, "unrelated: share that counts as alike"), (True, "related: share that is found")):
        print(f"\n{title}\n{head}")
        for count, *widths in CELLS if not related else CELLS[:4]:
            # Larger tables cost more; the power needs no narrow interval.
            share = 0.2 if related else 1.0 if count <= 64 else 0.4
            trials = max(100, round(share * options.trials))
            row = measured(count, (widths[0], widths[1]), related, trials)
            rows.append(row)
            print(said(row), flush=True)
    wrong = [row for row in rows if not row["related"] and any(not 0.03 <= s <= 0.07 for s in row["alike"].values())]
    print(f"\n{len(wrong)} cells outside of 3 to 7 percent; {time.process_time() - started:.0f} s of CPU")
    print(f"targets: {f'missed: {len(wrong)} cells outside of 3 to 7 percent' if wrong else 'met'}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
