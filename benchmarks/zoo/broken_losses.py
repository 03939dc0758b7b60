"""Models that train on another loss than the one their user has in mind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken
from benchmarks.zoo.families import (
    Bert,
    Gpt,
    GptWithLabels,
    GptWithLoss,
    LstmLm,
    Mlp,
    ResNet,
    Vit,
)  # fmt: skip


class SoftmaxGpt(Gpt):
    def forward(self, idx: Tensor) -> Any:
        return self.head(self.features(idx)).softmax(-1)


class SoftmaxResNet(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(self.fc, nn.Softmax(dim=1))


class SoftmaxInLoss(GptWithLoss):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.softmax(-1).flatten(0, 1), targets.flatten(), ignore_index=-1)


class SoftmaxMlp(Mlp):
    def forward(self, x: Tensor) -> Any:
        return torch.softmax(super().forward(x), -1)


class SigmoidVit(Vit):
    """Softmax inside a dictionary under the name of logits."""

    def forward(self, pixel_values: Tensor) -> Any:
        return {"logits": super().forward(pixel_values).softmax(-1)}


class SoftmaxLstm(LstmLm):
    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return logits.exp() / logits.exp().sum(-1, keepdim=True), None


DOUBLE = [
    broken("double_softmax", "gpt returns probabilities", SoftmaxGpt, "", task="causal_lm"),
    broken("double_softmax", "resnet ends in softmax", SoftmaxResNet, ("", "fc*"), task="image_classification"),
    broken("double_softmax", "softmax inside the loss", SoftmaxInLoss, "", ("wrong_builtin_loss",), task="causal_lm"),
    broken("double_softmax", "mlp", SoftmaxMlp, "", task="tabular_classification"),
    broken("double_softmax", "probabilities called logits", SigmoidVit, "", task="image_classification"),
    broken("double_softmax", "lstm, softmax by hand", SoftmaxLstm, "", task="causal_lm"),
]  # fmt: skip


class SummedLoss(GptWithLabels):
    """Divides the sum over tokens by the batch only."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / logits.shape[0]


class FirstRowLoss(GptWithLoss):
    """Scores the first sample of the batch alone."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[0], targets[0], ignore_index=-1)


class TransposedLoss(Bert):
    """Reshapes logits where they should be transposed, so that classes and positions mix."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids, attention_mask)
        if labels is None:
            return logits
        mixed = logits.reshape(logits.shape[0], logits.shape[2], logits.shape[1])
        return F.cross_entropy(mixed, labels), logits


class OtherLogits(Vit):
    """Loss from the class token before the norm, logits from after it."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)[:, 0])
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(self.head(x[:, 1]), labels), "logits": logits}


class NegatedLoss(Mlp):
    """Gives the sum of logs with the wrong sign."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        if labels is None:
            return logits, None
        return logits, F.log_softmax(logits, -1).gather(1, labels[:, None]).mean()


class PaddingInLoss(GptWithLabels):
    """Turns the ignored label into the word 0 and scores it."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten())


LOSSES = [
    broken("wrong_builtin_loss", "sum over tokens", SummedLoss, "", task="causal_lm"),
    broken("wrong_builtin_loss", "first sample only", FirstRowLoss, "", task="causal_lm"),
    broken("wrong_builtin_loss", "reshaped for a transpose", TransposedLoss, "", task="masked_lm"),
    broken("wrong_builtin_loss", "loss of other logits", OtherLogits, "", task="image_classification"),
    broken("wrong_builtin_loss", "wrong sign", NegatedLoss, "", task="tabular_classification"),
    broken("wrong_builtin_loss", "ignored labels scored", PaddingInLoss, "", task="causal_lm"),
]  # fmt: skip


class UnshiftedGpt(GptWithLabels):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class TwiceShifted(GptWithLabels):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten(), ignore_index=-100)


class BackwardsShifted(GptWithLabels):
    """Predicts the token before."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), ignore_index=-100)


class UnshiftedLstm(LstmLm):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)
        loss = None if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)
        return {"loss": loss, "logits": logits}


class SelfShifted(Gpt):
    """Makes its labels from its inputs without a shift whenever it is asked for a loss."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.features(input_ids))
        if labels is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1)), logits


class RolledLabels(GptWithLabels):
    """Rolls labels two steps to the left."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.roll(-2, 1).flatten(), ignore_index=-100)


SHIFT = [
    broken("label_shift", "gpt without a shift", UnshiftedGpt, "", task="causal_lm"),
    broken("label_shift", "shifted twice", TwiceShifted, "", task="causal_lm"),
    broken("label_shift", "shifted the wrong way", BackwardsShifted, "", task="causal_lm"),
    broken("label_shift", "lstm without a shift", UnshiftedLstm, "", task="causal_lm"),
    broken("label_shift", "tuple without a shift", SelfShifted, "", task="causal_lm"),
    broken("label_shift", "rolled by two", RolledLabels, "", ("wrong_builtin_loss",), task="causal_lm"),
]  # fmt: skip

ENTRIES = DOUBLE + LOSSES + SHIFT
