"""Draw detections on images."""

import cv2
import numpy as np

# Eighty colors, neither dark nor pale. The first twenty are at least 18 apart (CIEDE2000) and as far
# from black, white and gray; each later one is as far as possible from all before it.
PALETTE = bytes.fromhex(
    """
    d20069 0ff03c ffb40f c35a00 00c3ff 961eff ff002d 00f0d2 ffa578 3c783c 9678c3 0069e1 ffb4ff d2d200 ff2de1 00a587
    87691e 87961e ff96a5 87a5ff c3e1a5 00a52d c37869 b4965a 0087b4 964b96 a54b3c c36996 5af0ff f0d296 00a5b4 e1871e
    ff4b78 1ed287 87c31e ff692d 695ab4 b4a5e1 87b478 7878ff d287ff b4b469 0096ff ff78c3 c3a500 964b69 d2003c d22d00
    69781e b45aff b4f000 a5784b 3c4bff 5ac3b4 ff8778 e100a5 c387c3 6978b4 008778 965a2d ffd200 c35a69 5a9669 b47800
    e1e187 c31ed2 d2875a 3c8700 87f096 ffb469 a58700 87c3ff 87874b d2960f 00c300 ff3ca5 ffa5d2 87e1b4 965ac3 d25a3c
    """
)


def class_color(label):
    """The color of class `label`, (R, G, B): always the same, and unlike those of other classes."""
    k = 3 * (label - 1) % len(PALETTE)
    return tuple(PALETTE[k : k + 3])


def takes_black_text(color):
    """True if black has a higher contrast than white on a color (R, G, B) of 0 to 255."""
    luminance = np.dot((np.array(color) / 255) ** 2.2, (0.2126, 0.7152, 0.0722))
    return luminance > 0.179  # WCAG 2


def draw_detections(image, boxes, labels, scores, classes, scale=None):
    """Return a copy of image (H, W, 3) uint8 RGB with boxes (K, 4) xyxy in pixels drawn on it.

    labels (K,) index into `classes`; scores (K,) in [0, 1], or None for ground truth. Labels stay
    inside the frame. Lines and type suit an image of side `scale`: by default this one's shorter.
    """
    image = np.array(image, order="C")
    height, width = image.shape[:2]
    scale = scale or min(height, width)
    thickness = max(1, round(scale / 250))
    size = max(11, round(scale / 30))
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
    """Plates [left, top, right, bottom] for `texts` above their boxes, or inside where there is no room above.

    One that would cover an earlier one moves down, if it still fits into the frame (width, height).
    """
    width, height = frame
    font = cv2.FontFace("sans")
    plates = []
    for text, box in zip(texts, boxes, strict=True):
        _, _, text_w, _ = cv2.getTextSize(frame, text, (0, 0), font, size)
        plate_w = text_w + size // 2
        plate_h = round(size * 1.4)
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
    ink = (0, 0, 0) if takes_black_text(color) else (255, 255, 255)
    cv2.putText(image, text, (x + size // 4, y + round(size * 1.05)), ink, font, size)
