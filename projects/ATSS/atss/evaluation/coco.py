"""COCO's evaluation of boxes, with little memory in every process."""

import json
import logging
import os
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .coco_api import choose_coco_api, coco_results, evaluate_boxes, index_coco, write_coco_results
from .compact import CompactDetections


class CompactCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluation of boxes, with the same results.

    A detection is 28 bytes in place of a dict, only the main process reads the annotations, and an
    image that several processes have counts once. `coco_instances_results.json` in `output_dir` is
    that of Detectron2; there is no `instances_predictions.pth`.

    Args:
        dataset_name: registered set, which has a COCO file or can be converted to one.
        output_dir: where the results, and the COCO file of a converted set, are written; None
            writes nothing.
        use_fast_impl: take faster-coco-eval where it is installed, else pycocotools.

    Raises:
        ValueError: for a set without a COCO file and no `output_dir`.
    """

    def __init__(
        self, dataset_name: str, output_dir: Optional[str] = None, use_fast_impl: bool = True
    ):
        # Not COCOEvaluator's: it reads the annotations in every process.
        self._logger = logging.getLogger(__name__)
        self._name = dataset_name
        self._output_dir = output_dir
        self._use_fast_impl = use_fast_impl
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset = self._read_annotations() if comm.is_main_process() else None
        self.reset()

    def _read_annotations(self) -> Dict[str, Any]:
        if not hasattr(self._metadata, "json_file"):
            if not self._output_dir:
                raise ValueError(
                    f"{self._name} has no COCO file, and its evaluation needs an output_dir to "
                    "write one. Set dataloader.evaluator.output_dir."
                )
            json_file = os.path.join(self._output_dir, f"{self._name}_coco_format.json")
            self._logger.info("%s is converted to COCO's format: %s", self._name, json_file)
            convert_to_coco_json(self._name, json_file)
            self._metadata.json_file = json_file
        json_file = PathManager.get_local_path(self._metadata.json_file)
        with open(json_file, encoding="utf-8") as file:
            return json.load(file)

    def reset(self) -> None:
        self._detections = CompactDetections()

    def process(self, inputs: Sequence[Dict[str, Any]], outputs: Sequence[Dict[str, Any]]) -> None:
        """Keep the detections of some images.

        Args:
            inputs: dicts with "image_id".
            outputs: for each a dict with "instances" in the size of the annotated image.

        Raises:
            ValueError: for outputs without instances, or a class that the set does not have.
        """
        names = self._metadata.get("thing_classes")
        for image, output in zip(inputs, outputs):
            if "instances" not in output:
                raise ValueError(
                    f'The evaluation of boxes needs "instances", the model gives {list(output)}. '
                    'For proposals set dataloader.evaluator.tasks to ["box_proposals"].'
                )
            found = output["instances"]
            labels = found.pred_classes.cpu()
            if names and len(labels) and labels.max() >= len(names):
                raise ValueError(
                    f"The model finds class {labels.max()} (from 0) in image {image['image_id']}, "
                    f"but {self._name} has {len(names)} classes. Set model.num_classes "
                    "(MODEL.ATSS.NUM_CLASSES) to that."
                )
            boxes = found.pred_boxes.tensor
            self._detections.add(image["image_id"], boxes, found.scores, labels)

    def evaluate(self, img_ids: Optional[List[Any]] = None) -> Dict[str, Any]:
        """Gather and evaluate; every process must call it.

        Args:
            img_ids: evaluate these images only; all of the annotations by default.

        Returns:
            {"bbox": {"AP": ..., "AP-class": ...}} in percent on the main process. Empty elsewhere,
            and where there are no images or no annotations.

        Raises:
            ValueError: for images that the annotations do not have.
        """
        detections = self._detections.gather()
        if detections is None:
            return {}
        image_ids, records = detections.image_ids, detections.records
        if not image_ids:
            self._logger.warning("The evaluation of %s got no image.", self._name)
            return {}
        self._check_images(image_ids)
        category_ids = self._category_ids(records)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            PathManager.mkdirs(self._output_dir)
            self._logger.info("%d detections are written to %s", len(records), path)
            with PathManager.open(path, "w") as file:
                write_coco_results(file, coco_results(records, image_ids, category_ids))
        if "annotations" not in self._dataset:
            self._logger.info("%s has no annotations to evaluate with.", self._name)
            return {}
        evaluated = None
        if len(records):  # the interfaces of COCO do not take none
            # faster-coco-eval knows no names of images.
            has_numbers = all(isinstance(image["id"], int) for image in self._dataset["images"])
            api = choose_coco_api(self._use_fast_impl and has_numbers)
            self._logger.info("%d detections are evaluated by %s", len(records), api.name)
            results = coco_results(records, image_ids, category_ids)
            evaluated = evaluate_boxes(api, index_coco(api, self._dataset), results, img_ids)
        names = self._metadata.get("thing_classes")
        return OrderedDict(bbox=self._derive_coco_results(evaluated, "bbox", names))

    def _check_images(self, image_ids: Sequence[Any]) -> None:
        known = {image["id"] for image in self._dataset["images"]}
        unknown = [image_id for image_id in image_ids if image_id not in known]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the {len(image_ids)} evaluated images are not in "
                f"{self._metadata.json_file}, such as that with id {unknown[0]!r}. The test loader "
                "and the evaluator need the same set."
            )
        if len(image_ids) < len(known):
            self._logger.warning(
                "%d of the %d images of %s were evaluated; the objects of the others count as "
                "missed.",
                len(image_ids),
                len(known),
                self._name,
            )

    def _category_ids(self, records: np.ndarray) -> np.ndarray:
        """(K,) id in the annotations of each class."""
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if ids is None:
            return np.arange(records["label"].max(initial=-1) + 1)
        category_ids = np.empty(len(ids), np.int64)
        category_ids[list(ids.values())] = list(ids)
        return category_ids
