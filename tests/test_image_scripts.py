"""The image scripts as users run them: run folders, resuming, kills, errors, scores, generated images."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import make_data
import numpy as np
import pytest
import torch
from compare import assert_same
from launcher import ROOT, Process, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import datasets

SCRIPTS = ["gngan_cnn.py", "gngan_resnet.py", "mmgan_dcgan.py", "mmgan_igan.py"]
TINY = ["--width", "0.03125", "--batch-size", "8", "--latent-dim", "8", "--eval-every", "0"]
GNGAN = ([[f"--{'' if ne else 'no-'}neighbor-embedding", f"--{'' if gm else 'no-'}gradient-matching",
           f"--{'' if ae else 'no-'}autoencoder"] for ne in (1, 0) for gm in (1, 0) for ae in (1, 0)]
         + [["--distgan"], ["--hinge"], ["--no-hinge"], ["--hinge", "--distgan"], ["--ema", "0.9"],
            ["--precision", "bf16"], ["--no-channels-last"], ["--penalty", "l2"],
            ["--autoencoder-updates", "encoder"], ["--autoencoder-updates", "separate"], ["--image-size", "48"],
            ["--alpha-schedule", "falling", "--lr-schedule", "linear"]])
MMGAN = ([["--kernel", k] for k in ("none", "linear", "poly", "rbf", "exp")]
         + [["--beta", "0"], ["--kernel-width", "50"], ["--correlation-in-discriminator", "--kernel-width", "real"],
            ["--ema", "0.9"], ["--precision", "bf16"], ["--no-channels-last"]])
SETTINGS = {"gngan_cnn.py": GNGAN, "gngan_resnet.py": GNGAN,
            "mmgan_dcgan.py": MMGAN + [["--manifold-scale", "width", "--no-manifold-in-discriminator"],
                                       ["--joint-batch"], ["--baseline"], ["--baseline", "--generator-steps", "2"],
                                       ["--image-size", "45"], ["--lr-schedule", "linear"]],
            "mmgan_igan.py": MMGAN + [["--manifold-scale", "one", "--manifold-in-discriminator"],
                                      ["--baseline", "minibatch"], ["--baseline", "feature-matching", "--ema", "0.9"],
                                      ["--baseline", "minibatch", "--no-virtual-batch-norm", "--generator-steps", "2"],
                                      ["--minibatch-discrimination"], ["--features", "pooled"], ["--image-size", "48"],
                                      ["--lr-schedule", "constant"]]}
CASES = [(s, x) for s in SCRIPTS for x in SETTINGS[s]]
every_script = pytest.mark.parametrize("script", SCRIPTS)
UNLIKE = ("seconds", "images_per_second", "run_dir", "run_name", "resume", "checkpoint_every")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data.image_zip(tmp_path_factory.mktemp("images") / "photos.zip", 40)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return make_data.inception_weights(tmp_path_factory.mktemp("inception") / "inception.pth")


def same_checkpoints(a, b, but=UNLIKE):
    assert_same(*(torch.load(f / "checkpoint.pt", weights_only=True) for f in (a, b)), but=but)


def arguments(data, folder, name, *more):
    return ["--dataset", "folder", "--data-dir", data, *TINY, "--run-dir", folder, "--run-name", name, *more]


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(tag)


# --------------------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def begin(request, data, tmp_path_factory):
    """A function from a case to its process and its folder, which begins the next two cases as well: each has one
    thread, and the tests that wait for them have nothing else to do."""
    cases = [(i.callspec.params["script"], i.callspec.params["setting"]) for i in request.session.items
             if i.originalname == "test_every_setting_trains"]
    begun = []

    def take(script, setting):
        position = cases.index((script, setting))
        for name, more in cases[len(begun) : position + 3]:
            folder = tmp_path_factory.mktemp("case")
            given = arguments(data, folder, "r", "--iterations", 2, "--log-every", 1, *more)
            begun.append((Process(name, *given), folder / "r"))
        return begun[position]

    return take


@pytest.mark.parametrize("script,setting", CASES)
def test_every_setting_trains(script, setting, begin):
    process, folder = begin(script, setting)
    _, err = process.communicate()
    assert process.returncode == 0, err
    metrics = json.loads((folder / "args.json").read_text())
    assert metrics["args"]["iterations"] == metrics["resolved"]["iterations"] == 2
    assert all(math.isfinite(e.value) for e in scalars(folder, "losses/generator"))
    networks = torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]
    assert all(v.isfinite().all() for v in networks.values())


@every_script
def test_the_run_folder(script, data, weights, tmp_path):
    """Everything that the design promises, scores included; then --evaluate and --generate from it."""
    scored = ["--eval-every", 4, "--num-real", 10, "--num-fake", 10, "--inception-weights", weights]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    given = arguments(data, tmp_path, "r", "--iterations", 4, "--log-every", 2, "--sample-every", 2, "--lr", "0.01",
                      "--lr-schedule", "constant", *scored)
    out, err = run(script, *given, environment=environment)
    folder = tmp_path / "r"
    setting = json.loads((folder / "args.json").read_text())
    assert setting["script"] == script.removesuffix(".py") and setting["versions"]["torch"] == torch.__version__
    assert setting["args"]["dataset"] == "folder" and setting["resolved"]["image_size"] == 32
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4]
    assert set(lines[0]) == {"iteration", "fid", "is_mean", "is_std", "seconds", "images_per_second"}
    assert lines[0]["fid"] > 0 and lines[0]["is_mean"] > 0.999 and lines[0]["images_per_second"] > 0
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    grid = np.asarray(Image.open(folder / "samples/00000004.png"))
    assert grid.shape == (8 * 34 + 2, 8 * 34 + 2, 3) and grid.std() > 1
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("losses/discriminator")] == [2, 4]
    assert [e.step for e in events.Images("images/samples")] == [2, 4]
    assert [e.step for e in events.Scalars("charts/images_per_second")] == [2, 4]
    assert events.Scalars("metrics/fid")[0].value == pytest.approx(lines[0]["fid"], rel=1e-5)
    assert events.Scalars("metrics/is")[0].step == 4
    last = out.splitlines()[-1]
    assert last.startswith(f"{folder}: 4 iterations, FID {lines[0]['fid']:.2f}, IS {lines[0]['is_mean']:.2f}")
    assert "4/4" in err and "it/s" in err  # the bar

    out, _ = run(script, "--evaluate", folder, environment=environment)
    scores = json.loads(out.splitlines()[-1])
    assert scores == {"iteration": 4, **{k: lines[0][k] for k in ("fid", "is_mean", "is_std")}}
    run(script, "--generate", folder, "--num-images", 11, "--out", tmp_path / "png")
    run(script, "--generate", folder / "generator.pt", "--num-images", 11, "--out", tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy")
    names = sorted(p.name for p in (tmp_path / "png").iterdir())
    assert array.shape == (11, 32, 32, 3) and array.dtype == np.uint8 and names[-1] == "000010.png"
    assert np.array_equal(array, np.stack([np.asarray(Image.open(tmp_path / "png" / n)) for n in names]))
    run(script, "--generate", folder, "--num-images", 11, "--seed", 9, "--out", tmp_path / "y.npy")
    assert script.startswith("mmgan") or not np.array_equal(np.load(tmp_path / "y.npy"), array)  # grey for so few steps
    check_error(script, ["png is not empty", "--out"], "--generate", folder, "--out", tmp_path / "png")
    check_error(script, ["/proc/nowhere"], "--generate", folder, "--out", "/proc/nowhere/x.npy")

    # an evaluation cut short by a signal is done when the run goes on (slow, and the siblings' loop is this script's)
    if script != SCRIPTS[0]:
        return
    process = Process(script, "--resume", folder, "--iterations", 6, "--eval-every", 6, "--num-fake", 100000,
                      environment=environment)
    wait_for(lambda: "scoring" in process.read("err"), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    out, _ = run(script, "--resume", folder, "--num-fake", 10, environment=environment)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 6] and "6 iterations, FID" in out.splitlines()[-1]
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["records"]) == 2
    run(script, "--generate", folder / "generator.pt", "--num-images", 3, "--out", tmp_path / "z.npy")
    assert json.loads((folder / "args.json").read_text())["args"]["resume"] is None


@pytest.mark.parametrize("script,dataset,make,size", [
    ("gngan_cnn.py", "cifar10", make_data.cifar10, 32), ("gngan_cnn.py", "stl10", make_data.stl10, 48),
    ("gngan_resnet.py", "cifar10", make_data.cifar10, 32), ("gngan_resnet.py", "stl10", make_data.stl10, 48),
    ("mmgan_dcgan.py", "mnist", make_data.mnist, 28), ("mmgan_dcgan.py", "cifar10", make_data.cifar10, 32),
    ("mmgan_dcgan.py", "celeba", make_data.celeba, 64), ("mmgan_igan.py", "cifar10", make_data.cifar10, 32)])
def test_data_sets(script, dataset, make, size, tmp_path):
    make(tmp_path / "data")
    run(script, "--dataset", dataset, "--data-dir", tmp_path / "data", *TINY, "--iterations", 2, "--run-dir", tmp_path,
        "--sample-every", 2)
    folder, = tmp_path.glob(f"{dataset}__{script.removesuffix('.py')}__1__*")
    assert Image.open(folder / "samples/00000002.png").size == (8 * (size + 2) + 2,) * 2


@every_script
def test_the_commands_as_written(script, data, tmp_path):
    """A process of its own as a user starts it: the manual, and one short run."""
    manual = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--resume" in manual.stdout and "[paper]" in manual.stdout
    given = map(str, arguments(data, tmp_path, "r", "--iterations", 2))
    plain = subprocess.run([sys.executable, ROOT / script, *given], cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert "--eval-every 0" in plain.stdout.splitlines()[-1]


def test_every_flag_is_documented():
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        body = source.split("class Args:")[1].split("\n\n\n")[0]
        fields = re.findall(r"^    (\w+): .*\n    (.*)", body, re.MULTILINE)
        assert len(fields) > 30 and all(text.startswith('"""') for _, text in fields)


# ------------------------------------------------------------------------------------------------- interruptions
TOTAL = 200
LONG = ["--iterations", TOTAL, "--log-every", 5, "--sample-every", 100, "--ema", "0.9", "--lr-schedule", "linear"]


@pytest.fixture(scope="module", params=SCRIPTS)
def straight(request, data, tmp_path_factory):
    """A run without interruption: (script, its folder)."""
    folder = tmp_path_factory.mktemp("straight")
    run(request.param, *arguments(data, folder, "r", *LONG))
    return request.param, folder / "r"


def wait_for(condition, process, seconds=60):
    start = time.time()
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < start + seconds, "no progress"
        time.sleep(0.005)


def iteration_of(process):
    """The iteration that the progress bar shows."""
    shown = re.findall(rf"(\d+)/{TOTAL} ", process.read("err"))
    return int(shown[-1]) if shown else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes_exactly(number, straight, data, tmp_path):
    """Weights, moments, averages, order of the data and draws: bit for bit those of a run left alone."""
    script, expected = straight
    process = Process(script, *arguments(data, tmp_path, "r", *LONG, "--checkpoint-every", 0))
    for _ in range(2 if script == SCRIPTS[0] else 1):
        before = iteration_of(process)
        wait_for(lambda: iteration_of(process) > before, process)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == 128 + number, err
        saved = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["iteration"]
        assert 0 < saved < TOTAL and f"go on with --resume {tmp_path / 'r'}" in out.splitlines()[-1]
        process = Process(script, "--resume", tmp_path / "r")
    _, err = process.communicate()
    assert process.returncode == 0, err
    same_checkpoints(tmp_path / "r", expected)
    for name in ("00000100.png", "00000200.png"):
        assert (tmp_path / "r/samples" / name).read_bytes() == (expected / "samples" / name).read_bytes()
    ours, theirs = ([(e.step, e.value) for e in scalars(f, "losses/generator")] for f in (tmp_path / "r", expected))
    assert ours == theirs


def test_twenty_kills(straight, data, tmp_path):
    """kill -9 at arbitrary moments, checkpoints being written all the time: each time it resumes, and ends with the
    weights of a run left alone. (Three for the siblings, whose loop is the first script's.)"""
    script, expected = straight
    rng, folder = random.Random(0), tmp_path / "r"
    file = folder / "checkpoint.pt"
    for _ in range(20 if script == SCRIPTS[0] else 3):
        if file.exists():
            start = torch.load(file, weights_only=True)["iteration"]  # never a torn file
            process = Process(script, "--resume", folder, "--checkpoint-every", 1)
        else:
            start = 0
            shutil.rmtree(folder, ignore_errors=True)
            process = Process(script, *arguments(data, tmp_path, "r", *LONG, "--checkpoint-every", 1))
        writes = rng.randrange(6) if start < TOTAL - 50 else 0  # so that the run does not end before its kills
        for _ in range(writes):
            before = file.stat().st_ino if file.exists() else None
            wait_for(lambda: file.exists() and file.stat().st_ino != before, process)
        time.sleep(rng.uniform(0, 0.02 if writes else 0.2))
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -9
    run(script, "--resume", folder)
    same_checkpoints(folder, expected)
    assert not list(folder.glob("*.tmp"))


@every_script
def test_more_iterations_later(script, data, tmp_path):
    """With no schedule a finished run can be made longer, and is what it would have been; with one it cannot."""
    for name, iterations in (("a", 6), ("b", 4)):
        run(script, *arguments(data, tmp_path, name, "--iterations", iterations, "--lr-schedule", "constant"))
    run(script, "--resume", tmp_path / "b", "--iterations", 6)
    same_checkpoints(tmp_path / "a", tmp_path / "b")
    run(script, *arguments(data, tmp_path, "c", "--iterations", 4, "--lr-schedule", "linear"))
    _, err = run(script, "--resume", tmp_path / "c", "--iterations", 6, status=2)
    assert "--iterations (4 in the checkpoint, 6 here)" in err


def test_improved_gan_resumes_exactly(data, tmp_path):
    """With the history, the reference batch and three steps of G; the first iteration has initialised by the data."""
    given = ["--baseline", "minibatch", "--lr-schedule", "constant", "--ema", "0.9"]
    for name, iterations in (("a", 5), ("b", 2)):
        run("mmgan_igan.py", *arguments(data, tmp_path, name, "--iterations", iterations, *given))
    run("mmgan_igan.py", "--resume", tmp_path / "b", "--iterations", 5)
    same_checkpoints(tmp_path / "a", tmp_path / "b")
    networks = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["networks"]
    assert networks["history.generator.count"] == 15 and networks["history.discriminator.count"] == 5
    assert not networks["discriminator.convs.0.parametrizations.weight.original0"].eq(1).any()


@every_script
def test_evaluating_does_not_change_training(script, data, tmp_path):
    run(script, *arguments(data, tmp_path, "a", "--iterations", 4, "--sample-every", 1, "--log-every", 1))
    run(script, *arguments(data, tmp_path, "b", "--iterations", 4, "--sample-every", 0, "--log-every", 0))
    same_checkpoints(tmp_path / "a", tmp_path / "b", but=(*UNLIKE, "sample_every", "log_every"))


def test_a_full_disk_keeps_the_old_checkpoint(straight, data, tmp_path):
    script, _ = straight
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, "--lr-schedule", "constant"))
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    assert len(before) > 50000
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 4, "--checkpoint-every", 1, status=2,
                 file_limit=50000)
    last = err.splitlines()[-1]
    assert last.startswith(f"{script}: error: cannot write") and "checkpoint.pt" in last and "--resume" in last
    assert "Traceback" not in err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("r/*.tmp"))


@every_script
def test_a_diverged_run_stops(script, data, tmp_path):
    given = arguments(data, tmp_path, "r", "--iterations", 50, "--lr", "1e30", "--log-every", 5)
    _, err = run(script, *given, status=2)
    last = err.splitlines()[-1]
    assert "training diverged" in last and "by iteration 5;" in last and "no checkpoint was written" in last
    assert "Traceback" not in err and not (tmp_path / "r/checkpoint.pt").exists()


@every_script
def test_weights_that_the_last_update_spoiled_are_not_saved(script, data, tmp_path):
    """G's last update can spoil its weights after every loss of the iteration was finite."""
    run(script, *arguments(data, tmp_path, "r", "--iterations", 1, "--lr-schedule", "constant"))
    checkpoint = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    checkpoint["optimizers"]["generator"]["state"][0]["exp_avg_sq"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "r/checkpoint.pt")
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 2, "--log-every", 1, status=2)
    assert "not finite by iteration 2;" in err and (tmp_path / "r/checkpoint.pt").read_bytes() == before


@every_script
def test_a_diverged_run_keeps_the_last_good_checkpoint(script, data, tmp_path):
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, "--lr-schedule", "constant"))
    checkpoint = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    checkpoint["networks"]["discriminator.linear.bias"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "r/checkpoint.pt")
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 9, "--log-every", 0, "--checkpoint-every", 2,
                 status=2)
    assert f"the last good checkpoint is {tmp_path / 'r/checkpoint.pt'}" in err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before


# -------------------------------------------------------------------------------------------------------- errors
def check_error(script, words, *given, **kwargs):
    out, err = run(script, *given, status=2, **kwargs)
    assert err.startswith(f"{script}: error: ") and len(err.splitlines()) == 1, err
    assert all(w in err for w in words), err


@every_script
@pytest.mark.parametrize("given,words", [
    (["--iterations", "0"], ["--iterations is 0"]), (["--batch-size", "1"], ["--batch-size is 1"]),
    (["--image-size", "8"], ["--image-size is 8"]), (["--width", "0"], ["--width is 0"]),
    (["--lr", "nan"], ["--lr is nan"]), (["--ema", "1"], ["--ema is 1"]), (["--beta1", "1"], ["--beta1 is 1"]),
    (["--seed", "-1"], ["--seed is -1"]), (["--seed", str(2**31)], ["--seed is 2147483648"]),
    (["--log-every", "-1"], ["--log-every is -1"]),
    (["--num-fake", "9"], ["--num-fake is 9"]), (["--batch-size", "64"], ["40 images", "--batch-size 64"]),
    (["--data-dir", "nowhere"], ["nowhere", "--data-dir"]),
    (["--run-dir", "/proc/nowhere"], ["/proc/nowhere", "--run-dir"]),
    (["--resume", "nowhere"], ["no checkpoint at nowhere"]), (["--evaluate", "a", "--generate", "b"], ["exclude"]),
    (["--eval-every", "1", "--num-real", "41"], ["--num-real 41", "40 images"]),
    (["--eval-every", "1", "--num-real", "9", "--inception-weights", "nowhere.pth"], ["nowhere.pth"]),
])
def test_errors_are_one_line(script, given, words, data, tmp_path):
    check_error(script, words, *arguments(data, tmp_path, "r", *given))
    assert not list(tmp_path.iterdir())  # no run folder is left behind


@pytest.mark.parametrize("given,words", [
    (["--distgan", "--neighbor-embedding"], ["--distgan has no neighbor embedding"]),
    (["--distgan", "--no-neighbor-embedding"], ["--distgan has no neighbor embedding"]),
    (["--distgan", "--gradient-matching"], ["--distgan has no gradient matching"]),
    (["--distgan", "--no-autoencoder"], ["--distgan needs its autoencoder"]),
    (["--lambda-p", "-1"], ["--lambda-p is -1"]), (["--alpha", "1"], ["--alpha is 1"]),
    (["--image-size", "36"], ["--image-size is 36", "multiple of 8"]),
    (["--no-gradient-matching", "--lambda-m1", "2"], ["--lambda-m1 has no effect"]),
    (["--no-neighbor-embedding", "--lambda-r", "2"], ["--lambda-r has no effect"]),
    (["--no-autoencoder", "--alpha-schedule", "falling"], ["--alpha-schedule has no effect"]),
])
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("gngan")])
def test_gngan_errors(script, given, words, data, tmp_path):
    check_error(script, words, *arguments(data, tmp_path, "r", *given))


@pytest.mark.parametrize("given,words", [
    (["--baseline", "?", "--kernel", "rbf"], ["--baseline has no kernel"]),
    (["--baseline", "?", "--beta", "1"], ["no beta"]),
    (["--baseline", "?", "--correlation-in-discriminator"], ["correlation in discriminator"]),
    (["--generator-steps", "2"], ["--generator-steps is the baseline's"]),
    (["--kernel-width", "0"], ["--kernel-width is 0"]), (["--delta", "1"], ["--delta is 1"]),
    (["--epochs", "0"], ["--epochs is 0"]), (["--num-is", "9"], ["--num-is is 9"]),
    (["--adam-eps", "0"], ["--adam-eps is 0"]),
    (["--kernel", "none", "--alpha", "0.5"], ["--kernel none has no alpha", "leave --alpha out"]),
    (["--kernel", "linear", "--kernel-width", "2"], ["--kernel linear has no kernel width"]),
    (["--beta", "0", "--correlation-in-discriminator"], ["leave --correlation-in-discriminator out"]),
])
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("mmgan")])
def test_mmgan_errors(script, given, words, data, tmp_path):
    baseline = ["minibatch"] if script == "mmgan_igan.py" else []
    given = [word for v in given for word in (baseline if v == "?" else [v])]
    check_error(script, words, *arguments(data, tmp_path, "r", *given))


@pytest.mark.parametrize("given,words", [
    (["--baseline", "feature-matching", "--label-smoothing", "0.2"], ["--label-smoothing is for", "minibatch alone"]),
    (["--no-virtual-batch-norm"], ["--[no-]virtual-batch-norm", "minibatch alone"]),
    (["--baseline", "minibatch", "--historical-averaging", "-1"], ["--historical-averaging is -1"]),
    (["--baseline", "minibatch", "--label-smoothing", "1"], ["--label-smoothing is 1"]),
    (["--baseline", "minibatch", "--features", "map"], ["--baseline has no features"]),
    (["--baseline", "minibatch", "--minibatch-discrimination"], ["leave --minibatch-discrimination out"]),
    (["--baseline", "minibatch", "--manifold-in-discriminator"], ["--baseline has no manifold in discriminator"]),
    (["--adam-eps-generator", "0"], ["--adam-eps-generator is 0"]),
    (["--image-size", "36"], ["--image-size is 36", "multiple of 8"]),
])
def test_igan_errors(given, words, data, tmp_path):
    check_error("mmgan_igan.py", words, *arguments(data, tmp_path, "r", *given))


@every_script
def test_tyros_own_message_for_a_wrong_choice(script):
    out, err = run(script, "--dataset", "imagenet", status=2)
    assert "imagenet" in out + err and "Traceback" not in err


def extended(folder, tmp_path, **changes):
    """A copy of a checkpoint, without a schedule, with other entries."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["resolved"]["lr_schedule"] = "constant"
    (tmp_path / "copy").mkdir(exist_ok=True)
    torch.save({**checkpoint, **changes}, tmp_path / "copy/checkpoint.pt")
    return tmp_path / "copy"


def test_resume_errors(straight, data, tmp_path):
    script, folder = straight
    check_error(script, ["--width (0.03125 in the checkpoint, 0.5 here)", "--lr (0.000", "leave these flags out"],
                "--resume", folder, "--width", "0.5", "--lr", "0.1")
    check_error(script, ["--width (0.03125"], "--evaluate", folder, "--width", "0.5")
    check_error(script, ["holds G alone"], "--resume", folder / "generator.pt")
    check_error(script, [f"already at {TOTAL}"], "--resume", extended(folder, tmp_path), "--iterations", "7")
    check_error(script, ["began on cuda", "--device cuda"], "--resume", extended(folder, tmp_path, device="cuda"))
    changed = torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]
    changed.pop("generator.linear.weight")
    check_error(script, ["does not fit", "generator.linear.weight"], "--resume",
                extended(folder, tmp_path, networks=changed))
    resolved = torch.load(folder / "checkpoint.pt", weights_only=True)["resolved"]
    for foreign in (resolved | {"unknown": 1}, {k: v for k, v in resolved.items() if k != "ema"}):
        odd, = foreign.keys() ^ resolved.keys()
        check_error(script, ["with other arguments", f"({odd})"], "--resume",
                    extended(folder, tmp_path, resolved=foreign))
    other = make_data.image_zip(tmp_path / "other.zip", 40, seed=3)
    datasets.load("folder", other, 32)  # so that no progress bar precedes the error
    check_error(script, ["does not hold the images", "--data-dir"], "--resume", folder, "--data-dir", other)
    file = tmp_path / "checkpoint.pt"
    for contents in ((folder / "checkpoint.pt").read_bytes()[:2000], b""):
        file.write_bytes(contents)
        check_error(script, ["cannot read the checkpoint", str(file)], "--resume", tmp_path)
    torch.save([1], file)
    check_error(script, [f"is not a checkpoint of {script}"], "--resume", tmp_path)
    torch.save({"script": "another", "args": {}, "resolved": {}}, file)
    check_error(script, [f"is a checkpoint of another.py, not of {script}"], "--resume", tmp_path)


def test_a_finished_run_resumed_is_finished(straight):
    script, folder = straight
    before = (folder / "generator.pt").read_bytes()
    out, _ = run(script, "--resume", folder)
    assert f"{TOTAL} iterations" in out.splitlines()[-1] and (folder / "generator.pt").read_bytes() == before


@every_script
def test_a_pickle_that_runs_code_is_refused(script, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"script": script.removesuffix(".py"), "x": Evil()}, tmp_path / "checkpoint.pt")
    for flag in ("--resume", "--evaluate", "--generate"):
        check_error(script, ["cannot read the checkpoint"], flag, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training(straight, tmp_path, number):
    """While the data are decoded: no traceback, no run folder left."""
    script, _ = straight
    photos = make_data.image_zip(tmp_path / "many.zip", 400, 256)
    process = Process(script, *arguments(photos, tmp_path / "runs", "r"))
    wait_for(lambda: "decoding" in process.read("err"), process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert not list((tmp_path / "runs").iterdir())


def test_two_runs_of_one_name(straight, data, tmp_path):
    script, _ = straight
    first = Process(script, *arguments(data, tmp_path, "r", "--iterations", 100000))
    wait_for(lambda: (tmp_path / "r/args.json").exists(), first)
    check_error(script, ["exists", "--run-name", "remove the folder"], *arguments(data, tmp_path, "r"))
    wait_for(lambda: re.search(r"[1-9]\d*/100000", first.read("err")), first)
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert first.returncode == 130
    check_error(script, ["exists", "--run-name", "go on with --resume"], *arguments(data, tmp_path, "r"))
    first = Process(script, "--resume", tmp_path / "r")
    wait_for(lambda: "100000" in first.read("err"), first)
    check_error(script, ["another process is training in"], "--resume", tmp_path / "r")
    first.send_signal(signal.SIGKILL)
    first.communicate()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("mmgan")])
def test_epochs_and_what_mmgan_shows(script, data, tmp_path):
    """Five passes over 40 images in batches of 8 are 25 iterations; the two spheres are in TensorBoard; a longer run
    goes on with the averages."""
    constant = ["--lr-schedule", "constant"]
    run(script, *arguments(data, tmp_path, "r", "--epochs", 5, "--log-every", 5, "--gradient-every", 10, *constant))
    folder = tmp_path / "r"
    setting = json.loads((folder / "args.json").read_text())
    assert setting["args"]["iterations"] is None and setting["resolved"]["iterations"] == 25
    for tag in ("centroid_distance", "radius_real", "radius_fake", "correlation_penalty", "kernel_width",
                "kernel_mean"):
        events = scalars(folder, f"losses/{tag}")
        assert [e.step for e in events] == [5, 10, 15, 20, 25] and all(math.isfinite(e.value) for e in events)
    assert [e.step for e in scalars(folder, "gradients/correlation")] == [10, 20, 25]
    networks = torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]
    assert networks["averages.decay"] == torch.tensor(0.9) and networks["averages.centroid_real"].any()
    run(script, *arguments(data, tmp_path, "straight", "--iterations", 30, *constant))
    run(script, "--resume", folder, "--iterations", 30, "--gradient-every", 0)
    but = (*UNLIKE, "epochs", "log_every", "gradient_every", "args/iterations")
    same_checkpoints(folder, tmp_path / "straight", but=but)


def test_grey_images(tmp_path):
    """MNIST's samples have one channel, in the array and as PNGs."""
    make_data.mnist(tmp_path / "data")
    given = ["--data-dir", tmp_path / "data", *TINY, "--iterations", 1, "--run-dir", tmp_path, "--run-name", "r"]
    run("mmgan_dcgan.py", *given)
    for out in ("x.npy", "png"):
        run("mmgan_dcgan.py", "--generate", tmp_path / "r", "--num-images", 3, "--out", tmp_path / out)
    array = np.load(tmp_path / "x.npy")
    picture = Image.open(tmp_path / "png/000001.png")
    assert array.shape == (3, 28, 28, 1) and picture.mode == "L"
    assert np.array_equal(np.asarray(picture), array[1, :, :, 0])


def test_no_network(tmp_path):
    """A data set that is not there, on a machine without network: seconds, one line, no run folder."""
    start = time.time()
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    out, err = run("gngan_cnn.py", "--dataset", "stl10", "--hinge", "--data-dir", tmp_path / "data", "--run-dir",
                   tmp_path / "runs", status=2, environment=blocked)
    assert time.time() < start + 30 and not list((tmp_path / "runs").iterdir())
    assert len(err.splitlines()) == 1 and "cannot download STL-10" in err and "stl10_binary.tar.gz" in err
