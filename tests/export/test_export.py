"""An exported file says what the model says, for every size, content and number of boxes."""

import functools
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from atss.anchors import GridAnchorGenerator, octave_sizes
from atss.box_regression import PointToBoxTransform
from atss.export import (
    FORMATS,
    STAGES,
    collect_metadata,
    compare_with_eager,
    export_onnx,
    export_program,
    export_torchscript,
    first_stage_that_differs,
    modules,
    spread_scores,
    write_metadata,
)
from atss.export.comparison import synthetic_image
from atss.export.matching import match_detections
from atss.export.modules import detect_as_tensors, frozen_copy
from atss.postprocessing import DetectionSelector
from conftest import REPO, tiny_detector
from test_two_stage import lazy_model
from torch import nn

import detectron2.data.transforms as T
from detectron2.export.flatten import TracingAdapter
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

TRACED = (96, 130)
# With levels of one location; odd; portrait; larger than traced.
SIZES = [(33, 40), (97, 131), (200, 90), (250, 330)]
RAW_SIZE = (160, 224)
LEVEL_STRIDES = (8, 32, 128)


class ThreeLevels(Backbone):
    """The smallest pyramid that reaches stride 128: torch.export takes seconds per level."""

    def __init__(self, channels=64):
        super().__init__()
        steps = [nn.Conv2d(3, channels, 8, stride=8)]
        steps += [nn.Conv2d(channels, channels, 5, stride=4, padding=2) for _ in range(2)]
        self.steps = nn.ModuleList(steps)
        self.channels = channels

    @property
    def size_divisibility(self):
        return 32

    def forward(self, x):
        features = {}
        for stride, step in zip(LEVEL_STRIDES, self.steps):
            x = step(x).relu()
            features[f"s{stride}"] = x
        return features

    def output_shape(self):
        return {f"s{s}": ShapeSpec(channels=self.channels, stride=s) for s in LEVEL_STRIDES}


def detector(num_anchors=1, **changes):
    """Random weights with scores that spread; on an even image of the mean colour, no detection."""
    head = dict(num_levels=3, num_anchors=num_anchors, **changes.pop("head", {}))
    generator = GridAnchorGenerator(
        sizes=octave_sizes(LEVEL_STRIDES, scales_per_octave=3 if num_anchors == 9 else 1),
        aspect_ratios=[0.5, 1.0, 2.0] if num_anchors == 9 else [1.0],
        strides=list(LEVEL_STRIDES),
    )
    torch.manual_seed(0)
    model = tiny_detector(
        backbone=ThreeLevels(),
        head=head,
        anchor_generator=generator,
        in_features=[f"s{s}" for s in LEVEL_STRIDES],
        **changes,
    ).eval()
    for name, parameter in model.named_parameters():
        # Without biases an even image gives zeros up to the predictors.
        if name.endswith(".bias") and not name.endswith("bbox_pred.bias"):
            nn.init.zeros_(parameter)
    spread_scores(model, (128, 160))
    nn.init.constant_(model.proposal_generator.head.cls_logits.bias, -4.0)
    return model


VARIANTS = {
    "box": {},
    "point": dict(box2box_transform=PointToBoxTransform(), head=dict(bbox_bias=4.0)),
    "no centerness": dict(head=dict(centerness=False)),
    "product of scores": dict(selector=DetectionSelector(sqrt_score=False)),
    "converted weights": dict(box_offset=0.5),
    "deformable": dict(head=dict(deformable=True)),
    "nine anchors": dict(num_anchors=9),
    # Thousands of candidates: torchvision's batched_nms then takes another way if not traced.
    "80 classes, all kept": dict(
        num_classes=80, selector=DetectionSelector(score_thresh=0.01, detections_per_image=-1)
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return detector(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def model():
    return detector(
        num_classes=20,
        head=dict(deformable=True),
        selector=DetectionSelector(detections_per_image=300),
    )


@pytest.fixture(scope="module")
def traced(model):
    return export_torchscript(model, example_size=TRACED)


@pytest.fixture(scope="module")
def contents():
    """Images of one size without candidates, with some, and with thousands."""
    none = torch.full((1, 3, 160, 224), 127.0)
    many = synthetic_image((160, 224), seed=5)[None]
    some = none.clone()
    some[..., 32:44, 40:52] = many[..., 32:44, 40:52]
    return none, some, many


def assert_agrees(model, run, sizes=tuple(SIZES), **options):
    rows = compare_with_eager(model, run, sizes, **options)
    assert all(row.passed for row in rows), rows
    assert all(row.num_eager > 0 for row in rows), rows


def assert_right_for(contents, model, run):
    counts = []
    for image in contents:
        [row] = compare_with_eager(model, run, [tuple(image.shape[2:])], image=image[0])
        assert row.passed, row
        counts.append(row.num_eager)
    assert counts[0] == 0 < counts[1] < counts[2] == 300, counts


def device_constants(traced):
    for module in traced.modules():
        try:
            nodes = module.graph.findAllNodes("prim::Constant", recurse=True)
        except RuntimeError:
            continue  # a list of modules
        yield from (node for node in nodes if str(node.output().type()) == "Device")


def test_torchscript_agrees_for_every_kind_of_detector(variant):
    traced = export_torchscript(variant, example_size=TRACED)

    assert_agrees(variant, traced)
    assert not list(device_constants(traced))


def test_number_of_candidates_goes_from_none_to_thousands(model, contents, traced):
    core = model.proposal_generator
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([{"image": contents[2][0]}]).tensor)
        logits = core.head([features[name] for name in core.in_features]).logits
    assert sum(int((level.sigmoid() > 0.05).sum()) for level in logits) > 2000
    assert_right_for(contents, model, traced)


def test_file_traced_on_an_image_without_candidates_finds_them_elsewhere(model, contents):
    adapter = TracingAdapter(model, contents[0], inference_func=detect_as_tensors)
    traced = torch.jit.trace(adapter, contents[0], check_trace=False)

    assert_right_for(contents, model, traced)


@pytest.mark.parametrize("size, other", [((32, 32), (300, 340)), ((300, 340), (32, 32))])
def test_size_of_the_example_is_not_frozen(model, size, other):
    assert_agrees(model, export_torchscript(model, example_size=size), [other])


def test_batches_of_a_fixed_number(model):
    assert_agrees(model, export_torchscript(model, batch_size=3), batch_size=3)
    other = detector(num_anchors=9)
    program = export_program(other, batch_size=2, example_size=TRACED).module()
    assert_agrees(other, program, batch_size=2)


def test_detectron2s_tracing_adapter_works_on_the_model_itself(model):
    def batch(*sizes):
        return [
            {
                "image": synthetic_image(size, seed=i),
                "height": torch.tensor(size[0] * 2),
                "width": torch.tensor(size[1] * 3),
            }
            for i, size in enumerate(sizes)
        ]

    adapter = TracingAdapter(model, batch((64, 80), (100, 50)))
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    inputs = batch((131, 250), (97, 333))
    flat = TracingAdapter(model, inputs).flattened_inputs
    outputs = adapter.outputs_schema(traced(*flat))
    numbers = [{k: v if k == "image" else int(v) for k, v in image.items()} for image in inputs]
    with torch.no_grad():
        expected = model(numbers)

    # Detectron2 main makes the batch on the CPU and moves it; nothing else may know a device.
    uses = [use.user.kind() for node in device_constants(traced) for use in node.output().uses()]
    assert set(uses) <= {"aten::new_full"}, uses
    for found, wanted in zip(outputs, expected):
        found, wanted = found["instances"], wanted["instances"]
        assert len(wanted) > 0
        torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, wanted.scores)
        assert found.pred_classes.tolist() == wanted.pred_classes.tolist()


@pytest.mark.parametrize("kind", ["faster", "mask", "cascade"])
def test_two_stage_detectors_export_to_torchscript(kind, tmp_path):
    model = lazy_model(kind).eval()
    spread_scores(model)
    traced = export_torchscript(model, tmp_path / "model.pt", example_size=TRACED)

    assert_agrees(model, traced, [(60, 70), (200, 150)])
    assert not list(device_constants(traced))
    names = [o["name"] for o in collect_metadata(model, "model.pt", "torchscript")["outputs"]]
    assert names == ["boxes", "scores", "classes"] + ["masks"] * (kind == "mask")


@pytest.mark.parametrize("name", ["box", "no centerness"])
def test_raw_heads_have_fixed_shapes_and_agree(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = detector(**VARIANTS[name])
    file = tmp_path / "raw.onnx"
    export_onnx(model, file, example_size=RAW_SIZE, stage="raw heads", dynamic=False)

    assert_agrees(model, FORMATS["onnx"].load(file), [RAW_SIZE] * 2, stage="raw heads")
    graph = onnx.load(file).graph
    shapes = [
        [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    ]
    num_anchors = sum(-(-160 // s) * -(-224 // s) for s in LEVEL_STRIDES)
    expected = [[1, 3, *RAW_SIZE], [1, num_anchors, 3], [1, num_anchors, 4], [1, num_anchors]]
    assert shapes == expected[: 3 if name == "no centerness" else 4]
    metadata = collect_metadata(model, file, "onnx", stage="raw heads", fixed_size=RAW_SIZE)
    assert sum(metadata["anchors_per_level"]) == num_anchors

    traced = export_torchscript(model, example_size=TRACED, stage="raw heads")
    assert_agrees(model, traced, [(33, 40), (250, 330)], stage="raw heads")


FAULTS = {
    "features": lambda model: model.backbone.steps[0].weight[0].mul_(2),
    "raw heads": lambda model: model.proposal_generator.head.bbox_pred.bias.add_(0.1),
    "candidates": lambda model: setattr(model.proposal_generator.selector, "score_thresh", 0.1),
    "detections": lambda model: setattr(model.proposal_generator.selector, "nms_thresh", 0.9),
}


@pytest.fixture
def fault(request, monkeypatch):
    """Stage in which everything exported in the test has a fault."""

    def faulty_copy(model, two_stage=False):
        copied = frozen_copy(model, two_stage)
        FAULTS[request.param](copied)
        return copied

    monkeypatch.setattr(modules, "frozen_copy", faulty_copy)
    return request.param


@pytest.mark.parametrize(
    "fault, name, options, sizes",
    [
        *((stage, "torchscript", {}, SIZES) for stage in FAULTS),
        ("raw heads", "export", {}, SIZES),
        ("candidates", "onnx", dict(dynamic=False), [TRACED]),
    ],
    indirect=["fault"],
)
def test_first_stage_that_differs_is_named(fault, name, options, sizes):
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = detector()
    export = functools.partial(FORMATS[name].export, model, example_size=TRACED, **options)
    compare = functools.partial(compare_with_eager, model, sizes=sizes)

    if name == "torchscript":  # the others take seconds more
        assert not all(row.passed for row in compare(export()))
    assert first_stage_that_differs(export, compare, name) == fault


def test_every_stage_of_a_right_file_agrees_in_batches_of_any_size(model):
    for stage in STAGES:
        traced = export_torchscript(model, batch_size=2, example_size=TRACED, stage=stage)
        assert_agrees(model, traced, batch_size=2, stage=stage)


# What docs/deploy.md tells people to do, in processes without our code. Export takes seconds, so
# one test asks all questions about a file.

BLOCKED = """
import sys
for name in {names}:
    sys.modules[name] = None
"""


def blocks():
    """Python code of docs/deploy.md by the heading above it."""
    text = (REPO / "docs/deploy.md").read_text()
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    found = {title: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
             for title, part in zip(parts[1::2], parts[2::2])}  # fmt: skip
    return {title: code[0] for title, code in found.items() if code}


def run_documented(folder, blocked, *titles):
    """Boxes, scores and classes after each of the blocks."""
    code = BLOCKED.format(names=list(blocked)) + blocks()["Before the model"]
    for i, title in enumerate(titles):
        code += blocks()[title]
        code += f"\nnp.savez('{i}.npz', boxes=boxes, scores=scores, classes=classes)\n"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return [np.load(folder / f"{i}.npz") for i in range(len(titles))], process.stdout


def expected_in(model, file, short_edge):
    """Detections of the model in the pixels of an image file, by Detectron2's own pipeline."""
    image = cv2.imread(str(file))
    resize = T.ResizeShortestEdge(short_edge, 1333).get_transform(image)
    pixels = torch.as_tensor(resize.apply_image(image).astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        inputs = {"image": pixels, "height": image.shape[0], "width": image.shape[1]}
        return model([inputs])[0]["instances"]


def write_inputs(folder, model, **options):
    """Write what docs/deploy.md reads, model.onnx.json and image.png; what must be found there."""
    rule = {"short_edge": 120, "long_edge_at_most": 1333}
    names = [f"class {i}" for i in range(model.proposal_generator.num_classes)]
    file = folder / "model.onnx"
    metadata = collect_metadata(model, file, "any", resize=rule, class_names=names, **options)
    write_metadata(metadata, file)
    image = synthetic_image((150, 200), seed=3).permute(1, 2, 0).byte().numpy()
    cv2.imwrite(str(folder / "image.png"), image)
    return expected_in(model, folder / "image.png", 120)


def assert_same_detections(found, wanted):
    assert len(wanted) > 0
    expected = (wanted.pred_boxes.tensor, wanted.scores, wanted.pred_classes)
    tensors = [torch.as_tensor(found[name]) for name in ("boxes", "scores", "classes")]
    match = match_detections(expected, tensors)
    assert match.num_unmatched == 0, match


def test_torch_files_agree_and_run_as_documented_without_our_code(
    model, contents, traced, tmp_path
):
    traced.save(tmp_path / "model.pt")
    program = export_program(model, tmp_path / "model.pt2", example_size=TRACED).module()
    assert_agrees(model, program)
    assert_right_for(contents, model, program)

    wanted = write_inputs(tmp_path, model)
    blocked = ("detectron2", "atss", "fvcore", "omegaconf")
    results, output = run_documented(tmp_path, blocked, "TorchScript", "torch.export")
    for found in results:
        assert_same_detections(found, wanted)
    assert output.splitlines()[0].startswith(f"class {int(wanted.pred_classes[0])} ")


def test_onnx_files_agree_and_run_as_documented_with_onnxruntime_alone(model, contents, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_onnx(model, tmp_path / "model.onnx", example_size=TRACED)
    run = FORMATS["onnx"].load(tmp_path / "model.onnx")
    assert_agrees(model, run)
    assert_right_for(contents, model, run)

    blocked = ("detectron2", "atss", "torch", "torchvision", "onnx", "onnxscript")
    wanted = write_inputs(tmp_path, model)
    [found], _ = run_documented(tmp_path, blocked, "ONNX")
    assert_same_detections(found, wanted)

    # The image fills the file's size up to a multiple of 32, so that padding is the model's own.
    raw_heads = dict(example_size=(128, 160), stage="raw heads", dynamic=False)
    export_onnx(model, tmp_path / "model.onnx", **raw_heads)
    wanted = write_inputs(tmp_path, model, stage="raw heads", fixed_size=(128, 160))
    [found], _ = run_documented(tmp_path, blocked, "Raw heads, for runtimes without NMS")
    assert_same_detections(found, wanted)
