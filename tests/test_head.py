"""The head: outputs of the authors' weights, shapes, initialisation, switches."""

import math

import pytest
import torch
from atss.box_regression import PointToBoxTransform
from atss.head import ATSSHead
from atss.predictions import flatten_level
from conftest import golden_cases


def golden_head(case, fields):
    head = ATSSHead(
        case["in_channels"], case["num_classes"], case["anchors_per_location"],
        num_convs=case["num_convs"],
    )  # fmt: skip
    weights = {k[len("param:") :]: v for k, v in fields.items() if ":" in k}
    head.load_state_dict(weights)  # the names are the same
    return head


@pytest.mark.parametrize("case, fields", golden_cases("head"), ids=lambda v: v.get("name", ""))
def test_head_gives_the_outputs_of_the_authors_release(case, fields):
    head = golden_head(case, fields)
    with torch.no_grad():
        found = head([fields[f"feat{i}"] for i in range(5)])
    is_point = case["options"].get("REGRESSION_TYPE") == "POINT"
    for i in range(5):
        deltas = found.deltas[i].relu() if is_point else found.deltas[i]  # see the next test
        for tensor, name in (
            (found.logits[i], "cls"),
            (deltas, "reg"),
            (found.quality[i], "ctr"),
        ):
            expected = fields[f"{name}{i}"]
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_relu_of_points_acts_on_scaled_deltas_when_they_are_decoded():
    # Scales are positive in practice; a negative one tells ReLU(scale * x) from scale * ReLU(x).
    head = ATSSHead(32, 1, num_levels=1, num_convs=0, level_scales=True, bbox_bias=4.0)
    torch.nn.init.zeros_(head.bbox_pred.weight)
    head.scales[0].scale.data.fill_(-0.5)
    deltas = head([torch.rand(1, 32, 1, 1)]).deltas[0]
    assert (deltas == -2).all()
    anchor = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    box = PointToBoxTransform().apply_deltas(flatten_level(deltas, 1)[0], anchor)
    assert box.tolist() == [[32.0, 32.0, 32.0, 32.0]]


@pytest.mark.parametrize("num_anchors", [1, 9])
def test_outputs_have_a_channel_per_anchor_and_value(num_anchors):
    head = ATSSHead(32, 5, num_anchors, num_levels=2, num_convs=1)
    found = head([torch.rand(2, 32, 4, 6), torch.rand(2, 32, 2, 3)])
    assert [t.shape for t in found.logits] == [
        (2, num_anchors * 5, 4, 6),
        (2, num_anchors * 5, 2, 3),
    ]
    assert found.deltas[1].shape == (2, num_anchors * 4, 2, 3)
    assert found.quality[0].shape == (2, num_anchors, 4, 6)


def test_flattening_puts_anchors_in_row_column_anchor_order():
    prediction = torch.zeros(1, 2 * 3, 2, 2)
    prediction[0, 1 * 3 + 2, 1, 0] = 7  # anchor 1, value 2, row 1, column 0
    flat = flatten_level(prediction, num_anchors=2)
    assert flat.shape == (1, 8, 3)
    assert flat[0, (1 * 2 + 0) * 2 + 1, 2] == 7


def test_initial_values_are_the_papers():
    head = ATSSHead(256, 80, prior_prob=0.01, bbox_bias=4.0)
    assert head.cls_logits.bias[0].item() == pytest.approx(-math.log(99))
    assert (head.bbox_pred.bias == 4).all()
    assert head.cls_tower[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert [scale.scale.item() for scale in head.scales] == [1.0] * 5


def test_switches_remove_their_parameters():
    head = ATSSHead(16, 2, norm="", centerness=False, level_scales=False, conv_bias=False)
    names = [name for name, _ in head.named_parameters()]
    assert not any("scale" in n or "centerness" in n or "tower.1" in n for n in names)
    assert "cls_tower.0.bias" not in names
    assert head([torch.rand(1, 16, 2, 2)] * 5).quality is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"norm": "LN"}, r"norm to be one of .*'GN'.*got 'LN'"),
        ({"in_channels": 48}, "32 groups, which do not divide in_channels=48"),
        ({"num_classes": 0}, "num_classes >= 1, got 0"),
        ({"num_anchors": 0}, "num_anchors"),
        ({"prior_prob": 1.0}, r"prior_prob in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_heads_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ATSSHead(**{"in_channels": 64, "num_classes": 3, **changes})


def test_group_norm_of_single_channels_on_a_level_of_one_location_is_refused():
    head = ATSSHead(32, 1, num_levels=2, num_convs=1)
    with pytest.raises(ValueError, match="32 channels have one value.*128 px.*out_channels"):
        head([torch.rand(1, 32, 2, 2), torch.rand(1, 32, 1, 1)])
    head([torch.rand(1, 32, 2, 4), torch.rand(1, 32, 1, 2)])
    ATSSHead(64, 1, num_levels=1, num_convs=1)([torch.rand(1, 64, 1, 1)])
