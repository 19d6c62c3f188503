"""The image scripts under torchrun, on the CPU with gloo: two and three processes."""
import json
import os
import pathlib
import signal
import subprocess
import sys

import make_data
import pytest
import torch
from launcher import ROOT, Process, run, start_together, wait_for
from make_runs import arguments, checkpoint, photos, same_checkpoints, scalars
from scripts import each, each_case, model
from steps import vector

import common

TINY = {"width": 1 / 32, "latent_dim": 8, "batch_size": 12}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("images"))


def finish(processes, status=0):
    """Wait for all; their stderr."""
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), errors
    return errors


def iterate(script, count, setting, iterations, folder, *plain):
    """What `count` processes have after some iterations, see one_process.py; count 1: one alone, without torchrun."""
    folder = folder / str(count)
    folder.mkdir()
    given = ["tests/helpers/one_process.py", script.SCRIPT, model(script), json.dumps({**TINY, **setting}), iterations,
             folder, *plain]
    finish(start_together(count, *given) if count > 1 else [Process(*given)])
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@each_case({"gngan_cnn": [(2, {}), (3, {"hinge": True})], "gngan_resnet": [(2, {})],
            "mmgan_dcgan": [(2, {}), (3, {"kernel": "exp"})],
            "mmgan_igan": [(2, {}), (3, {"baseline": "minibatch"})]})
def test_all_processes_hold_the_same(script, case, tmp_path):
    """Weights, averages and running statistics, bit for bit; each has seen images and draws of its own."""
    count, setting = case
    first, *others = iterate(script, count, {**setting, "ema": 0.9}, 10, tmp_path)
    for other in others:
        assert all(torch.equal(v, other["networks"][k]) for k, v in first["networks"].items())
        assert not torch.equal(first["losses"][0]["score_real"], other["losses"][0]["score_real"])
        assert not torch.equal(first["losses"][0]["score_fake"], other["losses"][0]["score_fake"])


PLAIN = {"autoencoder": False, "neighbor_embedding": False, "gradient_matching": False, "lambda_p": 1.0}


@each_case({"gngan_cnn": [PLAIN], "gngan_resnet": [PLAIN | {"hinge": False}],
            "mmgan_dcgan": [{"baseline": True}, {"kernel": "linear", "manifold_in_discriminator": False}],
            "mmgan_igan": [{"kernel": "linear"}]})
def test_processes_agree_with_one_of_the_whole_mini_batch(script, case, tmp_path):
    """Where losses are means over the samples: the processes' mean loss after each of three iterations, and so the
    weights. MMGAN's spheres have centroids that are such means, and radii that are not."""
    manifolds = "kernel" in case
    several, (alone,) = (iterate(script, n, case, 1 if manifolds else 3, tmp_path, "plain") for n in (3, 1))
    for t, losses in enumerate(alone["losses"]):
        for name in ("discriminator", "score_real", "score_fake", *(() if manifolds else ("generator",))):
            mean = sum(process["losses"][t][name] for process in several) / 3
            assert mean.item() == pytest.approx(losses[name].item(), rel=1e-4, abs=1e-6), (t, name)
    ours, theirs = several[0]["networks"], alone["networks"]
    if manifolds:
        for name in ("real_centroid", "fake_centroid"):
            torch.testing.assert_close(ours[f"averages.{name}"], theirs[f"averages.{name}"], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(vector(ours), vector(theirs), rtol=1e-4, atol=1e-5)


LONG = ["--iterations", 16, "--ema", "0.9", "--log-every", 4]


@each("gngan_cnn", "mmgan_dcgan")
def test_a_kill_and_a_change_of_number(script, data, tmp_path):
    """Killed with -9 and resumed by as many processes, a run ends bit for bit as one left alone; one process alone goes
    on too, and neither writes twice."""
    for name, more in (("straight", []), ("r", ["--checkpoint-every", 1])):
        processes = start_together(2, script, *arguments(data, tmp_path, name, *LONG, *more))
        if name == "straight":
            finish(processes)
            continue
        wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists() and checkpoint(tmp_path / "r")["iteration"],
                 processes[0])
        for process in processes:
            process.send_signal(signal.SIGKILL)
        finish(processes, -9)
    assert 0 < checkpoint(tmp_path / "r")["iteration"] < 16
    finish(start_together(2, script, "--resume", tmp_path / "r"))
    same_checkpoints(tmp_path / "r", tmp_path / "straight")
    assert [e.step for e in scalars(tmp_path / "straight", "losses/generator")] == [4, 8, 12, 16]
    longer = ["--iterations", 18] if not hasattr(script.Args, "lr_schedule") else []
    run(script, "--resume", tmp_path / "r", *longer)
    assert checkpoint(tmp_path / "r")["iteration"] == (18 if longer else 16)


@each("gngan_cnn", "mmgan_dcgan")
def test_a_signal_to_one_ends_all(script, data, tmp_path):
    """After the same iteration, with everything saved."""
    processes = start_together(2, script, *arguments(data, tmp_path, "r", "--iterations", 100000))
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), processes[0])
    before = checkpoint(tmp_path / "r")["iteration"]
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 143)
    assert before <= checkpoint(tmp_path / "r")["iteration"] < 100000
    assert "go on with --resume" in processes[0].read("out") and not processes[1].read("out")


@each("gngan_cnn")
def test_one_that_dies_ends_all(script, data, tmp_path):
    """torchrun itself: it stops the others and reports; the last checkpoint is good."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               f"{script.SCRIPT}.py", *map(str, arguments(data, tmp_path, "r", "--iterations", 100000,
                                                          "--checkpoint-every", 1))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists() and checkpoint(tmp_path / "r")["iteration"], process)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in err
    assert common.read_checkpoint(tmp_path / "r", script.SCRIPT)[1]["iteration"] > 0


@each()
def test_a_mini_batch_that_does_not_divide(script, data, tmp_path):
    processes = start_together(3, script, *arguments(data, tmp_path, "r"))
    for err in finish(processes, 2):
        assert err.startswith(f"{script.SCRIPT}.py: error: --batch-size 8 must be divisible by 3 processes")
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


@each("gngan_cnn")
def test_scores(script, tmp_path):
    """Every process samples its share; one writes."""
    weights = make_data.inception_weights(tmp_path / "inception.pth")
    finish(start_together(2, script, *arguments(photos(tmp_path, 12), tmp_path, "r", "--iterations", 2, "--eval-every",
                                                2, "--num-fake", 10, "--inception-weights", weights)))
    line, = common.read_lines(tmp_path / "r/metrics.jsonl")
    assert line["iteration"] == 2 and line["fid"] > 0
