"""common.datasets: every data set's format, images of many kinds, damaged files, downloads that fail, caches."""
import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.server
import io
import mmap
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib

import make_data
import numpy as np
import pytest
import torch
import torchvision
from launcher import torchrun_environment
from PIL import Image, PngImagePlugin

import common
from common import UserError, datasets, training, write_atomically

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# -------------------------------------------------------------------------------- formats
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
    """In the folder itself, or where torchvision puts it."""
    images = make_data.mnist(tmp_path)
    raw = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    if packed:
        (tmp_path / f"{raw.name}.gz").write_bytes(gzip.compress(raw.read_bytes()))
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
    itself = tmp_path / ("img_align_celeba.zip" if packed else "img_align_celeba")
    assert torch.equal(datasets.load("celeba", itself, 64), loaded)
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


def png_chunk(kind, body, right=True):
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not right))


def test_metadata_never_stops_a_start(tmp_path):
    """Text and colour profiles of megabytes, as image generators write; wrong checksums; segments that are too short;
    EXIF that is none, or cannot be written anew. Pixels count, and are turned upright where it can be known."""
    picture = make_data.pictures(1, 32)[0]
    upright, turned = Image.fromarray(picture), Image.fromarray(np.rot90(picture))
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a cat " * 400_000, zip=True)
    text.add_itxt("workflow", "a dog " * 400_000, zip=True)
    upright.save(tmp_path / "text.png", pnginfo=text)
    upright.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    upright.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    wrong = png_chunk(b"tEXt", b"Comment\0x", right=False)
    (tmp_path / "before.png").write_bytes(plain[:33] + wrong + plain[33:])  # after the 33 bytes of IHDR
    (tmp_path / "after.png").write_bytes(plain[:-12] + wrong + plain[-12:])  # before the 12 of IEND
    (tmp_path / "exif.png").write_bytes(plain[:33] + png_chunk(b"eXIf", b"II*\0", right=False) + plain[33:])
    for name, entries in {"upright.jpg": [], "sideways.jpg": [(0x0112, 3, 1, 6)],
                          "unwritable.jpg": [(0x0112, 3, 1, 6), (0x0100, 9, 1, -5)]}.items():
        exif = b"Exif\0\0II*\0" + struct.pack("<iH", 8, len(entries))
        exif += b"".join(struct.pack("<HHIi", *entry) for entry in entries) + bytes(4)
        (turned if entries else upright).save(tmp_path / name, exif=exif, quality=95)
    upright.save(tmp_path / "none.jpg", exif=b"Exif\0\0this is none", quality=95)
    sideways = (tmp_path / "sideways.jpg").read_bytes()
    for name, segment in (("app0", b"\xff\xe0\0\4JF"), ("app14", b"\xff\xee\0\7Adobe"),
                          ("icc", b"\xff\xe2\0\x0eICC_PROFILE\0")):
        (tmp_path / f"{name}.jpg").write_bytes(sideways[:2] + segment + sideways[2:])
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    turned.save(tmp_path / "turned.png")
    turned_plain = (tmp_path / "turned.png").read_bytes()
    (tmp_path / "turned.png").write_bytes(turned_plain[:33] + png_chunk(b"iTXt", xmp) + turned_plain[33:])
    turned.save(tmp_path / "turned_text.png", pnginfo=text, exif=Image.open(tmp_path / "sideways.jpg").getexif())
    loaded = datasets.load("folder", tmp_path, 32).permute(0, 2, 3, 1).numpy()
    names = sorted(path.name for path in tmp_path.glob("[!.]*.*"))
    assert len(loaded) == len(names) == 15
    for name, image in zip(names, loaded):
        difference = np.abs(image.astype(int) - picture).mean()
        assert difference == 0 if name.endswith("png") else difference < 5, name


def test_run_folders_are_passed_over(tmp_path, capfd):
    """Of whatever training, also in a .zip; a folder with one of the two files alone is none."""
    folder = make_data.image_folder(tmp_path / "photos", 3)
    for name in ("runs/x", "other/run-2"):
        make_data.image_folder(folder / name / "samples", 2)
        (folder / name / "args.json").write_text("{}")
        (folder / name / ("checkpoint.pt" if name == "runs/x" else "generator.pt")).write_text("")
    make_data.image_folder(folder / "runs/x-rays", 1)
    (folder / "runs/x-rays/args.json").write_text("{}")
    assert len(datasets.load("folder", folder, 32)) == 4
    assert "4 images taken; files passed over: 1 .json; run folders passed over: 2\n" in capfd.readouterr().err
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    assert len(datasets.load("folder", packed, 32)) == 4
    assert len(datasets.load("folder", folder / "runs/x/samples", 32)) == 2  # asked for by name
    make_data.image_folder(folder / "runs/x/photos", 5)
    assert len(datasets.load("folder", folder / "runs/x", 32)) == 5  # --run-dir . --run-name . among photos


def test_a_zip_is_its_folder(tmp_path):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    unpacked = datasets.load("folder", tmp_path / "photos_files", 16)
    assert torch.equal(datasets.load("folder", archive, 16), unpacked)
    assert np.array_equal(datasets.load("folder", archive, 32).permute(0, 2, 3, 1).numpy(), make_data.pictures(5))


# ------------------------------------------------------------------------ kinds of images
RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
DEEP = {
    "16.png": (RAMP * 65535).astype(np.uint16), "16.tif": (RAMP * 65535).astype(np.uint16),
    "16.pgm": (RAMP * 65535).astype(np.uint16), "16_in_32.tif": (RAMP * 65535).astype(np.int32),
    "32.tif": (RAMP * (2**31 - 1)).astype(np.int32), "float.tif": RAMP.astype(np.float32)}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_images_are_scaled_by_their_range(tmp_path, name):
    if name.endswith(".pgm"):
        (tmp_path / name).write_bytes(b"P5 32 32 65535\n" + DEEP[name].astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP[name]).save(tmp_path / name)
    loaded = datasets.load("folder", tmp_path, 32)[0].numpy()
    assert np.abs(loaded.astype(int) - (RAMP * 255)).max() <= 1


@pytest.mark.parametrize("values", [RAMP * 255, RAMP - 0.5, RAMP * np.nan])
def test_values_of_no_known_range_are_refused(tmp_path, values):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x.tif \(its grey values are .* 0 to 1 can be scaled\)"):
        datasets.load("folder", tmp_path, 32)


def test_transparency_is_composed_on_white(tmp_path):
    """Left half transparent over black, right half opaque blue (grey for LA)."""
    alpha = np.repeat([[0] * 16 + [255] * 16], 32, 0).astype(np.uint8)
    blue = np.zeros((32, 32, 3), np.uint8)
    blue[:, 16:, 2] = 255
    Image.fromarray(np.dstack([blue, alpha])).save(tmp_path / "1_rgba.png")
    Image.fromarray(np.dstack([blue[..., 2] // 2, alpha])).save(tmp_path / "2_la.png")
    Image.fromarray(blue).save(tmp_path / "3_colour_key.png", transparency=(0, 0, 0))
    palette = Image.fromarray(blue).quantize(2)
    black = palette.getpixel((0, 0))
    palette.save(tmp_path / "4_palette.png", transparency=black)
    palette.save(tmp_path / "5_palette.gif", transparency=black)
    palette.save(tmp_path / "6_palette.png", transparency=bytes(0 if i == black else 255 for i in range(2)))
    loaded = datasets.load("folder", tmp_path, 32)
    assert (loaded[..., :16] == 255).all()
    assert (loaded[[0, 2, 3, 4, 5], :, 0, 20] == torch.tensor([0, 0, 255])).all()
    assert (loaded[1, :, :, 16:] == 127).all()


def test_a_transparent_grey_of_16_bits(tmp_path):
    picture = Image.fromarray(np.repeat([[0] * 16 + [30000] * 16], 32, 0).astype(np.uint16))
    picture.save(tmp_path / "x.png")
    plain = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(plain[:33] + png_chunk(b"tRNS", b"\0\0") + plain[33:])
    loaded = datasets.load("folder", tmp_path, 32)
    assert (loaded[..., :16] == 255).all() and (loaded[..., 16:] == 117).all()


def test_endings(tmp_path, capfd):
    """Every ending that Pillow reads is taken, whatever its case; other files are counted, thumbnails are not."""
    picture = Image.fromarray(make_data.pictures(1)[0])
    for i, (ending, kind) in enumerate({".jfif": "jpeg", ".JPE": "jpeg", ".avif": "avif", ".jp2": "jpeg2000",
                                        ".tga": "tga", ".pbm": "ppm"}.items()):
        (picture.convert("1") if ending == ".pbm" else picture).save(tmp_path / f"{i}{ending}", kind)
    for name in ("a.txt", "b.TXT", "README", "@eaDir/0.jfif/thumbnail.jpg", ".hidden/x.png", "__MACOSX/0.jpe"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    loaded = datasets.load("folder", tmp_path, 32)
    difference = (loaded[:5].int() - torch.from_numpy(np.array(picture)).permute(2, 0, 1)).abs().float()
    assert len(loaded) == 6 and difference.mean() < 10
    assert capfd.readouterr().err.endswith(
        f"{tmp_path}: 6 images taken; files passed over: 2 .txt, 1 without an ending\n")


def test_links_are_followed_once_each(tmp_path):
    elsewhere = make_data.image_folder(tmp_path / "elsewhere", 3)
    folder = make_data.image_folder(tmp_path / "photos", 2, seed=1)
    for name in ("a", "b"):
        (folder / name).symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "one.png").symlink_to(elsewhere / "0000.png")
    assert len(datasets.load("folder", folder, 32)) == 2 + 3 + 1
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(elsewhere)
    assert len(datasets.load("folder", tmp_path / "links", 32)) == 3


def test_entries_of_a_zip(tmp_path):
    """A folder named like an image, two entries of one name, names that begin with ../"""
    data = []
    for picture in make_data.pictures(3):
        data.append(io.BytesIO())
        Image.fromarray(picture).save(data[-1], "png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.mkdir("clip.gif")
        archive.writestr("clip.gif/x.png", data[1].getvalue())
        archive.writestr("../up.png", data[0].getvalue())
        archive.writestr("x.png", data[2].getvalue())
        archive.writestr("x.png", data[0].getvalue())
    loaded = datasets.load("folder", tmp_path / "photos.zip", 32).permute(0, 2, 3, 1)
    assert np.array_equal(loaded, make_data.pictures(3)[[0, 1, 2, 0]])


def peak_memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def test_memory_of_a_huge_image(tmp_path):
    """At most 8 bytes a pixel: Pillow's 4, and the square that is cut out before anything is converted."""
    Image.new("RGB", (8000, 5000), (200, 200, 200)).save(tmp_path / "x.png", compress_level=1)
    results = FORK.Queue()

    def load():
        before = peak_memory()
        datasets.load("folder", tmp_path, 32)
        results.put(peak_memory() - before)

    process = FORK.Process(target=load)
    process.start()
    process.join()
    assert process.exitcode == 0 and results.get(timeout=240) < 8 * 8000 * 5000


def test_a_large_jpeg_is_as_its_small_copy(tmp_path):
    picture = Image.fromarray(make_data.pictures(1, 1024)[0])
    picture.save(tmp_path / "x.jpg", quality=95)
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(datasets.load("folder", tmp_path, 32)[0].permute(1, 2, 0).numpy() - small).mean() < 2


def test_as_many_threads_as_may_run(tmp_path, monkeypatch):
    folder, seen = make_data.image_folder(tmp_path / "photos", 40), set()
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})

    def read(file, crop, size):
        seen.add(threading.get_ident())
        time.sleep(0.01)
        return np.zeros((32, 32, 3))

    monkeypatch.setattr(datasets, "read_image", read)
    datasets.load("folder", folder, 32)
    assert len(seen) == 3


def load_until_stopped(folder):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    datasets.load("folder", folder, 32)


def test_a_stop_while_decoding(tmp_path):
    """SIGTERM ends the process in under two seconds, also in the middle of a large image, and leaves no file."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(np.tile(noise, (10, 10, 1))).save(tmp_path / "0.png", compress_level=0)
    for i in range(1, 50):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    process = FORK.Process(target=load_until_stopped, args=(tmp_path,))
    process.start()
    while not list(tmp_path.glob(".*.tmp")):
        assert process.is_alive()
        time.sleep(0.02)
    time.sleep(0.3)
    start = time.monotonic()
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and time.monotonic() - start < 2
    assert [path.name[-5:] for path in tmp_path.glob(".*")] == ["-lock"]


# --------------------------------------------------------------------------------- caches
def test_decoded_once(tmp_path, monkeypatch):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    first = datasets.load("folder", archive, 32).clone()  # not over the file that is cut below
    cached = list(tmp_path.glob(".photos-32px-*.npy"))
    assert len(cached) == 1
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "decode_to_file", None)
        assert torch.equal(datasets.load("folder", archive, 32), first)
    cached[0].write_bytes(cached[0].read_bytes()[:1000])  # a cache that was cut is decoded anew
    assert torch.equal(datasets.load("folder", archive, 32), first)
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    for junk in (b"junk", buffer.getvalue(), np.zeros((5, 3, 32, 32)), np.zeros(5, np.uint8)):
        if isinstance(junk, bytes):
            cached[0].write_bytes(junk)
        else:
            np.save(cached[0], junk)
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
    assert not list(tmp_path.glob(".photos*.npy")) and list((tmp_path / "cache/gan-reference").glob("*/.photos*.npy"))
    monkeypatch.setattr(datasets, "decode_to_file", None)
    assert len(datasets.load("folder", archive, 32)) == 5


def test_a_second_start_of_20000_images_is_quick(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i in range(20000):
            archive.writestr(f"{i:05d}.png", b"")
    monkeypatch.setattr(datasets, "read_image", lambda file, crop, size: np.zeros((8, 8, 3), np.uint8))
    assert datasets.load("folder", tmp_path / "photos.zip", 8).shape == (20000, 3, 8, 8)
    monkeypatch.setattr(datasets, "decode_to_file", None)
    start = time.process_time()
    images = datasets.load("folder", tmp_path / "photos.zip", 8)
    images[torch.randint(20000, (64,))]
    assert time.process_time() - start < 4  # about one; decoding or reading each would take far longer


def test_two_decoders_with_one_process_id(tmp_path, monkeypatch):
    """As in two containers that share a folder without locks: each writes a file of its own, and both find all."""
    folder = make_data.image_folder(tmp_path / "photos", 4)
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    read, inner = datasets.read_image, []

    def read_and_start_another(file, crop, size):
        monkeypatch.setattr(datasets, "read_image", read)
        inner.append(datasets.load("folder", folder, 32))  # begins after the first has begun, ends before it ends
        return read(file, crop, size)

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(datasets, "read_image", read_and_start_another)
    outer = datasets.load("folder", folder, 32).permute(0, 2, 3, 1)
    assert np.array_equal(outer, make_data.pictures(4)) and torch.equal(inner[0].permute(0, 2, 3, 1), outer)
    assert len(list(folder.glob(".*.npy"))) == 1 and not list(folder.glob(".*.tmp"))


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_text("old")

    def write(path):
        path.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x: .*No space left on device"):
        write_atomically(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", lambda path: path.write_text("new"))
    assert os.read(reader, 10) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    with open(tmp_path / "log", "w") as log, pytest.raises(UserError, match="cannot write /dev/fd/.*the file itself"):
        log.write("old")
        log.flush()
        write_atomically(pathlib.Path(f"/dev/fd/{log.fileno()}"), lambda path: path.write_text("new"))
    assert (tmp_path / "log").read_text() == "old"


def test_a_lock_file_of_another_user(tmp_path, monkeypatch):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    opened = os.open

    def refuse(path, flags, *mode):
        if str(path).endswith("lock") and flags & (os.O_RDWR | os.O_CREAT):  # root may write it
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode)

    (tmp_path / ".photos-32px-lock").touch()
    monkeypatch.setattr(os, "open", refuse)
    assert len(datasets.load("folder", archive, 32)) == 5
    assert list(tmp_path.glob(".photos-32px-*.npy"))


def test_leftovers_of_a_killed_download(tmp_path, monkeypatch, server):
    """They go at the next start after a day, though another process has downloaded the file since."""
    _, file = serve(server, monkeypatch, tmp_path, "cifar10")
    datasets.load("cifar10", tmp_path / "data", 32)
    leftovers = [tmp_path / "data" / f"{file}.{12 * '0'}.tmp{ending}" for ending in ("", f".{32 * '0'}.partial")]
    for leftover in leftovers:
        leftover.touch()
        os.utime(leftover, (time.time() - 90000,) * 2)
    datasets.load("cifar10", tmp_path / "data", 32)
    assert not any(leftover.exists() for leftover in leftovers)


def test_leftovers_of_killed_processes_are_removed_after_a_day(tmp_path):
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)
    datasets.load("folder", archive, 32)
    cached, = tmp_path.glob(".photos-*.npy")
    cached.unlink()
    old, new, mine = (tmp_path / f"{cached.name}.{name}.tmp" for name in (12 * "0", 12 * "1", "mine"))
    for file in (old, new, mine):
        file.touch()
    for file in (old, mine):
        os.utime(file, (time.time() - 90000,) * 2)
    datasets.load("folder", archive, 32)
    assert not old.exists() and new.exists() and mine.exists()


def test_leftovers_that_another_process_has_just_renamed(tmp_path, monkeypatch):
    listed = [tmp_path / f"x.{12 * digit}.tmp" for digit in "01"]  # neither is there any more
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda folder: iter(listed))
    write_atomically(tmp_path / "x", lambda path: path.write_text("new"))
    assert (tmp_path / "x").read_text() == "new"


def test_changed_images_replace_what_was_kept(tmp_path, monkeypatch):
    """The old file goes; those of another size and of another archive stay, also in the cache folder."""
    first, other = (make_data.image_zip(tmp_path / name, 3) for name in ("a [1].zip", "a [1]-32px-x.zip"))
    for writable in (True, False):
        monkeypatch.setattr(os, "access", lambda path, mode, writable=writable: writable)
        datasets.load("folder", first, 32)
        datasets.load("folder", first, 16)
        datasets.load("folder", other, 32)
        make_data.image_zip(first, 4, seed=1 + writable)
        assert len(datasets.load("folder", first, 32)) == 4
        kept = (tmp_path if writable else tmp_path / "cache/gan-reference").rglob(".a*.npy")
        assert sorted(f.name[:-17] for f in kept) == [".a [1]-16px", ".a [1]-32px", ".a [1]-32px-x-32px"]
        for file in tmp_path.glob(".*.npy"):
            file.unlink()


@pytest.mark.parametrize("name", ["[x]*?.zip", "n" * 232 + ".zip", "\N{SNOWMAN}" * 80 + ".zip", "~.zip"])
def test_odd_names(tmp_path, name):
    archive = make_data.image_zip(tmp_path / "x.zip", 3).rename(tmp_path / name)
    assert len(datasets.load("folder", archive, 32)) == 3


def test_the_home_folder(tmp_path, monkeypatch):
    """~ is the home folder, and one that cannot be written does no harm while the data folder can."""
    make_data.image_folder(tmp_path / "photos", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    assert len(datasets.load("folder", "~/photos", 32)) == 3 and list((tmp_path / "photos").glob(".folder-32px-*.npy"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no place for cached data.*XDG_CACHE_HOME"):
        datasets.load("folder", tmp_path / "photos", 16)


def load_as_process(rank, folder, environment, results):
    os.environ.update(environment)
    training.join("gloo")
    decode, decodings = datasets.decode_to_file, []
    datasets.decode_to_file = lambda *args, **kwargs: decodings.append(1) or decode(*args, **kwargs)
    images = datasets.load("folder", folder, 32).numpy().copy()
    results.put((rank, images, len(decodings)))
    torch.distributed.barrier()


def test_two_processes_decode_once(tmp_path):
    folder, results = make_data.image_folder(tmp_path / "photos", 4), FORK.Queue()
    _store, environments = torchrun_environment(2)
    processes = [FORK.Process(target=load_as_process, args=(rank, folder, environments[rank], results))
                 for rank in (1, 0)]
    for process in processes:
        process.start()
    received = sorted((results.get(timeout=240) for _ in processes), key=lambda r: r[0])
    for process in processes:
        process.join()
    assert [decodings for *_, decodings in received] == [1, 0]
    assert all(np.array_equal(images.transpose(0, 2, 3, 1), make_data.pictures(4)) for *_, images, _ in received)


# --------------------------------------------------------------------------------- errors
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
    with pytest.raises(UserError, match="cannot read 1 of 4 images in .*photos.*: 0002.png (.*); mend or") as error:
        datasets.load("folder", source, 32)
    assert not set("\n<>") & set(str(error.value)) and not list(tmp_path.rglob(".*.npy"))


@pytest.mark.parametrize("packed", [False, True])
def test_all_damaged_images_are_named_after_one_pass(tmp_path, packed):
    folder = make_data.image_folder(tmp_path / "photos", 20)
    for i in range(3, 15):
        (folder / f"{i:04d}.png").write_text("no image")
    source = shutil.make_archive(str(folder), "zip", folder) if packed else folder
    with pytest.raises(UserError, match="cannot read 12 of 20 images") as error:
        datasets.load("folder", source, 32)
    assert [f"{i:04d}.png (" in str(error.value) for i in range(20)] == [3 <= i < 13 for i in range(20)]


def test_what_cannot_be_read_in_a_folder_is_named(tmp_path, monkeypatch):
    folder = make_data.image_folder(tmp_path / "photos", 2)
    make_data.image_folder(folder / "locked", 2)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "more").symlink_to(tmp_path / "nowhere")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):  # root may read anything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read 3 files and folders in .*gone.png \(No such file.*locked "
                                        r"\(Permission denied\).*more \(No such file"):
        datasets.load("folder", folder, 32)


def test_files_that_come_and_go(tmp_path, monkeypatch):
    """As those that another job, which trains in this folder, renames and removes while the images are listed."""
    folder, walk = make_data.image_folder(tmp_path / "photos", 2), os.walk
    make_data.image_folder(folder / "run", 1)

    def walk_while_they_go(*given, **named):
        for directory, subfolders, names in walk(*given, **named):
            yield directory, subfolders, [*names, "checkpoint.pt.0123.tmp"]  # renamed since it was listed
            shutil.rmtree(folder / "run", ignore_errors=True)

    monkeypatch.setattr(os, "walk", walk_while_they_go)
    assert len(datasets.load("folder", folder, 32)) == 2 and not (folder / "run").exists()


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_data_that_may_not_be_read(tmp_path, monkeypatch, name):
    """It is said of them, not of the file that was to be written, and no other place is tried."""
    make_data.cifar10(tmp_path)
    archive = make_data.image_zip(tmp_path / "photos.zip", 5)

    def refuse(path, *given, **named):
        if str(path).endswith(("data_batch_2", "photos.zip")) and refusing:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given, **named)

    opened, refusing, decode = open, [], datasets.SOURCES[name]

    def find(root):
        found = decode(root)
        refusing.append(True)
        return found

    monkeypatch.setitem(datasets.SOURCES, name, find)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(UserError, match="cannot read the images: .*Permission denied: .*(data_batch_2|photos.zip)"):
        datasets.load(name, archive if name == "folder" else tmp_path, 32)
    assert not list(tmp_path.rglob("*.npy"))


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


# ------------------------------------------------------------------------------ downloads
@pytest.fixture
def server():
    """A local HTTP server: server.files maps a path to its bytes; server.cut, how many of them it sends; server.pause,
    seconds that it waits after the first 300."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data, cut, pause = self.server.files.get(self.path), self.server.cut, self.server.pause
            if data is None:
                return self.send_error(404)
            self.server.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # torchvision first asks where it is redirected to
                self.wfile.write(data[:cut][:300])
                self.wfile.flush()
                time.sleep(pause)
                self.wfile.write(data[:cut][300:])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cut, server.pause, server.requests = {}, None, 0, []
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
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url + "/"])
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
    assert "\n" not in str(error.value) and not root.exists()  # nothing empty is left
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
    with pytest.raises(UserError, match="failed or cut off, 26 bytes came: File not found or corrupted"):
        datasets.load("cifar10", tmp_path / "data", 32)
    server.files.clear()
    with pytest.raises(UserError, match="failed or cut off, nothing came: HTTP Error 404"):
        datasets.load("cifar10", tmp_path / "data", 32)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name,size", [("cifar10", 32), ("stl10", 96), ("mnist", 28)])
def test_jobs_that_start_at_once(tmp_path, monkeypatch, server, name, size):
    """On an empty folder: one downloads and decodes, slowly, and all have the whole set."""
    images, file = serve(server, monkeypatch, tmp_path, name)
    datasets.load(name, tmp_path / "alone", size)
    alone = len(server.requests)
    server.pause = 0.5
    results = load_at_once(4, name, tmp_path / "data", size)
    assert len(server.requests) == 2 * alone
    assert all(np.array_equal(loaded, results[0]) for loaded in results) and len(results[0]) == len(images)


@pytest.mark.parametrize("name,size", [("cifar10", 32), ("stl10", 96)])
def test_jobs_that_start_at_once_on_an_archive(tmp_path, monkeypatch, server, name, size):
    images, file = serve(server, monkeypatch, tmp_path, name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(server.files.pop("/" + file))
    results = load_at_once(8, name, tmp_path / "data", size)
    assert all(np.array_equal(loaded, results[0]) for loaded in results) and len(results[0]) == len(images)


def load_at_once(count, name, root, size):
    """What processes that begin at the same moment load."""
    results, begin = FORK.Queue(), FORK.Barrier(count)
    processes = [FORK.Process(target=put_loaded, args=(results, begin, name, root, size)) for _ in range(count)]
    for process in processes:
        process.start()
    loaded = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert not any(isinstance(result, str) for result in loaded), loaded
    return loaded


def put_loaded(results, begin, name, root, size):
    """As a process: put what is loaded, or the error in words."""
    begin.wait(60)
    try:
        results.put(datasets.load(name, root, size).numpy().copy())
    except BaseException as error:
        results.put(repr(error))


def test_a_job_killed_while_it_downloads(tmp_path, monkeypatch, server):
    """The one that waits for it downloads in its place; what it left is no data set."""
    images, file = serve(server, monkeypatch, tmp_path, "cifar10")
    server.pause, server.cut = 60, 300
    first = FORK.Process(target=datasets.load, args=("cifar10", tmp_path / "data", 32))
    first.start()
    while not list(tmp_path.glob("data/*.tmp")):
        assert first.is_alive()
        time.sleep(0.01)
    server.pause, server.cut = 0, None
    results = FORK.Queue()
    second = FORK.Process(target=put_loaded, args=(results, FORK.Barrier(1), "cifar10", tmp_path / "data", 32))
    second.start()
    time.sleep(0.2)
    assert results.empty() and not (tmp_path / "data" / file).exists()
    first.kill()
    assert np.array_equal(results.get(timeout=240), images)
    second.join()


def test_a_lock_that_its_holder_removes(tmp_path):
    """As a failed download does with its folder: who waited for it holds a lock that others see."""
    file, seen = tmp_path / "data/.lock", []

    def wait() -> None:
        with common.lock(file, wait=60):
            seen.append(file.exists())
            with pytest.raises(BlockingIOError), common.lock(file, wait=0):
                pass

    with common.lock(file, wait=0):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        common.remove_unused([tmp_path / "data"], file)
        assert not (tmp_path / "data").exists()
    waiting.join(60)
    assert seen == [True]


def test_an_archive_that_is_still_being_copied_stays(tmp_path, monkeypatch, server):
    """It is neither used nor removed nor replaced."""
    images, file = serve(server, monkeypatch, tmp_path, "cifar10")
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / file
    archive.write_bytes(server.files["/" + file][:500])
    with pytest.raises(UserError, match=f"{file} is damaged or cut off: its checksum .* still being copied.*remove it"):
        datasets.load("cifar10", tmp_path / "data", 32)
    assert archive.read_bytes() == server.files["/" + file][:500] and not server.requests
    archive.write_bytes(server.files["/" + file])
    assert np.array_equal(datasets.load("cifar10", tmp_path / "data", 32).numpy(), images)


def test_what_else_lies_in_a_data_folder_stays(tmp_path, monkeypatch, server):
    images, file = serve(server, monkeypatch, tmp_path, "stl10")
    others = [tmp_path / "data/stl10_binary/train_X.bin", tmp_path / "data/stl10_binary/notes/mine.txt"]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
    assert np.array_equal(datasets.load("stl10", tmp_path / "data", 96).numpy(), images.transpose(0, 3, 1, 2))
    assert all(other.read_text() == "mine" for other in others)


def test_an_archive_of_celeba_that_is_still_being_copied_stays(tmp_path, monkeypatch):
    (tmp_path / "img_align_celeba.zip").write_bytes(b"PK half of it")
    monkeypatch.setattr(torchvision.datasets.utils, "download_file_from_google_drive", None)
    with pytest.raises(UserError, match="cannot read .*img_align_celeba.zip: .*still being copied"):
        datasets.load("celeba", tmp_path, 64)
    assert (tmp_path / "img_align_celeba.zip").read_bytes() == b"PK half of it"


def test_a_subset_is_named(tmp_path, capfd):
    make_data.cifar10(tmp_path, batches=2)
    assert len(datasets.load("cifar10", tmp_path, 32)) == 40
    assert "a subset of CIFAR-10, data_batch_1, data_batch_2\n" in capfd.readouterr().err


def test_no_place_for_a_download(tmp_path, monkeypatch):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="cannot download CIFAR10 .*cannot be kept: .*data.*put cifar-10-python.tar.gz"):
        datasets.cifar10(tmp_path / "data")

    def refuse(file, wait):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(datasets, "lock", refuse)
    with pytest.raises(UserError, match="cannot download CIFAR10 .*Permission denied.*put cifar-10-python.tar.gz"):
        datasets.load("cifar10", tmp_path / "other", 32)


@pytest.mark.parametrize("photos", ["photos", "photos.zip"])
def test_photos_without_dataset_folder(tmp_path, photos):
    """--data-dir photos alone asks for CIFAR-10, of which 170 MB would be kept among the photos."""
    make_data.image_zip(tmp_path / "photos.zip", count=1)
    make_data.image_folder(tmp_path / "photos", count=1)
    with pytest.raises(UserError, match="photos.* holds images, and not CIFAR10: .*by --dataset folder"):
        datasets.load("cifar10", tmp_path / photos, 32)


def test_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10_binary.tar.gz")
    with pytest.raises(UserError, match="cannot download STL10 .* no connection.*put stl10_binary.tar.gz into"):
        datasets.load("stl10", tmp_path, 48)


def test_celeba_without_network(tmp_path, monkeypatch):
    """The whole of gdown's message, whose first line says nothing, and no advice to install what is installed."""
    def refuse(*arguments, **settings):
        raise RuntimeError("Failed to retrieve file url:\n\n\tToo many users have viewed it.\n\nOpen it by hand.\n")

    monkeypatch.setattr(torchvision.datasets.utils, "download_file_from_google_drive", refuse)
    for installed in (None, "gdown"):
        monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name, found=installed: found)
        with pytest.raises(UserError, match="CelebA .*Too many users.*img_align_celeba.zip by hand") as error:
            datasets.load("celeba", tmp_path, 64)
        assert ("pip install gdown" in str(error.value)) == (not installed) and "\n" not in str(error.value)


# ----------------------------------------------------------------------- generated images
@pytest.mark.parametrize("name", ["x.npy", "x.png"])
def test_a_generated_file_is_whole_or_not_there(tmp_path, name):
    """What is being written lies beside it; who has mapped the file that it replaces goes on reading that."""
    file = tmp_path / name

    def sample(n):
        assert file.exists() == again and (not again or file.read_bytes() == before)
        return torch.full((n, 3, 8, 8), 7 if again else 3, dtype=torch.uint8)

    again = False
    datasets.write_images(sample, 5, file)
    before, again = file.read_bytes(), True
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    datasets.write_images(sample, 3, file)
    assert mapped[:] == before != file.read_bytes()
    with pytest.raises(ZeroDivisionError):
        datasets.write_images(lambda n: 1 // 0, 3, file)
    with pytest.raises(UserError, match="cannot write"):
        (tmp_path / f"a_{name}").mkdir()
        datasets.write_images(sample, 3, tmp_path / f"a_{name}")
    assert {path.name for path in tmp_path.iterdir()} == {name, f"a_{name}"}
