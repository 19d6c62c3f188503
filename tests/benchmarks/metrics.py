"""All scores by common.metrics beside torch-fidelity's calculate_metrics: the same images, the same weights, one run.

    python tests/benchmarks/metrics.py --num-real 10000 --num-fake 5000

The weights are random and the images noise: neither changes the time (that the scores agree on images that differ is
tested in test_metrics.py).
"""
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]
import make_data
import torch
import torch_fidelity
import tyro

from common import metrics


def main(num_real: int = 10000, num_fake: int = 5000, size: int = 32):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = [torch.from_numpy(make_data.pictures(n, size, seed)).permute(0, 3, 1, 2).contiguous()
              for seed, n in enumerate((num_real, num_fake))]
    with tempfile.TemporaryDirectory() as folder:
        weights = make_data.inception_weights(pathlib.Path(folder) / "inception.pth")
        metrics.cache_folder = lambda: pathlib.Path(folder)
        begin = time.perf_counter()
        evaluator = metrics.Evaluator(images[0], num_real, str(weights), device)
        middle = time.perf_counter()
        position = 0

        def sample(n):
            nonlocal position
            position += n
            return images[1][position - n : position]

        ours = evaluator.score(sample, num_fake)
        end = time.perf_counter()
        print(f"common.metrics: {end - begin:.1f} s (real {middle - begin:.1f}, generated {end - middle:.1f}); "
              f"FID {ours['fid']:.6f}, IS {ours['is_mean']:.6f}", flush=True)
        begin = time.perf_counter()
        theirs = torch_fidelity.calculate_metrics(
            input1=make_data.Images(images[1]), input2=make_data.Images(images[0]), fid=True, isc=True,
            kid=True, prc=True, kid_subset_size=min(1000, num_real, num_fake), cuda=device.type == "cuda",
            verbose=False, cache=False, feature_extractor="inception-v3-compat", feature_layer_prc="2048",
            feature_extractor_weights_path=str(weights))
        fid = theirs["frechet_inception_distance"]
        print(f"torch-fidelity: {time.perf_counter() - begin:.1f} s; FID {fid:.6f}, "
              f"IS {theirs['inception_score_mean']:.6f}; FIDs differ by {abs(ours['fid'] - fid):.1e}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
