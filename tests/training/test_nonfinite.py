"""Losses that are not finite: agreed over processes before the update, kept, replayed, skipped."""

import subprocess
import sys

import pytest
import torch
from atss.checkpoint import read_checkpoint
from atss.training import share_step
from atss.training.nonfinite import NonFiniteGuard, load_batch
from conftest import REPO
from torch import nn

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

NAN = torch.tensor(float("nan"))


def image(masks=None):
    instances = Instances((8, 10))
    instances.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]]))
    instances.gt_classes = torch.tensor([3])
    if masks is not None:
        instances.gt_masks = masks
    return {
        "image": torch.arange(240, dtype=torch.uint8).view(3, 8, 10),
        "file_name": "a/b.jpg",
        "image_id": 17,
        "instances": instances,
        "width": 10,
        "height": 8,
    }


def test_report_names_the_terms_that_are_not_finite():
    report = share_step({"loss_cls": torch.tensor(1.5), "loss_box_reg": NAN}, 0.25, True)
    assert report.failed == {0: ["loss_box_reg"]} and report.is_stop_asked
    assert report.losses["loss_cls"] == 1.5 and report.data_time == 0.25
    report = share_step({"loss_cls": torch.tensor(1.5), "loss_box_reg": torch.tensor(0.25)})
    assert not report.failed and not report.is_stop_asked and report.total == 1.75


def test_loss_that_is_not_finite_stops_the_run_and_keeps_batch_and_weights(tmp_path):
    model = nn.Linear(2, 1)
    guard = NonFiniteGuard(str(tmp_path))
    report = share_step({"loss_cls": NAN})
    with pytest.raises(FloatingPointError) as error:
        guard.must_skip(report, 41, [image()], model)
    path = tmp_path / "nonfinite_0000041_rank0.pth"
    for part in (
        "loss_cls",
        "iteration 41",
        "image 17 (a/b.jpg)",
        "tools/replay_batch.py",
        str(path),
    ):
        assert part in str(error.value)
    content = read_checkpoint(str(path))
    assert content["failed"] == ["loss_cls"]
    torch.testing.assert_close(content["model"]["weight"], model.weight.detach())


@pytest.mark.parametrize(
    "masks",
    [
        None,
        PolygonMasks([[torch.tensor([1.0, 2, 5, 2, 5, 6]).numpy()]]),
        BitMasks(torch.ones(1, 8, 10, dtype=torch.bool)),
    ],
    ids=["boxes", "polygons", "bitmaps"],
)
def test_kept_batch_is_the_batch(masks, tmp_path):
    inputs = image(masks)
    guard = NonFiniteGuard(str(tmp_path), max_skips=1)
    assert guard.must_skip(share_step({"loss": NAN}), 0, [inputs], nn.Linear(1, 1))
    (found,) = load_batch(read_checkpoint(str(tmp_path / "nonfinite_0000000_rank0.pth")))
    torch.testing.assert_close(found["image"], inputs["image"])
    instances, expected = found["instances"], inputs["instances"]
    assert instances.image_size == expected.image_size and found["file_name"] == "a/b.jpg"
    torch.testing.assert_close(instances.gt_boxes.tensor, expected.gt_boxes.tensor)
    torch.testing.assert_close(instances.gt_classes, expected.gt_classes)
    if isinstance(masks, BitMasks):
        torch.testing.assert_close(instances.gt_masks.tensor, masks.tensor)
    elif masks is not None:
        assert instances.gt_masks.polygons[0][0].tolist() == masks.polygons[0][0].tolist()


def test_at_most_so_many_steps_in_a_row_are_skipped(tmp_path):
    model, good = nn.Linear(1, 1), share_step({"loss": torch.tensor(1.0)})
    bad = share_step({"loss": NAN})
    guard = NonFiniteGuard(str(tmp_path), max_skips=2)
    assert [guard.must_skip(r, 0, [], model) for r in (bad, bad, good, bad, bad)] == [
        True, True, False, True, True,
    ]  # fmt: skip
    again = NonFiniteGuard(str(tmp_path), max_skips=2)
    again.load_state_dict(guard.state_dict())
    with pytest.raises(FloatingPointError):
        again.must_skip(bad, 0, [], model)
    assert again.total_skipped == 5


def test_float16_is_named_as_a_cause(tmp_path):
    guard = NonFiniteGuard(str(tmp_path), dtype=torch.float16)
    with pytest.raises(FloatingPointError, match="float16 large features overflow"):
        guard.must_skip(share_step({"loss": NAN}), 0, [], nn.Linear(1, 1))


@pytest.mark.parametrize("value", [-1, True, 1.5])
def test_number_of_skipped_steps_must_be_an_integer(value):
    with pytest.raises((TypeError, ValueError), match="max_nonfinite_steps"):
        NonFiniteGuard("", value)


def test_run_that_diverges_says_so_and_its_batch_runs_again(tmp_path):
    config = [
        "--config-file", "configs/toy/atss_toy.py", "train.max_iter=3", "train.device=cpu",
        f"train.output_dir={tmp_path}", "optimizer.lr=1e30", "train.amp.enabled=False",
        "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
        "model.backbone.stem_out_channels=32", "model.backbone.norm=GN", "train.eval_period=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]", "model.head.num_convs=1",
    ]  # fmt: skip

    def run(tool, *arguments):
        command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)

    trained = run("lazyconfig_train_net", *config)
    (kept,) = tmp_path.glob("nonfinite_*_rank0.pth")
    last = trained.stderr.strip().splitlines()[-1]
    assert trained.returncode == 1 and last.startswith("FloatingPointError: Loss ")
    assert str(kept) in last and ".png" in last
    assert not (tmp_path / "model_final.pth").exists()
    replayed = run("replay_batch", kept)
    assert replayed.returncode == 0, replayed.stderr
    assert "First module with an output that is not finite: " in replayed.stdout
    assert "not finite: none" not in replayed.stdout
