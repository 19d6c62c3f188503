"""The image scripts on a CUDA GPU: graphs against eager steps, resuming, precision, no waiting for the device. What a
CPU can tell of it is tested everywhere: the same tests with a plain call in the graph's place, each step on tensors
without data, mini-batches on tensors that claim to be on a GPU."""
import contextlib
import dataclasses
import gc
import math
import types
import weakref

import make_data
import pytest
import scripts
import torch
from compare import assert_same
from launcher import run
from make_runs import UNLIKE
from scripts import each, each_case
from steps import CPU, TINY, noise, parts, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import common

HAS_CUDA = torch.cuda.is_available()
on_a_gpu = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA GPU")
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
BASELINE = {"baseline": "minibatch"}  # Improved GAN: historical averaging, virtual batch norm, three steps of G
EVERY = {model: [{}] for model in scripts.IMAGES[:3]} | {"mmgan_igan": [{}, BASELINE]}


class PlainGraph:
    """Stands in for a CUDA graph on a CPU: a replay runs the step on the tensors that it was captured with, and leaves
    the losses where the capture left its own. `captured` gives it all three."""

    def register_generator_state(self, rng):
        pass

    def replay(self):
        for kept, new in zip(self.losses.values(), self.step(self.images).values()):
            kept.copy_(new)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A GPU, or what stands in for its graphs; the switches that a test sets are set back."""
    if not HAS_CUDA:
        monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", PlainGraph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def captured(script, step, networks, optimizers, rng, images):
    """The script's GraphedStep. On a CPU its capture has trained once; that is undone here."""
    if HAS_CUDA:
        return script.GraphedStep(step, networks, optimizers, rng, images)
    states = []

    def call(given):
        call.count += 1
        if call.count == 4:  # the capture, after the warm-up
            states.append(([(v, v.clone()) for v in tensors(networks, optimizers)], rng.get_state()))
        return step(given)

    call.count = 0
    graphed = script.GraphedStep(call, networks, optimizers, rng, images)
    (before, state), = states
    with torch.no_grad():
        for v, value in before:
            v.copy_(value)
    rng.set_state(state)
    graphed.graph.step, graphed.graph.images, graphed.graph.losses = step, graphed.images, graphed.losses
    return graphed


def tensors(networks, optimizers):
    moments = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
    return [*networks.state_dict(keep_vars=True).values(), *moments]


def prepare(script, **kwargs):
    """Arguments, networks, optimisers, draws, and the step (captured unless told not to)."""
    args = script.resolve(script.Args(**{**TINY, **kwargs}))
    common.choose_device(DEVICE.type, args.precision != "fp32", args.deterministic)
    networks, optimizers, rng, step = parts(script, args, DEVICE)
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = torch.tensor(args.lr, device=DEVICE)
    if args.cuda_graph:
        step = captured(script, step, networks, optimizers, rng, noise(args).to(DEVICE))
    return args, networks, optimizers, rng, step


def course(script, iterations=20, **kwargs):
    """Each loss after each iteration, {name: [iterations]}."""
    args, _, _, rng, step = prepare(script, **kwargs)
    rows = []
    for seed in range(iterations):
        rng.manual_seed(script.draw_seed(1, seed))
        losses = step(noise(args, seed).to(DEVICE))
        rows.append({name: value.item() for name, value in losses.items()})
    return {name: [row[name] for row in rows] for name in rows[0]}


@each_case(EVERY | {model: [*EVERY[model], {"ema": 0.9}] for model in ("gngan_cnn", "mmgan_igan")})
def test_a_graph_is_the_eager_step(script, case):
    alike = {k: v for k, v in case.items() if k == "baseline"}
    iterations = 20 if HAS_CUDA else 5
    eager = course(script, iterations, cuda_graph=False, deterministic=True, **alike)
    graphed = course(script, iterations, deterministic=True, **case)
    for name, values in eager.items():
        assert graphed[name] == pytest.approx(values, rel=1e-3, abs=1e-3), name


@on_a_gpu
@each_case(EVERY)
def test_a_compiled_graph_is_the_eager_step(script, case):
    """Compiled, sums are taken in another order, and training a GAN magnifies it: in ResNet within 20 iterations."""
    eager = course(script, 5, cuda_graph=False, deterministic=True, **case)
    compiled = course(script, 5, compile=True, deterministic=True, **case)
    for name, values in eager.items():
        assert compiled[name] == pytest.approx(values, rel=1e-3, abs=1e-3), name


@each_case(EVERY)
def test_the_warm_up_is_undone(script, case):
    """Capturing leaves weights and averages as they were, and no moment in the optimisers."""
    _, networks, optimizers, _, _ = prepare(script, ema=0.9, **case)
    _, fresh, _, _, _ = prepare(script, ema=0.9, cuda_graph=False, **case)
    assert_same(weights(networks), weights(fresh))
    moments = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
    assert moments and not any(v.any() for v in moments)


@each()
def test_the_warm_up_of_a_resumed_run_is_undone(script):
    """Moments of before are kept."""
    args, networks, optimizers, rng, step = prepare(script, cuda_graph=False)
    step(noise(args).to(DEVICE))
    before = [v.clone() for v in tensors(networks, optimizers)]
    captured(script, step, networks, optimizers, rng, noise(args).to(DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(networks, optimizers)))


@each()
def test_images_are_copied_into_the_graph(script):
    args, _, _, rng, step = prepare(script, lr=1e-30)
    values = []
    for seed in (0, 1, 0):
        rng.manual_seed(1)
        values.append(step(noise(args, seed).to(DEVICE))["score_real"].item())
    assert values[0] == values[2] != values[1]


@each()
def test_draws_differ_from_replay_to_replay(script):
    """The same images and, without a learning rate, the same weights: what differs is what is drawn."""
    args, _, _, rng, step = prepare(script, lr=1e-30)
    values = []
    for iteration in (0, 1, 2, 0):
        rng.manual_seed(script.draw_seed(1, iteration))
        values.append(step(noise(args).to(DEVICE))["score_fake"].item())
    assert len(set(values)) == 3 and values[0] == values[3]


@each()
def test_a_changed_learning_rate_reaches_the_graph(script):
    args, networks, optimizers, _, step = prepare(script)
    lengths = []
    for lr in (1e-4, 0.0, 1e-2):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
        before = [p.detach().clone() for p in networks["generator"].parameters()]
        step(noise(args).to(DEVICE))
        lengths.append(max((p - b).abs().max().item() for p, b in zip(networks["generator"].parameters(), before)))
    assert lengths[1] == 0 < lengths[0] < lengths[2] / 10


@each()
def test_a_graph_keeps_what_it_reads_and_writes(script):
    """Networks, optimisers and draws live as long as the step, whatever its maker drops."""
    args, networks, optimizers, rng, step = prepare(script, cuda_graph=False)
    graphed = script.GraphedStep(step, networks, optimizers, rng, noise(args).to(DEVICE))
    kept = [weakref.ref(v) for v in (step, networks, *optimizers.values(), rng)]
    del networks, optimizers, rng, step
    gc.collect()
    assert graphed and all(ref() is not None for ref in kept)


@on_a_gpu
@each_case(EVERY)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_iteration_does_not_wait_for_the_device(script, case, graph):
    args, _, _, rng, step = prepare(script, cuda_graph=graph, **case)
    pictures = torch.cat([noise(args, seed) for seed in range(4)]).to(DEVICE)

    def iterate(iteration):
        rng.manual_seed(script.draw_seed(1, iteration))
        return step(script.get_batch(pictures, args, iteration, DEVICE))

    iterate(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(1, 4):
            iterate(iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case(EVERY)
@pytest.mark.parametrize("precision", ["tf32", "bf16"] if HAS_CUDA else ["bf16"])
def test_lower_precision_is_close(script, case, precision):
    exact = course(script, 3, precision="fp32", **case)
    lower = course(script, 3, precision=precision, **case)
    for name, values in lower.items():
        assert all(map(math.isfinite, values))
        assert values[0] == pytest.approx(exact[name][0], rel=0.2, abs=0.05), name


@on_a_gpu
@each_case({model: [[]] for model in scripts.IMAGES[:3]} | {"mmgan_igan": [[], ["--baseline", "minibatch"]]})
def test_resuming_under_a_graph_is_exact(script, case, tmp_path):
    """With --deterministic, bit for bit."""
    data = make_data.image_zip(tmp_path / "photos.zip", 40)
    constant = ["--lr-schedule", "constant"] if hasattr(script.Args, "lr_schedule") else []
    given = ["--dataset", "folder", "--data-dir", data, "--width", "0.03125", "--batch-size", "8", "--latent-dim", "8",
             "--eval-every", "0", "--device", "cuda", "--deterministic", "--ema", "0.9", "--run-dir", tmp_path,
             *constant, *case]
    run(script, *given, "--run-name", "straight", "--iterations", 20)
    run(script, *given, "--run-name", "resumed", "--iterations", 9)
    run(script, "--resume", tmp_path / "resumed", "--iterations", 20)
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("straight", "resumed"))
    assert_same(a, b, but=UNLIKE)


# ------------------------------------------------------------------------------------ what needs no GPU, nor numbers
class NoGenerator:
    """A generator of draws where tensors have no data."""
    device = torch.device("meta")

    def manual_seed(self, seed):
        return self


@each_case({"gngan_cnn": [{}, {"distgan": True}, {"hinge": True}, {"autoencoder": False}], "gngan_resnet": [{}],
            "mmgan_dcgan": [{}, {"kernel": "none"}, {"baseline": True}, {"manifold_scale": "undamped"}],
            "mmgan_igan": [{}, BASELINE, {"baseline": "feature-matching"}]})
def test_a_step_never_looks_at_a_number(script, case, monkeypatch):
    """On tensors without data: what would wait for the device (.item(), bool(), a copy from or to the host) raises."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: contextlib.nullcontext())
    rand, randn = torch.rand, torch.randn
    for name, draw in (("rand", rand), ("randn", randn)):
        monkeypatch.setattr(torch, name, lambda *shape, generator=None, draw=draw, **named: draw(*shape, **named))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p, generator=None: self)
    args = script.resolve(script.Args(**{**TINY, "ema": 0.9, **case}))
    networks = script.init_networks(args, CPU).to("meta")
    optimizers = {name: torch.optim.SGD(o.param_groups[0]["params"], lr=0.1)
                  for name, o in script.init_optimizers(dataclasses.replace(args, cuda_graph=False), networks).items()}
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
