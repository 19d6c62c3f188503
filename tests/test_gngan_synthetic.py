"""gngan_synthetic.py: equations against plain references, the training step, metrics, the script as users run it."""
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from compare import assert_same, flat
from launcher import Process, run
from PIL import Image
from reference_synthetic import Reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gngan_synthetic as script

METHODS_2D = list(script.TITLES)
CASES = [(2, m) for m in METHODS_2D] + [(1, m) for m in script.METHODS_1D]
SCRIPT = "gngan_synthetic.py"
TINY = ["--epochs", "2", "--num-seeds", "2", "--hidden-dim", "8", "--batch-size", "2500"]


def make_args(method="gngan", dim=2, **kwargs):
    return script.resolve(script.Args(dim=dim, method=method, **{"hidden_dim": 8, "batch_size": 16, **kwargs}), method)


def batches(args, generators, count):
    draws = script.draw_epoch(script.make_data(args.dim)[0], generators, args)
    return [{k: v[i] for k, v in draws.items()} for i in range(count)]


def random_discriminator(dim=2, seeds=2, hidden=8, dtype=torch.float64):
    generators = [torch.Generator().manual_seed(s) for s in range(seeds)]
    params = script.init_mlp([dim, hidden, hidden, 1], generators, "uniform")
    return {k: (v + 0.1 * torch.randn(v.shape, generator=generators[0])).to(dtype) for k, v in params.items()}


# ------------------------------------------------------------------------------------------------ data and draws
def test_data_2d():
    points, centers, radius = script.make_data(2)
    assert points.shape == (50000, 2) and centers.shape == (25, 2)
    assert 0 <= points.min() and points.max() <= 1
    assert (points - 0.5).abs().max() == pytest.approx(0.5, abs=1e-6)  # the largest coordinate touches the border
    spacing = float(centers[1, 1] - centers[0, 1])  # 2 in the original coordinates
    assert radius == pytest.approx(math.sqrt(2) * 0.1 * spacing / 2, rel=1e-5)
    scores = script.register(points[None], centers, radius)
    assert float(scores["modes"]) == 25
    assert float(scores["points"]) / 50000 == pytest.approx(0.981, abs=0.002)  # the notes' share of real points
    deviation = (points.view(25, 2000, 2) - centers[:, None]).std() / spacing * 2
    assert float(deviation) == pytest.approx(0.05, rel=0.01)


def test_data_1d():
    points, centers, radius = script.make_data(1)
    assert centers.flatten().tolist() == [-4, 0, 4] and radius == pytest.approx(math.sqrt(2))
    for c in centers:
        mode = points[(points - c).abs() < 2]
        assert len(mode) / len(points) == pytest.approx(1 / 3, abs=0.01)
        assert float(mode.std()) == pytest.approx(0.5, rel=0.05)


def test_an_epoch_sees_every_point_once_and_fills_its_last_batch():
    args = make_args(batch_size=128)
    data = torch.arange(50000.0)[:, None].expand(-1, 2)
    draws = script.draw_epoch(data, [torch.Generator().manual_seed(3)], args)
    assert draws["x"].shape == (391, 1, 1, 128, 2) and draws["mix"].shape == (391, 1, 1, 128, 1)
    seen = draws["x"][..., 0].flatten().long()
    assert torch.equal(seen[:50000].sort().values, torch.arange(50000))
    assert len(seen[50000:].unique()) == 48
    assert -1 <= draws["z"].min() < -0.99 and 0.99 < draws["z"].max() <= 1
    assert 0 <= draws["mix"].min() < 0.01 and 0.99 < draws["mix"].max() <= 1


def test_every_seed_has_two_streams_of_its_own():
    training, evaluation = script.make_generators(make_args(seed=3, num_seeds=4))
    draws = [tuple(torch.rand(4, generator=g).tolist()) for g in training + evaluation]
    assert len(set(draws)) == 8
    alone = script.make_generators(make_args(seed=5, num_seeds=1))
    assert tuple(torch.rand(4, generator=alone[0][0]).tolist()) == draws[2]
    assert tuple(torch.rand(4, generator=alone[1][0]).tolist()) == draws[6]


def test_each_critic_step_has_its_own_batch():
    draws = script.draw_epoch(script.make_data(2)[0], [torch.Generator().manual_seed(0)], make_args("wgangp"))
    assert draws["x"].shape[1] == 5
    for k in range(1, 5):
        for key in ("x", "z", "mix"):
            assert not torch.equal(draws[key][:, 0], draws[key][:, k])


# ------------------------------------------------------------------------------------------------------- metrics
def test_metrics_of_hand_made_samples():
    _, centers, radius = script.make_data(2)
    balanced = centers.repeat_interleave(80, 0)
    scores = script.register(torch.stack([balanced, balanced + radius * 0.7, balanced + radius * 0.8]), centers, radius)
    assert scores["modes"].tolist() == [25, 25, 0]  # 0.7 sqrt(2) r is inside, 0.8 sqrt(2) r is outside
    assert scores["points"].tolist() == [2000, 2000, 0]
    assert scores["tv_true"].tolist() == pytest.approx([0, 0, 1]) and scores["tv_diff"].tolist() == [0, 0, 0]
    nowhere = torch.full((2000, 2), 0.5 + 2 * radius)
    some = nowhere.clone()
    some[:20], some[20:39], some[39:100] = centers[0], centers[1], centers[3]
    scores = script.register(some[None], centers, radius)
    assert scores["modes"].tolist() == [2] and scores["points"].tolist() == [100]  # 20 cover a mode, 19 do not
    share = np.zeros(25)
    share[[0, 1, 3]] = 0.20, 0.19, 0.61
    assert float(scores["tv_true"]) == pytest.approx(np.abs(share - 0.04).sum())
    assert float(scores["tv_diff"]) == pytest.approx(np.abs(np.diff(share)).sum())


def test_metrics_1d():
    _, centers, radius = script.make_data(1)
    samples = torch.cat([torch.full((1833, 1), -4.0), torch.full((167, 1), 4.0)])
    scores = script.register(samples[None], centers, radius)  # a quarter of a fair share is 166.7 of 2,000
    assert scores["modes"].tolist() == [2] and scores["points"].tolist() == [2000]


def test_a_figure_is_the_mean_of_the_last_ten_evaluations():
    records = [{"method": "gan", "epoch": e, "iteration": 2 * e, "modes": [float(e), 100.0 * e]} for e in range(1, 21)]
    result = script.summarize(records, "gan", 4.0)
    assert result["modes"]["per_seed"] == [15.5, 1550.0]
    assert result["modes"]["mean"] == pytest.approx(782.75)
    assert result["modes"]["std"] == pytest.approx(np.std([15.5, 1550.0], ddof=1))
    assert result["iterations_per_second"] == 10


# -------------------------------------------------------------------------------------------------------- losses
def per_sample(discriminator, s, x, score):
    """Loop over samples: D of one seed, a plain forward pass, and autograd's gradient of the logit or score."""
    values, gradients = [], []
    for point in x:
        point = point.detach().requires_grad_()
        h = point[None]
        for k in range(len(discriminator) // 2):
            h = h @ discriminator[f"w{k}"][s] + discriminator[f"b{k}"][s]
            h = torch.relu(h) if k < len(discriminator) // 2 - 1 else h
        value = torch.sigmoid(h).sum() if score else h.sum()
        gradients.append(torch.autograd.grad(value, point)[0])
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


def length(g):  # E ||g||
    return sum(math.sqrt(sum(float(c) ** 2 for c in row)) for row in g) / len(g)


def inner(g, v):  # E |g'v|
    return sum(abs(sum(float(a) * float(b) for a, b in zip(r, q))) for r, q in zip(g, v)) / len(g)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_matching_and_penalty_against_loops(dim):
    torch.manual_seed(0)
    discriminator = random_discriminator(dim)
    real, fake, mix = torch.rand(2, 6, dim).double(), torch.rand(2, 6, dim).double(), torch.rand(2, 6, 1).double()
    terms = script.gradient_matching(discriminator, real, fake)
    for s in range(2):
        (dx, gx), (df, gf) = (per_sample(discriminator, s, v[s], True) for v in (real, fake))
        assert float(terms[0][s]) == pytest.approx(abs(float(dx.mean() - df.mean())), rel=1e-6)
        assert float(terms[1][s]) == pytest.approx((length(gx) - length(gf)) ** 2, rel=1e-4)
        assert float(terms[2][s]) == pytest.approx((inner(gx, real[s]) - inner(gf, fake[s])) ** 2, rel=1e-4)
        for penalty in ("l2", "rms", "score"):
            point = mix[s] * real[s] + (1 - mix[s]) * fake[s]
            _, g = per_sample(discriminator, s, point, penalty == "score")
            slope = g.norm(dim=1) / (math.sqrt(dim) if penalty == "rms" else 1)
            ours = script.gradient_penalty(discriminator, real, fake, mix, penalty)[s]
            assert float(ours) == pytest.approx(float(((slope - 1) ** 2).mean()), rel=1e-4)


def test_finite_differences():
    """The penalty's gradient in D's weights and gradient matching's in the generated points, which takes part in the
    score and in the inner product."""
    torch.manual_seed(1)
    discriminator = random_discriminator()
    real, fake, mix = torch.rand(2, 5, 2).double(), torch.rand(2, 5, 2).double(), torch.rand(2, 5, 1).double()

    def penalty(w):
        return script.gradient_penalty({**discriminator, "w1": w}, real, fake, mix).sum()

    def matching(f):
        return sum(t.sum() for t in script.gradient_matching(discriminator, real, f))

    for function, start in ((penalty, discriminator["w1"]), (matching, fake)):
        analytic = torch.func.grad(function)(start)
        assert analytic.abs().max() > 1e-3
        for index in np.ndindex(*start.shape):
            step = torch.zeros_like(start)
            step[index] = 1e-6
            numeric = (function(start + step) - function(start - step)) / 2e-6
            assert float(analytic[index]) == pytest.approx(float(numeric), abs=2e-6, rel=1e-4)


def test_gradients_stay_finite_for_identical_points_and_dead_units():
    discriminator = {k: v.float() for k, v in random_discriminator().items()}
    dead = {**discriminator, "w0": discriminator["w0"] * 0, "b0": discriminator["b0"] * 0 - 1}
    x = torch.full((2, 4, 2), 0.3)
    for d in (discriminator, dead):
        for function in (lambda f: sum(t.sum() for t in script.gradient_matching(d, x, f)),
                         lambda f: script.gradient_penalty(d, x, f, torch.full((2, 4, 1), 0.5)).sum()):
            assert torch.func.grad(function)(x).isfinite().all()
        grads = torch.func.grad(lambda p: script.gradient_penalty(p, x, x, torch.full((2, 4, 1), 0.5)).sum())(d)
        assert all(g.isfinite().all() for g in grads.values())


VARIANTS = [(dim, method, {}) for dim, method in CASES] + [
    (2, "gngan", {"penalty": "rms", "autoencoder_updates": "encoder", "alpha": 0.3, "critic_steps": 2}),
    (2, "gngan", {"penalty": "score", "reconstruction": "sum"}),
    (2, "distgan", {"distgan_reconstruction": "fake", "autoencoder_updates": "encoder", "critic_steps": 2}),
    (2, "gan", {"label_smoothing": 0.1, "critic_steps": 2}), (2, "ali", {"label_smoothing": 0.1, "critic_steps": 3}),
    (2, "vaegan", {"vaegan_gamma": 0.3, "vaegan_kl": 0.2, "critic_steps": 2}),
]


@pytest.mark.parametrize("dim,method,changes", VARIANTS)
def test_three_iterations_against_the_plain_reference(dim, method, changes):
    """Losses, which networks each updates, the order of updates and Adam, all at once: after three iterations every
    weight of every seed is where plain PyTorch, one seed at a time, takes it."""
    args = make_args(method, dim, **{"vae_sigma": 0.5, **changes})
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    state = script.init_state(args, generators, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)  # biases away from 0, so that no ReLU sits on its kink
    state = torch.utils._pytree.tree_map(torch.Tensor.double, state)  # float32 would hide an error below 1e-3
    for params in state["networks"].values():
        for v in params.values():
            v.add_(0.1 * torch.randn(v.shape, generator=g))
    references = [Reference(args, {n: {k: v[s] for k, v in p.items()} for n, p in state["networks"].items()})
                  for s in range(2)]
    train_step = script.make_train_step(args)
    before = {k: v.clone() for k, v in flat(state["networks"]).items()}
    for batch in batches(args, generators, 3):
        batch = {k: v.double() for k, v in batch.items()}
        train_step(state, batch)
        for s, reference in enumerate(references):
            reference.step({k: v[:, s] for k, v in batch.items()})
    for name, params in state["networks"].items():
        for s, reference in enumerate(references):
            linears = [m for m in reference.nets[name] if isinstance(m, torch.nn.Linear)]
            for k, linear in enumerate(linears):
                torch.testing.assert_close(params[f"w{k}"][s], linear.weight.T, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(params[f"b{k}"][s, 0], linear.bias, rtol=1e-3, atol=1e-5)
    assert all((v != before[k]).any() for k, v in flat(state["networks"]).items() if "/w" in k)


# ----------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("method", METHODS_2D)
def test_batched_seeds_are_single_seeds(method):
    def train(seeds):
        args = make_args(method, ema=0.9)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        state = script.init_state(args, generators, torch.device("cpu"))
        step = script.make_train_step(args)
        for batch in batches(args, generators, 10):
            step(state, batch)
        return state["networks"]

    together = flat(train([1, 2, 3]))
    for i, seed in enumerate([1, 2, 3]):
        for key, value in flat(train([seed])).items():
            torch.testing.assert_close(together[key][i], value[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(together["/generator/w0"][0], together["/generator/w0"][1])


def test_compiled_step_gives_the_eager_result():
    args = make_args()
    states = []
    for compiled in (False, True):
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        state = script.init_state(args, generators, torch.device("cpu"))
        step = script.make_train_step(args)
        step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
        for batch in batches(args, generators, 5):
            step(state, batch)
        states.append(flat(state))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-3, atol=1e-4)


def test_learning_rate_falls_every_10000_steps():
    args = make_args(lr_decay_steps="iterations")
    expected = {0: 1e-3, 9999: 1e-3, 10000: 0.99e-3, 195499: 1e-3 * 0.99**19}
    for iteration, value in expected.items():
        assert script.learning_rate(args, iteration, 3) == pytest.approx(value)
    args = make_args()  # counts updates, as the authors' code does
    assert script.learning_rate(args, 3333, 3) == pytest.approx(1e-3)
    assert script.learning_rate(args, 3334, 3) == pytest.approx(0.99e-3)
    assert script.learning_rate(make_args(dim=1), 50000, 3) == 1e-3


def test_alpha():
    constant, falling = make_args(), make_args(alpha_schedule="falling")
    for iteration, share in ((0, 1), (500, 1), (625, 0.5), (750, 0), (1000, 0)):
        assert script.reconstruction_share(constant, iteration, 1000) == 0.05
        assert script.reconstruction_share(falling, iteration, 1000) == pytest.approx(0.05 * share)


@pytest.mark.parametrize("method", METHODS_2D)
def test_every_method_is_one_graph(method):
    """fullgraph raises on anything that would split the compiled step or wait for the device (an .item(), say)."""
    args = make_args(method, ema=0.9)
    generators = [torch.Generator().manual_seed(1)]
    state = script.init_state(args, generators, torch.device("cpu"))
    torch.compiler.reset()
    step = torch.compile(script.make_train_step(args), fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches(args, generators, 3):
            step(state, batch)


def test_moving_average():
    args = make_args(ema=0.75)
    generators = [torch.Generator().manual_seed(1)]
    state = script.init_state(args, generators, torch.device("cpu"))
    expected = state["networks"]["generator"]["w1"].clone()
    step = script.make_train_step(args)
    for batch in batches(args, generators, 3):
        step(state, batch)
        expected = 0.75 * expected + 0.25 * state["networks"]["generator"]["w1"]
    torch.testing.assert_close(state["networks"]["generator_ema"]["w1"], expected)


# ------------------------------------------------------------------------------------------ the script as it is run
COLOURS = {"blue": (31, 119, 180), "red": (214, 39, 40), "orange": (255, 127, 14), "black": (0, 0, 0)}


def check_picture(path, *colours):
    """A sensible size, and enough pixels of the colours in which the data are drawn."""
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    assert 100 <= picture.shape[0] <= 1200 and 150 <= picture.shape[1] <= 2000, picture.shape
    for colour in colours:
        near = np.abs(picture - COLOURS[colour]).max(-1) < 60
        assert near.sum() > 50, f"{path.name}: nothing {colour}"


@pytest.mark.parametrize("dim,method", CASES)
def test_every_method_runs(tmp_path, dim, method):
    given = ["--dim", dim, "--method", method, *TINY, "--run-dir", tmp_path, "--run-name", "r", "--ema", "0.9"]
    out, _ = run(SCRIPT, *given)
    folder = tmp_path / "r"
    setting = json.loads((folder / "args.json").read_text())
    assert setting["args"]["method"] == method and setting["versions"]["torch"] == torch.__version__
    assert setting["resolved"][method]["beta1"] == (0.8 if dim == 2 else 0.5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = 20 if dim == 2 else 3
    assert [(r["method"], r["epoch"], r["iteration"]) for r in lines] == [(method, 1, step), (method, 2, 2 * step)]
    results = json.loads((folder / "results.json").read_text())[method]
    for key in script.METRICS:
        assert all(len(r[key]) == len(r[key + "_ema"]) == 2 for r in lines)
        assert results[key]["per_seed"] == pytest.approx(np.mean([r[key] for r in lines], 0).tolist())
    assert results["seconds"] > 0 and results["iterations_per_second"] > 0
    check_picture(folder / "modes.png", "blue", "orange")  # raw and averaged weights
    if dim == 1:
        check_picture(folder / "density.png", "blue", "orange")
        check_picture(folder / "training.gif", "blue", "orange")
    else:
        check_picture(folder / "samples.png", "blue", "red")
    assert (folder / "gradient_map.png").exists() == (dim == 2 and method not in ("ali", "vae", "betavae"))
    if (folder / "gradient_map.png").exists():
        check_picture(folder / "gradient_map.png", "black", "red")
    if dim == 1:
        assert Image.open(folder / "training.gif").n_frames >= 2
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"metrics/modes", "metrics/points", "charts/iterations_per_second"} <= set(tags)
    assert any(t.startswith("losses/") for t in tags)
    assert [e.step for e in events.Scalars("metrics/modes")] == [1, 2]
    assert out.splitlines()[-1].startswith(f"{folder}: {script.TITLES[method]} ")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"] is None


def test_all_methods_in_one_run(tmp_path):
    out, _ = run(SCRIPT, "--method", "all", *TINY, "--run-dir", tmp_path, "--run-name", "r")
    assert list(json.loads((tmp_path / "r/results.json").read_text())) == METHODS_2D
    for method, figures in script.PAPER.items():
        row = next(line for line in out.splitlines() if line.startswith(script.TITLES[method] + "  "))
        for mean, std in figures:
            assert f"{mean:.2f} ± {std:.2f}" in row
    check_picture(tmp_path / "r/modes.png", "blue", "orange", "red")
    check_picture(tmp_path / "r/samples.png", "blue", "red")
    check_picture(tmp_path / "r/gradient_map.png", "black", "red")
    for method in METHODS_2D:  # a TensorBoard folder each, under the same tags
        events = EventAccumulator(str(tmp_path / "r" / method))
        events.Reload()
        assert len(events.Scalars("metrics/modes")) == 2


LONGER = ["--epochs", "40", "--num-seeds", "2", "--batch-size", "2500", "--hidden-dim", "16", "--ema", "0.9"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run(SCRIPT, *LONGER, "--run-dir", folder, "--run-name", "r")
    return folder / "r"


def wait_for_lines(path, more, process):
    """Wait until `more` lines are there beyond those at the start; the process must be running then."""
    start, count = time.time(), len(path.read_text().splitlines()) if path.exists() else 0
    while not path.exists() or len(path.read_text().splitlines()) < count + more:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < start + 60, "no progress"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resume_is_exact(tmp_path, straight, number):
    """Interrupted (twice) and resumed: the same weights, moments, generators' states and metrics, bit for bit."""
    metrics = tmp_path / "r/metrics.jsonl"
    process = Process(SCRIPT, *LONGER, "--run-dir", tmp_path, "--run-name", "r", "--checkpoint-every", "3")
    for more in (5, 8):  # a killed run starts again from the checkpoint of epoch 3: its file first grows shorter
        wait_for_lines(metrics, more, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
        if number != signal.SIGKILL:
            assert (tmp_path / "r/samples.png").exists() and (tmp_path / "r/results.json").exists()
        process = Process(SCRIPT, "--resume", tmp_path / "r")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    resumed, expected = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "r", straight))
    assert_same(resumed, expected, but=("seconds", "run_dir", "run_name", "checkpoint_every", "resume"))
    assert metrics.read_text() == (straight / "metrics.jsonl").read_text()
    events = EventAccumulator(str(tmp_path / "r"))
    events.Reload()
    assert [e.step for e in events.Scalars("metrics/modes")] == list(range(1, 41))


def test_a_signal_at_the_end_of_an_epoch(tmp_path):
    """With one iteration an epoch every signal comes at an epoch's end, where evaluation is still due."""
    arguments = ["--dim", "1", "--batch-size", "6400", "--epochs", "100", "--num-seeds", "1"]
    run(SCRIPT, *arguments, "--run-dir", tmp_path, "--run-name", "a")
    process = Process(SCRIPT, *arguments, "--run-dir", tmp_path, "--run-name", "b")
    wait_for_lines(tmp_path / "b/metrics.jsonl", 10, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    run(SCRIPT, "--resume", tmp_path / "b")
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "ab")
    assert_same(a, b, but=("seconds", "run_dir", "run_name", "resume"))


def test_a_seed_alone(tmp_path):
    run(SCRIPT, *TINY, "--num-seeds", "3", "--run-dir", tmp_path, "--run-name", "three")
    run(SCRIPT, *TINY, "--num-seeds", "1", "--seed", "3", "--run-dir", tmp_path, "--run-name", "one")
    three, one = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("three", "one"))
    for key, value in flat(one["models"]["gngan"]["networks"]).items():
        torch.testing.assert_close(flat(three["models"]["gngan"]["networks"])[key][2], value[0], rtol=1e-3, atol=1e-4)


def test_resume_in_the_middle_of_all_methods(tmp_path):
    arguments = ["--method", "all", "--dim", "1", "--epochs", "4", "--num-seeds", "2", "--batch-size", "160"]
    run(SCRIPT, *arguments, "--run-dir", tmp_path, "--run-name", "a")
    process = Process(SCRIPT, *arguments, "--run-dir", tmp_path, "--run-name", "b")
    wait_for_lines(tmp_path / "b/metrics.jsonl", 5, process)  # in the second method
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    run(SCRIPT, "--resume", tmp_path / "b" / "checkpoint.pt")
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "ab")
    assert_same(a, b, but=("seconds", "run_dir", "run_name", "resume"))


@pytest.mark.parametrize("arguments,words", [
    (["--dim", "1", "--method", "ali"], ["ali", "1D", "wgangp"]),
    (["--num-seeds", "0"], ["--num-seeds", "0"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--ema", "1"], ["--ema"]),
    (["--run-dir", "/proc/nowhere"], ["/proc/nowhere", "--run-dir"]),
    (["--resume", "nowhere"], ["nowhere", "checkpoint.pt"]),
])
def test_errors_are_one_line(arguments, words):
    _, err = run(SCRIPT, *arguments, status=2)
    assert err.startswith("gngan_synthetic.py: error: ") and len(err.splitlines()) == 1
    assert all(w in err for w in words)


def test_resume_errors(tmp_path, straight):
    _, err = run(SCRIPT, "--resume", straight, "--num-seeds", "5", "--lr", "0.1", status=2)
    assert "--num-seeds (2 in the checkpoint, 5 here)" in err and "--lr" in err and len(err.splitlines()) == 1
    (tmp_path / "checkpoint.pt").write_bytes((straight / "checkpoint.pt").read_bytes()[:2000])
    assert "cannot read the checkpoint" in run(SCRIPT, "--resume", tmp_path, status=2)[1]
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert "cannot read the checkpoint" in run(SCRIPT, "--resume", tmp_path, status=2)[1]
    torch.save({"script": "another"}, tmp_path / "checkpoint.pt")
    assert "not a checkpoint of gngan_synthetic.py" in run(SCRIPT, "--resume", tmp_path, status=2)[1]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"script": "gngan_synthetic", "x": Evil()}, tmp_path / "checkpoint.pt")
    _, err = run(SCRIPT, "--resume", tmp_path, status=2)
    assert "cannot read the checkpoint" in err and not (tmp_path / "executed").exists()


def test_an_existing_run_is_not_overwritten(straight):
    before = (straight / "metrics.jsonl").read_text()
    _, err = run(SCRIPT, *TINY, "--run-dir", straight.parent, "--run-name", "r", status=2)
    assert "exists" in err and "--run-name" in err
    assert (straight / "metrics.jsonl").read_text() == before


def test_diverged_run_stops(tmp_path):
    _, err = run(SCRIPT, *TINY, "--lr", "1e30", "--run-dir", tmp_path, status=2)
    assert "not finite at iteration" in err and "no checkpoint" in err and err.splitlines()[-1].startswith("gngan_syn")
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_a_diverged_state_does_not_replace_the_checkpoint(tmp_path):
    args = make_args(run_dir=str(tmp_path), run_name="r", num_seeds=1)
    state = script.init_state(args, [torch.Generator().manual_seed(1)], torch.device("cpu"))
    folder = script.Run(args, None, None)
    folder.save({"state": state, "epoch": 1})
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    state["networks"]["generator"]["w1"][0, 0, 0] = math.nan
    with pytest.raises(script.UserError, match="last good checkpoint is"):
        folder.save({"state": state, "epoch": 2})
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    process = Process(SCRIPT, *LONGER, "--run-dir", tmp_path, "--run-name", "r", "--checkpoint-every", "1")
    wait_for_lines(tmp_path / "r/metrics.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    assert len(before) > 20000
    # no file may grow beyond 20 kB: TensorBoard's and the metrics fit, the checkpoint does not
    _, err = run(SCRIPT, "--resume", tmp_path / "r", status=2, file_limit=20000)
    last = err.splitlines()[-1]
    assert last.startswith("gngan_synthetic.py: error: cannot write") and "checkpoint.pt" in last
    assert "Traceback" not in err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("r/*.tmp"))
