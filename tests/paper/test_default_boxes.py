"""Default boxes: SSD section 2.2, "Choosing scales and aspect ratios for default boxes", eq. 4.

The boxes per cell are those of section 3.1, the maps those of figure 2, SSDLite's those of MobileNetV2 section 6.2.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from src.boxes import make_default_boxes

# Cells along each side of each map, and default boxes per cell.
MAPS = {"ssd": ((38, 19, 10, 5, 3, 1), (4, 6, 6, 6, 4, 4)), "ssdlite": ((19, 10, 5, 3, 2, 1), (6, 6, 6, 6, 6, 6))}


@pytest.mark.parametrize("name, total", [("ssd", 8732), ("ssdlite", 3000)])
def test_ssd300_has_8732_default_boxes_and_ssdlite_3000(name, total):
    # Figure 2: "Detections: 8732 per Class". Each cell of a map is the center of k boxes.
    boxes = make_default_boxes(name)
    assert boxes.shape == (total, 4)
    counts = [cells * cells * k for cells, k in zip(*MAPS[name], strict=True)]
    if name == "ssd":
        assert counts == [5776, 2166, 600, 150, 36, 4]
    for part, cells, k in zip(boxes.split(counts), *MAPS[name], strict=True):
        centers, repeats = part[:, :2].unique(dim=0, return_counts=True)
        assert len(centers) == cells * cells
        assert (repeats == k).all()


@pytest.mark.parametrize(
    "name, start, cells, row, column, center, size, next_size",
    [("ssd", 5776, 19, 3, 5, (5.5 * 16, 3.5 * 16), 45, 99), ("ssdlite", 2766, 5, 1, 4, (4.5 * 64, 1.5 * 64), 150, 195)],
)
def test_shapes_in_a_cell_follow_from_scale_and_aspect_ratio(name, start, cells, row, column, center, size, next_size):
    # Eq. 4: s_k = s_min + (s_max - s_min) (k - 1) / (m - 1). SSDLite has s_min = 0.2, s_max = 0.95 and m = 6; this is
    # its third map. SSD300 on COCO (section 3.4): 0.07 for the first map, then eq. 4 from 0.15 to 0.9 with m = 5, in
    # whole percent as in the paper's code; this is its second map.
    if name == "ssdlite":
        scales = [0.2 + (0.95 - 0.2) * (k - 1) / (6 - 1) for k in (3, 4)]
    else:
        scales = [0.15 + math.floor(100 * (0.9 - 0.15) / (5 - 1)) / 100 * (k - 1) for k in (1, 2)]
    assert (size, next_size) == pytest.approx([300 * scale for scale in scales])
    # The paper's text has centers at (i + 0.5) / |f_k|; here, as in its code, they are at (i + 0.5) steps.
    # For aspect ratio a: w = s_k sqrt(a), h = s_k / sqrt(a); and a second square, s'_k = sqrt(s_k s_k+1).
    shapes = [(size, size), (math.sqrt(size * next_size), math.sqrt(size * next_size))]
    for a in (2, 1 / 2, 3, 1 / 3):
        shapes.append((size * math.sqrt(a), size / math.sqrt(a)))
    if name == "ssd":
        assert shapes[2] == pytest.approx((63.6396, 31.8198), abs=1e-4)
        assert shapes[5] == pytest.approx((25.9808, 77.9423), abs=1e-4)
    index = [start + shape * cells**2 + row * cells + column for shape in range(6)]
    expected = torch.tensor([(*center, *shape) for shape in shapes]) / 300
    assert_close(make_default_boxes(name)[index], expected, rtol=0, atol=1e-6)
