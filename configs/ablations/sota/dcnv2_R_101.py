"""Table 8, row 4: R-101-DCN.

AP50 64.7, AP75 50.4, APs 27.7, APm 49.8, APl 58.4 in the paper. Trained like its parent: evaluate
the parent's weights with --eval-only. COCO's server measures AP from coco_instances_results.json.
"""

from ...coco.atss_dcnv2_R_101_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

row = dict(
    table="Table 8",
    number=4,
    title="R-101-DCN",
    ap=46.3,
    source="paper",
    split="test-dev",
    parent="coco/atss_dcnv2_R_101_FPN_2x",
    changes=[
        'dataloader.test.dataset.names: ["coco_2017_val"] -> ["coco_2017_test-dev"]',
        "train.eval_period: 5000 -> 0",
    ],
)

dataloader.test.dataset.names = ["coco_2017_test-dev"]
train.eval_period = 0  # only at the end: test-dev has no public ground truth
train.output_dir = "output/ablations/sota/dcnv2_R_101"
