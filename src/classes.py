"""Class names of COCO and VOC, and the one place where labels become category ids and back.

Label k is category `category_ids[k - 1]`, whose name is `classes[k]`; label 0 is "background".
"""

import numpy as np

# COCO's 80 classes in the order of their category ids, which run from 1 to 90 with ten gaps.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COCO_CATEGORY_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
VOC_CLASSES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,"
    "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor"
).split(",")
VOC_TO_COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
# VOC's name of a COCO class, and the other way round.
OTHER_NAME = VOC_TO_COCO | {coco: voc for voc, coco in VOC_TO_COCO.items()}


def names_by_id(category_ids, classes):
    """{category id: name of the class}."""
    return dict(zip(category_ids, classes[1:], strict=True))


def matching_labels(classes, others):
    """[(label in `classes`, label in `others`), ...] of equal names; VOC's and COCO's for a class count as equal."""
    pairs = [(0, 0)]  # background; a category of the user's may be called so, too
    for label, name in enumerate(classes[1:], start=1):
        found = name if name in others[1:] else OTHER_NAME.get(name)
        if found in others[1:]:
            pairs.append((label, others.index(found, 1)))
    return pairs


def to_labels(ids, category_ids):
    """Labels (N,) int64 from 1 of categories `ids` (N,), where category_ids are all, in ascending order."""
    return np.searchsorted(category_ids, ids) + 1


def to_category_ids(labels, category_ids):
    """Category ids (N,) int64 of labels (N,): the inverse of `to_labels`."""
    return np.asarray(category_ids, np.int64)[np.asarray(labels, np.int64) - 1]
