"""Dark experience replay: what the model once answered to old samples is kept with them and held on to.

Buzzega et al., Dark Experience for General Continual Learning (arXiv:2004.07211), equation 6: to the loss of a new
batch come alpha times the squared distance between the logits of remembered samples x' now and the logits z' stored
with them, and beta times the loss of other remembered samples x'' with their labels y''. The two are drawn
independently, as in the paper. With beta = 0 (`label_weight`) it is DER, their equation 5.
"""

import torch
from torch import Tensor

from utils.adapters.objectives import IGNORED
from utils.continual.learner import LOGITS, Learner
from utils.continual.method import Method
from utils.runtime.errors import ConfigError

MOST_BYTES = 10**9
"""Stored logits may take so much without a word; more is asked for with `ContinualConfig.buffer_mb`."""
MEGABYTE = 10**6
FLOAT = 4
"""Bytes of one stored logit, at most."""


class DarkReplay(Method):
    """Hold remembered samples to the logits that they had, and others to their labels."""

    name = "der++"
    answers_kept = True
    remembers = True
    policy = "reservoir"
    logit_weight = 0.5
    label_weight = 0.5

    def keeps_logits(self, learner: Learner) -> bool:
        """Say that the memory keeps them."""
        return True

    def check(self, learner: Learner) -> None:
        """Refuse logits that mean nothing later, or that are too large to store.

        Raises:
            ConfigError: The model sees other words hidden each time, or the memory would not hold enough samples.
        """
        if learner.data.task == "masked_lm":
            raise ConfigError(
                f"ContinualConfig.method is {self.name!r} and the model guesses hidden words.",
                "Expected a model whose answer depends on the sample alone: the next time other words are hidden.",
                "Set method to replay or consolidation.",
            )
        each = FLOAT * max(1, learner.outputs) * positions(learner)
        settings = learner.settings
        wanted = "Set method to replay or consolidation, which store no logits of every token"
        if settings.buffer_mb is None and each * settings.buffer > MOST_BYTES:
            raise ConfigError(
                f"The logits of one sample take {each / MEGABYTE:,.1f} MB, those of ContinualConfig.buffer="
                f"{settings.buffer} samples {each * settings.buffer / MEGABYTE:,.0f} MB.",
                f"Expected at most {MOST_BYTES // MEGABYTE:,} MB, or a limit that was chosen.",
                f"{wanted}, or say with buffer_mb how much they may take.",
            )
        if settings.buffer_mb is not None and each * len(learner.tasks) > settings.buffer_mb * MEGABYTE:
            raise ConfigError(
                f"The logits of one sample take {each / MEGABYTE:,.1f} MB, and ContinualConfig.buffer_mb is "
                f"{settings.buffer_mb:g}.",
                f"Expected room for a sample of each of the {len(learner.tasks)} tasks.",
                f"{wanted}, or raise buffer_mb.",
            )

    def extra_loss(self, learner: Learner, batch: dict[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return both weighted terms; None while nothing is remembered."""
        if not len(learner.memory):
            return None
        settings = learner.settings
        count = settings.replayed or len(labels)
        alpha = self.logit_weight if settings.logit_weight is None else settings.logit_weight
        beta = self.label_weight if settings.label_weight is None else settings.label_weight
        terms = []
        if alpha:
            old = learner.remembered(count, "stored logits")
            _, present, targets = learner.loss(old, "stored logits")
            terms.append(alpha * distance(present, old[LOGITS], targets))
        if beta:
            terms.append(beta * learner.loss(learner.remembered(count))[0])
        return sum(terms[1:], terms[0]) if terms else None


def distance(logits: Tensor, stored: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared distance between logits, over those that were stored.

    Args:
        logits: What the model answers now, ``(batch, ..., outputs)``, with its graph.
        stored: What it answered, of that shape or narrower when the head has grown since; the lowest number of its
            type where there was no answer: an output that might not answer, or that did not exist.
        labels: Where positions are ignored, their logits are too.

    Returns:
        A scalar; zero when nothing is comparable.
    """
    known = stored != torch.finfo(stored.dtype).min
    if labels.dim() == stored.dim() - 1 and not labels.is_floating_point():
        known = known & (labels != IGNORED)[..., None]
    gap = logits[..., : stored.shape[-1]].float() - stored.float()
    return torch.where(known, gap, 0.0).square().sum() / known.sum().clamp(min=1)


def positions(learner: Learner) -> int:
    """Return for how many positions of a sample the model answers: every token of a text, or one."""
    labels = learner.data.train["labels"]
    return int(labels[0].numel()) if labels.dim() > 1 else 1
