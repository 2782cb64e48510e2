"""Draw a clip of moving shapes, and make an animated GIF of a video.

python -m demo.video --output moving.avi
python test_video.py --pretrained-model demo/ssdlite_shapes.pth --input moving.avi --output b.mp4
python -m demo.video --input b.mp4 --output demo/video.gif
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from shapely import affinity

from demo import shapes
from src import usage
from src.usage import UserError

WIDTH, HEIGHT, FRAMES, RATE = 320, 240, 30, 6  # RATE: frames a second


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", help="video to make a GIF of; without it a clip is drawn")
    parser.add_argument("--output", required=True, help=".avi, or with --input .gif")
    parser.add_argument("--seed", type=usage.number(int, 0), default=0)
    return parser.parse_args()


def bounce(start, speed, time, low, high):
    """Where something is that moves between `low` and `high` and turns back there."""
    way = (start - low + speed * time) % (2 * (high - low))
    return low + min(way, 2 * (high - low) - way)


def moving_shapes(rng):
    """Frames (HEIGHT, WIDTH, 3) uint8 RGB: one shape of each class, moving and turning."""
    ground = shapes.surface(rng, HEIGHT, WIDTH, (120, 125, 130), 0)
    things = []
    for n, (category, name) in enumerate(shapes.CATEGORIES.items()):
        size = rng.uniform(60, 100)
        shape = shapes.place_shape(rng, name, size, 0, 0)
        colour = shapes.fill_colour(rng, category, np.array([(120.0, 125.0, 130.0)]))
        start = WIDTH * (n % 3 + 0.5) / 3, HEIGHT * (n // 3 + 0.5) / 2
        things.append((shape, size / 2, colour, start, rng.uniform(-7, 7, 3)))
    for time in range(FRAMES):
        canvas = ground.copy()
        for shape, half, colour, start, (right, down, turn) in things:
            x = bounce(start[0], right, time, half, WIDTH - half)
            y = bounce(start[1], down, time, half, HEIGHT - half)
            moved = affinity.translate(affinity.rotate(shape, turn * time, origin=(0, 0)), x, y)
            mask = shapes.mask_of(moved, 0, 0, WIDTH, HEIGHT)[..., None]
            canvas += mask * (colour - canvas)
        yield canvas.clip(0, 255).astype(np.uint8)


def main():
    """Draw the clip, or make the GIF."""
    args = parse_args()
    ending = ".gif" if args.input else ".avi"
    if Path(args.output).suffix.lower() != ending:
        raise UserError(f"--output {args.output}: end it in {ending}")
    usage.make_writable("--output", args.output, [args.input] if args.input else [])
    if args.input:
        video, frames = cv2.VideoCapture(args.input), []
        while (frame := video.read()[1]) is not None:
            if frames:  # what has hardly changed, and the codec's noise, costs no bytes
                still = cv2.absdiff(frame, frames[-1]).max(axis=2) < 24
                frame[still] = frames[-1][still]
            frames.append(frame)
        if not frames:
            raise UserError(f"--input {args.input}: no video can be read from it")
        frames = [frame[:, :, ::-1] for frame in frames]
        # One palette for all: what stands still keeps its colour.
        some = Image.fromarray(np.hstack(frames[:: len(frames) // 4 + 1]))
        palette = some.quantize(96, Image.Quantize.MAXCOVERAGE)
        pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        duration = 1000 / (video.get(cv2.CAP_PROP_FPS) or RATE)  # ms a frame
        pictures[0].save(args.output, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    else:
        kind = cv2.VideoWriter.fourcc(*"MJPG")
        video = cv2.VideoWriter(args.output, kind, RATE, (WIDTH, HEIGHT))
        if not video.isOpened():
            raise UserError(f"--output {args.output}: OpenCV cannot write it")
        for frame in moving_shapes(np.random.default_rng(args.seed)):
            video.write(frame[:, :, ::-1])
        video.release()


if __name__ == "__main__":
    usage.run(main)
