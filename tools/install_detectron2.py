#!/usr/bin/env python3
"""Install Detectron2 into the Python that runs this, from the best available source.

    python tools/install_detectron2.py                    # first of: installed, official, sdist
    python tools/install_detectron2.py --source sdist     # this source, even if one is installed

Sources: "official" is github.com/facebookresearch/detectron2 at a pinned commit, which needs git
and a C++ compiler; "sdist" is the Python part of release 0.5 from the package index, patched to
work with current PyTorch, NumPy and Pillow, without compiled operators, which ATSS does not need.
Both need PyTorch. pip downloads, with its settings of index, mirror and proxy.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Optional

from _install.patches import ADDED_FILES, PATCHES, PatchError

REPOSITORY = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main, June 2026
TIMEOUT_SECONDS = 10  # for the repository to answer

# Its Python files equal those of the tag v0.5, and no other release is on the package index.
SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

_ABSENT = 3
# Neither a checkout in the current folder is an installation, nor a folder without a version, which
# `pip uninstall` leaves where files were added.
_PROBE = f"""
import sys
sys.path[:] = [path for path in sys.path if path]
try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    sys.exit({_ABSENT})
if not hasattr(detectron2, "__version__"):
    sys.exit({_ABSENT})
import detectron2.engine, detectron2.evaluation, detectron2.modeling
print(f"version {{detectron2.__version__}} in {{detectron2.__path__[0]}}")
"""

# `pip download` runs the setup.py of an sdist for its metadata, before the hash is checked, and
# then refuses the metadata, because an extra names a URL. This module in place of setuptools gives
# pip the metadata without running anything of the sdist.
_STUB_BACKEND = """\
import os


class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = os.path.join(metadata_directory, "detectron2_cdo-0.5.dist-info")
        os.makedirs(folder)
        with open(os.path.join(folder, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: detectron2-cdo\\nVersion: 0.5\\n")
        return "detectron2_cdo-0.5.dist-info"
"""


class InstallError(RuntimeError):
    """Detectron2 cannot be installed; the message says why and what would help."""


def find_installed() -> Optional[str]:
    """Version and folder of the Detectron2 that this Python imports, None if there is none.

    Raises:
        InstallError: one is installed, but it does not work with what else is installed.
    """
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == _ABSENT:
        return None
    if result.returncode != 0:
        raise InstallError(
            f"the installed Detectron2 cannot be imported: {_last_line(result.stderr)}. "
            "Fix that, or replace Detectron2 with --source official or --source sdist"
        )
    return _last_line(result.stdout)


def official_obstacle() -> Optional[str]:
    """Why the official repository cannot be built here, None if it can."""
    if shutil.which("git") is None:
        return "git is missing"
    compiler = os.environ.get("CXX", "").split() or ["c++"]
    if not any(shutil.which(name) for name in (compiler[0], "g++", "clang++", "cl")):
        return "no C++ compiler was found"
    try:
        # With git, as pip does later: urllib may have another proxy.
        result = subprocess.run(
            ["git", "ls-remote", REPOSITORY, "HEAD"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except subprocess.TimeoutExpired:
        return f"{REPOSITORY} did not answer within {TIMEOUT_SECONDS} s"
    if result.returncode != 0:
        return _last_line(result.stderr)
    return None


def install_official() -> str:
    """Build the pinned commit of the official repository; returns what was installed."""
    source = f"git+{REPOSITORY}@{COMMIT}"
    if _pip("install", "--no-build-isolation", source).returncode != 0:
        raise InstallError(f"pip could not build {source}, see above")
    return f"the official repository at {COMMIT[:8]}"


def install_sdist() -> str:
    """Download, check, patch and install the sdist of release 0.5; returns what was installed."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        archive = download_sdist(Path(folder))
        check_hash(archive, SDIST_SHA256)
        root = unpack_patched(archive, Path(folder) / "source")
        if _pip("install", "--quiet", str(root)).returncode != 0:
            raise InstallError(f"pip could not install the patched {SDIST}, see above")
    return f"{SDIST} from the package index, patched, without compiled operators"


def download_sdist(folder: Path) -> Path:
    """Let pip download the sdist into `folder` without running any of it; returns the archive."""
    stub = folder / "stub" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build_meta.py").write_text(_STUB_BACKEND)
    result = _pip(
        "download",
        "--no-deps",
        "--no-build-isolation",
        "--use-pep517",
        "--no-binary=:all:",
        f"--dest={folder}",
        SDIST,
        env={**os.environ, "PYTHONPATH": str(stub.parent)},
        capture_output=True,
    )
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        raise InstallError(
            f"pip could not download {SDIST} from the package index: {_last_line(result.stderr)}. "
            "Check the network and pip's configuration, or install Detectron2 yourself"
        )
    return archives[0]


def check_hash(archive: Path, sha256: str) -> None:
    """Raise `InstallError` unless the file is the one that the patches were written for."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(f"{archive.name} has sha256 {found}, expected {sha256}: not installed")


def unpack_patched(archive: Path, folder: Path) -> Path:
    """Unpack the archive below `folder` and patch it; returns its root, which pip can install."""
    with tarfile.open(archive) as file:
        # Python before 3.9.17 has no filters; the hash is already known to be right.
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(folder, **options)
    root = folder / archive.name[: -len(".tar.gz")]
    try:
        for patch in PATCHES:
            patch.apply(root)
    except PatchError as error:
        raise InstallError(f"{SDIST} is not what the patches are for: {error}") from error
    for path, text in ADDED_FILES.items():
        (root / path).write_text(text, encoding="utf-8")
    return root


def install(source: str = "auto") -> str:
    """Install from a source, or "auto" for the first available; returns what was done."""
    if source == "auto":
        installed = find_installed()
        if installed:
            return f"nothing to do, {installed} is installed"
    has_torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    if has_torch.returncode != 0:
        raise InstallError(
            f"Detectron2 needs PyTorch, which {sys.executable} cannot import. Install torch and "
            "torchvision first"
        )
    return f"installed {_install_from(source)}: {find_installed() or 'but Python does not find it'}"


def _install_from(source: str) -> str:
    if source == "sdist":
        return install_sdist()
    obstacle = official_obstacle()
    if obstacle is None:
        try:
            return install_official()
        except InstallError as error:
            obstacle = str(error)
    if source == "official":
        raise InstallError(f"the official repository cannot be used: {obstacle}")
    try:
        return f"{install_sdist()} ({obstacle})"
    except InstallError as error:
        raise InstallError(f"{error}. The official repository: {obstacle}") from None


def _pip(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, text=True, **options)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "WARNING" not in line]
    return lines[-1].strip().rstrip(".") if lines else "it gave no reason"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("auto", "official", "sdist"), default="auto")
    try:
        print(f"Detectron2: {install(parser.parse_args(arguments).source)}.")
    except InstallError as error:
        print(f"install_detectron2: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
