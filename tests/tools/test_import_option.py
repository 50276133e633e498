"""`--import`: every tool that reads a config takes modules of your own, before it reads it."""

import runpy

import pytest
from conftest import REPO, run_tool
from test_tools_training import TINY_YAML

ARGUMENTS = {
    "ablation_table": ["--list"],
    "benchmark": ["assign"],
    "compare": ["detectors"],
    "convert_checkpoint": ["in.pth", "out.pth"],
    "demo": [],
    "export_model": ["--zoo", "toy/atss_toy", "--format", "torchscript", "--output", "a.pt"],
    "replay_batch": ["nonfinite.pth"],
    **dict.fromkeys(
        ("lazyconfig_train_net", "plain_train_net", "train_net"), ["--config-file", "none.py"]
    ),
}
WITHOUT_CONFIG = {"install_detectron2", "visualize_assignments"}

MY_RULE = """
from atss import ASSIGNER_REGISTRY, ATSSAssigner


@ASSIGNER_REGISTRY.register()
class MyRule(ATSSAssigner):
    def __init__(self, my_key=1):
        super().__init__(topk=my_key)
        print("my key is", my_key)
"""


def test_every_tool_is_tried():
    tools = {file.stem for file in (REPO / "tools").glob("[!_]*.py")}
    assert tools == {*ARGUMENTS, *WITHOUT_CONFIG}


@pytest.mark.parametrize("tool", ARGUMENTS)
def test_module_that_is_not_there_is_named_before_anything_else(
    tool, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # puts the path back, which the option appends to
    arguments = [*ARGUMENTS[tool], "--import", "no_such_module"]
    monkeypatch.setattr("sys.argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPO / "tools" / f"{tool}.py"), run_name="__main__")

    said = f"{caught.value.code}{capsys.readouterr().err}"
    assert "--import no_such_module: No module named 'no_such_module'." in said
    assert said.count("\n") <= 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tool, options, overrides",
    [
        ("export_model", ["--random-weights", "--format", "torchscript", "--output", "a.pt"], []),
        ("train_net", [], [*TINY_YAML, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "out"]),
    ],
)
def test_part_of_your_own_is_imported_and_takes_its_own_keys(tool, options, overrides, tmp_path):
    (tmp_path / "my_rule.py").write_text(MY_RULE)
    config = ["--config-file", REPO / "configs/toy/atss_toy.yaml", "--import", "my_rule"]
    name = "MODEL.ATSS.ASSIGNER"
    keys = [f"{name}.NAME", "MyRule", f"{name}.MY_KEY", "3"]
    text = run_tool(tool, [*config, *options, *keys, *overrides], tmp_path)
    assert "my key is 3" in text
    assert (tmp_path / ("a.pt.json" if options else "out/model_final.pth")).exists()


def test_processes_that_train_rows_import_it_too(tmp_path):
    (tmp_path / "untrained.py").write_text(
        "from _ablations import toy_runs\n"
        "names = 'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'\n"
        "toy_runs.train_lazy = lambda cfg: {'bbox': dict.fromkeys(names, 12.0)}\n"
    )
    rows = ["--run", "topk/k3", "--toy", "--size", "tiny", "--iterations", "1", "--seeds", "1"]
    arguments = [*rows, "--workers", "2", "--import", "untrained", "--output", "out"]
    assert "ablations/topk/k3, seed 1: AP 12.0" in run_tool("ablation_table", arguments, tmp_path)
