"""The scripts to test: the repository's own, or with pytest's --script the forks given there in their models' place.
A test asks for a script's model, never for its name."""
import importlib

import pytest
from conftest import SCRIPTS

forks: dict[str, list[str]] = {}  # model -> the forks to test as that model
IMAGES = SCRIPTS["gngan"] + SCRIPTS["mmgan"]


def of(*models):
    """The modules to test for these models, each an imported script."""
    return [importlib.import_module(name) for model in models for name in (forks.get(model, []) if forks else [model])]


def model(script):
    """The model of a module from `of`."""
    return next((model for model, names in forks.items() if script.SCRIPT in names), script.SCRIPT)


def is_gngan(script):
    return model(script) in SCRIPTS["gngan"]


def each(*models, scope="function"):
    """Run a test for every module of these models: its argument `script`. Default: of all image scripts."""
    return pytest.mark.parametrize("script", of(*models or IMAGES), ids=lambda module: module.SCRIPT, scope=scope)


def alike():
    """Run a test of code that all image scripts have alike for one of them, and for every fork."""
    return each(*(IMAGES if forks else ["gngan_cnn"]), scope="module")


def each_case(cases):
    """Run a test for every module and each of its model's cases, {model: [case]}: `script` and `case`."""
    pairs = [(script, case) for model, values in cases.items() for script in of(model) for case in values]
    names = [f"{script.SCRIPT}-{describe(case)}" for script, case in pairs]
    return pytest.mark.parametrize("script,case", pairs, ids=names)


def describe(case):
    """A setting in a test's name: {"hinge": True} as hinge=True, ["--hinge"] as --hinge."""
    if isinstance(case, dict):
        return ",".join(f"{name}={value}" for name, value in case.items()) or "default"
    return " ".join(map(str, case)) or "default"
