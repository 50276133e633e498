"""Checkpoints that survive: torn files, kills, full disks, retention, writing in a thread."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait

import pytest
import torch
from atss.checkpoint import (
    ATSSCheckpointer,
    CheckpointError,
    load_or_resume,
    read_checkpoint,
    writing,
)
from atss.checkpoint.finding import last_checkpoint
from atss.checkpoint.writing import CheckpointWriter, remove_unfinished, to_host
from conftest import tiny_detector

from detectron2.checkpoint import DetectionCheckpointer


def write(folder, *iterations, **options):
    writer = CheckpointWriter(str(folder), **options)
    for i in iterations:
        writer.write({"model": {"a": torch.full((1000,), i)}, "iteration": i}, f"model_{i:07d}.pth")
    writer.wait()
    return writer


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth*"))


def truncate(path, size=0.5):
    os.truncate(path, int(os.path.getsize(path) * size))


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "bit", "missing"])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_resumed(damage, tmp_path, caplog):
    write(tmp_path, 9, 19, 29)
    newest = tmp_path / "model_0000029.pth"
    if damage == "missing":
        newest.unlink()
    elif damage == "zeros":  # blocks that a power cut left unwritten
        newest.write_bytes(bytes(newest.stat().st_size))
    elif damage == "bit":
        content = bytearray(newest.read_bytes())
        content[content.index(torch.full((100,), 29).numpy().tobytes()) + 40] ^= 1
        newest.write_bytes(content)
    else:
        truncate(newest, {"truncated": 0.5, "empty": 0}[damage])
    assert last_checkpoint(str(tmp_path), "--resume: ").endswith("model_0000019.pth")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "--resume: 'model_0000029.pth'" in warning and "model_0000019.pth" in warning
    assert {"missing": "is missing", "bit": "is damaged"}.get(damage, "is torn") in warning


def test_a_run_resumes_from_the_complete_checkpoint(tmp_path):
    model = tiny_detector()
    saver = ATSSCheckpointer(model, str(tmp_path))
    saver.save("model_0000009", iteration=9)
    saver.save("model_0000019", iteration=19)
    truncate(tmp_path / "model_0000019.pth", 0.9)
    loaded = load_or_resume(ATSSCheckpointer(tiny_detector(), str(tmp_path)), "", resume=True)
    assert loaded.num_iters == 10


def test_with_no_complete_checkpoint_each_is_named(tmp_path):
    write(tmp_path, 9, 19)
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is complete: .*19.*torn.*09"):
        last_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "last_checkpoint' is empty"),
        (b"\xff\x80\x02", "last_checkpoint' names, is missing"),
        (b"gone.pth\n", "'gone.pth', which .*last_checkpoint' names, is missing"),
        (b"\0" * 17, "last_checkpoint' is empty"),
        (None, "last_checkpoint' is missing"),
    ],
)
def test_a_damaged_last_checkpoint_is_named_and_the_newest_is_taken(
    content, words, tmp_path, caplog
):
    write(tmp_path, 9, 19)
    (tmp_path / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "last_checkpoint").write_bytes(content)
    assert last_checkpoint(str(tmp_path)).endswith("model_0000019.pth")
    assert re.search(words, caplog.text)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    kind = CheckpointError if content is not None else FileNotFoundError
    with pytest.raises(kind, match="checkpoint"):
        last_checkpoint(str(tmp_path))


def test_the_last_of_all_counts_with_the_iteration_in_it(tmp_path):
    writer = write(tmp_path, 9, 19)
    writer.write({"model": {}, "iteration": 14}, "model_final.pth")
    (tmp_path / "last_checkpoint").unlink()
    assert last_checkpoint(str(tmp_path)).endswith("model_0000019.pth")
    truncate(tmp_path / "model_0000019.pth")
    assert last_checkpoint(str(tmp_path)).endswith("model_final.pth")


def test_checkpoints_of_a_longer_run_before_are_taken_last(tmp_path):
    write(tmp_path, 9, 19, 89)
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    truncate(tmp_path / "model_0000019.pth")
    assert last_checkpoint(str(tmp_path)).endswith("model_0000009.pth")
    truncate(tmp_path / "model_0000009.pth")
    assert last_checkpoint(str(tmp_path)).endswith("model_0000089.pth")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_ones_and_the_best_stay(asynchronous, tmp_path):
    writer = CheckpointWriter(str(tmp_path), asynchronous, max_to_keep=2)
    for i in (9, 19, 29, 39):
        writer.write({"model": {}}, f"model_{i:07d}.pth")
        if i == 9:
            writer.name_best("model_0000009.pth")
    writer.write({"model": {}}, "model_final.pth")
    writer.wait()
    numbered = [f"model_{i:07d}.pth" for i in (9, 29, 39)]
    assert names(tmp_path) == [*numbered, "model_final.pth"]
    assert (tmp_path / "best_checkpoint").read_text() == "model_0000009.pth"
    # A resumed run counts those of before.
    write(tmp_path, 49, max_to_keep=2)
    assert names(tmp_path) == ["model_0000039.pth", "model_0000049.pth", "model_final.pth"]


def test_old_ones_stay_until_the_newer_one_is_complete(tmp_path, monkeypatch):
    write(tmp_path, 9)
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append(names(tmp_path)), replace(*a)))
    write(tmp_path, 19, max_to_keep=1)
    assert all("model_0000009.pth" in there for there in seen) and len(seen) == 2
    assert names(tmp_path) == ["model_0000019.pth"]


def test_a_thread_writes_what_was_there_at_the_call_and_one_at_a_time(tmp_path, monkeypatch):
    started, go_on, threads = threading.Event(), threading.Event(), []
    write_checkpoint = writing.write_checkpoint

    def slow(*args):
        threads.append(threading.current_thread())
        started.set()
        go_on.wait(20)
        write_checkpoint(*args)

    monkeypatch.setattr(writing, "write_checkpoint", slow)
    weight, state = torch.zeros(3), {"steps": [1]}
    writer = CheckpointWriter(str(tmp_path), asynchronous=True)
    writer.write({"model": {"a": weight}, "rest": state}, "model_0000009.pth")
    started.wait(20)
    weight += 1  # training goes on
    state["steps"].append(2)
    second = threading.Thread(target=writer.write, args=({"model": {}}, "model_0000019.pth"))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and not names(tmp_path)  # it waits for the first
    go_on.set()
    second.join(20)
    writer.wait()
    content = read_checkpoint(str(tmp_path / "model_0000009.pth"))
    assert content["model"]["a"].tolist() == [0, 0, 0] and content["rest"] == {"steps": [1]}
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()


def test_the_copy_keeps_versions_of_modules_and_layouts():
    model = tiny_detector().to(memory_format=torch.channels_last)
    state = model.state_dict()
    copied = to_host({"model": state, "rest": [1, (None, "a")]})
    assert copied["model"]._metadata == state._metadata and copied["rest"] == [1, (None, "a")]
    for name, tensor in copied["model"].items():
        assert torch.equal(tensor, state[name]) and tensor.stride() == state[name].stride()
        assert tensor.data_ptr() != state[name].data_ptr() or not tensor.numel()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_of_the_thread_is_that_of_detectron2(asynchronous, tmp_path):
    model = tiny_detector()
    ours = ATSSCheckpointer(model, str(tmp_path), class_names=["x", "y", "z"])
    ours.writer.asynchronous = asynchronous
    ours.save("model_0000009", iteration=9)
    ours.writer.wait()
    DetectionCheckpointer(model, str(tmp_path)).save("theirs", iteration=9)
    mine, other = (read_checkpoint(str(tmp_path / f"{n}.pth")) for n in ("model_0000009", "theirs"))
    assert mine.pop("class_names") == ["x", "y", "z"]
    assert set(mine) == set(other) and list(mine["model"]) == list(other["model"])
    for name, tensor in other["model"].items():
        assert torch.equal(tensor, mine["model"][name])
    again = DetectionCheckpointer(tiny_detector()).load(str(tmp_path / "model_0000009.pth"))
    assert again["iteration"] == 9


def test_an_error_of_the_thread_is_raised_once_by_whoever_waits(tmp_path):
    writer = CheckpointWriter(str(tmp_path / "nowhere"), asynchronous=True)
    writer.write({"model": {}}, "model_0000009.pth")
    writer._pool.shutdown()
    assert writer.has_failed()
    with pytest.raises(FileNotFoundError):
        writer.wait()
    assert not writer.has_failed()
    writer.wait()


def test_a_checkpoint_is_written_though_the_one_before_could_not_be(tmp_path):
    folder = tmp_path / "late"
    writer = CheckpointWriter(str(folder), asynchronous=True)
    writer.write({"model": {}}, "model_0000001.pth")
    wait([writer._in_flight])
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        writer.write({"model": {}}, "model_0000003.pth")
    writer.wait()
    assert [path.name for path in folder.glob("*.pth")] == ["model_0000003.pth"]


def run_python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def test_a_full_disk_leaves_the_earlier_ones_and_no_rest(tmp_path):
    # A limit of the operating system on the size of a file: writes fail in the middle.
    code = """if True:
        import resource, sys, torch
        from atss.checkpoint import CheckpointWriter
        writer = CheckpointWriter(sys.argv[1])
        writer.write({"a": torch.zeros(1000)}, "model_0000009.pth")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            writer.write({"a": torch.zeros(1_000_000)}, "model_0000019.pth")
        except OSError as error:
            print("OSError:", error.strerror)
    """
    output = run_python(code, tmp_path).communicate(timeout=120)[0]
    assert "OSError: File too large" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000009.pth",
    ]
    assert last_checkpoint(str(tmp_path)).endswith("model_0000009.pth")


def test_the_end_of_the_process_waits_for_the_thread(tmp_path):
    code = """if True:
        import sys, torch
        from atss.checkpoint import CheckpointWriter
        writer = CheckpointWriter(sys.argv[1], asynchronous=True)
        writer.write({"a": torch.zeros(5_000_000)}, "model_0000009.pth")
    """
    process = run_python(code, tmp_path)
    assert process.communicate(timeout=120)[0] == "" and process.returncode == 0
    assert last_checkpoint(str(tmp_path)).endswith("model_0000009.pth")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_in_the_middle_of_writes_a_folder_can_be_resumed(asynchronous, tmp_path):
    code = """if True:
        import sys, torch
        from atss.checkpoint import CheckpointWriter
        writer = CheckpointWriter(sys.argv[1], bool(int(sys.argv[2])), max_to_keep=2)
        for i in range(10_000):
            writer.write({"a": torch.full((500_000,), i), "iteration": i}, f"model_{i:07d}.pth")
            print(i, flush=True)
    """
    for delay in (0.0, 0.013, 0.029):
        folder = tmp_path / str(delay)
        folder.mkdir()
        process = run_python(code, folder, int(asynchronous))
        done = [process.stdout.readline() for _ in range(3)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=180)[0].splitlines()
        announced = int((rest or done)[-1])
        content = read_checkpoint(last_checkpoint(str(folder)))
        # In a thread the one before the last is complete.
        assert content["iteration"] >= announced - asynchronous
        assert content["a"].eq(content["iteration"]).all()
        remove_unfinished(str(folder))
        assert not list(folder.glob("model_*.part"))
