"""The dense core of the detector: head, anchors, assigner, loss and selection of boxes."""

from typing import Dict, List, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .anchors import GridAnchorGenerator
from .assigners import Assigner, PredictionAssigner
from .box_regression import Box2BoxTransform, PointToBoxTransform
from .build import build_parts
from .geometry import box_areas
from .losses import DenseLoss
from .postprocessing import DetectionSelector, ProposalSelector, SelectionInputs
from .predictions import DensePredictions, PredictionsAt
from .stored_settings import StoresSettings
from .targets import Targets, label_anchors


@PROPOSAL_GENERATOR_REGISTRY.register()
class ATSS(StoresSettings, nn.Module):
    """Dense detection core, made of independent parts that are built outside.

    Args:
        head: features -> `DensePredictions`, axis 3.
        anchor_generator: features -> anchors, axis 4.
        assigner: which anchors are positive, axis 1.
        box2box_transform: box or point, axis 2; the same as the loss has.
        loss: `(predictions, anchors, targets) -> dict`, axis 3.
        num_classes: K.
        selector: which predictions are detections. A `ProposalSelector` makes this the first stage
            of a two-stage detector: it returns class-agnostic proposals, in training too, and
            prefixes its losses.
        in_features: names of the feature maps to use, from high to low resolution.
        box_offset: pixels added to x and y of decoded boxes, and taken from those of the ground
            truth in training; 0.5 for converted weights of the authors.
        stats_period: every so many iterations, log positives per image and objects without
            positives (this waits for the GPU); 0 disables.

    Raises:
        ValueError: where parts do not fit each other, saying which config entry to change.
    """

    settings_owner = "proposal_generator"

    @configurable
    def __init__(
        self,
        *,
        head: nn.Module,
        anchor_generator: GridAnchorGenerator,
        assigner: Union[Assigner, PredictionAssigner],
        box2box_transform: Union[Box2BoxTransform, PointToBoxTransform],
        loss: DenseLoss,
        num_classes: int,
        selector: Optional[Union[DetectionSelector, ProposalSelector]] = None,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        box_offset: float = 0.0,
        stats_period: int = 0,
    ):
        super().__init__()
        selector = DetectionSelector() if selector is None else selector
        if selector.is_first_stage and num_classes != 1:
            raise ValueError(
                f"ATSS with a {type(selector).__name__} is the first stage of a two-stage "
                "detector, which tells objects from background only: it needs num_classes=1, got "
                f"{num_classes}. Change model.proposal_generator.num_classes, or the selector."
            )
        _check_parts(head, anchor_generator, box2box_transform, loss, num_classes, in_features)
        self.head = head
        self.anchor_generator = anchor_generator
        self.assigner = assigner
        self.box2box_transform = box2box_transform
        self.loss = loss
        self.num_classes = num_classes
        self.selector = selector
        self.in_features = tuple(in_features)
        self.box_offset = box_offset
        self.stats_period = stats_period

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        # Only two-stage models build it from their config by name; `ATSSDetector` passes parts.
        return build_parts(cfg, input_shape, as_proposals=True)

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        gt_instances: Optional[List[Instances]] = None,
        gt_boxes_on_host: Optional[List[Boxes]] = None,
    ) -> Tuple[List[Instances], Dict[str, Tensor]]:
        """Losses in training, detections in evaluation; as first stage, proposals in both.

        Args:
            images: N padded images; only their sizes matter.
            features: feature maps by name, each (N, C, Hi, Wi).
            gt_instances: N `Instances` with `gt_boxes` and `gt_classes`; needed in training.
            gt_boxes_on_host: the same boxes on the CPU where the caller has them, for rules that
                look at predictions.

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
        if not self.training or self.selector.is_first_stage:
            results = self.inference(predictions, feature_list, images.image_sizes)
        if not self.training:
            return results, {}
        if gt_instances is None:
            raise ValueError("ATSS needs gt_instances in training, got None.")
        _check_strides(images, feature_list, self.anchor_generator.strides, self.in_features)
        anchors = self.anchor_generator.grid(feature_list)
        at_samples = None
        if getattr(self.assigner, "uses_predictions", False):
            at_samples = PredictionsAt(predictions, anchors, self.box2box_transform)
        targets = label_anchors(
            self.assigner,
            anchors,
            gt_instances,
            self.num_classes,
            at_samples,
            gt_boxes_on_host,
            self.box_offset,
        )
        self._log_statistics(targets)
        losses = self.loss(predictions, anchors, targets)
        if self.selector.is_first_stage:
            # The second stage has a loss_cls and a loss_box_reg too, and dictionaries get merged.
            losses = {name.replace("loss_", "loss_rpn_", 1): x for name, x in losses.items()}
        return results, losses

    def inference(
        self,
        predictions: DensePredictions,
        features: Sequence[Tensor],
        image_sizes: Sequence[Tuple[int, int]],
    ) -> List[Instances]:
        """Detections of a batch, or proposals as first stage: N `Instances` as `forward` has them.

        Args:
            predictions, image_sizes: see `SelectionInputs`.
            features: L feature maps, for the sizes of the levels.
        """
        anchors = self.anchor_generator(features)
        inputs = SelectionInputs(predictions, anchors, image_sizes, self.decode)
        return self.selector(inputs, self.training)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes that deltas mean: (P, 4) deltas and anchors to (P, 4) xyxy in pixels."""
        return self.box2box_transform.apply_deltas(deltas, anchors) + self.box_offset

    def _log_statistics(self, targets: Targets) -> None:
        if not self.stats_period or get_event_storage().iter % self.stats_period:
            return
        storage, assignment = get_event_storage(), targets.assignment
        positives = assignment.is_positive.sum() / len(assignment.num_objects)
        storage.put_scalar("atss/positives_per_image", positives.item())
        unmatched = assignment.objects_without_positives().sum()
        storage.put_scalar("atss/objects_without_positives", unmatched.item())


def _check_parts(head, anchor_generator, box2box_transform, loss, num_classes, in_features) -> None:
    """Parts are chosen one by one; say at once, and where, if two of them do not fit."""
    if not hasattr(anchor_generator, "grid"):
        raise ValueError(
            f"ATSS needs an anchor generator that knows its lattice, got a "
            f"{type(anchor_generator).__name__}. Make model.anchor_generator a GridAnchorGenerator "
            "(MODEL.ANCHOR_GENERATOR.NAME)."
        )
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
        bias = getattr(head, "bbox_bias", None)
        if bias is not None and not bias > 0:
            raise ValueError(
                "PointToBoxTransform takes negative distances as 0, without a gradient, so the "
                f"head must start above: its bbox_bias is {bias}. Make model.head."
                "bbox_bias (MODEL.ATSS.HEAD.BBOX_BIAS) 4, half the width of an 8-stride anchor."
            )
    theirs = getattr(loss, "box2box_transform", box2box_transform)
    if not _is_same(theirs, box2box_transform):
        raise ValueError(
            f"The loss has a {type(theirs).__name__} with {vars(theirs)}, the detector a "
            f"{type(box2box_transform).__name__} with {vars(box2box_transform)}. Make model.loss."
            "box2box_transform '${..box2box_transform}', and change model.box2box_transform only."
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
    )  # fmt: skip
    for name, value, expected, of in facts:
        if value is not None and value != expected:
            raise ValueError(f"model.{name} is {value}, but needs {expected}: {of}.")
    if getattr(head, "centerness", None) is not None and getattr(loss, "quality", "") is None:
        raise ValueError(
            "The head predicts centerness, but model.loss.quality is None, so that nothing would "
            "train it. Set model.head.centerness (MODEL.ATSS.HEAD.CENTERNESS) to False, or "
            "model.loss.quality to 'centerness' or 'iou'."
        )


def _is_same(part: object, other: object) -> bool:
    """Whether two parts are one or equal: a LazyConfig makes an object at each mention."""
    return part == other or (type(part) is type(other) and str(vars(part)) == str(vars(other)))


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
