"""src.images against Pillow: formats, color modes, orientation, and files that are broken."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from samples import scene

from src.images import image_size, read_image, save_image
from src.usage import UserError

AWKWARD = Path(__file__).parents[2] / "shared" / "data" / "awkward"


def assert_same_image(ours, expected):
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).mean() < 2


def upright_in_pillow(path):
    """The image as Pillow shows it, RGB."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA").convert("RGB"))


@pytest.mark.parametrize(
    "mode, name",
    [("RGB", "a.jpg"), ("L", "a.jpg"), ("CMYK", "a.jpg"), ("RGB", "a.png"), ("L", "a.png"),
     ("LA", "a.png"), ("RGBA", "a.png"), ("1", "a.png"), ("P", "a.png"), ("RGB", "a.webp"),
     ("P", "a.gif"), ("RGB", "a.bmp"), ("RGB", "misnamed.png.jpg")],
)  # fmt: skip
def test_formats_and_modes_are_read_as_pillow_reads_them(tmp_path, mode, name):
    path = tmp_path / name
    kind = "PNG" if name == "misnamed.png.jpg" else None
    Image.fromarray(scene()).convert(mode).save(path, kind)
    assert_same_image(read_image(path), upright_in_pillow(path))
    assert_same_image(read_image(str(path)), upright_in_pillow(path))


def test_a_progressive_jpeg_is_read(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(scene()).save(path, progressive=True)
    assert_same_image(read_image(path), upright_in_pillow(path))


def test_a_palette_with_alpha_keeps_its_colors(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    image.putdata([0, 0, 1, 1, 2, 2, 1, 0])
    image.save(tmp_path / "a.png", transparency=bytes([255, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Pillow's, once per image
        ours = read_image(tmp_path / "a.png")
    palette = np.array([(10, 20, 30), (200, 100, 50), (0, 255, 0)])
    np.testing.assert_array_equal(ours, palette[[[0, 0, 1, 1], [2, 2, 1, 0]]])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, channels):
    levels = np.linspace(0, 65535, 64 * 50).reshape(50, 64).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), levels if channels == 1 else cv2.merge([levels] * 3))
    ours = read_image(tmp_path / "a.png")
    assert ours.shape == (50, 64, 3)
    np.testing.assert_allclose(ours, np.stack([levels / 257] * 3, axis=2), atol=1)


RAMP = np.linspace(0, 1, 64 * 50, dtype=np.float32).reshape(50, 64)


@pytest.mark.parametrize(
    "name, levels, expected",
    [
        ("a.tif", RAMP, RAMP),
        ("a.pfm", RAMP, RAMP),
        ("a.tif", 0.5 * RAMP, 0.5 * RAMP),  # no stretch of what is dark
        ("a.tif", 290 + 20 * RAMP, RAMP),  # a thermal camera's kelvins
        ("a.tif", 1.5 * RAMP - 0.2, RAMP),  # a resampling that overshot
        ("a.tif", np.where(RAMP > 0.99, np.nan, RAMP), np.where(RAMP > 0.99, 0, RAMP)),
        ("a.tif", np.where(RAMP > 0.99, np.inf, RAMP), np.where(RAMP > 0.99, 1, RAMP)),
        ("a.tif", np.full((50, 64), np.nan, np.float32), 0 * RAMP),
        ("a.tif", 0 * RAMP, 0 * RAMP),
        ("a.tif", (255 * RAMP).astype(np.int32), RAMP),  # 8 bits in 32
        ("a.tif", (65535 * RAMP).astype(np.int32), RAMP),
        ("a.tif", (4095 * RAMP).astype(np.int32), RAMP / 16),  # valid and dark, as in 16 bits
        ("a.tif", (4095 * RAMP).astype(np.uint16), RAMP / 16),
        ("a.tif", (2e9 * RAMP).astype(np.int32), RAMP),
        ("a.tif", (4e9 * RAMP).astype(np.uint32), RAMP),
        ("a.tif", (3000 * RAMP - 1000).astype(np.int16), RAMP),  # computed tomography
        ("a.pgm", (65535 * RAMP).astype(np.uint16), RAMP),
        ("a.pgm", (250 * RAMP).astype(np.uint16), 0 * RAMP),  # a dark one, as in a PNG
    ],
)  # fmt: skip
def test_levels_beyond_8_bits_and_floats_are_scaled_not_clipped(tmp_path, name, levels, expected):
    cv2.imwrite(str(tmp_path / name), levels)
    ours = read_image(tmp_path / name)
    assert ours.dtype == np.uint8 and ours.shape == (50, 64, 3)
    np.testing.assert_allclose(ours[..., 0], 255 * expected, atol=1.01)


def gray_tiff(file, bits, photometric, row):
    """Write a gray TIFF of one row of `bits` per pixel, by hand: neither OpenCV nor Pillow writes such ones."""
    text = "".join(f"{level:0{bits}b}" for level in row)
    data = bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
    data = np.array(row, "<u2").tobytes() if bits == 16 else data
    tags = {256: len(row), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    file.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    "bits, white, white_is_zero", [(12, 4095, False), (16, 65535, False), (16, 65535, True)]
)  # fmt: skip
def test_a_tiff_says_what_white_is(tmp_path, bits, white, white_is_zero):
    row = [0, white // 4, white // 2, white]
    gray_tiff(tmp_path / "a.tif", bits, 0 if white_is_zero else 1, row)
    gray = read_image(tmp_path / "a.tif")[0, :, 0].astype(int)
    expected = [255, 191, 128, 0] if white_is_zero else [0, 63, 127, 255]
    np.testing.assert_allclose(gray, expected, atol=1)


def test_the_level_for_no_data_does_not_stretch_the_others(tmp_path):
    levels = np.where(RAMP > 0.9, np.float32(-9999), 290 + 20 * RAMP)
    Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={42113: "-9999"})
    expected = np.where(RAMP > 0.9, 0, RAMP / 0.9)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif")[..., 0], 255 * expected, atol=1.01)


def test_sixteen_bits_are_turned_upright(tmp_path):
    exif, levels = Image.Exif(), np.arange(6, dtype=np.uint16).reshape(2, 3) << 12
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], np.rot90(levels >> 8, -1))


def test_an_animated_gif_is_read_as_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    ours = read_image(tmp_path / "a.gif")
    assert ours.shape == (10, 20, 3) and (ours == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_by_their_exif_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene(60, 90)
    Image.fromarray(stored).save(tmp_path / name, exif=exif, quality=95)
    # EXIF 2.3, tag 274: where the stored row 0 and column 0 are seen.
    seen = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(stored),
    }  # fmt: skip
    ours = read_image(tmp_path / name)
    assert_same_image(ours, upright_in_pillow(tmp_path / name))
    assert ours.shape == seen[orientation].shape
    coarse = lambda image: cv2.blur(np.ascontiguousarray(image), (9, 9)).astype(int)  # noqa: E731
    assert np.abs(coarse(ours) - coarse(seen[orientation])).mean() < 5
    if name == "a.tif":
        return  # Pillow itself turns them, unasked
    as_stored = read_image(tmp_path / name, upright=False)
    assert as_stored.shape == stored.shape
    assert np.abs(coarse(as_stored) - coarse(stored)).mean() < 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_uncompressed_tiff_is_turned_whatever_its_mode(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(scene(60, 90)).convert(mode)
    stored.save(tmp_path / "a.tif", exif=exif)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}  # EXIF 2.3, tag 274, in quarters to the left
    expected = np.rot90(np.array(stored.convert("RGB")), turns[orientation])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)


def jpeg_segment(kind, content):
    """An APP segment as JPEG stores it: its marker, its length, its content."""
    return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def test_a_jpeg_whose_xmp_precedes_its_exif_is_turned_upright(tmp_path):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # seen turned by 90 degrees clockwise
    Image.fromarray(scene(60, 90)).save(file, "JPEG", exif=exif)
    data, stored = file.getvalue(), np.asarray(Image.open(file))
    xmp = jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta></x:xmpmeta>")
    (tmp_path / "a.jpg").write_bytes(data[:2] + xmp + data[2:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.rot90(stored, -1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_reading_a_sound_file_gives_no_warning(tmp_path, name):
    Image.fromarray(scene()).save(tmp_path / name)
    assert read_image(tmp_path / name).shape == scene().shape


@pytest.mark.parametrize("kind", [1, 4, 7])
def test_an_odd_exif_tag_does_not_hide_the_image(tmp_path, kind):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x0128] = 6, 2  # the second, the unit of resolution, is a SHORT: 3
    Image.new("RGB", (50, 40)).save(file, "JPEG", exif=exif)
    data = file.getvalue()
    assert data.count(b"\x01\x28\x00\x03") == 1
    (tmp_path / "a.jpg").write_bytes(data.replace(b"\x01\x28\x00\x03", bytes([0x01, 0x28, 0x00, kind])))
    assert read_image(tmp_path / "a.jpg").shape == (50, 40, 3)


def png_header(width, height):
    """A PNG file whose header promises an image of this size, without any pixels."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg_of_size(width, height):
    """A JPEG file whose header claims another size than it has."""
    file = io.BytesIO()
    Image.fromarray(scene()).save(file, "JPEG")
    data = bytearray(file.getvalue())
    start = data.index(b"\xff\xc0")  # the frame header: length, precision, height, width
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def broken_files():
    """Name -> bytes of files that are not images."""
    files = {"empty.jpg": b"", "text.png": b"not an image\n" * 50, "zeros.jpg": bytes(500)}
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a.gif", "GIF")):
        file = io.BytesIO()
        Image.fromarray(scene()).save(file, kind)
        data = file.getvalue()
        files |= {f"cut {name}": data[: len(data) // 2], f"stub of {name}": data[:30]}
    files["no data.png"] = png_header(20, 10)
    files["bomb.png"] = png_header(60_000, 60_000)
    files["bomb.jpg"] = jpeg_of_size(65_000, 65_000)
    return files


@pytest.mark.parametrize("name", broken_files())
def test_what_is_not_an_image_is_a_users_error_that_names_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(broken_files()[name])
    for upright in (True, False):
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name, upright)
        assert str(error.value).startswith(str(tmp_path / name))
        assert str(error.value).count(str(tmp_path)) == 1
        assert "\n" not in str(error.value) and "<" not in str(error.value)  # no repr of Python's
        assert ".cpp" not in str(error.value)  # a decoder's own source file


def test_the_error_about_too_many_pixels_names_the_remedy(tmp_path):
    for name, data in (("a.png", png_header(17_000, 11_000)), ("a.jpg", jpeg_of_size(17_000, 11_000))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: more than 178 million pixels: scale it down"):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("error")
def test_a_hundred_megapixels_are_no_cause_for_a_warning(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))
    assert image_size(tmp_path / "a.png") == (10_000, 10_000)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 12345\n")
    with pytest.raises(UserError, match="a.jpg.*Git LFS.*git lfs pull"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "ending, says",
    [(ending, "70000x2") for ending in ("jpg", "webp", "gif", "avif", "tga")]
    + [("no_such_folder/a.png", "choose another place"), (f"{'x' * 300}.png", "another place or name")],
)
def test_an_image_that_cannot_be_written_is_a_users_error(tmp_path, ending, says):
    file = tmp_path / f"a.{ending}"
    with pytest.raises(UserError) as error:
        save_image(np.zeros((2, 70_000, 3), np.uint8), file, quality=90)
    assert str(file) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(file)


def test_a_missing_file_and_a_folder_are_users_errors(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "nothing.jpg", tmp_path / "folder.jpg", str(tmp_path / "no" / "a.png")):
        with pytest.raises(UserError) as error:
            read_image(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_awkward_files_from_other_projects():
    if not AWKWARD.is_dir():
        pytest.skip("no ../shared/data/awkward beside the repository")
    files = [path for path in sorted(AWKWARD.iterdir()) if path.suffix != ".md"]
    assert files
    for path in files:
        if path.name.startswith("BROKEN_"):
            with pytest.raises(UserError, match=path.name):
                read_image(path)
        else:
            assert_same_image(read_image(path), upright_in_pillow(path))
