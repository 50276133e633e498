"""The evaluator that a data set asks for."""

from typing import Any, Dict, Optional, Sequence

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from .coco import CompactCOCOEvaluator


class _LVISEvaluator(LVISEvaluator):
    """Detectron2's, with `np.float` for lvis 0.5.3, its last release; NumPy 1.24 removed it."""

    def evaluate(self) -> Optional[Dict[str, Any]]:
        if "float" in vars(np):
            return super().evaluate()
        np.float = float
        try:
            return super().evaluate()
        finally:
            del np.float


def build_evaluator(
    dataset_names: Sequence[str],
    tasks: Sequence[str] = ("bbox",),
    output_dir: Optional[str] = None,
    use_fast_impl: bool = True,
) -> DatasetEvaluator:
    """The evaluator of the one set that a loader's list names, by the set's `evaluator_type`.

    LVIS and Pascal VOC have Detectron2's evaluators; all others COCO's metrics, for boxes alone by
    `CompactCOCOEvaluator`, else by Detectron2's `COCOEvaluator`.

    Args:
        dataset_names: one registered set.
        tasks: of "bbox", "segm" and "keypoints"; or "box_proposals" alone, for a model that has no
            more than proposals.
        output_dir: where the results are written; None writes none.
        use_fast_impl: allow implementations of COCO's metrics that need less time.

    Raises:
        ImportError: for an LVIS set without the package lvis.
        ValueError: for another number of sets, or tasks that the evaluator does not have.
    """
    if len(dataset_names) != 1:
        raise ValueError(
            f"The evaluation needs one data set, got {list(dataset_names)}. Change "
            "dataloader.test.dataset.names."
        )
    name, tasks = dataset_names[0], list(tasks)
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    known = {"pascal_voc": ["bbox"], "lvis": ["bbox", "segm"]}
    known = known.get(kind, ["bbox", "segm", "keypoints"])
    is_proposals = tasks == ["box_proposals"] and kind != "pascal_voc"
    if not is_proposals and (not tasks or set(tasks) - set(known)):
        raise ValueError(
            f"{name} is evaluated as {kind}, for tasks of {known}, got {tasks}. Change "
            "dataloader.evaluator.tasks."
        )
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    if kind == "lvis":
        try:
            return _LVISEvaluator(name, None if is_proposals else tasks, output_dir=output_dir)
        except ImportError as error:
            raise ImportError(f"{name} is evaluated by LVIS's package: pip install lvis") from error
    if tasks == ["bbox"]:
        return CompactCOCOEvaluator(name, output_dir, use_fast_impl)
    options = dict(output_dir=output_dir, use_fast_impl=use_fast_impl)
    return COCOEvaluator(name, None if is_proposals else tasks, **options)
