"""Draw detections on pictures."""

import colorsys

import cv2
import numpy as np


def class_colour(label):
    """The colour of class `label`, (R, G, B): always the same, far from its neighbours'."""
    hue = label * 0.618034 % 1  # the golden ratio spreads any number of hues evenly
    lightness = (0.5, 0.65, 0.4)[label % 3]
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.9))


def draw_detections(image, boxes, labels, scores, classes):
    """Return a copy of image (H, W, 3) uint8 RGB with boxes (K, 4) xyxy in pixels drawn on it.

    labels (K,) index into `classes`; scores (K,) in [0, 1], or None for ground truth. Lines and
    type scale with the picture; labels stay inside its frame.
    """
    image = np.array(image, order="C")
    height, width = image.shape[:2]
    scale = min(height, width)
    thickness, size = max(1, round(scale / 250)), max(11, round(scale / 30))
    order = range(len(boxes) - 1, -1, -1)  # the best last, on top
    for k in order:
        corners = np.round(np.asarray(boxes[k])).astype(int).reshape(2, 2)
        first, last = corners.clip(0, (width - 1, height - 1)).tolist()  # on the last pixel too
        cv2.rectangle(image, first, last, class_colour(int(labels[k])), thickness)
    for k in order:
        text = classes[int(labels[k])]
        if scores is not None:
            text += f" {float(scores[k]):.2f}"
        draw_label(image, text, boxes[k], class_colour(int(labels[k])), size)
    return image


def draw_label(image, text, box, colour, size):
    """Write `text` on a plate above `box` (4,), in place; inside the box where there is no room."""
    font = cv2.FontFace("sans")  # comes with OpenCV: Latin, Cyrillic, Greek, CJK and more
    height, width = image.shape[:2]
    _, _, text_w, _ = cv2.getTextSize((width, height), text, (0, 0), font, size)
    plate_w, plate_h = text_w + size // 2, round(size * 1.4)
    x = min(max(0, round(float(box[0]))), max(0, width - plate_w))
    y = round(float(box[1])) - plate_h
    if y < 0:
        y = min(max(0, round(float(box[1]))), max(0, height - plate_h))
    cv2.rectangle(image, (x, y), (x + plate_w, y + plate_h), colour, cv2.FILLED)
    # Black where it has the higher contrast: relative luminance above 0.179 (WCAG 2).
    luminance = np.dot((np.array(colour) / 255) ** 2.2, (0.2126, 0.7152, 0.0722))
    ink = (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
    cv2.putText(image, text, (x + size // 4, y + round(size * 1.05)), ink, font, size)
