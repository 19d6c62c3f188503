"""Image data sets, each as one uint8 tensor [N, C, H, W]: downloaded and verified, decoded once, memory-mapped after.

    images = load("cifar10", "data", 32)             # [50000, 3, 32, 32]
    images = load("folder", "photos.zip", 64)        # every image in a directory or a .zip

What is decoded lies in a .npy file beside the data, or in `cache_folder()` where that place cannot be written.
"""
from __future__ import annotations

import collections
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import queue
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import zipfile
import zlib
from typing import BinaryIO, Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import UserError, cache_folder, reason, world, write_atomically

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
              ".avif", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
NO_IMAGES = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "lost+found"}  # thumbnails, deleted files
Image.MAX_IMAGE_PIXELS = None  # Pillow would refuse a photograph of 200 megapixels
VERSION = 2  # of the decoding below; part of a cache file's name


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """Process 0 runs the body alone; then the others run it and find in the caches what process 0 wrote."""
    rank, processes = world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and processes > 1:
        dist.barrier()


@process_zero_first()
def load(name: str, root: str | os.PathLike, image_size: int) -> torch.Tensor:
    """The training images of a data set, uint8 [N, C, image_size, image_size], memory-mapped.

    name: cifar10 (50,000 of 32x32), stl10 (the 100,000 unlabelled, resized from 96x96), mnist (60,000 of 28x28, C = 1),
    celeba (202,599; the central 108x108, resized) or folder (RGB; the central square, resized; bilinear, antialiased).
    root: the folder that data sets are kept in and downloaded to; for `folder` the directory (searched recursively) or
    .zip of images itself. Official files that are there are used as they are, subsets too; cut files are refused.

    Raises UserError: a failed or wrong download, damaged files (named), no images.
    """
    root = pathlib.Path(os.path.expanduser(root))
    native = {"cifar10": 32, "mnist": 28}.get(name, image_size)
    if image_size != native:
        raise UserError(f"--image-size {image_size}: {name} is {native}x{native}")
    if name not in SOURCES:
        raise UserError(f"unknown data set {name}: choose from {', '.join(SOURCES)}")
    identity, decode = SOURCES[name](root)
    place, label = (root.parent, root.stem) if os.path.isfile(root) else (root, name)  # a file: a .zip
    label = label if len(os.fsencode(label)) < 150 else digest(label)
    # a dot file, which a search of `place` for images passes over
    prefix, key = f".{label}-{image_size}px-", digest((VERSION, image_size, identity))
    subfolder = digest(os.path.realpath(root))  # of the cache folder, which data sets of one name may share
    with contextlib.suppress(OSError, EOFError, ValueError):  # not there, cut, or not what was written
        return map_array(place / f"{prefix}{key}.npy")
    with contextlib.suppress(OSError, EOFError, ValueError, UserError):  # a home that cannot be written does no harm
        return map_array(cache_folder() / subfolder / f"{prefix}{key}.npy")
    try:
        if os.access(place, os.W_OK):
            return keep(decode, image_size, place, prefix, key)
    except UserError as error:
        if not str(error).startswith("cannot write"):
            raise
    folder = cache_folder() / subfolder  # for a read-only place, or no room beside the data
    folder.mkdir(exist_ok=True)
    return keep(decode, image_size, folder, prefix, key)


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def map_array(path: pathlib.Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy-on-write: nothing that is written reaches the file


def keep(decode: Callable, image_size: int, folder: pathlib.Path, prefix: str, key: str) -> torch.Tensor:
    """Decode straight into the memory map of the file that is kept, so that no set has to fit into memory. Files of the
    data set's earlier contents are removed."""
    def write(temporary: pathlib.Path) -> None:
        def allocate(*shape: int) -> np.ndarray:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash once the map is written
                with open(temporary, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            return array

        decode(image_size, allocate)

    path = folder / f"{prefix}{key}.npy"
    write_atomically(path, write, "make room for the decoded images, or set XDG_CACHE_HOME; ")
    for other in folder.glob(glob.escape(prefix) + "?" * len(key) + ".npy"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()
    return map_array(path)


# ----------------------------------------------------------------------------------- a folder or .zip of images
# A data set is a function of `root` that finds or downloads its files. It returns what identifies their contents, and
# decode(image_size, allocate), which fills the uint8 array that allocate(N, C, H, W) makes.
def image_files(path: pathlib.Path, crop: int | None = None) -> tuple[object, Callable]:
    """The images in a directory (recursively) or a .zip, in the order of their names. crop: side of the central square
    that is cut out before resizing; None: the largest that fits."""
    if not os.path.exists(path):
        raise UserError(f"no such folder or file: {path}; give --data-dir a directory or a .zip of images")
    packed = not os.path.isdir(path)
    try:
        if packed:
            with zipfile.ZipFile(path) as archive:  # read by entry, of which two may have one name
                found = [(e.filename, e.CRC, e) for e in archive.infolist() if not e.is_dir()]
        else:
            found = list_folder(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give --data-dir images or a .zip of them") from None
    found = [f for f in sorted(found, key=lambda f: f[0]) if not is_hidden(f[0])]
    files = [f for f in found if ending(f[0]) in EXTENSIONS]
    others = collections.Counter(ending(name) for name, *_ in found if ending(name) not in EXTENSIONS)
    if not files:
        raise UserError(f"no images in {path} (looked for {', '.join(sorted(EXTENSIONS))})")

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        out = allocate(len(files), 3, image_size, image_size)
        with zipfile.ZipFile(path) if packed else contextlib.nullcontext() as archive:
            def one(i: int) -> None:
                name, _, entry = files[i]
                with io.BytesIO(archive.read(entry)) if packed else open(path / name, "rb") as file:
                    out[i] = read_image(file, crop, image_size).transpose(2, 0, 1)

            failures = in_threads(one, len(files))  # Pillow decodes without the interpreter's lock
        if failures:
            raise unreadable(f"of {len(files)} images in {path}", [(files[i][0], why) for i, why in failures])
        passed_over = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
        print(f"{path}: {len(files)} images taken; files passed over: {passed_over or 'none'}", file=sys.stderr)

    return (crop, [f[:2] for f in files]), decode


def list_folder(folder: pathlib.Path) -> list[tuple[str, tuple[int, int], None]]:
    """Every file below a folder that is not hidden: name, (size, time), None. Links are followed, and a folder that
    several of them lead to is read once. Raises UserError that names what cannot be read."""
    files, seen, bad = [], set(), []
    for directory, subfolders, names in os.walk(folder, onerror=bad.append, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not is_hidden(s))
        if os.path.realpath(directory) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(directory))
        for path in (os.path.join(directory, n) for n in names if not is_hidden(n)):
            try:
                status = os.stat(path)  # of a link to nothing, an error
                files.append((os.path.relpath(path, folder), (status.st_size, status.st_mtime_ns), None))
            except OSError as error:
                bad.append(error)
    if bad:
        raise unreadable(f"files and folders in {folder}", sorted((e.filename, e.strerror) for e in bad))
    return files


def is_hidden(name: str) -> bool:
    return any(part in NO_IMAGES or part.startswith(".") and part.strip(".") for part in name.split("/"))


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"


def unreadable(what: str, bad: Sequence[tuple[str, str]]) -> UserError:
    """The error that names the first ten of the files `bad`, (name, why)."""
    named = "; ".join(f"{name} ({why})" for name, why in bad[:10]) + ("; ..." if len(bad) > 10 else "")
    return UserError(f"cannot read {len(bad)} {what}: {named}; mend or remove them")


def read_image(file: BinaryIO, crop: int | None, size: int) -> np.ndarray:
    """The central square of an image, upright, on white where it is transparent: uint8 [size, size, 3]."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("not in a format that Pillow reads") from None  # Pillow's message would name a BytesIO
    if crop is None:
        image.draft(None, (2 * size, 2 * size))  # a large JPEG: decoded at 1/2, 1/4 or 1/8, as long as that is enough
    ImageOps.exif_transpose(image, in_place=True)  # a camera held sideways says so in the file
    side = crop or min(image.size)
    if min(image.size) < side:
        raise ValueError(f"{image.size[0]}x{image.size[1]} is smaller than the crop of {side}x{side}")
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    image = image.crop((left, top, left + side, top + side))  # first of all: the steps below copy what there is
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(to_bytes(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits, scaled to uint8 by their range: to 2^16 - 1, to 2^31 - 1 or, of floats, to 1."""
    low, high = values.min(), values.max()
    # 32 bits often hold 16-bit values, in a PGM always
    limit = 1 if values.dtype.kind == "f" else 2**16 - 1 if high < 2**16 else 2**31 - 1
    if not 0 <= low <= high <= limit:  # NaN fails too
        raise ValueError(f"its grey values are {low} to {high}; of {values.dtype}, 0 to {limit} can be scaled")
    return (values.astype(np.float32) * (255 / limit) + 0.5).astype(np.uint8)


def in_threads(work: Callable[[int], None], count: int) -> list[tuple[int, str]]:
    """Call work(i) for each i < count; (i, why) of each call that failed. The threads are daemons and look at a flag
    before each call, so that a stop need not wait for them."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results, stopped = queue.SimpleQueue(), threading.Event()

    def run(first: int) -> None:
        for i in range(first, count, threads):
            if stopped.is_set():
                return
            try:
                work(i)
                results.put(None)
            except Exception as error:  # whatever a damaged file makes Pillow or zipfile raise
                results.put((i, reason(error)))

    try:
        for first in range(threads):
            threading.Thread(target=run, args=(first,), daemon=True).start()
        bar = tqdm(range(count), "decoding", unit="img", mininterval=0.5, dynamic_ncols=True)
        return sorted(failure for _ in bar if (failure := results.get()))
    finally:
        stopped.set()


def celeba(root: pathlib.Path) -> tuple[object, Callable]:
    """The folder or .zip of aligned CelebA images in `root` or `root`/celeba; downloaded where there is none."""
    for path in (p / f"img_align_celeba{suffix}" for p in (root, root / "celeba") for suffix in ("", ".zip")):
        if path.is_dir() or zipfile.is_zipfile(path):  # a .zip that was cut has lost its directory
            return image_files(path, crop=108)
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import download_file_from_google_drive as fetch
    file_id, md5, name = next(f for f in CelebA.file_list if f[2] == "img_align_celeba.zip")
    install = "" if importlib.util.find_spec("gdown") else "pip install gdown, or "
    download("CelebA", f"Google Drive ({file_id})", root / name, lambda: fetch(file_id, root, name, md5),
             f"{install}download {name} by hand from the CelebA page and put it into {root}")
    return image_files(root / name, crop=108)


# ------------------------------------------------------------------------------------------- official data sets
def cifar10(root: pathlib.Path) -> tuple[object, Callable]:
    """cifar-10-batches-py: five pickles of uint8 [10000, 3072]; a subset may have fewer."""
    names = [f"data_batch_{i}" for i in range(1, 6)]
    files = find(root / "cifar-10-batches-py", names) or unpack(root, "CIFAR10", names)

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        batches = [read_batch(f) for f in files]
        np.concatenate(batches, out=allocate(sum(map(len, batches)), 3, 32, 32))

    return stamps(files), decode


def read_batch(path: pathlib.Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        data, count = batch[b"data"], len(batch[b"labels"])
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


def stl10(root: pathlib.Path) -> tuple[object, Callable]:
    """stl10_binary/unlabeled_X.bin: images of 3x96x96 bytes, each colour plane column by column, no header."""
    name = ["unlabeled_X.bin"]
    files = find(root / "stl10_binary", name) or unpack(root, "STL10", name)
    size = files[0].stat().st_size
    if size == 0 or size % (3 * 96 * 96):
        raise damaged(files[0], ValueError(f"{size} bytes are not a whole number of 96x96 images"))

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        raw = np.memmap(files[0], np.uint8, "r").reshape(-1, 3, 96, 96)
        out = allocate(len(raw), 3, image_size, image_size)

        def one(i: int) -> None:
            image = Image.fromarray(np.ascontiguousarray(raw[i].transpose(2, 1, 0)))
            out[i] = np.asarray(image.resize(out.shape[2:], Image.Resampling.BILINEAR)).transpose(2, 0, 1)

        for i, why in in_threads(one, len(raw)):
            raise damaged(files[0], ValueError(f"image {i}: {why}"))

    return stamps(files), decode


def mnist(root: pathlib.Path) -> tuple[object, Callable]:
    """train-images-idx3-ubyte (or its .gz), as torchvision puts it, MNIST/raw, or in `root` itself."""
    name, folder = "train-images-idx3-ubyte.gz", root / "MNIST" / "raw"
    files = [f for place in (folder, root) for f in find(place, [name.removesuffix(".gz"), name])][:1]
    if not files:
        from torchvision.datasets import MNIST
        from torchvision.datasets.utils import download_url
        url, md5, files = MNIST.mirrors[0] + name, dict(MNIST.resources)[name], [folder / name]
        download("MNIST", url, files[0], lambda: download_url(url, str(folder), name, md5),
                 f"put {name} into {folder} by hand")

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        try:
            with (gzip.open if files[0].suffix == ".gz" else open)(files[0], "rb") as file:
                data = np.frombuffer(file.read(), np.uint8)
            magic, count, height, width = np.frombuffer(data[:16].tobytes(), ">i4").tolist()
            if magic != 0x803 or (height, width) != (28, 28) or len(data) != 16 + count * 784 or count == 0:
                raise ValueError(f"{len(data)} bytes do not fit the header ({count} images of {height}x{width})")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(files[0], error) from None
        allocate(count, 1, 28, 28)[:] = data[16:].reshape(count, 1, 28, 28)

    return stamps(files), decode


SOURCES = {"cifar10": cifar10, "stl10": stl10, "mnist": mnist, "celeba": celeba, "folder": image_files}


def find(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    return [folder / n for n in names if os.path.isfile(folder / n)]


def stamps(files: Sequence[pathlib.Path]) -> object:
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def damaged(path: pathlib.Path, error: BaseException, remove: pathlib.Path | None = None) -> UserError:
    return UserError(f"{path} is damaged or cut off: {reason(error)}; remove {remove or 'it'}, and the next start "
                     "downloads it anew")


def unpack(root: pathlib.Path, title: str, names: Sequence[str]) -> list[pathlib.Path]:
    """Download one of torchvision's archives into `root`, check its md5 and unpack it, whole or not at all."""
    import torchvision.datasets
    from torchvision.datasets.utils import download_url, extract_archive
    official = getattr(torchvision.datasets, title)
    archive, folder = root / official.filename, root / official.base_folder
    download(title, official.url, archive,
             lambda: download_url(official.url, str(root), official.filename, official.tgz_md5),
             f"download it by hand and put {archive.name} into {root}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as temporary:
        extract_archive(str(archive), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(pathlib.Path(temporary, official.base_folder), folder)
    return find(folder, names)


def download(title: str, url: str, file: pathlib.Path, fetch: Callable[[], None], advice: str) -> None:
    """Run `fetch`, which makes `file`. Whatever goes wrong becomes one line, and a wrong file is removed, so that the
    next start fetches it anew. A connection that stands still for half a minute counts as broken."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fetch()
    except Exception as error:  # urllib, http, ssl, torchvision and gdown each have their own
        what = "no connection" if isinstance(error, urllib.error.URLError) else "failed or cut off"
        if os.path.isfile(file):
            what = f"failed or cut off ({file.name}, {file.stat().st_size:,} bytes, removed)"
            file.unlink()
        raise UserError(f"cannot download {title} from {url}: {what}: {reason(error)}; try again, or {advice}"
                        ) from None
    finally:
        socket.setdefaulttimeout(patience)
