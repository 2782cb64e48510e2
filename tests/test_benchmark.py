"""tools/benchmark.py: what it times is like the real thing."""

from src.detector import Detector
from tools import benchmark


def test_random_weights_score_drawn_images_like_trained_ones():
    network = benchmark.network_of("ssdlite", "cpu")
    found = Detector(network, "ssdlite", benchmark.NAMES, benchmark.IDS, "cpu")(benchmark.drawn_images(4))
    assert 200 < sum(len(one["scores"]) for one in found) < 800
    largest = max(weights.abs().max() for weights in network.state_dict().values())
    assert largest < 100  # float16 ends at 65,504
