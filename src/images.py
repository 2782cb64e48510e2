"""Image files: open, turn upright, save, and name what is broken."""

import contextlib
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.usage import DISK_FULL, UnreadableImage, UserError, is_lfs_pointer

UPRIGHT = {  # EXIF 2.3, tag 274: what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF 6.0, and one of GDAL: the level that stands for no data.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, GDAL_NODATA = 258, 262, 339, 42113


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
        if image.mode == "P":  # by way of RGBA: a palette may hold transparent colors
            image = image.convert("RGBA")
        if image.mode != "RGB":  # else it would be copied
            image = image.convert("RGB")
        return np.array(image)


def to_8_bits(image):
    """Levels of more than 8 bits, or floats, of a Pillow image as (H, W) uint8: its convert() would clip them.

    White is 65535 for 16 bits, 4095 for a TIFF of 12; for 32 it is 255 or 65535, the first that no
    level exceeds; for floats 1. If levels lie outside: the image's lowest becomes black, its highest
    white.
    """
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if levels.dtype == np.int32 and tags.get(SAMPLE_FORMAT) == (1,):
        levels = levels.view(np.uint32)  # Pillow knows signed ones only
    known = np.isfinite(levels)
    if GDAL_NODATA in tags:
        known &= levels != float(tags[GDAL_NODATA])
    low, high = (levels[known].min(), levels[known].max()) if known.any() else (0, 0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        bits = 8 if image.mode == "I" and high <= 255 and image.format != "PPM" else 16
        if image.mode != "I" and tags.get(BITS_PER_SAMPLE) == (12,):
            bits = 12
        gray = levels >> bits - 8
    else:
        if low >= 0 and high <= 1:
            low, high = 0, 1
        gray = (levels.astype(np.float64) - low) * (255 / max(float(high) - float(low), 1e-300))
        gray = np.nan_to_num(gray, posinf=255).round()
    gray = gray.clip(0, 255).astype(np.uint8)
    return 255 - gray if tags.get(PHOTOMETRIC) == 0 else gray  # 0: white is the lowest level


def save_image(image, path, quality):
    """Write image (H, W, 3) uint8 RGB to a file whose ending says the format.

    Raises UserError if it cannot be written there; a full disk passes as the OSError that it is.
    """
    try:
        Image.fromarray(image).save(path, quality=quality)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:  # the last three: sides beyond the format's
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        height, width = image.shape[:2]
        if getattr(error, "strerror", None):
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place or name") from error
        raise UserError(
            f"{path}: cannot be written as an image of {width}x{height} pixels ({error}):"
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
