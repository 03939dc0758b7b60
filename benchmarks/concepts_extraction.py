"""Concepts in real models: true ones are accepted and random ones are not; erasure, its effect, and sparse features.

    python benchmarks/concepts_extraction.py                    about two minutes of one CPU core
    python benchmarks/concepts_extraction.py --junk 20 --json out.json

A convolutional network and a vision transformer learn scikit-learn's digits for some seconds. Concepts are sets of
digits: those with a closed loop, and some that no drawing has in common. Examples are held-out images.

1. Directions: held-out AUROC with its interval, the best control, stability, and the verdict with erasure's effect.
2. Random labels, as many of either side as the true concept has: how many are accepted.
3. Erasure (LEACE): how much a logistic regression, fitted and tested on the same vectors, and nearest neighbours on
   other vectors still tell of the concept.
4. Sparse autoencoders: how well a planted dictionary is found, and what the two models keep with features only.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.activations import representations
from utils.concepts.autoencoder import AutoencoderConfig, fit_autoencoder
from utils.concepts.direction import find_direction
from utils.concepts.effect import erasure_effect
from utils.concepts.erasure import fit_eraser
from utils.concepts.features import fit_layer_autoencoder
from utils.concepts.recovery import recovery
from utils.training.corpora import load_digits

CONCEPTS = {"closed loop": (0, 6, 8, 9), "prime": (2, 3, 5, 7), "even": (0, 2, 4, 6, 8), "the digit 4": (4,)}
TRAINED, EXAMPLES = 1000, 400
LAYERS = {"CNN": ("3", None), "ViT": ("blocks.0", None)}
"""An early layer, and what the layer that makes the logits reads."""


def learned(name: str, images: Tensor, digits: Tensor, epochs: int, seed: int = 0) -> ModelAdapter:
    """Return a model that has learned the first images."""
    torch.manual_seed(seed)
    if name == "CNN":
        model: nn.Module = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    else:
        config = {"image_size": 8, "patch_size": 2, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.0}
        model = utils.load_model("example:vit", config=config).module
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for part in torch.randperm(TRAINED).split(50):
            loss = nn.functional.cross_entropy(model(images[part]), digits[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    if name == "ViT":
        return ModelAdapter(model)
    spec = ModelSpec(task="image_classification", example_inputs={"input": images[:2]})
    return ModelAdapter(model, spec=spec)


def judged(model: ModelAdapter, images: Tensor, has: Tensor, layer: str | None, seed: int = 0) -> dict[str, Any]:
    """Return what is measured of a concept in a layer."""
    effect = erasure_effect(model, images[has], images[~has], layer, seed=seed)
    found = find_direction(model, images[has], images[~has], layer, seed=seed).with_effect(effect.p_value)
    return {
        "layer": found.layer, "auroc": found.auroc, "interval": list(found.interval), "control": max(found.controls),
        "random": max(found.random), "stability": found.stability, "before": effect.before, "after": effect.after,
        "worst_random": min(effect.random), "p": effect.p_value, "accepted": found.accepted,
        "accepted_without_effect": found.found,
    }  # fmt: skip


def erased(model: ModelAdapter, images: Tensor, has: Tensor, layer: str | None) -> dict[str, Any]:
    """Return what is left of a concept in vectors after erasure."""
    values = representations(model, [images], layer).values.double()
    eraser = fit_eraser(values, has)
    row: dict[str, Any] = {"width": values.shape[1], "change": eraser.change(values) / _spread(values)}
    for name, rows in (("before", values), ("after", eraser.apply(values))):
        scaled = (rows - rows.mean(0)) / values.std(0).clamp_min(1e-9)
        said = LogisticRegression(C=1e4, max_iter=5000).fit(scaled, has).predict_proba(scaled)[:, 1]
        share = float(has.double().mean())
        # Scores that are equal up to rounding are equal.
        row[f"linear_auroc_{name}"] = float(roc_auc_score(has, said.round(4)))
        row[f"linear_nats_{name}"] = float(log_loss(has, [share] * len(has)) - log_loss(has, said))
        half = len(rows) // 2
        near = KNeighborsClassifier(15).fit(scaled[:half], has[:half]).predict_proba(scaled[half:])[:, 1]
        row[f"neighbours_auroc_{name}"] = float(roc_auc_score(has[half:], near))
    return row


def _spread(values: Tensor) -> float:
    return float((values - values.mean(0)).square().sum(1).mean().sqrt())


def planted(seed: int, surplus: int) -> dict[str, Any]:
    """Return how well a dictionary of 64 directions in 32 dimensions is found, three of them active at a time."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    chosen = torch.rand(8000, 64, generator=generator).topk(3, 1).indices
    codes = torch.zeros(8000, 64).scatter(1, chosen, torch.rand(8000, 3, generator=generator) + 0.5)
    values = codes @ dictionary + 0.01 * torch.randn(8000, 32, generator=generator)
    fit = fit_autoencoder(values, AutoencoderConfig(features=64 * surplus, active=3, steps=1500, seed=seed))
    cosines = (dictionary @ fit.autoencoder.decoder.T).max(1).values
    return {
        "features": 64 * surplus, "mean_max_cosine": float(cosines.mean()),
        "found": float((cosines > 0.9).float().mean()), "explained": fit.explained_variance,
        "components": fit.principal, "dead": fit.dead,
    }  # fmt: skip


def main() -> int:
    """Measure and print everything; fail where the true concept is refused or random ones are accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--junk", type=int, default=40, help="random concepts for each model")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    pixels, numbers = load_digits()
    images, digits = torch.from_numpy(pixels)[:, None], torch.from_numpy(numbers)
    models = {name: learned(name, images, digits, epochs) for name, epochs in (("CNN", 12), ("ViT", 15))}
    shown, own = images[TRAINED : TRAINED + EXAMPLES], digits[TRAINED : TRAINED + EXAMPLES]
    made: dict[str, Any] = {"concepts": [], "junk": [], "erasure": [], "planted": [], "recovery": []}

    print("model  layer     concept       AUROC (95%)             control  random  cosine  erased: answers' AUROC  p")
    for name, model in models.items():
        for layer in LAYERS[name]:
            for concept, members in CONCEPTS.items():
                row = judged(model, shown, torch.isin(own, torch.tensor(members)), layer)
                made["concepts"].append({"model": name, "concept": concept, **row})
                low, high = row["interval"]
                print(
                    f"{name:5}  {row['layer']:8}  {concept:12}  {row['auroc']:.3f} ({low:.3f} to {high:.3f})  "
                    f"{row['control']:.3f}    {row['random']:.3f}   {row['stability']:5.2f}   {row['before']:.3f} to "
                    f"{row['after']:.3f}, worst random {row['worst_random']:.3f}  {row['p']:.3f}  "
                    f"{'accepted' if row['accepted'] else 'refused'}", flush=True,
                )  # fmt: skip

    share = float(torch.isin(own, torch.tensor(CONCEPTS["closed loop"])).float().mean())
    for name, model in models.items():
        rows = []
        for seed in range(options.junk):
            has = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(seed)) < share
            rows.append(judged(model, shown, has, None, seed))
        accepted = [sum(row[kind] for row in rows) for kind in ("accepted_without_effect", "accepted")]
        effects = sum(row["p"] < 0.01 for row in rows)
        made["junk"].append({"model": name, "accepted": accepted[1], "by_direction": accepted[0], "effects": effects,
                             "of": len(rows)})  # fmt: skip
        print(f"{name}: random labels accepted {accepted[1]} of {len(rows)} (by direction alone {accepted[0]}; erasure "
              f"had an effect at p < 0.01 in {effects})", flush=True)  # fmt: skip

    print("\nmodel  layer     width  logistic AUROC, nats told        15 nearest neighbours  moved")
    for name, model in models.items():
        for layer in LAYERS[name]:
            row = erased(model, shown, torch.isin(own, torch.tensor(CONCEPTS["closed loop"])), layer)
            made["erasure"].append({"model": name, "layer": layer, **row})
            print(
                f"{name:5}  {layer or 'head':8}  {row['width']:5d}  {row['linear_auroc_before']:.3f} to "
                f"{row['linear_auroc_after']:.3f}, {row['linear_nats_before']:.3f} to {row['linear_nats_after']:.4f}  "
                f"{row['neighbours_auroc_before']:.3f} to {row['neighbours_auroc_after']:.3f}        "
                f"{row['change']:.2f}", flush=True,
            )  # fmt: skip

    print()
    for surplus in (1, 2):
        rows = [planted(seed, surplus) for seed in range(3)]
        made["planted"] += rows
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        print(f"planted 64 directions, {rows[0]['features']} features, 3 seeds: mean largest cosine "
              f"{mean['mean_max_cosine']:.3f}, found {mean['found']:.1%}, variance {mean['explained']:.1%} (3 "
              f"principal components {mean['components']:.1%}), dead {mean['dead']:.0f}", flush=True)  # fmt: skip
    for name, model in models.items():
        for layer in LAYERS[name]:
            fit = fit_layer_autoencoder(model, images[:TRAINED], layer, AutoencoderConfig(features=128, steps=1500))
            kept = recovery(model, fit, images[TRAINED:], digits[TRAINED:])
            made["recovery"].append({"model": name, **fit.to_dict(), **kept.to_dict()})
            print(f"{name} {fit.layer}: {fit}\n    {kept} Loss recovered {kept.loss_recovered:.1%}.", flush=True)

    print(f"{time.process_time() - started:.0f} s of CPU")
    if options.json:
        options.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    heads = [row for row in made["concepts"] if row["concept"] == "closed loop" and row["layer"] in ("9", "head")]
    return 0 if all(row["accepted"] for row in heads) and not any(row["accepted"] for row in made["junk"]) else 1


if __name__ == "__main__":
    sys.exit(main())
