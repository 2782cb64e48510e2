"""Draw detections on images."""

import colorsys

import cv2
import numpy as np


def class_color(label):
    """The color of class `label`, (R, G, B): always the same, far from its neighbors'."""
    hue = label * 0.618034 % 1  # the golden ratio spreads any number of hues evenly
    lightness = (0.5, 0.65, 0.4)[label % 3]
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.9))


def draw_detections(image, boxes, labels, scores, classes):
    """Return a copy of image (H, W, 3) uint8 RGB with boxes (K, 4) xyxy in pixels drawn on it.

    labels (K,) index into `classes`; scores (K,) in [0, 1], or None for ground truth. Lines and
    type scale with the image; labels stay inside its frame.
    """
    image = np.array(image, order="C")
    height, width = image.shape[:2]
    scale = min(height, width)
    thickness, size = max(1, round(scale / 250)), max(11, round(scale / 30))
    order = range(len(boxes) - 1, -1, -1)  # the best last, on top
    for k in order:
        corners = np.round(np.asarray(boxes[k])).astype(int).reshape(2, 2)
        first, last = corners.clip(0, (width - 1, height - 1)).tolist()  # on the last pixel too
        cv2.rectangle(image, first, last, class_color(int(labels[k])), thickness)
    # OpenCV crashes on half a character, which a checkpoint may hold.
    texts = [classes[int(label)].encode(errors="replace").decode() for label in labels]
    if scores is not None:
        texts = [f"{text} {float(score):.2f}" for text, score in zip(texts, scores, strict=True)]
    plates = place_labels(texts, boxes, size, (width, height))
    for k in order:
        draw_label(image, texts[k], plates[k], class_color(int(labels[k])), size)
    return image


def place_labels(texts, boxes, size, frame):
    """Plates [left, top, right, bottom] for `texts` above their boxes, or inside for want of room.

    One that would cover an earlier one moves down, as long as the frame (width, height) has room.
    """
    (width, height), plates, font = frame, [], cv2.FontFace("sans")
    for text, box in zip(texts, boxes, strict=True):
        _, _, text_w, _ = cv2.getTextSize(frame, text, (0, 0), font, size)
        plate_w, plate_h = text_w + size // 2, round(size * 1.4)
        x = min(max(0, round(float(box[0]))), max(0, width - plate_w))
        y = round(float(box[1])) - plate_h
        if y < 0:
            y = min(max(0, round(float(box[1]))), max(0, height - plate_h))
        free = y
        for left, top, right, bottom in sorted(plates, key=lambda plate: plate[1]):
            if left <= x + plate_w and x <= right and top <= free + plate_h and free <= bottom:
                free = bottom + 1
        y = free if free + plate_h <= height else y
        plates.append((x, y, x + plate_w, y + plate_h))
    return plates


def draw_label(image, text, plate, color, size):
    """Write `text` on a plate [left, top, right, bottom], in place."""
    font = cv2.FontFace("sans")  # comes with OpenCV: Latin, Cyrillic, Greek, CJK and more
    x, y = plate[:2]
    cv2.rectangle(image, plate[:2], plate[2:], color, cv2.FILLED)
    # Black where it has the higher contrast: relative luminance above 0.179 (WCAG 2).
    luminance = np.dot((np.array(color) / 255) ** 2.2, (0.2126, 0.7152, 0.0722))
    ink = (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
    cv2.putText(image, text, (x + size // 4, y + round(size * 1.05)), ink, font, size)
