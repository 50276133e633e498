#!/usr/bin/env python
"""Time and memory of evaluation: many made detections, and ours compared with Detectron2's.

Each part runs in new processes and is written to evaluation.json in the output folder; what is
there with the same settings is not run again::

    python tools/stress/evaluation.py --output output/stress/evaluation
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from atss.evaluation import CompactCOCOEvaluator, CompactDetections
from atss.evaluation.coco_api import choose_coco_api, coco_results, write_coco_results
from atss.training.launch import launch

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

DATA_SET = "made_for_evaluation"
EVALUATORS = {
    "ours, pycocotools": lambda: CompactCOCOEvaluator(DATA_SET, use_fast_impl=False),
    "ours, faster-coco-eval": lambda: CompactCOCOEvaluator(DATA_SET),
    "Detectron2": lambda: COCOEvaluator(DATA_SET, ["bbox"], output_dir=None),
}
SIZE = 640


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) corners of boxes in an image, with log-uniform sides of 8 to 300 pixels."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    starts = rng.uniform(0, 1, (count, 2)) * (SIZE - sides)
    return np.concatenate([starts, starts + sides], axis=1).astype(np.float32)


def make_ground_truth(num_images: int, num_classes: int = 80) -> Dict[str, Any]:
    """A COCO data set: 0 to 14 objects in each image, one of 20 a crowd; ids have gaps."""
    annotations: List[Dict[str, Any]] = []
    for image in range(num_images):
        rng = np.random.default_rng((0, image))
        boxes = random_boxes(rng, rng.integers(15)).astype(np.float64)
        for x1, y1, x2, y2 in boxes.tolist():
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 3 * image + 7,
                    "category_id": 2 * int(rng.integers(num_classes)) + 1,
                    "bbox": [x1, y1, width, height],
                    "area": width * height * rng.uniform(0.5, 1),
                    "iscrowd": int(rng.uniform() < 0.05),
                }
            )
    images = [
        {"id": 3 * image + 7, "width": SIZE, "height": SIZE, "file_name": f"{image}.jpg"}
        for image in range(num_images)
    ]
    categories = [{"id": 2 * k + 1, "name": f"class {k}"} for k in range(num_classes)]
    return {"images": images, "categories": categories, "annotations": annotations}


def make_detections(
    image_id: int, count: int, objects: Sequence[Dict[str, Any]] = (), num_classes: int = 80
) -> Instances:
    """Detections of an image: its objects, moved, some in a wrong class, and random boxes."""
    rng = np.random.default_rng((1, image_id))
    boxes, labels = random_boxes(rng, count), rng.integers(num_classes, size=count)
    for i, item in enumerate(objects[:count]):
        box = np.array(item["bbox"], np.float32)
        box[2:] += box[:2]
        boxes[i] = box + rng.normal(0, 0.08, 4) * np.sqrt(item["area"])
        if rng.uniform() < 0.9:
            labels[i] = item["category_id"] // 2
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    found = Instances((SIZE, SIZE))
    found.pred_boxes = Boxes(torch.from_numpy(boxes))
    # Few different values: ties must not matter.
    found.scores = torch.from_numpy(rng.integers(1, 1000, count).astype(np.float32) / 1000)
    found.pred_classes = torch.from_numpy(labels)
    return found


def register(ground_truth: Dict[str, Any], json_file: Path, name: str = DATA_SET) -> None:
    """Register a made data set, which lies or will lie in a file, for evaluation."""
    ids = {item["id"]: i for i, item in enumerate(ground_truth["categories"])}
    names = [item["name"] for item in ground_truth["categories"]]
    MetadataCatalog.get(name).set(
        json_file=str(json_file), thing_dataset_id_to_contiguous_id=ids, thing_classes=names
    )


def peak_memory() -> float:
    """Most memory of this process until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def collect(args: argparse.Namespace) -> Dict[str, Any]:
    """Collect, gather and write `args.detections`; runs in every process."""
    before = peak_memory()
    share = args.detections // comm.get_world_size()
    per_image, detections = args.detections_per_image, CompactDetections()
    made = make_detections(0, per_image)
    start = time.perf_counter()
    for image in range(share // per_image):
        image_id = image * comm.get_world_size() + comm.get_rank()
        detections.add(image_id, made.pred_boxes.tensor, made.scores, made.pred_classes)
    result = {"adding, s": time.perf_counter() - start}
    start = time.perf_counter()
    gathered = detections.gather()
    result["gathering, s"] = time.perf_counter() - start
    result["memory above start, MB"] = peak_memory() - before
    if gathered is None:
        return result
    records, image_ids = gathered.records, gathered.image_ids
    result["detections"], result["MB of them"] = len(records), records.nbytes / 2**20
    file, start = args.output / "made_results.json", time.perf_counter()
    with open(file, "w") as opened:
        write_coco_results(opened, coco_results(records, image_ids, np.arange(80)))
    result["writing JSON, s"] = time.perf_counter() - start
    result["JSON, MB"] = file.stat().st_size / 2**20
    result["memory above start with writing, MB"] = peak_memory() - before
    file.unlink()
    return result


def evaluate(args: argparse.Namespace) -> Dict[str, Any]:
    """Evaluate the made set with the evaluator `args.part`; runs in every process."""
    ground_truth, json_file = make_ground_truth(args.images), args.output / "made.json"
    register(ground_truth, json_file)
    objects = defaultdict(list)
    for item in ground_truth["annotations"]:
        objects[item["image_id"]].append(item)
    image_ids = [image["id"] for image in ground_truth["images"]]
    image_ids = image_ids[comm.get_rank() :: comm.get_world_size()]
    if comm.is_main_process():
        json_file.write_text(json.dumps(ground_truth))
    del ground_truth
    comm.synchronize()
    before = peak_memory()
    start = time.perf_counter()
    evaluator = EVALUATORS[args.part]()
    evaluator.reset()
    result = {"reading annotations, s": time.perf_counter() - start, "keeping detections, s": 0.0}
    for image_id in image_ids:
        found = make_detections(image_id, args.detections_per_image, objects[image_id])
        start = time.perf_counter()
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
        result["keeping detections, s"] += time.perf_counter() - start
    comm.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    values = evaluator.evaluate()
    result["gathering and metrics, s"] = time.perf_counter() - start
    # Differs from the line before where other programs use the machine.
    result["gathering and metrics, s of CPU"] = time.process_time() - start_cpu
    result["memory above start, MB"] = peak_memory() - before
    return {**result, "values": values.get("bbox")}


def run_part(args: argparse.Namespace, file: str) -> None:
    """What each process runs; the main one writes the result."""
    result = (evaluate if args.part in EVALUATORS else collect)(args)
    if comm.is_main_process():
        Path(file).write_text(json.dumps(result))


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/stress/evaluation"))
    parser.add_argument("--detections", type=int, default=20_000_000, help="to be collected")
    parser.add_argument("--images", type=int, default=5000, help="of the whole evaluation")
    parser.add_argument("--detections-per-image", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in the process of that part
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Run what is missing; returns the results of all parts."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    results_file, part_file = args.output / "evaluation.json", args.output / "part.json"
    if args.part:
        launch(run_part, args.processes, device="cpu", args=(args, str(part_file)))
        return {}
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "part")}
    if results.get("settings", settings) != settings:
        raise SystemExit(f"{results_file} has other settings: {results['settings']}.")
    results["settings"] = settings
    for part in ["collection", *EVALUATORS]:
        if "faster" in part and choose_coco_api().name == "pycocotools":
            print("faster-coco-eval is not installed: skipped")
        elif part not in results:
            options = sys.argv[1:] if argv is None else argv
            command = [sys.executable, __file__, *options, "--part", part]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
            results[part] = {**json.loads(part_file.read_text()), "date": str(date.today())}
            part_file.unlink()
            results_file.write_text(json.dumps(results, indent=1))
        show(part, results.get(part, {}), args)
    found = [results[part]["values"] for part in EVALUATORS if part in results]
    for values in found[1:]:
        # NaN, of areas without objects, equals NaN.
        np.testing.assert_allclose(list(values.values()), list(found[0].values()), rtol=1e-12)
    print(f"{len(found)} evaluators, equal values: AP {found[0]['AP']:.3f}")
    return results


def show(part: str, result: Dict[str, Any], args: argparse.Namespace) -> None:
    """Print a part; times of an evaluation also for 20 million detections, in proportion."""
    print(part)
    factor = 20_000_000 / (args.images * args.detections_per_image)
    for key, value in result.items():
        if isinstance(value, float):
            is_whole = part in EVALUATORS and not key.startswith("reading")
            more = f" (extrapolated to 20 million: {value * factor:,.0f})" if is_whole else ""
            print(f"  {key:40} {value:12,.1f}{more}")


if __name__ == "__main__":
    main()
