"""Small data sets in the official formats, made up."""
import pickle
import zipfile

import numpy as np
import torch
from PIL import Image


def pictures(count, size=32, seed=0, channels=3):
    """Random discs on random backgrounds, uint8 [count, size, size, channels]."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, size)
    x, y, r = rng.uniform(-0.5, 0.5, (3, count, 1, 1))
    inside = (axis[:, None] - y) ** 2 + (axis[None] - x) ** 2 < (r + 0.8) ** 2 / 2
    colours = rng.integers(0, 256, (2, count, 1, 1, channels))
    return np.where(inside[..., None], colours[0], colours[1]).astype(np.uint8)


def image_folder(folder, count=40, size=32, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pictures(count, size, seed)):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def image_zip(path, count=40, size=32, seed=0):
    folder = image_folder(path.parent / f"{path.stem}_files", count, size, seed)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"images/{file.name}")
    return path


def cifar10(root, count=20, batches=2):
    """cifar-10-batches-py with `batches` files of `count` images; the images, uint8 [N, 3, 32, 32]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = pictures(count * batches).transpose(0, 3, 1, 2)
    for i in range(batches):
        part = images[i * count : (i + 1) * count].reshape(count, -1)
        contents = {b"data": part, b"labels": [0] * count, b"batch_label": b"made up", b"filenames": [b"x"] * count}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(contents, protocol=2))
    return images


def stl10(root, count=20):
    """stl10_binary/unlabeled_X.bin; the images, uint8 [N, 96, 96, 3]."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = pictures(count, 96)
    (folder / "unlabeled_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    return images


def mnist(root, count=20):
    """MNIST/raw/train-images-idx3-ubyte; the images, uint8 [N, 28, 28]."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = pictures(count, 28, channels=1)[..., 0]
    header = np.array([0x803, count, 28, 28], ">i4").tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    return images


def celeba(root, count=20):
    """img_align_celeba with JPEGs of 178x218; as Pillow decodes them, uint8 [N, 218, 178, 3]."""
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    decoded = []
    for i, image in enumerate(pictures(count, 218)):
        path = folder / f"{i + 1:06d}.jpg"
        Image.fromarray(image[:, 20:198]).save(path, quality=95)
        decoded.append(np.asarray(Image.open(path)))
    return np.stack(decoded)


def inception_weights(path):
    """torch-fidelity's Inception with random weights, in the format of the released file."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **kwargs):
            return None

    released, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *a, **k: {}
    try:
        torch.manual_seed(0)
        torch.save(Untrained("untrained", ["2048"]).state_dict(), path)
    finally:
        module.load_state_dict_from_url = released
    return path


class Images(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]
