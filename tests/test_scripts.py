"""Each script run for a few steps, on each of its data sets and in the settings that run other lines. It runs first,
in under a minute."""
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import make_data
import pytest
import scripts
import torch
from launcher import Process, run
from make_runs import arguments, checkpoint, events, photos
from PIL import Image

GNGAN = [["--hinge"], ["--no-hinge", "--dataset", "cifar10"], ["--dataset", "stl10"], ["--distgan"],
         ["--no-gradient-matching"], ["--no-autoencoder"],
         ["--no-autoencoder", "--no-gradient-matching", "--no-neighbor-embedding"],
         ["--penalty", "rms", "--precision", "bf16"],
         ["--autoencoder-updates", "encoder", "--penalty", "score", "--ema", "0.9"]]
MMGAN = [["--kernel", "none"], ["--kernel", "linear", "--correlation-in-discriminator"],
         ["--kernel", "poly", "--ema", "0.9"], ["--kernel", "exp", "--precision", "bf16"],
         ["--kernel-width", "50", "--beta", "0"], ["--dataset", "cifar10"]]
SETTINGS = {
    "gngan_cnn": GNGAN, "gngan_resnet": GNGAN,
    "mmgan_dcgan": MMGAN + [["--dataset", "mnist"], ["--dataset", "celeba"], ["--baseline", "--image-size", "45"],
                            ["--manifold-scale", "width", "--no-manifold-in-discriminator"],
                            ["--baseline", "--generator-steps", "2"]],
    "mmgan_igan": MMGAN + [["--baseline", "minibatch"], ["--minibatch-discrimination", "--image-size", "48"],
                           ["--manifold-scale", "one", "--manifold-in-discriminator"],
                           ["--baseline", "minibatch", "--label-smoothing", "0", "--historical-averaging", "0"],
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
    assert f"{folder}: 2 iterations, no scores, since --eval-every is 0; to see: " in out.splitlines()[-1]
    given = dict(zip(case, case[1:]))
    side = int(given.get("--image-size", SIDES.get(given.get("--dataset"), 32)))
    assert json.loads((folder / "args.json").read_text())["args"]["image_size"] == side
    width = 8 * (side + 2) + 2
    assert Image.open(folder / "samples/00000002.png").size == (math.ceil(600 / width) * width,) * 2
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
    """--help has every flag, and each sentence that stands under its field."""
    narrow, _ = run(script, "--help", environment={"COLUMNS": "60"})
    assert max(len(line) for line in narrow.splitlines() if not line.startswith("    python ")) <= 60
    manual, _ = run(script, "--help", environment={"COLUMNS": "200"})
    assert "None}" not in manual and "None)" not in manual
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", manual).split())
    body = re.search(r"^class Args:\n(.*?)\n\n\n", pathlib.Path(script.__file__).read_text(), re.M | re.S)[1]
    documented = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', body, re.M | re.S)
    assert [name for name, _ in documented] == [field.name for field in dataclasses.fields(script.Args)]
    for name, sentences in documented:
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(sentences.split()) in text, name


@scripts.each()
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has another OpenMP")
def test_threads_that_wait_leave_their_core(script):
    """Else one other busy process takes most of the speed: OpenMP reads this when PyTorch is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    ended = subprocess.run([sys.executable, script.__file__, "--help"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "OMP_WAIT_POLICY = 'PASSIVE'" in ended.stderr


@scripts.each(*scripts.IMAGES, "gngan_synthetic")
def test_a_new_flag_is_one_line(script, tmp_path, capsys):
    """In a copy of the script, a field in Args, with or without a docstring: it is read, saved, and replaced at
    --resume like any other; a run that was begun without it goes on."""
    source = pathlib.Path(script.__file__).read_text()
    first = re.search(r"^class Args:\n", source, re.M)
    (tmp_path / "before.py").write_text(source)
    module = load(tmp_path / "before.py", "fork_before")
    saved = dict(vars(module.parse_args([])[0]))
    fork = source[: first.end()] + "    new_weight: float = 0.5\n" + source[first.end() :]
    (tmp_path / "after.py").write_text(fork)
    module = load(tmp_path / "after.py", "fork_after")
    assert module.parse_args(["--new-weight", "2"])[0].new_weight == 2
    contents = {"script": module.SCRIPT, "iteration": 0, "seconds": 0.0, "networks": {}, "optimizers": {},
                "method": "gngan", "finished": {}, "losses": {}, "frames": []}
    torch.save({**contents, "args": saved}, tmp_path / "old.pt")
    torch.save({**contents, "args": {**saved, "new_weight": 3.0}}, tmp_path / "new.pt")
    assert module.parse_args(["--resume", str(tmp_path / "old.pt")])[0].new_weight == 0.5
    assert "--new-weight 0.5 (saved: not there)" in capsys.readouterr().err
    assert module.parse_args(["--resume", str(tmp_path / "new.pt")])[0].new_weight == 3
    assert module.parse_args(["--resume", str(tmp_path / "new.pt"), "--new-weight", "1"])[0].new_weight == 1


def load(path, name):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
