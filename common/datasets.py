"""Image data sets, each as one uint8 tensor [N, C, H, W]: downloaded, verified, decoded once, memory-mapped.
Generated images are written at the end of this file.

    images = load("cifar10", "data", 32)             # [50000, 3, 32, 32]
    images = load("folder", "photos.zip", 64)        # every image in a directory or a .zip

Decoded images are kept beside the data as .npy, or in `cache_folder()` if that place cannot be written.
"""
from __future__ import annotations

import collections
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import math
import os
import pathlib
import pickle
import queue
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import urllib.error
import zipfile
import zlib
from typing import BinaryIO, Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10, MNIST, STL10, CelebA, utils
from torchvision.utils import make_grid

import common
from common import UserError, WriteError, cache_folder, expand, lock, reason, remove_leftovers, write_atomically
from common.training import wait_for, world

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif",
              ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
NO_IMAGES = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "lost+found"}  # thumbnails, deleted files
VERSION = 2  # of the decoding below; part of the key in a .npy file's name
Image.MAX_IMAGE_PIXELS = None  # Pillow would refuse a photograph of 200 megapixels
turns = itertools.count()  # counts alike in all of torchrun's processes


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """Process 0 runs the body alone; then the others run it and find the caches that process 0 wrote."""
    rank, processes = world()
    done = f"process 0 is done {next(turns)}"
    if rank > 0:
        wait_for([done])  # for hours, if need be
    yield
    if rank == 0 and processes > 1:
        common.shared_store().set(done, "")


@process_zero_first()
def load(name: str, root: str | os.PathLike, image_size: int) -> torch.Tensor:
    """The training images of a data set, uint8 [N, C, image_size, image_size], memory-mapped.

    name: cifar10 (50,000 of 32x32), stl10 (the 100,000 unlabelled, resized from 96x96), mnist (60,000
    of 28x28, C = 1), celeba (202,599; the central 108x108, resized) or folder (RGB; the central square,
    resized). Resizing is bilinear and antialiased. Official files that are there are used, unpacked ones too,
    even if they are fewer.
    root: the folder that data sets are kept in and downloaded to. Of `folder`: the .zip of images, or the
    directory, which is searched recursively.

    Many processes may load at once: one downloads, or decodes, what the others wait for.

    Raises UserError: a failed or wrong download, damaged or cut files (named), no images.
    """
    root = expand(root)
    native_size = {"cifar10": 32, "mnist": 28}.get(name, image_size)
    if image_size != native_size:
        raise UserError(f"--image-size {image_size}: {name} is {native_size}x{native_size}")
    if name not in SOURCES:
        raise UserError(f"unknown data set {name}: choose from {', '.join(SOURCES)}")
    identity, decode = SOURCES[name](root)

    place, label = root, name
    if os.path.isfile(root):  # a .zip
        place, label = root.parent, root.stem
    if len(os.fsencode(label)) >= 150:  # a file's name has at most 255 bytes
        label = digest(label)
    prefix = f".{label}-{image_size}px-"  # hidden: a search of `place` for images passes it over
    key = digest((VERSION, image_size, identity))
    subfolder = digest(os.path.realpath(root))  # of the cache folder: two data sets may have one label

    with contextlib.suppress(Exception):  # not there, or whatever a cut or foreign file makes NumPy raise
        return map_array(place / f"{prefix}{key}.npy")
    with contextlib.suppress(Exception):  # no cache folder, too
        return map_array(cache_folder() / subfolder / f"{prefix}{key}.npy")
    with contextlib.suppress(WriteError, OSError):  # OSError: of its lock
        if os.access(place, os.W_OK):
            return decode_to_file(decode, image_size, folder=place, prefix=prefix, key=key)
    folder = cache_folder() / subfolder
    folder.mkdir(exist_ok=True)
    return decode_to_file(decode, image_size, folder=folder, prefix=prefix, key=key)


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def map_array(path: pathlib.Path) -> torch.Tensor:
    array = np.load(path, mmap_mode="c")  # copy-on-write: the file never changes
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"{path} holds no images")
    return torch.from_numpy(array)


def decode_to_file(decode: Callable, image_size: int, folder: pathlib.Path, prefix: str, key: str) -> torch.Tensor:
    """Decode a data set into the memory-mapped file {prefix}{key}.npy: it need not fit into memory.
    Files of the same prefix and another key, which hold the data set's earlier contents, are removed.
    While one process decodes, others wait, and take what it has written."""
    def write(temporary: pathlib.Path) -> None:
        def allocate(*shape: int) -> np.ndarray:
            try:
                array = np.lib.format.open_memmap(temporary, "w+", dtype=np.uint8, shape=shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, a crash once the map is written
                    with open(temporary, "rb+") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            except OSError as error:
                raise WriteError(f"cannot write {path}: {reason(error)}; {advice}") from None
            return array

        try:
            decode(image_size, allocate)
        except OSError as error:  # of a source; not to be taken for one of `path`
            raise UserError(f"cannot read the images: {reason(error)}") from None

    path = folder / f"{prefix}{key}.npy"
    advice = "make room for the decoded images, or set XDG_CACHE_HOME"
    remove_leftovers(folder, prefix)
    with lock(folder / f"{prefix}lock", wait=math.inf):
        with contextlib.suppress(Exception):
            return map_array(path)
        write_atomically(path, write, f"{advice}; ")
        for other in folder.glob(glob.escape(prefix) + "?" * len(key) + ".npy"):
            if other != path:
                with contextlib.suppress(OSError):
                    other.unlink()
        return map_array(path)


# ------------------------------------------------------------- a folder or .zip of images
# A data set is a function of `root` that finds or downloads its files. It returns what identifies their
# contents, and decode(image_size, allocate), which fills the uint8 array that allocate(N, C, H, W) makes.
def image_files(path: pathlib.Path, crop: int | None = None) -> tuple[object, Callable]:
    """The images in a directory (recursively) or a .zip.
    crop: the central square's side in pixels before resizing; None: the largest that fits."""
    images, others, runs = list_images(path)
    packed = os.path.isfile(path)

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        out = allocate(len(images), 3, image_size, image_size)
        with zipfile.ZipFile(path) if packed else contextlib.nullcontext() as archive:
            def decode_one(i: int) -> None:
                name, _, info = images[i]
                with io.BytesIO(archive.read(info)) if packed else open(path / name, "rb") as file:
                    out[i] = read_image(file, crop, size=image_size).transpose(2, 0, 1)

            failures = in_threads(decode_one, len(images))  # Pillow decodes without the interpreter's lock
        if failures:
            raise unreadable(f"of {len(images)} images in {path}", [(images[i][0], why) for i, why in failures])
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items())) or "none"
        print(f"{path}: {len(images)} images taken; files passed over: {counts}"
              + (f"; run folders passed over: {runs}" if runs else ""), file=sys.stderr)

    return (crop, [(name, stamp) for name, stamp, _ in images]), decode


def list_images(path: pathlib.Path) -> tuple[list[tuple], collections.Counter, int]:
    """What `list_zip` or `list_folder` has of images, by name; the other files' endings; the number of run folders.
    Hidden files and what run folders hold of samples are left out. Raises UserError: no images."""
    if not os.path.exists(path):
        raise UserError(f"no such folder or file: {path}; give --data-dir a directory or a .zip of images")
    entries = list_folder(path) if os.path.isdir(path) else list_zip(path)
    entries = sorted((e for e in entries if not is_hidden(e[0])), key=lambda e: e[0])
    runs = {os.path.dirname(e[0]) for e in entries if os.path.basename(e[0]) == "args.json"}
    runs &= {os.path.dirname(e[0]) for e in entries if ending(e[0]) == ".pt"}
    # a training that began in this folder must not see its own samples
    inside = tuple(f"{run}/" if run else f"{own}/" for run in runs for own in ("samples", "generated"))
    entries = [e for e in entries if not e[0].startswith(inside)]
    images = [e for e in entries if ending(e[0]) in EXTENSIONS]
    if not images:
        raise UserError(f"no images in {path} (looked for {', '.join(sorted(EXTENSIONS))}); an official data set is "
                        "asked for by its name: mnist, cifar10, stl10, celeba")
    return images, collections.Counter(ending(e[0]) for e in entries if ending(e[0]) not in EXTENSIONS), len(runs)


def list_zip(path: pathlib.Path) -> list[tuple[str, int, zipfile.ZipInfo]]:
    """Every file in a .zip: name, checksum, and the entry to read it by (two may have one name).
    Raises UserError: no .zip, or not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(info.filename, info.CRC, info) for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # whatever a cut or foreign file makes zipfile raise
        raise UserError(f"cannot read {path}: {reason(error)} (is it cut off, or still being copied?); give --data-dir "
                        "images or a .zip of them") from None


def list_folder(folder: pathlib.Path) -> list[tuple[str, tuple[int, int], None]]:
    """Every file below a folder that is not hidden: name, (size, time), None. Links are followed; a folder
    that several of them lead to is read once. Raises UserError: files that cannot be read (named)."""
    files, seen, errors = [], set(), []

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) or os.path.islink(error.filename):  # else just renamed or removed
            errors.append(error)

    for directory, subfolders, names in os.walk(folder, onerror=failed, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not is_hidden(s))
        if os.path.realpath(directory) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(directory))
        for path in (os.path.join(directory, n) for n in names if not is_hidden(n)):
            try:
                status = os.stat(path)  # of a link to nothing, an error
                stamp = (status.st_size, status.st_mtime_ns)
                files.append((os.path.relpath(path, folder), stamp, None))
            except OSError as error:
                failed(error)
    if errors:
        raise unreadable(f"files and folders in {folder}", sorted((e.filename, e.strerror) for e in errors))
    return files


def is_hidden(path: str) -> bool:
    """Whether a name on the path begins with a dot (but . and ..) or is one of NO_IMAGES."""
    return any(name in NO_IMAGES or name.startswith(".") and name.strip(".") for name in path.split("/"))


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"


def unreadable(what: str, failures: Sequence[tuple[str, str]]) -> UserError:
    """The error that names the first ten of the files that failed, (name, why)."""
    named = "; ".join(f"{name} ({why})" for name, why in failures[:10])
    more = "; ..." if len(failures) > 10 else ""
    return UserError(f"cannot read {len(failures)} {what}: {named}{more}; mend or remove them")


def read_image(file: BinaryIO, crop: int | None, size: int) -> np.ndarray:
    """The central square of an image, upright, on white where it is transparent: uint8 [size, size, 3].
    Metadata that is damaged is passed over.
    Raises ValueError: an unknown format, an image smaller than `crop`, grey values of no known range."""
    draft = None if crop else (2 * size, 2 * size)
    try:
        image = open_image(file, draft)
    except Exception:  # Pillow refuses a whole image for its metadata
        file.seek(0)
        image = open_image(without_metadata(file), draft)
    with contextlib.suppress(Exception):  # whatever an odd EXIF makes Pillow raise, as it is read or written anew
        ImageOps.exif_transpose(image, in_place=True)  # a camera held sideways says so in the file
    side = crop or min(image.size)
    if min(image.size) < side:
        raise ValueError(f"{image.size[0]}x{image.size[1]} is smaller than the crop of {side}x{side}")
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    image = image.crop((left, top, left + side, top + side))  # before the steps below, each of which copies the image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = to_bytes(values)
        grey[values == image.info.get("transparency", np.nan)] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def open_image(file: BinaryIO, draft: tuple[int, int] | None) -> Image.Image:
    """A decoded image. draft: a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, at least this one."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("not in a format that Pillow reads") from None  # Pillow's message names a BytesIO
    if draft:
        image.draft(None, draft)
    image.load()
    return image


def without_metadata(file: BinaryIO) -> BinaryIO:
    """A PNG or a JPEG without its metadata, but with a whole EXIF, which says what is up; another file as it is.

    In a PNG Pillow refuses text and colour profiles of over a megabyte, and a wrong checksum of any chunk; in a JPEG
    segments that are too short.
    """
    png, jpeg = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
    kept = [file.read(2)]
    if kept == [jpeg]:
        while len(head := file.read(4)) == 4:
            marker, length = struct.unpack(">HH", head)
            if marker == 0xFFDA:  # from here on pixels
                kept += [head, file.read()]
                break
            body = file.read(length - 2)
            metadata = 0xFFE0 <= marker <= 0xFFEF or marker == 0xFFFE  # APPn, COM
            if not metadata or marker == 0xFFE1 or body.startswith(b"Adobe") and len(body) == 12:  # EXIF; colours
                kept += [head, body]
    elif kept + [file.read(6)] == [png[:2], png[2:]]:
        kept = [png]
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            body = file.read(length + 4)  # with the checksum
            exif = kind == b"eXIf" and zlib.crc32(kind + body[:-4]).to_bytes(4, "big") == body[-4:]
            if exif or kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept += [head, body]
            if kind == b"IEND":
                break
    else:
        file.seek(0)
        return file
    return io.BytesIO(b"".join(kept))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits as uint8. Their range is 0 to 2^16 - 1, to 2^31 - 1 or, of floats, to 1.
    Raises ValueError: values outside that range."""
    low, high = values.min(), values.max()
    limit = 2**16 - 1 if high < 2**16 else 2**31 - 1  # 32 bits often hold 16; in a PGM always
    if values.dtype.kind == "f":
        limit = 1
    if not 0 <= low <= high <= limit:  # NaN fails too
        raise ValueError(f"its grey values are {low} to {high}; of {values.dtype}, 0 to {limit} can be scaled")
    return (values.astype(np.float32) * (255 / limit) + 0.5).astype(np.uint8)


def in_threads(work: Callable[[int], None], count: int) -> list[tuple[int, str]]:
    """Call work(i) for each i < count, in a thread for each CPU; (i, why) of each call that failed.
    The threads are daemons and look at a flag before each call, so that a stop does not wait for them."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results, stopped = queue.SimpleQueue(), threading.Event()

    def work_through(first: int) -> None:
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
            threading.Thread(target=work_through, args=(first,), daemon=True).start()
        ended = [results.get() for _ in common.progress(range(count), "decoding", unit="img")]
        return sorted(failure for failure in ended if failure is not None)
    finally:
        stopped.set()


def celeba(root: pathlib.Path) -> tuple[object, Callable]:
    """The folder or .zip of aligned CelebA images: `root`, or in it or `root`/celeba; downloaded if missing."""
    name = "img_align_celeba.zip"
    if root.name in ("img_align_celeba", name) and root.exists():
        return image_files(root, crop=108)
    for folder in (root, root / "celeba"):
        for path in (folder / "img_align_celeba", folder / name):
            if path.exists():
                return image_files(path, crop=108)
    file_id, md5 = next(listed[:2] for listed in CelebA.file_list if listed[2] == name)
    install = "" if importlib.util.find_spec("gdown") else "pip install gdown, or "
    download("CelebA", url=f"Google Drive ({file_id})", file=root / name,
             fetch=lambda path: utils.download_file_from_google_drive(file_id, path.parent, path.name, md5),
             advice=f"{install}download {name} by hand from the CelebA page and put it into {root}")
    return image_files(root / name, crop=108)


# --------------------------------------------------------------------- official data sets
def cifar10(root: pathlib.Path) -> tuple[object, Callable]:
    """cifar-10-batches-py, or its archive: five pickles of uint8 [10000, 3072]; a subset may have fewer."""
    names = [f"data_batch_{i}" for i in range(1, 6)]
    files = official_files(root, CIFAR10, names)

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        batches = {file.name: read_batch(file, stream) for file, _, stream in open_files(files, CIFAR10, names)}
        if len(batches) < len(names):
            print(f"{files[0].parent}: a subset of CIFAR-10, {', '.join(batches)}", file=sys.stderr)
        ordered = [batches[name] for name in sorted(batches)]
        np.concatenate(ordered, out=allocate(sum(map(len, ordered)), 3, 32, 32))

    return stamps(files), decode


def read_batch(file: pathlib.Path, stream: BinaryIO) -> np.ndarray:
    """The images of one of CIFAR-10's pickles, uint8 [n, 3, 32, 32]. file: its path, for an error."""
    try:
        batch = ArrayUnpickler(stream, encoding="bytes").load()
        data, count = batch[b"data"], len(batch[b"labels"])
        if data.dtype != np.uint8 or data.shape != (count, 3072) or count == 0:
            raise ValueError(f"{count} labels, images {data.dtype} {data.shape}")
        return data.reshape(-1, 3, 32, 32)
    except Exception as error:  # whatever a cut or foreign pickle raises
        raise damaged(file, error, remove=file.parent) from None  # the other batches would pass as a subset


class ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's pickles of numpy arrays; a pickle that asks for anything else is refused, not run."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
                   ("_codecs", "encode"), ("numeric", "_frombuffer")}
        if (module.replace("numpy.core.", "").replace("numpy._core.", ""), name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def stl10(root: pathlib.Path) -> tuple[object, Callable]:
    """stl10_binary/unlabeled_X.bin, or its archive: uint8 [N, 3, 96, 96] without a header, each plane column by
    column."""
    names = ["unlabeled_X.bin"]
    files = official_files(root, STL10, names)

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        opened = open_files(files, STL10, names)
        file, size, stream = next(opened)
        if size == 0 or size % (3 * 96 * 96):
            raise damaged(file, ValueError(f"{size} bytes are not a whole number of 96x96 images"))
        count = size // (3 * 96 * 96)
        out = allocate(count, 3, image_size, image_size)
        numbers, turn = itertools.count(), threading.Lock()

        def decode_next(_: int) -> None:
            with turn:  # what comes out of an archive comes in its order
                i, data = next(numbers), stream.read(3 * 96 * 96)
            image = Image.fromarray(np.frombuffer(data, np.uint8).reshape(3, 96, 96).transpose(2, 1, 0).copy())
            resized = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            out[i] = np.asarray(resized).transpose(2, 0, 1)

        for _, why in in_threads(decode_next, count):
            raise damaged(file, ValueError(why))

    return stamps(files), decode


def mnist(root: pathlib.Path) -> tuple[object, Callable]:
    """train-images-idx3-ubyte or its .gz in `root`, or in `root`/MNIST/raw, where torchvision puts it."""
    name = "train-images-idx3-ubyte.gz"
    names = [name.removesuffix(".gz"), name]
    file, = (find(root, names) or find(root / "MNIST" / "raw", names) or [root / name])[:1]
    url, md5 = MNIST.mirrors[0] + name, dict(MNIST.resources)[name]
    download("MNIST", url=url, file=file,
             fetch=lambda path: utils.download_url(url, path.parent, path.name, md5),
             advice=f"download it by hand and put {name} into {root}")

    def decode(image_size: int, allocate: Callable[..., np.ndarray]) -> None:
        try:
            data = file.read_bytes()
            if file.suffix == ".gz":
                data = gzip.decompress(data)
            magic, count, *size = np.frombuffer(data, ">i4", count=4).tolist()
            if magic != 0x803 or size != [28, 28] or len(data) != 16 + count * 784 or count == 0:
                raise ValueError(f"{len(data)} bytes do not fit the header ({count} images of {size[0]}x{size[1]})")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise damaged(file, error) from None
        allocate(count, 1, 28, 28)[:] = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 1, 28, 28)

    return stamps([file]), decode


SOURCES = {"cifar10": cifar10, "stl10": stl10, "mnist": mnist, "celeba": celeba, "folder": image_files}


def find(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """The files of these names that are in a folder."""
    return [folder / name for name in names if os.path.isfile(folder / name)]


def stamps(files: Sequence[pathlib.Path]) -> object:
    """What identifies the contents of files: names, sizes and times."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def damaged(path: pathlib.Path, error: BaseException, remove: pathlib.Path | None = None) -> UserError:
    return UserError(f"{path} is damaged or cut off: {reason(error)}; "
                     f"remove {remove or 'it'}, and the next start downloads it anew")


def official_files(root: pathlib.Path, official: type, names: Sequence[str]) -> list[pathlib.Path]:
    """The files of these names, of a data set of torchvision that is unpacked in `root`; if there is none, its archive,
    downloaded if it is not there."""
    files, archive = find(root / official.base_folder, names), root / official.filename
    if not files:
        download(official.__name__, url=official.url, file=archive,
                 fetch=lambda path: utils.download_url(official.url, path.parent, path.name, official.tgz_md5),
                 advice=f"download it by hand and put {archive.name} into {root}")
    return files or [archive]


def open_files(files: Sequence[pathlib.Path], official: type, names: Sequence[str]
               ) -> Iterator[tuple[pathlib.Path, int, BinaryIO]]:
    """Path, size and contents of each of `official_files`, one open at a time: of an archive those of these names.
    Raises UserError: an archive that is not the official one."""
    for file in files:
        if file.name in names:
            with open(file, "rb") as stream:
                yield file, file.stat().st_size, stream
        elif not utils.check_integrity(file, official.tgz_md5):
            raise damaged(file, ValueError("its checksum is not the official one (is it still being copied, or a "
                                           "subset, which is taken unpacked?)"))
        else:
            with tarfile.open(file, "r|gz") as archive:  # read in its order, never unpacked
                for member in archive:
                    path = pathlib.Path(file.parent, member.name)
                    if path.name in names:
                        yield path, member.size, archive.extractfile(member)


def download(title: str, url: str, file: pathlib.Path, fetch: Callable[[pathlib.Path], object], advice: str) -> None:
    """Have fetch(path) make `file` if it is not there, under a temporary name until it is whole. While one process
    downloads, others wait. A connection that stands still for half a minute is broken.
    Raises UserError: what went wrong, and `advice`."""
    def explain(what: str, error: Exception) -> UserError:
        return UserError(f"cannot download {title} from {url}: {what}: {reason(error)}; try again, or {advice}")

    def fetch_or_explain(path: pathlib.Path) -> None:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            fetch(path)
        except Exception as error:  # urllib, http, ssl, torchvision and gdown each have their own
            size = f"{path.stat().st_size:,} bytes" if path.exists() else "nothing"
            answered = not isinstance(error, urllib.error.URLError) or isinstance(error, urllib.error.HTTPError)
            raise explain(f"failed or cut off, {size} came" if answered else "no connection", error) from None
        finally:
            socket.setdefaulttimeout(timeout)

    remove_leftovers(file.parent, file.name)
    if file.exists():
        return
    if ending(file.parent.name) == ".zip" or any(ending(path.name) in EXTENSIONS for path in file.parent.glob("*")):
        raise UserError(f"{file.parent} holds images, and not {title}: ask for them by --dataset folder (in a user "
                        "study by the folder's name), or give another --data-dir")
    new, lock_file = common.missing_folders(file.parent), file.with_name(f".{file.name}.lock")
    try:
        with lock(lock_file, wait=math.inf):
            try:
                if not file.exists():  # no other process has fetched it meanwhile
                    print(f"downloading {title} into {file.parent}", file=sys.stderr)
                    write_atomically(file, fetch_or_explain)
            finally:
                common.remove_unused(new, lock_file)
    except (OSError, WriteError) as error:
        raise explain("it cannot be kept", error) from None


# ----------------------------------------------------------------------- generated images
def write_images(sample: Callable[[int], torch.Tensor], count: int, out: str | pathlib.Path) -> None:
    """Write `count` generated images: one uint8 array [N, H, W, C] if `out` ends in .npy, one grid if it
    ends in .png, else a PNG each in the folder `out`. sample: maps n to n new images, uint8 [n, C, H, W].
    Raises UserError: another picture's ending, a folder that is not empty or cannot be written."""
    path = expand(out)
    one_file = path.suffix in (".npy", ".png")
    if not one_file and path.suffix.lower() in (".npz", *Image.registered_extensions()):
        raise UserError(f"--out {out}: a grid's name ends in .png, an array's in .npy")

    def write(temporary: pathlib.Path) -> None:
        if path.suffix == ".npy":
            buffer = io.BytesIO()  # in a file NumPy would not say that a disk is full
            np.save(buffer, torch.cat(images).permute(0, 2, 3, 1).numpy())
            temporary.write_bytes(buffer.getbuffer())
        else:
            temporary.write_bytes(encode_grid(torch.cat(images), columns=max(1, round(count**0.5))))

    try:
        (path.parent if one_file else path).mkdir(parents=True, exist_ok=True)
        if one_file:  # what cannot be written is an error before the work
            if path.exists():
                open(path, "ab").close()
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
        elif any(path.iterdir()):
            raise UserError(f"{path} is not empty: choose another --out")
        images = []
        for start in common.progress(range(0, count, 100), "generating"):
            batch = sample(min(100, count - start)).cpu()
            if one_file:
                images.append(batch)
            else:
                for i, image in enumerate(batch, start):
                    to_picture(image).save(path / f"{i:06d}.png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose another --out") from None
    if one_file:
        write_atomically(path, write)  # a process that reads or has mapped an earlier file keeps that one
    print(f"{count} images in {path}")


def encode_grid(images: torch.Tensor, columns: int = 8) -> bytes:
    """A PNG of uint8 images [n, C, H, W] in a grid, enlarged without blur to a width of 600 pixels or more."""
    grid = make_grid(images.cpu(), nrow=columns)
    _, height, width = grid.shape
    times, buffer = math.ceil(600 / width), io.BytesIO()
    picture = to_picture(grid).resize((times * width, times * height), Image.Resampling.NEAREST)
    picture.save(buffer, "PNG", compress_level=1)  # four times as fast as the default, and as small
    return buffer.getvalue()


def to_picture(image: torch.Tensor) -> Image.Image:
    """A Pillow image of uint8 [C, H, W], C = 1 or 3."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
