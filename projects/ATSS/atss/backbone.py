"""Which features does the head see? ResNet or ResNeXt with a feature pyramid P3 to P7.

P6 comes from P5, not from C5 as in RetinaNet (Sec. 4, after FCOS).
"""

from typing import List

from torch import Tensor
from torch.nn import functional as F

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

__all__ = ["P6P7FromP5", "build_atss_resnet_fpn_backbone", "resnet_fpn"]

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class P6P7FromP5(LastLevelP6P7):
    """The two coarsest levels, from P5.

    Args:
        channels: channels of the pyramid.
        relu_before_p7: pass P6 through a ReLU before P7, as the authors do; mmdetection does not.
    """

    def __init__(self, channels: int, relu_before_p7: bool = True):
        super().__init__(channels, channels, in_feature="p5")
        self.relu_before_p7 = relu_before_p7

    def forward(self, p5: Tensor) -> List[Tensor]:
        """P5 (N, C, H, W) to [P6, P7], each half the size of the one before."""
        p6 = self.p6(p5)
        return [p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


def resnet_fpn(
    depth: int = 50,
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = True,
    num_groups: int = 1,
    width_per_group: int = 64,
    stem_out_channels: int = 64,
    res2_out_channels: int = 256,
    in_channels: int = 3,
    out_channels: int = 256,
    fpn_norm: str = "",
    relu_before_p7: bool = True,
) -> FPN:
    """Backbone with feature maps "p3" to "p7" (strides 8 to 128).

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        norm: normalisation in the ResNet, by Detectron2's names.
        freeze_at: stages kept as they are: 1 the stem, 2 also res2; 0 trains all.
        stride_in_1x1: stride in the first 1x1 convolution (MSRA weights) instead of the 3x3.
        num_groups: groups of the 3x3 convolutions, 32 or 64 in ResNeXt.
        width_per_group: channels of each group in res2.
        stem_out_channels: channels after the stem.
        res2_out_channels: channels of res2, 256 for bottlenecks, 64 for basic blocks as published;
            each stage doubles them. Less makes a thinner network.
        in_channels: channels of the image.
        out_channels: channels of the pyramid.
        fpn_norm: normalisation in the pyramid; "" is the paper's.
        relu_before_p7: see `P6P7FromP5`.

    Returns:
        Detectron2's `FPN`; its parameters have Detectron2's names, so zoo weights load.

    Raises:
        ValueError: for a depth that does not exist.
    """
    if depth not in _BLOCKS_PER_STAGE:
        raise ValueError(
            f"Unknown ResNet depth {depth} for model.backbone.depth; known are "
            f"{sorted(_BLOCKS_PER_STAGE)}."
        )
    stages = []
    channels, stage_channels = stem_out_channels, res2_out_channels
    bottleneck_channels = num_groups * width_per_group
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        options = {"norm": norm, "stride_per_block": [1 if i == 0 else 2] + [1] * (num_blocks - 1)}
        if depth >= 50:
            options.update(
                bottleneck_channels=bottleneck_channels,
                stride_in_1x1=stride_in_1x1,
                num_groups=num_groups,
            )
        block = BottleneckBlock if depth >= 50 else BasicBlock
        stages.append(
            ResNet.make_stage(
                block, num_blocks, in_channels=channels, out_channels=stage_channels, **options
            )
        )
        channels, stage_channels = stage_channels, stage_channels * 2
        bottleneck_channels *= 2
    bottom_up = ResNet(
        BasicStem(in_channels, stem_out_channels, norm),
        stages,
        out_features=["res3", "res4", "res5"],
        freeze_at=freeze_at,
    )
    return FPN(
        bottom_up,
        in_features=["res3", "res4", "res5"],
        out_channels=out_channels,
        norm=fpn_norm,
        top_block=P6P7FromP5(out_channels, relu_before_p7),
    )


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """`resnet_fpn` from the keys that Detectron2's own backbones read."""
    resnets = cfg.MODEL.RESNETS
    return resnet_fpn(
        depth=resnets.DEPTH,
        norm=resnets.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        in_channels=input_shape.channels,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        fpn_norm=cfg.MODEL.FPN.NORM,
        relu_before_p7=cfg.MODEL.ATSS.RELU_BEFORE_P7,
    )
