"""src.dataset against hand-worked values: boxes, classes, samples, and the sampler."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from samples import box, scene, small_dataset
from torch.utils.data import DataLoader

from src.boxes import Encoder, make_default_boxes
from src.dataset import CocoDataset, TrainSampler, check_categories
from src.usage import UnreadableImage, UserError


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_default_boxes("ssdlite"))


# Boxes and classes


def test_boxes_are_relative_corners_and_labels_count_sorted_categories(tmp_path):
    # [10, 5, 20, 30] xywh in 100x50 -> 0.1, 0.1, 0.3, 0.7
    small_dataset(tmp_path, [box(20, [10, 5, 20, 30], 44), box(10, [0, 0, 100, 50], 2), box(20, [50, 25, 50, 25])])
    data = CocoDataset(tmp_path, "set")
    assert data.classes == ["background", "cat", "dog", "cup"]
    assert list(data.category_ids) == [2, 7, 44]
    by_id = {int(image_id): data.objects(i) for i, image_id in enumerate(data.image_ids)}
    boxes, labels = by_id[20]
    np.testing.assert_allclose(boxes, [(0.1, 0.1, 0.3, 0.7), (0.5, 0.5, 1, 1)], atol=1e-6)
    assert [data.category_ids[k - 1] for k in labels] == [44, 7]
    boxes, labels = by_id[10]
    np.testing.assert_allclose(boxes, [(0, 0, 1, 1)])
    assert labels.tolist() == [1]
    assert boxes.dtype == np.float32 and labels.dtype == np.int64


def test_all_boxes_of_a_set_with_gaps_crowds_and_empty_images(shapes_folder):
    data = CocoDataset(shapes_folder, "train2017")
    ground_truth = COCO(shapes_folder / "annotations" / "instances_train2017.json")
    names = {c["id"]: c["name"] for c in ground_truth.dataset["categories"]}
    assert sorted(data.image_ids.tolist()) == sorted(ground_truth.imgs)
    counts = []
    for i, image_id in enumerate(data.image_ids.tolist()):
        size = ground_truth.imgs[image_id]["width"], ground_truth.imgs[image_id]["height"]
        boxes, labels = data.objects(i)
        found = ground_truth.loadAnns(ground_truth.getAnnIds([image_id], iscrowd=False))
        expected = [(a["bbox"], names[a["category_id"]]) for a in found]
        pixels = boxes * np.tile(size, 2)
        pixels[:, 2:] -= pixels[:, :2]
        for row, label, (bbox, name) in zip(pixels, labels, expected, strict=True):
            np.testing.assert_allclose(row, bbox, atol=0.01)
            assert data.classes[label] == name
        counts.append(len(boxes))
    assert 0 in counts
    crowds = sum(a["iscrowd"] for a in ground_truth.anns.values())
    assert crowds > 0 and sum(counts) + crowds == len(ground_truth.anns)
    assert sum(data.repairs.values()) == crowds  # nothing else was there to repair


def test_boxes_too_thin_for_float32_do_not_reach_the_encoder(tmp_path, encoder):
    # Relative to the image, in float32, their opposite sides are equal: log(0) in the targets.
    small_dataset(tmp_path, [box(10, [90.0, 10, 1e-6, 20]), box(10, [10, 30.0, 20, 1e-7])])
    data = CocoDataset(tmp_path, "set", encoder)
    for epoch in range(5):
        for index in range(2):
            assert torch.isfinite(data[epoch, index][1]).all()


def test_boxes_that_have_no_default_box_are_told_of(tmp_path, encoder):
    """Of SSDLite's, 60 of 300 pixels: what fills less than half of one cannot reach an IoU of 0.5."""
    image = {"id": 10, "file_name": "a.jpg", "width": 300, "height": 300}
    images = [image, {**image, "id": 20, "file_name": "b.jpg"}]
    at = 16 * 9 + 8  # a cell's center
    squares = [box(10, [at - side / 2, at - side / 2, side, side]) for side in (42, 43, 60, 40, 10)]
    small_dataset(tmp_path, squares, images)
    lines = CocoDataset(tmp_path, "set").describe("a set", encoder).splitlines()
    assert lines[0] == "a set: 2 images, 5 boxes of 3 classes, 1 images without boxes"
    assert lines[1].startswith("a set: 40% of the boxes have an IoU above 0.5 with a default box: few of the others")
    assert "--model ssd" in lines[1] and "tiles" in lines[1]
    small_dataset(tmp_path / "large", squares[1:3] * 2 + squares[3:], images)
    assert (
        CocoDataset(tmp_path / "large", "set")
        .describe("a set", encoder)
        .endswith("67% of the boxes have an IoU above 0.5 with a default box")
    )


def test_samples_are_mirrored_half_the_time_or_never(tmp_path, encoder):
    """Otherwise they are the same."""
    small_dataset(tmp_path, [box(10, [10, 10, 60, 30])])
    Image.fromarray(scene(50, 100)).save(tmp_path / "set" / "a.jpg")
    plain, mirrored = (CocoDataset(tmp_path, "set", encoder, mirror=mirror) for mirror in (False, True))
    flipped = 0
    for epoch in range(30):
        (image, *_), (other, *_) = plain[epoch, 0], mirrored[epoch, 0]
        flipped += not np.array_equal(image, other)
        assert np.array_equal(image, other) or np.array_equal(image[:, ::-1], other)
    assert 5 < flipped < 25


def test_an_image_without_boxes_is_a_training_sample(tmp_path, encoder):
    small_dataset(tmp_path)
    image, loc_targets, cls_targets, _ = CocoDataset(tmp_path, "set", encoder)[0, 1]
    assert image.shape == (300, 300, 3)
    assert not loc_targets.any() and not cls_targets.any()


def test_annotations_are_kept_in_arrays(tmp_path):
    # A list of Python objects is copied into every worker as its reference counts change.
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(1, 60)]
    small_dataset(tmp_path, [box(1 + i % 59, [1, 1, 5, 5]) for i in range(500)], images)
    data = CocoDataset(tmp_path, "set")
    for name, value in vars(data).items():
        assert not isinstance(value, COCO), name
        if isinstance(value, np.ndarray):
            assert value.dtype != object, name
        elif isinstance(value, list | tuple | dict | set):
            assert len(value) < 10, name
            assert all(isinstance(item, int | str) for item in value), name


def test_categories_may_be_fewer_but_must_agree_in_id_and_name(tmp_path):
    small_dataset(tmp_path, categories=[{"id": 44, "name": "cup"}, {"id": 7, "name": "dog"}])
    data = CocoDataset(tmp_path, "set")
    check_categories(data, [2, 7, 44], ["background", "cat", "dog", "cup"], "other.json")
    for ids, names, named in (
        ([2, 7, 44], ["cat", "hound", "cup"], "7, 'dog', is 'hound' in other.json"),
        ([7, 45], ["dog", "cup"], "44, 'cup', does not exist in other.json"),
    ):
        with pytest.raises(UserError) as error:
            check_categories(data, ids, ["background", *names], "other.json")
        assert named in str(error.value) and str(data.annotation_file) in str(error.value)


def test_names_that_look_alike_are_told_apart(tmp_path):
    small_dataset(tmp_path, categories=[{"id": 7, "name": "Cafe\u0301"}])  # in Unicode's other form
    data = CocoDataset(tmp_path, "set")
    with pytest.raises(UserError, match=r"'Cafe\\u0301', is 'Café' in"):
        check_categories(data, [7], ["background", "Café"], "other.json")


@pytest.mark.parametrize(
    "there, wanted, shown",
    [
        ("café.jpg", "cafe\u0301.jpg", r"'cafe\u0301.jpg'"),
        ("a.jpg", "a.jpg\n", r"'a.jpg\n'"),
        ("a.JPG", "a.jpg", "'a.jpg'"),
        ("sub/a b.jpg", "sub/a\u00a0b.jpg", r"'sub/a\xa0b.jpg'"),
    ],
)
def test_a_missing_image_is_shown_with_the_name_that_looks_like_it(tmp_path, there, wanted, shown):
    file = small_dataset(tmp_path, images=[{"id": 1, "file_name": there, "width": 9, "height": 9}])
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = wanted
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        CocoDataset(tmp_path, "set").check_files("set")
    assert f"the first is {shown}" in str(error.value) and f"there is '{Path(there).name}'" in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder/a.jpg", "a" * 300 + ".jpg", "sub/" * 50 + "a.jpg", "a\0b.jpg"])
def test_names_that_no_file_has_are_missing(tmp_path, name):
    file = small_dataset(tmp_path)
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of its 2 images are not in") as error:
        CocoDataset(tmp_path, "set").check_files("set")
    assert name[:30].split("\0")[0] in str(error.value) and str(tmp_path / "set") in str(error.value)


# Images and their names


def test_size_in_the_json_may_be_that_of_the_stored_or_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 60x40, seen 40x60
    names = {"upright.jpg": (40, 60), "stored.jpg": (60, 40), "neither.jpg": (61, 40)}
    images = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, (width, height)) in enumerate(names.items(), start=1)
    ]
    small_dataset(tmp_path, images=images)
    stored = Image.new("RGB", (60, 40), "blue")
    stored.paste("red", (0, 0, 30, 40))  # the left half of what is stored: the upper half as seen
    for name in names:
        stored.save(tmp_path / "set" / name, exif=exif, quality=95)
    data = CocoDataset(tmp_path, "set")
    upright, as_stored = data.read(0), data.read(1)
    assert upright.shape == (60, 40, 3) and as_stored.shape == (40, 60, 3)
    assert upright[5, 20, 0] > 200 and upright[55, 20, 2] > 200
    assert as_stored[20, 5, 0] > 200 and as_stored[20, 55, 2] > 200
    with pytest.raises(UserError) as error:
        data[2]
    assert all(part in str(error.value) for part in ("neither.jpg", "61x40", "40x60"))


def test_names_with_spaces_other_alphabets_and_subfolders(tmp_path, encoder):
    names = ["with space.jpg", "猫 и кот.png", "sub/folder/ü.jpg", "a%20b.jpg"]
    images = [{"id": i, "file_name": name, "width": 20 + i, "height": 10} for i, name in enumerate(names, start=1)]
    small_dataset(tmp_path, images=images)
    data = CocoDataset(tmp_path, "set")
    assert [data.read(i).shape[1] for i in range(4)] == [21, 22, 23, 24]


# Samples


def test_samples_have_the_promised_types(shapes_folder, encoder):
    image, loc_targets, cls_targets, image_id = CocoDataset(shapes_folder, "train2017", encoder)[3, 2]
    assert image.shape == (300, 300, 3) and image.dtype == np.uint8
    assert loc_targets.shape == (3000, 4) and loc_targets.dtype == torch.float32
    assert cls_targets.shape == (3000,) and cls_targets.dtype == torch.int64
    data = CocoDataset(shapes_folder, "train2017")
    image, same_id, size = data[2]
    assert image.shape == (300, 300, 3) and image.dtype == np.uint8
    assert int(same_id) == int(image_id) == data.image_ids[2]
    height, width, _ = data.read(2).shape
    assert size.dtype == np.float32 and size.tolist() == [width, height]


def test_targets_of_an_uncropped_sample_are_the_encoded_boxes(tmp_path, encoder):
    # One box that covers the whole image: it covers the whole of every crop, too.
    small_dataset(tmp_path, [box(10, [0, 0, 100, 50], 44)])
    loc_targets, cls_targets = CocoDataset(tmp_path, "set", encoder)[0, 0][1:3]
    expected = encoder.encode(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([3]))
    torch.testing.assert_close(loc_targets, expected[0], atol=1e-4, rtol=0)
    assert torch.equal(cls_targets, expected[1]) and set(cls_targets.tolist()) == {0, 3}


def equal(a, b):
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))


def test_a_sample_depends_on_seed_epoch_and_index_alone(shapes_folder, encoder):
    data = CocoDataset(shapes_folder, "train2017", encoder, seed=5, zoom_out=True)
    keys = [(epoch, index) for epoch in (0, 1, 7) for index in (0, 3, 11)]
    first = {key: data[key] for key in keys}
    again = CocoDataset(shapes_folder, "train2017", encoder, seed=5, zoom_out=True)
    np.random.seed(0)  # no global state has a say
    torch.manual_seed(0)
    for key in reversed(keys):
        assert equal(again[key], first[key]), key
    other_seed = CocoDataset(shapes_folder, "train2017", encoder, seed=6, zoom_out=True)
    assert not equal(first[0, 3], first[1, 3])
    assert not equal(first[0, 3], other_seed[0, 3])


def test_images_are_changed_in_their_own_ways(tmp_path, encoder):
    small_dataset(tmp_path, images=[{"id": n, "file_name": "a.jpg", "width": 9, "height": 9} for n in (1, 2)])
    data = CocoDataset(tmp_path, "set", encoder)
    assert not torch.equal(torch.as_tensor(data[0, 0][0]), torch.as_tensor(data[0, 1][0]))


def test_zoom_out_reaches_the_samples(tmp_path, encoder):
    small_dataset(tmp_path)
    plain, zoomed = (CocoDataset(tmp_path, "set", encoder, zoom_out=z) for z in (False, True))
    # The image has one color, whatever the crop and the jitter: two colors show a canvas.
    colors = lambda image: np.ptp(image, axis=(0, 1)).max()  # noqa: E731
    assert max(colors(plain[epoch, 0][0]) for epoch in range(12)) < 5
    assert max(colors(zoomed[epoch, 0][0]) for epoch in range(12)) > 20


def test_batches_do_not_depend_on_the_number_of_workers(shapes_folder, encoder):
    data = CocoDataset(shapes_folder, "train2017", encoder, seed=1)
    batches = []
    for workers in (0, 2):
        sampler = TrainSampler(len(data), 5, seed=1)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        assert len(loader) == 2
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert one[0].shape == (5, 300, 300, 3) and one[0].dtype == torch.uint8
        assert one[1].shape == (5, 3000, 4) and one[2].shape == (5, 3000)
        assert equal(one, other)


# The sampler


def steps(sampler):
    """All batches, and a check that the sampler's length is true."""
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@pytest.mark.parametrize("samples, batch_size, world_size", [(103, 4, 1), (103, 4, 3), (24, 4, 2), (8, 4, 2)])
def test_ranks_share_an_epoch_without_overlap(samples, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        batches = steps(TrainSampler(samples, batch_size, rank, world_size))
        assert all(len(batch) == batch_size for batch in batches)
        seen += [index for _, index in chain(*batches)]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(samples))
    assert len(seen) == samples - samples % (batch_size * world_size)


def test_every_epoch_is_another_shuffle_of_all_images():
    sampler = TrainSampler(200, 4)
    orders = []
    for epoch in range(6):
        sampler.start(epoch)
        keys = list(chain(*steps(sampler)))
        assert {e for e, _ in keys} == {epoch}
        orders.append([index for _, index in keys])
        assert sorted(orders[-1]) == list(range(200))
    assert len(set(map(tuple, orders))) == 6
    assert orders[0] != list(range(200))
    assert list(chain(*TrainSampler(200, 4, seed=1))) != list(chain(*TrainSampler(200, 4, seed=2)))


def test_what_is_dropped_differs_from_epoch_to_epoch():
    sampler = TrainSampler(10, 4)
    dropped = []
    for epoch in range(8):
        sampler.start(epoch)
        dropped.append(frozenset(range(10)) - {index for _, index in chain(*sampler)})
    assert all(len(rest) == 2 for rest in dropped) and len(set(dropped)) > 1


def test_iterating_twice_gives_the_same_batches():
    sampler = TrainSampler(50, 4)
    sampler.start(3)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_resumes_where_it_was_stopped(world_size):
    for rank in range(world_size):
        sampler = TrainSampler(101, 4, rank, world_size, seed=9)
        sampler.start(5)
        whole = steps(sampler)
        for done in (0, 1, 7, len(whole)):
            later = TrainSampler(101, 4, rank, world_size, seed=9)
            later.start(5, done * 4 * world_size)
            assert steps(later) == whole[done:]


@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (2, 4)])
def test_resuming_with_other_processes_visits_exactly_the_rest(before, after):
    samples, batch_size, done = 96, 4, 2

    def visited(world_size, samples_seen, limit=None):
        samplers = [TrainSampler(samples, batch_size, r, world_size) for r in range(world_size)]
        for sampler in samplers:
            sampler.start(1, samples_seen)
        return [index for s in samplers for _, index in chain(*steps(s)[:limit])]

    first = visited(before, 0, done)
    rest = visited(after, done * batch_size * before)
    assert len(first) == done * batch_size * before
    assert not set(first) & set(rest) and len(rest) == len(set(rest))
    assert len(rest) == (samples - len(first)) // (batch_size * after) * batch_size * after


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_process_with_a_larger_batch_sees(world_size):
    alone = steps(TrainSampler(100, 3 * world_size, seed=2))
    ranks = [steps(TrainSampler(100, 3, rank, world_size, seed=2)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(chain(*(batches[step] for batches in ranks)))
    assert all(len(batches) == len(alone) for batches in ranks)


def test_too_small_a_set_names_the_largest_batch_size():
    with pytest.raises(UserError, match="--batch-size 10 "):
        TrainSampler(21, 16, 0, 2)
    with pytest.raises(UserError, match="--batch-size 7 "):
        TrainSampler(7, 8)
    with pytest.raises(UserError, match="fewer"):
        TrainSampler(2, 4, 0, 3)
    assert len(steps(TrainSampler(20, 10, 1, 2))) == 1


def test_sizes_are_checked_and_a_turned_image_fits(tmp_path):
    small_dataset(tmp_path)
    dataset = CocoDataset(tmp_path, "set")
    dataset.check_files("set")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 100)).save(dataset.path(0), "JPEG", exif=exif)
    dataset.check_files("set")
    Image.new("RGB", (50, 100)).save(dataset.path(0), "JPEG")
    with pytest.raises(UnreadableImage, match="50x100 pixels, but 100x50"):
        dataset.check_files("set")
