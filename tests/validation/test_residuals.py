"""Units that lack what their kin have, and those that are meant to."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.residuals import missing_residuals


class Block(nn.Module):
    def __init__(self, skip=True, width=32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.skip = skip

    def forward(self, x):
        branch = self.down(torch.relu(self.up(self.norm(x))))
        return x + branch if self.skip else branch


class Numbered(Block):
    """Counts itself, which is no setting that explains anything."""

    def __init__(self, index):
        super().__init__()
        self.index = index


class Forgetful(Numbered):
    """The sum is missing."""

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


class Trunk(nn.Module):
    """Blocks in a list, and one with a name of its own behind them; `flat` has them all side by side."""

    def __init__(self, blocks, projector, flat=False):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 32), nn.Linear(32, 10)
        self.names = [f"b{i}" for i in range(len(blocks))]
        if flat:
            for name, block in zip(self.names, blocks, strict=True):
                self.add_module(name, block)
        else:
            self.blocks = nn.ModuleList(blocks)
        self.projector = projector

    def forward(self, x):
        x = self.stem(x)
        for block in getattr(self, "blocks", None) or [getattr(self, name) for name in self.names]:
            x = block(x)
        return self.head(self.projector(x))


def found(model):
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"x": torch.randn(4, 16)}))
    adapter.module.eval()
    return [(f.severity, f.where) for f in missing_residuals(adapter, adapter.example_inputs(2))]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_a_setting_says_which_unit_adds_nothing(flat, plain):
    """A flag or number that only the odd one has is the author's word."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    assert found(Trunk(blocks, nn.Identity() if plain else Block(skip=False), flat)) == []
    blocks[2] = Block(skip=False)
    assert found(Trunk(blocks, nn.Identity(), flat)) == []


@pytest.mark.parametrize("flat", [False, True])
def test_the_odd_one_of_a_list_is_at_fault(flat):
    torch.manual_seed(0)
    blocks = [Forgetful(i) if i == 2 else Numbered(i) for i in range(5)]
    assert found(Trunk(blocks, nn.Identity(), flat)) == [("fail", "b2" if flat else "blocks.2")]


@pytest.mark.parametrize("flat", [False, True])
def test_the_odd_one_elsewhere_is_worth_a_look(flat):
    """It may have another job than the blocks in front of it."""
    torch.manual_seed(0)
    blocks = [Numbered(i) for i in range(4)]
    assert found(Trunk(blocks, Forgetful(4), flat)) == [("warn", "projector")]
    assert found(Trunk(blocks, Numbered(4), flat)) == []


def test_a_unit_of_the_same_class_that_counts_itself():
    """One class with one code: where its number decides, somebody wrote so."""

    class FromSecond(Numbered):
        def forward(self, x):
            branch = self.down(torch.relu(self.up(self.norm(x))))
            return x + branch if self.index else branch

    torch.manual_seed(0)
    assert found(Trunk([FromSecond(i) for i in range(5)], nn.Identity())) == []


class Loop(nn.Module):
    """A transformer whose blocks are dicts of layers, called by the model itself."""

    def __init__(self, skip):
        super().__init__()
        self.embed, self.head, self.skip = nn.Embedding(50, 16), nn.Linear(16, 50), skip
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(16), "qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16),
                    "second": nn.LayerNorm(16), "up": nn.Linear(16, 64), "down": nn.Linear(64, 16),
                }
            )
            for _ in range(4)
        )  # fmt: skip

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](x)).chunk(3, -1)
            seen = block["out"](nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + seen if self.skip else seen
            made = block["down"](nn.functional.gelu(block["up"](block["second"](x))))
            x = x + made if self.skip else made
        return self.head(x)


@pytest.mark.parametrize(("skip", "expected"), [(True, []), (False, [("fail", "blocks.0")])])
def test_blocks_that_are_dicts_of_layers(skip, expected):
    adapter = ModelAdapter(Loop(skip))
    adapter.module.eval()
    assert [(f.severity, f.where) for f in missing_residuals(adapter, adapter.example_inputs(2))] == expected


class Cell(nn.Module):
    """Reads two cells before it, as those of NASNet do; `skip` adds the nearer one to what comes out."""

    def __init__(self, skip=False, width=32):
        super().__init__()
        self.near, self.far, self.out = (nn.Linear(width, width) for _ in range(3))
        self.skip = skip

    def forward(self, x, before):
        branch = self.out(torch.relu(self.near(x)) + torch.relu(self.far(before)))
        return x + branch if self.skip else branch


class NamedCell(Cell):
    """The same cell by another name, so that no flag tells it from those that add."""

    def forward(self, x, before):
        return self.out(torch.relu(self.near(x)) + torch.relu(self.far(before)))


class Cells(nn.Module):
    """Cells in a list, each given the outputs of the `reach` cells before it, the last of them as the far one."""

    def __init__(self, cells, reach=2):
        super().__init__()
        self.stem, self.head, self.cells, self.reach = nn.Linear(16, 32), nn.Linear(32, 10), nn.ModuleList(cells), reach

    def forward(self, x):
        seen = [self.stem(x)]
        for cell in self.cells:
            seen.append(cell(seen[-1], seen[-min(self.reach, len(seen))]))
        return self.head(seen[-1])


@pytest.mark.parametrize("reach", [2, 3])
def test_the_last_cell_has_no_follower_to_lead_around_it(reach):
    """Each cell but the last is leapt over by the next one; the last lacks nothing that it could have."""
    torch.manual_seed(0)
    assert found(Cells([Cell() for _ in range(5)], reach)) == []


@pytest.mark.parametrize("place", [1, 4])
def test_a_cell_without_its_sum_among_cells_with_one(place):
    """True skip connections hold when all others are silent, so the odd one is at fault, in the middle and at the end.

    In the middle the next cell reads past it only where cells read further back than one.
    """
    torch.manual_seed(0)
    cells = [Cell(skip=True) for _ in range(5)]
    cells[place] = NamedCell(skip=True)
    assert found(Cells(cells, reach=1)) == [("fail", f"cells.{place}")]


def test_the_last_cell_without_its_sum_is_found_where_cells_read_far_back():
    torch.manual_seed(0)
    assert found(Cells([*(Cell(skip=True) for _ in range(4)), NamedCell(skip=True)])) == [("fail", "cells.4")]


@pytest.mark.parametrize("flat", [False, True])
def test_the_last_of_a_plain_stack_that_forgets_its_sum(flat):
    torch.manual_seed(0)
    blocks = [*(Numbered(i) for i in range(4)), Forgetful(4)]
    assert found(Trunk(blocks, nn.Identity(), flat)) == [("fail", "b4" if flat else "blocks.4")]
