"""tools/export_model.py: what it writes, and what it says when it cannot."""

import json
import subprocess
import sys

import cv2
import export_model
import pytest
import torch
from atss.export import export_onnx
from atss.export.comparison import synthetic_image
from atss.export.onnx_files import load_onnx
from atss.model_zoo import get
from conftest import REPO, tiny_detector

TOY = ["--zoo", "toy/atss_toy"]
RANDOM = [*TOY, "--random-weights"]


FAULTY_HEAD = """
from atss.export import modules
right_copy = modules.frozen_copy
def faulty_copy(model, two_stage=False):
    copied = right_copy(model, two_stage)
    copied.proposal_generator.head.cls_logits.bias.add_(0.1)
    return copied
modules.frozen_copy = faulty_copy
"""


def run_tool(*arguments, before=""):
    """The tool in a process of its own, after some lines of code."""
    run = "runpy.run_path('tools/export_model.py', run_name='__main__')"
    code = f"{before}\nimport runpy, sys; sys.path.insert(0, 'tools'); {run}"
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO)


def test_yaml_config_exports_with_table_and_metadata(tmp_path):
    options = ["--config-file", "configs/toy/atss_toy.yaml", "--random-weights", "--batch-size", 2]
    output = ["--format", "torchscript", "--output", tmp_path / "toy.pt"]
    overrides = ["MODEL.ATSS.SCORE_THRESH", 0.2]
    process = run_tool(*options, *output, *overrides)

    assert process.returncode == 0, process.stderr
    table = process.stdout.splitlines()
    assert "eager" in table[0] and all(line.endswith("ok") for line in table[1:5])
    described = json.loads((tmp_path / "toy.pt.json").read_text())
    assert described["file"] == "toy.pt" and described["input"]["shape"][0] == 2
    assert described["score"]["threshold"] == 0.2
    assert described["class_names"][0] == "rectangle"
    assert {path.name for path in tmp_path.iterdir()} == {"toy.pt", "toy.pt.json"}
    boxes, scores, _, image_idxs = torch.jit.load(tmp_path / "toy.pt")(torch.zeros(2, 3, 70, 90))
    assert len(boxes) == len(scores) == len(image_idxs)


def test_file_that_differs_from_the_model_is_not_kept_and_exits_with_1(tmp_path):
    output = tmp_path / "toy.pt"
    output.write_bytes(b"earlier")
    process = run_tool(*RANDOM, "--format", "torchscript", "--output", output, before=FAULTY_HEAD)

    assert process.returncode == 1, process.stderr
    assert process.stdout.count("FAILED") == 4 and "not kept" in process.stdout
    assert process.stdout.splitlines()[-1] == "First stage that differs: raw heads."
    assert output.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_lazy_config_exports_weights_and_raw_heads(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = get("toy/atss_toy", device="cpu")
    torch.nn.init.constant_(model.proposal_generator.head.cls_logits.bias, 1.25)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    image = synthetic_image((90, 120)).permute(1, 2, 0).byte().numpy()
    cv2.imwrite(str(tmp_path / "image.png"), image)
    code = export_model.main(
        ["--config-file", str(REPO / "configs/toy/atss_toy.py"), "--raw-heads"]
        + ["--weights", str(tmp_path / "weights.pth"), "--format", "onnx", "--size", "64", "96"]
        + ["--output", str(tmp_path / "raw.onnx"), "--class-names", "a,b,c,d,e,f"]
        + ["--check-image", str(tmp_path / "image.png"), "model.head.num_convs=2"]
    )

    assert code == 0
    described = json.loads((tmp_path / "raw.onnx.json").read_text())
    assert described["class_names"] == list("abcdef") and described["content"] == "raw heads"
    assert described["anchors_per_level"] == [96, 24, 6, 2, 1]
    logits = load_onnx(tmp_path / "raw.onnx")(torch.full((1, 3, 64, 96), 127.0))[0]
    assert logits.shape == (1, 129, 6) and (logits - 1.25).abs().max() < 1  # these weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*RANDOM, "--output", "{folder}/file/sub/a.pt"], "cannot be written"),
        ([*RANDOM, "--output", "{folder}/a.onnx"], "must end in '.pt'"),
        ([*RANDOM, "--output", "{folder}/dir.pt"], "cannot be written"),
        ([*RANDOM, "--output", "{folder}/a.pt", "--batch-size", "0"], "must be positive"),
        ([*RANDOM, "--output", "{folder}/a.pt", "--size", "0", "32"], "must be positive"),
        ([*RANDOM, "--output", "{folder}/a.pt", "--weights", "x"], "mutually exclusive"),
        ([*RANDOM, "--output", "{folder}/a.pt", "--check-image", "x.png"], "'x.png' is not an"),
        ([*RANDOM, "--output", "{folder}/a.pt", "--class-names", "a,b"], "has 6 classes"),
        ([*RANDOM, "--output", "{folder}/a.pt", "train.nothing=1"], "Unknown config key"),
        ([*TOY, "--output", "{folder}/a.pt", "--weights", "no.pth"], "'no.pth' cannot be loaded"),
        ([*TOY, "--output", "{folder}/a.pt"], "no weights of 'toy/atss_toy'"),
        (["--zoo", "yolo", "--output", "{folder}/a.pt", "--random-weights"], "'yolo'"),
        (["--config-file", "a.py", "--output", "{folder}/a.pt", "--weights", "x"], "'a.py'"),
        (["--config-file", "a.py", "--output", "{folder}/a.pt"], "Give the trained --weights"),
        (
            ["--zoo", "toy/faster_rcnn_atss_toy", "--random-weights", "--raw-heads"]
            + ["--output", "{folder}/a.pt"],
            "without raw heads",
        ),
        (
            ["--zoo", "toy/faster_rcnn_atss_toy", "--random-weights", "--format", "onnx"]
            + ["--output", "{folder}/a.onnx"],
            "as TorchScript",
        ),
        (
            ["--zoo", "toy/atss_dcn_toy", "--random-weights", "--format", "onnx"]
            + ["--output", "{folder}/a.onnx", "--opset", "18"],
            "opset of 19",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message, tmp_path, capsys):
    (tmp_path / "dir.pt").mkdir()
    (tmp_path / "file").touch()
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    code = export_model.main(["--format", "torchscript", *arguments])

    assert code == 1
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"dir.pt", "file"}


def test_exports_share_a_new_folder_and_say_when_nothing_was_compared(tmp_path, capsys):
    arguments = [*RANDOM, "--format", "torchscript", "--size", "64", "96"]
    for name in ("a.pt", "b.pt"):
        output = ["--output", str(tmp_path / "new/folder" / name)]
        assert export_model.main([*arguments, *output, "model.selector.score_thresh=0.9999"]) == 0

    names = {path.name for path in (tmp_path / "new/folder").iterdir()}
    assert names == {"a.pt", "a.pt.json", "b.pt", "b.pt.json"}
    described = json.loads((tmp_path / "new/folder/a.pt.json").read_text())
    assert described["file"] == "a.pt"
    assert capsys.readouterr().out.count("so the comparison proves little. Pass a real") == 2


def test_unknown_format_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        export_model.main([*RANDOM, "--format", "caffe2", "--output", "a.pb"])

    assert caught.value.code == 2
    assert "'export', 'onnx', 'torchscript'" in capsys.readouterr().err


def test_missing_onnx_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    output = ["--format", "onnx", "--output", str(tmp_path / "a.onnx")]

    assert export_model.main([*RANDOM, *output]) == 1
    assert 'pip install "atss[export]"' in capsys.readouterr().err
    with pytest.raises(ImportError, match="onnxscript"):
        export_onnx(tiny_detector(), tmp_path / "a.onnx")


def test_runtime_without_an_operator_names_formats_that_work(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    def refuse(*args, **kwargs):
        raise RuntimeError(
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for "
            "DeformConv(19)"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(NotImplementedError, match="DeformConv.*torchscript or --format export"):
        load_onnx(tmp_path / "a.onnx")
