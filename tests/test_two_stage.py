"""ATSS as the first stage of Detectron2's two-stage detectors, from LazyConfig and from YAML."""

import pytest
import torch
from atss import ATSS
from atss.model_zoo import get_config
from atss.postprocessing import DetectionSelector
from atss.trainer import Trainer
from atss.training import load_yaml_config
from conftest import REPO, assert_every_parameter_learns, make_input, shapes_of

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage

RPN_LOSSES = {"loss_rpn_cls", "loss_rpn_box_reg", "loss_rpn_centerness"}
ROI_LOSSES = {
    "faster": {"loss_cls", "loss_box_reg"},
    "mask": {"loss_cls", "loss_box_reg", "loss_mask"},
    "cascade": {f"loss_{kind}_stage{i}" for kind in ("cls", "box_reg") for i in range(3)},
}


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's ROI heads log while they train."""
    with EventStorage():
        yield


def lazy_model(kind):
    if kind != "cascade":
        return instantiate(get_config(f"toy/{kind}_rcnn_atss_toy").model)
    config = get_config("coco/cascade_rcnn_atss_R_50_FPN_1x").model
    config.backbone.depth = 18
    config.backbone.update(norm="BN", freeze_at=0, stem_out_channels=32, res2_out_channels=32)
    config.backbone.out_channels = 64
    config.roi_heads.num_classes = 6
    for head, predictor in zip(config.roi_heads.box_heads, config.roi_heads.box_predictors):
        head.input_shape.channels = 64
        head.fc_dims = [32, 32]
        predictor.input_shape.channels = 32
    return instantiate(config)


def yaml_config(kind):
    file = f"toy/{'faster' if kind == 'cascade' else kind}_rcnn_atss_toy.yaml"
    cfg = load_yaml_config(str(REPO / "configs" / file))
    if kind == "cascade":
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def inputs_of(kind):
    boxes = [[[8.0, 8, 40, 48], [50, 10, 90, 60]], [[20.0, 4, 60, 60]]]
    batch = [make_input(64, 96, b, list(range(len(b)))) for b in boxes]
    if kind == "mask":
        for inputs in batch:
            inputs["instances"].gt_masks = PolygonMasks(
                [
                    [torch.stack([b[[0, 1]], b[[2, 1]], b[[2, 3]], b[[0, 3]]]).view(-1).numpy()]
                    for b in inputs["instances"].gt_boxes.tensor
                ]
            )
    return batch


def make_model(kind, source):
    torch.manual_seed(0)
    return lazy_model(kind) if source == "lazy" else build_model(yaml_config(kind))


@pytest.mark.parametrize("source", ["lazy", "yaml"])
@pytest.mark.parametrize("kind", ["faster", "mask", "cascade"])
def test_training_step_has_the_losses_of_both_stages_and_gradients_reach_both(kind, source):
    model = make_model(kind, source).train()
    losses = model(inputs_of(kind))

    assert set(losses) == RPN_LOSSES | ROI_LOSSES[kind]
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    first, second = model.proposal_generator.head, model.roi_heads
    assert first.cls_logits.weight.grad.abs().sum() > 0
    assert first.bbox_pred.weight.grad.abs().sum() > 0
    assert_every_parameter_learns(second)
    assert max(p.grad.abs().max() for p in second.parameters()) > 0
    for stage in ("fpn_output2", "fpn_output3"):  # for the second stage only, for both
        assert getattr(model.backbone, stage).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["faster", "mask", "cascade"])
def test_inference_gives_detections_in_the_size_asked_for(kind):
    model = make_model(kind, "lazy").eval()
    for module in model.modules():  # an untrained predictor is not sure of anything
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 0.0
    with torch.no_grad():
        results = model([{"image": torch.rand(3, 64, 96) * 255, "height": 128, "width": 192}])
    instances = results[0]["instances"]
    assert instances.image_size == (128, 192) and 0 < len(instances) <= 100
    assert instances.has("pred_masks") == (kind == "mask")
    if kind == "mask":
        assert instances.pred_masks.shape[1:] == (128, 192)


@pytest.mark.parametrize("source", ["lazy", "yaml"])
def test_mask_head_on_data_without_outlines_is_refused_before_training(source):
    box = {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    DatasetCatalog.register("boxes only", lambda: [{"image_id": 3, "annotations": [box]}])
    try:
        with pytest.raises(
            ValueError, match="annotation 0 .* image 3 has no segmentation.*MASK_ON"
        ):
            if source == "yaml":
                cfg = yaml_config("mask")
                cfg.DATASETS.TRAIN = ("boxes only",)
                Trainer.build_train_loader(cfg)
            else:
                data = get_config("toy/mask_rcnn_atss_toy")
                data.dataloader.train.dataset.names = ["boxes only"]
                instantiate(data.dataloader.train.dataset)
    finally:
        DatasetCatalog.remove("boxes only")


def first_stage(model, inputs):
    """Proposals and losses."""
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    return model.proposal_generator(images, features, [x["instances"] for x in inputs])


def test_losses_of_the_first_stage_are_those_of_a_one_class_detector():
    model, inputs = make_model("faster", "lazy").train(), inputs_of("faster")
    proposals, losses = first_stage(model, inputs)
    model.proposal_generator.selector = DetectionSelector()
    nothing, plain = first_stage(model, inputs)

    assert nothing == [] and len(proposals) == 2
    assert {name.replace("loss_rpn_", "loss_") for name in losses} == set(plain)
    for name, loss in plain.items():
        torch.testing.assert_close(losses[name.replace("loss_", "loss_rpn_")], loss)
    for result in proposals:
        assert set(result.get_fields()) == {"proposal_boxes", "objectness_logits"}
        assert 0 < len(result) <= 300
        assert not result.proposal_boxes.tensor.requires_grad
        assert (result.objectness_logits.diff() <= 0).all()


def test_box_offset_moves_the_truth_of_the_first_stage_only():
    model, inputs = make_model("faster", "lazy").train(), inputs_of("faster")
    _, expected = first_stage(model, inputs)
    model.proposal_generator.box_offset = 0.5
    for x in inputs:
        x["instances"].gt_boxes.tensor.add_(0.5)
    boxes = [x["instances"].gt_boxes.tensor.clone() for x in inputs]
    assert first_stage(model, inputs)[1] == expected
    for x, before in zip(inputs, boxes):  # what the ROI heads get
        assert torch.equal(x["instances"].gt_boxes.tensor, before)


def test_classes_of_the_ground_truth_do_not_matter_to_the_first_stage():
    model, inputs = make_model("faster", "lazy").train(), inputs_of("faster")
    _, expected = first_stage(model, inputs)
    for x in inputs:
        x["instances"].gt_classes += 3
    assert first_stage(model, inputs)[1] == expected


def test_images_without_objects_train_every_parameter_of_both_stages():
    model = make_model("faster", "lazy").train()
    losses = model([make_input(64, 96), make_input(64, 96)])
    sum(losses.values()).backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_every_parameter_learns(model)


def test_proposal_network_gives_proposals_and_prefixed_losses():
    cfg = yaml_config("faster")
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = build_model(cfg)
    assert isinstance(model, ProposalNetwork)
    assert set(model.train()(inputs_of("faster"))) == RPN_LOSSES
    with torch.no_grad():
        results = model.eval()([{"image": torch.rand(3, 64, 96), "height": 64, "width": 96}])
    assert results[0]["proposals"].has("proposal_boxes")


def test_yaml_reads_the_numbers_of_rpn_and_one_class_whatever_num_classes_says():
    cfg = yaml_config("faster")
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 11, 12
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 7, 8
    cfg.MODEL.RPN.NMS_THRESH = 0.65
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 3
    core = build_model(cfg).proposal_generator
    assert isinstance(core, ATSS) and core.num_classes == core.head.num_classes == 1
    selector = core.selector
    assert (selector.pre_nms_topk, selector.post_nms_topk) == ((11, 12), (7, 8))
    assert (selector.nms_thresh, selector.min_box_size) == (0.65, 3)


def test_features_that_the_backbone_lacks_are_refused_with_those_it_has():
    cfg = yaml_config("faster")
    cfg.MODEL.ATSS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p8"]
    with pytest.raises(ValueError, match=r"\['p8'\].*gives \['p2', 'p3', 'p4', 'p5', 'p6', 'p7'\]"):
        build_model(cfg)
    model = make_model("faster", "lazy")
    model.proposal_generator.in_features = ("p3", "p4", "p5", "p6", "p8")
    with pytest.raises(ValueError, match=r"gives \['p2', 'p3', 'p4', 'p5', 'p6', 'p7'\]"):
        model(inputs_of("faster"))


def test_first_stage_with_classes_is_refused():
    config = get_config("toy/faster_rcnn_atss_toy").model
    config.proposal_generator.num_classes = 6
    with pytest.raises(ValueError, match="num_classes=1, got 6"):
        instantiate(config)


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_yaml_and_python_toys_build_the_same_model(kind):
    assert shapes_of(make_model(kind, "lazy")) == shapes_of(make_model(kind, "yaml"))
