"""Each script run for a few steps, on each of its data sets and in the settings that run other lines. It runs first,
in under a minute."""
import json
import math
import re
import typing

import common
import make_data
import pytest
import scripts
from launcher import Process, run
from make_runs import arguments, checkpoint, events, photos
from PIL import Image

GNGAN = [["--hinge"], ["--no-hinge", "--dataset", "cifar10"], ["--dataset", "stl10"], ["--distgan"],
         ["--no-gradient-matching"], ["--no-autoencoder"],
         ["--no-autoencoder", "--no-gradient-matching", "--no-neighbor-embedding"],
         ["--autoencoder-updates", "separate", "--precision", "bf16"],
         ["--autoencoder-updates", "encoder", "--penalty", "score", "--ema", "0.9"]]
MMGAN = [["--kernel", "none"], ["--kernel", "linear", "--correlation-in-discriminator"],
         ["--kernel", "poly", "--kernel-width", "real", "--ema", "0.9"], ["--kernel", "exp", "--precision", "bf16"],
         ["--manifold-scale", "undamped", "--kernel-width", "50", "--beta", "0"], ["--dataset", "cifar10"]]
SETTINGS = {
    "gngan_cnn": GNGAN, "gngan_resnet": GNGAN,
    "mmgan_dcgan": MMGAN + [["--dataset", "mnist"], ["--dataset", "celeba"], ["--baseline", "--image-size", "45"],
                            ["--manifold-scale", "width", "--no-manifold-in-discriminator"],
                            ["--baseline", "--generator-steps", "2"]],
    "mmgan_igan": MMGAN + [["--baseline", "minibatch"], ["--minibatch-discrimination", "--image-size", "48"],
                           ["--manifold-scale", "one", "--manifold-in-discriminator"], ["--features", "pooled"],
                           ["--baseline", "minibatch", "--label-smoothing", "0", "--generator-steps", "2"],
                           ["--baseline", "feature-matching", "--ema", "0.9"]]}
SIDES = {"stl10": 48, "mnist": 28, "celeba": 64}


@pytest.fixture(scope="module")
def begin(request, tmp_path_factory):
    """A function from a case to its process and its folder. It begins the next two cases as well: each has one thread,
    and the tests that wait for them have nothing else to do."""
    cases = [(i.callspec.params["script"], i.callspec.params["case"]) for i in request.session.items
             if i.originalname == "test_a_few_steps"]
    data, begun = tmp_path_factory.mktemp("data"), []
    archive = photos(data)
    for make in (make_data.cifar10, make_data.stl10, make_data.mnist, make_data.celeba):
        make(data)

    def take(script, setting):
        position = cases.index((script, setting))
        for module, more in cases[len(begun) : position + 3]:
            folder = tmp_path_factory.mktemp("case")
            named = ["--data-dir", data] if "--dataset" in more else []
            begun.append((Process(module, *arguments(archive, folder, "r", "--iterations", 2, "--log-every", 1,
                                                     "--sample-every", 2, *named, *more)), folder / "r"))
        return begun[position]

    return take


@scripts.each_case(SETTINGS)
def test_a_few_steps(script, case, begin):
    process, folder = begin(script, case)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == f"{folder}: 2 iterations, no scores, --eval-every 0"
    given = dict(zip(case, case[1:]))
    side = int(given.get("--image-size", SIDES.get(given.get("--dataset"), 32)))
    assert json.loads((folder / "args.json").read_text())["args"]["image_size"] == side
    assert Image.open(folder / "samples/00000002.png").size == (8 * (side + 2) + 2,) * 2
    losses = events(folder)
    for tag in losses.Tags()["scalars"]:
        assert all(math.isfinite(e.value) for e in losses.Scalars(tag)), tag
    assert [e.step for e in losses.Scalars("losses/generator")] == [1, 2]
    assert all(v.isfinite().all() for v in checkpoint(folder)["networks"].values())


@scripts.each("gngan_synthetic")
def test_synthetic(script, tmp_path):
    out, _ = run(script, "--epochs", 1, "--num-seeds", 2, "--hidden-dim", 8, "--batch-size", 1600,
                   "--no-compile", "--run-dir", tmp_path, "--run-name", "r")
    assert str(tmp_path / "r") in out
    figures = json.loads((tmp_path / "r/results.json").read_text())["gngan"]["modes"]["per_seed"]
    assert len(figures) == 2 and all(math.isfinite(v) for v in figures)


@scripts.each(*scripts.IMAGES, "gngan_synthetic")
def test_the_manual(script):
    """--help: groups of flags, every flag with its sentences whole."""
    manual, _ = run(script, "--help", environment={"COLUMNS": "120"})
    groups = [c.__name__.removesuffix("Args").lower() for c in script.Args.__bases__]
    assert re.findall(r"╭─ (\w+) options", manual) == ["options", *groups][1:] and len(groups) == 6
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", manual).split())
    for base in script.Args.__bases__:
        body = re.findall(r"^class %s:\n(.*?)\n\n\n" % base.__name__, open(script.__file__).read(), re.M | re.S)[0]
        fields = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', body, re.M | re.S)
        assert len(fields) == len(re.findall(r"^    \w+: ", body, re.M))  # each has its text
        for name, sentence in fields:
            assert " ".join(sentence.split()) in text, name
        for hint in typing.get_type_hints(common.with_help(base, script.Args()), include_extras=True).values():
            assert all("\n" not in (extra.help or "") for extra in hint.__metadata__)  # tyro would break it there
