"""src.visualize: what is drawn, where, in which color."""

import numpy as np
import pytest

from src.visualize import class_color, draw_detections

GRAY = 100
CLASSES = ["background", "dog", "cat", "traffic light"]


def canvas(height=200, width=300):
    return np.full((height, width, 3), GRAY, np.uint8)


def draw(boxes, labels, scores=None, classes=CLASSES, size=(200, 300)):
    return draw_detections(canvas(*size), np.float32(boxes).reshape(-1, 4), labels, scores, classes)


def changed(picture):
    """Where a drawn image differs from the empty canvas, (H, W) bool."""
    return (picture != GRAY).any(axis=2)


def ink(picture, label):
    """Where type is: pixels neither of the canvas nor of the class's color (its edges, too)."""
    return changed(picture) & (picture != class_color(label)).any(axis=2)


def test_no_detections_leave_the_image_as_it_is():
    assert np.array_equal(draw([], [], []), canvas())
    assert np.array_equal(draw([], [], None), canvas())


def test_the_input_is_not_modified():
    image = canvas()
    image.flags.writeable = False
    out = draw_detections(image, np.float32([[20, 50, 90, 120]]), [1], [0.5], CLASSES)
    assert (image == GRAY).all() and changed(out).any()
    assert out.shape == image.shape and out.dtype == np.uint8
    mirrored = draw_detections(image[:, ::-1], [[20, 50, 90, 120]], [1], [0.5], CLASSES)
    assert np.array_equal(mirrored, out)


def test_only_the_edges_of_boxes_and_their_labels_change():
    touched = changed(draw([[100, 100, 200, 160]], [1], [0.87]))
    frame = np.zeros_like(touched)
    frame[98:163, 98:203] = True  # the box and 2 pixels around it
    frame[103:158, 103:198] = False  # but not its inside
    frame[75:100, 98:203] = True  # a label stands above it
    assert not (touched & ~frame).any()


def test_edges_carry_the_classs_color():
    for label in (1, 2, 3):
        out = draw([[100, 100, 200, 160]], [label])
        for edge in (out[160, 100:201], out[100:161, 100], out[100:161, 200]):
            assert (edge == class_color(label)).all()
        assert (out[100, 180:201] == class_color(label)).all()


def lab(colors):
    """CIELAB (N, 3), for D65, of sRGB (N, 3) in 0-255."""
    part = np.float64(colors) / 255
    part = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (part @ np.transpose(to_xyz) / (0.9505, 1, 1.0890)).T
    x, y, z = (np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116) for t in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(p, q):
    """Color difference of CIELAB colors (..., 3): 1 is just visible, 10 seen at a glance (Sharma et al., 2005)."""
    lightness, *ab = np.moveaxis(np.broadcast_arrays(p, q), -1, 0)
    ab = np.array(ab)  # (a and b, the two colors, ...)
    seventh = np.hypot(*ab).mean(axis=0) ** 7
    ab[0] *= 1.5 - 0.5 * np.sqrt(seventh / (seventh + 25**7))
    chroma, hue = np.hypot(*ab), np.degrees(np.arctan2(ab[1], ab[0])) % 360
    turn = (hue[1] - hue[0] + 180) % 360 - 180
    l_mean, c_mean, h_mean = np.mean(lightness, axis=0) - 50, chroma.mean(axis=0), np.radians(hue[0] + turn / 2)
    waves = (1, -0.17, -30), (2, 0.24, 0), (3, 0.32, 6), (4, -0.2, -63)
    t = 1 + sum(height * np.cos(n * h_mean + np.radians(shift)) for n, height, shift in waves)
    l_diff = (lightness[1] - lightness[0]) / (1 + 0.015 * l_mean**2 / np.sqrt(20 + l_mean**2))
    c_diff = (chroma[1] - chroma[0]) / (1 + 0.045 * c_mean)
    h_diff = 2 * np.sqrt(chroma[0] * chroma[1]) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * c_mean * t)
    bend = np.radians(60 * np.exp(-((((np.degrees(h_mean) % 360) - 275) / 25) ** 2)))
    blue = -2 * np.sqrt(c_mean**7 / (c_mean**7 + 25**7)) * np.sin(bend)
    return np.sqrt(l_diff**2 + c_diff**2 + h_diff**2 + blue * c_diff * h_diff)


def test_the_color_difference_is_the_published_one():
    pairs = [  # Sharma et al., table 1: pairs 1, 7, 20, 25 and 32
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ]
    for p, q, published in pairs:
        assert ciede2000(np.float64(p), np.float64(q)) == pytest.approx(published, abs=1e-4)


def test_colors_tell_classes_apart():
    colors = lab([class_color(label) for label in range(1, 81)])  # COCO's labels
    distance = ciede2000(colors[:, None], colors) + 1000 * np.eye(80)
    assert distance[:20, :20].min() > 18  # VOC's; evenly spread hues: 4.6
    assert distance.min() > 9
    black_white_gray = lab([(0, 0, 0), (255, 255, 255), (128, 128, 128)])
    assert ciede2000(colors[:20, None], black_white_gray).min() > 18
    assert class_color(7) == class_color(7) == class_color(87)  # any label has one


def test_each_detection_has_its_own_class_and_score():
    boxes, labels = [[20, 60, 100, 180], [180, 60, 290, 180]], [1, 3]
    both = draw(boxes, labels, [0.9, 0.3])
    alone = [draw(boxes[k : k + 1], labels[k : k + 1], [(0.9, 0.3)[k]]) for k in range(2)]
    assert np.array_equal(both[:, :150], alone[0][:, :150])
    assert np.array_equal(both[:, 150:], alone[1][:, 150:])
    assert not np.array_equal(draw(boxes, labels, [0.9, 0.4]), both)


def test_without_scores_only_names_are_written():
    box = [[100, 100, 200, 160]]
    name, scored = draw(box, [1]), draw(box, [1], [0.5])
    assert 0 < ink(name, 1).sum() < ink(scored, 1).sum()
    assert np.array_equal(draw(box, [1], [0.5], ["", ""]), draw(box, [1], None, ["", " 0.50"]))


def test_the_best_detection_is_drawn_on_top():
    boxes = [[50, 50, 150, 150]] * 2
    out = draw(boxes, [1, 2], [0.9, 0.2])
    assert (out[150, 50:151] == class_color(1)).all()


def borders(height, width, side):
    """A box at each corner and border of a image, and one that fills it."""
    xs, ys = [(0, side), (width - side, width)], [(0, side), (height - side, height)]
    xs, ys = [*xs, (width // 2, width // 2 + side)], [*ys, (height // 2, height // 2 + side)]
    boxes = [(x1, y1, x2, y2) for x1, x2 in xs for y1, y2 in ys]
    return [*boxes, (0, 0, width, height), (width - 1, height - 1, width, height)]


@pytest.mark.parametrize("size", [(60, 90), (200, 300), (300, 200), (1500, 1100)])
def test_a_labels_type_is_whole_at_every_border(size):
    height, width = size
    classes = ["background", "dog"]
    whole = ink(draw([[width // 10, height // 2, width, height]], [1], None, classes, size), 1)
    assert whole.sum() > 20
    for box in borders(height, width, min(height, width) // 5):
        type_ = ink(draw([box], [1], None, classes, size), 1)
        assert type_.sum() == whole.sum(), box
        # Room for the plate on every side of the type: it does not touch the frame.
        assert not (type_[0].any() or type_[-1].any() or type_[:, 0].any() or type_[:, -1].any())


@pytest.mark.parametrize(
    "boxes",
    [
        [[100, 60, 200, 160]] * 3,
        [[100, 60, 200, 160], [110, 65, 190, 150], [60, 50, 150, 120]],
        [[0, 0, 250, 190], [3, 3, 240, 180], [10, 8, 100, 100]],  # no room above
        [[100, 60, 200, 160], [100, 90, 200, 160], [100, 75, 200, 160]],  # between two others
    ],
)
def test_labels_do_not_cover_one_another(boxes):
    labels = [1, 2, 3]
    alone = sum(ink(draw([box], [k]), k).sum() for box, k in zip(boxes, labels, strict=True))
    out = draw(boxes, labels)
    colors = [(out == class_color(label)).all(axis=2) for label in labels]
    assert (changed(out) & ~np.any(colors, axis=0)).sum() == alone


def test_labels_without_room_stay_in_the_image():
    out = draw([[10, 20, 60, 38]] * 9, [1] * 9, None, CLASSES, (40, 70))
    assert np.array_equal(out, draw([[10, 20, 60, 38]] * 3, [1] * 3, None, CLASSES, (40, 70)))


@pytest.mark.parametrize("size", [(1, 1), (20, 20), (8, 300), (300, 8)])
def test_tiny_images_are_drawn_on(size):
    for box in borders(*size, 5):
        out = draw([box], [1], [0.5], CLASSES, size)
        assert out.shape == (*size, 3) and changed(out).any()


def test_type_stays_inside_a_tiny_image_from_top_to_bottom():
    # A name of one letter fits into 20 x 20 pixels, wherever its box is.
    whole = ink(draw([[5, 18, 20, 20]], [1], None, ["", "x"], (20, 20)), 1)
    assert whole.any()
    for box in borders(20, 20, 6):
        assert ink(draw([box], [1], None, ["", "x"], (20, 20)), 1).sum() == whole.sum()


def test_lines_and_type_scale_with_the_image():
    heights = []
    for scale in (1, 4):
        size = (300 * scale, 300 * scale)
        out = draw([np.float32([60, 150, 240, 270]) * scale], [1], None, CLASSES, size)
        rows = ink(out, 1).any(axis=1)
        line = (out[:, 200 * scale] == class_color(1)).all(axis=1)
        heights.append((rows.sum(), line[200 * scale :].sum()))
    (small_type, small_line), (large_type, large_line) = heights
    assert 3 * small_type < large_type < 5 * small_type
    assert 3 * small_line <= large_line <= 8 * small_line  # OpenCV draws 5 as 7 pixels


def test_lines_and_type_of_a_larger_image_on_a_small_one():
    box, large = np.float32([[60, 150, 240, 270]]), canvas(600, 600)
    small = draw_detections(canvas(300, 300), box, [1], None, CLASSES, scale=600)
    alike = draw_detections(large, box, [1], None, CLASSES)
    assert np.array_equal(small, alike[:300, :300])


@pytest.mark.parametrize("a, b", [("人", "狗"), ("ж", "я"), ("ك", "ق"), ("é", "ü"), ("犬", "猫"), ("개", "말")])
def test_names_in_other_scripts_are_written_not_replaced_by_question_marks(a, b):
    box = [[100, 100, 200, 160]]
    drawn = {name: draw(box, [1], None, ["", name]) for name in (a, b, "?", "�", " ")}
    for other in (b, "?", "�", " "):
        assert not np.array_equal(drawn[a], drawn[other])
    for other in ("?", "�", " "):
        assert not np.array_equal(drawn[b], drawn[other])


def test_half_a_character_is_drawn_as_a_question_mark():
    box = [[100, 100, 200, 160]]
    for name in ("Caf\udce9", "Caf\ud83d"):  # OpenCV crashes on them
        assert np.array_equal(draw(box, [1], None, ["", name]), draw(box, [1], None, ["", "Caf?"]))


def luminance(color):
    """Relative luminance of WCAG 2.1, of sRGB (R, G, B) in 0-255."""
    part = np.float64(color) / 255
    part = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return part @ (0.2126, 0.7152, 0.0722)


def test_type_can_be_read_on_its_plate():
    for label in range(1, 81):
        out = draw([[5, 100, 590, 590]], [label], None, [""] * label + ["III"], (600, 600))
        plate = luminance(class_color(label))
        inks = luminance(out[ink(out, label)])
        contrast = (np.maximum(inks, plate) + 0.05) / (np.minimum(inks, plate) + 0.05)
        assert contrast.max() > 4.5, label  # WCAG's level AA


def test_boxes_may_be_tensors_or_arrays_or_lists():
    torch = pytest.importorskip("torch")
    boxes, labels, scores = [[100.4, 99.6, 200, 160]], [1], [0.5]
    expected = draw(boxes, labels, scores)
    tensors = [torch.tensor(values) for values in (boxes, labels, scores)]
    assert np.array_equal(draw_detections(canvas(), *tensors, CLASSES), expected)
    assert (expected[100, 180:200] == class_color(1)).all()  # rounded, not cut off
