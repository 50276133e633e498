"""Package `atss`, with its configs. Detectron2 itself is installed before: see README.md."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, where `atss.model_zoo` looks for them in a wheel."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # a checkout has them at its top
        for source in sorted((ROOT / "configs").rglob("*")):
            if source.suffix in (".py", ".yaml"):
                target = Path(self.build_lib, "atss", "configs", source.relative_to(ROOT / "configs"))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


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
        "omegaconf>=2.1",
        "hydra-core>=1.1",
    ],
    extras_require={
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "dev": ["pytest", "pytest-cov", "pytest-xdist", "ruff"],
    },
)
