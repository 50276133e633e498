"""Axis 4: anchors and their lattice."""

import copy

import pytest
import torch
from atss.anchor_grid import AnchorGrid
from atss.anchors import GridAnchorGenerator, octave_sizes
from conftest import STRIDES, feature_maps, golden_cases, golden_grid, grown

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator


def generator(**changes):
    options = dict(sizes=octave_sizes(STRIDES), aspect_ratios=[1.0], strides=list(STRIDES))
    return GridAnchorGenerator(**{**options, **changes})


def test_anchors_are_those_of_the_authors_release_grown_by_half_a_pixel():
    for case, fields in golden_cases("anchors"):
        found = torch.cat([boxes.tensor for boxes in golden_grid(fields).boxes])
        expected = grown(fields["anchors"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        if case["aspect_ratios"] == [1.0]:
            sizes = octave_sizes(STRIDES, case["scale"], case["scales_per_octave"])
            height, width = (int(v) for v in fields["image_size"])
            padded = [32 * -(-v // 32) for v in (height, width)]
            ours = torch.cat([b.tensor for b in generator(sizes=sizes)(feature_maps(*padded))])
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_generator_gives_detectron2s_anchors(offset):
    options = dict(
        sizes=octave_sizes(STRIDES, 4, 3), aspect_ratios=[0.5, 1.0, 2.0], strides=list(STRIDES)
    )
    ours = GridAnchorGenerator(**options, offset=offset)(feature_maps(160, 224))
    theirs = DefaultAnchorGenerator(**options, offset=offset)(feature_maps(160, 224))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.tensor, other.tensor, rtol=0, atol=1e-4)


def test_grid_has_the_boxes_that_forward_gives():
    maps = feature_maps(96, 160)
    grid = generator().grid(maps)
    assert grid.grid_sizes == [tuple(f.shape[-2:]) for f in maps]
    for mine, other in zip(grid.boxes, generator()(maps)):
        assert torch.equal(mine.tensor, other.tensor)
    assert grid.num_anchors_per_level == [len(boxes) for boxes in grid.boxes]


def test_grids_of_the_last_padded_sizes_are_kept():
    ours, maps = generator(), feature_maps(64, 96)
    first = ours.grid(maps)
    assert ours.grid(maps) is first
    for width in range(40):
        ours.grid([torch.zeros(1, 1, 2, width + 1) for _ in STRIDES])
        assert ours.grid(maps) is first  # used in between, so it stays
    for width in range(40):
        ours.grid([torch.zeros(1, 1, 2, width + 1) for _ in STRIDES])
    assert len(ours._grids) == 16 and ours.grid(maps) is not first


def test_kept_grid_is_made_anew_when_what_it_was_made_of_changes():
    ours, maps = generator(), feature_maps(64, 96)

    def agrees():
        kept = [level.tensor for level in ours.grid(maps).boxes]
        return all(map(torch.equal, kept, [level.tensor for level in ours(maps)]))

    assert agrees()
    ours.offset = 0.0
    assert agrees()
    ours.strides = [2 * stride for stride in ours.strides]
    assert agrees()
    next(iter(ours.cell_anchors)).mul_(1.01)
    ours.half().float()  # rounds the cell anchors
    assert agrees()
    assert copy.deepcopy(ours)._grids == {} and ours._grids != {}


@pytest.mark.parametrize("num_cells", [1, 3])
def test_boxes_computed_from_places_are_the_bits_of_the_grid(num_cells):
    cells = [torch.randn(num_cells, 2).abs() * s for s in (8, 16, 32)]
    cells = [torch.cat((-c, c), dim=1) for c in cells]
    grid = AnchorGrid([(7, 11), (4, 6), (1, 1)], [8, 16, 32], cells, offset=0.3)
    expected = torch.cat([level.tensor for level in grid.boxes])
    assert torch.equal(grid.boxes_at(torch.arange(grid.num_anchors)), expected)
    order = torch.randint(grid.num_anchors, (5, 4))
    assert torch.equal(grid.boxes_at(order), expected[order])


def test_traced_anchors_follow_the_size_of_the_features():
    class Anchors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = generator(sizes=[[64.0]], strides=[8])

        def forward(self, feature):
            return self.generator([feature])[0].tensor

    traced = torch.jit.trace(Anchors(), torch.zeros(1, 1, 2, 3))
    assert torch.equal(traced(torch.zeros(1, 1, 5, 4)), Anchors()(torch.zeros(1, 1, 5, 4)))


def test_octaves_multiply_by_two_to_the_fraction():
    assert octave_sizes([8], 4, 3)[0] == pytest.approx([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sizes": [[-1.0]]}, "sizes must be positive"),
        ({"aspect_ratios": [0.0]}, "aspect_ratios must be positive.*model.anchor_generator.aspect"),
        ({"aspect_ratios": [[1.0], [1.0], [1.0], [1.0], []]}, "at least one on every level"),
        ({"aspect_ratios": [float("inf")]}, "aspect_ratios must be positive"),
        ({"aspect_ratios": []}, "cannot be empty.*model.anchor_generator"),
        ({"sizes": [[8.0], [16.0]]}, "length 2 .*model.anchor_generator"),
        ({"strides": [8, 16, 32, 64, 0]}, "strides must be positive"),
        ({"offset": 1.0}, r"offset in \[0, 1\), got 1.0.*ANCHOR_GENERATOR.OFFSET"),
        ({"sizes": [[1.0], [1.0], [1.0], [1.0], [1.0, 2.0]]}, "same number of anchors"),
    ],
)
def test_generator_refuses_what_makes_no_anchors(changes, words):
    with pytest.raises(ValueError, match=words):
        generator(**changes)


def test_wrong_numbers_of_levels_are_named():
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        AnchorGrid([(1, 1)], [8, 16], [torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="one shape"):
        AnchorGrid([(1, 1)], [8], [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="5 strides .* got 2 feature maps"):
        generator()(feature_maps(64, 64)[:2])


@pytest.mark.parametrize(
    "wrong", [{"scale": 0}, {"scale": float("nan")}, {"scales_per_octave": 0},
              {"scales_per_octave": 1.5}, {"scales_per_octave": True}, {"strides": [8, -16]}]
)  # fmt: skip
def test_octaves_that_are_none_are_refused_with_what_to_change(wrong):
    with pytest.raises(ValueError, match="positive.*model.anchor_generator.sizes"):
        octave_sizes(**wrong)
