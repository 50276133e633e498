"""Table 8, row 8: X-101-64x4d-DCN, multi-scale testing.

AP50 68.9, AP75 56.3, APs 33.2, APm 52.9, APl 62.4 in the paper. Its views are
those of `atss.tta.release_views`: 13 scales, each for a range of object sizes, and their mirror
images, merged by soft voting. `train.tta` means them where its min_sizes is None. It takes effect
with --eval-only.
"""

from .dcnv2_X_101_64x4d import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=8,
    title="X-101-64x4d-DCN, multi-scale testing",
    ap=50.7,
    source="paper",
    split="test-dev",
    parent="ablations/sota/dcnv2_X_101_64x4d",
    changes=["train.tta.enabled: False -> True"],
)

train.tta.enabled = True
train.output_dir = "output/ablations/sota/dcnv2_X_101_64x4d_multi_scale"
