"""The image scripts under torchrun, on the CPU with gloo: two and three processes."""
import json
import os
import pathlib
import re
import signal
import time

import make_data
import pytest
import torch
from launcher import ROOT, Process, run, start_together, torchrun_environment, wait_for
from make_runs import arguments, checkpoint, photos, same_checkpoints, scalars
from scripts import each, each_case, model
from steps import vector

import common
from common import UserError, training

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
    assert [e.step for e in scalars(tmp_path / "straight", "losses/generator")] == [1, 2, 4, 8, 12, 16]
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


def torchrun(*command):
    """torchrun itself, which starts two processes."""
    return Process("tests/helpers/torchrun.py", "--standalone", "--nproc-per-node", 2, *command)


@each("gngan_cnn")
def test_one_that_dies_ends_all(script, data, tmp_path):
    """torchrun itself: it stops the others and reports; the last checkpoint is good."""
    process = torchrun(ROOT / f"{script.SCRIPT}.py", *arguments(data, tmp_path, "r", "--iterations", 100000,
                                                                "--checkpoint-every", 1))
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists() and checkpoint(tmp_path / "r")["iteration"], process)
    pid = process.process.pid
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in err
    assert common.read_checkpoint(tmp_path / "r", script.SCRIPT)[1]["iteration"] > 0


@each("gngan_cnn")
def test_slurms_signal(script, data, tmp_path):
    """README's option makes torchrun pass SIGUSR1 on: everything is saved."""
    option = re.search(r"--signals-to-handle\s[A-Z1,]+", (ROOT / "README.md").read_text())[0]
    process = torchrun(*option.split(), ROOT / f"{script.SCRIPT}.py", *arguments(data, tmp_path, "r", "--iterations",
                                                                                 100000))
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert "go on with --resume" in out
    run(script, "--resume", tmp_path / "r", "--iterations", checkpoint(tmp_path / "r")["iteration"] + 1)


# ------------------------------------------------------------------------------------ errors that several processes see
@pytest.mark.parametrize("rank, number", [(0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGUSR1)])
@each("gngan_cnn")
def test_a_signal_while_joining(script, data, tmp_path, rank, number):
    """A process whose peers have not come yet ends at once."""
    process, = start_together(2, script, *arguments(data, tmp_path, "r"), present=[rank])
    wait_for(lambda: process.store.num_keys(), process)  # it has come
    time.sleep(1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number and not (tmp_path / "r").exists()


@pytest.mark.parametrize("rank, number", [(0, signal.SIGINT), (1, signal.SIGTERM)])
@each("gngan_cnn")
def test_a_signal_while_another_decodes(script, tmp_path, rank, number):
    """Process 0 waits for the lock of the decoded images, process 1 for process 0: a signal ends either."""
    source = make_data.image_zip(tmp_path / "photos.zip", 12)
    with common.lock(tmp_path / ".photos-32px-lock", wait=0):
        processes = start_together(2, script, *arguments(source, tmp_path, "r"))
        wait_for(lambda: "waiting for another process" in processes[0].read("err"), processes[0])
        time.sleep(0.5)
        for process in (processes[rank], processes[1 - rank]):
            process.send_signal(number)
            assert "Traceback" not in process.communicate(timeout=20)[1] and process.returncode == 128 + number


def program(folder, body):
    """A program that joins its peers; `rank` is its number."""
    file = folder / "program.py"
    file.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common
from common import training

def main():
    training.JOINING = 3.0
    training.choose_device("cpu", tf32=False, deterministic=False)
    rank, _ = training.world()
    {body}
    return 0

common.run(main)
""")
    return str(file)


def test_peers_that_do_not_come(tmp_path):
    process, = start_together(2, program(tmp_path, "pass"), present=[0])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1
    assert err.startswith("program.py: error: not all of torchrun's 2 processes have come within 3 seconds")


def test_a_fault_of_one(tmp_path):
    """One traceback, of the fault itself; or a line where a process has ended without a word."""
    processes = start_together(2, program(tmp_path, "1 // (1 - rank); training.average([common.torch.ones(2)])"))
    errors = [process.communicate()[1] for process in processes]
    assert processes[1].returncode == 1 and "ZeroDivisionError" in errors[1] and not errors[0]
    killed = "rank and common.os.kill(common.os.getpid(), 9); training.average([common.torch.ones(2)])"
    processes = start_together(2, program(tmp_path, killed))
    errors = [process.communicate()[1] for process in processes]
    assert re.fullmatch("program.py: error: no connection to another of torchrun's processes: .*\n", errors[0])
    assert processes[0].returncode == 2 and processes[1].returncode == -9


def test_restarts(tmp_path):
    """`torchrun --max-restarts` keeps its store: all join again, and another process that fails then says so, too."""
    fault = """attempt = int(common.os.environ["TORCHELASTIC_RESTART_COUNT"])
    if rank == attempt:
        raise common.UserError(f"process {rank} fails")
    training.average([common.torch.ones(2)])"""
    store = None
    for attempt in (0, 1):
        processes = start_together(2, program(tmp_path, fault), store=store, attempt=attempt)
        store = processes[0].store
        assert "".join(finish(processes, 2)) == f"program.py: error: process {attempt} fails\n"


@pytest.mark.parametrize("own, message", [
    (["--data-dir", "absent"], "no such folder or file: absent"), (["--batch-size", 10], "have different flags"),
    (["--seed", -1], "--seed is -1")])
@each("gngan_cnn")
def test_an_error_of_one(script, data, tmp_path, own, message):
    """The last process alone fails, after or before all have joined: its line is the only one."""
    processes = start_together(2, script, *arguments(data, tmp_path, "r"), own=own)
    if own[0] == "--seed":
        processes[1].communicate()
        processes[0].send_signal(signal.SIGTERM)  # as torchrun does then
    errors = [process.communicate()[1] for process in processes]
    assert "Traceback" not in "".join(errors)
    line, = (line for line in "".join(errors).splitlines() if "error:" in line)
    assert message in line and processes[1].returncode == 2 and processes[0].returncode != 0


@each("gngan_cnn")
def test_an_error_of_the_first(script, data, tmp_path):
    """It cannot read the images, or write, while the others wait."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"no picture")
    for message, source, limit in (("a.png", tmp_path / "photos", 0), ("cannot write", data, 50_000)):
        processes = start_together(2, script, *arguments(source, tmp_path, "r", "--sample-every", 0),
                                   file_limit=limit)
        err = "\n".join(finish(processes, 2))
        line, = (line for line in err.splitlines() if "error:" in line)
        assert message in line and "Traceback" not in err


@each()
def test_an_error_of_all(script, data, tmp_path):
    """A wrong command, and one that cannot be split: one process of them says so."""
    for flags, message in ((["--iterations", "x"], "Error parsing --iterations"), (["--seed", -1], "--seed is -1"),
                           (["--batch-size", 8], "divisible by 3 processes, with 2 images each: give --batch-size 6")):
        err = "".join(finish(start_together(3, script, *arguments(data, tmp_path, "r"), *flags), 2))
        assert err.count(message) == 1 and "Traceback" not in err and not (tmp_path / "r").exists()


@each("gngan_synthetic")
def test_one_process_alone(script, tmp_path):
    """What trains in one process does not train twice."""
    err = "".join(finish(start_together(2, script, "--run-dir", tmp_path, "--epochs", 1), 2))
    assert err.count("leave torchrun out") == 1 and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", [("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
                                       ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("WORLD_SIZE", "RANK")])
def test_processes_without_torchrun(variables, monkeypatch, capsys):
    """`srun -n 2 python SCRIPT` trains two runs: a line says so, once."""
    for count, number, told in ((2, 0, True), (2, 1, False), (1, 0, False), ("", 0, False)):
        for name, value in zip(variables, (count, number)):
            monkeypatch.setenv(name, str(value))
        training.choose_device("cpu", tf32=False, deterministic=False)
        err = capsys.readouterr().err
        assert ("torchrun" in err) == told == (err.count("\n") == 1)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        training.choose_device("cuda", tf32=False, deterministic=False)


def test_more_processes_than_gpus(monkeypatch):
    _store, environments = torchrun_environment(3)
    for name, value in environments[2].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes on this machine, which has 2 GPUs: lower --nproc-per-node"):
        training.choose_device("auto", tf32=False, deterministic=False)


@each("gngan_cnn")
def test_scores(script, tmp_path):
    """Every process samples its share; one writes."""
    weights = make_data.inception_weights(tmp_path / "inception.pth")
    finish(start_together(2, script, *arguments(photos(tmp_path, 12), tmp_path, "r", "--iterations", 2, "--eval-every",
                                                2, "--num-fake", 10, "--num-real", 4, "--inception-weights", weights),
                          environment={"XDG_CACHE_HOME": str(tmp_path / "cache")}))
    line, = common.read_lines(tmp_path / "r/metrics.jsonl")
    assert line["iteration"] == 2 and line["fid"] > 0


@each("gngan_cnn")
def test_evaluate_by_another_number(script, tmp_path):
    """--evaluate takes no mini-batch: the saved --batch-size need not be divisible by its processes."""
    run(script, *arguments(photos(tmp_path, 12), tmp_path, "r", "--iterations", 1, "--batch-size", 9))
    err = "".join(finish(start_together(2, script, "--evaluate", tmp_path / "r", "--inception-weights", "absent"), 2))
    assert "absent is not torch-fidelity" in err and "divisible" not in err and err.count("error:") == 1
