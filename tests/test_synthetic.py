"""gngan_synthetic.py: data, draws, metrics, each method's training step against a plain reference, the
script as users run it and fork it."""
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from compare import assert_same, flat
from launcher import ROOT, Process, run, wait_for
from PIL import Image
from reference_synthetic import Reference
from scripts import each
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.backends.common import aot_autograd

from common import UserError, pictures, training

pytestmark = each("gngan_synthetic", scope="module")
METHODS = {1: ["gan", "vaegan", "wgangp", "distgan", "gngan"],
           2: ["gan", "ali", "vaegan", "vae", "betavae", "wgangp", "distgan", "gngan"]}
CPU = torch.device("cpu")


def make_args(script, method="gngan", dim=2, **changes):
    """Small networks of two seeds."""
    small = {"num_seeds": 2, "hidden_dim": 8, "batch_size": 16}
    return script.resolve(script.Args(dim=dim, **small | changes), method)


def start(script, args):
    """Networks, optimisers and training step."""
    networks = script.init_networks(args)
    optimizers = script.init_optimizers(args, networks)
    step = script.make_train_step(args, networks, optimizers, torch.tensor(args.lr))
    return networks, optimizers, step


def make_batches(script, args, count):
    """The draws of the first iterations."""
    draws = script.draw_epoch(args, 0)
    return [script.Draws(*(values[i] for values in draws)) for i in range(count)]


def of_seed(networks, s):
    """The weights of one seed."""
    return {name: {k: v[s] for k, v in params.items()} for name, params in networks.items()}


# ------------------------------------------------------------------------------------------------ data and draws
def test_data(script):
    problem = script.make_problem(2)
    assert problem.points.shape == (50000, 2) and problem.centers.shape == (25, 2)
    assert (problem.points - 0.5).abs().max() == pytest.approx(0.5, abs=1e-6)  # the largest coordinate: at the border
    spacing = float(problem.centers[1, 1] - problem.centers[0, 1])  # 2 in the original coordinates
    assert problem.radius == pytest.approx(math.sqrt(2) * 0.1 * spacing / 2, rel=1e-5)
    scores = script.register(problem.points[None], problem.centers, problem.radius)
    assert float(scores["modes"]) == 25
    assert float(scores["points"]) / 50000 == pytest.approx(0.981, abs=0.002)  # the share of real points in the code
    deviation = (problem.points.view(25, 2000, 2) - problem.centers[:, None]).std() / spacing * 2
    assert float(deviation) == pytest.approx(0.05, rel=0.01)
    line = script.make_problem(1)
    assert line.centers.flatten().tolist() == [-4, 0, 4] and line.radius == pytest.approx(math.sqrt(2))
    for c in line.centers:
        mode = line.points[(line.points - c).abs() < 2]
        assert len(mode) / len(line.points) == pytest.approx(1 / 3, abs=0.01)
        assert float(mode.std()) == pytest.approx(0.5, rel=0.05)


def test_an_epoch_sees_every_point_once_and_fills_its_last_batch(script):
    args = make_args(script, "wgangp", batch_size=128, num_seeds=1)
    draws = script.draw_epoch(args, 3)
    assert draws.x.shape == draws.z.shape == (391, 5, 1, 128, 2)
    assert draws.mix.shape == (391, 5, 1, 128, 1)
    seen, points = draws.x[:, 0].reshape(-1, 2), script.make_problem(2).points
    assert torch.equal(seen[:50000].sort(0).values, points.sort(0).values)
    assert -1 <= draws.z.min() < -0.99 and 0.99 < draws.z.max() <= 1
    assert 0 <= draws.mix.min() < 0.01 and 0.99 < draws.mix.max() <= 1
    for k in range(1, 5):  # each D update has its own mini-batch
        for values in (draws.x, draws.z, draws.mix):
            assert not torch.equal(values[:, 0], values[:, k])


def test_a_seed_is_what_it_would_be_alone(script):
    """Initial weights, an epoch's draws and an evaluation's are functions of the seed and the epoch."""
    three = make_args(script, "vaegan", num_seeds=3, seed=1, batch_size=500)
    one = make_args(script, "vaegan", num_seeds=1, seed=3, batch_size=500)
    networks_of_three, networks_of_one = script.init_networks(three), script.init_networks(one)
    for key, value in flat(networks_of_one).items():
        assert torch.equal(flat(networks_of_three)[key][2], value[0])
    again, other_epoch = script.draw_epoch(one, 0), script.draw_epoch(one, 1)
    for of_three, of_one, same, other in zip(script.draw_epoch(three, 0), script.draw_epoch(one, 0), again,
                                             other_epoch):
        assert torch.equal(of_three[:, :, 2], of_one[:, :, 0])
        assert not torch.equal(of_three[:, :, 1], of_one[:, :, 0])
        assert torch.equal(same, of_one) and not torch.equal(other, of_one)
    samples = script.sample_points(three, networks_of_three, 5, 10)
    torch.testing.assert_close(samples[2], script.sample_points(one, networks_of_one, 5, 10)[0])


@pytest.mark.parametrize("dim,method", [(2, "gngan"), (2, "ali"), (1, "vaegan")])
def test_kinks_lie_among_the_inputs(script, dim, method):
    """Each unit of a first layer is on for some of its network's inputs and off for others."""
    args = make_args(script, method, dim, num_seeds=1, hidden_dim=64, batch_size=6400)
    draws = script.Draws(*(values[0, 0, 0] for values in script.draw_epoch(args, 0)))
    for name, params in script.init_networks(args).items():
        inputs = draws.z if name == "generator" else draws.x
        if params["w0"].shape[1] == 2 * dim:
            inputs = torch.cat([draws.x, draws.z], -1)
        on = (inputs @ params["w0"][0] + params["b0"][0] > 0).float().mean(0)
        assert ((0 < on) & (on < 1)).float().mean() > 0.9 and 0.35 < on.mean() < 0.65  # some at the data's border


@pytest.mark.parametrize("method,dim", [("gngan", 2), ("distgan", 1)])
def test_codes_begin_in_the_middle_of_the_prior(script, method, dim):
    """E's codes begin at 0, and the autoencoder's updates move them apart."""
    args = make_args(script, method, dim, hidden_dim=64)
    networks, _, train_step = start(script, args)
    points = script.make_problem(dim).points[::101]

    def codes():
        return torch.vmap(lambda params: script.MLP(params)(points))(networks["encoder"])

    assert (codes() == 0).all()
    for batch in make_batches(script, args, 5):
        train_step(batch)
    assert (codes().std(1) > 1e-3).all()


# ------------------------------------------------------------------------------------------------------- metrics
def test_metrics_of_hand_made_samples(script):
    problem = script.make_problem(2)
    centers, radius = problem.centers, problem.radius
    balanced = centers.repeat_interleave(80, 0)
    shifted = torch.stack([balanced, balanced + radius * 0.7, balanced + radius * 0.8])
    scores = script.register(shifted, centers, radius)
    assert scores["modes"].tolist() == [25, 25, 0]  # 0.7 sqrt(2) r is inside, 0.8 sqrt(2) r is outside
    assert scores["points"].tolist() == [2000, 2000, 0]
    assert scores["tv_true"].tolist() == pytest.approx([0, 0, 1]) and scores["tv_diff"].tolist() == [0, 0, 0]
    some = torch.full((2000, 2), 0.5 + 2 * radius)
    some[:20], some[20:39], some[39:100] = centers[0], centers[1], centers[3]
    scores = script.register(some[None], centers, radius)
    assert scores["modes"].tolist() == [2] and scores["points"].tolist() == [100]  # 20 cover a mode, 19 do not
    share = np.zeros(25)
    share[[0, 1, 3]] = 0.20, 0.19, 0.61
    assert float(scores["tv_true"]) == pytest.approx(np.abs(share - 0.04).sum())
    assert float(scores["tv_diff"]) == pytest.approx(np.abs(np.diff(share)).sum())
    line = script.make_problem(1)
    samples = torch.cat([torch.full((1833, 1), -4.0), torch.full((167, 1), 4.0)])[None]
    assert script.register(samples, line.centers, line.radius)["modes"].tolist() == [2]  # a quarter of a fair share
    assert script.wasserstein_1d(line.points[None] + 0.7, line.points).item() == pytest.approx(0.7, abs=0.01)


def test_a_figure_is_the_mean_of_the_last_ten_evaluations(script):
    records = [{"epoch": e, "iteration": 2 * e, "modes": [float(e), 100.0 * e]} for e in range(1, 21)]
    result = pictures.summarize(records, iterations=40, seconds=4.0)
    assert result["modes"]["per_seed"] == [15.5, 1550.0] and result["modes"]["mean"] == pytest.approx(782.75)
    assert result["modes"]["std"] == pytest.approx(np.std([15.5, 1550.0], ddof=1))
    assert result["iterations_per_second"] == 10


# ------------------------------------------------------------------------------------------------------ the step
CASES = [(dim, method, {}) for dim in METHODS for method in METHODS[dim]] + [
    (2, "gngan", {"penalty": "rms", "autoencoder_updates": "encoder", "alpha": 0.3, "critic_steps": 2}),
    (2, "gngan", {"penalty": "score", "autoencoder_updates": "both", "ema": 0.75}),
    (2, "distgan", {"autoencoder_updates": "both", "critic_steps": 2}), (2, "ali", {"label_smoothing": 0.1}),
    (2, "vaegan", {"vaegan_gamma": 0.3, "vaegan_kl": 0.2, "critic_steps": 2})]


@pytest.mark.parametrize("dim,method,changes", CASES, ids=lambda v: str(v).replace(" ", "") if v else "default")
def test_three_iterations_against_the_plain_reference(script, dim, method, changes):
    """Losses, which networks each updates, the order of updates and Adam, all at once: after three iterations every
    weight of every seed is where plain PyTorch, one seed at a time, takes it."""
    args = make_args(script, method, dim, **{"vae_sigma": 0.5, **changes})
    torch.set_default_dtype(torch.float64)  # float32 would hide an error below 1e-3
    try:
        networks, _, train_step = start(script, args)
    finally:
        torch.set_default_dtype(torch.float32)
    before = {k: v.clone() for k, v in flat(networks).items()}
    average = {k: v.clone() for k, v in networks["generator"].items()}
    references = [Reference(args, of_seed(networks, s)) for s in range(2)]
    for batch in make_batches(script, args, 3):
        batch = script.Draws(*(values.double() for values in batch))
        train_step(batch)
        average = {k: 0.75 * v + 0.25 * networks["generator"][k] for k, v in average.items()}
        for s, reference in enumerate(references):
            reference.step(*(values[:, s] for values in batch))
    for s, reference in enumerate(references):
        for name, expected in reference.weights().items():
            for k, value in expected.items():
                torch.testing.assert_close(networks[name][k][s], value, rtol=1e-3, atol=1e-5)
    assert all((v != before[k]).any() for k, v in flat(networks).items() if "/w" in k)
    if args.ema:
        for key, value in average.items():
            torch.testing.assert_close(networks["generator_ema"][key], value)


def test_terms_are_those_of_the_loss(script):
    """What an objective gives to watch adds up to the loss that it gives to minimise."""
    args = make_args(script, lambda_m1=2.0, lambda_m2=3.0)
    losses = start(script, args)[2](make_batches(script, args, 1)[0])
    assert {"autoencoder", "discriminator", "generator", "gradient_penalty"} <= losses.keys()
    total = losses["score_matching"] + 2 * losses["norm_matching"] + 3 * losses["inner_matching"]
    torch.testing.assert_close(losses["generator"], total)
    assert all(value.shape == (2,) for value in losses.values())


def test_gradients_stay_finite_for_identical_points_and_dead_units(script):
    params = script.init_mlp([2, 8, 8, 1], torch.rand(8, 2), torch.Generator().manual_seed(0))
    dead = {**params, "w0": params["w0"] * 0, "b0": params["b0"] * 0 - 1}
    x, mix = torch.full((4, 2), 0.3), torch.full((4, 1), 0.5)

    def loss(params, fake):
        discriminator = script.MLP(params, script.to_logits)
        matching = script.gradient_matching(discriminator, x, fake)
        return sum(matching) + script.gradient_penalty(discriminator, x, fake, mix)

    for weights in (params, dead):
        gradients = torch.func.grad(loss, argnums=(0, 1))(weights, x)
        assert all(g.isfinite().all() for g in flat(gradients).values())


def test_a_large_log_variance_does_not_overflow(script):
    """VAE-GAN in 1D begins with one of 66 in one of 64 seeds."""
    x, noise = torch.zeros(5, 1), torch.ones(5, 1)
    latent, mean, log_var = script.encode_sample(lambda x: torch.full((5, 2), 66.0), x, noise)
    loss = script.kl_divergence(mean, log_var) + latent.square().mean().square()
    assert loss.isfinite() and log_var.max() == 20


@pytest.mark.parametrize("method", ["ali", "vaegan", "wgangp", "distgan"])  # GN-GAN: the next test
def test_every_method_is_one_graph(script, method):
    """fullgraph raises on anything that would split the compiled step or wait for the device (an .item(), say)."""
    args = make_args(script, method, ema=0.9, critic_steps=1, hidden_layers=1)
    torch.compiler.reset()
    step = torch.compile(start(script, args)[2], fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in make_batches(script, args, 2):
            step(batch)


def test_compiled_step_gives_the_eager_result(script):
    if not training.compiles(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    args = make_args(script, hidden_layers=1)
    states = []
    for compiled in (False, True):
        networks, optimizers, step = start(script, args)
        step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
        for batch in make_batches(script, args, 5):
            step(batch)
        states.append(flat([networks, optimizers]))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-3, atol=1e-4)


def test_learning_rate_falls_every_10000_updates(script):
    args = make_args(script)  # three updates an iteration
    assert script.learning_rate(args, 3333) == pytest.approx(1e-3)
    assert script.learning_rate(args, 3334) == pytest.approx(0.99e-3)
    assert script.learning_rate(make_args(script, "wgangp"), 195499) == pytest.approx(1e-3 * 0.99**117)
    assert script.learning_rate(make_args(script, dim=1), 50000) == 1e-3


# ------------------------------------------------------------------------------------------ the script as it is run
TINY = ["--epochs", "2", "--num-seeds", "2", "--hidden-dim", "8", "--ema", "0.9"]
COLOURS = {"blue": (31, 119, 180), "red": (214, 39, 40), "orange": (255, 127, 14), "black": (0, 0, 0)}


def check_picture(path, *colours):
    """150 dpi, a sensible size, and enough pixels of the colours in which the data are drawn."""
    image = Image.open(path)
    assert path.suffix == ".gif" or round(image.info["dpi"][0]) >= 150
    picture = np.asarray(image.convert("RGB"), dtype=float)
    assert 200 <= picture.shape[0] <= 1500 and 300 <= picture.shape[1] <= 2500, picture.shape
    for colour in colours:
        near = np.abs(picture - COLOURS[colour]).max(-1) < 60
        assert near.sum() > 50, f"{path.name}: nothing {colour}"


def check_events(folder, steps):
    """TensorBoard's scalars of a method."""
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("metrics/modes")] == steps
    tags = events.Tags()
    assert {"charts/learning_rate", "charts/iterations_per_second"} <= set(tags["scalars"])
    assert any(tag.startswith("losses/") for tag in tags["scalars"])
    assert "arguments/text_summary" in tags["tensors"]


@pytest.mark.parametrize("dim", [2, 1])
def test_all_methods_in_one_run(script, tmp_path, dim):
    batch, length = (12500, 4) if dim == 2 else (3200, 2)
    out, _ = run(script, "--dim", dim, "--method", "all", *TINY, "--batch-size", batch, "--run-dir", tmp_path,
                 "--run-name", "a run")
    folder = tmp_path / "a run"
    setting = json.loads((folder / "args.json").read_text())
    assert setting["args"]["method"] == "all" and setting["args"]["beta1"] == (0.8 if dim == 2 else 0.5)

    # Scores
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    methods = script.methods_of(dim, "all")
    assert set(METHODS[dim]) <= set(methods)  # a fork may have more
    expected = [(method, epoch, epoch * length) for method in methods for epoch in (1, 2)]
    assert [(line["method"], line["epoch"], line["iteration"]) for line in lines] == expected
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == methods
    for method, result in results.items():
        of_method = [line for line in lines if line["method"] == method]
        for key in ["modes", "points", "tv_true", "tv_diff"] + ["w1"] * (dim == 1):
            mean = np.mean([line[key] for line in of_method], 0)
            assert result[key]["per_seed"] == pytest.approx(mean.tolist())
            assert all(len(line[key]) == len(line[key + "_ema"]) == 2 for line in of_method)
            if method in METHODS[2]:
                has_a_prior = dim == 2 and method in ("vaegan", "vae", "betavae")
                assert (key + "_uniform" in of_method[0]) == has_a_prior
        assert result["seconds"] > 0 and result["iterations_per_second"] > 0
        check_events(folder / method, [1, 2])  # each has a folder, under the same tags

    # Table, first line, last line
    rows = out.splitlines()
    for method in methods:
        title = script.METHODS[method].title
        assert any(row.startswith(title + ", averaged G ") for row in rows)
        row = next(row for row in rows if row.startswith(title + "  "))
        if dim == 2:
            assert all(f"{mean:.2f} ± {std:.2f}" in row for mean, std in script.METHODS[method].paper or [])
    assert str(folder) in rows[0] and "on the CPU" in rows[0] and f"tensorboard --logdir '{folder}'" in rows[0]
    assert rows[-1].startswith(f"{folder}: {script.METHODS[methods[0]].title}, averaged G: ")
    picture = "samples.png" if dim == 2 else "training.gif"
    assert rows[-1].endswith(f"; to see: '{folder / picture}'")

    # Pictures
    check_picture(folder / "modes.png", "blue", "orange", "red")
    if dim == 1:
        check_picture(folder / "density.png", "blue", "orange")
        check_picture(folder / "training.gif", "blue", "orange")
        assert Image.open(folder / "training.gif").n_frames >= 2
    else:
        check_picture(folder / "samples.png", "blue", "red")
        check_picture(folder / "gradient_map.png", "black", "red")


def test_figure_2_is_of_the_averaged_generator(script):
    args = make_args(script, dim=1, ema=0.9)
    networks = script.init_networks(args)
    for value in networks["generator_ema"].values():
        value.zero_()  # every point at 0
    density = script.density_and_score(args, networks, 1)[:, 0]
    assert (density > 0).sum(1).tolist() == [1] * args.num_seeds


def test_where_matplotlib_and_the_output_are_odd(script, tmp_path):
    """A notebook's backend that is missing here, an output without ±; a process of its own, as both act at imports."""
    environment = {**os.environ, "MPLBACKEND": "nowhere", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, ROOT / f"{script.SCRIPT}.py", "--dim", "1", "--epochs", "1", "--batch-size",
                           "6400", "--run-dir", tmp_path, "--run-name", "r"], env=environment, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "r/density.png").exists(), done.stderr.decode()
    assert b"GN-GAN" in done.stdout and b" ? " in done.stdout


def test_a_notebooks_own_plots_stay(script, tmp_path):
    """Neither importing the script nor its pictures change matplotlib's backend or MPLBACKEND."""
    (tmp_path / "notebook.py").write_text(f"""
import importlib, os, pathlib, sys
os.environ["MPLBACKEND"] = "svg"
import matplotlib
matplotlib.use("pdf")
script = importlib.import_module("{script.SCRIPT}")
sys.argv[1:] = ["--epochs", "1", "--num-seeds", "1", "--batch-size", "50000"]
sys.argv += ["--run-dir", r"{tmp_path}", "--run-name", "r"]
assert script.main() == 0 and pathlib.Path(r"{tmp_path}", "r/modes.png").exists()
print(matplotlib.get_backend(), os.environ["MPLBACKEND"])
""")
    out, _ = run(str(tmp_path / "notebook.py"))
    assert out.splitlines()[-1] == "pdf svg"


LINE = ["--dim", "1", "--method", "all", "--epochs", "3", "--num-seeds", "2", "--batch-size", "3200",
        "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def left_alone(script, tmp_path_factory):
    """The folder of a run of LINE that nothing interrupted."""
    folder = tmp_path_factory.mktemp("left_alone")
    run(script, *LINE, "--run-dir", folder, "--run-name", "r")
    return folder / "r"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resume_is_exact(script, tmp_path, left_alone, number):
    """Stopped in the second of several methods, and resumed by the same command: weights, moments and metrics are those
    of a run that was left alone, bit for bit."""
    metrics = tmp_path / "r/metrics.jsonl"
    command = [*LINE, "--run-dir", tmp_path, "--run-name", "r", "--resume", "auto"]
    process = Process(script, *command)
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 4, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    if number == signal.SIGKILL:
        metrics.write_bytes(metrics.read_bytes() + metrics.read_bytes().splitlines()[-1][:-30])  # a full disk, too
    else:
        assert f"--resume {tmp_path / 'r'}" in out and (tmp_path / "r/modes.png").exists()
    run(script, *command)
    resumed, expected = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "r", left_alone))
    assert_same(resumed, expected, but=("seconds", "run_dir", "run_name"))
    assert metrics.read_text() == (left_alone / "metrics.jsonl").read_text()
    events = EventAccumulator(str(tmp_path / "r/vaegan"))
    events.Reload()
    assert [e.step for e in events.Scalars("metrics/modes")] == [1, 2, 3]
    assert loss_points(tmp_path / "r/vaegan") == loss_points(left_alone / "vaegan")


def loss_points(folder):
    """TensorBoard's points of the generator's loss."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("losses/generator")]


def test_a_finished_run(script, left_alone):
    """Resumed, it prints its table and changes nothing; the same command without --resume is refused."""
    files = [left_alone / name for name in ("metrics.jsonl", "args.json", "checkpoint.pt")]
    before = [file.read_bytes() for file in files]
    losses = loss_points(left_alone / "gngan")
    assert "GN-GAN" in run(script, "--resume", left_alone)[0]
    assert [file.read_bytes() for file in files] == before and loss_points(left_alone / "gngan") == losses != []
    _, err = run(script, *LINE, "--run-dir", left_alone.parent, "--run-name", "r", status=2)
    assert err.startswith(f"{script.SCRIPT}.py: error: ") and "has a run in it" in err and len(err.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- processes
FIVE = ["--dim", "1", "--num-seeds", "5", "--batch-size", "1600", "--ema", "0.9"]
LONG = ["--method", "vae", "--num-seeds", "5", "--processes", "3", "--batch-size", "5000", "--hidden-dim", "8",
        "--epochs", "8", "--checkpoint-every", "2"]  # 10 iterations an epoch


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_seeds_over_processes(script, tmp_path):
    """A seed trains as in any run whose processes have as many seeds each, bit for bit; else up to rounding. The last
    share's spare places leave no trace."""
    def train(name, share, *flags):
        out, _ = run(script, *FIVE, "--epochs", 2, "--run-dir", tmp_path, "--run-name", name, *flags)
        assert f", {share} a process, on the CPU" in out.splitlines()[0]
        saved = read_checkpoint(tmp_path / name)
        return flat([saved["networks"], saved["optimizers"], saved["losses"]])

    together = train("two", 3, "--processes", 2)
    for seed, own in ((1, slice(0, 3)), (4, slice(3, 5))):
        apart = train(f"from{seed}", 3, "--seed", seed, "--num-seeds", 3, "--processes", 1)
        for key, value in together.items():
            if value.ndim:
                assert len(value) == 5 and torch.equal(value[own], apart[key][: len(value[own])]), key
    for processes, share in ((1, 5), (4, 2)):
        for key, value in train(f"{processes}", share, "--processes", processes).items():
            torch.testing.assert_close(value, together[key], rtol=1e-3, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert all(len(line[key]) == 5 for line in lines for key in ("modes", "points_ema"))


def test_resume_with_another_number_of_processes(script, tmp_path):
    run(script, *FIVE, "--epochs", 4, "--processes", 2, "--run-dir", tmp_path, "--run-name", "a")
    run(script, *FIVE, "--epochs", 2, "--processes", 2, "--run-dir", tmp_path, "--run-name", "b")
    run(script, "--resume", tmp_path / "b", "--epochs", 4, "--processes", 4)
    a, b = (read_checkpoint(tmp_path / name) for name in "ab")
    for key, value in flat([a["networks"], a["optimizers"]]).items():
        torch.testing.assert_close(flat([b["networks"], b["optimizers"]])[key], value, rtol=1e-3, atol=1e-5)


def test_several_methods_with_another_number_of_processes(script, tmp_path, left_alone):
    """One has ended: what is the same for all methods is fixed, but not this."""
    args, _, _ = script.parse_args(["--resume", str(left_alone), "--processes", "1"])
    assert args.processes == 1


def test_blocks_of_half_a_second(script, tmp_path, monkeypatch):
    """A signal waits for the end of a block; the next run in this process has its threads."""
    blocks = []

    def make_share(args, state, device, compiled):
        def train_share(first, last):
            blocks.append(last - first)
            time.sleep(0.002 * (last - first))
            return script.map_state({**state, "losses": {}}, torch.Tensor.numpy)

        return train_share

    monkeypatch.setattr(script, "make_share", make_share)
    monkeypatch.setattr("common.on_signals", lambda handle: None)
    monkeypatch.setattr(sys, "argv", ["x", "--dim", "1", "--device", "cpu", "--batch-size", "8", "--epochs", "3",
                                      "--num-seeds", "1", "--run-dir", str(tmp_path), "--run-name", "r"])
    threads = torch.get_num_threads()
    assert script.main() == 0 and sum(blocks) == 2400
    assert blocks[0] == 1 and 50 < max(blocks) < 350  # 250 in half a second; fewer on a busy machine
    assert torch.get_num_threads() == threads


def workers_of(process):
    pid = process.process.pid
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def long_run(script, tmp_path_factory):
    """The folder of a run of LONG that nothing interrupted."""
    folder = tmp_path_factory.mktemp("long")
    run(script, *LONG, "--run-dir", folder, "--run-name", "r")
    return folder / "r"


@pytest.mark.skipif(sys.platform != "linux", reason="one process by default; /proc")
@pytest.mark.parametrize("number,to,status", [
    (signal.SIGKILL, [1], 2), (signal.SIGKILL, [3], 2), (signal.SIGKILL, [0], -9), (signal.SIGINT, [0, 1, 2, 3], 130),
    (signal.SIGTERM, [0], 143)])
def test_a_signal_to_some_of_the_processes(script, tmp_path, long_run, number, to, status):
    """One line, no process left behind; resumed, the run is what it would be if left alone, bit for bit."""
    process = Process(script, *LONG, "--run-dir", tmp_path, "--run-name", "r")
    metrics = tmp_path / "r/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    pids = [process.process.pid, *workers_of(process)]
    assert len(pids) == 4
    for index in to:
        os.kill(pids[index], number)
    out, err = process.communicate()
    assert process.returncode == status, err
    last = re.split("[\r\n]", err.strip())[-1]
    if status == 2:
        assert last.startswith(f"{script.SCRIPT}.py: error: one of the run's processes was killed"), err
    if status >= 2:
        assert f"--resume {tmp_path / 'r'}" in (last if status == 2 else out) and "Traceback" not in err
    deadline = time.time() + 10
    while any(map(is_alive, pids)):
        assert time.time() < deadline, "a process is left behind"
        time.sleep(0.01)
    assert 20 <= read_checkpoint(tmp_path / "r")["iteration"] < 80
    run(script, "--resume", tmp_path / "r")
    assert_same(read_checkpoint(tmp_path / "r"), read_checkpoint(long_run), but=("seconds", "run_dir"))
    assert metrics.read_text() == (long_run / "metrics.jsonl").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="one process by default; /proc")
def test_a_worker_that_hangs(script, tmp_path):
    """The others end with their parent all the same."""
    process = Process(script, *LONG, "--run-dir", tmp_path, "--run-name", "r")
    wait_for(lambda: (tmp_path / "r/metrics.jsonl").exists(), process)
    workers = workers_of(process)
    os.kill(workers[-1], signal.SIGSTOP)
    process.send_signal(signal.SIGKILL)
    deadline = time.time() + 10
    while any(map(is_alive, workers[:-1])):
        assert time.time() < deadline, "a process is left behind"
        time.sleep(0.01)
    os.kill(workers[-1], signal.SIGKILL)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_worker_that_is_killed_while_another_trains(script, tmp_path, killed):
    """Itself training, or having sent the half of a state that is more than a pipe holds."""
    def work(seconds):
        def call(wait):
            time.sleep(seconds if wait else 0)
            return np.zeros(2**20)
        return call

    with training.Workers([work(1), work(0)], lambda: None, tmp_path) as workers:
        workers.send(False)
        assert [len(result) for result in workers.receive()] == [2**20, 2**20]
        timer = threading.Timer(0.3, os.kill, (workers.processes[killed], signal.SIGKILL))
        timer.start()
        with pytest.raises(UserError, match=f"was killed .*--resume {tmp_path}"):
            workers.send(True)
            workers.receive()
        processes = list(workers.processes)
    assert not any(map(is_alive, processes))


def test_an_error_in_one_of_the_processes(script, tmp_path):
    """A fork's fault, in the last share alone: its traceback is shown, and no process is left."""
    text = pathlib.Path(script.__file__).read_text()
    mark = "            lr.fill_(learning_rate(args, iteration))\n"
    assert text.count(mark) == 1
    fault = "            if args.seed > 2:\n                raise ValueError(f'a fault of {os.getpid()}')\n"
    (tmp_path / "my_fork.py").write_text(text.replace(mark, fault + mark))
    _, err = run(str(tmp_path / "my_fork.py"), *FIVE, "--epochs", 2, "--processes", 3, "--run-dir", tmp_path, status=1)
    assert "in train_share" in err
    assert not is_alive(int(re.search("ValueError: a fault of ([0-9]+)", err)[1]))


def test_the_graph_is_compiled_once(script, tmp_path, monkeypatch):
    """Not in every process: those that are forked have it."""
    log = tmp_path / "log"

    def compiler(graph, inputs):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return graph.forward

    backend = aot_autograd(fw_compiler=compiler)  # in place of inductor
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    args = dataclasses.replace(make_args(script, num_seeds=5, hidden_layers=1, batch_size=12500), processes=3)
    networks = script.init_networks(args)
    state = {"networks": networks, "optimizers": script.init_optimizers(args, networks)}

    def shares():
        return script.make_shares(args, state, CPU, compiled=True)

    with training.Workers(shares(), lambda: shares()[0](0, 1), tmp_path) as workers:
        for iteration in range(3):
            workers.send(iteration, iteration + 1)
            states = workers.receive()
    assert len(states) == 3 and log.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("arguments,words", [
    (["--dim", "1", "--method", "ali"], ["ali", "1D", "wgangp"]),
    (["--num-seeds", "0"], ["--num-seeds is 0", "[1, inf)"]),
    (["--ema", "1"], ["--ema"]),
    (["--dim", "1", "--hidden-layers", "1"], ["--hidden-layers"]),
    (["--resume", "nowhere"], ["nowhere", "checkpoint.pt"]),
    (["--resume", "auto"], ["--run-name"]),
])
def test_what_is_refused(script, arguments, words):
    with pytest.raises(UserError) as error:
        script.parse_args(arguments)
    assert all(word in str(error.value) for word in words)


@pytest.fixture
def saved(script, tmp_path):
    """The folder of a run of GN-GAN at iteration 6250, of 3125 an epoch, and its arguments."""
    args = make_args(script)
    networks, optimizers, _ = start(script, args)
    torch.save({"script": script.SCRIPT, "args": vars(args), "iteration": 6250, "method": "gngan", "finished": {},
                "seconds": 1.0, "losses": {}, "frames": [], "networks": networks, "optimizers": optimizers},
               tmp_path / "checkpoint.pt")
    return tmp_path, args


def test_flags_given_at_resume_replace_the_saved_ones(script, saved, capsys):
    folder, args = saved
    assert script.parse_args(["--resume", str(folder)])[0] == args
    assert capsys.readouterr().err == ""
    changed = script.parse_args(["--resume", str(folder), "--lr", "0.01", "--epochs", "600"])[0]
    assert changed == dataclasses.replace(args, lr=0.01, epochs=600)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"{script.SCRIPT}.py: --epochs 600 (saved: 500)",
                             f"{script.SCRIPT}.py: --lr 0.01 (saved: 0.001)"]


@pytest.mark.parametrize("flags,words", [
    (["--method", "gan"], ["--method is gan", "gngan"]), (["--dim", "1"], ["--dim is 1", "2"]),
    (["--batch-size", "50"], ["--batch-size is 50", "16"]),
    (["--epochs", "1"], ["--epochs is 1", "already at iteration 6250"])])
def test_what_a_resumed_run_refuses(script, saved, flags, words):
    with pytest.raises(UserError) as error:
        script.parse_args(["--resume", str(saved[0]), *flags])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("flags", [["--hidden-dim", "9"], ["--hidden-layers", "3"], ["--ema", "0.9"]], ids=" ".join)
def test_weights_that_do_not_fit(script, saved, flags):
    args, _, checkpoint = script.parse_args(["--resume", str(saved[0]), *flags])
    networks, optimizers, _ = start(script, args)
    with pytest.raises(UserError, match=r"does not fit .* networks\.\w+\.\w+ is .* there, .* here"):
        training.restore_tensors(checkpoint, {"networks": networks, "optimizers": optimizers})


def test_other_seeds_at_resume(script, saved):
    """One line says what was replaced, one that it does not fit."""
    _, err = run(script, "--resume", saved[0], "--num-seeds", 3, status=2)
    replaced, error = [line for line in err.splitlines() if line.startswith(script.SCRIPT)]
    assert replaced.endswith("--num-seeds 3 (saved: 2)") and "Traceback" not in err
    assert error.startswith(f"{script.SCRIPT}.py: error: ") and "does not fit" in error


@pytest.mark.parametrize("flag,given,saved", [("--epochs", "4", "3"), ("--lr", "0.1", "0.001")])
def test_flags_of_a_run_whose_first_methods_are_finished(script, left_alone, flag, given, saved):
    """Its table would hold methods of two lengths, or trained otherwise."""
    with pytest.raises(UserError, match=f"{flag} is {given}: the run of .* has {saved}; leave the flag out"):
        script.parse_args(["--resume", str(left_alone), flag, given])
    free = ["--device", "cpu", "--checkpoint-every", "1"]
    args, _, _ = script.parse_args(["--resume", str(left_alone), *free])  # what is computed stays
    assert (args.device, args.checkpoint_every) == ("cpu", 1)


def test_a_run_is_prolonged_by_epochs(script, tmp_path):
    """Resumed with more epochs it is what it would be if begun with them."""
    common = ["--dim", "1", "--num-seeds", "2", "--batch-size", "3200", "--run-dir", tmp_path]
    run(script, *common, "--epochs", 3, "--run-name", "a")
    run(script, *common, "--epochs", 2, "--run-name", "b")
    _, err = run(script, "--resume", tmp_path / "b", "--epochs", 3)
    assert "--epochs 3 (saved: 2)" in err
    assert_same(*(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in "ab"),
                but=("seconds", "run_name"))
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    events = EventAccumulator(str(tmp_path / "b"))
    events.Reload()
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("arguments/text_summary")}
    assert texts.keys() == {0, 2} and "epochs = 2\n" in texts[0] and "epochs = 3\n" in texts[2]


# ---------------------------------------------------------------------------------------------------------- forks
NINTH = """
def ninth_discriminator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    real, generated = D(torch.cat([draws.x, G(draws.z)])).chunk(2)
    margin = real.mean() - generated.mean()
    watched = {"margin": margin, "number": args.margin, "count": (real > 0).sum(), "of_points": real}
    return (args.margin - margin).square(), watched


def ninth_generator(args: Args, E: MLP, G: MLP, D: MLP, draws: Draws) -> Result:
    return -D(G(draws.z)).mean(), {}


"""
LINE_IN_METHODS = """    "ninth": Method("Ninth", {"discriminator": ninth_discriminator, "generator": ninth_generator}),
"""


@pytest.mark.parametrize("dim,method", [(2, "ninth"), (2, "all"), (1, "all")])
def test_a_method_of_ones_own(script, tmp_path, dim, method):
    """In a copy of the script: its losses, a line in METHODS, a flag of its own. Nothing else is edited."""
    text = pathlib.Path(script.__file__).read_text()
    for mark, added in (("@dataclass(frozen=True)\nclass Method:", NINTH),
                        ("    # optimisation\n", "    margin: float = 1\n"),
                        ('    "gan": Method(', LINE_IN_METHODS)):
        assert text.count(mark) == 1
        text = text.replace(mark, added + mark)
    (tmp_path / "my_fork.py").write_text(text)
    out, err = run(str(tmp_path / "my_fork.py"), "--dim", dim, "--method", method, "--margin", 2, "--epochs", 1,
                   "--num-seeds", 2, "--hidden-dim", 8, "--batch-size", 12500 if dim == 2 else 3200,
                   "--run-dir", tmp_path, "--run-name", "r")
    assert "Traceback" not in err
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert list(results) == (["ninth", *script.methods_of(dim, "all")] if method == "all" else ["ninth"])
    row = next(row for row in out.splitlines() if row.startswith("Ninth  "))
    assert row.split().count("-") == (2 if dim == 2 else 0)  # the paper has no figures of it
    events = EventAccumulator(str(tmp_path / "r" / ("ninth" if method == "all" else "")))
    events.Reload()
    assert len(events.Scalars("losses/margin")) == len(events.Scalars("losses/of_points")) == 1
    assert events.Scalars("losses/number")[0].value == 2 and 0 <= events.Scalars("losses/count")[0].value
    pictures = {"modes.png", "density.png", "training.gif"} if dim == 1 else {
        "modes.png", "samples.png", "gradient_map.png"}
    assert pictures <= {path.name for path in (tmp_path / "r").iterdir()}


@pytest.mark.parametrize("flag,title", [("--vaegan-kl", "VAE-GAN"), ("--lambda-m1", "GN-GAN")])
def test_a_method_that_diverges_among_others(script, tmp_path, flag, title):
    """One in the middle, or the last: it is reported as diverged, the others run; so it is after a resume."""
    key = {"VAE-GAN": "vaegan", "GN-GAN": "gngan"}[title]
    others = [name for name in script.methods_of(1, "all") if name != key]
    out, err = run(script, *LINE, flag, "3e38", "--run-dir", tmp_path, "--run-name", "r")
    when = re.search(f"\n{title} diverged at (iteration \\d+ \\(epoch \\d\\))\n", out)[1]
    assert f"{title} diverged at {when}" in err and "Traceback" not in err
    assert f"{title} diverged at {when}; to see: " in out.splitlines()[-1]
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert results.pop(key) == {"diverged": when} and list(results) == others
    titles = [row.split("  ")[0] for row in out.splitlines() if " ± " in row]
    assert titles == [script.METHODS[name].title for name in others]
    files = [tmp_path / "r" / name for name in ("results.json", "metrics.jsonl")]
    before = [file.read_text() for file in files]
    again, _ = run(script, "--resume", tmp_path / "r")
    assert again.splitlines()[1:] == out.splitlines()[1:]
    assert [re.sub(r'"(seconds|iterations_per_second)": .*', "", text) for text in before] == [
        re.sub(r'"(seconds|iterations_per_second)": .*', "", file.read_text()) for file in files]


def test_methods_that_all_diverge(script, tmp_path):
    out, _ = run(script, *LINE, "--lr", "1e30", "--run-dir", tmp_path, "--run-name", "r", status=2)
    assert out.splitlines()[-1].count(" diverged at iteration ") == len(script.methods_of(1, "all"))


def test_a_terminal_that_is_closed(script, tmp_path):
    """The methods all run."""
    ends = os.openpty()
    process = Process(script, *LINE, "--run-dir", tmp_path, "--run-name", "r", output=os.ttyname(ends[1]))
    wait_for(lambda: (tmp_path / "r/checkpoint.pt").exists(), process)
    for end in ends:
        os.close(end)
    process.communicate()
    assert process.returncode == 0
    assert list(json.loads((tmp_path / "r/results.json").read_text())) == script.methods_of(1, "all")


def test_a_checkpoint_of_junk(script, tmp_path):
    for contents in (b"junk", random.Random(0).randbytes(64)):
        (tmp_path / "checkpoint.pt").write_bytes(contents)
        with pytest.raises(UserError, match="cannot read .*: it is cut off or no checkpoint"):
            script.parse_args(["--resume", str(tmp_path)])


@pytest.mark.parametrize("entry,junk,words", [
    ("networks", [1], "is not a checkpoint of"), ("networks", {}, "does not fit"), ("optimizers", [1], "does not fit"),
    ("finished", [1], "is not a checkpoint of"), ("frames", 1, "is not a checkpoint of"),
    ("method", "nosuch", "is not a checkpoint of"), ("method", None, "is not a checkpoint of")])
def test_a_checkpoint_with_an_entry_of_junk(script, saved, entry, junk, words):
    checkpoint = torch.load(saved[0] / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {entry: junk}, saved[0] / "checkpoint.pt")
    with pytest.raises(UserError, match=words):
        args, _, checkpoint = script.parse_args(["--resume", str(saved[0])])
        networks, optimizers, _ = start(script, args)
        training.restore_tensors(checkpoint, {"networks": networks, "optimizers": optimizers})


def test_none_at_resume_is_the_default(script, saved):
    given = ["--epochs", "None", "--batch-size", "None", "--beta1", "None"]
    args = script.parse_args(["--resume", str(saved[0]), *given[:2]])[0]
    assert args.epochs == 500
    with pytest.raises(UserError, match="--batch-size is 128: the run of .* has 16"):
        script.parse_args(["--resume", str(saved[0]), *given])


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(script, tmp_path):
    _, err = run(script, *TINY, "--method", "vae", "--batch-size", "12500", "--lr", "1e30", "--run-dir", tmp_path,
                 "--run-name", "r", status=2)
    last = err.splitlines()[-1]
    assert last.startswith(f"{script.SCRIPT}.py: error: training diverged") and "iteration 4 (epoch 1)" in last
    checkpoint = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 0
    assert all(v.isfinite().all() for v in flat(checkpoint["networks"]).values())
