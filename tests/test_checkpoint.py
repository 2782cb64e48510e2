"""src.checkpoint: round trips, files that are none, and the published layouts."""

import copy
import errno
import json
import os
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.inputs import image
from runs import same
from samples import mb2_ssd_lite

from src import checkpoint
from src.boxes import Encoder, make_default_boxes
from src.checkpoint import load_checkpoint, load_matching_weights, network_from, save_checkpoint
from src.classes import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES
from src.model import build_model
from src.transform import normalize
from src.usage import UserError

COCO_FILE = Path(__file__).parents[2] / "shared/data/coco_real/annotations/instances_val2017.json"
REFERENCE = Path(__file__).parent / "reference"
CLASSES = ["background", "cat", "dog"]
SMALL = {"model": "ssd", "model_state_dict": {}, "classes": ["background"], "category_ids": []}


@pytest.fixture(scope="module")
def lite():
    """An SSDLite of two classes; not to be changed."""
    torch.manual_seed(0)
    return build_model("ssdlite", 3, pretrained_backbone=False)


@pytest.fixture(scope="module")
def coco_weights():
    """Weights of an SSD of COCO's 80 classes."""
    torch.manual_seed(0)
    return build_model("ssd", 81, pretrained_backbone=False).state_dict()


def state_of(model, classes=CLASSES):
    """A checkpoint as DESIGN.md lists it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return {
        "model": "ssdlite",
        "model_state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "epoch": 3,
        "samples_seen": 64,
        "best_map": 0.25,
        "classes": classes,
        "category_ids": [2, 44],
        "args": {"lr": 0.1, "multistep": [43, 54], "save_every": None, "model": "ssdlite"},
    }


# Ours


def test_round_trip(tmp_path, lite):
    state, path = state_of(lite), tmp_path / "new" / "folder" / "ssdlite.pth"
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert "ssdlite" in loaded.pop("origin")
    assert same(loaded, state)
    assert same(dict(network_from(loaded, path).state_dict()), dict(lite.state_dict()))
    assert os.listdir(path.parent) == ["ssdlite.pth"]
    assert torch.load(path, weights_only=True).keys() == state.keys()  # tensors and builtins


def test_a_path_may_be_text_and_an_old_file_is_replaced(tmp_path):
    path = str(tmp_path / "a.pth")
    for epoch in (1, 2):
        save_checkpoint(path, SMALL | {"epoch": epoch})
    assert load_checkpoint(path)["epoch"] == 2 and os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "a.pth"
    save_checkpoint(path, SMALL | {"epoch": 1})
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError) as user_error:
        save_checkpoint(path, {"epoch": 2})
    assert str(path) in str(user_error.value) and "--save-folder" in str(user_error.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pth"]


def test_the_new_checkpoint_is_whole_before_it_takes_the_name(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    replace = os.replace
    seen = []

    def spy(source, target):
        seen.append((torch.load(source, weights_only=True), path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    save_checkpoint(path, {"epoch": 1})
    assert seen == [({"epoch": 1}, False)] and path.exists()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "a.pth", tmp_path / "file" / "deeper" / "a.pth"):
        with pytest.raises(UserError, match="--save-folder"):
            save_checkpoint(path, {})
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(UserError, match="--save-folder"):
        save_checkpoint(tmp_path / "a.pth", {})
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.glob("*.tmp*"))


def test_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="--save-folder"):
            save_checkpoint(tmp_path / "a.pth", {})
    finally:
        tmp_path.chmod(0o700)


# What is no checkpoint


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    state = {"model": "ssd", "classes": ["background"], "model_state_dict": Attack()}
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(state))
    for name in ("zip.pth", "legacy.pth", "plain.pth"):
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"hello world\n",
    "readme": b"# Weights\n\nDownload them from ...\n",
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 12345\n",
    "web page": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "json": b'{"model": "ssd"}',
    "picture": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100),
    "zeros": bytes(1000),
    "random": bytes((7 * i * i + 3 * i) % 251 for i in range(3000)),
    "zip without a pickle": b"PK\x05\x06" + bytes(18),
    # Pickle opcodes by chance: each of these once came out as another exception.
    "opcode G": b"Gk3h",
    "opcode J": b"J$&",
    "opcode R": b"Rc0@$1{(bW.I]J2ES,{2",
    "opcode U": b"U",
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_a_users_error_that_names_the_file(tmp_path, name):
    path = tmp_path / "a.pth"
    path.write_bytes(NO_CHECKPOINTS[name])
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_messages_about_what_is_no_checkpoint_say_what_it_is(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(NO_CHECKPOINTS["git lfs pointer"])
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        load_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter("error")
        load_checkpoint(path)
    assert "TorchScript" in str(error.value) and "weights_only" not in str(error.value)


def test_a_checkpoint_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", SMALL)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "a.pth")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="a.pth: may not be read") as error:
        load_checkpoint(tmp_path / "a.pth")
    assert "broken" not in str(error.value)


@pytest.mark.parametrize("content", ["cut", "page", "empty", "another network", "no dict", "pointer"])
def test_a_wrong_file_of_imagenets_weights_is_named(tmp_path, monkeypatch, content):
    file = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-7ebf99e0.pth"
    file.parent.mkdir(parents=True)
    torch.save({"features.weight": torch.ones(3)} if content == "another network" else torch.ones(999), file)
    whole = file.read_bytes()
    wrong = {"cut": whole[:-300], "page": b"<!DOCTYPE html>", "empty": b"", "pointer": b"version https://git-lfs"}
    file.write_bytes(wrong.get(content, whole))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        checkpoint.with_imagenet("ssdlite", 3)
    assert str(file) in str(error.value) and "delete it" in str(error.value) and "\n" not in str(error.value)


def test_a_download_that_fails_and_a_bug_of_ours_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("invalid hash value")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(UserError, match="no ImageNet weights .invalid hash.*--no-pretrained-backbone"):
        checkpoint.with_imagenet("ssdlite", 3)
    file = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-7ebf99e0.pth"
    file.write_bytes(b"whole")
    monkeypatch.setattr(checkpoint, "build_model", fail)
    monkeypatch.setattr(checkpoint.hashlib, "sha256", lambda _: SimpleNamespace(hexdigest=lambda: "7ebf99e0aa"))
    with pytest.raises(RuntimeError, match="invalid hash"):
        checkpoint.with_imagenet("ssdlite", 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_checkpoint_is_a_users_error_wherever_it_is_cut(tmp_path, zipped):
    path = tmp_path / "a.pth"
    state = SMALL | {"model_state_dict": {"w": torch.ones(99)}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.pth"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [SMALL | {"model_state_dict": {1: torch.ones(1)}}, [1, 2], torch.ones(3), 7, None,
     {}, {"state_dict": {}}, {"weights": torch.ones(2), 3: 4},
     {"model": "ssd"}, {"model_state_dict": [1]}, {"model": torch.ones(2), "epoch": 3}],
    ids=str,
)  # fmt: skip
def test_other_contents_are_a_users_error(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth"):
        network_from(load_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model", "resnet50", "model 'resnet50' is not one of ours"),  # of another project that has these keys, too
        ("model_state_dict", None, "model_state_dict missing"),
        ("model_state_dict", [torch.ones(1)], "model_state_dict missing or of another type"),
        ("category_ids", None, "category_ids missing"),
        ("category_ids", [2], "classes or category_ids amiss"),
        ("category_ids", [2, "b"], "classes or category_ids amiss"),
        ("category_ids", [2, 2], "classes or category_ids amiss"),
        ("classes", ["cat", "dog", "cow"], "classes or category_ids amiss"),
        ("classes", ["background", "a", 7], "classes or category_ids amiss"),
    ],
)
def test_our_layout_with_something_amiss_is_a_users_error(tmp_path, lite, key, value, message):
    state, path = state_of(lite), tmp_path / "a.pth"
    save_checkpoint(path, state | {key: value})
    with pytest.raises(UserError, match="a.pth") as error:
        network_from(load_checkpoint(path), path)
    assert message in str(error.value)


def test_an_ssdlite_of_before_the_mean_is_read(tmp_path, lite):
    state, path = state_of(lite), tmp_path / "a.pth"
    del state["model_state_dict"]["backbone.mean"]
    save_checkpoint(path, state)
    assert same(dict(network_from(load_checkpoint(path), path).state_dict()), dict(lite.state_dict()))


# Published checkpoints: layouts as ../shared/reference/README.md describes them


def published(weights, layout, classes=None, prefix=""):
    """A checkpoint in one of the two published layouts, with what else these hold."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [43, 54])
    rest = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 53}
    weights = {prefix + name: value for name, value in weights.items()}
    if layout == "model_state_dict":
        return rest | {"model_state_dict": weights}
    return rest | {"model": weights, "label_map": dict(enumerate(classes)), "iteration": 7}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["model_state_dict", "model"])
def test_published_coco_checkpoints_are_read(tmp_path, coco_weights, layout, prefix):
    path, names = tmp_path / "a.pth", ["background", *COCO_CLASSES]
    torch.save(published(coco_weights, layout, names, prefix), path)
    state = load_checkpoint(path)
    assert state["model"] == "ssd" and "published" in state["origin"]
    assert f"'{layout}'" in state["origin"] and "\n" not in state["origin"]
    assert state["classes"] == names and len(names) == 81
    assert list(state["category_ids"]) == list(COCO_CATEGORY_IDS)
    model = network_from(state, path)
    assert same(dict(model.state_dict()), dict(coco_weights))


def test_a_checkpoint_saved_from_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save(SMALL | {"model_state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pth")
    assert b"cuda:0" in (tmp_path / "a.pth").read_bytes()
    weights = load_checkpoint(tmp_path / "a.pth")["model_state_dict"]["w"]
    assert weights.device.type == "cpu" and weights.tolist() == [1, 1]


def test_eighty_classes_that_are_not_cocos_have_ids_of_their_own(tmp_path):
    names = ["background", *(f"class {n}" for n in range(80))]
    torch.save(published({}, "model", names), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded["classes"] == names and loaded["category_ids"] == list(range(1, 81))


@pytest.mark.parametrize("label_map", [["background", "cat"], {"cat": 1}, {1: "cat"}, 7], ids=str)
def test_a_label_map_of_another_kind_is_a_users_error(tmp_path, label_map):
    torch.save({"model": {}, "label_map": label_map}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="label_map"):
        load_checkpoint(tmp_path / "a.pth")


def test_bare_weights_are_told_how_to_be_read(tmp_path):
    torch.save({"loc.0.weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="model_state_dict"):
        load_checkpoint(tmp_path / "a.pth")


def test_label_map_gives_the_classes_in_order(tmp_path):
    weights = build_model("ssd", 3, pretrained_backbone=False).state_dict()
    state = published(weights, "model", ["background", "cat", "dog"])
    state["label_map"] = {2: "dog", 0: "background", 1: "cat"}
    torch.save(state, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded["classes"] == CLASSES and list(loaded["category_ids"]) == [1, 2]
    network_from(loaded, tmp_path / "a.pth")


def test_coco_has_80_classes_with_ids_from_1_to_90():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    ids = list(COCO_CATEGORY_IDS)
    assert len(ids) == len(set(ids)) == 80 and ids == sorted(ids) and (ids[0], ids[-1]) == (1, 90)
    # Known from the data set itself: https://cocodataset.org, instances_val2017.json.
    # Both sides of each of the ten gaps, and the ends.
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 16: "bird", 17: "cat", 18: "dog"}
    known |= {25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 44: "bottle"}
    known |= {46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv"}
    known |= {82: "refrigerator", 84: "book", 90: "toothbrush"}
    named = dict(zip(ids, COCO_CLASSES, strict=True))
    assert known.items() <= named.items()


def test_coco_names_and_ids_are_those_of_its_annotation_file():
    if not COCO_FILE.is_file():
        pytest.skip("no ../shared/data/coco_real beside the repository")
    categories = json.loads(COCO_FILE.read_text())["categories"]
    ours = zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
    assert dict(ours) == {category["id"]: category["name"] for category in categories}


# Bare weights of qfgaohao/pytorch-ssd


@pytest.fixture(scope="module")
def mb2():
    """Weights of its mb2-ssd-lite, of VOC's classes; not to be changed."""
    return mb2_ssd_lite()


def of_classes(mb2, num_classes):
    """The same with class heads cut to `num_classes`, background included."""
    heads = [name for name, values in mb2.items() if values.shape[:1] == (6 * 21,)]
    return mb2 | {name: mb2[name][: 6 * num_classes] for name in heads}


@pytest.mark.parametrize("seed", [0, 1])
def test_mb2_ssd_lite_computes_what_the_reference_computes(tmp_path, mb2, seed):
    torch.save(mb2, tmp_path / "a.pth")
    network = network_from(load_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth").eval().double()
    with torch.inference_mode():
        loc, logits = network(normalize(torch.from_numpy(image(seed))[None]).double())
    reference = {
        name[2:]: torch.from_numpy(values)
        for name, values in np.load(REFERENCE / "forward_ssdlite.npz").items()
        if name.startswith(f"{seed}_")
    }
    default_boxes = make_default_boxes("ssdlite")
    index = [(default_boxes - box).abs().sum(dim=1).argmin().item() for box in reference["default_boxes"]]
    torch.testing.assert_close(default_boxes[index], reference["default_boxes"])
    # These weights amplify rounding: the reference, in float32, is itself so far from the same network in float64.
    torch.testing.assert_close(loc[0, index].float(), reference["loc"], rtol=0, atol=0.05)
    torch.testing.assert_close(logits[0, index].float(), reference["logits"], rtol=0, atol=0.1)
    found = Encoder(default_boxes).decode(loc, logits, score_threshold=0.05)[0]
    for box, label, score in zip(reference["boxes"], reference["labels"], reference["scores"], strict=True):
        same_place = (found["boxes"] - box).abs().amax(dim=1) < 0.3 / 300
        assert (same_place & (found["labels"] == label) & ((found["scores"] - score).abs() < 2e-3)).any()


def test_mb2_ssd_lites_first_layer_sees_the_same_pixels_up_to_the_border(tmp_path, mb2):
    torch.save(mb2, tmp_path / "a.pth")
    network = network_from(load_checkpoint(tmp_path / "a.pth"), tmp_path / "a.pth").eval()
    pixels = torch.from_numpy(image(0))[None]
    with torch.inference_mode():
        ours = network.backbone.to_stride_16[0][0](normalize(pixels) - network.backbone.mean)
        theirs = F.conv2d((pixels.permute(0, 3, 1, 2) - 127.0) / 128, mb2["base_net.0.0.weight"], stride=2, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "num_classes, labels, names, message",
    [
        (21, None, VOC_CLASSES, "VOC's classes"),
        (3, None, ["class 1", "class 2"], "labels.txt"),
        (3, "BACKGROUND\ncat\ndog", ["cat", "dog"], "labels.txt"),
        (3, "cat\ndog\n\n", ["cat", "dog"], "labels.txt"),
        (3, "BACKGROUND\ncat", ["class 1", "class 2"], "1 names, not 2: not used"),
        (21, "cat\ndog\ncow", VOC_CLASSES, "3 names, not 20: not used"),
        (3, "\ufeffcat\r\ncat\r\n", ["class 1", "class 2"], r"no names \(/.*labels.txt has 1 names, not 2: not used\)"),
        (3, b"\xe9t\xe9\nhiver", ["class 1", "class 2"], "is not UTF-8: not used"),
    ],
)
def test_mb2_ssd_lites_names_are_in_labels_txt_or_vocs(tmp_path, mb2, num_classes, labels, names, message):
    torch.save(of_classes(mb2, num_classes), tmp_path / "a.pth")
    if labels:
        (tmp_path / "labels.txt").write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    state = load_checkpoint(tmp_path / "a.pth")
    assert state["model"] == "ssdlite" and re.search(message, state["origin"]) and "\n" not in state["origin"]
    assert state["classes"] == ["background", *names]
    assert state["category_ids"] == list(range(1, num_classes))
    network_from(state, tmp_path / "a.pth")


# What the first layers and the extra ones are called in each, from that repository's source.
OTHER_NETWORKS = {
    "mb1-ssd": ["base_net.0.0.weight", "base_net.1.0.weight", "extras.0.0.weight", "extras.0.2.weight"],
    "mb1-ssd-lite": ["base_net.0.0.weight", "base_net.1.0.weight", "extras.0.0.weight", "extras.0.2.0.weight"],
    "vgg16-ssd": ["base_net.0.weight", "extras.0.0.weight", "extras.0.2.weight", "source_layer_add_ons.0.weight"],
    "sq-ssd-lite": ["base_net.0.weight", "base_net.3.squeeze.weight", "extras.0.0.weight", "extras.0.2.0.weight"],
    "mb3-ssd-lite": ["base_net.0.weight", "base_net.3.conv1.weight", "extras.0.conv1.weight"],
    "unknown network": ["base_net.7.weight"],
}


@pytest.mark.parametrize("network", OTHER_NETWORKS)
def test_its_other_networks_are_refused_by_name(tmp_path, network):
    names = [*OTHER_NETWORKS[network], "classification_headers.5.bias", "regression_headers.5.bias"]
    torch.save({name: torch.ones(126) for name in names}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth: (an )?{network} .* not supported: use .*\Z"):
        load_checkpoint(tmp_path / "a.pth")


def test_half_of_mb2_ssd_lites_width_is_refused(tmp_path, mb2):
    torch.save(mb2 | {"base_net.0.0.weight": torch.ones(16, 3, 3, 3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: mb2-ssd-lite of width 0\.5 .* not supported"):
        load_checkpoint(tmp_path / "a.pth")


def test_mb2_ssd_lite_saved_from_several_gpus_is_read(tmp_path, mb2):
    torch.save({f"module.{name}": values for name, values in mb2.items()}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["classes"][1:] == VOC_CLASSES


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "no tensor", "no class"])
def test_mb2_ssd_lite_with_something_amiss_is_a_users_error(tmp_path, mb2, change):
    weights = dict(mb2)
    if change == "missing":
        del weights["base_net.0.0.weight"]
    elif change == "no class":
        weights["classification_headers.5.bias"] = torch.ones(6)
    else:
        name = "base_net.20.weight" if change == "unexpected" else "base_net.2.conv.3.weight"
        weights[name] = 7 if change == "no tensor" else torch.ones(2)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: (does not fit|its weights|no class)"):
        load_checkpoint(tmp_path / "a.pth")


# Filling a model


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_named_and_none_is_taken(lite, change):
    model = copy.deepcopy(lite)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: torch.full_like(value, 9) for name, value in before.items()}
    name = list(weights)[-1]
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "head.of.another.model"
        weights[name] = torch.ones(1)
    else:
        weights[name] = torch.ones(5, 77)
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(model, weights, "some.pth")
    message = str(error.value)
    assert message.startswith("some.pth") and name in message and "\n" not in message
    assert ("(5, 77)" in message) == (change == "shape")
    assert same(dict(model.state_dict()), before)


def test_weights_that_are_no_tensors_are_a_users_error(lite):
    weights = dict(lite.state_dict())
    weights[next(iter(weights))] = [1.0, 2.0]
    with pytest.raises(UserError, match="some.pth"):
        checkpoint.load_weights(copy.deepcopy(lite), weights, "some.pth")


@pytest.mark.parametrize(
    "name, classes, fresh",
    [
        ("ssd", ["dog", "cat"], []),  # another order
        ("ssdlite", ["dog"], []),  # a subset
        ("ssdlite", ["cow", "dog"], ["cow"]),  # as many classes, of which one is new
        ("ssd", ["emu", "dog", "cow", "cat"], ["emu", "cow"]),
    ],
)
def test_rows_of_the_class_heads_follow_the_names(name, classes, fresh):
    torch.manual_seed(0)
    classes = ["background", *classes]
    source = build_model(name, len(CLASSES), pretrained_backbone=False).eval()
    for p in source.conf.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases start as zeros: theirs would show nothing
    model = build_model(name, len(classes), pretrained_backbone=False).eval()
    before = copy.deepcopy(model.conf)
    state = {"model_state_dict": source.state_dict(), "classes": CLASSES, "origin": "some layout"}
    assert load_matching_weights(model, state, classes, "some.pth") == fresh
    images = torch.randn(1, 3, 300, 300)
    with torch.inference_mode():
        (loc, logits), (old_loc, old_logits) = model(images), source(images)
    torch.testing.assert_close(loc, old_loc)
    for n, known in enumerate(classes):
        if known not in fresh:
            expected = old_logits[..., CLASSES.index(known)]
            torch.testing.assert_close(logits[..., n], expected, rtol=1e-3, atol=1e-3)
    for head, old in zip(model.conf.modules(), before.modules(), strict=True):
        if isinstance(head, torch.nn.Conv2d) and head.groups == 1:
            for n in map(classes.index, fresh):
                row, own = (conv.weight.unflatten(0, (len(classes), -1))[n] for conv in (head, old))
                assert torch.equal(row, own)


SIX_NAMES = {  # VOC's and COCO's for the same things
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip


@pytest.mark.parametrize(
    "known, wanted", [(list(SIX_NAMES), SIX_NAMES.values()), (list(SIX_NAMES.values()), SIX_NAMES)]
)
def test_vocs_and_cocos_names_are_the_same_classes(known, wanted):
    known, wanted = ["background", *known], ["background", *wanted]
    torch.manual_seed(0)
    source = build_model("ssdlite", 7, pretrained_backbone=False)
    model = build_model("ssdlite", 7, pretrained_backbone=False)
    state = {"model_state_dict": source.state_dict(), "classes": known, "origin": "some layout"}
    assert load_matching_weights(model, state, wanted, "some.pth") == []
    assert same(dict(model.state_dict()), dict(source.state_dict()))


def test_a_name_that_the_checkpoint_has_goes_before_its_other_name():
    source = build_model("ssdlite", 3, pretrained_backbone=False)
    state = {"model_state_dict": source.state_dict(), "classes": ["background", "couch", "sofa"], "origin": "x"}
    model = build_model("ssdlite", 3, pretrained_backbone=False)
    load_matching_weights(model, state, ["background", "couch", "sofa"], "some.pth")
    assert same(dict(model.state_dict()), dict(source.state_dict()))


def test_a_category_called_background_is_not_ours():
    torch.manual_seed(0)
    classes = ["background", "background", "dog"]
    source = build_model("ssdlite", 3, pretrained_backbone=False)
    for p in source.conf.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = build_model("ssdlite", 3, pretrained_backbone=False)
    state = {"model_state_dict": source.state_dict(), "classes": classes, "origin": "some layout"}
    assert load_matching_weights(model, state, classes, "some.pth") == []
    assert same(dict(model.state_dict()), dict(source.state_dict()))


def test_fine_tuning_from_another_model_is_a_users_error(lite, coco_weights):
    source = {"model_state_dict": coco_weights, "classes": ["background"], "origin": "x"}
    model, before = copy.deepcopy(lite), dict(lite.state_dict())
    with pytest.raises(UserError, match="some.pth"):
        load_matching_weights(model, source, CLASSES, "some.pth")
    assert same(dict(model.state_dict()), before)


# Run


def small_run(epochs=65, momentum=0.9, **attributes):
    """A run of a network of one layer, which has taken a step."""
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    options = {"epochs": epochs, "multistep": [round(epochs * 43 / 65)], "momentum": momentum}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    settings = {"model": "ssd", "classes": CLASSES, "category_ids": [3, 7], "options": options} | attributes
    return checkpoint.Run(network=network, optimizer=optimizer, scaler=scaler, **settings)


def test_a_run_without_a_checkpoint_is_a_new_one(tmp_path, capsys):
    run = small_run()
    run.resume(tmp_path / "ssd.pth")
    assert (run.epoch, run.samples_seen, run.best_ap) == (0, 0, -1)
    assert capsys.readouterr().out == ""


def test_a_run_is_resumed_with_the_options_of_the_command_line(tmp_path, capsys):
    file = tmp_path / "ssd.pth"
    saved = small_run(epochs=20, epoch=3, samples_seen=640, best_ap=0.25)
    saved.save(file)
    keys = "model model_state_dict optimizer scaler epoch samples_seen best_map classes category_ids args"
    assert set(torch.load(file, weights_only=True)) == set(keys.split())
    run = small_run(epochs=40, momentum=0.8)
    run.resume(file)
    assert (run.epoch, run.samples_seen, run.best_ap) == (3, 640, 0.25)
    assert same(dict(run.network.state_dict()), dict(saved.network.state_dict()))
    assert same(run.optimizer.state_dict()["state"], saved.optimizer.state_dict()["state"])
    assert run.optimizer.param_groups[0]["momentum"] == 0.8
    assert capsys.readouterr().out.splitlines() == [
        f"resuming from {file}: 3 epochs, 640 images",
        "changed since: epochs was 20, is 40",
        "changed since: multistep was [13], is [26]",
        "changed since: momentum was 0.9, is 0.8",
    ]


def test_a_run_of_something_else_is_not_resumed(tmp_path):
    file = tmp_path / "ssd.pth"
    small_run().save(file)
    for attributes, message in (
        ({"model": "ssdlite"}, "the checkpoint is of ssd: use --model ssd"),
        ({"classes": ["background", "x", "y"]}, "holds a run on 2 other classes (cat, dog, ...): give another"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            small_run(**attributes).resume(file)
    state = torch.load(file, weights_only=True)
    del state["optimizer"]
    save_checkpoint(file, state)
    with pytest.raises(UserError, match="has no optimizer state"):
        small_run().resume(file)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = small_run(epoch=2, samples_seen=8)
    run.network.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="weights not finite in epoch 3 after 8 images, so not saved: lower --lr"):
        run.save(tmp_path / "ssd.pth")
    assert os.listdir(tmp_path) == []
