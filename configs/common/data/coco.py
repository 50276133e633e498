"""COCO 2017 in the paper's sizes: short edge 800, long edge at most 1333, horizontal flip.

`multi_scale_resize` is the resize of the 2x recipe: every integer short edge from 640 to 800.
"""

from omegaconf import OmegaConf

from atss.data import NamingMapper, build_train_loader, load_dataset_dicts
from atss.evaluation import build_evaluator
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    # Checks every annotation before the first step.
    dataset=L(load_dataset_dicts)(names=["coco_2017_train"], num_classes="${model.num_classes}"),
    mapper=L(NamingMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(short_edge_length=[800], sample_style="choice", max_size=1333),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="${model.input_format}",
        use_instance_mask=False,
    ),
    total_batch_size=16,
    num_workers=4,
    seed="${train.seed}",
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names=["coco_2017_val"], filter_empty=False),
    mapper=L(NamingMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${model.input_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(build_evaluator)(
    dataset_names="${..test.dataset.names}",
    tasks=["bbox"],
    output_dir="${train.output_dir}/inference",
)

# With sample_style="range" the short edge is drawn from 640 to 800, both included.
multi_scale_resize = L(T.ResizeShortestEdge)(
    short_edge_length=[640, 800], sample_style="range", max_size=1333
)
