"""tools/ablation_table.py: listing, building and training rows."""

import dataclasses
import json
import os

import ablation_table
import pytest
from _ablations import toy_runs
from _ablations.report import orderings, plot, results_table, write_report
from _ablations.rows import find_rows, load, measured_ap, select_rows
from _ablations.toy_runs import AXES, Settings, fingerprint, run_rows, toy_config
from atss.model_zoo import config_file
from atss.training import load_lazy_config
from conftest import run_tool

ROWS = find_rows()
TINY = Settings(size="tiny", iterations=2)


def rows_named(*names):
    return select_rows(ROWS, names)


def cells(table):
    """Lines of a Markdown table, header first, without the rule."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return found[:1] + found[2:]


def fake_results(aps):
    """Results of rows by name: one AP per seed."""
    return {
        name: [
            {"row": name, "config": name, "seed": seed, "iterations": 5, "batch": 2,
             "seconds": 60.0, "cpu_seconds": 30.0,
             "bbox": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap)}
            for seed, ap in enumerate(values, start=1)
        ]
        for name, values in aps.items()
    }  # fmt: skip


def test_list_prints_every_row_with_computed_difference_and_both_figures(tmp_path):
    run = tmp_path / "output" / "ablations" / "topk" / "k3"
    run.mkdir(parents=True)
    records = [{"iteration": 1, "bbox/AP": 1.0}, {"iteration": 9, "bbox/AP": 37.94}, {"lr": 1}]
    (run / "metrics.json").write_text("\n".join(json.dumps(record) for record in records))
    header, *lines = cells(run_tool("ablation_table", ["--list"], tmp_path))
    assert header[-2:] == ["published AP", "our AP"] and len(lines) == len(ROWS) >= 45
    by_config = {line[2]: line for line in lines}
    assert by_config["configs/ablations/topk/k3.py"][3:] == [
        "model.assigner.topk: 9 -> 3",
        "38.0 (paper, minival)",
        "37.9",
    ]
    assert by_config["configs/ablations/topk/k5.py"][-1] == ""  # nothing was measured
    assert by_config["configs/coco/atss_R_101_FPN_1x.py"][4] == "41.5 (mmdetection, minival)"


def test_check_builds_every_row_at_full_size(capsys):
    assert ablation_table.check_rows(ROWS) == 0
    output = capsys.readouterr().out
    assert f"{len(ROWS)} rows built; 0 faults." in output
    found = {line[0]: line[1:] for line in cells(output)[1:]}
    assert found["Table 4: k = 3"][0] == "ATSSAssigner(topk=3)"
    assert found["Table 3: FCOS + center sampling"][:2] == [
        "SSCAssigner(center_sampling_radius=1.5)",
        "PointToBoxTransform(anchor_scale=8.0)",
    ]
    assert found["Table 1: RetinaNet (#A=1), the zero point"][2] == (
        "no norm, no centerness, no scales, smooth_l1 x0.25"
    )
    assert found["Table 7: RetinaNet (#A=9)"][3].startswith("9: ")
    assert (
        found["Table 6: aspect ratio 1:4"][3] == "1: 128x32 at stride 8"
    )  # wide: height 1, width 4
    assert "deformable" in found["Table 8: R-101-DCN"][2]


def test_check_of_single_rows_from_the_command_line(tmp_path):
    arguments = ["--check", "topk/k3", "configs/ablations/topk/k9.py"]
    assert "2 rows built; 0 faults." in run_tool("ablation_table", arguments, tmp_path)


def test_check_fails_on_a_row_that_does_not_differ_as_declared(monkeypatch, capsys):
    (row,) = rows_named("topk/k3")
    monkeypatch.setattr(ablation_table, "load", lambda _: load(row.name))
    assert ablation_table.check_rows([row]) == 1
    assert "which is no difference from ablations/topk/k9" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--list", "topk/k4"], r"no row 'topk/k4'.*topk/k3"),
        (["--run", "topk/k3"], "needs --toy.*lazyconfig_train_net.py"),
        (["--run", "topk/k3", "--toy", "--size", "huge"], "Unknown --size 'huge'.*small"),
        (["--run", "topk/k3", "--toy", "--set", "train.max_iters=3"], "Unknown config key"),
    ],
)
def test_what_the_tool_cannot_do_is_said(arguments, words, monkeypatch):
    monkeypatch.setattr(toy_runs, "register_toy_shapes", lambda: None)
    with pytest.raises(ValueError, match=words):
        ablation_table.main(ablation_table.parse_arguments(arguments))


def test_rows_are_found_by_name_file_and_folder():
    assert [row.name for row in rows_named("topk/k3", "ablations/topk/k3.py")] == [
        "ablations/topk/k3"
    ]
    assert len(rows_named("topk")) == 9
    assert len(rows_named("retinanet_a1")) == 2  # one in each of two tables


def test_row_takes_its_method_to_the_toy_and_nothing_else():
    base = load_lazy_config(config_file("toy/atss_toy"))
    for row in ROWS[::3]:
        cfg = toy_config(row, Settings(size="toy"))
        assert {key: cfg.model[key] for key in cfg.model if key not in AXES} == {
            key: base.model[key] for key in base.model if key not in AXES
        }
        assert cfg.optimizer.lr == base.optimizer.lr and cfg.train.max_iter == base.train.max_iter
        assert cfg.model.head.num_classes == 6 and cfg.model.head.num_convs == 2
    (k3,) = rows_named("topk/k3")
    assert toy_config(k3, TINY).model.assigner.topk == 3


def test_equal_methods_share_a_run_and_different_ones_do_not():
    def mark(name):
        return fingerprint(toy_config(*rows_named(name), TINY))

    assert mark("retinanet_a1_atss") == mark("topk/k9") == mark("sota/R_101")
    assert mark("ssc_point") == mark("sample_selection/fcos")
    assert len({mark(n) for n in ("topk/k3", "topk/k9", "iou_box", "iou_point", "fcos_atss")}) == 5


@pytest.mark.parametrize(
    "override, is_same",
    [
        ("train.init_checkpoint=weights.pth", False),
        ("train.compile=True", False),
        ("optimizer.lr=0.5", False),
        ("train.output_dir=elsewhere", True),
        ("train.log_period=7", True),
    ],
)
def test_run_with_other_settings_is_another_run_unless_they_have_no_effect(override, is_same):
    (k3,) = rows_named("topk/k3")
    changed = toy_config(k3, dataclasses.replace(TINY, overrides=(*TINY.overrides, override)))
    assert (fingerprint(changed) == fingerprint(toy_config(k3, TINY))) == is_same


def test_runs_are_shared_seeded_and_not_repeated(tmp_path, monkeypatch, capsys):
    trained = []

    def train(cfg):
        trained.append((cfg.model.assigner.topk, cfg.train.seed, cfg.train.output_dir))
        return {"bbox": {"AP": float("nan") if cfg.train.seed == 2 else 20.0}}

    monkeypatch.setattr(toy_runs, "train_lazy", train)
    monkeypatch.setattr(toy_runs, "register_toy_shapes", lambda: None)
    rows = rows_named("topk/k3", "topk/k9", "retinanet_a1_atss")
    results = run_rows(rows, TINY, [1, 2], tmp_path)
    assert [entry[:2] for entry in trained] == [(3, 1), (9, 1), (3, 2), (9, 2)]
    assert results["ablations/topk/k9"] == results["ablations/sample_selection/retinanet_a1_atss"]
    # A model that finds nothing has AP 0, not NaN.
    assert [run["bbox"]["AP"] for run in results["ablations/topk/k3"]] == [20.0, 0.0]
    said = capsys.readouterr().out
    assert said.startswith("3 rows, 4 different runs, 4 of them still to train.\n[1/4] ")

    os.remove(f"{trained[0][2]}/result.json")  # as if it had been interrupted
    again = run_rows(rows, TINY, [1, 2], tmp_path)
    assert len(trained) == 5 and trained[-1] == trained[0]
    assert again.keys() == results.keys()
    other = Settings(size="tiny", iterations=3)
    run_rows(rows[:1], other, [1], tmp_path)
    assert len(trained) == 6  # other conditions are another run


def test_table_has_mean_and_spread_over_seeds():
    rows = rows_named("topk/k3", "topk/k9")
    table = results_table(rows, fake_results({rows[0].name: [10.0, 13.0], rows[1].name: [20, 20]}))
    header, k3, k9 = cells(table)
    assert header[2:5] == ["AP in the paper (COCO)", "AP here", "2 seeds"]
    assert k3[:5] == ["Table 4", "k = 3", "38.0", "11.5", "10.0 to 13.0"]
    assert k9[3] == "20.0"


@pytest.mark.parametrize(
    "k3, k9, verdict",
    [([1.0, 2.0], [3.0, 2.5], "holds"), ([3.0, 2.5], [1.0, 2.0], "is reversed"),
     ([1.0, 2.0], [3.0, 1.0], "not clear"), ([1.0, 2.0], [3.0, 2.0], "not clear"),
     ([1.0, 2.0], [3.0, 2.04], "not clear")],  # +0.0 as printed
)  # fmt: skip
def test_ordering_holds_only_if_every_seed_says_so(k3, k9, verdict):
    rows = rows_named("topk/k3", "topk/k9", "topk/k17")
    results = fake_results({row.name: aps for row, aps in zip(rows, (k3, k9, [5.0, 5.0]))})
    found = {pair: (paper, result) for pair, paper, _, result in orderings(rows, results)}
    assert found["Table 4: k = 3 -> k = 9"] == ("+1.3", verdict)
    assert found["Table 4: k = 9 -> k = 17"] == ("-0.1", "within 0.2 in the paper")


def test_report_shows_command_figures_and_picture_and_keeps_what_was_written(tmp_path):
    rows = rows_named("topk/k3", "topk/k9", "iou_box")
    results = fake_results({row.name: [10.0 + i, 12.0] for i, row in enumerate(rows)})
    file = tmp_path / "report.md"
    write_report(rows, results, file, "python tools/ablation_table.py --run topk")
    text = file.read_text()
    assert "python tools/ablation_table.py --run topk" in text and "6 runs" in text
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG" and "](report.png)" in text
    file.write_text(text.replace("Not written yet.", "k matters little."))
    write_report(rows, results, file, "another command")
    assert "another command" in file.read_text() and "k matters little." in file.read_text()


def test_plot_is_a_png(tmp_path):
    rows = rows_named("topk/k3")
    plot(rows, fake_results({rows[0].name: [1.0]}), tmp_path / "new" / "bars.png")
    assert (tmp_path / "new" / "bars.png").stat().st_size > 1000


def test_ap_of_a_run_that_never_evaluated_is_blank(tmp_path):
    cfg = load_lazy_config(config_file("toy/atss_toy"))
    assert measured_ap(cfg, tmp_path) is None
    folder = tmp_path / cfg.train.output_dir
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 3.0}\n')
    assert measured_ap(cfg, tmp_path) is None
