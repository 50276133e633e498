"""Patches of Detectron2 0.5 (July 2021) for current PyTorch, NumPy and Pillow.

Each `Patch` declares what it replaces and how often; nothing else of the source changes. A pattern
that is found more or less often is an error, because the source is then not release 0.5.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable


class PatchError(RuntimeError):
    """The source is not the one that the patches were written for."""


@dataclass(frozen=True)
class Patch:
    """Replace every match of the regular expression `pattern` in a file; there must be `count`."""

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


def apply_patches(root: Path, patches: Iterable[Patch]) -> None:
    """Apply `patches` to the source tree below `root`; one that does not fit raises `PatchError`."""
    for mend in patches:
        patch.apply(root)


def _numpy_alias(path: str, count: int) -> Patch:
    return Patch(
        f"detectron2/{path}",
        r"\bnp\.(bool|int|float|object|str)\b",
        r"\1",
        count,
        "NumPy 1.24 removed its aliases of Python types",
    )


def _compiled_operators(path: str) -> Patch:
    return Patch(
        f"detectron2/{path}",
        r"^from detectron2 import _C$",
        "try:\n"
        "    from detectron2 import _C\n"
        "except ImportError:\n"
        "    from detectron2.layers.missing_operators import _C",
        1,
        "the compiled operators are optional",
    )


PATCHES = (
    Patch(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        1,
        "Pillow 10 removed LINEAR, the old name of BILINEAR",
    ),
    _numpy_alias("data/build.py", 2),
    _numpy_alias("data/datasets/pascal_voc.py", 1),
    _numpy_alias("evaluation/pascal_voc_evaluation.py", 2),
    _numpy_alias("evaluation/sem_seg_evaluation.py", 7),
    _numpy_alias("structures/masks.py", 2),
    _numpy_alias("utils/video_visualizer.py", 1),
    _numpy_alias("utils/visualizer.py", 3),
    _compiled_operators("layers/deform_conv.py"),
    _compiled_operators("layers/roi_align_rotated.py"),
    _compiled_operators("layers/rotated_boxes.py"),
    # As in later releases: fast_eval_api needs the compiled operators, pycocotools does not.
    Patch(
        "detectron2/evaluation/coco_evaluation.py",
        r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval",
        1,
        "COCO evaluation falls back to pycocotools",
    ),
    # PyTorch's own schedulers no longer derive from _LRScheduler: their state would not be saved.
    Patch(
        "detectron2/engine/hooks.py",
        r"\btorch\.optim\.lr_scheduler\._LRScheduler\b",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
        "PyTorch 2.0 gave its schedulers another base class",
    ),
    Patch(
        "detectron2/export/__init__.py",
        r"^from \.api import \*$",
        "try:\n"
        "    from .api import *\n"
        "except ImportError:\n"
        "    pass  # Caffe2 is no longer part of PyTorch",
        1,
        "Caffe2 is optional",
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
