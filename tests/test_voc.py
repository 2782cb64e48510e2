"""tools/voc.py: hand-written annotations in VOC's layout become COCO's, and mistakes in them one line each."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from runs import run
from samples import as_detections, voc_image, voc_list

from src.annotations import load_ground_truth
from src.dataset import CocoDataset
from src.engine import compute_metrics
from src.model import build_model
from src.usage import UserError
from tools import voc

DOG, CAT, EASY_CAT = ("dog", 0, (11, 21, 110, 80)), ("cat", 1, (1, 1, 50, 50)), ("cat", 0, (17, 13, 48, 36))


@pytest.fixture
def kit(tmp_path):
    """A devkit: two years, four images, one of them without an object."""
    kit = tmp_path / "VOCdevkit"
    voc_image(kit, 2007, "000001", [DOG, CAT])
    voc_image(kit, 2007, "000002", [EASY_CAT], (64, 48))
    voc_image(kit, 2012, "2008_000001", [], (120, 90))
    voc_image(kit, 2012, "000001", [("zebra crossing", 0, (1, 1, 200, 100))])
    voc_list(kit, "2007", "trainval", "000001\n000002\n")
    voc_list(kit, "2012", "train", "2008_000001\n000001\n")
    voc_list(kit, "2007", "test", "000002  1\n\n")  # a class's list has a second column
    return kit


def convert(monkeypatch, kit, train=("2007:trainval", "2012:train"), val=("2007:test",)):
    """Run the tool; returns its output folder."""
    out = kit.parent / "voc"
    monkeypatch.setattr("sys.argv", ["voc", str(kit), str(out), "--train", *train, "--val", *val])
    voc.main()
    return out


def objects_of(data, index):
    """{class name: box in pixels, xyxy} of an image."""
    boxes, labels = data.objects(index)
    pixels = (boxes * np.tile(data.sizes[index], 2)).round(3).tolist()
    return {data.classes[label]: box for label, box in zip(labels, pixels, strict=True)}


def test_boxes_names_and_images_arrive(kit, monkeypatch, capsys):
    out = convert(monkeypatch, kit)
    data = CocoDataset(out, "train")
    assert data.classes == ["background", "cat", "dog", "zebra crossing"]
    assert data.category_ids == [1, 2, 3]
    data.check_files("set")  # all there, each of the size that its XML says
    # Pixel 11 to pixel 110, counted from 1, are 100 pixels, from 10 on; "part" is not an object.
    assert objects_of(data, 0) == {"dog": [10, 20, 110, 80], "cat": [0, 0, 50, 50]}
    assert objects_of(data, 2) == {}
    assert objects_of(data, 3) == {"zebra crossing": [0, 0, 200, 100]}
    printed = capsys.readouterr().out
    assert f"train -> {out / 'train'}: images: 4, objects: 3, difficult objects: 1, classes: 3" in printed
    assert "images: 1, objects: 1, difficult objects: 0, classes: 3" in printed


def test_both_sets_have_the_same_numbers(kit, monkeypatch):
    out = convert(monkeypatch, kit)
    train, val = CocoDataset(out, "train"), CocoDataset(out, "val")
    assert train.classes == val.classes and train.category_ids == val.category_ids
    assert objects_of(val, 0) == {"cat": [16, 12, 48, 36]}


def test_images_are_linked_or_copied(kit, monkeypatch):
    out = convert(monkeypatch, kit)
    source = kit / "VOC2007" / "JPEGImages" / "000001.jpg"
    assert (out / "train" / "VOC2007" / "000001.jpg").samefile(source)
    assert not (out / "train" / "VOC2012" / "000001.jpg").samefile(source)

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = convert(monkeypatch, kit)  # into the same folder
    assert not (out / "train" / "VOC2007" / "000001.jpg").samefile(source)
    assert (out / "train" / "VOC2007" / "000001.jpg").read_bytes() == source.read_bytes()


def test_difficult_objects_are_trained_on_but_not_evaluated(kit, monkeypatch):
    out = convert(monkeypatch, kit)
    data = CocoDataset(out, "train")
    assert "cat" in objects_of(data, 0)
    assert data.repairs == {"difficult objects not evaluated": 1}
    ground_truth = load_ground_truth(data.annotation_file)
    rows = [[a["image_id"], *a["bbox"], 1, a["category_id"]] for a in ground_truth.dataset["annotations"]]
    every, without = (
        compute_metrics(ground_truth, as_detections(found, data.category_ids), data.category_ids)
        for found in (rows, [r for r in rows if r[:2] != [1, 0]])
    )
    assert every["AP"] == without["AP"] == pytest.approx(1)


def test_an_image_in_two_lists_comes_once(kit, monkeypatch):
    out = convert(monkeypatch, kit, train=("2007:trainval", "2007:test"))
    assert len(CocoDataset(out, "train")) == 2


def test_other_image_types_and_a_size_that_the_tool_left_0(kit, monkeypatch):
    voc_image(kit, 2007, "a.b", [DOG], ending=".png")
    xml = kit / "VOC2007" / "Annotations" / "a.b.xml"
    xml.write_text(xml.read_text().replace("<width>200", "<width>0").replace("<height>100", "<height>0"))
    voc_list(kit, "2007", "test", "a.b")
    data = CocoDataset(convert(monkeypatch, kit), "val")
    assert data.sizes.tolist() == [[200, 100]] and data.path(0).name == "a.b.png"


def edit(kit, old, new, stem="000001"):
    """Replace text in an image's XML."""
    xml = kit / "VOC2007" / "Annotations" / f"{stem}.xml"
    assert old in xml.read_text()
    xml.write_text(xml.read_text().replace(old, new, 1))


def test_lists_and_files_as_windows_and_labelimg_write_them(kit, monkeypatch):
    voc_image(kit, 2007, "my photo", [DOG], ending=".JPG")
    xml = kit / "VOC2007" / "Annotations" / "my photo.xml"
    (kit / "VOC2007" / "JPEGImages" / "my photo.xml").write_text(xml.read_text())
    (kit / "VOC2007" / "JPEGImages" / "._my photo.JPG").write_bytes(b"macOS")
    xml.write_text("\ufeff" + xml.read_text().replace("<difficult>0<", "<difficult><").replace(">200<", ">200.0<"))
    voc_list(kit, "2007", "test", "\ufeffmy photo\r\n")
    data = CocoDataset(convert(monkeypatch, kit), "val")
    assert data.path(0).name == "my photo.JPG" and objects_of(data, 0) == {"dog": [10, 20, 110, 80]}


def test_images_that_are_links_or_read_only(kit, monkeypatch):
    image = kit / "VOC2007" / "JPEGImages" / "000001.jpg"
    image.rename(kit / "photo.jpg").chmod(0o444)
    image.symlink_to("../../photo.jpg")
    for _ in range(2):
        out = convert(monkeypatch, kit)
    assert (out / "train" / "VOC2007" / "000001.jpg").samefile(kit / "photo.jpg")
    assert not (out / "train" / "VOC2007" / "000001.jpg").is_symlink()


def test_fractions_and_a_missing_difficult_are_read(kit, monkeypatch):
    edit(kit, "<xmin>11<", "<xmin>11.5<")  # as in VOC 2011
    edit(kit, "<difficult>0</difficult>", "")
    assert objects_of(CocoDataset(convert(monkeypatch, kit), "train"), 0)["dog"] == [10.5, 20, 110, 80]


BOX = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax><ymax>80</ymax></bndbox>"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda kit: edit(kit, BOX, ""), "000001.xml: object 1: its bndbox/xmin is ''; it must be a number"),
        (lambda kit: edit(kit, "<xmin>1</xmin>", ""), "000001.xml: object 2: its bndbox/xmin is ''"),
        (lambda kit: edit(kit, "<xmin>11<", "<xmin>left<"), "its bndbox/xmin is 'left'"),
        (lambda kit: edit(kit, "<xmin>11<", "<xmin>nan<"), "its bndbox/xmin is 'nan'"),
        (lambda kit: edit(kit, "<difficult>1<", "<difficult>yes<"), "object 2: its difficult is 'yes'"),
        (lambda kit: edit(kit, "<width>200<", "<width>wide<"), "000001.xml: its size/width is 'wide'"),
        (lambda kit: edit(kit, "<name>dog</name>", "<name> </name>"), "000001.xml: object 1 has no <name>"),
        (lambda kit: edit(kit, "<xmin>1<", "<min>1<"), "000001.xml: not an XML file .mismatched tag"),
        (lambda kit: edit(kit, "<annotation>", '<?xml version="1.0" encoding="foo"?><annotation>'), "not an XML file"),
        (lambda kit: edit(kit, "<annotation>", '<annotation xmlns="http://x">'), "its root is <{http://x}annotation>"),
        (lambda kit: (kit / "VOC2007/Annotations/000001.xml").unlink(), "000001.xml: no such file"),
        (lambda kit: (kit / "VOC2007/Annotations/000001.xml").write_text("{}"), "000001.xml: not an XML file"),
        (lambda kit: (kit / "VOC2007/JPEGImages/000002.jpg").unlink(), "trainval.txt: 0 images 000002.*"),
        (lambda kit: voc_image(kit, 2007, "000002", [], ending=".png"), "trainval.txt: 2 images 000002.*"),
        (lambda kit: shutil.rmtree(kit / "VOC2007/JPEGImages"), "JPEGImages: no such folder"),
        (lambda kit: (kit / "VOC2007/ImageSets/Main/test.txt").unlink(), "2007:test: there is no"),
        (lambda kit: voc_list(kit, "2007", "test", "\n"), "test.txt: is empty"),
        (lambda kit: voc_list(kit, "2007", "test", "000001.jpg"), "test.txt: 0 images 000001.jpg.*without extension"),
        (lambda kit: (kit / "VOC2007/ImageSets/Main/test.txt").write_bytes(b"\xff\xfe0\0"), "is not UTF-8"),
    ],
)
def test_mistakes_take_one_line(kit, monkeypatch, change, says):
    change(kit)
    with pytest.raises(UserError, match=says):
        convert(monkeypatch, kit)
    assert not (kit.parent / "voc").exists()  # nothing half made


def test_a_kit_without_an_object(kit, monkeypatch):
    voc_list(kit, "2012", "empty", "2008_000001\n")
    with pytest.raises(UserError, match="no object"):
        convert(monkeypatch, kit, ["2012:empty"], ["2012:empty"])


def test_the_layout_is_plain_coco(kit, monkeypatch):
    data = json.loads((convert(monkeypatch, kit) / "annotations" / "instances_train.json").read_text())
    cat = next(a for a in data["annotations"] if a["difficult"])
    assert cat["bbox"] == [0, 0, 50, 50] and cat["area"] == 2500 and cat["iscrowd"] == 1
    assert data["images"][0] == {"id": 1, "file_name": "VOC2007/000001.jpg", "width": 200, "height": 100}


def test_from_the_kit_to_its_metric_on_the_command_line(kit, tmp_path):
    """Both programs as a user starts them."""
    out, found = tmp_path / "voc", tmp_path / "found"
    run("-m", "tools.voc", kit, out, "--train", "2012:train", "--val", "2007:trainval")
    classes = ["background", "cat", "dog", "zebra crossing"]
    weights = build_model("ssdlite", 4, pretrained_backbone=False).state_dict()
    state = {"model": "ssdlite", "model_state_dict": weights, "classes": classes, "category_ids": [1, 2, 3]}
    torch.save(state, tmp_path / "untrained.pth")
    options = ["--data-path", out, "--val-set", "val", "--output", found, "--num-workers", 0]
    said = run("test_dataset.py", "--pretrained-model", tmp_path / "untrained.pth", *options).stdout
    assert "VOC07 mAP 0." in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("cat", "dog"))] == ["cat", "dog"]
    metrics = json.loads((found / "metrics.json").read_text())
    for name in ("VOC07", "VOC10"):
        assert set(metrics[name]["per_class"]) == {"cat", "dog"} and metrics[name]["mAP"] >= 0
