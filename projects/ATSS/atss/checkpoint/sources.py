"""Other code bases: their names for our parameters, and the geometry they train with.

The release (github.com/sfzhang15/ATSS) has the names of maskrcnn-benchmark; mmdetection's are the
same in 2.x and 3.x; a bare ResNet has torchvision's.
"""

from typing import Any, Dict, Mapping

from .key_maps import Rule, Source

_BOTTOM_UP = "backbone.bottom_up"
_HEAD = "proposal_generator.head"


def _resnet(stem: str, body: str, deformable):
    """Rules of the ResNet: the stem's prefix, the stages' prefix, and what is deformable."""
    block, our_block = body + "layer{s}.{b}.", _BOTTOM_UP + ".res{s+1}.{b}."
    return (
        Rule(stem + "conv1.{param}", _BOTTOM_UP + ".stem.conv1.{param}"),
        Rule(stem + "bn1.{param}", _BOTTOM_UP + ".stem.conv1.norm.{param}"),
        *(Rule(block + theirs, our_block + ours, given and our_block + given)
          for theirs, ours, given in deformable),
        Rule(block + "conv{i}.{param}", our_block + "conv{i}.{param}"),
        Rule(block + "bn{i}.{param}", our_block + "conv{i}.norm.{param}"),
        Rule(block + "downsample.0.{param}", our_block + "shortcut.{param}"),
        Rule(block + "downsample.1.{param}", our_block + "shortcut.norm.{param}"),
    )  # fmt: skip


_COUNTER = (r".*\.num_batches_tracked", "counts batches; frozen statistics do not change")
_CELL_ANCHORS = (r".*anchor_generator\.cell_anchors\.\d+", "anchors are computed, not stored")

AUTHOR = Source(
    name="author",
    title="the authors' release",
    marks=(r"rpn\.head\.cls_tower\..*", r"rpn\.head\.cls_logits\..*"),
    rules=(
        *_resnet(
            "backbone.body.stem.",
            "backbone.body.",
            (
                ("conv2.offset.{param}", "conv2_offset.{param}", ""),
                ("conv2.conv.{param}", "conv2.{param}", "conv2_offset.weight"),
            ),
        ),
        Rule("backbone.fpn.fpn_inner{i}.{param}", "backbone.fpn_lateral{i+1}.{param}"),
        Rule("backbone.fpn.fpn_layer{i}.{param}", "backbone.fpn_output{i+1}.{param}"),
        Rule("backbone.fpn.top_blocks.p{i}.{param}", "backbone.top_block.p{i}.{param}"),
        Rule("rpn.head.{tower}.{i}.offset.{param}", _HEAD + ".{tower}.{i}.conv_offset.{param}"),
        Rule(
            "rpn.head.{tower}.{i}.conv.{param}",
            _HEAD + ".{tower}.{i}.{param}",
            given=_HEAD + ".{tower}.{i}.conv_offset.weight",
        ),
        Rule("rpn.head.{tower}.{i}.{param}", _HEAD + ".{tower}.{i}.{param}"),
        Rule("rpn.head.{predictor}.{param}", _HEAD + ".{predictor}.{param}"),
    ),
    dropped=(_CELL_ANCHORS,),
)

MMDET = Source(
    name="mmdet",
    title="mmdetection",
    marks=(r"bbox_head\.atss_cls\..*",),
    rules=(
        *_resnet(
            "backbone.",
            "backbone.",
            (("conv2.conv_offset.{param}", "conv2_offset.{param}", ""),),
        ),
        # The two extra convolutions of its pyramid work on P5, "on output", and are P6 and P7.
        Rule("neck.fpn_convs.3.conv.{param}", "backbone.top_block.p6.{param}"),
        Rule("neck.fpn_convs.4.conv.{param}", "backbone.top_block.p7.{param}"),
        Rule("neck.lateral_convs.{i}.conv.{param}", "backbone.fpn_lateral{i+3}.{param}"),
        Rule("neck.fpn_convs.{i}.conv.{param}", "backbone.fpn_output{i+3}.{param}"),
        *(
            Rule(f"bbox_head.{theirs}_convs." + there, f"{_HEAD}.{ours}_tower." + here)
            for theirs, ours in (("cls", "cls"), ("reg", "bbox"))
            for there, here in (
                ("{i}.conv.conv_offset.{param}", "{3*i}.conv_offset.{param}"),
                ("{i}.conv.{param}", "{3*i}.{param}"),
                ("{i}.gn.{param}", "{3*i+1}.{param}"),
            )
        ),
        Rule("bbox_head.atss_cls.{param}", _HEAD + ".cls_logits.{param}"),
        Rule("bbox_head.atss_reg.{param}", _HEAD + ".bbox_pred.{param}"),
        Rule("bbox_head.atss_centerness.{param}", _HEAD + ".centerness.{param}"),
        Rule("bbox_head.scales.{i}.scale", _HEAD + ".scales.{i}.scale", reshape=((), (1,))),
    ),
    dropped=(
        _COUNTER,
        (r"data_preprocessor\.(mean|std)", "becomes model.pixel_mean and model.pixel_std"),
    ),
)

TORCHVISION = Source(
    name="torchvision",
    title="a bare ResNet in torchvision's layout",
    marks=(r"conv1\.weight", r"layer1\.0\.conv1\.weight"),
    rules=_resnet("", "", ()),
    dropped=(_COUNTER, (r"fc\.(weight|bias)", "classifies ImageNet")),
)

SOURCES = {source.name: source for source in (AUTHOR, MMDET, TORCHVISION)}

_IMAGENET_RGB = {
    "model.input_format": "RGB",
    "model.pixel_mean": [123.675, 116.28, 103.53],
    "model.pixel_std": [58.395, 57.12, 57.375],
}
_OVERRIDES: Dict[str, Dict[str, Any]] = {
    "author": {
        "model.input_format": "BGR",
        "model.pixel_mean": [102.9801, 115.9465, 122.7717],
        "model.pixel_std": [1.0, 1.0, 1.0],
        # It takes pixels as inclusive, so that its boxes lie half a pixel up and left of ours.
        "model.box_offset": 0.5,
        "model.anchor_generator.offset": 0.5,
        "model.selector.sqrt_score": True,
        "model.backbone.relu_before_p7": True,
        "model.backbone.frozen_bn_eps": 0.0,
    },
    "mmdet": {
        **_IMAGENET_RGB,
        "model.box_offset": 0.0,
        "model.anchor_generator.offset": 0.0,
        "model.selector.sqrt_score": False,
        "model.backbone.relu_before_p7": False,
        "model.backbone.frozen_bn_eps": 1e-5,
    },
    "torchvision": {**_IMAGENET_RGB, "model.backbone.frozen_bn_eps": 1e-5},
}


def overrides_of(source: str, state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """Config entries that belong to converted weights: dotted names of a LazyConfig, and values.

    Args:
        source: name of the code base.
        state_dict: converted, in our names.

    Returns:
        A new dict. Entries of the backbone are left out where there is none in the weights.
    """
    overrides = dict(_OVERRIDES[source])
    conv1 = state_dict.get(_BOTTOM_UP + ".res2.0.conv1.weight")
    conv2 = state_dict.get(_BOTTOM_UP + ".res2.0.conv2.weight")
    is_bottleneck = _BOTTOM_UP + ".res2.0.conv3.weight" in state_dict
    if conv1 is None or conv2 is None:
        return {k: v for k, v in overrides.items() if not k.startswith("model.backbone.frozen")}
    if is_bottleneck:
        # The authors' ResNets are MSRA's, with the stride in the 1x1; their ResNeXts, whose 3x3 is
        # grouped, have it in the 3x3, as have all of the others.
        is_grouped = conv2.shape[1] != conv1.shape[0]
        overrides["model.backbone.stride_in_1x1"] = source == "author" and not is_grouped
    return overrides
