"""Detect objects in a video, or in what a camera sees (Ctrl-C ends it).

python test_video.py --pretrained-model trained_models/ssd.pth --input a.mp4 --output b.mp4
python test_video.py --pretrained-model trained_models/ssd.pth --input 0
"""

import contextlib
import itertools
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from tqdm import tqdm

from src import usage
from src.detector import VIDEO_THRESHOLD, Detector, add_options, json_entry
from src.usage import UserError
from src.visualize import draw_detections

# By ending, those to try in turn: not every OpenCV can write H.264.
CODECS = {
    ".mp4": {"avc1": "H.264", "mp4v": "MPEG-4 Part 2, which browsers do not play"},
    ".avi": {"MJPG": "Motion JPEG"},
}

READER = "reader"  # name of the thread that reads frames


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", required=True, help="video file, pipe, address, images as img_%%03d.jpg, or number of a camera")
    add("--output", help="video to write, without sound; default: {stem}_prediction.mp4 beside the input")
    add("--json", help="also write the detections to this file, one line per frame")
    add_options(parser, VIDEO_THRESHOLD)
    return parser.parse_args()


def is_stream(source):
    """True for an address, such as rtsp://camera/1."""
    return re.match(r"\w+://", str(source)) is not None


def name_for_opencv(option, path):
    """A path as OpenCV needs it: in UTF-8, or it crashes; absolute, as FFmpeg takes `a:b` for an address."""
    return usage.utf8(option, path if is_stream(path) else os.path.abspath(path))


def default_output(source):
    """Where the video goes unless --output says it: beside the input; that of a stream, into the current folder."""
    path = Path(source)
    stem = path.stem
    if not path.exists():
        stem = re.sub(r"_?%\d*d", "", stem) or "images"  # without the number of an image
    file = f"{stem}_prediction.mp4"
    return file if is_stream(source) else path.with_name(file)


def open_video(source):
    """The opened video and its first frame (H, W, 3) uint8 BGR, upright."""
    exists = os.path.exists(source)
    reader = cv2.CAP_ANY
    if source.isdecimal() and not exists:
        name = int(source)
        problem = "no such camera"
    elif is_stream(source):
        name = name_for_opencv("--input", source)
        problem = "no video comes from there"
    elif os.path.isdir(source) or not (exists or "%" in source):
        raise UserError(f"--input {source}: no such video file")
    elif exists and not os.access(source, os.R_OK):
        raise UserError(f"--input {source}: may not be read; change its permissions")
    else:
        name = name_for_opencv("--input", source)
        problem = "not a video, or one without frames"
        if Path(source).is_fifo():  # what another reader has tried to read from it would be lost
            reader = cv2.CAP_FFMPEG
    video = cv2.VideoCapture(name, reader)
    ok, frame = video.read()
    if not ok:
        raise UserError(f"--input {source}: {problem}")
    return video, frame


def read_frames(video, first, signals):
    """Yield frames of an opened video, from the `first` to its end or until the list `signals` is not empty.

    They are read ahead in a thread that Python does not wait for: a camera or pipe may send nothing for a long time.
    """
    ahead = queue.Queue(1)

    def read():
        try:
            while (answer := video.read())[0]:
                ahead.put(answer[1])
            ahead.put(None)
        except Exception as error:  # raised below, in the main thread
            ahead.put(error)

    def next_frame():
        while not signals:
            with contextlib.suppress(queue.Empty):
                return ahead.get(timeout=0.2)
        return None

    reader = threading.Thread(target=read, name=READER, daemon=True)
    reader.start()
    frame = first
    while frame is not None:
        yield frame
        frame = next_frame()
        if isinstance(frame, Exception):
            raise frame
    if not signals:
        reader.join()  # it has sent its last frame


def rate_and_length(source, video):
    """Frames per second of an opened video, and how many frames it promises (0: unknown).

    What the container says, unless the frames of a file have other timestamps: a variable rate
    becomes its mean.
    """
    fps = video.get(cv2.CAP_PROP_FPS)
    total = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    times = []
    if os.path.isfile(source):  # cameras and named pipes cannot be read twice
        undecoded = [cv2.CAP_PROP_FORMAT, -1]
        packets = cv2.VideoCapture(name_for_opencv("--input", source), cv2.CAP_FFMPEG, undecoded)
        while packets.grab():
            times.append(packets.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    frames = len(times)
    times = sorted(set(times))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    # Some containers time only some of their packets; a minute without a frame is a jump in time.
    if gaps and len(times) > 0.97 * frames and max(gaps) < 60:
        seconds = times[-1] - times[0]
        steps = frames - 1
        if not abs(fps * seconds - steps) <= 1:  # more than a frame apart
            fps = steps / seconds
            total = frames
    return fps if 0 < fps < 10_000 else 25.0, total


def open_writer(path, fps, frame):
    """A writer of frames like `frame`, made even, `fps` of them per second, and the name of its codec."""
    height, width = even(frame).shape[:2]
    # MPEG-4 divides a second into at most 65535 parts, of which OpenCV makes a power of ten.
    fps = round(fps, int(math.log10(65535 / fps)))
    name = name_for_opencv("--output", path)
    backend = cv2.CAP_FFMPEG if "%" in name else cv2.CAP_ANY  # another takes it for the number of an image
    for code, codec in CODECS[path.suffix.lower()].items():
        writer = cv2.VideoWriter(name, backend, cv2.VideoWriter_fourcc(*code), fps, (width, height))
        if writer.isOpened():
            return writer, codec
    raise UserError(f"--output {path}: cannot be written as a {width}x{height} video")


def even(frame):
    """`frame` (H, W, 3) with its last column or row once more where W or H is odd: OpenCV would leave it out."""
    height, width = frame.shape[:2]
    return cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)


def differences(video, frame):
    """What a viewer of the output may miss, for the last line."""
    height, width = frame.shape[:2]
    notes = ", without sound"
    if height % 2 or width % 2:
        notes += f", {width + width % 2}x{height + height % 2} as sides must be even"
    aspect = [int(video.get(side)) for side in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN)]
    if aspect[0] != aspect[1] and min(aspect) > 0:
        notes += f", with square pixels (the input's are {aspect[0]}:{aspect[1]})"
    return notes


def main():
    """Read, detect, draw, write, frame by frame; no frame is kept longer than that."""
    args = parse_args()
    usage.handle_signals(signal.SIG_DFL, [signal.SIGINT])  # Python's handler would run after the first frame is read
    # Our error lines replace OpenCV's and FFmpeg's messages.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    video, first = open_video(args.input)
    output = Path(args.output or default_output(args.input))
    if output.suffix.lower() not in CODECS:
        raise UserError(f"--output {output}: unknown video type; end it in .mp4 or .avi")
    written = [("--output", args.output or output)]
    if args.json:
        written.append(("--json", args.json))
    usage.prepare_outputs(written, [args.input, args.pretrained_model])
    detector = Detector.load(args.pretrained_model, args.device, args.amp)
    print(f"{args.pretrained_model}: {detector.origin}")
    fps, total = rate_and_length(args.input, video)
    writer, codec = open_writer(output, fps, first)
    notes = differences(video, first)
    signals = []  # received
    usage.handle_signals(lambda number, _: signals.append(number))
    number = 0  # of frames done
    seconds = math.inf
    start = time.perf_counter()
    with contextlib.ExitStack() as outputs:
        outputs.callback(writer.release)
        lines = outputs.enter_context(open(args.json, "w", encoding="utf-8")) if args.json else None
        pool = outputs.enter_context(ThreadPoolExecutor(1))  # writes a frame while the next one is worked on
        writing = pool.submit(lambda: None)
        for frame in tqdm(read_frames(video, first, signals), total=total or None, unit="frame", leave=False):
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            found = detector([image], args.cls_threshold, args.nms_threshold)[0]
            drawn = draw_detections(image, **found, classes=detector.classes)
            writing.result()
            writing = pool.submit(writer.write, even(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)))
            if lines:
                entry = {"frame": number} | json_entry(image, found, detector.classes)
                lines.write(json.dumps(entry) + "\n")
            number += 1
            seconds = time.perf_counter() - start
        writing.result()
    notes += f"; {number / seconds:.1f} frames per second"
    if number < total and not signals:
        notes += f" (the file promises {total}: it seems truncated)"
    print(f"{number} frames -> {output}, {codec}{notes}")


def run():
    """Run `main`, and exit without Python's clean-up if a frame is still awaited: one that came then would abort it."""
    status = 1  # of an error that nobody foresaw
    try:
        usage.run(main)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        with contextlib.suppress(OSError):  # its disk is full
            if sys.stderr:  # not closed
                traceback.print_exc()
    if not any(thread.name == READER for thread in threading.enumerate()):
        sys.exit(status)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
