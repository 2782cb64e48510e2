"""Image files: open, turn upright, and name what is broken."""

import contextlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.usage import UnreadableImage

UPRIGHT = {  # EXIF 2.3, tag 274: what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path, upright=True):
    """Read an image file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says if `upright`.

    Raises UnreadableImage if the file is missing, broken or not an image.
    """
    with open_image(path) as image:
        image.load()
        # Not ImageOps.exif_transpose: it rewrites the EXIF block, and fails at an odd tag in it.
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        if upright and turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P":  # by way of RGBA: a palette may hold transparent colours
            image = image.convert("RGBA")
        if image.mode != "RGB":  # else it would be copied
            image = image.convert("RGB")
        return np.array(image)


def image_size(path):
    """(width, height) of an image as it is stored, from its header alone."""
    with open_image(path) as image:
        return image.size


@contextlib.contextmanager
def open_image(path):
    """Pillow's Image of a file, its header read; UnreadableImage if anything is wrong with it."""
    try:
        # By file, not by name: Pillow would map an uncompressed TIFF and shear a turned one.
        with open(path, "rb") as file, Image.open(file) as image:  # refuses decompression bombs
            yield image
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such image") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UnreadableImage(
            f"{path}: more than {limit} million pixels: scale it down, or cut it into tiles"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{path}: cannot be read as an image (no known image format, or a broken file)"
        ) from error
    # What Pillow's many decoders raise on a broken file.
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError) as error:
        reason = str(error).splitlines()[0].replace(str(path), "file") if str(error) else "broken file"
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason})") from error
