"""Small runs of the image scripts, and what they leave."""
import make_data
import torch
from compare import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = ["--width", "0.03125", "--batch-size", "8", "--latent-dim", "8", "--eval-every", "0"]
# of two runs that must agree, what may differ
UNLIKE = ("seconds", "images_per_second", "args/run_dir", "args/run_name", "args/iterations", "args/log_every",
          "args/sample_every", "args/checkpoint_every", "args/eval_every", "args/num_real", "args/num_fake")


def photos(folder, count=40, seed=0):
    """A .zip of pictures."""
    return make_data.image_zip(folder / "photos.zip", count, seed=seed)


def arguments(data, folder, name, *more):
    """The command line of a tiny run on the images in `data`."""
    return ["--dataset", "folder", "--data-dir", data, *TINY, "--run-dir", folder, "--run-name", name, *more]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same_checkpoints(a, b, but=UNLIKE):
    assert_same(checkpoint(a), checkpoint(b), but=but)


def events(folder):
    """The TensorBoard events of a run folder."""
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return events(folder).Scalars(tag)
