"""common: every data set's format, downloads that fail, caches; FID and IS against torch-fidelity's own."""
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading
import time
import zipfile

import make_data
import numpy as np
import pytest
import torch
import torch_fidelity
import torchvision
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from common import UserError, datasets, metrics, write_atomically


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------ formats
def test_cifar10(tmp_path):
    images = make_data.cifar10(tmp_path)
    loaded = datasets.load("cifar10", tmp_path, 32)
    assert loaded.dtype == torch.uint8 and np.array_equal(loaded.numpy(), images)
    assert np.array_equal(datasets.load("cifar10", tmp_path, 32).numpy(), images)  # from the cache


def test_stl10(tmp_path):
    images = make_data.stl10(tmp_path)
    assert np.array_equal(datasets.load("stl10", tmp_path, 96).numpy(), images.transpose(0, 3, 1, 2))
    half = datasets.load("stl10", tmp_path, 48)
    expected = np.asarray(Image.fromarray(images[7]).resize((48, 48), Image.Resampling.BILINEAR))
    assert half.shape == (20, 3, 48, 48) and np.array_equal(half[7].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, packed):
    images = make_data.mnist(tmp_path)
    raw = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    if packed:
        raw.with_name(raw.name + ".gz").write_bytes(gzip.compress(raw.read_bytes()))
        raw.unlink()
    loaded = datasets.load("mnist", tmp_path, 28)
    assert loaded.shape == (20, 1, 28, 28) and np.array_equal(loaded[:, 0].numpy(), images)


@pytest.mark.parametrize("packed", [False, True])
def test_celeba(tmp_path, packed):
    images = make_data.celeba(tmp_path)
    if packed:
        shutil.make_archive(str(tmp_path / "img_align_celeba"), "zip", tmp_path, "img_align_celeba")
        shutil.rmtree(tmp_path / "img_align_celeba")
    loaded = datasets.load("celeba", tmp_path, 64)
    crop = Image.fromarray(images[3]).crop((35, 55, 143, 163))  # the central 108x108 of 178x218
    expected = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR))
    difference = np.abs(loaded[3].permute(1, 2, 0).numpy().astype(int) - expected)
    assert loaded.shape == (20, 3, 64, 64) and difference[1:-1, 1:-1].max() <= 1  # the border may see beyond the crop
    whole = datasets.load("celeba", tmp_path, 108)
    assert np.array_equal(whole[3].permute(1, 2, 0).numpy(), np.asarray(crop))


def test_a_folder_of_many_kinds(tmp_path):
    """Recursive, in the order of names; grey, palette and transparent images; other files and hidden ones ignored."""
    folder = tmp_path / "photos"
    picture = make_data.pictures(1, 40)[0]
    make_data.image_folder(folder / "b", 3, 32)
    Image.fromarray(picture[..., 0]).save(folder / "a_grey.png")
    Image.fromarray(picture).convert("P").save(folder / "a_palette.gif")
    Image.fromarray(np.dstack([picture, picture[..., :1]])).save(folder / "a_rgba.png")
    Image.fromarray(picture[:, :36]).save(folder / "a_wide.BMP")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails/x.png").write_text("no image")
    loaded = datasets.load("folder", folder, 32)
    assert loaded.shape == (7, 3, 32, 32)
    assert np.array_equal(loaded[4:].permute(0, 2, 3, 1).numpy(), make_data.pictures(3, 32))
    assert np.array_equal(loaded[0, 0].numpy(), loaded[0, 1].numpy())  # grey
    wide = Image.fromarray(picture[2:38, :36]).resize((32, 32), Image.Resampling.BILINEAR)
    difference = np.abs(loaded[3].permute(1, 2, 0).numpy().astype(int) - np.asarray(wide))
    assert difference[1:-1, 1:-1].max() <= 1


def test_a_camera_held_sideways(tmp_path):
    picture = make_data.pictures(1, 32)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees to the right to see it upright
    Image.fromarray(np.rot90(picture)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(datasets.load("folder", tmp_path, 32)[0].permute(1, 2, 0).numpy(), picture)


def test_a_zip_is_its_folder(tmp_path):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    unpacked = datasets.load("folder", tmp_path / "photos_files", 16)
    assert torch.equal(datasets.load("folder", archive, 16), unpacked)
    assert np.array_equal(datasets.load("folder", archive, 32).permute(0, 2, 3, 1).numpy(), make_data.pictures(5))


# -------------------------------------------------------------------------------------------------------- caches
def test_decoded_once(tmp_path, monkeypatch):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    first = datasets.load("folder", archive, 32).clone()  # not over the file that is cut below
    cached = list(tmp_path.glob(".photos-32px-*.npy"))
    assert len(cached) == 1
    decode = datasets.ImageFiles.decode
    monkeypatch.setattr(datasets.ImageFiles, "decode", None)
    assert torch.equal(datasets.load("folder", archive, 32), first)
    monkeypatch.setattr(datasets.ImageFiles, "decode", decode)
    cached[0].write_bytes(cached[0].read_bytes()[:1000])  # a cache that was cut is decoded anew
    assert torch.equal(datasets.load("folder", archive, 32), first)
    make_data.image_zip(archive, 6, seed=1)  # changed data too
    assert len(datasets.load("folder", archive, 32)) == 6


def test_training_cannot_change_the_cache(tmp_path):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    loaded = datasets.load("folder", archive, 32)
    before = loaded.clone()
    loaded.zero_()
    assert torch.equal(datasets.load("folder", archive, 32), before)


def test_data_in_a_read_only_place(tmp_path, monkeypatch):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))  # root may write anywhere
    datasets.load("folder", archive, 32)
    assert not list(tmp_path.glob(".photos*.npy")) and list((tmp_path / "cache/gan-reference").glob("*.npy"))


def test_a_second_start_of_50000_images_is_quick(tmp_path, monkeypatch):
    one = io.BytesIO()
    Image.fromarray(make_data.pictures(1, 8)[0]).save(one, "png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i in range(50000):
            archive.writestr(f"{i:05d}.png", one.getvalue())
    assert datasets.load("folder", tmp_path / "photos.zip", 8).shape == (50000, 3, 8, 8)
    monkeypatch.setattr(datasets.ImageFiles, "decode", None)
    start = time.process_time()
    images = datasets.load("folder", tmp_path / "photos.zip", 8)
    images[torch.randint(50000, (64,))]
    assert time.process_time() - start < 2


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    datasets.load("folder", archive, 32)
    cached, = tmp_path.glob(".photos-*.npy")
    cached.unlink()
    dead, alive = (tmp_path / f"{cached.name}.{number}.tmp" for number in (2**22 + 1, os.getppid()))
    dead.touch()
    alive.touch()
    datasets.load("folder", archive, 32)
    assert not dead.exists() and alive.exists()


# -------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name,size,words", [
    ("folder", 32, ["no such folder", "nowhere"]), ("cifar10", 48, ["--image-size 48", "32x32"]),
    ("imagenet", 32, ["unknown data set imagenet", "cifar10"])])
def test_wrong_requests(tmp_path, name, size, words):
    with pytest.raises(UserError) as error:
        datasets.load(name, tmp_path / "nowhere", size)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        datasets.load("folder", tmp_path, 32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("contents", ["cut", "text"])
def test_a_corrupt_image_is_named(tmp_path, packed, contents):
    folder = make_data.image_folder(tmp_path / "photos", 4)
    data = (folder / "0002.png").read_bytes()
    (folder / "0002.png").write_bytes(data[: len(data) // 2] if contents == "cut" else b"this is no image")
    source = folder
    if packed:
        source = tmp_path / "photos.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    with pytest.raises(UserError, match="cannot read the image .*0002.png") as error:
        datasets.load("folder", source, 32)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob(".photos*.npy"))


def test_a_zip_that_is_none(tmp_path):
    (tmp_path / "x.zip").write_text("no archive")
    with pytest.raises(UserError, match="cannot read .*x.zip"):
        datasets.load("folder", tmp_path / "x.zip", 32)


@pytest.mark.parametrize("name,make,file", [
    ("cifar10", make_data.cifar10, "cifar-10-batches-py/data_batch_2"),
    ("stl10", make_data.stl10, "stl10_binary/unlabeled_X.bin"),
    ("mnist", make_data.mnist, "MNIST/raw/train-images-idx3-ubyte")])
def test_a_cut_file_is_refused_and_named(tmp_path, name, make, file):
    make(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file} is damaged or cut off.*remove .*downloads it anew"):
        datasets.load(name, tmp_path, {"cifar10": 32, "stl10": 48, "mnist": 28}[name])


def test_a_damaged_packed_file_is_refused(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(10000))[:-5] + b"12345")
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is damaged"):
        datasets.load("mnist", tmp_path, 28)


def test_a_full_disk_beside_the_data(tmp_path, monkeypatch):
    """No room beside the data: the cache folder is used; none there either: one line."""
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)

    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="cannot write .*gan-reference.*No space left.*XDG_CACHE_HOME"):
        datasets.load("folder", archive, 32)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cifar_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    make_data.cifar10(tmp_path)
    contents = {b"data": Evil(), b"labels": []}
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match="data_batch_1"):
        datasets.load("cifar10", tmp_path, 32)
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------- downloads
@pytest.fixture
def server():
    """A local HTTP server: server.files maps a path to its bytes; server.cut, how many of them it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = self.server.files.get(self.path)
            if data is None:
                return self.send_error(404)
            self.server.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.server.cut])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cut, server.requests = {}, None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def serve(server, monkeypatch, tmp_path, name):
    """Put a made-up data set behind torchvision's address of it; (its images, the downloaded file's name)."""
    origin = tmp_path / "origin"
    images = {"cifar10": make_data.cifar10, "stl10": make_data.stl10, "mnist": make_data.mnist}[name](origin)
    if name == "mnist":
        file = "train-images-idx3-ubyte.gz"
        data = gzip.compress((origin / "MNIST/raw/train-images-idx3-ubyte").read_bytes())
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url + "/missing/", server.url + "/"])
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(file, hashlib.md5(data).hexdigest())])
    else:
        official = {"cifar10": torchvision.datasets.CIFAR10, "stl10": torchvision.datasets.STL10}[name]
        file = official.filename
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
            archive.add(origin / official.base_folder, official.base_folder)
        data = (tmp_path / "x.tar.gz").read_bytes()
        monkeypatch.setattr(official, "url", f"{server.url}/{file}")
        monkeypatch.setattr(official, "tgz_md5", hashlib.md5(data).hexdigest())
    server.files["/" + file] = data
    return images, file


@pytest.mark.parametrize("name", ["cifar10", "stl10", "mnist"])
def test_downloads(tmp_path, monkeypatch, server, name):
    """A cut download is noticed, named and never used; the next start fetches it anew; the one after needs no net."""
    images, file = serve(server, monkeypatch, tmp_path, name)
    root, size = tmp_path / "data", {"cifar10": 32, "stl10": 96, "mnist": 28}[name]
    server.cut = 300
    with pytest.raises(UserError, match=f"cannot download .*{file}.*try again") as error:
        datasets.load(name, root, size)
    assert "\n" not in str(error.value) and not list(root.rglob(file))
    server.cut = None
    loaded = datasets.load(name, root, size).numpy()
    expected = images.transpose(0, 3, 1, 2) if name == "stl10" else images.reshape(loaded.shape)
    assert np.array_equal(loaded, expected)
    server.files.clear()
    for cached in root.rglob("*.npy"):
        cached.unlink()
    assert np.array_equal(datasets.load(name, root, size).numpy(), expected)


def test_a_wrong_download(tmp_path, monkeypatch, server):
    _, file = serve(server, monkeypatch, tmp_path, "cifar10")
    server.files["/" + file] = b"<html>Please log in</html>"
    with pytest.raises(UserError, match=rf"{file}, 26 bytes, removed"):
        datasets.load("cifar10", tmp_path / "data", 32)
    assert not (tmp_path / "data/cifar-10-batches-py").exists()


def test_a_download_killed_halfway_is_fetched_anew(tmp_path, monkeypatch, server):
    images, file = serve(server, monkeypatch, tmp_path, "cifar10")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(server.files["/" + file][:500])
    assert np.array_equal(datasets.load("cifar10", tmp_path / "data", 32).numpy(), images)


def test_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10_binary.tar.gz")
    with pytest.raises(UserError, match="cannot download STL-10 .* no connection.*put stl10_binary.tar.gz into"):
        datasets.load("stl10", tmp_path, 48)


def test_celeba_without_network(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("gdown is missing")

    monkeypatch.setattr(torchvision.datasets.utils, "download_file_from_google_drive", refuse)
    with pytest.raises(UserError, match="CelebA .*gdown is missing.*img_align_celeba.zip by hand"):
        datasets.load("celeba", tmp_path, 64)


# ------------------------------------------------------------------------------------------------------- metrics
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


def test_evaluator_is_torch_fidelity(weights, monkeypatch):
    real = torch.from_numpy(make_data.pictures(16)).permute(0, 3, 1, 2).contiguous()
    fake = torch.from_numpy(make_data.pictures(12, seed=5)).permute(0, 3, 1, 2).contiguous()
    theirs = torch_fidelity.calculate_metrics(
        input1=make_data.Images(fake), input2=make_data.Images(real), fid=True, isc=True, cuda=False,
        verbose=False, batch_size=8, cache=False, save_cpu_ram=True, feature_extractor_weights_path=str(weights))
    position = 0

    def sample(n):
        nonlocal position
        position += n
        return fake[position - n : position]

    evaluator = metrics.Evaluator(real, 16, str(weights), "cpu")
    ours = evaluator.score(sample, 12, batch_size=5)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["is_mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-7)
    monkeypatch.setattr(metrics.Evaluator, "features", None)  # a second start reads the real features from the disk
    again = metrics.Evaluator(real, 16, str(weights), "cpu")
    assert torch.equal(again.covariance, evaluator.covariance)


def test_grey_images_are_scored_as_rgb(weights):
    evaluator = metrics.Evaluator.__new__(metrics.Evaluator)
    evaluator.device, evaluator.inception = torch.device("cpu"), metrics.load_inception(weights)
    grey = torch.from_numpy(make_data.pictures(2, 28, channels=1)).permute(0, 3, 1, 2)
    assert torch.equal(evaluator.features(grey)[0], evaluator.features(grey.repeat(1, 3, 1, 1))[0])


def test_weights_that_cannot_be_used(tmp_path, monkeypatch):
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match="--num-real 5: the data set has 4"):
        metrics.Evaluator(images, 5, None, "cpu")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("missing.pth", "other.pth"):
        with pytest.raises(UserError, match=f"{name} is not torch-fidelity's Inception weights") as error:
            metrics.Evaluator(images, 4, str(tmp_path / name), "cpu")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(metrics, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(UserError, match="cannot download the Inception weights.*--eval-every 0"):
        metrics.Evaluator(images, 4, None, "cpu")
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub/checkpoints/weights.pth").write_bytes(b"cut")
    with pytest.raises(UserError, match="was damaged and is removed"):
        metrics.Evaluator(images, 4, None, "cpu")
    assert not (tmp_path / "hub/checkpoints/weights.pth").exists()


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_text("old")

    def write(path):
        path.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x: .*No space left on device"):
        write_atomically(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
