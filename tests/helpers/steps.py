"""A small training step of an image script, to be called directly."""
import torch
from scripts import model

TINY = {"width": 1 / 32, "latent_dim": 8, "batch_size": 6}
CPU = torch.device("cpu")


def setup(script, **kwargs):
    """Arguments, networks and `step(images)`, one iteration; without images on a fixed mini-batch of noise."""
    args = script.resolve(script.Args(**{**TINY, **kwargs}))
    networks, _, _, step = build(script, args, CPU)
    return args, networks, lambda images=None: step(noise(args) if images is None else images)


def build(script, args, device):
    """Networks, optimisers, the generator of draws, train_step."""
    networks = script.init_networks(args, device)
    optimizers = script.init_optimizers(args, networks)
    rng = torch.Generator(device).manual_seed(args.seed)
    return networks, optimizers, rng, script.make_train_step(args, networks, optimizers, rng)


def noise(args, seed=9):
    """A mini-batch, uint8 [B, C, size, size]."""
    shape = (args.batch_size, 1 if args.dataset == "mnist" else 3, args.image_size, args.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def weights(networks):
    return {k: v.clone() for k, v in networks.state_dict().items()}


def vector(state):
    """All weights and buffers of a state_dict as one vector."""
    return torch.cat([v.flatten() for v in state.values() if v.is_floating_point()])


def plain_descent(script):
    """Optimisers whose steps show the gradients' size; Adam's first ones have the size of lr whatever it is."""
    adam = script.init_optimizers
    lr = 1e-3 if model(script) in ("gngan_resnet", "mmgan_igan") else 0.1  # these have a steep D

    def init_optimizers(args, networks):
        return {name: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=lr)
                for name, optimizer in adam(args, networks).items()}

    return init_optimizers


def descend(loss, *optimizers):
    """A step of each optimiser by autograd's plain gradients."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
        p.grad = torch.zeros_like(p)  # in p's layout: fused Adam pairs elements by their place in memory
        if g is not None:
            p.grad.copy_(g)
    for optimizer in optimizers:
        optimizer.step()


def assert_same_course(start, ours, theirs, lr):
    """Two networks' changes from the same start agree, network for network."""
    wrong = []
    for network in dict.fromkeys(k.split(".")[0] for k in ours):
        keys = [k for k in ours if k.startswith(network + ".") and ours[k].is_floating_point()]
        change, expected = (torch.cat([(w[k] - start[k]).flatten() for k in keys]) for w in (ours, theirs))
        if change.norm() <= 1e-3 * lr or (expected - change).norm() >= 0.02 * change.norm():
            wrong.append(network)
    assert not wrong, (f"{', '.join(wrong)} moved otherwise than by the paper's losses (in a fork expected of a "
                       "changed loss; with a new term's weight at 0 this test must pass)")
    for k in ours:  # G's running statistics take in one batch an iteration
        assert not k.endswith(".running_weight") or ours[k] == theirs[k] > 0


def shapes(module, *inputs):
    """The output shape of every layer with weights, without the batch, in the order of use."""
    seen = []
    layers = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:]))) for m in module.modules()
             if isinstance(m, layers)]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def count(module):
    return sum(p.numel() for p in module.parameters())


def conv(a, b, k, bias=True):
    """Parameters of a convolution."""
    return a * b * k * k + (b if bias else 0)
