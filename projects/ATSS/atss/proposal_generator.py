"""How do features become boxes? The dense core of the detector: head, anchors, assigner, loss."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .anchors import AnchorGrid, GridAnchorGenerator
from .assigners import Assignment
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .build import build_parts
from .geometry import box_areas
from .head import DensePredictions
from .losses.dense import DenseLoss
from .postprocessing.eager import detect
from .postprocessing.proposals import ProposalSelector
from .postprocessing.traceable import detect_instances
from .targets import Targets, label_anchors

__all__ = ["ATSS"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class ATSS(nn.Module):
    """Dense detection core, made of independent parts that are built outside.

    Args:
        head: features -> `DensePredictions`.
        anchor_generator: features -> anchors.
        assigner: `(anchors, gt_boxes) -> Assignment`, axis 1.
        box2box_transform: box or point, axis 2; the same as the loss has.
        loss: `(predictions, anchors, targets) -> dict`.
        num_classes: K.
        in_features: names of the feature maps to use, from high to low resolution.
        score_thresh: least class score of a detection, before centerness.
        topk_candidates: how many a level hands to NMS.
        nms_thresh: IoU above which the lower score of two boxes of a class goes.
        detections_per_image: most detections of an image.
        sqrt_score: score sqrt(class * centerness), the authors' formula; else the product.
        box_offset: pixels added to decoded boxes, 0.5 for converted weights of the authors.
        stats_period: every so many iterations, log positives per image and objects without
            positives (this waits for the GPU); 0 never.
        proposal_selector: given, this is the first stage of a two-stage detector: it returns
            class-agnostic proposals, in training too, and prefixes its losses. The thresholds and
            counts of detections above then do not matter.

    Raises:
        ValueError: where parts do not fit each other, saying which config entry to change.
    """

    @configurable
    def __init__(
        self,
        *,
        head: nn.Module,
        anchor_generator: GridAnchorGenerator,
        assigner: Callable[[Union[AnchorGrid, Sequence[Boxes]], Sequence[Boxes]], Assignment],
        box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
        loss: DenseLoss,
        num_classes: int,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        detections_per_image: int = 100,
        sqrt_score: bool = True,
        box_offset: float = 0.0,
        stats_period: int = 0,
        proposal_selector: Optional[ProposalSelector] = None,
    ):
        super().__init__()
        if proposal_selector is not None and num_classes != 1:
            raise ValueError(
                "ATSS with a proposal_selector is the first stage of a two-stage detector, which "
                f"tells objects from background only: it needs num_classes=1, got {num_classes}. "
                "Change model.proposal_generator.num_classes, or leave proposal_selector out."
            )
        _check_parts(head, anchor_generator, box2box_transform, loss, num_classes, in_features)
        self.head = head
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.box2box_transform = box2box_transform
        self.loss = loss
        self.num_classes = num_classes
        self.in_features = tuple(in_features)
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.sqrt_score = sqrt_score
        self.box_offset = box_offset
        self.stats_period = stats_period
        self.proposal_selector = proposal_selector

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        # Only two-stage models build it from their config by name; `ATSSDetector` passes parts.
        return build_parts(cfg, input_shape, as_proposals=True)

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        gt_instances: Optional[List[Instances]] = None,
    ) -> Tuple[List[Instances], Dict[str, Tensor]]:
        """Losses in training, detections in evaluation; as first stage, proposals in both.

        Args:
            images: N padded images; only their sizes matter.
            features: feature maps by name, each (N, C, Hi, Wi).
            gt_instances: N `Instances` with `gt_boxes` and `gt_classes`; needed in training.

        Returns:
            Detections, N `Instances` with `pred_boxes`, `scores`, `pred_classes` (none in
            training), and losses (none in evaluation). As first stage: N `Instances` with
            `proposal_boxes` and `objectness_logits`, and losses "loss_rpn_...".

        Raises:
            ValueError: for a feature the backbone lacks, strides that do not fit the features, or
                training without ground truth.
        """
        missing = [name for name in self.in_features if name not in features]
        if missing:
            raise ValueError(
                f"ATSS wants features {list(self.in_features)}, but the backbone gives "
                f"{list(features)}. Change model.in_features (MODEL.ATSS.IN_FEATURES)."
            )
        feature_list = [features[name] for name in self.in_features]
        predictions = self.head(feature_list)
        results: List[Instances] = []
        if not self.training or self.proposal_selector is not None:
            results = self.inference(predictions, feature_list, images.image_sizes)
        if not self.training:
            return results, {}
        if gt_instances is None:
            raise ValueError("ATSS needs gt_instances in training, got None.")
        _check_strides(images, feature_list, self.anchor_generator.strides, self.in_features)
        anchors = self.anchor_generator.grid(feature_list)
        targets = label_anchors(self.assigner, anchors, gt_instances, self.num_classes)
        self._log_statistics(targets)
        losses = self.loss(predictions, anchors, targets)
        if self.proposal_selector is not None:
            # The second stage has a loss_cls and a loss_box_reg too, and dictionaries get merged.
            losses = {name.replace("loss_", "loss_rpn_", 1): x for name, x in losses.items()}
        return results, losses

    def inference(
        self,
        predictions: DensePredictions,
        features: Sequence[Tensor],
        image_sizes: Sequence[Tuple[int, int]],
    ) -> List[Instances]:
        """Detections of a batch, or proposals as first stage.

        Args:
            predictions: raw output of the head.
            features: L feature maps, for the sizes of the levels.
            image_sizes: N (height, width) in pixels, before padding.

        Returns:
            N `Instances` with `pred_boxes`, `scores` and `pred_classes`, or `proposal_boxes` and
            `objectness_logits`, by falling score.
        """
        if self.proposal_selector is not None:
            return self.proposal_selector(
                predictions,
                self.anchor_generator(features),
                image_sizes,
                self.box2box_transform.apply_deltas,
                self.training,
                sqrt_score=self.sqrt_score,
                box_offset=self.box_offset,
            )
        # Fast code has branches on sizes and values, and a trace keeps those of its example.
        find = detect_instances if torch.jit.is_tracing() else detect
        return find(
            predictions,
            self.anchor_generator(features),
            image_sizes,
            self.box2box_transform.apply_deltas,
            score_thresh=self.score_thresh,
            topk=self.topk_candidates,
            nms_thresh=self.nms_thresh,
            max_detections=self.detections_per_image,
            sqrt_score=self.sqrt_score,
            box_offset=self.box_offset,
        )

    def _log_statistics(self, targets: Targets) -> None:
        if not self.stats_period or get_event_storage().iter % self.stats_period:
            return
        storage = get_event_storage()
        is_positive = (targets.labels >= 0) & (targets.labels < self.num_classes)
        positives = is_positive.sum() / len(is_positive)
        storage.put_scalar("atss/positives_per_image", positives.item())
        if targets.claims is not None:
            unmatched = targets.claims.objects_without_positives()
            storage.put_scalar("atss/objects_without_positives", unmatched.item())


def _check_parts(head, anchor_generator, box2box_transform, loss, num_classes, in_features) -> None:
    """Parts are chosen one by one; say at once, and where, if two of them do not fit."""
    num_anchors = anchor_generator.num_anchors[0]
    if isinstance(box2box_transform, PointToBoxTransform) and num_anchors != 1:
        raise ValueError(
            "PointToBoxTransform needs one anchor per location, got "
            f"num_anchors={num_anchors}: they share one center. Give model.anchor_generator one "
            "size and one ratio, or use Box2BoxTransform."
        )
    if isinstance(box2box_transform, PointToBoxTransform):
        cells = [cell for cell in anchor_generator.cell_anchors if not cell.is_meta]
        for cell, stride in zip(cells, anchor_generator.strides):
            scale = float(box_areas(cell)) ** 0.5 / stride
            if abs(scale - box2box_transform.anchor_scale) > 1e-3 * scale:
                raise ValueError(
                    "PointToBoxTransform counts in strides by way of the anchors' size: its "
                    f"anchor_scale is {box2box_transform.anchor_scale:g}, but anchors at stride "
                    f"{stride} are {scale:g} strides large. Make model.box2box_transform."
                    "anchor_scale (MODEL.ATSS.BOX2BOX_TRANSFORM.ANCHOR_SCALE) equal to it."
                )
    facts = (
        ("head.num_anchors", getattr(head, "num_anchors", num_anchors), num_anchors,
         "anchors per location of anchor_generator"),
        ("head.num_classes", getattr(head, "num_classes", num_classes), num_classes,
         "num_classes of the detector"),
        ("loss.num_classes", getattr(loss, "num_classes", num_classes), num_classes,
         "num_classes of the detector"),
        ("head.num_levels", getattr(head, "num_levels", len(in_features)), len(in_features),
         f"in_features {list(in_features)}"),
        ("anchor_generator.strides", len(anchor_generator.strides), len(in_features),
         f"in_features {list(in_features)}"),
        ("loss.centerness", getattr(loss, "centerness", None),
         getattr(head, "centerness", None) is not None, "centerness of the head"),
    )  # fmt: skip
    for name, value, expected, of in facts:
        if value is not None and value != expected:
            raise ValueError(f"model.{name} is {value}, but needs {expected}: {of}.")


def _check_strides(
    images: ImageList,
    features: Sequence[Tensor],
    strides: Sequence[int],
    names: Sequence[str],
) -> None:
    height, width = images.tensor.shape[-2:]
    for name, feature, stride in zip(names, features, strides):
        grid = tuple(feature.shape[-2:])
        expected = (-(-height // int(stride)), -(-width // int(stride)))
        if grid != expected:
            raise ValueError(
                f"Feature {name} is {grid[0]}x{grid[1]} for an input of {height}x{width} px, but "
                f"stride {stride} in model.anchor_generator.strides means "
                f"{expected[0]}x{expected[1]}. Give each feature its own stride."
            )
