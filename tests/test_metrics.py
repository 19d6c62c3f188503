"""common.metrics: every score against torch-fidelity's own, several processes. common.figure: the figure of runs."""
import collections
import json
import multiprocessing
import os
import pathlib
import pwd
import subprocess
import sys
import time

import make_data
import numpy as np
import pytest
import torch
import torch_fidelity
from launcher import torchrun_environment
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from common import UserError, cache_folder, figure, metrics, training

FORK = multiprocessing.get_context("fork")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_frechet_distance_is_torch_fidelitys():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 64)) @ rng.normal(size=(64, 64)) + rng.normal(size=64) for n in (300, 200))
    ours = metrics.frechet_distance(*metrics.moments(torch.tensor(a)), *metrics.moments(torch.tensor(b)))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.tensor(x)) for x in (a, b)), False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    mean, covariance = torch.tensor([1.0, -2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
    assert metrics.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    # |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances
    assert metrics.frechet_distance(mean, covariance, mean * 0, torch.eye(2).double()) == pytest.approx(5 + 1 + 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_data.inception_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


def images(count, seed=0):
    return torch.from_numpy(make_data.pictures(count, seed=seed)).permute(0, 3, 1, 2).contiguous()


def in_turn(source):
    """A sample function that hands out `source` from its beginning on."""
    position = 0

    def sample(n):
        nonlocal position
        position += n
        return source[position - n : position]

    return sample


SCORES = {"fid": "frechet_inception_distance", "kid_mean": "kernel_inception_distance_mean",
          "kid_std": "kernel_inception_distance_std", "is_mean": "inception_score_mean",
          "is_std": "inception_score_std", "precision": "precision", "recall": "recall"}


def test_scores_are_torch_fidelitys(weights, monkeypatch, capfd):
    real, fake = images(16), images(12, seed=5)
    theirs = torch_fidelity.calculate_metrics(
        input1=make_data.Images(fake), input2=make_data.Images(real), isc=True, kid=True, prc=True,
        kid_subset_size=6, feature_extractor="inception-v3-compat", feature_layer_prc="2048", cuda=False,
        verbose=False, batch_size=8, cache=False, save_cpu_ram=True, feature_extractor_weights_path=str(weights))
    seen, extract = [], metrics.Evaluator.features

    def features(self, batch):
        outputs = extract(self, batch)
        seen.append(outputs[0].double())
        return outputs

    monkeypatch.setattr(metrics.Evaluator, "features", features)
    evaluator = metrics.Evaluator(real, 10_000, str(weights), "cpu")  # all 16, since there are no more
    assert "FID of 16 real images is biased" in capfd.readouterr().err
    ours = evaluator.score(in_turn(fake), 12, batch_size=5)
    seen = torch.cat(seen)
    basis = torch.linalg.qr(seen.T).Q  # [2048, 28]: in its coordinates the same distance, found sooner
    theirs |= fid_statistics_to_metric(*(fid_features_to_statistics(x @ basis) for x in seen.split([16, 12])), False)
    numbers = {"num_real": 16, "num_fake": 12, "num_is": 12, "kid_subset_size": 6}
    assert list(ours) == [*SCORES, *numbers] and all(type(ours[key]) is float for key in SCORES)
    assert {key: ours[key] for key in numbers} == numbers
    for key, name in SCORES.items():
        assert ours[key] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), key
    out, err = capfd.readouterr()
    assert not out and "Kernel" not in err and "Precision" not in err
    monkeypatch.setattr(metrics.Evaluator, "features", None)  # a second start reads the real features from the disk
    monkeypatch.setattr(metrics, "matrix_root", lambda covariance: None)  # seconds
    again = metrics.Evaluator(real, 16, str(weights), "cpu")
    assert torch.equal(again.covariance, evaluator.covariance)


@pytest.fixture
def quick(monkeypatch):
    """An Evaluator whose features are 2048 fixed sums of the pixels, its logits half of them, its FID without roots."""
    projection = torch.randn(3 * 32 * 32, 2048, generator=torch.Generator().manual_seed(0)) / 10000

    def features(self, batch):
        rows = batch.flatten(1).float() @ projection
        return rows, rows[:, :1008]

    monkeypatch.setattr(metrics, "matrix_root", lambda covariance: None)
    monkeypatch.setattr(metrics, "frechet_distance", lambda mean1, cov1, mean2, cov2, root1: (
        (mean1 - mean2).square().sum() + (cov1 - cov2).trace()).item())
    monkeypatch.setattr(metrics, "load_inception", lambda path: torch.nn.Identity())
    monkeypatch.setattr(metrics.Evaluator, "features", features)
    return lambda real, num_real=10_000: metrics.Evaluator(real, num_real, os.devnull, "cpu")


def test_four_images_are_enough(quick):
    scores = quick(images(4)).score(in_turn(images(5, seed=1)), 5)
    assert np.isfinite(list(scores.values())).all()
    with pytest.raises(UserError, match="four real images or more"):
        quick(images(3))


@pytest.mark.parametrize("real,fake,size", [(4, 10, 2), (30, 30, 15), (31, 60, 15)])
def test_the_subsets_of_kid_differ(quick, real, fake, size):
    """They are of at most half of the images; else all were one and the deviation rounding."""
    scores = quick(images(real)).score(in_turn(images(fake, seed=1)), fake)
    assert scores["kid_std"] > 1e-4 * abs(scores["kid_mean"]) and scores["kid_subset_size"] == size


def test_the_subsets_of_kid_of_many_images(quick, monkeypatch):
    sizes, real, fake, size = [], 2500, 2200, 1000
    monkeypatch.setattr(metrics, "kid_features_to_metric", lambda *features, kid_subset_size, verbose: (
        sizes.append(kid_subset_size), collections.defaultdict(float))[1])
    monkeypatch.setattr(metrics, "prc_features_to_metric", lambda *features, **_: collections.defaultdict(float))
    scores = quick(images(real)).score(in_turn(images(fake, seed=1)), fake)
    assert [scores["kid_subset_size"]] == sizes == [size]


def test_eigenvalues_that_are_not_found(monkeypatch):
    """A GPU's routine gives up: the CPU's is tried. That too: one line."""
    covariance, eigh, tried = torch.eye(3).double(), torch.linalg.eigh, []

    def fail_once(matrix):
        tried.append(matrix.device)
        if len(tried) == 1:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return eigh(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail_once)
        assert torch.equal(metrics.matrix_root(covariance).abs(), covariance) and len(tried) == 2
    mean = torch.zeros(3).double()
    for mean2, cov2, root1 in ((mean, covariance * torch.nan, covariance), (mean, covariance, None)):
        cov1 = covariance if root1 is not None else covariance * torch.nan
        with pytest.raises(UserError, match="no FID: .*--eval-every 0") as error:
            metrics.frechet_distance(mean, cov1, mean2, cov2, root1)
        assert "\n" not in str(error.value)


def test_scores_of_different_numbers(quick):
    """The Inception Score of more images than the others, and of fewer."""
    evaluator, fake = quick(images(30)), images(40, seed=1)
    assert [evaluator.score(in_turn(fake), 20, 40)[key] for key in ("num_real", "num_fake", "num_is")] == [30, 20, 40]
    few, many = evaluator.score(in_turn(fake), 20), evaluator.score(in_turn(fake), 40)
    mixed = evaluator.score(in_turn(fake), 20, num_is=40, batch_size=7)
    other = evaluator.score(in_turn(fake), 40, num_is=20, batch_size=7)
    for key in SCORES:
        assert mixed[key] == pytest.approx((many if key.startswith("is") else few)[key], rel=1e-5)
        assert other[key] == pytest.approx((few if key.startswith("is") else many)[key], rel=1e-5)


def test_a_stop_while_scoring(quick):
    sampled, answers = [], iter([False, False, True])
    scores = quick(images(30)).score(lambda n: sampled.append(n) or images(n), 50, stop=lambda: next(answers),
                                     batch_size=7)
    assert scores is None
    assert sampled == [7, 7]


def test_features_that_were_cut_are_made_anew(quick, tmp_path):
    before = quick(images(10)).real_features
    cached, = tmp_path.glob("cache/gan-reference/inception-10-*.f32")
    whole = cached.read_bytes()
    for spoilt in (whole[:-4], whole[:-4] + b"\xff\xff\xff\xff"):  # the second: a nan
        cached.write_bytes(spoilt)
        assert torch.equal(quick(images(10)).real_features, before) and cached.read_bytes() == whole


def score_as_process(rank, evaluate, fake, environment, results):
    os.environ.update(environment)
    training.join("gloo")
    asked = []
    scores = evaluate().score(in_turn(fake[rank]), 31, num_is=25, stop=lambda: asked.append(1), batch_size=10)
    results.put((rank, scores, len(asked)))
    torch.distributed.barrier()


def test_two_processes_score_as_one(quick, tmp_path):
    """Each samples its half, one image more together than are asked for; both have the scores of all."""
    real, fake, results = images(30), images(32, seed=1), FORK.Queue()
    _store, environments = torchrun_environment(2)
    processes = [FORK.Process(target=score_as_process, args=(
        rank, lambda: quick(real), (fake[:16], fake[16:]), environments[rank], results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    received = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    joined = torch.cat([fake[:16], fake[16:31]])
    expected = quick(real).score(in_turn(joined), 31)
    expected |= {k: v for k, v in quick(real).score(in_turn(torch.cat([fake[:13], fake[16:28]])), 25).items()
                 if k.startswith("is") or k == "num_is"}
    for _, scores, asked in received:
        assert scores == pytest.approx(expected, rel=1e-5) and asked == 2
    assert received[0][1] == received[1][1]


def test_grey_images_are_scored_as_rgb(weights):
    evaluator = metrics.Evaluator.__new__(metrics.Evaluator)
    evaluator.device, evaluator.inception = torch.device("cpu"), metrics.load_inception(weights)
    grey = torch.from_numpy(make_data.pictures(2, 28, channels=1)).permute(0, 3, 1, 2)
    assert torch.equal(evaluator.features(grey)[0], evaluator.features(grey.repeat(1, 3, 1, 1))[0])


def test_weights_that_cannot_be_used(tmp_path, monkeypatch):
    """Each reason says something, and the advice is right for training and for --evaluate."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for name, words in (("missing.pth", "No such file"), ("other.pth", r"Missing key\(s\) in state_dict.*Conv2d")):
        with pytest.raises(UserError, match=f"{name} is not torch-fidelity's Inception weights: .*{words}") as error:
            metrics.Evaluator(images(4), 4, str(tmp_path / name), "cpu")
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    monkeypatch.setattr(metrics, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")
    for hub, why in (tmp_path / "hub", "no connection"), (pathlib.Path("/dev/null/hub"), "Not a directory"):
        monkeypatch.setattr(torch.hub, "get_dir", lambda hub=hub: str(hub))
        with pytest.raises(UserError, match=f"cannot download the Inception weights.*{why}.*--inception-weights FILE "
                                            r"\(training alone can go without scores: --eval-every 0\)"):
            metrics.Evaluator(images(4), 4, None, "cpu")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "hub/checkpoints/weights.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"still being copied")
    with pytest.raises(UserError, match="is not torch-fidelity's Inception weights.*if it was downloaded, remove it"):
        metrics.Evaluator(images(4), 4, None, "cpu")
    assert file.read_bytes() == b"still being copied"


def test_weights_are_downloaded_once_and_whole(tmp_path, monkeypatch, weights):
    """By jobs that start at once; a download that is cut without an error leaves no file."""
    downloads = FORK.Value("i", 0)

    def fetch(url, path, size=None):
        downloads.value += 1
        time.sleep(0.3)
        pathlib.Path(path).write_bytes(weights.read_bytes()[:size])

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: fetch(url, path, 1000))
    with pytest.raises(UserError, match="cannot download the Inception weights .*cut off, 1,000 bytes came"):
        metrics.download_weights()
    assert not list(tmp_path.rglob("*.pth*[!k]"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    downloads.value = 0
    processes = [FORK.Process(target=metrics.download_weights) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert downloads.value == 1 and [process.exitcode for process in processes] == [0, 0, 0]
    assert metrics.download_weights().read_bytes() == weights.read_bytes()


def test_no_home_folder(tmp_path, monkeypatch):
    """As in a container whose user has no entry in the list of users: one line, and no folder named ~."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for find in (metrics.download_weights, cache_folder):
        with pytest.raises(UserError, match="~/.cache.*no such home folder is known"):
            find()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the figure of a score
def make_run(folder, scores):
    folder.mkdir(parents=True)
    lines = [json.dumps({"iteration": i, "fid": score, "kid_mean": score / 100}) + "\n" for i, score in scores.items()]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_figure_as_a_program(tmp_path):
    """With a notebook's backend in the environment, whose module is missing; 150 dpi."""
    run = make_run(tmp_path / "a", {100: 50.0, 200: 40.0})
    done = subprocess.run(
        [sys.executable, "-m", "common.figure", run, f"b={run}", "--out", tmp_path / "x.png"], cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "module://missing_inline"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (900, 600) and round(picture.info["dpi"][0]) == 150


def test_grids_in_motion(tmp_path):
    """At most sixty of a run's grids in the order of their iterations, the first and the last among them."""
    (tmp_path / "a/samples").mkdir(parents=True)
    for iteration in range(100):
        Image.new("RGB", (600, 600), (2 * iteration, 0, 0)).save(tmp_path / f"a/samples/{iteration:08d}.png")
    figure.draw([str(tmp_path / "a")], tmp_path / "x.gif")
    video = Image.open(tmp_path / "x.gif")
    reds = []
    for frame in range(video.n_frames):
        video.seek(frame)
        reds.append(video.convert("RGB").getpixel((300, 300))[0])
    assert video.size == (600, 624) and len(reds) == 60 and sorted(reds) == reds
    assert reds[0] <= 4 and abs(reds[-1] - 198) <= 4


def test_what_the_figure_shows(tmp_path, monkeypatch):
    """Runs of one name as their mean and range over the iterations that all have; a name from the folder's."""
    import matplotlib.axes
    shown = {"lines": [], "bands": []}
    plot, fill = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.fill_between
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, x, y, **k: [
        shown["lines"].append((k["label"], list(x), list(y))), plot(self, x, y, **k)][1])
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", lambda self, x, low, high, **k: [
        shown["bands"].append((list(low), list(high))), fill(self, x, low, high, **k)][1])
    one = make_run(tmp_path / "one", {100: 50.0, 200: 40.0, 300: 30.0})
    two = make_run(tmp_path / "lr=2", {100: 70.0, 200: 20.0})
    figure.draw([f"GAN={one}", f"GAN={two}", str(two)], tmp_path / "x.pdf", "fid")
    assert shown["lines"] == [("GAN (mean and range of 2 runs)", [100, 200], [60, 30]), ("lr=2", [100, 200], [70, 20])]
    assert shown["bands"][0] == ([50, 20], [70, 40]) and (tmp_path / "x.pdf").stat().st_size > 1000
    figure.draw([str(one)], tmp_path / "x.png", "kid_mean")
    assert shown["lines"][-1] == ("one", [100, 200, 300], [0.5, 0.4, 0.3])


@pytest.mark.parametrize("runs,out,key,words", [
    (["a"], "x.png", "recall", "has no 'recall'; it has iteration, fid, kid_mean"),
    (["a"], "x.jpeg.", "fid", "ends in .png, .pdf or .svg"), (["nowhere"], "x.png", "fid", "nowhere has no scores"),
    ([], "x.png", "fid", "give the folders"), (["a"], "nowhere/x.png", "fid", "cannot write nowhere/x.png"),
    (["cut"], "x.png", "fid", "cut has no scores"), (["damaged"], "x.png", "fid", "damaged in line 1"),
    (["~nosuchuser/a"], "x.png", "fid", "no such home"), (["a"], "~nosuchuser/x.png", "fid", "no such home"),
    (["G=a", "G=b"], "x.png", "fid", "the runs of G have no scored iteration in common"),
    (["a"], "x.gif", "fid", "a has no grids"), (["a", "b"], "x.gif", "fid", "of one run in .gif"),
    (["synthetic"], "x.png", "modes", "modes of each seed"),
    (["cut"], "x.gif", "fid", "cannot read cut/samples/00000007.png.*remove it")])
def test_figures_that_cannot_be_drawn(tmp_path, monkeypatch, runs, out, key, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", {100: 50.0})
    make_run(tmp_path / "b", {200: 50.0})
    (make_run(tmp_path / "cut", {}) / "metrics.jsonl").write_text('{"iteration": 1, "fi')
    (tmp_path / "cut/samples").mkdir()
    (tmp_path / "cut/samples/00000007.png").write_bytes(b"no picture")
    (make_run(tmp_path / "synthetic", {}) / "metrics.jsonl").write_text('{"iteration": 1, "modes": [9.0, 8.0]}\n')
    (make_run(tmp_path / "damaged", {}) / "metrics.jsonl").write_text('{"iteration": 1, "fi\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=words) as error:
        figure.draw(runs, pathlib.Path(out), key)
    assert "\n" not in str(error.value)


def test_scores_of_other_numbers_in_one_figure(tmp_path, capsys):
    run = make_run(tmp_path / "a", {100: 50.0})
    lines = [{"iteration": i, "fid": 50.0, "num_real": 10_000, "num_fake": fake} for i, fake in ((1, 5000), (2, 1000))]
    figure.draw([str(run)], tmp_path / "x.png", "fid")
    assert not capsys.readouterr().err
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure.draw([str(run)], tmp_path / "x.png", "fid")
    assert "do not compare: num_real 10000, num_fake 1000; num_real 10000, num_fake 5000\n" in capsys.readouterr().err
    lines = [{"iteration": i, "is_mean": 5.0, "num_is": 5000, "num_fake": fake} for i, fake in ((1, 5000), (2, 1000))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure.draw([str(run)], tmp_path / "x.png", "is_mean")
    assert not capsys.readouterr().err
