"""COCO's result format and metrics, by pycocotools or by faster-coco-eval."""

import contextlib
import io
import json
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, TextIO

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

_BLOCK = 10_000  # detections that are Python numbers at a time


class CocoApi(NamedTuple):
    """An implementation of COCO's metrics.

    Attributes:
        name: of its package.
        COCO: class of ground truth and results.
        COCOeval: makes what evaluates: called with ground truth, results and "bbox".
    """

    name: str
    COCO: Callable[..., Any]
    COCOeval: Callable[..., Any]


def choose_coco_api(use_fast_impl: bool = True) -> CocoApi:
    """faster-coco-eval, which has the same AP in less time, where it is wanted and installed."""
    if use_fast_impl:
        with contextlib.suppress(ImportError):
            import faster_coco_eval as fast

            return CocoApi("faster-coco-eval", fast.COCO, _make_fast_eval)
    return CocoApi("pycocotools", COCO, COCOeval)


def _make_fast_eval(*args: Any) -> Any:
    from faster_coco_eval import COCOeval_faster

    # With its table on standard output, as that of pycocotools.
    return COCOeval_faster(*args, print_function=print, extra_calc=False)


def index_coco(api: CocoApi, dataset: Dict[str, Any]) -> Any:
    """The `api.COCO` of the content of a COCO file, without its messages."""
    coco = api.COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def coco_results(
    records: np.ndarray, image_ids: Sequence[Any], category_ids: np.ndarray
) -> Iterator[Dict[str, Any]]:
    """Detections in COCO's result format, one after the other.

    Args:
        records: (D,) of type `DETECTION`.
        image_ids: id of each image of the records.
        category_ids: id of each label of the records.
    """
    for start in range(0, len(records), _BLOCK):
        block = records[start : start + _BLOCK]
        columns = (block["image"], category_ids[block["label"]], block["box"], block["score"])
        for image, category_id, box, score in zip(*(column.tolist() for column in columns)):
            yield {
                "image_id": image_ids[image],
                "category_id": category_id,
                "bbox": box,
                "score": score,
            }


def write_coco_results(file: TextIO, results: Iterator[Dict[str, Any]]) -> None:
    """Write results as one JSON list, as `json.dump` would, without holding all."""
    separator = "["
    for result in results:
        file.write(separator + json.dumps(result))
        separator = ", "
    file.write("[]" if separator == "[" else "]")


def evaluate_boxes(
    api: CocoApi,
    ground_truth: Any,
    results: Iterator[Dict[str, Any]],
    img_ids: Optional[Sequence[Any]] = None,
) -> Any:
    """The evaluator of `api` after its work: `stats` and `eval["precision"]` are known.

    Args:
        api: that of `ground_truth`.
        ground_truth: of `index_coco`.
        results: of `coco_results`.
        img_ids: evaluate these images only.
    """
    # As `ground_truth.loadRes`, which would also make a polygon of each box.
    annotations = [
        {**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for i, result in enumerate(results, start=1)
    ]
    dataset = {key: ground_truth.dataset[key] for key in ("images", "categories")}
    found = index_coco(api, {**dataset, "annotations": annotations})
    evaluator = api.COCOeval(ground_truth, found, "bbox")
    if img_ids is not None:
        evaluator.params.imgIds = list(img_ids)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator
