"""Checkpoints compared bit for bit."""
import torch


def flat(tree, prefix=""):
    """Every tensor and number in a nested checkpoint, by path."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def assert_same(a, b, but=()):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        if not key.endswith(but):
            assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key
