"""A short form of tests/benchmarks/soak.py: that a killed run ends as one left alone, and that the soak would see it
if it did not."""
import pytest
import scripts
import soak
from launcher import ROOT

soak.PATIENCE = 240.0  # other tests may run beside


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The soak's folder."""
    folder = tmp_path_factory.mktemp("soak")
    soak.prepare(folder)
    return folder


@scripts.each(*scripts.IMAGES, "gngan_synthetic")
def test_kills(script, shared):
    hits = 0
    for number in range(20):
        new, _, fault = soak.one_try("kill", script.SCRIPT, scripts.model(script), number, 0, shared)
        assert fault is None
        hits += new
        if hits >= 2:
            return
    pytest.fail(f"{hits} kills came in time")


def test_a_run_that_is_altered(shared, tmp_path):
    """One whose draws do not follow from seed and iteration."""
    text = (ROOT / "mmgan_dcgan.py").read_text()
    seeding = "            rng.manual_seed(draw_seed(args.seed, iteration))\n"
    assert text.count(seeding) == 1
    (tmp_path / "altered.py").write_text(text.replace(seeding, ""))
    for number in range(20):
        hits, _, fault = soak.one_try("kill", str(tmp_path / "altered"), "mmgan_dcgan", number, 0, shared)
        assert hits or not fault
        if fault:
            assert fault.startswith("altered: ")
            return
    pytest.fail("not seen")
