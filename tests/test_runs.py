"""The image scripts as users run them: run folders, resuming, kills, signals, errors, scores, generated images."""
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pwd
import random
import re
import shlex
import shutil
import signal
import sys
import time

import make_data
import numpy as np
import pytest
import scripts
import torch
from launcher import ROOT, Process, run, wait_for
from make_runs import arguments, checkpoint, events, photos, same_checkpoints, scalars
from PIL import Image
from steps import CPU, TINY, noise
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import common
from common import UserError, datasets, training

each = scripts.each
CONSTANT = {"gngan_resnet": ["--lr-schedule", "constant"], "mmgan_igan": ["--lr-schedule", "constant"]}
TOTAL = 40
LONG = ["--iterations", TOTAL, "--log-every", 5, "--sample-every", 20, "--ema", "0.9"]


def constant(script):
    """Flags for a run that can be made longer."""
    return CONSTANT.get(scripts.model(script), [])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    archive = photos(tmp_path_factory.mktemp("images"))
    datasets.load("folder", archive, 32)  # decoded, so that no progress bar precedes an error
    return archive


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    return make_data.inception_weights(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.fixture(scope="module")
def straight(script, data, tmp_path_factory):
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    run(script, *arguments(data, folder, "r", *LONG))
    return folder / "r"


# ------------------------------------------------------------------------------------------------ what a run leaves
@scripts.alike()
def test_the_run_folder(script, data, inception, tmp_path):
    """Everything that the design promises, scores included; then --evaluate and --generate from it."""
    photos(tmp_path, 12)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    out, err = run(script, *arguments(tmp_path / "photos.zip", tmp_path, "r", "--iterations", 4, "--log-every", 2,
                                      "--sample-every", 2, "--lr", "0.01", "--eval-every", 4,
                                      "--num-fake", 10, "--inception-weights", inception), environment=environment)
    folder = tmp_path / "r"
    setting = json.loads((folder / "args.json").read_text())
    assert setting["script"] == script.SCRIPT and setting["versions"]["torch"] == torch.__version__
    assert setting["args"]["dataset"] == "folder" and setting["args"]["image_size"] == 32
    assert setting["args"]["num_real"] == 12 and setting["args"]["iterations"] == 4
    line, = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert set(line) == {"iteration", "fid", "kid_mean", "kid_std", "is_mean", "is_std", "precision", "recall",
                         "num_real", "num_fake", "num_is", "kid_subset_size", "seconds", "images_per_second"}
    assert [line[key] for key in ("num_real", "num_fake", "num_is", "kid_subset_size")] == [12, 10, 10, 5]
    assert line["iteration"] == 4 and line["fid"] > 0 and line["is_mean"] > 0.999 and line["images_per_second"] > 0
    assert {p.name for p in folder.iterdir() if "tfevents" not in p.name} == {
        ".lock", "args.json", "checkpoint.pt", "generator.pt", "metrics.jsonl", "samples"}
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"0000000{i}.png" for i in (0, 1, 2, 4)]
    grid = np.asarray(Image.open(folder / "samples/00000004.png"))  # each pixel is three wide and high
    assert grid.shape == (3 * (8 * 34 + 2), 3 * (8 * 34 + 2), 3) and grid.std() > 1
    assert np.array_equal(grid, grid[::3, ::3].repeat(3, 0).repeat(3, 1))

    start, *_, last = out.splitlines()
    for text in (f"{folder}: folder, 12 images of 32x32, on the CPU", "parameters: generator ", "discriminator ",
                 f"tensorboard --logdir {folder}"):
        assert text in start
    assert last == (f"{folder}: 4 iterations, FID {line['fid']:.2f}, KID {line['kid_mean']:.4f}, "
                    f"IS {line['is_mean']:.2f} at iteration 4; to see: {folder}/samples/00000004.png; "
                    f"images: python {ROOT / script.SCRIPT}.py --generate {folder}")
    assert "FID of 12 real images is biased" in err and "look at KID" in err
    assert "4/4" in err and "it/s" in err and re.search(r"G=-?[\d.e-]+", err)
    assert not set("\r\x1b") & set(err) and all(err.splitlines())  # a log has lines

    board = events(folder)
    every = ["losses/discriminator", "losses/generator", "losses/score_real", "losses/score_fake",
             "charts/images_per_second", "charts/learning_rate"]
    for tag in every:
        assert [e.step for e in board.Scalars(tag)] == ([2, 4] if "second" in tag else [1, 2, 4]), tag
        assert all(math.isfinite(e.value) for e in board.Scalars(tag))
    assert not any(tag.startswith("metrics/num") for tag in board.Tags()["scalars"])
    for name in ("fid", "kid_mean", "is_mean", "precision", "recall"):
        (event,) = board.Scalars(f"metrics/{name}")
        assert event.step == 4 and event.value == pytest.approx(line[name], rel=1e-5)
    assert [e.step for e in board.Images("images/samples")] == [0, 1, 2, 4]
    assert [e.step for e in board.Images("images/real")] == [0]
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    flags = HParamsPluginData.FromString(content).session_start_info.hparams
    assert flags["lr"].number_value == 0.01 and flags["dataset"].string_value == "folder"
    assert set(flags) == set(setting["args"])
    text = board.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    lr = 0.01\n" in text and "    dataset = folder\n" in text

    out, _ = run(script, "--evaluate", folder, environment=environment)
    assert json.loads(out.splitlines()[-1]) == {k: v for k, v in line.items()
                                                if k not in ("seconds", "images_per_second")}


def test_the_rate_leaves_out_the_first_iteration():
    """It has what PyTorch prepares: the time that is left would be days."""
    with common.progress(total=1000) as bar:
        time.sleep(1)
        training.show_iterations(bar, first=True)
        assert training.images_per_second(bar, batch_size=8) is None
        for _ in range(5):
            time.sleep(0.01)
            training.show_iterations(bar, first=False)
        assert 50 < training.images_per_second(bar, batch_size=8) <= 800


@scripts.alike()
def test_generating(script, straight, tmp_path):
    """A folder of PNGs, one array, one grid, of the averaged G; from generator.pt too."""
    run(script, "--generate", straight, "--num-images", 11, "--out", tmp_path / "png")
    run(script, "--generate", straight / "generator.pt", "--num-images", 11, "--out", tmp_path / "x.npy")
    run(script, "--generate", straight / "checkpoint.pt", "--num-images", 11, "--out", tmp_path / "new" / "grid.png")
    run(script, "--generate", straight, "--num-images", 11, "--seed", 9, "--out", tmp_path / "y.npy")
    array = np.load(tmp_path / "x.npy")
    names = sorted(p.name for p in (tmp_path / "png").iterdir())
    assert array.shape == (11, 32, 32, 3) and array.dtype == np.uint8 and names[-1] == "000010.png"
    assert np.array_equal(array, np.stack([np.asarray(Image.open(tmp_path / "png" / n)) for n in names]))
    grid = np.asarray(Image.open(tmp_path / "new/grid.png"))
    assert grid.shape == (6 * (4 * 34 + 2), 6 * (3 * 34 + 2), 3)  # each pixel is six wide and high
    assert np.array_equal(grid[::6, ::6][2:34, 36:68], array[1])
    assert not np.array_equal(np.load(tmp_path / "y.npy"), array)
    saved = torch.load(straight / "generator.pt", weights_only=True)
    assert saved["iteration"] == TOTAL and {k.split(".")[0] for k in saved["networks"]} == {"generator_ema"}
    args = script.Args(**saved["args"])
    sample = script.make_sampler(script.load_generator(args, saved, CPU), args, CPU)
    assert np.array_equal(sample(11).permute(0, 2, 3, 1).numpy(), array)
    check_errors(script, [
        (["png is not empty", "--out"], ["--generate", straight, "--out", tmp_path / "png"]),
        (["grid.jpg: a grid's name ends in .png"], ["--generate", straight, "--out", tmp_path / "grid.jpg"]),
        (["x.npz: ", "an array's in .npy"], ["--generate", straight, "--out", tmp_path / "x.npz"]),
        (["/proc/nowhere", "--out"], ["--generate", straight, "--out", "/proc/nowhere/x.npy"]),
        (["--num-images is 0"], ["--generate", straight, "--num-images", 0])])


@each("mmgan_dcgan")
def test_grey_images(script, tmp_path):
    """MNIST's samples have one channel, in the array and as PNGs."""
    make_data.mnist(tmp_path / "data")
    run(script, *arguments(tmp_path / "data", tmp_path, "r", "--iterations", 1, "--dataset", "mnist"))
    for out in ("x.npy", "png"):
        run(script, "--generate", tmp_path / "r", "--num-images", 3, "--out", tmp_path / out)
    array, picture = np.load(tmp_path / "x.npy"), Image.open(tmp_path / "png/000001.png")
    assert array.shape == (3, 28, 28, 1) and picture.mode == "L"
    assert np.array_equal(np.asarray(picture), array[1, :, :, 0])


@each("mmgan_dcgan", "mmgan_igan")
def test_epochs_and_what_mmgan_shows(script, data, tmp_path):
    """Two passes over 40 images in batches of 8 are 10 iterations; the two spheres are in TensorBoard."""
    run(script, *arguments(data, tmp_path, "r", "--epochs", 2, "--log-every", 5))
    folder = tmp_path / "r"
    assert json.loads((folder / "args.json").read_text())["args"]["iterations"] == 10
    for tag in ("centroid_distance", "radius_real", "radius_fake", "correlation_penalty", "kernel_width"):
        shown = scalars(folder, f"losses/{tag}")
        assert [e.step for e in shown] == [1, 2, 4, 5, 10] and all(math.isfinite(e.value) for e in shown)
    networks = checkpoint(folder)["networks"]
    assert networks["averages.decay"] == torch.tensor(0.9) and networks["averages.real_centroid"].any()


@each()
def test_the_norms_of_the_terms_gradients(script, data, tmp_path):
    """The program shows each term as it is weighted in the loss, whatever else is watched; two runs side by side, which
    stay as they are."""
    weight, name = "--beta", "correlation_penalty"
    if scripts.is_gngan(script):
        weight, name = "--lambda-r", "neighbor_embedding"
    for run_name, value in (("a", 1), ("b", 100)):
        run(script, *arguments(data, tmp_path, run_name, "--iterations", 1, weight, value, "--lr", "1e-9"))
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    out, _ = run("tests/benchmarks/gradients.py", tmp_path / "a", tmp_path / "b", "--batches", 2)
    head, *rows = out.splitlines()
    norms = {row[:24].strip(): [float(value) for value in row[24:].split()] for row in rows}
    assert head.split() == ["a", "b"] and "generator loss" in norms
    assert not norms.keys() & {"score_real", "kernel_width", "radius_real", "gradient_penalty"}
    assert norms[name][1] == pytest.approx(100 * norms[name][0], rel=0.01)
    assert all(0 < a == pytest.approx(b, rel=0.01) for term, (a, b) in norms.items()
               if term != name and not term.endswith(" loss"))
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------- interruptions
@scripts.alike()
def test_signals_save_and_the_run_resumes_exactly(script, straight, data, tmp_path):
    """Ctrl-C, SIGTERM, Slurm's SIGUSR1, a closed terminal: weights, moments, averages, order of the data and draws are
    bit for bit those of a run left alone. What is printed at the end goes on as it stands, also in a folder whose
    name has a space."""
    process = Process(script, *arguments(data, tmp_path / "my runs", "r", *LONG, "--checkpoint-every", 0))
    samples = tmp_path / "my runs/r/samples"
    for number, grid in ((signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGUSR1, 8), (signal.SIGHUP, 16)):
        wait_for((samples / f"{grid:08d}.png").exists, process)
        process.send_signal(number)
        out, err = process.communicate()
        assert process.returncode == 128 + number and "Traceback" not in err, err
        iteration = checkpoint(tmp_path / "my runs/r")["iteration"]
        assert iteration >= grid and (samples / f"{iteration:08d}.png").exists()
        _, file, flag, path = shlex.split(out.splitlines()[-1].split("go on with ")[1])
        assert file == str(ROOT / script.SCRIPT) + ".py"
        process = Process(script, flag, path)
    assert checkpoint(tmp_path / "my runs/r")["iteration"] < TOTAL
    _, err = process.communicate()
    assert process.returncode == 0, err
    same_checkpoints(tmp_path / "my runs/r", straight)
    for name in ("00000020.png", "00000040.png"):
        assert (tmp_path / "my runs/r/samples" / name).read_bytes() == (straight / "samples" / name).read_bytes()
    for tag in ("losses/generator", "losses/score_fake", "charts/learning_rate"):
        ours, theirs = ([(e.step, e.value) for e in scalars(f, tag)] for f in (tmp_path / "my runs/r", straight))
        assert ours == theirs


@each()
def test_an_evaluation_cut_short_is_made_up_for(script, tmp_path):
    """By a signal, which makes it end without scores, or by a kill: the run that goes on begins with it."""
    class Evaluator:
        calls = 0

        def __init__(self, outcome):
            self.outcome = outcome

        def score(self, sampler, *numbers, stop):
            assert sampler(2).shape == images[:2].shape and not stop()
            assert numbers == ((77,) if scripts.is_gngan(script) else (77, 33))  # --num-fake, --num-is
            Evaluator.calls += 1
            return self.outcome()

    def be_killed():
        raise KeyboardInterrupt

    def good():
        return {"fid": 1.0, "kid_mean": 0.5, "is_mean": 2.0}

    of_is = {} if scripts.is_gngan(script) else {"num_is": 33}
    args = script.resolve(script.Args(**TINY, dataset="folder", iterations=4, eval_every=2, sample_every=0, num_fake=77,
                                      **of_is))
    images = noise(dataclasses.replace(args, batch_size=20))

    def go_on(folder, outcome):
        folder.mkdir(exist_ok=True)
        before = checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
        return script.train(args, images, CPU, folder, before, Evaluator(outcome), [])

    folder = tmp_path / "r"
    assert go_on(folder, lambda: None) is False and Evaluator.calls == 1
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, be_killed)
    assert checkpoint(folder)["iteration"] == 2 and not (folder / "metrics.jsonl").exists()
    assert go_on(folder, good) is True and Evaluator.calls == 4
    records = common.read_lines(folder / "metrics.jsonl")
    assert [r["iteration"] for r in records] == [2, 4]
    assert records[0]["images_per_second"] is None and records[1]["images_per_second"] > 0
    assert go_on(folder, good) is True and Evaluator.calls == 4  # nothing is missing
    assert [e.step for e in scalars(folder, "metrics/fid")] == [2, 4]
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    for contents, made in ((whole[:-1], 0), (whole[:-9], 1), (whole[:-20] + bytes(20), 1)):
        metrics.write_bytes(contents)  # cut by a full disk, a power loss
        calls = Evaluator.calls
        assert go_on(folder, good) is True and Evaluator.calls == calls + made
        assert [r["iteration"] for r in common.read_lines(metrics)] == [2, 4]
    for junk in (b"junk\n", b"[1, 2]\n", b"[]\n", b"3\n"):
        metrics.write_bytes(junk + whole)
        with pytest.raises(UserError, match=f"{metrics} is damaged in line 1 .*: remove that line"):
            go_on(folder, good)
    metrics.write_bytes(whole + b"\n\n")
    go_on(tmp_path / "straight", good)
    same_checkpoints(folder, tmp_path / "straight")


@scripts.alike()
@pytest.mark.parametrize("end", ["save_checkpoint", "show_scores"])
def test_tensorboard_after_a_kill(script, tmp_path, monkeypatch, end):
    """At iteration 0 before the first checkpoint, or between a line of metrics.jsonl and TensorBoard's points; then the
    clock goes back by an hour. TensorBoard has each point once, in order."""
    class Evaluator:
        def score(self, *given, **named):
            return {"fid": 1.0}

    def be_killed(*given):
        raise KeyboardInterrupt

    args = script.resolve(script.Args(**TINY, dataset="folder", iterations=4, eval_every=2, log_every=1))
    images, folder = noise(dataclasses.replace(args, batch_size=20)), tmp_path / "r"
    folder.mkdir()
    for target in (end, "begin_log", None):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if target == "begin_log":
                earlier = time.time() - 3600
                patch.setattr(time, "time", lambda earlier=earlier: earlier)
                target = "show_scores"
            if target:
                patch.setattr(training, target, be_killed)
            before = checkpoint(folder) if (folder / "checkpoint.pt").exists() else None
            script.train(args, images, CPU, folder, before, Evaluator(), [])
    board = events(folder)
    assert [e.step for e in board.Images("images/real")] == [0]
    assert [e.step for e in board.Scalars("losses/generator")] == [1, 2, 3, 4]
    assert [(e.step, e.value) for e in board.Scalars("metrics/fid")] == [(2, 1), (4, 1)]


@each()
def test_more_iterations_later(script, data, tmp_path):
    """Without a schedule a finished run can be made longer, and is what it would have been."""
    for name, iterations in (("a", 6), ("b", 4)):
        run(script, *arguments(data, tmp_path, name, "--iterations", iterations, *constant(script)))
    run(script, "--resume", tmp_path / "b", "--iterations", 6)
    same_checkpoints(tmp_path / "a", tmp_path / "b")


@scripts.alike()
def test_a_copied_folder_is_a_branch(script, data, tmp_path):
    run(script, *arguments(data, tmp_path, "a", "--iterations", 2, *constant(script)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    run(script, "--resume", tmp_path / "b", "--iterations", 4)
    assert checkpoint(tmp_path / "b")["iteration"] == 4 and (tmp_path / "a/checkpoint.pt").read_bytes() == before


@each()
def test_what_the_loop_gives_an_iteration(script, tmp_path, monkeypatch):
    """Draws of --seed and the iteration's number, and the learning rate of that; grids, the same noise each time."""
    args = script.resolve(script.Args(**TINY, dataset="folder", seed=7, iterations=4, eval_every=0, sample_every=2))
    make_train_step, sample_images, seen, noises = script.make_train_step, script.sample_images, [], []

    def make_watched(args, networks, optimizers, rng):
        train_step = make_train_step(args, networks, optimizers, rng)

        def watched(images):
            seen.append((rng.initial_seed(), float(optimizers["generator"].param_groups[0]["lr"])))
            return train_step(images)

        return watched

    monkeypatch.setattr(script, "make_train_step", make_watched)
    monkeypatch.setattr(script, "sample_images", lambda generator, z: noises.append(z) or sample_images(generator, z))
    assert script.train(args, noise(dataclasses.replace(args, batch_size=20)), CPU, tmp_path, None, None, [])
    rate = script.learning_rate if hasattr(script, "learning_rate") else lambda args, iteration: args.lr
    assert [seed for seed, _ in seen] == [training.draw_seed(7, t) for t in range(4)]
    assert [lr for _, lr in seen] == pytest.approx([rate(args, t) for t in range(4)])
    assert len(noises) > 2 and all(torch.equal(z, noises[0]) for z in noises)


@each("mmgan_dcgan")
def test_more_epochs_later(script, data, tmp_path):
    run(script, *arguments(data, tmp_path, "r", "--epochs", 1))
    _, err = run(script, "--resume", tmp_path / "r", "--epochs", 2)
    assert "--epochs 2 (saved: 1)" in err and checkpoint(tmp_path / "r")["iteration"] == 10
    assert json.loads((tmp_path / "r/args.json").read_text())["args"]["iterations"] == 10
    run(script, "--resume", tmp_path / "r", "--epochs", 4, "--iterations", 12)
    assert checkpoint(tmp_path / "r")["iteration"] == 12
    run(script, "--resume", tmp_path / "r", "--epochs", 5)
    assert checkpoint(tmp_path / "r")["iteration"] == 25
    run(script, *arguments(data, tmp_path, "s", "--iterations", 2))
    run(script, "--resume", tmp_path / "s", "--epochs", 25)  # the default's number, but it counted iterations
    assert checkpoint(tmp_path / "s")["iteration"] == 125


@each("gngan_resnet", "mmgan_igan", scope="module")
def test_a_schedule_fixes_the_iterations(script, straight):
    check_errors(script, [(["--iterations is 99", "--lr-schedule", "leave --iterations (and --epochs) out"],
                           ["--resume", straight, "--iterations", 99])], replaced=["--iterations 99 (saved: 40)"])


@each("mmgan_igan")
def test_improved_gan_resumes_exactly(script, data, tmp_path):
    """With the history, the reference batch and three steps of G; the first iteration has initialised by the data."""
    given = ["--baseline", "minibatch", "--lr-schedule", "constant", "--ema", "0.9"]
    for name, iterations in (("a", 5), ("b", 2)):
        run(script, *arguments(data, tmp_path, name, "--iterations", iterations, *given))
    run(script, "--resume", tmp_path / "b", "--iterations", 5)
    same_checkpoints(tmp_path / "a", tmp_path / "b")
    networks = checkpoint(tmp_path / "a")["networks"]
    assert networks["history.generator.count"] == 15 and networks["history.discriminator.count"] == 5
    assert not networks["discriminator.convs.0.parametrizations.weight.original0"].eq(1).any()


@scripts.alike()
def test_looking_does_not_change_training(script, straight, data, tmp_path):
    run(script, *arguments(data, tmp_path, "r", *LONG, "--sample-every", 7, "--log-every", 1, "--checkpoint-every", 9))
    same_checkpoints(tmp_path / "r", straight)


@scripts.alike()
def test_a_finished_run_resumed_is_finished(script, straight):
    files = [straight / name for name in ("generator.pt", "checkpoint.pt", "args.json")]
    before = [file.read_bytes() for file in files]
    out, _ = run(script, "--resume", straight, "--lr", "0.5")
    assert f"{TOTAL} iterations" in out.splitlines()[-1] and [file.read_bytes() for file in files] == before


@scripts.alike()
def test_a_full_disk_keeps_the_old_checkpoint(script, data, tmp_path):
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, "--sample-every", 0, *constant(script)))
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    limit = (tmp_path / "r/generator.pt").stat().st_size + 1000  # that one still fits
    assert len(before) > limit
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 4, "--checkpoint-every", 1, status=2,
                 file_limit=limit)
    last = err.splitlines()[-1]
    assert last.startswith(f"{script.SCRIPT}.py: error: cannot write") and "checkpoint.pt" in last
    assert "--resume" in last and "Traceback" not in err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("r/*.tmp"))


@scripts.alike()
def test_a_full_disk_that_tensorboard_meets(script, data, tmp_path):
    """One line, though its thread fails first."""
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, *constant(script)))
    picture = tmp_path / "r/samples/00000002.png"  # shown again when the run goes on
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 4, status=2,
                 file_limit=picture.stat().st_size // 2)
    folder = tmp_path / "r"
    assert err.splitlines()[-1] == (f"{script.SCRIPT}.py: error: [Errno 27] File too large, in the run of {folder}; "
                                    f"go on with --resume {folder}")
    assert "Traceback" not in err
    run(script, "--resume", folder, "--iterations", 4)
    assert [e.step for e in events(folder).Images("images/samples")] == [0, 1, 2, 4]


@each()
def test_a_diverged_run_stops(script, data, tmp_path):
    """With the iteration and the last good checkpoint, here the one that every run begins with."""
    _, err = run(script, *arguments(data, tmp_path, "r", "--iterations", 50, "--lr", "1e30", "--log-every", 5),
                 status=2)
    last = err.splitlines()[-1]
    assert "training diverged: weights are not finite at iteration 1; the last good checkpoint is " in last
    assert str(tmp_path / "r/checkpoint.pt") in last and "Traceback" not in err
    saved = checkpoint(tmp_path / "r")
    assert saved["iteration"] == 0 and all(v.isfinite().all() for v in saved["networks"].values())


@scripts.alike()
def test_weights_that_the_last_update_spoiled_are_not_saved(script, data, tmp_path):
    """G's last update can spoil its weights after every loss of the iteration was finite."""
    run(script, *arguments(data, tmp_path, "r", "--iterations", 1, *constant(script)))
    saved = checkpoint(tmp_path / "r")
    next(iter(saved["optimizers"]["generator"].values()))["exp_avg_sq"].fill_(math.nan)
    torch.save(saved, tmp_path / "r/checkpoint.pt")
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 2, "--log-every", 0, status=2)
    assert "not finite at iteration 2;" in err and (tmp_path / "r/checkpoint.pt").read_bytes() == before


@scripts.alike()
def test_a_signal_before_training(script, tmp_path):
    """While the data are decoded: no traceback, no run folder left."""
    archive = make_data.image_zip(tmp_path / "many.zip", 200, 512)
    for number in (signal.SIGINT, signal.SIGTERM):
        process = Process(script, *arguments(archive, tmp_path / "runs", "r"))
        wait_for(lambda process=process: "decoding" in process.read("err"), process)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 128 + number and "Traceback" not in err, err
        assert not list((tmp_path / "runs").glob("*"))


@scripts.alike()
def test_two_runs_of_one_name(script, data, tmp_path):
    given = arguments(data, tmp_path, "r", "--iterations", 100000)
    first = Process(script, *given)
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), first)
    check_errors(script, [([f"another process is training in {tmp_path / 'r'}"], given)])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    unnamed = Process(script, *given[: given.index("--run-name")], *given[given.index("--run-name") + 2 :])
    wait_for(lambda: len(list(tmp_path.glob("folder-*/checkpoint.pt"))) == 1, unnamed)
    unnamed.send_signal(signal.SIGKILL)
    unnamed.communicate()
    check_errors(script, [(["has a run in it", "--run-name", f"--resume {tmp_path / 'r'}"], given)])


@each("gngan_cnn", "gngan_synthetic")
def test_a_job_that_begins_again_too_early(script, data, tmp_path):
    """A scheduler starts it while its process of before still saves: it waits for that one, and goes on from there."""
    given = arguments(data, tmp_path, "r", "--iterations", 100000) if scripts.model(script) != "gngan_synthetic" else [
        "--run-dir", tmp_path, "--run-name", "r", "--num-seeds", 2, "--epochs", 100000, "--no-compile"]
    first = Process(script, *given)
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), first)
    second = Process(script, *given, "--resume", "auto")
    wait_for(lambda: "waiting for another process" in second.read("err"), second)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    saved = checkpoint(tmp_path / "r")["iteration"]
    wait_for(lambda: "r: " in second.read("out"), second)
    second.send_signal(signal.SIGTERM)
    second.communicate()
    assert (first.returncode, second.returncode) == (143, 143) and checkpoint(tmp_path / "r")["iteration"] >= saved > 0


@scripts.alike()
def test_a_first_checkpoint_that_is_waited_for(script, straight, data, tmp_path, monkeypatch):
    """--resume auto looks for it once the process of before has ended, whose run folder it waits for a minute."""
    (tmp_path / "r").mkdir()
    with common.lock(tmp_path / "r/.lock", wait=0):
        again = Process(script, *arguments(data, tmp_path, "r", *LONG, "--resume", "auto"))
        wait_for(lambda: "waiting for another process" in again.read("err"), again)
        shutil.copytree(straight, tmp_path / "r", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        monkeypatch.setattr(common, "TAKEOVER", 0.3)
        for given in (["--resume", "auto", "--run-dir", tmp_path, "--run-name", "r"], ["--resume", tmp_path / "r"],
                      ["--resume", tmp_path / "r/checkpoint.pt"]):
            with pytest.raises(UserError, match=f"another process is training in {tmp_path / 'r'}$"):
                script.parse_args([str(a) for a in given])
    out, _ = again.communicate()
    assert again.returncode == 0 and f"all {TOTAL} iterations done before" in out


@each("gngan_cnn")
def test_names_that_shells_and_terminals_mind(script, data, tmp_path):
    """A home folder's ~, letters that the output cannot print."""
    out, _ = run(script, *arguments(data, "~/größe", "r", "--iterations", 1), environment={
        "HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"})
    assert (tmp_path / "größe/r/checkpoint.pt").exists() and "gr??e" in out.splitlines()[-1]


@each("gngan_cnn")
def test_a_compiler_that_fails(script, data, tmp_path):
    """One line, and the run goes on uncompiled."""
    (tmp_path / "g++").symlink_to("/bin/false")
    _, err = run(script, *arguments(data, tmp_path, "r", "--iterations", 1, "--compile"), environment={
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    line, = (line for line in err.splitlines() if "uncompiled" in line)
    assert "torch.compile fails here" in line and "Traceback" not in err and "1/1" in err


# ---------------------------------------------------------------------------------------------------------- outputs
@pytest.fixture(params=["pipe", "terminal"])
def output(request, tmp_path):
    """The path of a pipe or a terminal, and a function after which nobody reads it any more."""
    if request.param == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
        ends = [os.open(path, os.O_RDONLY | os.O_NONBLOCK)]
    else:
        ends = list(os.openpty())
        path = os.ttyname(ends[1])

    def hang_up():
        while ends:
            os.close(ends.pop())

    yield path, hang_up
    hang_up()


@scripts.alike()
def test_an_output_that_is_gone(script, data, tmp_path, output):
    """`| tee log` that Ctrl-C ends first, a terminal that was closed: the run goes on, and saves."""
    path, hang_up = output
    process = Process(script, *arguments(data, tmp_path, "r", "--iterations", 100_000, "--checkpoint-every", 1),
                      output=path)
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), process)
    hang_up()
    before = checkpoint(tmp_path / "r")["iteration"]
    time.sleep(1.5)  # the progress bar is drawn twice a second
    wait_for(lambda: checkpoint(tmp_path / "r")["iteration"] > before + 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130 and checkpoint(tmp_path / "r")["iteration"] > before + 2


@scripts.alike()
def test_outputs_that_are_closed(script, data, tmp_path):
    """As a shell's >&- does; an error then has its status alone."""
    given = arguments(data, tmp_path, "r", "--iterations", 2, *constant(script))
    run(script, *given, closed=True)
    assert checkpoint(tmp_path / "r")["iteration"] == 2
    run(script, *given, closed=True, status=2)  # the folder has a run in it


@scripts.alike()
def test_in_a_notebook(script, data, tmp_path):
    """As %run does: its output stream cannot be reconfigured; it and the notebook's signals are the same afterwards."""
    given = [str(v) for v in arguments(data, tmp_path, "r", "--iterations", 2)]
    (tmp_path / "notebook.py").write_text(f"""
import io, runpy, signal, sys

class OutStream(io.TextIOBase):
    encoding, text = "UTF-8", ""

    def write(self, text):
        OutStream.text += text
        return len(text)

own = sys.stdout
sys.modules["IPython"] = io
sys.stdout = sys.stderr = stream = OutStream()
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
sys.argv = [{str(ROOT / script.SCRIPT)!r} + ".py", *{given!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
assert sys.stdout is sys.stderr is stream
assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
print(status, "2 iterations" in stream.text, "2/2" in stream.text, file=own)
""")
    out, _ = run(str(tmp_path / "notebook.py"))
    assert out.split() == ["0", "True", "True"]


# ---------------------------------------------------------------------------------------------------- data and paths
@scripts.alike()
def test_training_inside_the_photo_folder(script, tmp_path):
    """Its own samples and generated images are no data: a resumed run goes on, and the next sees the photos alone."""
    folder = make_data.image_folder(tmp_path / "photos", 12)
    given = ["--iterations", 2, "--sample-every", 1, *constant(script)]
    run(script, *arguments(folder, folder / "runs", "r", *given))
    run(script, "--generate", folder / "runs/r", "--num-images", 3)
    assert len(list((folder / "runs/r/generated").iterdir())) == 3
    out, _ = run(script, "--resume", folder / "runs/r", "--iterations", 4)
    assert "12 images of 32x32" in out and "4 iterations" in out
    out, err = run(script, *arguments(folder, folder, "next", *given))
    assert "12 images of 32x32" in out and "decoding" not in err


@scripts.alike()
def test_home_folders_that_do_not_exist(script, straight, monkeypatch):
    for flag in ("--resume", "--evaluate", "--generate"):
        refuse(script, ["~nosuchuser/x", "no such home folder"], flag, "~nosuchuser/x")
    given = ["--run-name", "x", "--resume", "auto"]
    refuse(script, ["~nosuchuser/x", "no such home folder"], "--run-dir", "~nosuchuser", *given)
    check_errors(script, [([f"{path}: no such home folder"], given) for path, given in (
        ("~nosuchuser/x", ["--run-dir", "~nosuchuser", "--run-name", "x"]),
        ("~nosuchuser/x", ["--dataset", "folder", "--data-dir", "~nosuchuser/x"]),
        ("~nosuchuser/x.npy", ["--generate", straight, "--out", "~nosuchuser/x.npy"]))])
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])  # as in a container
    refuse(script, ["~/x: no such home folder", "HOME"], "--resume", "~/x")


@each("gngan_cnn", "mmgan_dcgan", "mmgan_igan")
def test_none_at_resume(script, data, tmp_path):
    """It asks for the default, as it does at a start."""
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, *constant(script)))
    process = Process(script, "--resume", tmp_path / "r", "--iterations", None, "--num-real", None,
                      "--checkpoint-every", 1)
    wait_for(lambda: checkpoint(tmp_path / "r")["iteration"] > 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (130, 0) and "--iterations None (saved: 2)" in err and "Traceback" not in err, err
    args = script.resolve(script.Args())
    default = args.iterations or args.epochs * 40 // 8  # 40 images in batches of 8
    assert json.loads((tmp_path / "r/args.json").read_text())["args"]["iterations"] == default


# ----------------------------------------------------------------------------------------------------------- errors
def check_errors(script, cases, replaced=()):
    """Each case, (words, arguments), ends with status 2 and one line of these words. They run at the same time.

    replaced: lines before it, of flags that replace a checkpoint's.
    """
    for (words, given), process in [(case, Process(script, *case[1])) for case in cases]:
        _, err = process.communicate()
        *before, line = err.splitlines() or [""]
        assert process.returncode == 2 and line.startswith(f"{script.SCRIPT}.py: error: "), (given, err)
        assert before == [f"{script.SCRIPT}.py: {text}" for text in replaced], (given, err)
        assert all(word in line for word in words), (given, err)


def refuse(script, words, *given):
    """The command line is refused, in one line of these words."""
    with pytest.raises(UserError) as error:
        script.parse_args([str(v) for v in given])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@each()
@pytest.mark.parametrize("flag,value", [
    ("--iterations", "0"), ("--batch-size", "1"), ("--image-size", "8"), ("--width", "0"), ("--lr", "nan"),
    ("--ema", "1"), ("--beta1", "1"), ("--beta2", "-0.1"), ("--seed", "-1"), ("--seed", str(2**31)),
    ("--log-every", "-1"), ("--num-fake", "9"), ("--num-real", "1"), ("--latent-dim", "0")])
def test_values_out_of_range(script, flag, value):
    refuse(script, [f"{flag} is {value}", ": it must be in "], flag, value)


@scripts.alike()
def test_errors_are_one_line(script, data, tmp_path):
    """What only a run can tell, and no run folder left behind."""
    cases = [(["--lr is -1.0: it must be in (0, inf)"], ["--lr", "-1"]),
             (["40 images", "--batch-size 64: give --batch-size 40"], ["--batch-size", 64]),
             (["nowhere", "--data-dir"], ["--data-dir", "nowhere"]),
             (["/proc/nowhere", "--run-dir"], ["--run-dir", "/proc/nowhere"]),
             (["File name too long", "--run-dir"], ["--run-name", 300 * "x"]),
             (["no checkpoint at nowhere"], ["--resume", "nowhere"]),
             (["nowhere.pth"], ["--eval-every", 1, "--inception-weights", "nowhere.pth"])]
    check_errors(script, [(words, [*arguments(data, tmp_path / "runs", f"r{number}"), *given])
                          for number, (words, given) in enumerate(cases)])
    assert not list((tmp_path / "runs").glob("*"))
    refuse(script, ["--resume auto needs the --run-name"], "--resume", "auto")
    refuse(script, ["exclude each other"], "--evaluate", "a", "--generate", "b")
    refuse(script, ["no checkpoint at"], "--resume", "")  # an unset shell variable must not start a new run


GNGAN = [(["--distgan", "--no-autoencoder"], ["--distgan needs its autoencoder"]),
         (["--lambda-p", "-1"], ["--lambda-p is -1"]), (["--alpha", "1"], ["--alpha is 1"]),
         (["--image-size", "36"], ["--image-size is 36", "multiple of 8"])]
MMGAN = [(["--kernel-width", "0"], ["--kernel-width is 0"]), (["--delta", "1"], ["--delta is 1"]),
         (["--epochs", "0"], ["--epochs is 0"]), (["--num-is", "9"], ["--num-is is 9"])]
DCGAN = [(["--baseline", "--generator-steps", "0"], ["--generator-steps is 0"])]
IGAN = [(["--baseline", "minibatch", "--historical-averaging", "-1"], ["--historical-averaging is -1"]),
        (["--baseline", "minibatch", "--label-smoothing", "1"], ["--label-smoothing is 1"]),
        (["--image-size", "36"], ["--image-size is 36", "multiple of 8"])]


@scripts.each_case({"gngan_cnn": GNGAN, "gngan_resnet": GNGAN, "mmgan_dcgan": MMGAN + DCGAN,
                    "mmgan_igan": MMGAN + IGAN})
def test_what_is_refused(script, case):
    given, words = case
    refuse(script, words, *given)


@each()
def test_flags_that_do_not_exist(script):
    """tyro's message names a near flag."""
    out, err = run(script, "--batchsize", "64", status=2)
    assert "--batch-size" in out + err and "Traceback" not in err
    out, err = run(script, "--dataset", "imagenet", status=2)
    assert "imagenet" in out + err and (out + err).count("cifar10") == 1


def changed(folder, tmp_path, **changes):
    """A copy of a checkpoint with other entries."""
    (tmp_path / "copy").mkdir(exist_ok=True)
    torch.save({**checkpoint(folder), **changes}, tmp_path / "copy/checkpoint.pt")
    return tmp_path / "copy"


@scripts.alike()
def test_a_flag_replaces_the_saved_one(script, data, tmp_path):
    """At --resume, --evaluate and --generate alike: one line says so, and the run goes on with the new value."""
    run(script, *arguments(data, tmp_path, "r", "--iterations", 2, *constant(script)))
    _, err = run(script, "--resume", tmp_path / "r", "--iterations", 4, "--lr", "0.01", "--log-every", 1)
    lines = [line for line in err.splitlines() if "(saved: " in line]
    assert lines == [f"{script.SCRIPT}.py: {text}" for text in (
        "--iterations 4 (saved: 2)", f"--lr 0.01 (saved: {script.Args().lr})", "--log-every 1 (saved: 100)")]
    rates = {e.step: e.value for e in scalars(tmp_path / "r", "charts/learning_rate")}
    assert rates[3] == rates[4] == pytest.approx(0.01)
    texts = events(tmp_path / "r").Tensors("arguments/text_summary")
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in texts}
    assert f"    lr = {script.Args().lr}\n" in texts[0] and "    lr = 0.01\n" in texts[2]
    saved = checkpoint(tmp_path / "r")
    assert saved["iteration"] == 4 and saved["args"]["lr"] == 0.01  # and is what the next resume goes on with
    _, err = run(script, "--resume", tmp_path / "r")
    assert "(saved: " not in err
    _, err = run(script, "--generate", tmp_path / "r", "--seed", 7, "--num-images", 3, "--out", tmp_path / "x.npy")
    assert [line for line in err.splitlines() if "saved" in line] == [f"{script.SCRIPT}.py: --seed 7 (saved: 1)"]
    for flag in ("--resume", "--generate"):
        check_errors(script, [(["does not fit", "generator.linear.weight"], [flag, tmp_path / "r", "--width", "0.5"])],
                     replaced=["--width 0.5 (saved: 0.03125)"])


@scripts.alike()
def test_resume_errors(script, straight, data, tmp_path):
    refuse(script, ["holds G alone"], "--resume", straight / "generator.pt")
    for given in (["--run-name", "branch"], ["--run-dir", tmp_path]):  # that would train on in the old folder
        refuse(script, ["goes on where it is", "copy its folder"], "--resume", straight, *given)
    assert script.parse_args(["--resume", str(straight), "--run-name", straight.name])[1].parent == straight
    reason = "was begun for 40" if constant(script) else "the run is already at 40"
    check_errors(script, [(["--iterations is 7", reason], ["--resume", straight, "--iterations", 7])],
                 replaced=["--iterations 7 (saved: 40)"])
    saved = checkpoint(straight)
    foreign = changed(straight, tmp_path, args=saved["args"] | {"unknown": 1})
    refuse(script, ["has flags that this", "unknown"], "--resume", foreign)
    (tmp_path / "cut").mkdir()
    file = tmp_path / "cut/checkpoint.pt"
    whole = (straight / "checkpoint.pt").read_bytes()
    for contents in (whole[:2000], whole[:-10], b"", b"junk", (straight / "args.json").read_bytes(),
                     *(random.Random(seed).randbytes(64) for seed in range(20))):
        file.write_bytes(contents)
        refuse(script, [f"cannot read {file}: it is cut off or no checkpoint"], "--resume", file.parent)
    for foreign in ([1], saved | {"args": [1]}, saved | {"networks": [1]}, {k: saved[k] for k in ("script", "args")}):
        torch.save(foreign, file)
        refuse(script, [f"is not a checkpoint of {script.SCRIPT}.py"], "--resume", file)
    for name, junk in (("networks", {}), ("optimizers", {"generator": [1]}), ("optimizers", [])):
        with pytest.raises(UserError, match="the checkpoint does not fit"):
            args, _, read = script.parse_args(["--resume", str(changed(straight, tmp_path, **{name: junk}))])
            networks = script.init_networks(args, CPU)
            training.restore(read, networks, script.init_optimizers(args, networks))
    torch.save(saved | {"script": "another"}, file)
    refuse(script, [f"is a checkpoint of another.py, not of {script.SCRIPT}.py"], "--generate", file)
    networks = {k: v for k, v in saved["networks"].items() if k != "generator_ema.linear.weight"}
    other = photos(tmp_path, seed=3)
    datasets.load("folder", other, 32)  # so that no progress bar precedes the error
    check_errors(script, [(["are not those that the run began with", "--data-dir"],
                           ["--resume", straight, "--data-dir", other])],
                 replaced=[f"--data-dir {other} (saved: {data})"])
    if "generator_ema.linear.weight" in saved["networks"]:
        check_errors(script, [(["does not fit", "generator_ema.linear.weight"],
                               ["--generate", changed(straight, tmp_path, networks=networks)])])


@scripts.alike()
def test_a_pickle_that_runs_code_is_refused(script, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"script": script.SCRIPT, "x": Evil()}, tmp_path / "checkpoint.pt")
    for flag in ("--resume", "--evaluate", "--generate"):
        refuse(script, ["cannot read"], flag, tmp_path)
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------------- common
def test_a_grid_that_a_kill_has_cut(tmp_path):
    cut, grid = tmp_path / "r/samples/00000012.png.0123456789ab.tmp", tmp_path / "r/samples/00000012.png"
    grid.parent.mkdir(parents=True)
    cut.touch()
    grid.touch()
    with common.run_folder(tmp_path / "r", resume=True):
        assert not cut.exists() and grid.exists()


def test_run_folders(tmp_path):
    """No two at a time in one; a free name is found if none was asked for; an empty one is removed."""
    with common.run_folder(tmp_path / "r", False, free_name=True) as first:
        with pytest.raises(UserError, match=f"another process is training in {tmp_path / 'r'}$"):
            with common.run_folder(tmp_path / "r", resume=True):
                pass
        with common.run_folder(tmp_path / "r", False, free_name=True) as second:
            (second / "checkpoint.pt").touch()
            with common.run_folder(tmp_path / "r", False, free_name=True) as third:
                assert [f.name for f in (first, second, third)] == ["r", "r-2", "r-3"]
    assert [f.name for f in tmp_path.iterdir()] == ["r-2"]
    with common.run_folder(tmp_path / "runs/r", False):
        pass
    assert not list((tmp_path / "runs").iterdir())  # it stays, as another process may be about to use it
    with pytest.raises(UserError, match="has a run in it"), common.run_folder(tmp_path / "r-2", False):
        pass
    with common.run_folder(tmp_path / "r-2", resume=True) as again:
        assert again == second
    (tmp_path / "mine").mkdir()
    with common.run_folder(tmp_path / "mine", False):
        pass
    assert (tmp_path / "mine").exists()  # it was there before


def test_a_lock_that_its_holder_has_removed(tmp_path):
    """It is no lock any more: another process may have made, and hold, a new one."""
    flock = fcntl.flock

    def remove_and_lock(descriptor, operation):
        (tmp_path / ".lock").unlink()
        return flock(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_and_lock)
        with pytest.raises(BlockingIOError), common.lock(tmp_path / ".lock", wait=0):
            pass
    with common.lock(tmp_path / ".lock", wait=0):
        pass


@pytest.mark.parametrize("error,line", [(UserError("wrong"), "wrong"), (OSError(13, "Permission denied", "a"),
                                        "[Errno 13] Permission denied: 'a'"),
                                        (torch.OutOfMemoryError("CUDA"), "out of GPU memory: lower --batch-size")])
def test_a_program_ends_in_one_line(error, line, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(common, "SIGNALS", ())
    monkeypatch.setattr(sys, "argv", ["some/path/x.py"])
    with pytest.raises(SystemExit) as end:
        common.run(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"x.py: error: {line}") and len(err.splitlines()) == 1


def test_what_a_signal_breaks_ends_in_one_line(tmp_path):
    """As Ctrl-C in a terminal ends the C++ compiler that torch.compile waits for; a fault of ours shows itself."""
    for module, status in (("torch._inductor.exc", 143), ("__main__", 1)):
        (tmp_path / "program.py").write_text(f"""
import os, signal, common

class Broken(Exception):
    pass

Broken.__module__ = "{module}"

def main():
    common.on_signals(lambda number: None)
    os.kill(os.getpid(), signal.SIGTERM)
    raise Broken("the compiler ended\\nwith 130")

common.run(main)
""")
        _, err = run(str(tmp_path / "program.py"), status=status)
        assert ("Traceback" in err) == (status == 1)
        assert status == 1 or err == "program.py: error: ended by a signal: the compiler ended with 130\n"


def test_a_program_that_hangs_at_its_exit_can_be_ended(tmp_path):
    (tmp_path / "program.py").write_text("""
import atexit, time, common
atexit.register(time.sleep, 60)

def main():
    common.on_signals(lambda number: None)
    print("exit", flush=True)
    return 0

common.run(main)
""")
    process = Process(str(tmp_path / "program.py"))
    wait_for(lambda: "exit" in process.read("out"), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_nohup_is_respected(ignored):
    """A signal that the parent ignores (nohup's, a shell's of a background job) stays so; the others are handled."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    seen = []
    try:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        common.on_signals(seen.append)
        for number in numbers:
            os.kill(os.getpid(), number)
        assert seen == [number for number in numbers if number != ignored]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranges():
    @dataclasses.dataclass
    class Args:
        share: float | None

    for value in (None, 0, 0.5):
        common.check_ranges(Args(value), {"share": "[0, 1)"})
    for value, text in ((1, "[0, 1)"), (0, "(0, 1]"), (math.nan, "[0, inf)"), (math.inf, "[0, inf)")):
        with pytest.raises(UserError, match="--share is"):
            common.check_ranges(Args(value), {"share": text})
    with pytest.raises(UserError, match="--share is nan: it must be a number"):
        common.check_ranges(Args(math.nan), {})  # a flag without a range
