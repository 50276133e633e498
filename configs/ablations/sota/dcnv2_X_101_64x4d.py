"""Table 8, row 6: X-101-64x4d-DCN.

AP50 66.5, AP75 51.9, APs 29.7, APm 50.8, APl 59.4 in the paper. Trained like its parent: evaluate
the parent's weights with --eval-only. COCO's server measures AP from coco_instances_results.json.
"""

from ...coco.atss_dcnv2_X_101_64x4d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=6,
    title="X-101-64x4d-DCN",
    ap=47.7,
    source="paper",
    split="test-dev",
    parent="coco/atss_dcnv2_X_101_64x4d_FPN_2x",
    changes=[
        'dataloader.test.dataset.names: ["coco_2017_val"] -> ["coco_2017_test-dev"]',
        "train.eval_period: 5000 -> 0",
    ],
)

dataloader.test.dataset.names = ["coco_2017_test-dev"]
train.eval_period = 0  # only at the end: test-dev has no public ground truth
train.output_dir = "output/ablations/sota/dcnv2_X_101_64x4d"
