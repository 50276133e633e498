"""Table 8, row 5: X-101-32x8d-DCN.

AP50 66.6, AP75 52.1, APs 29.3, APm 50.8, APl 59.7 in the paper. Trained like its parent: evaluate
the parent's weights with --eval-only. COCO's server measures AP from coco_instances_results.json.
"""

from ...coco.atss_dcnv2_X_101_32x8d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=5,
    title="X-101-32x8d-DCN",
    ap=47.7,
    source="paper",
    split="test-dev",
    parent="coco/atss_dcnv2_X_101_32x8d_FPN_2x",
    changes=[
        'dataloader.test.dataset.names: ["coco_2017_val"] -> ["coco_2017_test-dev"]',
        "train.eval_period: 5000 -> 0",
    ],
)

dataloader.test.dataset.names = ["coco_2017_test-dev"]
train.eval_period = 0  # only at the end: test-dev has no public ground truth
train.output_dir = "output/ablations/sota/dcnv2_X_101_32x8d"
