"""demo.shapes against shapely, pycocotools, a painter's label map and the pixels it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from shapely import MultiPolygon, Polygon, box, union_all

from demo import shapes

ROOT = Path(__file__).parent.parent
TRAIN, VAL = 32, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 32 + 6 images."""
    path = tmp_path_factory.mktemp("shapes")
    shapes.make_dataset(path, train=TRAIN, val=VAL, seed=0)
    return path


@pytest.fixture(scope="module")
def coco(folder):
    """The training split, read by pycocotools."""
    return COCO(folder / "annotations/instances_train2017.json")


def polygons(annotation):
    """The segmentation's exterior polygons as shapely Polygons."""
    return [Polygon(np.reshape(ring, (-1, 2))) for ring in annotation["segmentation"]]


def single(coco):
    """All annotations that are no crowd."""
    return [a for a in coco.anns.values() if not a["iscrowd"]]


def contents(folder):
    """Bytes of every file below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def label_map(items, width, height, scale=3):
    """Which item a viewer sees at each point (-1: none), painted back to front, with no shapely."""
    labels = np.full((height * scale, width * scale), -1, np.int32)
    for label, item in enumerate(items):
        for part in item.parts:
            rings = [np.array(r.coords) * scale - 0.5 for r in (part.exterior, *part.interiors)]
            cv2.fillPoly(labels, [r.round().astype(np.int32) for r in rings], label)
    return labels


def test_same_seed_same_bytes_other_seed_other_images(folder, tmp_path):
    shapes.make_dataset(tmp_path / "again", train=TRAIN, val=VAL, seed=0)
    shapes.make_dataset(tmp_path / "other", train=TRAIN, val=VAL, seed=1)
    old, again, other = (contents(p) for p in (folder, tmp_path / "again", tmp_path / "other"))
    assert old == again
    assert old.keys() == other.keys()
    assert not any(old[name] == other[name] for name in old)


def test_image_does_not_depend_on_the_count(folder, tmp_path):
    shapes.make_dataset(tmp_path, train=7, val=2, seed=0)
    few, many = contents(tmp_path), contents(folder)
    images = [name for name in few if name.endswith(".jpg")]
    assert len(images) == 9
    assert all(few[name] == many[name] for name in images)
    small = json.loads(few["annotations/instances_train2017.json"])
    large = json.loads(many["annotations/instances_train2017.json"])
    assert small["annotations"] == large["annotations"][: len(small["annotations"])]
    assert len({few[name] for name in images}) == 9  # the splits share no image


def test_files_and_ids_are_those_of_coco(folder, coco):
    val = COCO(folder / "annotations/instances_val2017.json")
    assert (len(coco.imgs), len(val.imgs)) == (TRAIN, VAL)
    assert not coco.imgs.keys() & val.imgs.keys()
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    assert {a["image_id"] for a in coco.anns.values()} <= coco.imgs.keys()
    assert {a["category_id"] for a in coco.anns.values()} == coco.cats.keys()
    assert len(coco.cats) >= 6 and max(coco.cats) > len(coco.cats)
    listed = [c["id"] for c in coco.dataset["categories"]]
    assert listed != sorted(listed)
    for entry in coco.imgs.values():
        image = cv2.imread(folder / "train2017" / entry["file_name"])
        assert image.shape == (entry["height"], entry["width"], 3)
        assert 240 <= min(image.shape[:2]) and max(image.shape[:2]) <= 640


def test_empty_images_and_crowds_are_there(folder, coco):
    for split in (coco, COCO(folder / "annotations/instances_val2017.json")):
        counts = [len(split.getAnnIds([i])) for i in split.imgs]
        crowds = [a for a in split.anns.values() if a["iscrowd"]]
        assert counts.count(0) >= 1 and len(crowds) >= 1
        assert max(counts) <= 12


def test_box_and_area_are_those_of_the_polygons(coco):
    for a in single(coco):
        shape = MultiPolygon(polygons(a))
        x1, y1, x2, y2 = shape.bounds
        np.testing.assert_allclose(a["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=0.011)
        assert a["area"] == pytest.approx(sum(p.area for p in polygons(a)), abs=0.01)
        entry = coco.imgs[a["image_id"]]
        assert box(0, 0, entry["width"], entry["height"]).covers(shape.envelope)


def test_rasterised_masks_have_the_area(coco):
    for a in single(coco):
        edge = sum(p.length for p in polygons(a))
        pixels = coco.annToMask(a).sum()
        assert abs(pixels - a["area"]) <= 0.04 * a["area"] + 0.06 * edge, a["id"]


def test_crowd_rle_is_read_by_pycocotools(coco):
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    for a in crowds:
        entry = coco.imgs[a["image_id"]]
        assert a["segmentation"]["size"] == [entry["height"], entry["width"]]
        assert sum(a["segmentation"]["counts"]) == entry["height"] * entry["width"]
        mask = coco_mask.decode(coco.annToRLE(a))
        rows, columns = np.nonzero(mask)
        assert a["area"] == len(rows) > 500
        x, y, w, h = a["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


def test_visible_parts_do_not_overlap(coco):
    for image in coco.imgs:
        found = [a for a in coco.loadAnns(coco.getAnnIds([image])) if not a["iscrowd"]]
        whole = [union_all([p.buffer(0) for p in polygons(a)]) for a in found]
        for i, one in enumerate(whole):
            for other in whole[:i]:  # outlines are rounded to 0.01 px
                shared = one.intersection(other).area
                assert shared <= 0.01 * min(one.length, other.length) + 1e-6


def test_a_painter_sees_what_is_annotated():
    """Nothing visible is unlabeled, each object shows a quarter, masks are those of the paint."""
    for seed in range(16):
        kind = "crowd" if seed % 8 == 0 else "objects"
        width, height, items, _ = shapes.layout(np.random.default_rng(seed), kind)
        image, found = shapes.draw_scene(np.random.default_rng(seed), kind)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        assert [a["category_id"] for a in found] == [item.category for item in items]
        labels = label_map(items, width, height)
        for n, (item, a) in enumerate(zip(items, found, strict=True)):
            seen = (labels == n).sum() / 9
            edge = item.outline.length  # the painter's outline is up to 1/3 px off
            assert abs(seen - a["area"]) <= 0.34 * edge + 0.02 * a["area"]
            assert seen >= 0.25 * item.outline.area
            rle = a["segmentation"]
            if not a["iscrowd"]:
                rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
            else:
                rle = coco_mask.frPyObjects(rle, height, width)
            mask = coco_mask.decode(rle).astype(bool)
            paint = labels[1::3, 1::3] == n
            assert (mask & paint).sum() / (mask | paint).sum() > 0.85, (seed, n)


def test_a_hole_is_cut_not_filled():
    ring = box(0, 0, 30, 30) - box(5, 10, 12, 20) - box(18, 5, 25, 25)
    cut = shapes.pieces(ring)
    assert len(cut) > 1 and not any(p.interiors for p in cut)
    assert sum(p.area for p in cut) == pytest.approx(30 * 30 - 70 - 140)
    assert union_all(cut).symmetric_difference(ring).area == pytest.approx(0, abs=1e-9)


def test_mask_counts_pixels_from_their_corners():
    mask = shapes.mask_of(box(2, 1, 4.5, 3), 0, 0, 6, 5)
    expected = np.zeros((5, 6))
    expected[1:3, 2:4], expected[1:3, 4] = 1, 0.5
    np.testing.assert_allclose(mask, expected, atol=0.3)  # OpenCV paints the outline itself too
    assert mask[2, 3] == 1 and mask[4, 0] == 0


def test_objects_stand_out_from_what_surrounds_them(folder, coco):
    kernel = np.ones((3, 3), np.uint8)
    distances = []
    for image in coco.imgs:
        found = coco.loadAnns(coco.getAnnIds([image]))
        masks = [coco.annToMask(a) for a in found]
        path = folder / "train2017" / coco.imgs[image]["file_name"]
        pixels = cv2.imread(path).astype(np.float32)
        for a, mask in zip(found, masks, strict=True):
            around = cv2.dilate(mask, kernel, iterations=6)
            taken = cv2.dilate(sum(masks), kernel, iterations=2)  # edges are blurred
            around = around.astype(bool) & (taken == 0)
            inside = cv2.erode(mask, kernel, iterations=1).astype(bool)
            if not a["iscrowd"] and around.sum() > 50 and inside.sum() > 50:
                gap = pixels[inside].mean(axis=0) - pixels[around].mean(axis=0)
                distances.append(np.linalg.norm(gap))
    assert len(distances) > 50
    assert min(distances) > 30 and np.median(distances) > 60


def run(*arguments):
    """Run the command line; return (status, standard error's lines)."""
    command = [sys.executable, "-m", "demo.shapes", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_command_line(tmp_path):
    assert run(tmp_path / "new" / "set", "--train", 1, "--val", 0) == (0, [])
    split = json.loads((tmp_path / "new/set/annotations/instances_val2017.json").read_text())
    assert split["images"] == split["annotations"] == []
    assert len(list((tmp_path / "new/set/train2017").iterdir())) == 1
    file = tmp_path / "file"
    file.write_text("")
    for arguments, named in (((file,), str(file)), ((tmp_path, "--val", "-1"), "-1")):
        status, lines = run(*arguments)
        assert status == 2 and len(lines) == 1 and named in lines[0]
    assert file.read_text() == ""


def test_another_data_set_is_never_overwritten(tmp_path):
    shapes.make_dataset(tmp_path, train=1, val=1)
    shapes.make_dataset(tmp_path, train=2, val=1)  # its own is
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}]}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(shapes.UserError, match="another folder"):
        shapes.make_dataset(tmp_path, train=3, val=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
