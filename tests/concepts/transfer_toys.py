"""A teacher that knows whether two numbers have one sign, students that do not, and samples of eight numbers."""

import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.transfer_config import TransferConfig

WIDTH = 8
QUICK = TransferConfig(steps=80, learning_rate=3e-2, batch_size=128, retention=4.0)


class Teacher(nn.Module):
    """Its hidden layer tells |a + b| and |a - b| apart, so that it can be read whether a and b have one sign."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.bias.zero_()
            self.first.weight[:4, :2] = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
            self.first.weight[4:, 2:6] = torch.eye(4)

    def forward(self, numbers):
        return self.head(self.first(numbers).relu())


class Student(nn.Module):
    """Tells whether the third number is above zero; two layers, wider, of another kind."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh())
            self.out = nn.Linear(16, 2)
        with torch.no_grad():
            self.body[0].weight[0] = 0
            self.body[0].weight[0, 2] = 1
            self.body[2].weight[0] = 0
            self.body[2].weight[0, 0] = 2
            self.body[2].bias[0] = self.body[0].bias[0] = 0
            self.out.weight.zero_()
            self.out.bias.zero_()
            self.out.weight[:, 0] = torch.tensor([-4.0, 4.0])

    def forward(self, features):
        return self.out(self.body(features))


def samples(count, seed=0):
    """Return samples with the concept and without it."""
    drawn = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    has = drawn[:, 0] * drawn[:, 1] > 0
    return drawn[has], drawn[~has]


def teacher():
    return ModelAdapter(Teacher(), spec=ModelSpec(task="tabular_classification", num_labels=2))


def student(seed=0):
    return ModelAdapter(Student(seed), spec=ModelSpec(task="tabular_classification", num_labels=2))
