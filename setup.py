"""Package `atss` with its configs. Detectron2 is installed separately: see README.md."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Read, not imported: `import atss` needs PyTorch and Detectron2.
INIT = (ROOT / "projects/ATSS/atss/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1)


class BuildWithConfigs(build_py):
    """Copies configs/ into the package: in a wheel, `atss.model_zoo` reads them there."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # in a checkout they are at the top
        copy = Path(self.build_lib, "atss", "configs")
        shutil.rmtree(copy, ignore_errors=True)  # an earlier build may have left removed files
        for source in sorted((ROOT / "configs").rglob("*")):
            if source.suffix in (".py", ".yaml"):
                target = copy / source.relative_to(ROOT / "configs")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


EXPORT = ["onnx", "onnxscript", "onnxruntime"]
FAST_EVAL = ["faster-coco-eval"]
SLURM = ["submitit"]

setup(
    name="atss",
    version=VERSION,
    description="ATSS (arXiv:1912.02424) as a Detectron2 project",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "projects/ATSS"},
    packages=find_packages("projects/ATSS"),
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.9",
    install_requires=[
        "torch>=2.0",
        "torchvision>=0.15",
        "fvcore",
        "pycocotools",
        "numpy",
        "opencv-python",
        "matplotlib",
        "omegaconf>=2.1,<2.4",  # Detectron2's bounds
        "hydra-core>=1.1",
    ],
    extras_require={
        "export": EXPORT,
        "slurm": SLURM,
        "fast-eval": FAST_EVAL,
        "dev": [
            "hypothesis",
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "ruff",
            *EXPORT,
            *SLURM,
            *FAST_EVAL,
        ],
    },
)
