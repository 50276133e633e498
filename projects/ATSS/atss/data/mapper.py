"""Detectron2's mapper, with a sentence about an image that it cannot read."""

from typing import Any, Dict

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError


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
