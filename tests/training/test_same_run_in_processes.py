"""Runs shared by processes are the same as those of one, also when processes are killed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from atss.checkpoint import read_checkpoint
from atss.detector import ATSSDetector
from atss.training.launch import launch
from atss.training.loop import StepTrainer, create_ddp_model
from conftest import REPO, make_input, tiny_detector
from stress import _thin_runs as thin_runs

from detectron2.utils import comm
from detectron2.utils.events import EventStorage

NUM_STEPS = 4
KILLER = '''"""Ends the second process in its fourth step, in the first life of the job."""

import os

from atss.training.loop import StepTrainer
from detectron2.utils import comm

run_step = StepTrainer.run_step


def run_step_or_die(trainer):
    is_first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if "KILL" in os.environ and is_first_life and comm.get_rank() == 1 and trainer.iter == 3:
        os._exit(9)
    run_step(trainer)


StepTrainer.run_step = run_step_or_die
'''


def global_batches():
    """Of four images, of which the latter two, those of the last processes, have no objects."""
    torch.manual_seed(1)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 30.0], [30.0, 20.0, 90.0, 60.0]])
    for _ in range(NUM_STEPS):
        yield [
            make_input(boxes=boxes[: i + 1], classes=[i, 2][: i + 1]) if i < 2 else make_input()
            for i in range(4)
        ]


def steps_in_process(folder):
    """Train, and write losses, first gradients and last weights of this process."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_ddp_model(tiny_detector(), broadcast_buffers=False)
    size = 4 // world_size
    shares = [batch[rank * size : (rank + 1) * size] for batch in global_batches()]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    trainer = StepTrainer(model, shares, optimizer)
    model.train()
    losses, gradients = [], {}
    with EventStorage() as storage:
        for trainer.iter in range(NUM_STEPS):
            trainer.storage = storage
            trainer.run_step()
            losses.append(trainer.report.losses)
            for name, parameter in model.named_parameters():
                if trainer.iter == 0 and parameter.grad is not None:
                    gradients[name.replace("module.", "")] = parameter.grad.clone()
    weights = {name.replace("module.", ""): w for name, w in model.state_dict().items()}
    content = {"losses": losses, "gradients": gradients, "weights": weights}
    torch.save(content, f"{folder}/{world_size}_{rank}.pth")


def test_losses_gradients_and_weights_do_not_depend_on_the_number_of_processes(tmp_path):
    steps_in_process(tmp_path)
    expected = torch.load(tmp_path / "1_0.pth")
    for world_size in (2, 4):
        launch(steps_in_process, world_size, args=(str(tmp_path),), device="cpu")
        for rank in range(world_size):
            found = torch.load(tmp_path / f"{world_size}_{rank}.pth")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def train_in_process(folder, arguments):
    """Train, and write the image ids and losses of each step of this process."""
    torch.set_num_threads(1)
    steps, forward = [], ATSSDetector.forward

    def recording(model, batch):
        outputs = forward(model, batch)
        if model.training:
            losses = {name: float(loss.detach()) for name, loss in outputs.items()}
            steps.append([[inputs["image_id"] for inputs in batch], losses])
        return outputs

    ATSSDetector.forward = recording
    try:
        thin_runs.run_in_process("lazy", arguments)
    finally:
        ATSSDetector.forward = forward
    with open(f"{folder}/steps_{comm.get_world_size()}_{comm.get_rank()}.json", "w") as file:
        json.dump(steps, file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return thin_runs.make_data(tmp_path_factory.mktemp("data"))


def test_a_run_of_one_process_goes_on_in_two_with_the_same_images_and_losses(data, tmp_path):
    run = tmp_path / "run"
    train_in_process(str(tmp_path), thin_runs.command("lazy", run, data))
    (run / "run.lock").unlink()  # this process still has it
    (run / "model_final.pth").unlink()
    (run / "model_0000005.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    arguments = thin_runs.command("lazy", run, data, "--resume")
    launch(train_in_process, 2, args=(str(tmp_path), arguments), device="cpu")
    expected = json.loads((tmp_path / "steps_1_0.json").read_text())[2:]
    shares = [json.loads((tmp_path / f"steps_2_{rank}.json").read_text()) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(expected) == 4
    for (images, losses), *parts in zip(expected, *shares):
        assert parts[0][0] + parts[1][0] == images
        means = {name: (parts[0][1][name] + parts[1][1][name]) / 2 for name in losses}
        assert means == pytest.approx(losses, rel=1e-5, abs=1e-5)


def test_a_worker_killed_under_torchrun_is_restarted_and_the_run_is_the_same(data, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    path = os.pathsep.join(map(str, [tmp_path, REPO / "projects/ATSS"]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tool = str(REPO / "tools/lazyconfig_train_net.py")
    for name, kill_it in (("undisturbed", {}), ("killed", {"KILL": "1"})):
        arguments = thin_runs.command("lazy", tmp_path / name, data, "--import", "killer")
        process = subprocess.run(
            [sys.executable, *launcher, "--max-restarts=1", tool, *arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **kill_it},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        log = (tmp_path / name / "log.txt").read_text()
        assert log.count("Starting training from iteration") == (2 if kill_it else 1)
    ends = [
        read_checkpoint(str(tmp_path / name / "model_final.pth"))
        for name in ("undisturbed", "killed")
    ]
    assert list(thin_runs.differences(*ends)) == []
