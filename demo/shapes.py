"""Synthetic detection data in COCO's layout: rotated, overlapping shapes on cluttered ground.

    python -m demo.shapes FOLDER --train 400 --val 100 --seed 0

writes FOLDER/annotations/instances_{train,val}2017.json and FOLDER/{train,val}2017/*.jpg. Like
COCO it has gaps in the category ids, images without objects, crowd regions and masks of what is
visible. Coordinates are float pixels: the pixel in column i, row j covers [i, i+1) x [j, j+1).
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import shapely
from pycocotools import mask as coco_mask
from shapely import affinity

from src.usage import ArgumentParser, UserError, number, run

# Ids with gaps, listed unsorted: no program may assume that ids count up from 1.
CATEGORIES = {21: "circle", 3: "square", 40: "triangle", 8: "star", 22: "cross", 7: "ring"}
MIN_VISIBLE = 0.7  # of an object's whole outline: they overlap, but none hides another
CONTRAST = 110.0  # RGB distance of a fill from what it lies on or touches, before light and noise
FINE = 4  # masks are drawn this many times larger, then averaged


class Item(NamedTuple):
    """An object (one part) or a crowd (many): category id, parts bottom to top, their union."""

    category: int
    parts: list
    outline: shapely.Geometry


@functools.cache
def outline_of(name):
    """Polygon of a shape about the origin, of no particular size."""
    circle = shapely.Point(0, 0).buffer(1, quad_segs=16)
    if name in ("circle", "ring"):
        return circle if name == "circle" else circle - affinity.scale(circle, 0.55, 0.55)
    if name == "cross":
        return shapely.box(-3, -1, 3, 1) | shapely.box(-1, -3, 1, 3)
    corners = {"square": 4, "triangle": 3, "star": 10}[name]
    radius = np.where(np.arange(corners) % 2, 0.42 if name == "star" else 1, 1)
    turn = np.arange(corners) * 2 * np.pi / corners
    return shapely.Polygon(np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1))


def place_shape(rng, name, size, x, y):
    """Polygon of a shape, turned and stretched at random; box centered on (x, y), `size` px long."""
    shape = affinity.rotate(outline_of(name), rng.uniform(0, 360), origin=(0, 0))
    shape = affinity.scale(shape, rng.uniform(0.75, 1), origin=(0, 0))
    shape = affinity.rotate(shape, rng.uniform(0, 360), origin=(0, 0))
    x1, y1, x2, y2 = shape.bounds
    k = size / max(x2 - x1, y2 - y1)
    shift = x - k * (x1 + x2) / 2, y - k * (y1 + y2) / 2
    return affinity.affine_transform(shape, [k, 0, 0, k, *shift])


def draw_item(rng, width, height, crowd):
    """Random Item: a shape of 10-70 % of the shorter side, or a crowd."""
    category = int(rng.choice(list(CATEGORIES)))
    side = min(width, height)
    name = CATEGORIES[category]
    if not crowd:
        size = 0.1 * 7 ** (rng.random() ** 0.22) * side
        x, y = rng.uniform(0.35 * size, (width - 0.35 * size, height - 0.35 * size))
        part = place_shape(rng, name, size, x, y)
        return Item(category, [part], part)
    spread = rng.uniform(0.12, 0.2) * side
    parts = []
    x, y = rng.uniform(spread, (width - spread, height - spread))
    for _ in range(rng.integers(18, 36)):
        r, a = spread * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        size = rng.uniform(0.06, 0.1) * side
        parts.append(place_shape(rng, name, size, x + r * np.cos(a), y + r * np.sin(a)))
    return Item(category, parts, shapely.union_all(parts))


def layout(rng, kind="objects"):
    """What an image holds: (width, height, Items bottom to top, visible geometry of each).

    `kind` is "objects", "crowd" (objects above one crowd) or "empty". An object that would leave
    itself or one below it less than MIN_VISIBLE visible is moved, after 8 tries left out.
    """
    side = int(rng.integers(240, 481))
    other = side if rng.random() < 0.2 else min(int(side * rng.uniform(1, 1.6)), 640)
    width, height = (side, other) if rng.random() < 0.4 else (other, side)
    frame = shapely.box(0, 0, width, height)
    items, visible = [], []
    for n in range(0 if kind == "empty" else 1 + int(12 * rng.random())):
        for _ in range(8):
            new = draw_item(rng, width, height, crowd=kind == "crowd" and n == 0)
            seen = [old - new.outline for old in visible] + [new.outline & frame]
            whole = [item.outline for item in [*items, new]]
            if all(s.area >= MIN_VISIBLE * w.area for s, w in zip(seen, whole, strict=True)):
                items, visible = [*items, new], seen
                break
    return width, height, items, visible


def pieces(shape):
    """Hole-free Polygons that make up `shape`; one with a hole is cut in two through the hole."""
    if shape.geom_type != "Polygon":
        return [piece for part in getattr(shape, "geoms", []) for piece in pieces(part)]
    if not shape.interiors:
        return [shape] if shape.area >= 0.5 else []  # half a pixel of sliver shows nowhere
    x1, y1, x2, y2 = shape.bounds
    x = shape.interiors[0].centroid.x
    return pieces(shape & shapely.box(x1, y1, x, y2)) + pieces(shape & shapely.box(x, y1, x2, y2))


def mask_of(shape, x, y, width, height):
    """Share of each pixel of the window at (x, y) under `shape`: (height, width) float32."""
    fine = np.zeros((height * FINE, width * FINE), np.uint8)
    polygons = [part for part in shapely.get_parts(shape) if part.geom_type == "Polygon"]
    rings = [np.array(r.coords) for p in polygons for r in (p.exterior, *p.interiors)]
    # OpenCV counts from the center of the first pixel, in eighths of a pixel with shift=3.
    rings = [((ring - (x, y)) * FINE - 0.5) * 8 for ring in rings]
    cv2.fillPoly(fine, [ring.round().astype(np.int32) for ring in rings], 255, shift=3)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) / np.float32(255)


def annotate(item, visible, width, height):
    """COCO annotation, without ids, of an Item of which the geometry `visible` is seen."""
    if len(item.parts) > 1:  # a crowd: uncompressed RLE, down the columns, zeros first
        mask = mask_of(visible, 0, 0, width, height) >= 0.5
        flips = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        counts = np.diff(flips, prepend=0, append=mask.size).tolist()
        segmentation = {"counts": counts, "size": [height, width]}
        rle = coco_mask.frPyObjects(segmentation, height, width)
        area = int(coco_mask.area(rle))
        box = coco_mask.toBbox(rle).tolist()
    else:  # rounded first, so that area and box belong to the very numbers in the file
        rings = [np.array(piece.exterior.coords)[:-1].round(2) for piece in pieces(visible)]
        segmentation = [ring.ravel().tolist() for ring in rings]
        area = round(sum(shapely.Polygon(ring).area for ring in rings), 4)
        points = np.concatenate(rings)
        box = np.concatenate([points.min(axis=0), np.ptp(points, axis=0)]).round(2).tolist()
    crowd = int(len(item.parts) > 1)
    return {"category_id": item.category, "bbox": box, "area": area, "iscrowd": crowd, "segmentation": segmentation}


def texture(rng, height, width):
    """Nothing, noise of three scales, stripes or a checker: (height, width) in about [-1, 1]."""
    kind = rng.integers(4)
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 1:
        grids = [rng.uniform(-0.6, 0.6, (n, n)).astype(np.float32) for n in (5, 16, 60)]
        return sum(cv2.resize(g, (width, height), interpolation=cv2.INTER_CUBIC) for g in grids)
    turn = rng.uniform(0, np.pi)
    pace = 2 * np.pi / rng.uniform(8, 40)  # period in pixels
    c, s = np.float32(pace * np.cos(turn)), np.float32(pace * np.sin(turn))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    stripes = np.sin(c * x + s * y)
    return stripes if kind == 2 else np.sign(stripes * np.sin(c * y - s * x))


def surface(rng, height, width, color, strength):
    """A color (3,) with gradient and texture of up to `strength` levels: (H, W, 3) float32."""
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    grain = texture(rng, height, width)
    slopes = rng.uniform(-strength, strength, (3, 3))
    planes = zip(np.float32(color), np.float32(slopes), strict=True)
    return cv2.merge([grain * g + (x * a + (y * b + level)) for level, (a, b, g) in planes])


def backdrop(rng, height, width):
    """Ground with clutter of no class (thin lines, arcs, small blobs): (H, W, 3) float32."""
    ground = surface(rng, height, width, rng.uniform(60, 190) + rng.uniform(-25, 25, 3), 20)
    ground = ground.clip(0, 255).astype(np.uint8)
    side = min(height, width)
    for kind in rng.integers(0, 3, rng.integers(0, 8)):
        color = rng.integers(0, 256, 3).tolist()
        thick = int(rng.integers(1, 3))
        start, end = rng.uniform(0, (width, height), (2, 2)).astype(int).tolist()
        a, b, turn = rng.integers(20, 160, 3).tolist()
        if kind == 0:
            cv2.line(ground, start, end, color, thick, cv2.LINE_AA)
        elif kind == 1:
            axes = side * a // 400, side * b // 400
            cv2.ellipse(ground, start, axes, turn, a, a + b, color, thick, cv2.LINE_AA)
        else:
            axes = 1 + side * a // 12000, 1 + side * b // 12000  # at most 3 % of `side` across
            cv2.ellipse(ground, start, axes, turn, 0, 360, color, -1, cv2.LINE_AA)
    return ground.astype(np.float32)


def fill_color(rng, category, others):
    """The first of 40 RGB colors at least CONTRAST from all `others` (N, 3), else the farthest.

    Things have their usual colors, as bananas and fire engines do: a category's hues scatter by
    10 degrees about one, so that the sample set can be learned in minutes.
    """
    usual = list(CATEGORIES).index(category) / len(CATEGORIES)
    hue = (usual + rng.normal(0, 10 / 360, 40)) % 1
    saturation = rng.uniform(0.6, 1, 40)
    value = rng.uniform(0.5, 1, 40)
    hsv = np.stack([hue * 360, saturation, value], axis=1).astype(np.float32)
    colors = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255.0
    nearest = np.linalg.norm(colors[:, None] - others, axis=2).min(axis=1)  # (40,)
    return colors[np.argmax(nearest.clip(max=CONTRAST))]


def paint_part(rng, canvas, ground, category, part, painted):
    """Paint a polygon on `canvas` (H, W, 3) in place; return its color (3,).

    The color differs from the `ground` around it and from those (polygon, color) in `painted`
    that it touches.
    """
    height, width, _ = canvas.shape
    x1, y1 = np.maximum(np.floor(part.bounds[:2]).astype(int) - 6, 0)  # 6 px of ground around
    x2, y2 = np.minimum(np.ceil(part.bounds[2:]).astype(int) + 6, (width, height))
    window = np.s_[y1:y2, x1:x2]
    mask = mask_of(part, x1, y1, x2 - x1, y2 - y1)
    around = cv2.mean(ground[window], mask=np.uint8(mask < 0.5))[:3]
    touched = [color for other, color in painted if other.intersects(part)]
    color = fill_color(rng, category, np.array([around, *touched]))
    fill = surface(rng, y2 - y1, x2 - x1, color, rng.choice([0, 10, 20]))
    canvas[window] += cv2.merge([mask] * 3) * (fill - canvas[window])
    return color


def draw_scene(rng, kind="objects"):
    """One image (H, W, 3) uint8 RGB, its COCO annotations without ids; `kind`: see `layout`."""
    width, height, items, visible = layout(rng, kind)
    ground = backdrop(rng, height, width)
    canvas = ground.copy()
    painted = []
    for item in items:
        for part in item.parts:
            color = paint_part(rng, canvas, ground, item.category, part, painted)
            painted.append((part, color))
    light = rng.uniform(0.7, 1.15, (3, 3, 1)).astype(np.float32).repeat(3, axis=2)
    canvas *= cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 1.2))
    noise = (rng.random((height, width), np.float32) - 0.5) * np.float32(rng.uniform(4, 14))
    canvas += cv2.merge([noise] * 3)
    image = cv2.convertScaleAbs(np.maximum(canvas, 0, out=canvas))
    return image, [annotate(*pair, width, height) for pair in zip(items, visible, strict=True)]


def write_split(folder, name, split, count, seed):
    """Write `count` images to folder/name, and their annotations; `split` is a number."""
    file = folder / "annotations" / f"instances_{name}.json"
    categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in CATEGORIES.items()]
    if file.exists() and json.dumps(categories).encode() not in file.read_bytes():
        raise UserError(f"{folder}: holds a data set of another kind; name another folder")
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        kind = "empty" if index % 20 == 5 else "crowd" if index % 25 == 4 else "objects"
        # A generator for each image: image i is the same however many there are.
        image, found = draw_scene(np.random.default_rng([seed, split, index]), kind)
        image_id = 139 + 2 * index + split  # unique across the splits
        image_name = f"{image_id:012d}.jpg"
        jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (folder / name / image_name).write_bytes(jpeg.tobytes())
        height, width, _ = image.shape
        size = {"width": width, "height": height}
        images.append({"id": image_id, "file_name": image_name, **size})
        for entry in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))


def make_dataset(folder, train=400, val=100, seed=0):
    """Write `train` and `val` images in COCO's layout under `folder`, over older ones."""
    try:
        write_split(Path(folder), "train2017", 0, train, seed)
        write_split(Path(folder), "val2017", 1, val, seed)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}): name a writable folder") from error


def main():
    parser = ArgumentParser(prog="python -m demo.shapes", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="where to write; made when missing")
    for name, default, what in (
        ("train", 400, "training images"),
        ("val", 100, "validation images"),
        ("seed", 0, "same seed, same bytes"),
    ):
        parser.add_argument(f"--{name}", type=number(int, 0), default=default, help=what)
    args = parser.parse_args()
    make_dataset(args.folder, args.train, args.val, args.seed)
    print(f"wrote {args.train} training and {args.val} validation images to {args.folder}")


if __name__ == "__main__":
    run(main)
