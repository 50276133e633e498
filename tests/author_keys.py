"""Names and shapes of the state dicts of the authors' release, from the rules they follow.

Two of its ten configs are recorded in tests/golden/keys; those check the rules.
"""

from typing import Dict, NamedTuple, Tuple

Shapes = Dict[str, Tuple[int, ...]]


class Release(NamedTuple):
    """What distinguishes the release's models."""

    depth: int = 50
    num_groups: int = 1
    width_per_group: int = 64
    deformable: bool = False

    @property
    def deform_on_per_stage(self) -> Tuple[bool, ...]:
        return (False, self.deformable and self.num_groups == 1, self.deformable, self.deformable)


RELEASES = {
    "R_50_FPN_1x": Release(),
    "dcnv2_R_50_FPN_1x": Release(deformable=True),
    "R_101_FPN_1x": Release(101),
    "dcnv2_R_101_FPN_1x": Release(101, deformable=True),
    "R_101_FPN_2x": Release(101),
    "dcnv2_R_101_FPN_2x": Release(101, deformable=True),
    "X_101_32x8d_FPN_2x": Release(101, 32, 8),
    "dcnv2_X_101_32x8d_FPN_2x": Release(101, 32, 8, deformable=True),
    "X_101_64x4d_FPN_2x": Release(101, 64, 4),
    "dcnv2_X_101_64x4d_FPN_2x": Release(101, 64, 4, deformable=True),
}


def _norm(prefix: str, channels: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": (channels,) for name in names}


def _conv(prefix: str, out_channels: int, in_channels: int, kernel: int, bias=True) -> Shapes:
    shapes: Shapes = {f"{prefix}.weight": (out_channels, in_channels, kernel, kernel)}
    if bias:
        shapes[f"{prefix}.bias"] = (out_channels,)
    return shapes


def author_shapes(release: Release) -> Shapes:
    shapes: Shapes = {
        **_conv("backbone.body.stem.conv1", 64, 3, 7, bias=False),
        **_norm("backbone.body.stem.bn1", 64),
    }
    in_channels = 64
    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[release.depth]
    for stage, num_blocks in enumerate(blocks):
        out_channels = 256 * 2**stage
        width = release.num_groups * release.width_per_group * 2**stage
        for i in range(num_blocks):
            block = f"backbone.body.layer{stage + 1}.{i}"
            if i == 0:
                shapes.update(
                    _conv(f"{block}.downsample.0", out_channels, in_channels, 1, bias=False)
                )
                shapes.update(_norm(f"{block}.downsample.1", out_channels))
            shapes.update(_conv(f"{block}.conv1", width, in_channels, 1, bias=False))
            shapes.update(_norm(f"{block}.bn1", width))
            conv2 = f"{block}.conv2"
            if release.deform_on_per_stage[stage]:
                shapes.update(_conv(f"{conv2}.offset", 27, width, 3))
                conv2 += ".conv"
            shapes.update(_conv(conv2, width, width // release.num_groups, 3, bias=False))
            shapes.update(_norm(f"{block}.bn2", width))
            shapes.update(_conv(f"{block}.conv3", out_channels, width, 1, bias=False))
            shapes.update(_norm(f"{block}.bn3", out_channels))
            in_channels = out_channels
    for level, channels in ((2, 512), (3, 1024), (4, 2048)):
        shapes.update(_conv(f"backbone.fpn.fpn_inner{level}", 256, channels, 1))
        shapes.update(_conv(f"backbone.fpn.fpn_layer{level}", 256, 256, 3))
    for name in ("p6", "p7"):
        shapes.update(_conv(f"backbone.fpn.top_blocks.{name}", 256, 256, 3))
    for tower in ("cls_tower", "bbox_tower"):
        for i in range(4):
            conv = f"rpn.head.{tower}.{3 * i}"
            if release.deformable and i == 3:
                shapes.update(_conv(f"{conv}.offset", 27, 256, 3))
                conv += ".conv"
            shapes.update(_conv(conv, 256, 256, 3))
            norm = f"rpn.head.{tower}.{3 * i + 1}"
            shapes.update({f"{norm}.weight": (256,), f"{norm}.bias": (256,)})
    for name, channels in (("cls_logits", 80), ("bbox_pred", 4), ("centerness", 1)):
        shapes.update(_conv(f"rpn.head.{name}", channels, 256, 3))
    for i in range(5):
        shapes[f"rpn.head.scales.{i}.scale"] = (1,)
        shapes[f"rpn.anchor_generator.cell_anchors.{i}"] = (1, 4)
    return shapes


def mmdet_shapes(depth: int = 50) -> Shapes:
    """mmdetection 2.x and 3.x: the same names for ATSS."""
    shapes: Shapes = {}
    for name, shape in author_shapes(Release(depth)).items():
        if name.startswith("backbone.body."):
            name = name.replace("backbone.body.stem.", "backbone.").replace(".body.", ".")
            shapes[name] = shape
            if name.endswith("running_var"):
                shapes[name.replace("running_var", "num_batches_tracked")] = ()
    for i, channels in enumerate((512, 1024, 2048)):
        shapes.update(_conv(f"neck.lateral_convs.{i}.conv", 256, channels, 1))
    for i in range(5):
        shapes.update(_conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3))
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            shapes.update(_conv(f"bbox_head.{tower}.{i}.conv", 256, 256, 3, bias=False))
            gn = f"bbox_head.{tower}.{i}.gn"
            shapes.update({f"{gn}.weight": (256,), f"{gn}.bias": (256,)})
    for name, channels in (("cls", 80), ("reg", 4), ("centerness", 1)):
        shapes.update(_conv(f"bbox_head.atss_{name}", channels, 256, 3))
    shapes.update({f"bbox_head.scales.{i}.scale": () for i in range(5)})
    return shapes
