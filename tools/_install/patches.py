"""Patches of Detectron2 0.5 (July 2021) for current PyTorch, NumPy and Pillow.

Each `Patch` declares what it replaces and how often; nothing else of the source changes. A pattern
that is found more or less often is an error, because the source is then not release 0.5.
"""

import re
from dataclasses import dataclass
from pathlib import Path


class PatchError(RuntimeError):
    """The source is not the one that the patches were written for."""


@dataclass(frozen=True)
class Patch:
    """Replace every match of the regular expression `pattern` in a file; there must be `count`.

    `apply` raises `PatchError` if there are not, and changes nothing then.
    """

    path: str
    pattern: str
    replacement: str
    count: int
    why: str

    def apply(self, root: Path) -> None:
        file = root / self.path
        if not file.is_file():
            raise PatchError(f"{self.path}: no such file, needed for the patch '{self.why}'")
        text, found = re.subn(
            self.pattern, self.replacement, file.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        if found != self.count:
            raise PatchError(
                f"{self.path}: {found} places for the patch '{self.why}', expected {self.count}"
            )
        file.write_text(text, encoding="utf-8")


def _numpy_aliases(path: str, count: int) -> Patch:
    pattern, replacement = r"\bnp\.(bool|int|float|object|str)\b", r"\1"
    why = "NumPy 1.24 removed its aliases of Python types"
    return Patch(f"detectron2/{path}", pattern, replacement, count, why)


def _optional_import(path: str, statement: str, otherwise: str, why: str) -> Patch:
    replacement = f"try:\n    {statement}\nexcept ImportError:\n    {otherwise}"
    return Patch(f"detectron2/{path}", f"^{re.escape(statement)}$", replacement, 1, why)


_OPERATORS = (
    "from detectron2 import _C",
    "from detectron2.layers.missing_operators import _C",
    "the compiled operators are optional",
)
PATCHES = (
    _numpy_aliases("data/build.py", 2),
    _numpy_aliases("data/datasets/pascal_voc.py", 1),
    _numpy_aliases("evaluation/pascal_voc_evaluation.py", 2),
    _numpy_aliases("evaluation/sem_seg_evaluation.py", 7),
    _numpy_aliases("structures/masks.py", 2),
    _numpy_aliases("utils/video_visualizer.py", 1),
    _numpy_aliases("utils/visualizer.py", 3),
    _optional_import("layers/deform_conv.py", *_OPERATORS),
    _optional_import("layers/roi_align_rotated.py", *_OPERATORS),
    _optional_import("layers/rotated_boxes.py", *_OPERATORS),
    _optional_import(
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        "COCOeval_opt = COCOeval",
        "COCO evaluation falls back to pycocotools, as in later releases",
    ),
    _optional_import(
        "export/__init__.py",
        "from .api import *",
        "pass  # Caffe2 is no longer part of PyTorch",
        "Caffe2 is optional",
    ),
    Patch(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        1,
        "Pillow 10 removed LINEAR, the old name of BILINEAR",
    ),
    # Without this, the state of PyTorch's own schedulers would not be saved.
    Patch(
        "detectron2/engine/hooks.py",
        r"\btorch\.optim\.lr_scheduler\._LRScheduler\b",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
        "PyTorch 2.0 gave its schedulers another base class",
    ),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        r"^import pkg_resources\n",
        "",
        1,
        "setuptools 81 removed pkg_resources",
    ),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*"
        r'"detectron2\.model_zoo", os\.path\.join\("configs", config_path\)\s*\)',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
        1,
        "setuptools 81 removed pkg_resources (its use)",
    ),
)

# Files that the installation adds, by path.
ADDED_FILES = {
    "detectron2/layers/missing_operators.py": """\
class _MissingOperators:
    def __getattr__(self, name):
        raise NotImplementedError(
            f"detectron2._C.{name} is a compiled operator, and this Detectron2 has none. "
            "Build Detectron2 from its official repository to have them."
        )


_C = _MissingOperators()
""",
    # In place of the release's own, which compiles the operators and pins versions of 2021.
    "setup.py": """\
from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

setup(
    name="detectron2",
    version="0.5+patched",
    author="FAIR",
    url="https://github.com/facebookresearch/detectron2",
    description="Detectron2 0.5 without compiled operators, patched to work with current PyTorch",
    license="Apache-2.0",
    packages=find_packages(include=("detectron2", "detectron2.*")) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    python_requires=">=3.9",
    install_requires=[
        "Pillow>=7.1",
        "black",
        "cloudpickle",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7,<0.1.10",
        "matplotlib",
        "omegaconf>=2.1",
        "pycocotools>=2.0.2",
        "pydot",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>4.29.0",
        "yacs>=0.1.6",
    ],
)
""",
}
