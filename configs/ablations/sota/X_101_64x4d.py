"""Table 8, row 3: X-101-64x4d.

AP50 64.6, AP75 49.7, APs 28.5, APm 48.9, APl 55.6 in the paper. Trained like its parent: evaluate
the parent's weights with --eval-only. COCO's server measures AP from coco_instances_results.json.
"""

from ...coco.atss_X_101_64x4d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=3,
    title="X-101-64x4d",
    ap=45.6,
    source="paper",
    split="test-dev",
    parent="coco/atss_X_101_64x4d_FPN_2x",
    changes=[
        'dataloader.test.dataset.names: ["coco_2017_val"] -> ["coco_2017_test-dev"]',
        "train.eval_period: 5000 -> 0",
    ],
)

dataloader.test.dataset.names = ["coco_2017_test-dev"]
train.eval_period = 0  # only at the end: test-dev has no public ground truth
train.output_dir = "output/ablations/sota/X_101_64x4d"
