#!/usr/bin/env python
"""Get Detectron2 into the Python that runs this, from the best source within reach.

    python tools/install_detectron2.py                    # first of: installed, official, sdist
    python tools/install_detectron2.py --source sdist     # insist on one

Sources: "official" is github.com/facebookresearch/detectron2 at a pinned commit, which needs a C++
compiler; "sdist" is the Python part of release 0.5 from the package index, mended for today's
PyTorch, NumPy and Pillow (`detectron2_mends.py`), without compiled operators. Both need PyTorch.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import List, Optional

from detectron2_mends import ADDED_FILES, MENDS, MendError, apply_mends

REPOSITORY = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main, June 2026
SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
TIMEOUT_SECONDS = 10

# The sdist's own build script cannot even tell pip its name on a current Python, so pip would refuse
# to download it. With this in place of setuptools pip has what it asks for, and runs nothing.
_STUB_BACKEND = '''\
import os


class _Legacy:
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


__legacy__ = _Legacy()
'''


class InstallError(RuntimeError):
    """Detectron2 cannot be installed; the message says why and what would help."""


def installed_version() -> Optional[str]:
    """Version of the Detectron2 that this Python imports, None if it imports none."""
    command = [sys.executable, "-c", "import detectron2; print(detectron2.__version__)"]
    # Not from the current folder: a checkout of Detectron2 there would shadow the installed one.
    result = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    return result.stdout.strip().splitlines()[-1] if result.returncode == 0 else None


def official_obstacle() -> Optional[str]:
    """What keeps the official repository from being built here, None if nothing does."""
    if shutil.which("git") is None:
        return "git is missing"
    compiler = os.environ.get("CXX", "").split() or ["c++"]
    if not any(shutil.which(name) for name in (*compiler[:1], "g++", "clang++", "cl")):
        return "no C++ compiler was found"
    try:
        urllib.request.urlopen(REPOSITORY, timeout=TIMEOUT_SECONDS).close()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        return f"{REPOSITORY} did not answer within {TIMEOUT_SECONDS} s ({reason})"
    return None


def install_official() -> str:
    """Build the pinned commit of the official repository; returns what was taken."""
    source = f"git+{REPOSITORY}@{COMMIT}"
    try:
        _pip(["install", "--no-build-isolation", source])
    except subprocess.CalledProcessError as error:
        raise InstallError(f"pip could not build {source} (exit code {error.returncode}).") from None
    return f"the official repository at {COMMIT[:8]}"


def install_sdist() -> str:
    """Fetch, check, mend and install the sdist of release 0.5; returns what was taken."""
    with tempfile.TemporaryDirectory() as folder:
        archive = download_sdist(Path(folder))
        check_hash(archive, SDIST_SHA256)
        root = unpack(archive, Path(folder) / "source")
        try:
            apply_mends(root, MENDS)
        except MendError as error:
            raise InstallError(f"{SDIST} is not the source that the mends know: {error}") from error
        for path, text in ADDED_FILES.items():
            (root / path).write_text(text, encoding="utf-8")
        try:
            _pip(["install", "--no-build-isolation", str(root)])
        except subprocess.CalledProcessError as error:
            raise InstallError(
                f"pip could not install the mended {SDIST} (exit code {error.returncode})."
            ) from None
    return f"{SDIST} from the package index, mended, without compiled operators"


def download_sdist(folder: Path) -> Path:
    """Let pip fetch the sdist, so that its configuration (index, mirror, proxy) counts."""
    stub = folder / "stub" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "build_meta.py").write_text(_STUB_BACKEND)
    target = folder / "download"
    command = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    environment = {**os.environ, "PYTHONPATH": str(stub.parent)}
    try:
        _pip([*command, "--dest", str(target), SDIST], environment)
    except subprocess.CalledProcessError:
        raise InstallError(
            f"pip could not fetch {SDIST} from the package index. Check the network and pip's "
            "configuration, or install Detectron2 yourself and run this again."
        ) from None
    archives = list(target.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InstallError(f"Expected one archive of {SDIST}, pip fetched {len(archives)}.")
    return archives[0]


def check_hash(archive: Path, sha256: str) -> None:
    """Raise `InstallError` unless the file is the very one that was examined."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(
            f"{archive.name} has sha256 {found}, expected {sha256}: not installed. The package "
            "index serves another file than the one these mends were written for."
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive; returns its only top-level folder."""
    with tarfile.open(archive) as file:
        # Python before 3.9.17 has no filters; the hash has said already whose file it is.
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(folder, **options)
    roots = [path for path in folder.iterdir() if path.is_dir()]
    if len(roots) != 1:
        raise InstallError(f"{archive.name} has {len(roots)} folders at its top, expected one.")
    return roots[0]


def _pip(arguments: List[str], environment=None) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=environment)


def install(source: str) -> str:
    """Install from a source, "auto" for the first that can be had; returns what was taken."""
    version = installed_version()
    if version is not None and source == "auto":
        return f"nothing: version {version} is installed"
    has_torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    if has_torch.returncode != 0:
        raise InstallError(
            f"Detectron2 needs PyTorch, which {sys.executable} cannot import. Install torch and "
            "torchvision first."
        )
    if source != "sdist":
        obstacle = official_obstacle()
        if obstacle is None:
            return install_official()
        if source == "official":
            raise InstallError(f"The official repository cannot be used: {obstacle}.")
        print(f"Detectron2: not from the official repository: {obstacle}.", flush=True)
    return install_sdist()


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", choices=("auto", "official", "sdist"), default="auto")
    source = parser.parse_args(arguments).source
    try:
        print(f"Detectron2: took {install(source)}.")
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
