"""A sparse autoencoder: features of a layer that nobody named, of which only a few are active for any vector.

TopK autoencoder of Gao et al. (arXiv:2406.04093): the largest `active` features of a vector remain, the others are 0;
decoder directions have length 1; what features that no longer fire would add to the reconstruction is trained by a loss
of its own (there section A.2).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.concepts.checks import as_tensor, fitted_table, read_table
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import Range, check_names, check_ranges, settings_of
from utils.training.config import LARGEST, MOST

LEAST = 50
"""Fewest vectors to fit on."""
AUXILIARY = 1 / 32
"""Weight of the loss of features that no longer fire, as in the paper."""
READ_AT_A_TIME = 4096
RANGES: dict[str, Range] = {
    "features": (1, LARGEST, True, False),
    "active": (1, LARGEST, True, False),
    "steps": (1, LARGEST, True, False),
    "batch_size": (1, LARGEST, True, False),
    "dead_after": (1, LARGEST, True, False),
    "revived": (1, LARGEST, True, False),
    "seed": (0, LARGEST, True, False),
    "learning_rate": (0, MOST, False, True),
    "held_out": (0, 0.9, False, True),
}
"""Of each number, see `utils.runtime.settings.check_ranges`."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """How a sparse autoencoder is made and trained; checked when it is made."""

    features: int | None = None
    """How many features; None takes four for each number of a vector."""
    active: int = 8
    """How many of them are active for a vector."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 256
    """Vectors in a step."""
    learning_rate: float = 3e-3
    """Adam's, constant for four fifths of the steps and then falling to 0."""
    dead_after: int = 100
    """Steps without firing after which a feature counts as dead and is trained by the auxiliary loss."""
    revived: int | None = None
    """Dead features that the auxiliary loss takes at a time; None takes half as many as a vector has numbers."""
    held_out: float = 0.1
    """Share of the samples that is measured on and not trained on."""
    seed: int = 0
    """Of what is held out, the first directions and the order of vectors."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is out of range.
        """
        check_ranges(self, RANGES)
        if self.features is not None and self.active > self.features:
            raise ConfigError(
                f"AutoencoderConfig.active is {self.active} and features is {self.features}.",
                "Expected no more active features than there are.",
                "Lower active, or raise features.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "AutoencoderConfig":
        """Make a config from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        check_names(cls, settings)
        return cls(**settings)


class SparseAutoencoder(nn.Module):
    """Vectors to a few active features, and back; vectors are centred and scaled inside.

    Attributes:
        encoder: ``(features, width)``: what each feature reads.
        decoder: ``(features, width)``: what each adds, of length 1.
        bias: ``(width,)``: what is there without features, beside the mean.
        mean: ``(width,)``: mean of the vectors that it was fitted on.
        scale: Root of their mean squared distance to it, over the root of the width.
        active: How many features are active for a vector.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, features: int, active: int) -> None:
        """Make one whose directions are all zero; see `fit_autoencoder`."""
        super().__init__()
        self.active = active
        self.encoder = nn.Parameter(torch.zeros(features, width))
        self.decoder = nn.Parameter(torch.zeros(features, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.encoder.shape[1]

    @property
    def features(self) -> int:
        """How many features there are."""
        return self.encoder.shape[0]

    def encode(self, values: Tensor) -> Tensor:
        """Return how active each feature is: ``(n, features)``, not negative, all but `active` of a row 0.

        Raises:
            ConfigError: The vectors are no floating-point tensor, or have another width.
        """
        rows = read_table(values, self.width, "the autoencoder")
        return sparse(self.before(self.normalised(rows)), self.active)

    def decode(self, codes: Tensor) -> Tensor:
        """Return vectors ``(n, width)`` from active features ``(n, features)``.

        Raises:
            ConfigError: The features are no floating-point tensor, or not as many.
        """
        codes = read_table(codes, self.features, "the decoder").to(self.mean.dtype)
        return (codes @ self.decoder + self.bias) * self.scale + self.mean

    def forward(self, values: Tensor) -> Tensor:
        """Return the reconstruction of vectors ``(n, width)``, in their dtype."""
        rows = read_table(values, self.width, "the autoencoder")
        return self.decode(self.encode(rows)).to(rows.dtype)

    def normalised(self, values: Tensor) -> Tensor:
        """Return vectors centred, and scaled so that their numbers are about 1."""
        return (values.to(self.mean.dtype) - self.mean) / self.scale

    def before(self, rows: Tensor) -> Tensor:
        """Return what features read of normalised vectors, before only the largest are kept: ``(n, features)``."""
        return (rows - self.bias) @ self.encoder.T


@dataclass(frozen=True, eq=False, repr=False)
class AutoencoderFit:
    """A sparse autoencoder with what it does on held-out vectors."""

    autoencoder: SparseAutoencoder
    """The autoencoder, in eval mode and on the CPU."""
    config: AutoencoderConfig
    """How it was made."""
    explained_variance: float
    """Share of the variance of held-out vectors that the reconstruction has: 1 less the normalised squared error."""
    principal: float
    """The same with as many principal components as features are active, found on the same vectors: what is had
    without choosing components for each vector."""
    l0: float
    """Active features of a held-out vector, on average."""
    dead: int
    """Features that fire on no vector at all, held out or not."""
    vectors: tuple[int, int]
    """Vectors that were trained on, and held out."""
    losses: tuple[tuple[int, float, float], ...]
    """Every hundredth step: its number, normalised squared error of its batch, and share of dead features."""
    layer: str = ""
    """The layer that made the vectors; empty where they were given as such."""
    side: str = "output"
    """The layer's ``"output"`` or ``"input"``."""
    pool: str = "positions"
    """``"positions"`` where each position is a vector, or ``"flat"``."""

    @property
    def error(self) -> float:
        """Normalised squared error on held-out vectors."""
        return 1 - self.explained_variance

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors as plain values that JSON can hold."""
        names = [name for name in self.__dataclass_fields__ if name not in ("autoencoder", "config")]
        made: dict[str, Any] = {name: getattr(self, name) for name in names}
        made["vectors"], made["losses"] = list(self.vectors), [list(row) for row in self.losses]
        sizes = {"width": self.autoencoder.width, "features": self.autoencoder.features}
        return {"config": self.config.to_dict(), **sizes, **made}

    def __str__(self) -> str:
        made = self.autoencoder
        return (
            f"{made.features} features for width {made.width}, {self.l0:.1f} active: {self.explained_variance:.1%} of "
            f"the variance of {self.vectors[1]} held-out vectors ({self.config.active} principal components: "
            f"{self.principal:.1%}), {self.dead} dead."
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the picture and the same in words."""
        from utils.concepts.concept_view import autoencoder_figure, shown_html

        return shown_html(partial(autoencoder_figure, self), str(self))


def sparse(scores: Tensor, active: int) -> Tensor:
    """Return scores ``(n, features)`` of which the largest `active` of each row are kept, where above 0."""
    kept = scores.topk(active, dim=1)
    return torch.zeros_like(scores).scatter(1, kept.indices, kept.values.relu())


def fit_autoencoder(
    values: Tensor, config: AutoencoderConfig | Mapping[str, Any] | None = None, groups: Tensor | None = None
) -> AutoencoderFit:
    """Fit a sparse autoencoder to vectors, the same for the same seed.

    Args:
        values: ``(n, width)``, finite.
        config: Settings, or their names and values; None takes the defaults.
        groups: int64 ``(n,)``: which sample a vector is of. All of a sample are trained on, or all held out. None takes
            each different vector as one: equal ones are never on both sides, where they would be told from memory.

    Raises:
        DataError: Too few different vectors, not finite or all equal, or groups that do not match.
        ConfigError: More features are active than there are.
    """
    config = settings_of(AutoencoderConfig, config)
    rows, same = _checked(values)
    features = config.features or 4 * rows.shape[1]
    if config.active > features:
        raise ConfigError(
            f"{config.active} of {features} features are to be active.",
            "Expected no more active features than there are.",
            "Lower active, or raise features.",
        )
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "autoencoder"))
    held = _held_out(len(rows), same if groups is None else groups, config.held_out, generator)
    train, test = rows[~held], rows[held]
    made = SparseAutoencoder(rows.shape[1], features, config.active)
    made.mean.copy_(train.mean(0))
    size = (train - made.mean).square().mean().sqrt()
    if not float(size):
        raise DataError(
            "All vectors that are not held out are equal.", "Expected vectors that differ.", "Give more examples."
        )
    made.scale.copy_(size)
    # The encoder begins as the decoder's transpose: each feature reads the direction that it adds.
    drawn = nn.functional.normalize(torch.randn(features, rows.shape[1], generator=generator), dim=1)
    with torch.no_grad():
        made.decoder.copy_(drawn)
        made.encoder.copy_(drawn)
    losses = _train(made, made.normalised(train), config, generator)
    made.eval().requires_grad_(False)
    codes = [made.encode(part) for part in test.split(READ_AT_A_TIME)]
    left = test - torch.cat([made.decode(part) for part in codes])
    variance = float((test - made.mean).square().sum())
    fired = torch.zeros(features, dtype=torch.bool)
    for part in rows.split(READ_AT_A_TIME):
        fired |= (made.encode(part) > 0).any(0)
    active = sum(int((part > 0).sum()) for part in codes) / len(test)
    return AutoencoderFit(
        made, config, 1 - float(left.square().sum()) / max(variance, 1e-30), _principal(train, test, config.active),
        active, int((~fired).sum()), (len(train), len(test)), tuple(losses),
    )  # fmt: skip


def _checked(values: Any) -> tuple[Tensor, Tensor]:
    """Return vectors in float32, and for each the number of the first that equals it."""
    rows = fitted_table(values, "vectors").float()
    first: dict[int, int] = {}
    # Adding 0 makes equal what differs in the sign of a zero alone.
    same = torch.tensor([first.setdefault(hash(row.tobytes()), n) for n, row in enumerate((rows + 0.0).numpy())])
    if len(rows) > 1 and len(first) == 1:
        raise DataError("All vectors are equal.", "Expected vectors that differ.", "Choose another layer.")
    if len(first) < LEAST:
        among = f" different among {len(rows)}" if len(first) < len(rows) else ""
        raise DataError(
            f"There {'is 1 vector' if len(rows) == 1 else f'are {len(first)} vectors'}{among}.",
            f"Expected {LEAST} different ones at least, and thousands for features that mean something.",
            "Give more examples, or every position of them.",
        )
    return rows, same


def _held_out(count: int, groups: Any, share: float, generator: torch.Generator) -> Tensor:
    """Return which vectors are held out, bool ``(n,)``: all of some samples."""
    groups = as_tensor(groups)
    if not isinstance(groups, Tensor) or groups.shape != (count,):
        kind = f"of the shape {tuple(groups.shape)}" if isinstance(groups, Tensor) else f"a {type(groups).__name__}"
        raise DataError(
            f"There are {count} vectors, and the groups are {kind}.",
            f"Expected a tensor ({count},): which sample each vector is of.",
            "Give one for each vector.",
        )
    kinds = torch.unique(groups)
    if len(kinds) < 2:
        raise DataError(
            "All vectors are of one sample, given once or repeated.",
            "Expected two different samples at least, one of which is held out.",
            "Give more samples.",
        )
    number = min(max(1, round(share * len(kinds))), len(kinds) - 1)
    return torch.isin(groups, kinds[torch.randperm(len(kinds), generator=generator)[:number]])


def _train(
    made: SparseAutoencoder, rows: Tensor, config: AutoencoderConfig, generator: torch.Generator
) -> list[tuple[int, float, float]]:
    """Train on normalised vectors; return every hundredth step's error and share of dead features."""
    optimizer = torch.optim.Adam([made.encoder, made.decoder, made.bias], config.learning_rate, eps=1e-8)
    idle = torch.zeros(made.features, dtype=torch.long)
    variance = float((rows - rows.mean(0)).square().mean())
    revived = config.revived or max(1, made.width // 2)
    size, order, losses = min(config.batch_size, len(rows)), torch.empty(0, dtype=torch.long), []
    for step in range(config.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[:size]], order[size:]
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, 5 * (1 - step / config.steps))
        with torch.enable_grad():
            scores = made.before(batch)
            kept = scores.topk(made.active, dim=1)
            # Only the directions that are used are read: far fewer operations than the product with all of them.
            added = torch.einsum("nk,nkw->nw", kept.values.relu(), made.decoder[kept.indices])
            left = batch - added - made.bias
            loss = error = left.square().mean() / variance
            dead = idle > config.dead_after
            if count := int(dead.sum()):
                # Of the features that no longer fire the largest explain what the others leave.
                waiting = sparse(scores[:, dead], min(revived, count))
                rest = left.detach()
                missed = (rest - waiting @ made.decoder[dead]).square().mean()
                loss = loss + AUXILIARY * missed / rest.square().mean().clamp_min(1e-12)
            optimizer.zero_grad()
            loss.backward()
        with torch.no_grad():
            # What would only lengthen a direction is no progress: directions have length 1.
            slope = made.decoder.grad
            assert slope is not None
            slope -= (slope * made.decoder).sum(1, keepdim=True) * made.decoder
            optimizer.step()
            made.decoder.copy_(nn.functional.normalize(made.decoder, dim=1))
        fired = torch.zeros_like(dead)
        fired[kept.indices[kept.values > 0]] = True
        idle = torch.where(fired, 0, idle + 1)
        if step % 100 == 0 or step == config.steps - 1:
            losses.append((step, float(error.detach()), float(dead.float().mean())))
    return losses


def _principal(train: Tensor, test: Tensor, count: int) -> float:
    """Return the share of held-out variance in so many principal components."""
    centred = (train - train.mean(0)).double()
    wide = centred.shape[1] > len(centred)
    _, axes = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    axes = axes[:, -min(count, axes.shape[1]) :]
    if wide:
        # The smaller of the two products has the same components, seen from the vectors' side.
        axes = torch.linalg.qr(centred.T @ axes).Q
    rest = (test - train.mean(0)).double()
    return float((rest @ axes).square().sum() / rest.square().sum().clamp_min(1e-300))
