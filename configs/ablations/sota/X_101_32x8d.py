"""Table 8, row 2: X-101-32x8d.

AP50 63.9, AP75 49.1, APs 27.9, APm 48.2, APl 54.6 in the paper. Trained like its parent: evaluate
the parent's weights with --eval-only. COCO's server measures AP from coco_instances_results.json.
"""

from ...coco.atss_X_101_32x8d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=2,
    title="X-101-32x8d",
    ap=45.1,
    source="paper",
    split="test-dev",
    parent="coco/atss_X_101_32x8d_FPN_2x",
    changes=[
        'dataloader.test.dataset.names: ["coco_2017_val"] -> ["coco_2017_test-dev"]',
        "train.eval_period: 5000 -> 0",
    ],
)

dataloader.test.dataset.names = ["coco_2017_test-dev"]
train.eval_period = 0  # only at the end: test-dev has no public ground truth
train.output_dir = "output/ablations/sota/X_101_32x8d"
