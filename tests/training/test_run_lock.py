"""The lock of a run's folder: one run at a time, and no dead run in the way."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from atss.training import load_lazy_config, run_lock, set_up_run
from atss.training.run_lock import NAME, lock_run
from conftest import REPO

HOLD = """if True:
    import sys, time
    from atss.training.run_lock import lock_run
    try:
        lock_run(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
    print("locked", flush=True)
    sys.stdin.readline()
"""


def hold(folder):
    """A process that has the lock until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def describe(folder, **changes):
    """A lock as another run would have left it."""
    (folder / NAME).write_text(json.dumps({**run_lock._describe_self(), **changes}))


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"in use by another run .host .*process {first.pid}"):
        lock_run(str(tmp_path))
    first.communicate("end\n", timeout=180)
    assert not (tmp_path / NAME).exists()
    lock_run(str(tmp_path))
    lock_run(str(tmp_path))  # its own
    second = hold(tmp_path)
    assert f"process {os.getpid()})" in second.communicate(timeout=180)[0]
    assert second.returncode == 1


def test_the_lock_of_a_killed_run_is_replaced(tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "locked\n"
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    assert (tmp_path / NAME).exists()
    lock_run(str(tmp_path))
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_is_a_dead_run(tmp_path):
    describe(tmp_path, pid=1, start="1")
    lock_run(str(tmp_path))


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"pids": "pid:[1]"}, None])
def test_a_run_elsewhere_is_dead_without_a_sign_of_life(other, tmp_path):
    if other is None:
        (tmp_path / NAME).write_text("{")  # damaged
    else:
        describe(tmp_path, **other)
    with pytest.raises(ValueError, match="host elsewhere" if other and "host" in other else "host"):
        lock_run(str(tmp_path))
    old = os.stat(tmp_path / NAME).st_mtime - run_lock.STALE_AFTER - 1
    os.utime(tmp_path / NAME, (old, old))
    lock_run(str(tmp_path))


def test_a_living_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    lock_run(str(tmp_path))
    os.utime(tmp_path / NAME, (1, 1))
    for _ in range(500):
        if os.stat(tmp_path / NAME).st_mtime > 1:
            break
        threading.Event().wait(0.01)
    assert os.stat(tmp_path / NAME).st_mtime > 1


def test_training_takes_the_lock_and_evaluation_does_not(tmp_path):
    describe(tmp_path, host="elsewhere")
    (tmp_path / "model_0000009.pth.77.part").write_text("")
    options = [f"train.output_dir={tmp_path}", "train.init_checkpoint=", "train.device=cpu"]
    cfg = load_lazy_config(str(REPO / "configs/toy/atss_toy.py"), options)
    args = argparse.Namespace(eval_only=False, resume=False, config_file="", opts=[])
    with pytest.raises(ValueError, match="in use by another run.*Take another train.output_dir"):
        set_up_run(cfg, args)
    set_up_run(cfg, argparse.Namespace(eval_only=True, resume=False, config_file="", opts=[]))
    assert (tmp_path / "model_0000009.pth.77.part").exists()
    os.remove(tmp_path / NAME)
    set_up_run(cfg, args)
    assert (tmp_path / NAME).exists() and not list(tmp_path.glob("*.part"))
