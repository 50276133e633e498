"""Detectron2's mapper and evaluator, with sentences about what they cannot take."""

from typing import Any, Dict, Optional, Sequence

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation import COCOEvaluator


class NamingMapper(DatasetMapper):
    """Detectron2's mapper, which names the image that it cannot read.

    Raises:
        ValueError: when called, for such an image.
    """

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        file = dataset_dict.get("file_name")
        try:
            return super().__call__(dataset_dict)
        except (OSError, SizeMismatchError, SyntaxError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"{file} cannot be read: {reason}. Replace the file, or remove it from the "
                "annotations."
            ) from error


def coco_evaluator(
    dataset_names: Sequence[str], tasks: Sequence[str], output_dir: Optional[str] = None
) -> COCOEvaluator:
    """Detectron2's evaluation of the one set that a loader's list names.

    Raises:
        ValueError: for another number of sets.
    """
    if len(dataset_names) != 1:
        raise ValueError(
            f"The evaluation needs one data set, got {list(dataset_names)}. Change "
            "dataloader.test.dataset.names."
        )
    return COCOEvaluator(dataset_names[0], list(tasks), output_dir=output_dir)
