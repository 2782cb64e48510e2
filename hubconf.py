"""Entry points for torch.hub: `torch.hub.load(REPOSITORY, NAME)`, where REPOSITORY is "OWNER/NAME" on GitHub.

    detector = torch.hub.load(".", "ssdlite_voc", source="local")  # in a clone
    (found,) = detector([image], score_threshold=0.3)  # image: (H, W, 3) uint8 RGB, a NumPy array

The packages of requirements.txt have to be installed. This code lives in a package called `src`: a program that
has imported another one of that name gets "No module named 'src.detector'", and one that imports its own `src`
afterwards finds this one. Such a program needs a process of its own for the detector.
"""

from pathlib import Path as _Path  # names without an underscore would be entry points

from src.detector import Detector as _Detector
from src.model import build_model as _build_model

dependencies = ["torch", "torchvision", "cv2", "numpy"]


def ssdlite_voc(device=None, amp=False):
    """Detector of PASCAL VOC's twenty classes, from the checkpoint in this repository; see `src.detector.Detector`.

    device: the GPU where there is one; amp: half precision.
    """
    return _Detector.load(_Path(__file__).parent / "demo" / "ssdlite_voc.pth", device, amp)


def ssd(num_classes, pretrained_backbone=True):
    """SSD300-ResNet50 for `num_classes`, background included, untrained but for its backbone (a download)."""
    return _build_model("ssd", num_classes, pretrained_backbone)


def ssdlite(num_classes, pretrained_backbone=True):
    """SSDLite-MobileNetV2 for `num_classes`, background included, untrained but for its backbone (a download)."""
    return _build_model("ssdlite", num_classes, pretrained_backbone)
