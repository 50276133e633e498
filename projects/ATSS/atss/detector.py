"""The one-stage detector: images in, instances out."""

import inspect
from typing import Dict, List, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage

from .backbone import P6P7FromP5, padding_rule
from .build import build_parts
from .device import instances_to_device, to_device
from .postprocessing.traceable import move_like
from .proposal_generator import ATSS
from .stored_settings import StoresSettings, turn_channels
from .targets import boxes_on_host, check_gt_instances


@META_ARCH_REGISTRY.register()
class ATSSDetector(StoresSettings, nn.Module):
    """One-stage detector: a backbone and the dense core on top of it.

    Args:
        backbone: images -> feature maps by name.
        proposal_generator: the dense core.
        pixel_mean: mean of each channel, subtracted from the input.
        pixel_std: deviation of each channel, divided by.
        input_format: order of the channels the model was trained with, "BGR" or "RGB".
        vis_period: every so many iterations, draw ground truth and detections into the event
            storage; 0 disables.
    """

    settings_owner = ""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: ATSS,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        vis_period: int = 0,
    ):
        super().__init__()
        if len(pixel_mean) != len(pixel_std):
            raise ValueError(
                f"pixel_mean has {len(pixel_mean)} channels, pixel_std {len(pixel_std)}; they need "
                "one value per channel of the input."
            )
        top_block = getattr(backbone, "top_block", None)
        in_features = set(proposal_generator.in_features)
        if isinstance(top_block, P6P7FromP5) and in_features < set(backbone.output_shape()):
            raise ValueError(
                f"model.in_features {sorted(in_features)} leaves out "
                f"{sorted(set(backbone.output_shape()) - in_features)} of the backbone, whose "
                "weights would get no gradient. Lower model.backbone.num_top_levels (2: p6, p7), "
                "or leave a stage out of model.backbone.in_features (MODEL.FPN.IN_FEATURES)."
            )
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.input_format = input_format
        self.vis_period = vis_period
        mean, std = torch.tensor(list(pixel_mean)), torch.tensor(list(pixel_std))
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1))
        self.register_buffer("pixel_std", std.view(-1, 1, 1))

    @classmethod
    def from_config(cls, cfg):
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": ATSS(**build_parts(cfg, backbone.output_shape())),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *others):
        turn_channels(state_dict, self.input_format, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *others)
        for name in ("pixel_mean", "pixel_std"):  # weights of version 0.1 leave them to the config
            if prefix + name in missing:
                missing.remove(prefix + name)

    def forward(self, batched_inputs: List[Dict]):
        """Train on or detect in a batch of images.

        Args:
            batched_inputs: N dicts of Detectron2's `DatasetMapper`: "image" (C, H, W) in 0..255, in
                training "instances" with `gt_boxes` (pixels of the image) and `gt_classes`;
                "height" and "width" tell the size that detections are wanted in.

        Returns:
            In training, dict of losses. In evaluation, N dicts {"instances": `Instances`} with
            `pred_boxes`, `scores` and `pred_classes`.

        Raises:
            ValueError: for ground truth that is missing, not finite, inverted or of a class that
                does not exist, or images with another number of channels than the model has.
        """
        images = self.preprocess_image(batched_inputs)
        if not self.training:
            features = self.backbone(images.tensor)
            results, _ = self.proposal_generator(images, features)
            outputs = []
            for result, inputs in zip(results, batched_inputs):
                height, width = result.image_size
                size = inputs.get("height", height), inputs.get("width", width)
                outputs.append({"instances": detector_postprocess(result, *size)})
            return outputs

        gt_instances = self._gt_instances(batched_inputs)
        features = self.backbone(images.tensor)
        on_host = boxes_on_host([inputs["instances"] for inputs in batched_inputs])
        _, losses = self.proposal_generator(images, features, gt_instances, on_host)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, images, features)
        return losses

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Normalise the images, pad them to one size that the backbone takes.

        Raises:
            ValueError: for an image that is larger than the square a backbone pads to.
        """
        if torch.jit.is_tracing():
            images = [move_like(x["image"], self.pixel_mean) for x in batched_inputs]
        else:
            num_channels = len(self.pixel_mean)
            for i, inputs in enumerate(batched_inputs):
                shape = tuple(inputs["image"].shape)
                if len(shape) != 3 or shape[0] != num_channels:
                    raise ValueError(
                        f"Image {inputs.get('image_id', i)!r} of the batch has the shape {shape}, "
                        f"but the model takes ({num_channels}, height, width). Read images in the "
                        f"format of model.input_format (INPUT.FORMAT), {self.input_format!r}."
                    )
            images = [to_device(x["image"], self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        divisor, is_square = padding_rule(self.backbone)
        if is_square and not torch.jit.is_tracing():
            height, width = (max(x.shape[axis] for x in images) for axis in (-2, -1))
            if max(height, width) > divisor:
                raise ValueError(
                    f"The backbone pads images to a square of {divisor} px, but the batch has "
                    f"{height}x{width} px. Resize images to fit (long edge in the dataloader's "
                    "augmentations, INPUT.MAX_SIZE_TRAIN and MAX_SIZE_TEST), or give the backbone "
                    "a larger square_pad."
                )
        return ImageList.from_tensors(images, divisor)

    def visualize_training(
        self, batched_inputs: List[Dict], images: ImageList, features: Dict[str, Tensor]
    ) -> None:
        """Put a picture of the first image, ground truth above detections, into the storage."""
        from detectron2.evaluation import inference_context  # these two only if asked for:
        from detectron2.utils.visualizer import Visualizer  # pycocotools, matplotlib

        max_boxes = 20
        core = self.proposal_generator
        feature_list = [features[name][:1] for name in core.in_features]
        # In evaluation mode: a picture must not count in the running statistics of batch norms.
        with torch.no_grad(), inference_context(core.head):
            results = core.inference(core.head(feature_list), feature_list, images.image_sizes[:1])
        image = batched_inputs[0]["image"].cpu().permute(1, 2, 0)
        image = convert_image_to_rgb(image, self.input_format)
        gt_boxes = batched_inputs[0]["instances"].gt_boxes.tensor.cpu()
        pred_boxes = results[0].pred_boxes.tensor[:max_boxes].cpu()
        rows = [
            Visualizer(image, None).overlay_instances(boxes=boxes.numpy()).get_image()
            for boxes in (gt_boxes, pred_boxes)
        ]
        picture = torch.cat([torch.as_tensor(row) for row in rows]).permute(2, 0, 1).numpy()
        name = f"Top: GT bounding boxes; Bottom: {max_boxes} highest scoring results"
        get_event_storage().put_image(name, picture)

    def _gt_instances(self, batched_inputs: List[Dict]) -> List[Instances]:
        num_classes = self.proposal_generator.num_classes
        for i, inputs in enumerate(batched_inputs):
            if "instances" not in inputs:
                raise ValueError(
                    f"Training needs ground truth, but image {inputs.get('image_id', i)!r} of the "
                    "batch has no 'instances'. Use a DatasetMapper with is_train=True."
                )
            check_gt_instances(inputs["instances"], num_classes, inputs.get("image_id", i))
        return [instances_to_device(inputs["instances"], self.device) for inputs in batched_inputs]


def build_detector(
    *,
    backbone: Backbone,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    input_format: str = "BGR",
    vis_period: int = 0,
    **parts,
) -> ATSSDetector:
    """A detector from its parts in one flat list, so that a config says `model.assigner = ...`.

    Args:
        backbone, pixel_mean, pixel_std, input_format, vis_period: see `ATSSDetector`.
        **parts: keyword arguments of `ATSS`: head, anchor_generator, assigner, ...

    Raises:
        ValueError: for a part that `ATSS` does not have.
    """
    known = list(inspect.signature(ATSS).parameters)
    unknown = [name for name in parts if name not in known]
    if unknown:
        raise ValueError(f"model.{unknown[0]} is no part of the detector; its parts are {known}.")
    return ATSSDetector(
        backbone=backbone,
        proposal_generator=ATSS(**parts),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        input_format=input_format,
        vis_period=vis_period,
    )
