"""The installer of Detectron2: every patch, every source, and its message when none is available.

No test needs the network: pip sees empty or faked package indexes, git and compilers are scripts.
"""

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import install_detectron2
import pytest
from _install.patches import ADDED_FILES, PATCHES, Patch, PatchError
from install_detectron2 import InstallError, check_hash, find_installed, install, official_obstacle

SCRIPT = Path(install_detectron2.__file__)

NO_OPERATORS = """\
try:
    from detectron2 import _C
except ImportError:
    from detectron2.layers.missing_operators import _C
"""

# What the patches replace in release 0.5, and the result.
BEFORE_AND_AFTER = {
    "data/transforms/transform.py": (
        "def f(interp=Image.LINEAR, near=Image.NEAREST): ...\n",
        "def f(interp=Image.BILINEAR, near=Image.NEAREST): ...\n",
    ),
    "data/build.py": (
        "a = np.zeros((n,), dtype=np.int)\nb = np.asarray(c, dtype=np.int)\nd = np.int64(1)\n",
        "a = np.zeros((n,), dtype=int)\nb = np.asarray(c, dtype=int)\nd = np.int64(1)\n",
    ),
    "data/datasets/pascal_voc.py": ("np.loadtxt(f, dtype=np.str)\n", "np.loadtxt(f, dtype=str)\n"),
    "evaluation/pascal_voc_evaluation.py": (
        "x.astype(np.bool)\n# y.astype(np.bool)\nz.astype(np.bool_)\n",
        "x.astype(bool)\n# y.astype(bool)\nz.astype(np.bool_)\n",
    ),
    "evaluation/sem_seg_evaluation.py": (
        "dtype=np.int\n" * 2 + "dtype=np.float\n" * 5 + "dtype=np.float32\n",
        "dtype=int\n" * 2 + "dtype=float\n" * 5 + "dtype=np.float32\n",
    ),
    "structures/masks.py": ("a.astype(np.bool)\ndtype=np.bool\n", "a.astype(bool)\ndtype=bool\n"),
    "utils/video_visualizer.py": ("dtype=np.bool\n", "dtype=bool\n"),
    "utils/visualizer.py": ("a.astype(np.bool)\n" * 3, "a.astype(bool)\n" * 3),
    "layers/deform_conv.py": ("from detectron2 import _C\n", NO_OPERATORS),
    "layers/roi_align_rotated.py": ("from detectron2 import _C\n", NO_OPERATORS),
    "layers/rotated_boxes.py": ("from detectron2 import _C\n", NO_OPERATORS),
    "engine/hooks.py": (
        "isinstance(a, torch.optim.lr_scheduler._LRScheduler)\n" * 2,
        "isinstance(a, torch.optim.lr_scheduler.LRScheduler)\n" * 2,
    ),
    "evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
    "export/__init__.py": (
        "from .api import *\nfrom .flatten import TracingAdapter\n",
        "try:\n    from .api import *\nexcept ImportError:\n"
        "    pass  # Caffe2 is no longer part of PyTorch\nfrom .flatten import TracingAdapter\n",
    ),
    "model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\nfile = pkg_resources.resource_filename(\n"
        '    "detectron2.model_zoo", os.path.join("configs", config_path)\n)\n',
        "import os\n\nfile = "
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)\n',
    ),
}


@pytest.fixture
def release(tmp_path):
    """A tree with the places of release 0.5 that need a patch, and nothing else."""
    root = tmp_path / "detectron2_cdo-0.5"
    for path, (before, _) in BEFORE_AND_AFTER.items():
        file = root / "detectron2" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(before)
    (root / "setup.py").write_text("raise SystemExit('the setup.py of the sdist was run')\n")
    return root


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """Makes the installer work on a Python without any packages."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    return python


def only_in_path(monkeypatch, folder, **scripts):
    """Makes `folder` the whole PATH, with these shell scripts in it."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


def only_index(monkeypatch, folder):
    """Makes `folder` the only place where pip looks for packages."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_every_patch_is_tested():
    assert {patch.path for patch in PATCHES} == {f"detectron2/{path}" for path in BEFORE_AND_AFTER}


@pytest.mark.parametrize("path", BEFORE_AND_AFTER)
def test_patch_changes_its_places_only(release, path):
    for patch in PATCHES:
        if patch.path == f"detectron2/{path}":
            patch.apply(release)
    for other, (before, after) in BEFORE_AND_AFTER.items():
        assert (release / "detectron2" / other).read_text() == (after if other == path else before)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.path}-{patch.why}")
def test_patch_without_its_place_is_an_error(release, patch):
    (release / patch.path).write_text("import os\n")
    with pytest.raises(PatchError, match=rf"{patch.path}: 0 places .* expected {patch.count}"):
        patch.apply(release)
    assert (release / patch.path).read_text() == "import os\n"


def test_patch_with_more_places_than_declared_is_an_error(release):
    file = release / "detectron2/data/build.py"
    file.write_text(file.read_text() + "e = np.int(1)\n")
    with pytest.raises(PatchError, match="build.py: 3 places .* expected 2"):
        PATCHES[0].apply(release)


def test_patch_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(PatchError, match="a/b.py: no such file"):
        Patch("a/b.py", "x", "y", 1, "why").apply(tmp_path)


def test_missing_operators_say_what_is_missing():
    namespace = {}
    exec(ADDED_FILES["detectron2/layers/missing_operators.py"], namespace)
    with pytest.raises(NotImplementedError, match=r"detectron2\._C\.nms_rotated .* official"):
        namespace["_C"].nms_rotated()


def test_unpacked_release_is_patched_and_installs_as_detectron2(release, tmp_path):
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(release, release.name)

    root = install_detectron2.unpack_patched(archive, tmp_path / "source")

    for path, (_, after) in BEFORE_AND_AFTER.items():
        assert (root / "detectron2" / path).read_text() == after
    command = [sys.executable, "setup.py", "--quiet", "--name", "--version"]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["detectron2", "0.5+patched"]


def test_archive_of_something_else_is_refused(tmp_path):
    (tmp_path / "README").write_text("something else")
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "README", "detectron2_cdo-0.5/README")
    with pytest.raises(InstallError, match="not what the patches are for: .*build.py"):
        install_detectron2.unpack_patched(archive, tmp_path / "source")


def test_hash_is_checked(tmp_path):
    file = tmp_path / "abc"
    file.write_bytes(b"abc")  # its SHA-256 is an example of FIPS 180-2
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    check_hash(file, sha256)
    with pytest.raises(InstallError, match=f"abc has sha256 {sha256}, expected 0+: not installed"):
        check_hash(file, "0" * 64)


def test_wrong_file_under_the_right_name_is_not_run_and_not_installed(
    release, tmp_path, monkeypatch
):
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index" / "detectron2_cdo-0.5.tar.gz", "w:gz") as file:
        file.add(release, release.name)
    only_index(monkeypatch, tmp_path / "index")
    monkeypatch.setattr(install_detectron2, "unpack_patched", lambda *_: pytest.fail("unpacked"))
    # pip got past the setup.py of `release`, which exits, so it was not run.
    with pytest.raises(InstallError, match="detectron2_cdo-0.5.tar.gz has sha256 .* not installed"):
        install_detectron2.install_sdist()


def test_nothing_within_reach_is_one_clear_line(tmp_path, monkeypatch):
    only_index(monkeypatch, tmp_path)
    command = [sys.executable, str(SCRIPT), "--source", "sdist"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "could not download detectron2-cdo==0.5" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_both_sources_out_of_reach_names_both(monkeypatch, capsys):
    def fail():
        raise InstallError("no index")

    monkeypatch.setattr(install_detectron2, "find_installed", lambda: None)
    monkeypatch.setattr(install_detectron2, "official_obstacle", lambda: "no route")
    monkeypatch.setattr(install_detectron2, "install_sdist", fail)
    assert install_detectron2.main([]) == 1
    assert capsys.readouterr().err == (
        "install_detectron2: no index. The official repository: no route.\n"
    )


def test_second_run_does_nothing(monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(install_detectron2, "find_installed", lambda: "".join(installed))
    monkeypatch.setattr(install_detectron2, "official_obstacle", lambda: "no route")
    monkeypatch.setattr(
        install_detectron2, "install_sdist", lambda: installed.append("version 0.5") or "the sdist"
    )
    assert install_detectron2.main([]) == 0
    assert install_detectron2.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Detectron2: installed the sdist (no route): version 0.5.",
        "Detectron2: nothing to do, version 0.5 is installed.",
    ]
    assert len(installed) == 1


def test_official_build_that_fails_falls_back_to_the_sdist(monkeypatch):
    def fail():
        raise InstallError("the compiler gave up")

    monkeypatch.setattr(install_detectron2, "find_installed", lambda: "")
    monkeypatch.setattr(install_detectron2, "official_obstacle", lambda: None)
    monkeypatch.setattr(install_detectron2, "install_official", fail)
    monkeypatch.setattr(install_detectron2, "install_sdist", lambda: "the sdist")
    assert install("auto").startswith("installed the sdist (the compiler gave up)")
    with pytest.raises(InstallError, match="cannot be used: the compiler gave up"):
        install("official")


def test_git_and_compiler_are_needed_for_the_official_repository(tmp_path, monkeypatch):
    only_in_path(monkeypatch, tmp_path / "empty")
    assert official_obstacle() == "git is missing"
    only_in_path(monkeypatch, tmp_path / "git", git="exit 0")
    assert official_obstacle() == "no C++ compiler was found"
    only_in_path(monkeypatch, tmp_path / "both", git="exit 0", **{"c++": "exit 0"})
    assert official_obstacle() is None


def test_repository_that_cannot_be_reached_says_why(tmp_path, monkeypatch):
    scripts = {"git": "echo 'fatal: no such host' >&2; exit 128", "c++": "exit 0"}
    only_in_path(monkeypatch, tmp_path / "bin", **scripts)
    assert official_obstacle() == "fatal: no such host"


def test_silent_repository_is_given_up(tmp_path, monkeypatch):
    scripts = {"git": "exec /bin/sleep 60", "c++": "exit 0"}
    only_in_path(monkeypatch, tmp_path / "bin", **scripts)
    monkeypatch.setattr(install_detectron2, "TIMEOUT_SECONDS", 0.2)
    assert official_obstacle().endswith("did not answer within 0.2 s")


def test_python_without_detectron2_is_seen_as_such(bare_python, tmp_path, monkeypatch):
    assert find_installed() is None
    # Neither a checkout in the current folder nor a left-over folder is an installation.
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("__version__ = '0.0'\n")
    monkeypatch.chdir(tmp_path)
    assert find_installed() is None
    (tmp_path / "leftover" / "detectron2").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "leftover"))
    assert find_installed() is None


def test_installed_detectron2_is_found_and_a_broken_one_is_an_error(
    bare_python, tmp_path, monkeypatch
):
    package = tmp_path / "site" / "detectron2"
    package.mkdir(parents=True)
    for name in ("engine", "evaluation", "modeling"):
        (package / f"{name}.py").touch()
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert find_installed() == f"version 9.9 in {package}"

    (package / "engine.py").write_text("import caffe2\n")
    with pytest.raises(InstallError, match="cannot be imported: .*No module named 'caffe2'"):
        find_installed()


def test_missing_torch_is_named(bare_python):
    with pytest.raises(InstallError, match="needs PyTorch, which .*bare.* cannot import"):
        install("sdist")


def test_help_tells_the_sources():
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert "{auto,official,sdist}" in answer.stdout
