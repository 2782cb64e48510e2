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
    """Read a picture file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says if `upright`.

    Raises UnreadableImage where there is no picture to be had.
    """
    with open_image(path) as picture:
        picture.load()
        # Not ImageOps.exif_transpose: it rewrites the EXIF block, and fails at an odd tag in it.
        turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation))
        if upright and turn is not None:
            picture = picture.transpose(turn)
        if picture.mode.startswith("I;16"):  # convert() would clip 16 bits, not scale them
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.mode == "P":  # by way of RGBA: a palette may hold transparent colours
            picture = picture.convert("RGBA")
        if picture.mode != "RGB":  # else it would be copied
            picture = picture.convert("RGB")
        return np.array(picture)


def image_size(path):
    """(width, height) of a picture as it is stored, from its header alone."""
    with open_image(path) as picture:
        return picture.size


@contextlib.contextmanager
def open_image(path):
    """Pillow's Image of a file, header read; UnreadableImage from anything wrong within."""
    try:
        # By file, not by name: Pillow would map an uncompressed TIFF and shear a turned one.
        with open(path, "rb") as file, Image.open(file) as picture:  # refuses picture bombs
            yield picture
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such picture") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UnreadableImage(
            f"{path}: more than {limit} million pixels: scale it down, or cut it into tiles"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{path}: cannot be read as a picture (no known image format, or a broken file)"
        ) from error
    # What Pillow's many decoders raise on a broken file.
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError) as error:
        reason = str(error).splitlines()[0].replace(str(path), "file") if str(error) else "broken file"
        raise UnreadableImage(f"{path}: cannot be read as a picture ({reason})") from error
