"""Image files: open, turn upright, save, and name what is broken."""

import contextlib
import errno
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.usage import UnreadableImage, UserError, is_lfs_pointer

UPRIGHT = {  # EXIF 2.3, tag 274: what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAMPLE_FORMAT = 339  # TIFF 6.0, section 19: 1 is unsigned


def read_image(path, upright=True):
    """Read an image file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says if `upright`.

    Raises UnreadableImage if the file is missing, broken or not an image.
    """
    with open_image(path) as image:
        image.load()
        # Not ImageOps.exif_transpose: it rewrites the EXIF block, and fails at an odd tag in it.
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        if image.mode[0] in "IF":
            image = Image.fromarray(to_8_bits(image))
        if upright and turn is not None:
            image = image.transpose(turn)
        if image.mode == "P":  # by way of RGBA: a palette may hold transparent colours
            image = image.convert("RGBA")
        if image.mode != "RGB":  # else it would be copied
            image = image.convert("RGB")
        return np.array(image)


def to_8_bits(image):
    """Levels of 16 or 32 bits, or floats, of a Pillow image as (H, W) uint8: its convert() would clip them.

    White is 65535 for 16 bits; for 32 it is 255 or 65535, the first that no level exceeds; for floats
    1. If levels lie outside: the image's lowest becomes black, its highest white.
    """
    levels = np.asarray(image)
    if levels.dtype == np.int32 and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT) == (1,):
        levels = levels.view(np.uint32)  # a TIFF's; Pillow knows signed ones only
    finite = levels[np.isfinite(levels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        shift = 8 if high > 255 or image.mode != "I" else 0
        return (levels >> shift).astype(np.uint8)
    if low >= 0 and high <= 1:
        low, high = 0, 1
    grey = (levels.astype(np.float64) - low) * (255 / max(float(high) - float(low), 1e-300))
    return np.nan_to_num(grey, posinf=255).clip(0, 255).round().astype(np.uint8)


def save_image(image, path, quality):
    """Write image (H, W, 3) uint8 RGB to a file whose ending says the format.

    Raises UserError if it cannot be written there; a full disk passes as the OSError that it is.
    """
    try:
        Image.fromarray(image).save(path, quality=quality)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:  # the last three: sides beyond the format's
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        height, width = image.shape[:2]
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be written as an image of {width}x{height} pixels ({reason}):"
            " scale it down, or give it a name in .png as --output"
        ) from error


def image_size(path):
    """(width, height) of an image as it is stored, from its header alone."""
    with open_image(path) as image:
        return image.size


@contextlib.contextmanager
def open_image(path):
    """Pillow's Image of a file, its header read; UnreadableImage if anything is wrong with it."""
    try:
        # By file, not by name: Pillow would map an uncompressed TIFF and shear a turned one.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are refused
            with Image.open(file) as image:
                yield image
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such image") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UnreadableImage(
            f"{path}: more than {limit} million pixels: scale it down, or cut it into tiles"
        ) from error
    except UnidentifiedImageError as error:
        what = "no known image format, or a broken file"
        if is_lfs_pointer(path):
            what = "a Git LFS pointer: run git lfs pull"
        raise UnreadableImage(f"{path}: cannot be read as an image ({what})") from error
    # What Pillow's many decoders raise on a broken file.
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError) as error:
        reason = str(error).splitlines()[0].replace(str(path), "file") if str(error) else "broken file"
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason})") from error
