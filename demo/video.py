"""Draw a clip of moving shapes, or an animated GIF of what a detector finds in it.

python -m demo.video --output moving.avi
python -m demo.video --output demo/video.gif --pretrained-model demo/ssdlite_shapes.pth
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from shapely import affinity

from demo import shapes
from src import usage
from src.detector import Detector
from src.usage import UserError
from src.visualize import draw_detections

WIDTH, HEIGHT, FRAMES, RATE = 640, 480, 60, 12  # RATE: frames per second
GROUND = (120, 125, 130)
ROOM = 50  # pixels that a shape moves away from where it starts


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help=".avi: the clip; .gif: the clip with detections")
    parser.add_argument("--pretrained-model", default="demo/ssdlite_shapes.pth", help="checkpoint, for .gif")
    parser.add_argument("--seed", type=usage.number(int, 0), default=0)
    return parser.parse_args()


def moving_shapes(rng):
    """Frames (HEIGHT, WIDTH, 3) uint8 RGB: one shape of each class, moving and turning; the last leads to the first."""
    ground = shapes.surface(rng, HEIGHT, WIDTH, GROUND, 0)
    things = []
    for n, (category, name) in enumerate(shapes.CATEGORIES.items()):
        shape = shapes.place_shape(rng, name, rng.uniform(120, 180), 0, 0)
        color = shapes.fill_color(rng, category, np.array([GROUND], float))
        home = np.array([WIDTH * (n % 3 + 0.5) / 3, HEIGHT * (n // 3 + 0.5) / 2])
        things.append((shape, color, home, rng.uniform(0, 2 * np.pi, 2), rng.choice([-1, 1])))
    for way in np.linspace(0, 2 * np.pi, FRAMES, endpoint=False):
        canvas = ground.copy()
        for shape, color, home, phase, turn in things:
            # Each stays near its home: they meet, but none hides another, and labels keep apart.
            place = home + ROOM * np.sin(way + phase)
            moved = affinity.rotate(shape, turn * way, origin=(0, 0), use_radians=True)
            mask = shapes.mask_of(affinity.translate(moved, *place), 0, 0, WIDTH, HEIGHT)[..., None]
            canvas += mask * (color - canvas)
        yield canvas.clip(0, 255).astype(np.uint8)


def write_gif(path, frames, detector):
    """Draw what `detector` finds in each frame, and save an animation."""
    drawn = []
    for frame in frames:
        found = detector([frame], score_threshold=0.5)[0]
        drawn.append(Image.fromarray(draw_detections(frame, **found, classes=detector.classes)))
    # One palette for all: what stands still keeps its color, and costs no bytes.
    some = Image.fromarray(np.hstack(drawn[:: len(drawn) // 6]))
    palette = some.quantize(256, Image.Quantize.MEDIANCUT)
    drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in drawn]
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=1000 / RATE, loop=0)


def main():
    args = parse_args()
    ending = Path(args.output).suffix.lower()
    if ending not in (".avi", ".gif"):
        raise UserError(f"--output {args.output}: end it in .avi or .gif")
    usage.prepare_outputs([("--output", args.output)], filter(None, [args.pretrained_model]))
    frames = moving_shapes(np.random.default_rng(args.seed))
    if ending == ".gif":
        write_gif(args.output, frames, Detector.load(args.pretrained_model, "cpu"))
        return
    video = cv2.VideoWriter(usage.utf8("--output", args.output), cv2.VideoWriter.fourcc(*"MJPG"), RATE, (WIDTH, HEIGHT))
    if not video.isOpened():
        raise UserError(f"--output {args.output}: OpenCV cannot write it")
    for frame in frames:
        video.write(frame[:, :, ::-1])
    video.release()


if __name__ == "__main__":
    usage.run(main)
