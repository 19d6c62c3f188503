"""On a CUDA GPU: graphs against eager steps, resuming, precision, no waiting for the device. Skipped without one."""
import importlib
import math

import make_data
import pytest
import torch
from compare import assert_same
from launcher import run
from steps import TINY, noise, parts, weights

SCRIPTS = ["gngan_cnn", "gngan_resnet", "mmgan_dcgan", "mmgan_igan"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
every_script = pytest.mark.parametrize("script", SCRIPTS)
CUDA = torch.device("cuda")


def prepare(script, **kwargs):
    """Arguments, networks, optimisers, draws, the step (captured unless told not to) and what it takes."""
    module = importlib.import_module(script)
    args = module.resolve(module.Args(**{**TINY, "device": "cuda", **kwargs}))
    module.choose_device(args)
    networks, optimizers, rng, step, given = parts(module, args, CUDA)
    if args.cuda_graph:
        step = module.GraphedStep(step, networks, optimizers, rng, *given)
    return args, networks, optimizers, rng, step, given


@pytest.fixture(autouse=True)
def switches():
    """choose_device sets some for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def course(script, iterations=20, **kwargs):
    """Each loss after each iteration, {name: [iterations]}."""
    args, _, _, _, step, (_, *fixed) = prepare(script, **kwargs)
    rows = []
    for seed in range(iterations):
        losses = step(noise(args, seed).to(CUDA), *fixed)
        rows.append({name: value.item() for name, value in losses.items()})
    return {name: [row[name] for row in rows] for name in rows[0]}


BASELINE = {"baseline": "minibatch"}  # Improved GAN: historical averaging, virtual batch norm, three steps of G


@pytest.mark.parametrize("script,setting", [*((s, x) for s in SCRIPTS for x in ({}, {"ema": 0.9}, {"compile": True})),
                                            ("mmgan_igan", BASELINE)])
def test_a_graph_is_the_eager_step(script, setting):
    alike = {k: v for k, v in setting.items() if k == "baseline"}
    eager = course(script, cuda_graph=False, deterministic=True, **alike)
    graphed = course(script, deterministic=True, **setting)
    for name, values in eager.items():
        assert graphed[name] == pytest.approx(values, rel=1e-3, abs=1e-3), name


@every_script
def test_the_warm_up_is_undone(script):
    """Capturing leaves weights, averages and draws as they were, and no moment in the optimisers."""
    _, networks, optimizers, rng, _, given = prepare(script)
    _, fresh, _, untouched, _, _ = prepare(script, cuda_graph=False)
    assert_same(weights(networks), weights(fresh))
    assert torch.equal(rng.get_state(), untouched.get_state()) and given[-1]
    moments = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
    assert moments and not any(v.any() for v in moments)


@every_script
def test_draws_differ_from_replay_to_replay(script):
    """The same images and, without a learning rate, the same weights: what differs is what is drawn."""
    _, _, _, _, step, given = prepare(script, lr=1e-30)
    values = [step(*given)["discriminator"].item() for _ in range(4)]
    assert len(set(values)) == 4


@every_script
def test_a_changed_learning_rate_reaches_the_graph(script):
    _, networks, optimizers, _, step, given = prepare(script)
    lengths = []
    for lr in (1e-4, 0.0, 1e-2):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
        before = [p.detach().clone() for p in networks["generator"].parameters()]
        step(*given)
        lengths.append(max((p - b).abs().max().item() for p, b in zip(networks["generator"].parameters(), before)))
    assert lengths[1] == 0 < lengths[0] < lengths[2] / 10


@pytest.mark.parametrize("script,setting", [*((s, {}) for s in SCRIPTS), ("mmgan_igan", BASELINE)])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_iteration_does_not_wait_for_the_device(script, setting, graph):
    module = importlib.import_module(script)
    args, _, _, _, step, given = prepare(script, cuda_graph=graph, **setting)
    pictures = torch.cat([noise(args, seed) for seed in range(4)])
    batches = module.Batches(pictures, args.batch_size, 1, CUDA)
    step(batches.next(), *given[1:])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(batches.next(), *given[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_script
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_is_close(script, precision):
    exact = course(script, 3, precision="fp32")
    lower = course(script, 3, precision=precision)
    for name, values in lower.items():
        assert all(map(math.isfinite, values))
        assert values[0] == pytest.approx(exact[name][0], rel=0.2, abs=0.05), name


@pytest.mark.parametrize("script,more", [*((s, []) for s in SCRIPTS), ("mmgan_igan", ["--baseline", "minibatch"])])
def test_resuming_under_a_graph_is_exact(script, more, tmp_path):
    """With --deterministic, bit for bit."""
    data = make_data.image_zip(tmp_path / "photos.zip", 40)
    given = ["--dataset", "folder", "--data-dir", data, "--width", "0.03125", "--batch-size", "8", "--latent-dim", "8",
             "--eval-every", "0", "--device", "cuda", "--deterministic", "--lr-schedule", "constant", "--ema", "0.9",
             "--run-dir", tmp_path, *more]
    run(f"{script}.py", *given, "--run-name", "straight", "--iterations", 20)
    run(f"{script}.py", *given, "--run-name", "resumed", "--iterations", 9)
    run(f"{script}.py", "--resume", tmp_path / "resumed", "--iterations", 20)
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("straight", "resumed"))
    assert_same(a, b, but=("seconds", "images_per_second", "run_name", "iterations"))
