"""tools/benchmark.py: its output, and that the compared work is equal."""

import json

import benchmark
import pytest
import torch
from _benchmark import parts, report, timing
from _benchmark.cases import Contestant, Options
from _benchmark.whole_models import detectors
from _reference_models import has_fcos
from conftest import REPO, run_tool
from torch import nn

from detectron2.utils.events import EventStorage

CPU = torch.device("cpu")
NAMES = ["ATSS", "RetinaNet"] + (["FCOS"] if has_fcos() else [])


def tiny_options(**changes):
    options = dict(
        device=CPU, image_size=(96, 128), objects=[1, 3], batch_sizes=[2], num_classes=5,
        no_growth=True, model="toy/atss_toy",
    )  # fmt: skip
    return Options(**{**options, **changes})


@pytest.fixture(autouse=True)
def event_storage():
    with EventStorage(0):
        yield


def test_tool_writes_tables_json_plot_and_page(tmp_path):
    page = tmp_path / "page.md"
    names = ["assign", "loss", "post", "deform_conv", "train", "inference", "steps"]
    page.write_text(
        "Before.\n" + "".join(f"<!-- benchmark {n} -->\nstale\n<!-- end -->\n" for n in names)
        + "After.\n"
    )  # fmt: skip
    arguments = [
        *names, "--image-size", "64x96", "--objects", 1, 20, "--batch-sizes", 1, "--output", "out",
        "--num-classes", 3, "--repeats", 1, "--model", "toy/atss_toy", "--threads", 1,
    ]  # fmt: skip
    text = run_tool("benchmark", [*arguments, "--markdown", page], tmp_path)
    assert ("FCOS is skipped" in text) == (not has_fcos())

    result = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert {row["part"] for row in result["rows"]} == set(names)
    assert result["environment"]["torch"] == torch.__version__
    assert result["arguments"]["image_size"] == [64, 96]
    assert result["arguments"]["device"] == "cpu"
    for row in result["rows"]:
        for measured in row["contestants"].values():
            assert 0 < measured["min_ms"] <= measured["median_ms"]
            assert measured["peak_bytes"] > 0
    for row in result["rows"][-3:]:
        shares = [m["outside_convolution"] for m in row["contestants"].values()]
        assert all(0 < share < 1 for share in shares)
        assert any("prepared" in name for name in row["contestants"]) == (row["part"] != "train")
    # Growth with objects, image size and classes has several points each.
    sizes = {row["settings"]["size"] for row in result["rows"] if row["part"] == "assign"}
    assert len(sizes) == 3
    assert (tmp_path / "out/benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    written = page.read_text()
    assert written.startswith("Before.\n") and written.endswith("After.\n")
    assert "stale" not in written and written.count("| ATSS") >= 2
    del arguments[(start := arguments.index("--output")) : start + 2]
    assert f"`python tools/benchmark.py {' '.join(map(str, arguments))}`: " in written
    assert str(tmp_path) not in written and "RetinaNet / ATSS" in written


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["speed"], "Unknown part 'speed'; known are .'assign', 'loss'"),
        (["assign", "--device", "cuda"], "--device cuda needs a GPU"),
        (["assign", "--clock", "process", "--threads", "2"], "--clock process .* --threads 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        benchmark.main(benchmark.make_parser().parse_args(arguments))


def test_size_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.make_parser().parse_args(["assign", "--image-size", "800"])
    assert "write HEIGHTxWIDTH, such as 800x1344, not '800'" in capsys.readouterr().err


def test_page_of_the_docs_has_a_block_for_every_part_and_device(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text((REPO / "docs/performance.md").read_text())
    names = [part + device for part in benchmark.CASES for device in ("", " cuda")]
    report.update_page(page, {name: f"<{name}>" for name in names})
    assert all(f"<{name}>" in page.read_text() for name in names)


def test_page_without_the_block_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark loss -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no block '<!-- benchmark assign -->'"):
        report.update_page(page, {"assign": "x"})


def test_assignment_covers_the_same_anchors_and_objects():
    for case in parts.assign_cases(tiny_options()):
        counts = set()
        for contestant in case.contestants:
            result = contestant.call(None)
            if contestant.name == "ATSS":
                counts.add(tuple(result.assignment.match_labels.shape))
                assert result.assignment.is_positive.any()
                continue
            labels = torch.stack(result[0])
            counts.add(tuple(labels.shape))
            assert ((labels >= 0) & (labels < 5)).any(), contestant.name  # somebody is positive
        assert len(counts) == 1, counts


def test_losses_are_as_many_as_detectron2s_and_reach_every_prediction():
    (case,) = parts.loss_cases(tiny_options())
    losses = {contestant.name: contestant.call(None) for contestant in case.contestants}
    assert list(losses) == NAMES
    expected = {"ATSS": 3, "RetinaNet": 2, "FCOS": 3}  # RetinaNet has no centerness
    assert {name: len(values) for name, values in losses.items()} == {n: expected[n] for n in NAMES}
    for values in losses.values():
        assert all(torch.isfinite(value) for value in values.values())
    logits = 2 * 5 * sum(h * w for h, w in parts.grid_sizes_of((96, 128)))
    assert case.unit_bytes == 4 * logits


@pytest.mark.skipif(not has_fcos(), reason="this Detectron2 has no FCOS")
def test_post_processing_of_both_finds_the_same_detections():
    cases = list(parts.post_cases(tiny_options(image_size=(256, 320), num_classes=20)))
    for case in cases:
        results = {c.name: c.call(c.prepare()) for c in case.contestants}
        for ours, theirs in zip(results["ATSS"], results["FCOS"]):
            assert len(ours) == len(theirs) == 100
            torch.testing.assert_close(ours.scores, theirs.scores)
            assert torch.equal(ours.pred_classes, theirs.pred_classes)
            boxes, others = ours.pred_boxes.tensor, theirs.pred_boxes.tensor
            torch.testing.assert_close(boxes, others, atol=1e-3, rtol=0)


def test_whole_models_have_equal_backbones_and_classes():
    built = detectors(tiny_options())
    assert list(built) == ["ATSS"] + (["FCOS"] if has_fcos() else []) + ["RetinaNet"]
    shapes = {
        name: [tuple(p.shape) for p in model.backbone.parameters()] for name, model in built.items()
    }
    assert all(shape == shapes["ATSS"] for shape in shapes.values())
    assert {model.num_classes if name != "ATSS" else model.proposal_generator.num_classes
            for name, model in built.items()} == {5}  # fmt: skip


def test_memory_counts_temporaries_and_not_what_was_there_before():
    x = torch.zeros(1024, 256)  # 1 MiB
    one = Contestant("one", lambda _: x + 1)
    two = Contestant("two", lambda _: (x + 1).mul(2).sum())  # two live at once
    again = Contestant("again", lambda y: y.add_(1), prepare=lambda: x.clone())
    peaks = [timing.peak_extra_bytes(contestant, CPU) / 2**20 for contestant in (one, two, again)]
    assert peaks == pytest.approx([1, 2, 0], abs=0.01)


def test_contestants_take_turns_with_inputs_of_their_own():
    order, seen = [], []

    def contestant(name):
        return Contestant(name, lambda value: (order.append(name), seen.append(id(value))),
                                 prepare=lambda: [name])  # fmt: skip

    result = timing.race([contestant("a"), contestant("b")], CPU, repeats=2, warmup=1, memory=False)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert result["a"].rounds == 2 and result["a"].min_ms <= result["a"].median_ms
    assert result["a"].peak_bytes is None


def test_share_outside_convolution_is_that_of_the_other_work():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.rand(1, 64, 64, 64)
    only = Contestant("only", lambda _: conv(x))
    none = Contestant("none", lambda _: x.sort())
    assert timing.share_outside_convolution(only, CPU) < 0.5
    assert timing.share_outside_convolution(none, CPU) == 1
