"""The image scripts on a CUDA GPU: graphs against eager steps, resuming, precision, no waiting for the device. What a
CPU can tell of it is tested everywhere: the same tests with a plain call in the graph's place, each step on tensors
without data, mini-batches on tensors that claim to be on a GPU."""
import contextlib
import functools
import gc
import math
import os
import types
import weakref

import launcher
import make_data
import pytest
import scripts
import torch
from compare import assert_same
from make_runs import UNLIKE
from scripts import each, each_case
from steps import CPU, TINY, build, noise
from torch._subclasses.fake_tensor import FakeTensorMode

from common import training

HAS_CUDA = torch.cuda.is_available()
on_a_gpu = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA GPU")
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
BASELINE = {"baseline": "minibatch"}  # Improved GAN: historical averaging, virtual batch norm, three steps of G
EVERY = {model: [{}] for model in scripts.IMAGES[:3]} | {"mmgan_igan": [{}, BASELINE]}
AVERAGED = {"ema": 0.9, "precision": "bf16"}


class PlainGraph:
    """Stands in for a CUDA graph on a CPU. A capture notes the step, its images and its losses, see `recordable`; a
    replay runs the step, and leaves its losses where those of the capture are."""
    capturing = None

    def register_generator_state(self, rng):
        pass

    def replay(self):
        for name, value in self.step(self.images).items():
            self.losses[name].copy_(value)


@contextlib.contextmanager
def plain_capture(graph):
    PlainGraph.capturing = graph
    try:
        yield
    finally:
        PlainGraph.capturing = None


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A GPU, or what stands in for its graphs; the switches that a test sets are set back."""
    if not HAS_CUDA:
        monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", PlainGraph)
        monkeypatch.setattr(torch.cuda, "graph", plain_capture)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def recordable(step):
    """The step as GraphedStep takes it. On a GPU a capture runs nothing; on a CPU it must not either."""
    if HAS_CUDA:
        return step

    def call(images):
        graph = PlainGraph.capturing
        if graph is None:
            call.losses = step(images)
            return call.losses
        graph.step, graph.images = step, images
        graph.losses = {name: value.clone() for name, value in call.losses.items()}
        return graph.losses

    return call


class Training:
    """A script's training on noise. graph=False leaves the graph out, and nothing else: Adam stays capturable."""

    def __init__(self, script, graph=True, **kwargs):
        self.args = script.resolve(script.Args(**{**TINY, "precision": "fp32", **kwargs}))
        training.choose_device(DEVICE.type, self.args.precision != "fp32", self.args.deterministic)
        self.networks, self.optimizers, self.rng, self.step = build(script, self.args, DEVICE)
        self.lr = torch.tensor(self.args.lr, device=DEVICE)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = self.lr
        if graph:
            self.step = training.GraphedStep(recordable(self.step), self.rng)

    def iterate(self, images=0, draws=0):
        """The losses of an iteration as numbers. Equal arguments: equal images, equal draws."""
        self.rng.manual_seed(training.draw_seed(1, draws))
        losses = self.step(noise(self.args, images).to(DEVICE))
        return {name: value.item() for name, value in losses.items()}


def course(script, iterations, tenfold_from=None, **kwargs):
    """Each loss after each iteration, {name: [iterations]}. tenfold_from: where the learning rate grows tenfold."""
    run = Training(script, **kwargs)
    rows = []
    for iteration in range(iterations):
        if iteration == tenfold_from:
            run.lr.mul_(10)
        rows.append(run.iterate(iteration, iteration))
    return {name: [row[name] for row in rows] for name in rows[0]}


def assert_close(course, other):
    for name, values in course.items():
        assert other[name] == pytest.approx(values, rel=1e-3, abs=1e-3), name


@scripts.alike()
def test_three_calls_are_eager_and_later_ones_replay(script):
    """From the fourth call on, which captures, the step's Python code is not run again. Every call counts once."""
    total = torch.zeros(3, device=DEVICE)
    expected = torch.zeros(3, device=DEVICE)
    rng = torch.Generator(DEVICE)
    calls = []

    def step(images):
        total.add_(images.sum() + torch.rand(3, generator=rng, device=DEVICE))
        return {"total": total.clone()}

    recorded = recordable(step)

    def counted(images):
        calls.append(images)
        return recorded(images)

    graphed = training.GraphedStep(counted, rng)
    for number in range(1, 9):
        images = torch.full((2, 2), number, dtype=torch.uint8, device=DEVICE)
        rng.manual_seed(number)
        expected += 4 * number + torch.rand(3, generator=rng, device=DEVICE)
        rng.manual_seed(number)
        losses = graphed(images)
        assert torch.equal(losses["total"], expected)
        assert torch.equal(total, expected)
        assert len(calls) == min(number, 4)


@each_case({model: [*cases, AVERAGED] for model, cases in EVERY.items()})
def test_a_graph_is_the_eager_step(script, case):
    """In every loss, for 20 iterations (on a CPU 6); half way the learning rate grows tenfold."""
    iterations = 20 if HAS_CUDA else 6
    eager, graphed = (course(script, iterations, tenfold_from=iterations // 2, graph=graph, deterministic=True, **case)
                      for graph in (False, True))
    assert_close(eager, graphed)


@on_a_gpu
@each_case(EVERY)
def test_a_compiled_graph_is_the_eager_step(script, case):
    """Compiled, sums are taken in another order, and training a GAN magnifies it: in ResNet within 20 iterations."""
    torch.compiler.reset()  # a process compiles one function eight times at most; all objectives count as one
    eager = course(script, 5, graph=False, deterministic=True, **case)
    compiled = course(script, 5, compile=True, deterministic=True, **case)
    assert_close(eager, compiled)


@each()
def test_a_replay_takes_new_images_and_new_draws(script):
    """Without a learning rate weights stay, and scores tell what was read and drawn."""
    run = Training(script, lr=1e-30)
    for _ in range(4):  # until it is captured
        first = run.iterate()
    other_images, other_draws, again = run.iterate(images=1), run.iterate(draws=1), run.iterate()
    assert other_images["score_real"] != first["score_real"]
    assert other_draws["score_fake"] != first["score_fake"]
    for name in ("score_real", "score_fake"):
        assert again[name] == first[name]


@each()
def test_a_graph_keeps_what_it_reads_and_writes(script):
    """Networks and optimisers live as long as the step, whatever its maker drops."""
    run = Training(script)
    for _ in range(4):  # until it is captured
        run.iterate()
    kept = [weakref.ref(v) for v in (run.networks, *run.optimizers.values())]
    run.networks = run.optimizers = None
    gc.collect()
    assert all(ref() is not None for ref in kept)
    assert all(map(math.isfinite, run.iterate().values()))


@on_a_gpu
@each_case(EVERY)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_iteration_does_not_wait_for_the_device(script, case, graph):
    run = Training(script, graph=graph, cuda_graph=graph, **case)
    pictures = torch.cat([noise(run.args, seed) for seed in range(8)]).to(DEVICE)

    def iterate(iteration):
        run.rng.manual_seed(training.draw_seed(1, iteration))
        return run.step(script.get_batch(pictures, run.args, iteration, DEVICE))

    for iteration in range(4):  # the order of the data is copied to the device, the graph captured
        iterate(iteration)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(4, 8):
            iterate(iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case(EVERY)
@pytest.mark.parametrize("precision", ["tf32", "bf16"] if HAS_CUDA else ["bf16"])
def test_lower_precision_is_close(script, case, precision):
    exact = course(script, 3, graph=False, **case)
    lower = course(script, 3, graph=False, precision=precision, **case)
    for name, values in lower.items():
        assert all(map(math.isfinite, values))
        assert values[0] == pytest.approx(exact[name][0], rel=0.2, abs=0.05), name


@on_a_gpu
@each_case({model: [[]] for model in scripts.IMAGES[:3]} | {"mmgan_igan": [[], ["--baseline", "minibatch"]]})
def test_resuming_under_a_graph_is_exact(script, case, tmp_path):
    """With --deterministic, bit for bit; the resumed run has a warm-up where the other replays."""
    data = make_data.image_zip(tmp_path / "photos.zip", 40)
    constant = ["--lr-schedule", "constant"] if hasattr(script.Args, "lr_schedule") else []
    given = ["--dataset", "folder", "--data-dir", data, "--width", "0.03125", "--batch-size", "8", "--latent-dim", "8",
             "--eval-every", "0", "--device", "cuda", "--precision", "fp32", "--deterministic", "--ema", "0.9",
             "--run-dir", tmp_path, *constant, *case]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    run = functools.partial(launcher.run, environment={"CUDA_VISIBLE_DEVICES": gpus})
    run(script, *given, "--run-name", "straight", "--iterations", 20)
    run(script, *given, "--run-name", "resumed", "--iterations", 9)
    run(script, "--resume", tmp_path / "resumed", "--iterations", 20)
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("straight", "resumed"))
    assert_same(a, b, but=UNLIKE)


# ------------------------------------------------------------------------------------ what needs no GPU, nor numbers
class NoGenerator:
    """A generator of draws where tensors have no data."""
    device = torch.device("meta")


@each_case({"gngan_cnn": [{}, {"distgan": True}, {"hinge": True}, {"autoencoder": False}], "gngan_resnet": [{}],
            "mmgan_dcgan": [{}, {"kernel": "none"}, {"kernel": "poly", "kernel_width": 3.0}, {"baseline": True},
                            {"manifold_in_discriminator": True, "correlation_in_discriminator": True}],
            "mmgan_igan": [{}, BASELINE, {"baseline": "feature-matching"}]})
def test_a_step_never_looks_at_a_number(script, case, monkeypatch):
    """On tensors without data: what would wait for the device (.item(), bool(), a copy from or to the host) raises."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: contextlib.nullcontext())
    for name in ("rand", "randn"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, generator=None, draw=draw, **named: draw(*shape, **named))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p, generator=None: self)
    args = script.resolve(script.Args(**{**TINY, "ema": 0.9, **case}))
    networks = script.init_networks(args, CPU).to("meta")
    optimizers = {name: torch.optim.SGD(o.param_groups[0]["params"], lr=0.1)
                  for name, o in script.init_optimizers(args, networks).items()}
    losses = script.make_train_step(args, networks, optimizers, NoGenerator())(noise(args).to("meta"))
    assert losses and all(v.device.type == "meta" and v.shape == () for v in losses.values())


@each()
def test_mini_batches_reach_the_gpu(script, monkeypatch):
    """Gathered on the GPU or, where the data set is too large for it, in pinned memory of the host."""
    args = script.resolve(script.Args(batch_size=4))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.device.type) or self)
    script.data_order.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for place in ("cpu", "cuda:0"):
                images = torch.empty(10, 3, 8, 8, dtype=torch.uint8, device=place)
                for iteration in range(3):
                    batch = script.get_batch(images, args, iteration, torch.device("cuda"))
                    assert batch.device == torch.device("cuda", 0) and batch.shape == (4, 3, 8, 8)
    finally:
        script.data_order.cache_clear()
    assert pinned == ["cpu"] * 3
