"""docs/extend.md: its blocks are files that run, train and detect; padding as backbones ask."""

import importlib
import shutil
import sys

import pytest
import torch
from atss import (
    ASSIGNER_REGISTRY,
    ATSS_HEAD_REGISTRY,
    CLASS_LOSS_REGISTRY,
    LOSS_REGISTRY,
    GridAnchorGenerator,
    model_zoo,
)
from atss.trainer import Trainer
from atss.training import load_lazy_config, load_yaml_config
from conftest import REPO, assert_every_parameter_learns, make_input, tiny_detector
from pages import fenced_blocks
from torch import nn

from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

REGISTRIES = (
    ASSIGNER_REGISTRY, ATSS_HEAD_REGISTRY, BACKBONE_REGISTRY, CLASS_LOSS_REGISTRY, LOSS_REGISTRY,
)  # fmt: skip
PAGE = (REPO / "docs/extend.md").read_text()
CONFIGS_NOT_IN_THE_PAPER = ["toy/simota_toy", "toy/qfl_toy"] + [
    f"lab/{path.stem}" for path in sorted((REPO / "configs/lab").glob("*.py"))
]
BOXES = [[8.0, 8, 40, 48], [50, 10, 90, 40]]
THREE = {"loss_cls", "loss_box_reg", "loss_centerness"}

# Stem of the config -> modules, where in the model the part is, its class, names of the losses.
EXAMPLES = {
    "my_rule": (["my_rule"], "proposal_generator.assigner", "NearestAssigner", THREE),
    "my_prediction_rule": (
        ["my_prediction_rule"], "proposal_generator.assigner", "BestBoxAssigner", THREE,
    ),
    "my_class_loss": (
        ["my_class_loss"], "proposal_generator.loss.classification", "VarifocalLoss",
        THREE - {"loss_centerness"},
    ),
    "my_head": (
        ["my_head", "my_loss"], "proposal_generator.head", "DistributionHead",
        THREE | {"loss_bins"},
    ),
    "my_backbone": (["my_backbone"], "backbone.bottom_up", "ConvNeXt", THREE),
    "my_vit": (["my_vit"], "backbone.net", "ViT", THREE),
    "my_swin": (["my_swin"], "backbone.bottom_up", "SwinTransformer", THREE),
}  # fmt: skip
# Not in every installation; for these the page has no YAML.
NEEDED = {
    "my_vit": ("detectron2.modeling.backbone.vit", "timm"),
    "my_swin": ("detectron2.modeling.backbone.swin",),
}


def files_of_page():
    """Path -> content of the blocks that are files: the first line names them."""
    blocks = [code for language, code in fenced_blocks(PAGE) if language != "bash"]
    return {code.partition("\n")[0].lstrip("# "): code for code in blocks}


def configs_like_those_of_the_rule():
    """The page says of the second rule that only the names change in the configs of the first."""
    for kind in ("py", "yaml"):
        code = files_of_page()[f"configs/toy/my_rule.{kind}"]
        code = code.replace("my_rule", "my_prediction_rule")
        yield (
            f"configs/toy/my_prediction_rule.{kind}",
            code.replace("NearestAssigner", "BestBoxAssigner"),
        )


def test_every_block_is_a_short_file_that_is_tested():
    languages = [language for language, _ in fenced_blocks(PAGE)]
    assert set(languages) == {"python", "yaml", "bash"} and PAGE.count("```") == 2 * len(languages)
    files = files_of_page()
    assert len(files) == sum(language != "bash" for language in languages)
    modules = {f"{module}.py" for modules, *_ in EXAMPLES.values() for module in modules}
    configs = {f"configs/toy/{name}.py" for name in EXAMPLES}
    configs |= {f"configs/toy/{name}.yaml" for name in set(EXAMPLES) - set(NEEDED)}
    assert set(files) == modules | configs - dict(configs_like_those_of_the_rule()).keys()
    assert all(len(code.splitlines()) <= 41 for code in files.values())  # 40 and the name


def train_and_detect(model):
    """Losses of a step in which every parameter learns; then the model detects something."""
    losses = model.train()([make_input(boxes=BOXES, classes=[0, 2]), make_input()])
    assert all(value.isfinite() and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert_every_parameter_learns(model)
    nn.init.normal_(model.proposal_generator.head.cls_logits.weight, std=0.5)
    with torch.no_grad():
        found = model.eval()([make_input()])[0]["instances"]
    boxes = found.pred_boxes.tensor
    assert len(boxes) > 0 and (boxes >= 0).all() and (boxes <= torch.tensor([96, 64] * 2)).all()
    return losses


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the configs and all files of the page, importable; registries are restored."""
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    for path, code in {**files_of_page(), **dict(configs_like_those_of_the_rule())}.items():
        (tmp_path / path).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    return tmp_path


@pytest.mark.parametrize(
    "name, kind", [(n, k) for n in EXAMPLES for k in ("py", "yaml") if n not in NEEDED or k == "py"]
)
def test_example_trains_and_detects(checkout, monkeypatch, name, kind):
    modules, path, kind_of_part, losses_of_part = EXAMPLES[name]
    for module in NEEDED.get(name, ()):
        pytest.importorskip(module, reason=f"no {module} here: Detectron2's main branch, or timm")
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.import_module(module)
    config = str(checkout / f"configs/toy/{name}.{kind}")
    if kind == "py":
        model = instantiate(load_lazy_config(config).model)
    else:
        model = Trainer.build_model(load_yaml_config(config, ["MODEL.DEVICE", "cpu"]))
    part = model
    for attribute in path.split("."):
        part = getattr(part, attribute)
    assert type(part).__name__ == kind_of_part

    images = model.preprocess_image([make_input()])
    assert tuple(images.tensor.shape[-2:]) == ((256, 256) if name == "my_vit" else (64, 96))
    assert set(train_and_detect(model)) == losses_of_part


@pytest.mark.parametrize("name", CONFIGS_NOT_IN_THE_PAPER)
def test_configs_of_rules_and_losses_not_in_the_paper_train_and_detect(name):
    losses = train_and_detect(instantiate(model_zoo.get_config(name).model))
    assert set(losses) == (THREE - {"loss_centerness"} if "qfl" in name else THREE)


class PaddingBackbone(Backbone):
    """One map of stride 32, and what Detectron2 after 0.6 asks backbones about padding."""

    def __init__(self, divisor=0, **constraints):
        super().__init__()
        self.step = nn.Conv2d(3, 64, 32, stride=32)
        self.divisor, self.constraints = divisor, constraints

    @property
    def size_divisibility(self):
        return self.divisor

    @property
    def padding_constraints(self):
        return self.constraints

    def forward(self, x):
        return {"p5": self.step(x)}

    def output_shape(self):
        return {"p5": ShapeSpec(channels=64, stride=32)}


def detector_with(backbone):
    generator = GridAnchorGenerator(sizes=[[256.0]], aspect_ratios=[1.0], strides=[32])
    return tiny_detector(
        backbone=backbone, anchor_generator=generator, in_features=["p5"], head=dict(num_levels=1)
    )


@pytest.mark.parametrize(
    "constraints, expected",
    [
        (dict(), (80, 100)),
        (dict(divisor=32), (96, 128)),
        (dict(divisor=32, size_divisibility=64), (128, 128)),
        (dict(divisor=32, square_size=0), (96, 128)),
        (dict(divisor=32, square_size=160), (160, 160)),
        (dict(size_divisibility=32, square_size=150), (160, 160)),
        (dict(square_size=100), (100, 100)),
        (dict(size_divisiblity=32), (96, 128)),  # as Detectron2's SimpleFeaturePyramid spells it
    ],
)
def test_images_are_padded_as_the_backbone_asks(constraints, expected):
    model = detector_with(PaddingBackbone(**constraints))
    images = model.preprocess_image([make_input(80, 64), make_input(33, 100)])
    assert tuple(images.tensor.shape) == (2, 3, *expected)
    assert images.image_sizes == [(80, 64), (33, 100)]
    assert (images.tensor[1, :, 33:] == 0).all() and (images.tensor[0, :, :, 64:] == 0).all()
    single = model.preprocess_image([make_input(80, 100)])
    assert tuple(single.tensor.shape[-2:]) == expected


def test_model_with_a_square_trains_and_its_boxes_stay_in_the_image():
    train_and_detect(detector_with(PaddingBackbone(size_divisibility=32, square_size=160)))


def test_image_larger_than_the_square_is_refused():
    model = detector_with(PaddingBackbone(square_size=96))
    with pytest.raises(ValueError, match="square of 96 px, but the batch has 64x100 px.*MAX_SIZE"):
        model.preprocess_image([make_input(64, 100), make_input(32, 32)])
