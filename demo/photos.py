"""Draw what a detector finds in the photographs of demo/photos: demo/1.jpg to 9.jpg, and eight in demo/photos.jpg.

python -m demo.photos --pretrained-model demo/ssdlite_voc.pth
"""

from pathlib import Path

import cv2
import numpy as np

from src import usage
from src.detector import SHOW_THRESHOLD, Detector
from src.images import read_image, save_image
from src.visualize import draw_detections

DEMO = Path(__file__).parent
# Photographs, all in photos/CREDITS.md. The first eight make two rows of equal height.
ROWS = ["street", "kitchen", "dinner", "gull"], ["airplane", "desk", "snowboarder", "hall"]
NAMES = [*ROWS[0], *ROWS[1], "ribbon"]
WIDTH, GAP = 1660, 8  # twice as wide as a page, for high-density screens
SCALE = 510  # type of 17 pixels, legible at half its size


def draw(detector, photo, height):
    """What is found in `photo`, drawn on it at `height` pixels."""
    (found,) = detector([photo], SHOW_THRESHOLD)
    factor = height / photo.shape[0]
    photo = cv2.resize(photo, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return draw_detections(photo, found["boxes"] * factor, found["labels"], found["scores"], detector.classes, SCALE)


def row(detector, photos):
    """Photographs side by side, WIDTH pixels in all."""
    room = WIDTH - GAP * (len(photos) - 1)
    height = round(room / sum(photo.shape[1] / photo.shape[0] for photo in photos))
    blank = np.full((height, GAP, 3), 255, np.uint8)
    parts = [part for photo in photos for part in (blank, draw(detector, photo, height))]
    return cv2.resize(np.hstack(parts[1:]), (WIDTH, height))  # widths were rounded


def main():
    parser = usage.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained-model", default="demo/ssdlite_voc.pth", help="checkpoint")
    detector = Detector.load(parser.parse_args().pretrained_model, "cpu")
    photos = {name: read_image(DEMO / "photos" / f"{name}.jpg") for name in NAMES}
    for n, photo in enumerate(photos.values(), start=1):
        save_image(draw(detector, photo, photo.shape[0]), DEMO / f"{n}.jpg", quality=85)
    upper, lower = (row(detector, [photos[name] for name in names]) for names in ROWS)
    blank = np.full((GAP, WIDTH, 3), 255, np.uint8)
    save_image(np.vstack([upper, blank, lower]), DEMO / "photos.jpg", quality=80)


if __name__ == "__main__":
    usage.run(main)
