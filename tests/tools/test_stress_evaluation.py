"""tools/stress/evaluation.py: parts are measured once, and all evaluators agree."""

import json

import pytest
from stress import evaluation

from detectron2.data import MetadataCatalog


def test_parts_are_measured_once_and_evaluators_agree(tmp_path, monkeypatch, capsys):
    parts = []

    def run(command, **_):  # in this process
        parts.append(command[-1])
        evaluation.main(command[2:])

    monkeypatch.setattr(evaluation.subprocess, "run", run)
    sizes = {"detections": 500, "images": 8, "detections-per-image": 20, "processes": 1}
    options = [f"--{key}={value}" for key, value in {**sizes, "output": tmp_path}.items()]
    try:
        results = evaluation.main(options)
    finally:
        MetadataCatalog.pop(evaluation.DATA_SET)
    assert parts[0] == "collection" and parts[-1] == "Detectron2"
    assert results["collection"]["detections"] == 500
    assert results["collection"]["MB of them"] == 500 * 28 / 2**20
    assert f"{len(parts) - 1} evaluators, equal values" in capsys.readouterr().out

    file = tmp_path / "evaluation.json"
    stored = json.loads(file.read_text())
    del stored["Detectron2"]  # as if it was stopped before
    file.write_text(json.dumps(stored))
    evaluation.main(options)
    MetadataCatalog.pop(evaluation.DATA_SET)
    assert parts.count("collection") == 1 and parts.count("Detectron2") == 2
    with pytest.raises(SystemExit, match="other settings"):
        evaluation.main([*options, "--images", "9"])
