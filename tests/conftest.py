"""The one list of scripts; --script, by which a fork is tested as its model is; what runs first."""
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # networks this small only lose by waiting for each other

SCRIPTS = {"gngan": ["gngan_cnn", "gngan_resnet"], "mmgan": ["mmgan_dcgan", "mmgan_igan"],
           "synthetic": ["gngan_synthetic"]}


def pytest_addoption(parser):
    parser.addoption("--script", action="append", default=[], metavar="FORK=MODEL", help=(
        "test FORK.py as MODEL.py is tested, e.g. my_gan=gngan_cnn (may be repeated); then only the tests of forks "
        "run, neither those of the other scripts nor those of no script"))


def pytest_configure(config):
    import scripts
    models = [name for names in SCRIPTS.values() for name in names]
    for option in config.getoption("--script"):
        fork, _, model = option.partition("=")
        fork, model = fork.removesuffix(".py"), model.removesuffix(".py")
        if model not in models:
            raise pytest.UsageError(f"--script {option}: write FORK=MODEL, MODEL one of {', '.join(models)}")
        scripts.forks.setdefault(model, []).append(fork)


def pytest_collection_modifyitems(config, items):
    """test_scripts.py runs first. With --script, only what is run for a fork is left."""
    items.sort(key=lambda item: item.path.name != "test_scripts.py")
    if config.getoption("--script"):
        given = [(i, getattr(getattr(i, "callspec", None), "params", {}).get("script")) for i in items]
        of_a_fork = [i for i, script in given if hasattr(script, "SCRIPT")]  # pytest fills an empty list with its own
        left_out = [i for i in items if i not in of_a_fork]
        items[:] = of_a_fork
        config.hook.pytest_deselected(items=left_out)
