"""src.annotations against hand-worked values: what is repaired, and what is refused."""

import gc
import json

import numpy as np
import pytest
from samples import CATEGORIES, box, small_dataset

from src.annotations import load_ground_truth, read_annotations
from src.dataset import CocoDataset
from src.usage import UserError

# What is repaired


def test_crowds_are_counted_kept_for_evaluation_and_not_trained_on(tmp_path):
    file = small_dataset(tmp_path, [box(10, [0, 0, 9, 9]), box(10, [5, 5, 40, 40], iscrowd=1)])
    data = CocoDataset(tmp_path, "set")
    assert len(data.boxes) == 1 and sum(map(len, (data.objects(0)[0], data.objects(1)[0]))) == 1
    assert [n for what, n in data.repairs.items() if "crowd" in what] == [1]
    assert [a["iscrowd"] for a in load_ground_truth(file).anns.values()] == [0, 1]


def test_boxes_without_area_are_left_out_and_counted(tmp_path):
    nan = float("nan")
    bad = [[10, 10, 0, 5], [10, 10, 5, 0], [10, 10, -0.0, 5], [5, 5, -5, 0], [nan, 1, 5, 5]]
    bad += [[1, 1, nan, 5], [200, 10, 5, 5], [10, -20, 5, 5]]  # the last two are outside
    file = small_dataset(tmp_path, [box(10, bbox) for bbox in bad] + [box(10, [10, 10, 5, 5])])
    data = CocoDataset(tmp_path, "set")
    np.testing.assert_allclose(data.boxes, [(0.1, 0.2, 0.15, 0.3)], atol=1e-6)
    assert data.repairs["boxes of no area left out"] == len(bad)
    assert len(load_ground_truth(file).anns) == 1


def test_difficult_objects_are_trained_on_and_ignored_in_evaluation(tmp_path):
    difficult, ordinary = box(10, [0, 0, 9, 9], iscrowd=1, difficult=1), box(10, [5, 5, 40, 40], difficult=0)
    file = small_dataset(tmp_path, [difficult, ordinary])
    data = CocoDataset(tmp_path, "set")
    assert len(data.boxes) == 2 and dict(data.repairs) == {"difficult objects not evaluated": 1}
    assert [a["iscrowd"] for a in load_ground_truth(file).anns.values()] == [1, 0]


def test_boxes_that_reach_outside_are_clipped(tmp_path):
    file = small_dataset(tmp_path, [box(10, [-10, 40, 30, 20]), box(10, [90, -5, 20, 30])])
    data = CocoDataset(tmp_path, "set")
    np.testing.assert_allclose(data.boxes, [(0, 0.8, 0.2, 1), (0.9, 0, 1, 0.5)], atol=1e-6)
    assert data.repairs["boxes clipped to their image"] == 2
    assert [a["bbox"] for a in load_ground_truth(file).anns.values()] == [[0, 40, 20, 10], [90, 0, 10, 25]]


def test_a_missing_area_or_iscrowd_is_derived(tmp_path):
    whole, bare = box(10, [1, 1, 2, 3]), box(20, [10, 10, 20, 5])
    del bare["area"], bare["iscrowd"]
    file = small_dataset(tmp_path, [whole, bare, bare | {"area": None, "iscrowd": 1}])
    ground_truth = load_ground_truth(file)
    assert [(a["area"], a["iscrowd"]) for a in ground_truth.anns.values()] == [(6, 0), (100, 0), (100, 1)]
    repairs = CocoDataset(tmp_path, "set").repairs
    assert sorted(repairs.values()) == [1, 1, 2]
    assert [n for what, n in repairs.items() if "area" in what] == [2]


@pytest.mark.parametrize("area", [0, 0.0, -5, False, True, "0", None, 5000, 1e9])  # the image has 5000 pixels
def test_an_area_that_is_none_is_derived(tmp_path, area):
    file = small_dataset(tmp_path, [box(10, [5, 5, 20, 10], area=area)])
    assert load_ground_truth(file).anns[1]["area"] == 200


def test_boxes_drawn_right_to_left_or_upwards_are_turned_round(tmp_path):
    corners = [[30, 20, -20, 10], [10, 30, 20, -10], [30, 30, -20, -10], [10, 20, 20, 10], [5, 30, -15, -10]]
    file = small_dataset(tmp_path, [box(10, bbox) for bbox in corners])
    boxes = [a["bbox"] for a in load_ground_truth(file).anns.values()]
    assert boxes == [[10, 20, 20, 10]] * 4 + [[0, 20, 5, 10]]  # the last one reached outside
    repairs = CocoDataset(tmp_path, "set").repairs
    assert [n for what, n in repairs.items() if "turned round" in what] == [4]
    assert not any("of no area" in what for what in repairs)


def remarks(folder):
    """The lines with a likely cause that a data set's description has after the first."""
    return CocoDataset(folder, "set").describe("some set").splitlines()[1:]


def test_boxes_that_are_there_twice_are_counted_on_a_line(tmp_path):
    one = box(10, [10, 10, 20, 30])
    others = [one | {"category_id": 2}, one | {"image_id": 20}, box(10, [10, 12, 20, 30])]
    same = [one, box(10, [10.0, 10.001, 20, 29.999])]
    file = small_dataset(tmp_path, [one, *others])
    assert remarks(tmp_path) == []
    content = json.loads(file.read_text())
    content["annotations"] += same
    file.write_text(json.dumps(content))
    (line,) = remarks(tmp_path)
    assert line.startswith("some set: 2 boxes are the same") and "merged" in line


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "sub/../a.jpg"])
def test_a_file_in_two_image_entries_is_counted_on_a_line(tmp_path, name):
    images = [{"id": i, "file_name": n, "width": 9, "height": 9} for i, n in enumerate(["a.jpg", name, "b.jpg"])]
    (tmp_path / "set" / "sub").mkdir(parents=True)
    small_dataset(tmp_path, images=images)
    (line,) = remarks(tmp_path)
    assert line.startswith("some set: 1 image entries") and "merged" in line


@pytest.mark.parametrize("corners", [False, True])
def test_corners_in_place_of_sizes_are_suspected(tmp_path, corners):
    boxes = [[5, 5, 30, 20], [50, 20, 40, 20], [60, 5, 30, 30], [20, 30, 30, 15]]
    entries = [box(10, [x, y, x + w, y + h] if corners else [x, y, w, h]) for x, y, w, h in boxes]
    small_dataset(tmp_path, [*entries, box(20, [90, 40, 20, 20])])  # the last one is clipped anyway
    found = remarks(tmp_path)
    assert len(found) == corners
    assert not corners or "some set: 4 boxes" in found[0] and "corners" in found[0]


@pytest.mark.parametrize("ids", [(5, 5, 6), (0, 1, 2), (None, None, None)])
def test_duplicate_missing_and_zero_annotation_ids_are_renumbered(tmp_path, ids):
    entries = [box(10, [1, 1, 9, 9]) | ({"id": i} if i is not None else {}) for i in ids]
    file = small_dataset(tmp_path)
    content = json.loads(file.read_text()) | {"annotations": entries}
    file.write_text(json.dumps(content))
    ground_truth = load_ground_truth(file)
    assert len(ground_truth.anns) == 3 and 0 not in ground_truth.anns
    assert read_annotations(file)[1]["annotation ids renumbered"] == 3


def test_good_annotations_are_left_as_they_are(tmp_path):
    entries = [box(10, [1.5, 1.25, 9, 9], id=17, area=30.5), box(20, [0, 0, 100, 50], id=4)]
    file = small_dataset(tmp_path, entries)
    data, repairs = read_annotations(file)
    assert data == json.loads(file.read_text()) and not repairs


@pytest.mark.parametrize(
    "change",
    [
        lambda image, annotation: image.update(width=float(image["width"])),
        lambda image, annotation: annotation.update(iscrowd=False),
        lambda image, annotation: annotation.update(difficult="Unspecified"),  # no business of COCO's
        lambda image, annotation: image.update(id=2.0**40),
        lambda image, annotation: annotation.update(image_id=2.0**40),
        lambda image, annotation: annotation.update(category_id=7.0),
        lambda image, annotation: annotation.update(area=0),
        lambda image, annotation: annotation.update(id="a1"),
        lambda image, annotation: annotation.update(area="12"),
        lambda image, annotation: annotation.update(area=float("nan")),
        lambda image, annotation: annotation.pop("area"),
    ],
)
def test_what_other_tools_export_is_accepted(tmp_path, change):
    image = {"id": 2**40, "file_name": "a.jpg", "width": 100, "height": 50}
    annotation = {"id": 5} | box(2**40, [5, 5, 10, 20])
    change(image, annotation)
    small_dataset(tmp_path, [annotation], [image])
    dataset = CocoDataset(tmp_path, "set")
    dataset.check_files("set")
    np.testing.assert_allclose(dataset.boxes, [[0.05, 0.1, 0.15, 0.5]], rtol=1e-6)
    (repaired,) = load_ground_truth(dataset.annotation_file).anns.values()
    assert isinstance(repaired["id"], int) and repaired["area"] == 200


def test_garbage_collection_is_restored_after_opening(tmp_path):
    file = small_dataset(tmp_path)
    CocoDataset(tmp_path, "set")
    assert gc.isenabled()
    file.write_text("no JSON")
    with pytest.raises(UserError):
        CocoDataset(tmp_path, "set")
    assert gc.isenabled()


# What cannot be repaired


def entry(**more):
    return {"images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9} | more]}


FATAL = {
    "no images": ({"images": None}, "images"),
    "images not a list": ({"images": {"1": {}}}, "images"),
    "no annotations": ({"annotations": None}, "annotations"),
    "no categories": ({"categories": None}, "categories"),
    "categories not a list": ({"categories": "cat"}, "categories"),
    "unknown category": ({"annotations": [box(10, [1, 1, 5, 5], 99)]}, "99"),
    "unknown image": ({"annotations": [box(987, [1, 1, 5, 5])]}, "987"),
    "category twice": ({"categories": CATEGORIES + [{"id": 44, "name": "mug"}]}, "44"),
    "image twice": ({"images": entry()["images"] * 2}, "1"),
    "empty images": ({"images": []}, "images"),
    "empty categories": ({"categories": []}, "categories"),
    "size 0": (entry(width=0), "0"),
    "negative size": (entry(height=-9), "-9"),
    "size a string": (entry(width="9"), ""),
    "image not an object": ({"images": ["a.jpg"]}, ""),
    "image without id": ({"images": [{"file_name": "a.jpg", "width": 9, "height": 9}]}, "id"),
    "image without size": ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "width"),
    "image without name": ({"images": [{"id": 1, "width": 9, "height": 9}]}, "file_name"),
    "image id a string": (entry(id="one"), "one"),
    "image name a number": (entry(file_name=7), ""),
    "annotation not an object": ({"annotations": ["box"]}, ""),
    "annotation without image": ({"annotations": [{"category_id": 7}]}, "image_id"),
    "annotation without box": ({"annotations": [{"image_id": 10, "category_id": 7}]}, "bbox"),
    "box of three": ({"annotations": [box(10, [1, 1, 5, 5]) | {"bbox": [1, 2, 3]}]}, ""),
    "box of strings": ({"annotations": [box(10, [1, 1, 5, 5]) | {"bbox": list("abcd")}]}, ""),
    "category not an object": ({"categories": ["cat"]}, ""),
    "category without id": ({"categories": [{"name": "cat"}]}, "id"),
    "category without name": ({"categories": [{"id": 7}]}, "name"),
    "category without a letter": ({"categories": CATEGORIES + [{"id": 9, "name": " "}]}, "9"),
    "name twice": ({"categories": CATEGORIES + [{"id": 9, "name": "cat"}]}, "[2, 9]"),
    "boxes in fractions": ({"annotations": [box(10, [0.1, 0.2, 0.5, 1.0])] * 2}, "pixels"),
    "no bbox": ({"annotations": [{"id": 77, "image_id": 10, "category_id": 7}]}, "77: has no 'bbox'"),
    "box turned": ({"annotations": [box(10, [1, 2, 3, 4, 30], id=77)]}, "77: bbox [1, 2, 3, 4, 30]"),
    "box null": ({"annotations": [box(10, [1, 1, 5, 5], id=77) | {"bbox": None}]}, "77: bbox None"),
    "box of text": ({"annotations": [box(10, [1, 1, "5", 5], id=77)]}, "77: bbox [1, 1, '5', 5]"),
    "no id, no bbox": ({"annotations": [{"image_id": 10, "category_id": 7}]}, "annotations[0]: has no 'bbox'"),
    "box too large": ({"annotations": [box(10, [1, 1, 10**400, 5], id=77, area=1)]}, "77: "),
    "crowd a string": ({"annotations": [box(10, [1, 1, 5, 5], id=77, iscrowd="0")]}, "77: iscrowd '0'"),
    "image of text": ({"annotations": [box("10", [1, 1, 5, 5], id=77)]}, "77: unknown image_id '10'"),
    "image a list": ({"annotations": [box([10], [1, 1, 5, 5], id=77)]}, "77: unknown image_id [10]"),
    "category true": ({"annotations": [box(10, [1, 1, 5, 5], True, id=77)]}, "77: unknown category_id True"),
    "width missing": ({"images": [{"id": 139, "file_name": "a.jpg"}]}, "139, file_name 'a.jpg': has no 'width'"),
    "width null": (entry(id=139, width=None), "139, file_name 'a.jpg': width and height are None and 9"),
    "width of text": (entry(id=139, width="9"), "width and height are '9' and 9"),
    "image id of text": (entry(id="139"), "id '139'"),
    "image id a fraction": (entry(id=1.5), "id 1.5"),
    "image id infinite": (entry(id=float("inf")), "id inf"),
    "file name null": (entry(id=139, file_name=None), "139, file_name None"),
    "half a character": ({"categories": [*CATEGORIES, {"id": 9, "name": "Caf\udce9"}]}, "9, name 'Caf\\udce9': half"),
    "half a file name": (entry(id=139, file_name="\ud83d.jpg"), "139, file_name '\\ud83d.jpg': half"),
    "category ids of two kinds": ({"categories": CATEGORIES + [{"id": "x", "name": "x"}]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FATAL)
def test_an_inconsistent_file_is_a_users_error_that_names_file_and_entry(tmp_path, case):
    change, named = FATAL[case]
    file = small_dataset(tmp_path)
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(UserError) as error:
        CocoDataset(tmp_path, "set")
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    assert named in str(error.value).removeprefix(str(file))


def test_a_few_boxes_smaller_than_two_pixels_are_accepted(tmp_path):
    small_dataset(tmp_path, [box(10, [1, 1, 1, 1]), box(10, [5, 5, 1, 2])])
    assert len(CocoDataset(tmp_path, "set").boxes) == 2


@pytest.mark.parametrize("content", [b"", b"{'images': 1}", b"\xff\xfe\x00", b"[1, 2]", b"7"])
def test_what_is_not_coco_json_is_a_users_error(tmp_path, content):
    file = small_dataset(tmp_path)
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        CocoDataset(tmp_path, "set")
    assert str(error.value).startswith(str(file))


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(UserError, match="instances_val2017.json"):
        CocoDataset(tmp_path, "val2017")
