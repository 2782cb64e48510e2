"""tools/split.py: each image and box in one of two sets, each class in both, and mistakes in one line each."""

import json

import numpy as np
import pytest
from samples import box, small_dataset

from src.dataset import CocoDataset, check_categories
from src.usage import UserError
from tools import split


def labeled(folder, classes_of, **more):
    """Images 1, 2, ... with a box of each class in classes_of[i] (ids 1 to 4); returns the annotation file."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 20, "height": 10} for n in range(1, 1 + len(classes_of))]
    boxes = [box(n, [k, 1, 4, 5], k) for n, classes in enumerate(classes_of, start=1) for k in classes]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, 5)]
    return small_dataset(folder, boxes, **{"images": images, "categories": categories} | more)


def run(monkeypatch, file, out, *options):
    """Split with the images in `set`, where small_dataset has put them; returns both sets, as train.py reads them."""
    images = ["--images", str(file.parents[1] / "set")]
    monkeypatch.setattr("sys.argv", ["split", str(file), str(out), *images, *map(str, options)])
    split.main()
    return [CocoDataset(out, name) for name in ("train", "val")]


@pytest.mark.parametrize("seed", range(3))
def test_each_image_and_box_is_in_one_set_and_each_class_in_both(tmp_path, monkeypatch, capsys, seed):
    # Class 3 has two images, class 4 one, image 9 none.
    file = labeled(tmp_path, [(1, 2), (1, 3), (1,), (1, 2), (3, 1), (4, 1), (2,), (1,), (), (1, 1)])
    train, val = run(monkeypatch, file, tmp_path / "out", "--val", 0.3, "--seed", seed)
    assert sorted([*train.image_ids, *val.image_ids]) == list(range(1, 11)) and len(val) == 3
    assert len(train.boxes) + len(val.boxes) == 15
    check_categories(val, train.category_ids, train.classes, "train")
    assert train.category_ids == val.category_ids == [1, 2, 3, 4]
    assert set(train.labels) == {1, 2, 3, 4} and set(val.labels) == {1, 2, 3}
    for data in (train, val):
        data.check_files("set")
        for index, image_id in enumerate(data.image_ids):
            assert data.path(index).samefile(tmp_path / "set" / f"{image_id}.jpg")
    assert "missing classes: class 4" in capsys.readouterr().out


def test_the_seed_decides_and_the_share_is_kept(tmp_path, monkeypatch):
    file = labeled(tmp_path, [(1,)] * 40)
    draws = [run(monkeypatch, file, tmp_path / f"{n}", "--seed", seed)[1] for n, seed in enumerate((5, 5, 6))]
    ids = [data.image_ids.tolist() for data in draws]
    assert len(ids[0]) == len(ids[2]) == 8 and ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("share", [0, 1])
def test_no_set_is_empty(tmp_path, monkeypatch, share):
    sets = run(monkeypatch, labeled(tmp_path, [(1,), (2,)]), tmp_path / "out", "--val", share)
    assert [len(data) for data in sets] == [1, 1]


def test_roboflows_group_is_no_class(tmp_path, monkeypatch):
    """Its category 0 names the group of the others, and has no box; COCO's "person" is in its own group."""
    names = {0: ("pets", "none"), 1: ("cat", "pets"), 2: ("dog", "pets"), 3: ("person", "person")}
    categories = [{"id": k, "name": name, "supercategory": group} for k, (name, group) in names.items()]
    sets = run(monkeypatch, labeled(tmp_path, [(1, 2), (1, 2)], categories=categories), tmp_path / "out")
    for data in sets:
        assert data.classes == ["background", "cat", "dog", "person"] and data.category_ids == [1, 2, 3]


@pytest.mark.parametrize("name", ["/data/upload/1/{}.jpg", "../../media/upload/1/{}.jpg", "images\\{}.jpg"])
def test_label_studios_paths_are_found_by_their_last_part(tmp_path, monkeypatch, name):
    file = labeled(tmp_path, [(1,), (1,), (2,)])
    data = json.loads(file.read_text())
    for image in data["images"]:
        image["file_name"] = name.format(image["id"])
    file.write_text(json.dumps(data))
    for data in run(monkeypatch, file, tmp_path / "out"):
        data.check_files("set")


def test_repairs_are_told_and_written(tmp_path, monkeypatch, capsys):
    file = small_dataset(tmp_path, [box(10, [90, 0, 30, 10]), box(20, [0, 0, 10, 10])])
    sets = run(monkeypatch, file, tmp_path / "out")
    assert "1 boxes clipped to their image" in capsys.readouterr().out
    assert not any("clipped" in what for data in sets for what in data.repairs)
    right = max(float((data.boxes * np.tile(data.sizes, 2)).max()) for data in sets)
    assert right == pytest.approx(100)


def same_names(file):
    """Two images of one name in different folders, neither of which is there."""
    data = json.loads(file.read_text())
    data["images"][0]["file_name"], data["images"][1]["file_name"] = "x/1.jpg", "y/1.jpg"
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda file: file.unlink(), "instances_set.json: no such file"),
        (lambda file: file.write_text("{"), "instances_set.json: not a JSON file"),
        (lambda file: (file.parents[1] / "set" / "2.jpg").unlink(), "2.jpg: no such image; .*--images"),
        (lambda file: (file.parents[1] / "out" / "val").mkdir(parents=True), "OUT .*out: has val already"),
        (same_names, "same name"),
    ],
)
def test_mistakes_take_one_line(tmp_path, monkeypatch, change, says):
    file = labeled(tmp_path, [(1,), (1,)])
    change(file)
    with pytest.raises(UserError, match=says):
        run(monkeypatch, file, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


def test_one_image_makes_no_two_sets(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="two images"):
        run(monkeypatch, labeled(tmp_path, [(1,)]), tmp_path / "out")


def test_a_folder_named_train_is_not_split_into_itself(tmp_path, monkeypatch):
    """As Roboflow's: the images would be deleted before they are linked."""
    file = labeled(tmp_path, [(1,), (1,)])
    (tmp_path / "set").rename(tmp_path / "train")
    monkeypatch.setattr("sys.argv", ["split", str(file), str(tmp_path), "--images", str(tmp_path / "train")])
    with pytest.raises(UserError, match="has train already"):
        split.main()
    assert len(list((tmp_path / "train").iterdir())) == 2
