"""Image data sets, each as one uint8 tensor [N, C, H, W]: downloaded and verified, decoded once, memory-mapped after.

    images = load("cifar10", "data", 32)             # [50000, 3, 32, 32]
    images = load("folder", "photos.zip", 64)        # every image in a directory or a .zip

What is decoded lies in a .npy file beside the data, or in `cache_folder()` where that place cannot be written.
"""
from __future__ import annotations

import gzip
import hashlib
import io
import os
import pathlib
import pickle
import shutil
import socket
import tempfile
import urllib.error
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, cache_folder, reason, write_atomically

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
VERSION = 1  # of the decoding below; part of a cache file's name


def load(name: str, root: str | os.PathLike, image_size: int) -> torch.Tensor:
    """The training images of a data set, uint8 [N, C, image_size, image_size], memory-mapped.

    name: cifar10 (50,000 of 32x32), stl10 (the 100,000 unlabelled ones, resized from 96x96), mnist (60,000 of 28x28,
    C = 1), celeba (202,599; the central 108x108, resized) or folder (RGB; the central square, resized). Resizing is
    bilinear with antialiasing. root: the folder that data sets are kept in and downloaded to; for `folder` the
    directory (searched recursively) or .zip of images itself. Official files that are already there are used as they
    are, so subsets in the official formats are welcome; cut files are refused.

    Raises UserError: a failed or wrong download, a damaged file (named), no images.
    """
    root = pathlib.Path(root)
    native = {"cifar10": 32, "mnist": 28}.get(name, image_size)
    if image_size != native:
        raise UserError(f"--image-size {image_size}: {name} is {native}x{native}")
    if name == "folder":
        source, place = ImageFiles(root, crop=None), root.parent if root.is_file() else root
    elif name == "celeba":
        source, place = ImageFiles(find_celeba(root), crop=108), root
    elif name in OFFICIAL:
        source, place = OFFICIAL[name](root), root
    else:
        raise UserError(f"unknown data set {name}: choose from {', '.join([*OFFICIAL, 'celeba', 'folder'])}")
    key = hashlib.sha256(repr((VERSION, image_size, source.identity())).encode()).hexdigest()[:12]
    # a dot file, which a search of `place` for images passes over
    file = f".{root.stem if name == 'folder' else name}-{image_size}px-{key}.npy"
    for folder in (lambda: place, cache_folder):
        if (folder() / file).is_file():
            try:
                return map_array(folder() / file)
            except (ValueError, EOFError):  # cut, or not what was written: decode anew
                (folder() / file).unlink(missing_ok=True)
    try:
        if os.access(place, os.W_OK):
            return keep(source, image_size, place / file)
    except UserError as error:
        if not str(error).startswith("cannot write"):
            raise
    return keep(source, image_size, cache_folder() / file)  # a read-only place, or no room beside the data


def map_array(path: pathlib.Path) -> torch.Tensor:
    """A .npy file of uint8 [N, C, H, W] as a tensor over its memory map. A file that is cut raises ValueError."""
    array = np.load(path, mmap_mode="c")  # copy-on-write: a tensor cannot be read-only; nothing reaches the file
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"{path}: {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def keep(source, image_size: int, path: pathlib.Path) -> torch.Tensor:
    """Decode straight into the memory map of the file that is kept, so that no set has to fit into memory."""
    def write(temporary: pathlib.Path) -> None:
        def allocate(*shape: int) -> np.ndarray:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash once the map is written
                with open(temporary, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            return array

        source.decode(image_size, allocate)

    write_atomically(path, write, "make room for the decoded images, or set XDG_CACHE_HOME; ")
    return map_array(path)


# ----------------------------------------------------------------------------------- a folder or .zip of images
class ImageFiles:
    """The images in a directory (recursively) or a .zip, in the order of their names.

    crop: side of the central square that is cut out before resizing; None: the largest that fits.
    """

    def __init__(self, path: pathlib.Path, crop: int | None):
        self.path, self.crop = path, crop
        if not path.exists():
            raise UserError(f"no such folder or file: {path}; give --data-dir a directory or a .zip of images")
        if path.is_dir():
            self.files = [(str(f.relative_to(path)), (f.stat().st_size, f.stat().st_mtime_ns)) for f in walk(path)]
        else:
            try:
                with zipfile.ZipFile(path) as archive:
                    self.files = sorted((i.filename, i.CRC) for i in archive.infolist() if is_image(i.filename))
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"cannot read {path}: {reason(error)}; give --data-dir a directory or a .zip of images"
                                ) from None
        if not self.files:
            raise UserError(f"no images in {path} (looked for {', '.join(sorted(EXTENSIONS))})")

    def identity(self) -> object:
        return self.crop, self.files

    def decode(self, image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        out = allocate(len(self.files), 3, image_size, image_size)
        archive = None if self.path.is_dir() else zipfile.ZipFile(self.path)

        def one(i: int) -> None:
            name = self.files[i][0]
            try:
                with Image.open(self.path / name if archive is None else io.BytesIO(archive.read(name))) as image:
                    upright = ImageOps.exif_transpose(image)  # a camera held sideways says so in the file
                    out[i] = resize(upright.convert("RGB"), self.crop, image_size).transpose(2, 0, 1)
            except Exception as error:  # whatever a damaged file makes Pillow or zipfile raise
                where = self.path / name if archive is None else f"{name} in {self.path}"
                raise UserError(f"cannot read the image {where}: {reason(error)}; mend or remove it") from None

        in_threads(one, len(self.files))  # Pillow decodes without the interpreter's lock


def walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every image file below a folder, sorted; hidden files and folders are passed over."""
    found = []
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        found += [pathlib.Path(directory, n) for n in names if is_image(n)]
    return sorted(found)


def is_image(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def resize(image: Image.Image, crop: int | None, size: int) -> np.ndarray:
    """The central square of an image, resized: uint8 [size, size, C]."""
    side = crop or min(image.size)
    if min(image.size) < side:
        raise ValueError(f"{image.size[0]}x{image.size[1]} is smaller than the crop of {side}x{side}")
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(image.crop(box))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def in_threads(work: Callable[[int], None], count: int) -> None:
    def block(start: int) -> int:
        for i in range(start, min(start + 256, count)):
            work(i)
        return min(256, count - start)

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=count, desc="decoding", unit="img", mininterval=0.5,
                                                          dynamic_ncols=True) as bar:
        try:
            for done in pool.map(block, range(0, count, 256)):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def find_celeba(root: pathlib.Path) -> pathlib.Path:
    """The folder or .zip of aligned CelebA images in `root` or `root`/celeba; downloaded where there is none."""
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import check_integrity, download_file_from_google_drive
    for folder in (root, root / "celeba"):
        for candidate in (folder / "img_align_celeba", folder / "img_align_celeba.zip"):
            if candidate.is_dir() and walk(candidate):
                return candidate
            if candidate.is_file() and zipfile.is_zipfile(candidate):  # a cut .zip has lost its directory
                return candidate
    file_id, md5, name = next(f for f in CelebA.file_list if f[2] == "img_align_celeba.zip")
    by_hand = f"pip install gdown, or download img_align_celeba.zip by hand from the CelebA page and put it into {root}"

    def fetch() -> None:
        download_file_from_google_drive(file_id, root, name, md5)
        if not check_integrity(root / name, md5):
            raise RuntimeError("the download's checksum is wrong")

    guard_download(fetch, "CelebA", f"Google Drive ({file_id})", root / name, by_hand)
    return root / name


# ------------------------------------------------------------------------------------------- official data sets
class CIFAR10:
    """cifar-10-batches-py: five pickles of uint8 [10000, 3072]."""

    names = tuple(f"data_batch_{i}" for i in range(1, 6))

    def __init__(self, root: pathlib.Path):
        self.files = find(root / "cifar-10-batches-py", self.names)  # a subset may have fewer batches
        if not self.files:
            from torchvision.datasets import CIFAR10 as official
            self.files = unpack(root, "CIFAR-10", official, self.names)

    def identity(self) -> object:
        return stamps(self.files)

    def decode(self, image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        batches = [self.read(f) for f in self.files]
        np.concatenate(batches, out=allocate(sum(map(len, batches)), 3, 32, 32))

    def read(self, path: pathlib.Path) -> np.ndarray:
        try:
            with open(path, "rb") as file:
                batch = ArrayUnpickler(file, encoding="bytes").load()
            data = batch[b"data"]
            count = len(batch[b"labels"])
            if data.dtype != np.uint8 or data.shape != (count, 3072) or count == 0:
                raise ValueError(f"{count} labels, images {data.dtype} {data.shape}")
            return data.reshape(-1, 3, 32, 32)
        except Exception as error:  # whatever a cut or foreign pickle raises
            raise damaged(path, error, path.parent) from None  # all of it: four batches left would count as a subset


class ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's pickles, which hold numpy arrays; a pickle that asks for anything else is refused, not run."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
                   ("numeric", "_frombuffer")}
        if (module.replace("numpy.core.", "").replace("numpy._core.", ""), name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class STL10:
    """stl10_binary/unlabeled_X.bin: images of 3x96x96 bytes, each colour plane column by column, no header."""

    def __init__(self, root: pathlib.Path):
        self.files = find(root / "stl10_binary", ["unlabeled_X.bin"])
        if not self.files:
            from torchvision.datasets import STL10 as official
            self.files = unpack(root, "STL-10", official, ["unlabeled_X.bin"])
        size = self.files[0].stat().st_size
        if size == 0 or size % (3 * 96 * 96):
            raise damaged(self.files[0], ValueError(f"{size} bytes are not a whole number of 96x96 images"))

    def identity(self) -> object:
        return stamps(self.files)

    def decode(self, image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        raw = np.memmap(self.files[0], np.uint8, "r").reshape(-1, 3, 96, 96)
        out = allocate(len(raw), 3, image_size, image_size)

        def one(i: int) -> None:
            image = Image.fromarray(np.ascontiguousarray(raw[i].transpose(2, 1, 0)))
            out[i] = resize(image, None, image_size).transpose(2, 0, 1)

        in_threads(one, len(raw))


class MNIST:
    """train-images-idx3-ubyte (or its .gz), as torchvision puts it, MNIST/raw, or in `root` itself."""

    def __init__(self, root: pathlib.Path):
        name = "train-images-idx3-ubyte.gz"
        places = (root / "MNIST" / "raw", root)
        self.files = next((f for p in places for n in (name.removesuffix(".gz"), name) if (f := find(p, [n]))), [])
        if not self.files:
            from torchvision.datasets import MNIST as official
            from torchvision.datasets.utils import download_url
            md5 = dict(official.resources)[name]

            def fetch() -> None:
                errors = []
                for mirror in official.mirrors:
                    try:
                        return download_url(mirror + name, str(places[0]), name, md5)
                    except (OSError, RuntimeError) as error:
                        errors.append(error)
                raise errors[0]

            guard_download(fetch, "MNIST", official.mirrors[0] + name, places[0] / name,
                           f"put {name} into {places[0]} by hand")
            self.files = [places[0] / name]

    def identity(self) -> object:
        return stamps(self.files)

    def decode(self, image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        path = self.files[0]
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                data = np.frombuffer(file.read(), np.uint8)
            magic, count, height, width = np.frombuffer(data[:16].tobytes(), ">i4").tolist()
            if magic != 0x803 or (height, width) != (28, 28) or len(data) != 16 + count * 784 or count == 0:
                raise ValueError(f"{len(data)} bytes do not fit the header ({count} images of {height}x{width})")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(path, error) from None
        allocate(count, 1, 28, 28)[:] = data[16:].reshape(count, 1, 28, 28)


OFFICIAL = {"cifar10": CIFAR10, "stl10": STL10, "mnist": MNIST}


def find(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    return [folder / n for n in names if (folder / n).is_file()]


def stamps(files: Sequence[pathlib.Path]) -> object:
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def damaged(path: pathlib.Path, error: BaseException, remove: pathlib.Path | None = None) -> UserError:
    return UserError(f"{path} is damaged or cut off: {reason(error)}; remove {remove or 'it'}, and the next start "
                     "downloads it anew")


def unpack(root: pathlib.Path, title: str, official: type, names: Sequence[str]) -> list[pathlib.Path]:
    """Download the archive of one of torchvision's data sets into `root`, check its md5 and unpack its folder, whole or
    not at all; the wanted files."""
    from torchvision.datasets.utils import download_url, extract_archive
    archive, folder = root / official.filename, root / official.base_folder
    guard_download(lambda: download_url(official.url, str(root), official.filename, official.tgz_md5), title,
                   official.url, archive, f"download it by hand and put {archive.name} into {root}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as temporary:
        try:
            extract_archive(str(archive), temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(pathlib.Path(temporary, official.base_folder), folder)
        except OSError as error:
            raise UserError(f"cannot unpack {archive}: {reason(error)}") from None
    return find(folder, names)


def guard_download(fetch: Callable[[], None], title: str, url: str, file: pathlib.Path, by_hand: str) -> None:
    """Run a download; whatever goes wrong becomes one line, and a wrong file is removed, so that the next start
    fetches it anew. A connection that stands still for half a minute counts as broken."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fetch()
    except Exception as error:  # urllib, http, ssl, torchvision and gdown each have their own
        got = f" ({file.name}, {file.stat().st_size:,} bytes, removed)" if file.is_file() else ""
        file.unlink(missing_ok=True)
        what = "no connection" if isinstance(error, urllib.error.URLError) and not got else "failed or was cut off"
        raise UserError(f"cannot download {title} from {url}: {what}{got}: {reason(error)}; try again, or {by_hand}"
                        ) from None
    finally:
        socket.setdefaulttimeout(patience)
