"""Configs: the paper's recipe, and twins in YAML and Python that build the same training."""

from pathlib import Path

import pytest
import torch
from atss import model_zoo
from atss.assigners import ATSSAssigner
from atss.trainer import Trainer
from atss.training import load_lazy_config, load_yaml_config, update_lazy_config
from atss.training.optimizer import get_optimizer_params
from atss.training.settings import checkpoint_settings
from conftest import GOLDEN, REPO, STRIDES, shapes_of
from torch import nn

import detectron2.data.transforms as T
from detectron2.config import instantiate
from detectron2.data.detection_utils import build_augmentation
from detectron2.solver import LRMultiplier

CONFIGS = REPO / "configs"
ALL_PYTHON = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.py")
    if "common" not in path.parts
)
TWINS = [name for name in ALL_PYTHON if (CONFIGS / f"{name}.yaml").exists()]
ONE_STAGE = [name for name in TWINS if "rcnn" not in name]


def lazy_model(name):
    cfg = model_zoo.get_config(name)
    return cfg, instantiate(cfg.model)


def yaml_model(name):
    cfg = load_yaml_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    return cfg, Trainer.build_model(cfg)


def public_state(part):
    """Hyper-parameters of a part, nested parts included."""
    state = {}
    for name, value in vars(part).items():
        if name.startswith("_") or isinstance(value, (torch.Tensor, nn.Module)):
            continue
        nested = getattr(value, "__dict__", None)
        if isinstance(value, (list, tuple)):
            value = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
        state[name] = (type(value).__name__, public_state(value)) if nested else value
    return state


def group_summary(optimizer, model):
    """Name of each parameter -> its learning rate and decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def augmentations(transforms):
    """Kind and settings of each; defaults that are not printed count too."""
    found = []
    for transform in transforms:
        if isinstance(transform, T.ResizeShortestEdge):
            lengths = tuple(transform.short_edge_length)
            lengths = lengths * 2 if len(lengths) == 1 else lengths
            is_range = transform.is_range and lengths[0] != lengths[-1]  # one size is no range
            found.append((lengths, transform.max_size, is_range))
        else:
            found.append(str(transform))
    return found


@pytest.mark.parametrize("name", ONE_STAGE)
def test_yaml_and_python_twins_build_the_same_training(name):
    lazy_cfg, lazy = lazy_model(name)
    yaml_cfg, yaml = yaml_model(name)
    assert shapes_of(lazy) == shapes_of(yaml)
    # Strides, groups and the like, which parameters do not show.
    assert str(lazy) == str(yaml)
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (lazy, yaml)]
    assert frozen[0] == frozen[1]
    for part in ("assigner", "box2box_transform", "loss"):
        mine, other = (getattr(m.proposal_generator, part) for m in (lazy, yaml))
        assert type(mine) is type(other)
        assert public_state(mine) == public_state(other), part
    assert public_state(lazy.proposal_generator) == public_state(yaml.proposal_generator)
    cells, biases = [], []
    for core in (lazy.proposal_generator, yaml.proposal_generator):
        cells.append(list(core.anchor_generator.cell_anchors))
        biases.append(core.head.bbox_pred.bias)
    torch.testing.assert_close(*cells, rtol=0, atol=1e-4)
    assert torch.equal(*biases)
    assert torch.equal(lazy.pixel_mean, yaml.pixel_mean)
    assert torch.equal(lazy.pixel_std, yaml.pixel_std)
    assert lazy.input_format == yaml.input_format

    lazy_cfg.optimizer.params.model = lazy
    lazy_optimizer = instantiate(lazy_cfg.optimizer)
    yaml_optimizer = Trainer.build_optimizer(yaml_cfg, yaml)
    assert type(lazy_optimizer) is type(yaml_optimizer)
    assert lazy_optimizer.defaults.get("momentum") == yaml_optimizer.defaults.get("momentum")
    assert group_summary(lazy_optimizer, lazy) == group_summary(yaml_optimizer, yaml)

    max_iter = lazy_cfg.train.max_iter
    assert max_iter == yaml_cfg.SOLVER.MAX_ITER
    mine = instantiate(lazy_cfg.lr_multiplier)
    other = Trainer.build_lr_scheduler(yaml_cfg, yaml_optimizer)._multiplier
    steps = {0, 1, 49, 50, 499, 500, 501, max_iter // 2, max_iter - 1}
    for milestone in (60000, 80000, 120000, 160000):
        steps |= {milestone - 1, milestone}
    for step in steps:
        if step < max_iter:
            assert mine(step / max_iter) == pytest.approx(other(step / max_iter), rel=1e-6), step

    train, solver = lazy_cfg.train, yaml_cfg.SOLVER
    assert (train.amp.enabled, train.amp.precision) == (solver.AMP.ENABLED, solver.AMP.PRECISION)
    assert train.channels_last == solver.CHANNELS_LAST
    assert train.init_checkpoint == yaml_cfg.MODEL.WEIGHTS
    assert train.eval_period == yaml_cfg.TEST.EVAL_PERIOD
    assert checkpoint_settings(lazy_cfg) == checkpoint_settings(yaml_cfg)
    data = lazy_cfg.dataloader
    assert tuple(data.train.dataset.names) == yaml_cfg.DATASETS.TRAIN
    assert tuple(data.test.dataset.names) == yaml_cfg.DATASETS.TEST
    assert data.train.total_batch_size == solver.IMS_PER_BATCH
    for split, is_train in ((data.train, True), (data.test, False)):
        mine = augmentations(instantiate(split.mapper.augmentations))
        assert mine == augmentations(build_augmentation(yaml_cfg, is_train))


@pytest.mark.parametrize("name", ALL_PYTHON)
def test_images_are_read_in_the_order_of_channels_that_the_model_takes(name):
    file = str(CONFIGS / f"{name}.py")
    data = load_lazy_config(file, ["model.input_format=RGB"]).dataloader
    assert data.train.mapper.image_format == data.test.mapper.image_format == "RGB"


@pytest.mark.parametrize("name", [name for name in ALL_PYTHON if "rcnn" in name])
def test_data_need_outlines_where_the_model_has_a_mask_head(name):
    cfg = model_zoo.get_config(name)
    data = cfg.dataloader.train
    assert data.dataset.get("with_masks", False) == ("mask_head" in cfg.model.roi_heads)
    assert data.mapper.use_instance_mask == ("mask_head" in cfg.model.roi_heads)


@pytest.mark.parametrize("split", ["train", "test"])
def test_data_in_another_order_of_channels_are_refused_at_the_start(split):
    file = str(CONFIGS / "toy" / "atss_toy.py")
    with pytest.raises(ValueError, match=f"{split}.mapper.image_format is 'RGB'.*input_format is"):
        load_lazy_config(file, [f"dataloader.{split}.mapper.image_format=RGB"])


def test_there_are_twins_to_compare():
    assert {"coco/atss_R_50_FPN_1x", "toy/atss_toy"} <= set(TWINS)


def authors_names(name):
    """Our parameter name as the authors' release has it (R-50)."""
    name = name.replace("proposal_generator.head.", "rpn.head.")
    name = name.replace("backbone.bottom_up.stem.conv1.norm.", "backbone.body.stem.bn1.")
    name = name.replace("backbone.bottom_up.stem.", "backbone.body.stem.")
    for stage in range(2, 6):
        name = name.replace(f"backbone.bottom_up.res{stage}.", f"backbone.body.layer{stage - 1}.")
    name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
    for conv in (1, 2, 3):
        name = name.replace(f".conv{conv}.norm.", f".bn{conv}.")
    for level in (3, 4, 5):
        name = name.replace(f"backbone.fpn_lateral{level}.", f"backbone.fpn.fpn_inner{level - 1}.")
        name = name.replace(f"backbone.fpn_output{level}.", f"backbone.fpn.fpn_layer{level - 1}.")
    return name.replace("backbone.top_block.", "backbone.fpn.top_blocks.")


def golden_recipe():
    lines = (GOLDEN / "keys" / "atss_R_50_FPN_1x.optim.txt").read_text().splitlines()
    schedule = {}
    for entry in lines[0].split("iteration:")[1].split(","):
        step, rate = entry.split(":")
        schedule[int(step)] = float(rate)
    parameters = {}
    for line in lines[1:]:
        name, *values = line.split()
        parameters[name] = None if values == ["frozen"] else (float(values[1]), float(values[3]))
    return schedule, parameters


def test_rate_and_decay_of_every_parameter_are_those_of_the_authors_release():
    cfg, model = lazy_model("atss_R_50_FPN_1x")
    _, expected = golden_recipe()
    cfg.optimizer.params.model = model
    groups = group_summary(instantiate(cfg.optimizer), model)
    found = {authors_names(name): groups.get(name) for name, _ in model.named_parameters()}
    suffixes = {name.split("rpn.head.")[-1]: name for name in expected if "rpn" in name}
    found = {
        suffixes.get(n.split("rpn.head.")[-1], n) if "rpn" in n else n: v for n, v in found.items()
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == (None if values is None else pytest.approx(values)), name


def test_learning_rate_over_time_is_that_of_the_authors_release():
    cfg = model_zoo.get_config("atss_R_50_FPN_1x")
    schedule, _ = golden_recipe()
    multiplier = instantiate(cfg.lr_multiplier)
    steps = [step for step in schedule if step < cfg.train.max_iter]
    assert {0, 499, 500, 59999, 60000, 79999, 80000} <= set(steps)
    for step in steps:
        rate = cfg.optimizer.lr * multiplier(step / cfg.train.max_iter)
        assert rate == pytest.approx(schedule[step], rel=1e-4), step


def test_1x_recipe_is_section_4_of_the_paper():
    cfg = model_zoo.get_config("atss_R_50_FPN_1x")
    assert cfg.dataloader.train.total_batch_size == 16 and cfg.train.max_iter == 90000
    sgd = cfg.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (0.01, 0.9, 1e-4)
    resize = cfg.dataloader.train.mapper.augmentations[0]
    assert list(resize.short_edge_length) == [800] and resize.max_size == 1333
    selector = cfg.model.selector
    assert (selector.score_thresh, selector.topk_candidates) == (0.05, 1000)
    assert (selector.nms_thresh, selector.detections_per_image) == (0.6, 100)
    assert cfg.train.init_checkpoint == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def test_groups_give_biases_their_own_rate_and_leave_frozen_and_shared_parameters_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.norm = nn.GroupNorm(1, 1)
            self.frozen = nn.Linear(1, 1).requires_grad_(False)
            self.shared = self.conv

    model = Model()
    groups = get_optimizer_params(model, base_lr=1.0, weight_decay=0.1)
    by_values = {(g["lr"], g["weight_decay"]): g["params"] for g in groups}
    assert by_values == {
        (1.0, 0.1): [model.conv.weight, model.norm.weight],
        (2.0, 0.0): [model.conv.bias, model.norm.bias],
    }
    undecayed = get_optimizer_params(model, 1.0, 0.1, weight_decay_norm=0.0)
    assert [model.norm.weight] in [g["params"] for g in undecayed]
    with pytest.raises(ValueError, match="nothing to train"):
        get_optimizer_params(model.requires_grad_(False), 1.0)


def test_decay_of_norms_follows_the_decay_of_a_yaml_config():
    cfg = load_yaml_config(str(CONFIGS / "Base-ATSS.yaml"), ["SOLVER.WEIGHT_DECAY", "0.3"])
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1))
    groups = group_summary(Trainer.build_optimizer(cfg, model), model)
    assert groups["0.weight"][1] == groups["1.weight"][1] == 0.3


def test_zoo_finds_configs_by_name_and_lists_them_otherwise():
    assert "coco/atss_R_50_FPN_1x" in model_zoo.list_configs()
    assert Path(model_zoo.config_file("toy/atss_toy")).name == "atss_toy.py"
    model = model_zoo.get("toy/atss_toy", device="cpu")
    assert not model.training and isinstance(model.proposal_generator.assigner, ATSSAssigner)
    with pytest.raises(ValueError, match="Unknown config 'nothing'.*atss_toy"):
        model_zoo.get_config("nothing")
    with pytest.raises(ValueError, match="sfzhang15/ATSS"):
        model_zoo.get_checkpoint_url("atss_dcnv2_R_50_FPN_1x")


def test_every_part_can_be_overridden_in_a_line():
    cfg = load_lazy_config(
        model_zoo.config_file("toy/atss_toy"),
        [
            "model.assigner.topk=3", "model.assigner.min_positives_per_gt=1",
            "model.head.norm=''", "model.loss.box_loss=smooth_l1", "model.num_classes=2",
        ],
    )  # fmt: skip
    core = instantiate(cfg.model).proposal_generator
    assert (core.assigner.topk, core.assigner.min_positives_per_gt) == (3, 1)
    assert core.loss.num_classes == core.head.num_classes == 2
    assert core.loss.box_loss == "smooth_l1"
    assert core.anchor_generator.strides == list(STRIDES)


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.max_iters=3", "Unknown config key 'train.max_iters'; train has .*'max_iter'"),
        ("modell.head.norm=GN", "Unknown config key 'modell.head.norm'"),
        ("model.asigner.topk=3", "Unknown config key 'model.asigner.topk'; model has .*'assigner'"),
        ("train.max_iter", "no '='"),
    ],
)
def test_lazy_overrides_that_change_nothing_are_refused(override, words):
    cfg = model_zoo.get_config("toy/atss_toy")
    with pytest.raises(ValueError, match=words):
        update_lazy_config(cfg, [override])


def test_part_that_the_detector_does_not_have_is_named_with_those_it_has():
    cfg = load_lazy_config(model_zoo.config_file("toy/atss_toy"), ["model.asigner=3"])
    with pytest.raises(ValueError, match="model.asigner is no part of .*'assigner'"):
        instantiate(cfg.model)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["MODEL.ATSS.TOPK", "3"], "key 'MODEL.ATSS.TOPK'; MODEL.ATSS has .*ASSIGNER"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER cannot be 'many'"),
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs"),
    ],
)
def test_yaml_overrides_that_mean_nothing_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_yaml_config(str(CONFIGS / "toy" / "atss_toy.yaml"), overrides)


def test_missing_config_file_is_named():
    for load in (load_yaml_config, load_lazy_config):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load("nowhere.yaml")


def test_scheduler_follows_detectron2s_hook():
    cfg, model = lazy_model("toy/atss_toy")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    rates = []
    for _ in range(60):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.02 * cfg.optimizer.lr)
    assert max(rates) == pytest.approx(cfg.optimizer.lr, rel=0.02)
