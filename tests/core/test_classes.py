"""Label groups are those that class names state; names of one's own never make each class a group of its own, in which
every match would be right."""

import pytest
import torch

from featinv_nodes.core.classes import label_groups, ranked


@pytest.mark.parametrize(
    "names",
    [
        None,
        ["cat", "dog", "cow"],
        ["n01440764: tench", "n01443537: goldfish", "n01484850: shark"],
        ["animal: cat", "animal: dog", "other"],
        ["animal: cat", "plant: oak", "animal: dog", "plant: elm"],
    ],
)
def test_classes_that_state_no_groups_are_one(names):
    assert label_groups(names) == {"class": slice(None)}
    (row,) = ranked(torch.tensor([[0.0, 2.0, 1.0, -9.0][: len(names or range(4))]]), 2, names)
    assert len(row) == 2 and row[0][1] < 0.9 and row[0][0] == (names[1] if names else "class 1")


def test_groups_stand_in_the_names():
    names = ["shape: circle", "shape: square", "colour: red", "colour: green", "colour: blue"]
    assert label_groups(names) == {"shape": slice(0, 2), "colour": slice(2, 5)}
    (row,) = ranked(torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0]]), 1, names)
    assert [name for name, _ in row] == ["shape: square", "colour: red"]
