"""ResNet and ResNeXt with a feature pyramid P3 to P7, and their deformable stages.

P6 comes from P5, not from C5 as in RetinaNet (Sec. 3.1, after FCOS).
"""

from typing import List, Sequence, Tuple

from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from .checks import check_choice
from .layers import DeformConv2d, split_offsets
from .stored_settings import StoresSettings

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
        num_levels: 2, or 1 for P6 alone.
    """

    def __init__(self, channels: int, relu_before_p7: bool = True, num_levels: int = 2):
        super().__init__(channels, channels, in_feature="p5")
        self.relu_before_p7 = relu_before_p7
        self.num_levels = num_levels
        if num_levels == 1:
            del self.p7

    def forward(self, p5: Tensor) -> List[Tensor]:
        """P5 (N, C, H, W) to [P6, P7], each half the size of the one before."""
        p6 = self.p6(p5)
        if self.num_levels == 1:
            return [p6]
        return [p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


class ResNetFPN(StoresSettings, FPN):
    """Detectron2's `FPN` on its `ResNet`, which keeps its settings with its weights."""

    settings_owner = "backbone"


class DeformBottleneckBlock(BottleneckBlock):
    """Bottleneck whose 3x3 convolution is deformable, on every device.

    Parameters have the names of Detectron2's block of that name, which needs its compiled part.

    Args:
        in_channels, out_channels: channels of the input and the output.
        deform_modulated: DCNv2, with a mask, in place of DCNv1.
        deform_num_groups: groups of channels, each with its own offsets.
        **options: the other arguments of Detectron2's `BottleneckBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        **options,
    ):
        super().__init__(in_channels, out_channels, **options)
        self.deform_modulated = deform_modulated
        plain = self.conv2
        window = {
            "kernel_size": plain.kernel_size,
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        self.conv2_offset = Conv2d(
            plain.in_channels, (27 if deform_modulated else 18) * deform_num_groups, **window
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = DeformConv2d(
            plain.in_channels,
            plain.out_channels,
            groups=plain.groups,
            deformable_groups=deform_num_groups,
            norm=plain.norm,
            **window,
        )
        weight_init.c2_msra_fill(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        out = F.relu_(self.conv1(x))
        offset, mask = split_offsets(self.conv2_offset(out), self.deform_modulated)
        out = F.relu_(self.conv2(out, offset, mask))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv3(out) + shortcut)


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
    deform_on_per_stage: Sequence[bool] = (False, False, False, False),
    deform_modulated: bool = True,
    deform_num_groups: int = 1,
    in_features: Sequence[str] = ("res3", "res4", "res5"),
    frozen_bn_eps: float = 1e-5,
    num_top_levels: int = 2,
) -> ResNetFPN:
    """Backbone with feature maps "p3" to "p7" (strides 8 to 128), and "p2" for two-stage models.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        norm: normalisation in the ResNet, by Detectron2's names.
        freeze_at: stages that are not trained: 1 the stem, 2 also res2; 0 trains all.
        stride_in_1x1: stride in the first 1x1 convolution (MSRA weights), not in the 3x3.
        num_groups: groups of the 3x3 convolutions, 32 or 64 in ResNeXt.
        width_per_group: channels of each group in res2.
        stem_out_channels: channels after the stem.
        res2_out_channels: channels of res2, 256 for bottlenecks, 64 for basic blocks as published;
            each stage doubles them.
        in_channels: channels of the image.
        out_channels: channels of the pyramid.
        fpn_norm: normalisation in the pyramid; "" is the paper's.
        relu_before_p7: see `P6P7FromP5`.
        deform_on_per_stage: whether 3x3 convolutions of res2, res3, res4, res5 are deformable. The
            paper: from res3 in ResNet, from res4 in ResNeXt.
        deform_modulated, deform_num_groups: see `DeformBottleneckBlock`.
        in_features: stages that get a pyramid level; "res2" adds a "p2".
        frozen_bn_eps: added to the variance of "FrozenBN"; the authors' release has 0.
        num_top_levels: levels above "p5": 2 for "p6" and "p7", 1 for "p6". As many as somebody
            looks at: others would get no gradient.

    Returns:
        Detectron2's `FPN`; its parameters have Detectron2's names, so zoo weights load.

    Raises:
        ValueError: for an unknown depth, or stages that do not fit it.
    """
    check_choice("resnet_fpn", "depth", depth, _BLOCKS_PER_STAGE, "model.backbone.depth")
    key = "model.backbone.num_top_levels"
    check_choice("resnet_fpn", "num_top_levels", num_top_levels, (0, 1, 2), key)
    if len(deform_on_per_stage) != 4 or (depth < 50 and any(deform_on_per_stage)):
        raise ValueError(
            "model.backbone.deform_on_per_stage (MODEL.RESNETS.DEFORM_ON_PER_STAGE) has one value "
            "for each of res2 to res5, all False below depth 50, whose blocks are no bottlenecks; "
            f"got {list(deform_on_per_stage)} for depth {depth}."
        )
    known = ["res2", "res3", "res4", "res5"]
    if list(in_features) not in (known[i:] for i in range(4)):
        raise ValueError(
            "model.backbone.in_features (MODEL.FPN.IN_FEATURES) needs consecutive stages up to "
            f"res5, such as {known[1:]}, got {list(in_features)}."
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
        if deform_on_per_stage[i]:
            block = DeformBottleneckBlock
            options.update(deform_modulated=deform_modulated, deform_num_groups=deform_num_groups)
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
        out_features=list(in_features),
        freeze_at=freeze_at,
    )
    for module in bottom_up.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = frozen_bn_eps
    top_block = None
    if num_top_levels:
        top_block = P6P7FromP5(out_channels, relu_before_p7, num_top_levels)
    return ResNetFPN(
        bottom_up,
        in_features=list(in_features),
        out_channels=out_channels,
        norm=fpn_norm,
        top_block=top_block,
    )


def padding_rule(backbone: Backbone) -> Tuple[int, bool]:
    """What the sides of padded images have to be, on every version of Detectron2.

    After 0.6, backbones may have `padding_constraints` beside `size_divisibility`: a divisor that
    replaces it, and a square that images are padded to. Images within a square are padded to it by
    padding to multiples of its side.

    Args:
        backbone: images -> feature maps by name.

    Returns:
        What height and width in pixels must be multiples of, and whether both must equal it.
    """
    constraints = getattr(backbone, "padding_constraints", {})
    divisor = backbone.size_divisibility
    # The second is how Detectron2's SimpleFeaturePyramid spells it; its size_divisibility is 0.
    for key in ("size_divisibility", "size_divisiblity"):
        divisor = constraints.get(key, divisor)
    divisor, square = max(divisor, 1), constraints.get("square_size", 0)
    return -(-max(square, 1) // divisor) * divisor, square > 0


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> ResNetFPN:
    """`resnet_fpn` from the keys of Detectron2's own backbones, up to the level that ATSS needs."""
    resnets = cfg.MODEL.RESNETS
    above_p5 = set(cfg.MODEL.ATSS.IN_FEATURES) - {"p2", "p3", "p4", "p5"}
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
        deform_on_per_stage=resnets.DEFORM_ON_PER_STAGE,
        deform_modulated=resnets.DEFORM_MODULATED,
        deform_num_groups=resnets.DEFORM_NUM_GROUPS,
        in_features=cfg.MODEL.FPN.IN_FEATURES or ["res3", "res4", "res5"],
        frozen_bn_eps=cfg.MODEL.ATSS.FROZEN_BN_EPS,
        num_top_levels=2 if above_p5 - {"p6"} else len(above_p5),
    )
