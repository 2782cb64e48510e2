"""Detect objects in a video, or in what a camera sees (Ctrl-C ends it).

python test_video.py --pretrained-model trained_models/ssd.pth --input a.mp4 --output b.mp4
python test_video.py --pretrained-model trained_models/ssd.pth --input 0
"""

from src import usage

if __name__ == "__main__":
    usage.quit_on_ctrl_c()  # the imports below take seconds

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from tqdm import tqdm

from src.detector import Detector, record
from src.usage import UserError
from src.visualize import draw_detections

CODECS = {".mp4": "mp4v", ".avi": "MJPG"}


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    share = usage.number(float, 0, 1)
    add = parser.add_argument
    add("--input", required=True, help="video file, or number of a camera")
    add("--output", help="video to write; default: {stem}_prediction.mp4 beside the input")
    add("--json", help="also write the detections to this file, a frame a line")
    add("--pretrained-model", required=True, help="checkpoint from train.py, or a published one")
    add("--cls-threshold", type=share, default=0.35, help="lowest score to show")
    add("--nms-threshold", type=share, default=0.5, help="IoU above which a weaker box is removed")
    add("--amp", action="store_true", help="half precision: float16 on a GPU, bfloat16 on a CPU")
    return parser.parse_args()


def open_video(source):
    """The opened video and its first frame (H, W, 3) uint8 BGR."""
    is_camera = source.isdecimal() and not Path(source).exists()
    if not is_camera and not Path(source).is_file():
        raise UserError(f"--input {source}: no such video file")
    video = cv2.VideoCapture(int(source) if is_camera else source)
    ok, frame = video.read()
    if not ok:
        what = "no such camera" if is_camera else "not a video, or one without frames"
        raise UserError(f"--input {source}: {what}")
    return video, frame


def open_writer(path, fps, frame):
    """A writer of frames like `frame`, at the same frame rate."""
    size = (frame.shape[1], frame.shape[0])
    codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path), codec, fps, size)
    if not writer.isOpened():
        raise UserError(f"--output {path}: cannot be written as a {size[0]}x{size[1]} video")
    return writer


def main():
    """Read, detect, draw, write, frame by frame; nothing is kept that grows with the video."""
    args = parse_args()
    video, frame = open_video(args.input)
    default = Path(args.input).with_name(f"{Path(args.input).stem}_prediction.mp4")
    output = Path(args.output or default)
    if output.suffix.lower() not in CODECS:
        raise UserError(f"--output {output}: unknown video type; end it in .mp4 or .avi")
    usage.make_writable("--output", output, [args.input])
    if args.json:
        usage.make_writable("--json", args.json, [args.input])
    detector = Detector.load(args.pretrained_model, amp=args.amp)
    print(f"{args.pretrained_model}: {detector.layout}")
    fps = video.get(cv2.CAP_PROP_FPS)
    writer = open_writer(output, fps if fps > 0 else 25.0, frame)
    lines = open(args.json, "w", encoding="utf-8") if args.json else None
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))
    total = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    bar, number, ok = tqdm(total=total, unit="frame", leave=False), 0, True
    with ThreadPoolExecutor(2) as pool:  # reads the next frame and writes the last meanwhile
        writing = pool.submit(lambda: None)
        while ok and not stopped:
            reading = pool.submit(video.read)
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            found = detector([image], args.cls_threshold, args.nms_threshold)[0]
            drawn = draw_detections(image, **found, classes=detector.classes)
            writing.result()
            writing = pool.submit(writer.write, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            if lines:
                entry = {"frame": number} | record(image, found, detector.classes)
                lines.write(json.dumps(entry) + "\n")
            number += 1
            bar.update()
            ok, frame = reading.result()
        writing.result()
    bar.close()
    writer.release()
    if lines:
        lines.close()
    cut = number < (total or 0) and not stopped
    print(f"{number} frames -> {output}" + f" (the file promises {total}: it seems cut)" * cut)


if __name__ == "__main__":
    usage.run(main)
