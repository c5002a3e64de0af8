import base64
import http.server
import io
import logging
import threading
import urllib.parse
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from detrkit import DetrImageProcessor
from detrkit.common.limits import ImageLimits
from detrkit.errors import ImageError
from detrkit.processing.images import flatten_images, load_frames, load_image, to_raster, to_rgb
from tests.golden import ODD_IMAGES

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def equal(image, pixels):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a photo.png"
    PIL.Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def server(png):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/photo.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(png.read_bytes())

        def log_message(self, *_):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()


def test_reads_paths_and_file_urls(png):
    for source in (png, str(png), png.as_uri()):
        equal(load_image(source), PIXELS)


def test_reads_web_addresses_and_names_those_that_fail(server):
    limits = ImageLimits(allow_private=True)
    equal(load_image(f"{server}/photo.png", limits=limits), PIXELS)
    with pytest.raises(ImageError, match=r"/gone\.png.*404"):
        load_image(f"{server}/gone.png", limits=limits)
    with pytest.raises(ImageError, match="larger than 3 bytes"):
        load_image(f"{server}/photo.png", limits=ImageLimits(allow_private=True, max_bytes=3))


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        np.dstack([PIXELS, PIXELS[..., :1]]),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.float32),
        PIXELS / 255,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
    ],
    ids=["last", "first", "alpha", "int64", "uint16", "float", "fraction", "torch", "torch-first"],
)
def test_reads_arrays_of_every_kind(array):
    equal(load_image(array), PIXELS)


def test_gray_arrays_become_rgb():
    gray = PIXELS[..., 0]
    for array in (gray, gray[None], gray[..., None], gray > 127):
        values = np.where(array, 255, 0).reshape(gray.shape) if array.dtype == bool else gray
        equal(load_image(array), np.repeat(values[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV", "PA"])
def test_eight_bit_modes_convert_as_the_original_does(mode):
    image = PIL.Image.fromarray(PIXELS)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    equal(to_rgb(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F"), (np.float64, "F")]
)
def test_brighter_than_eight_bits_is_scaled_and_not_clipped(dtype, mode):
    values = np.array([[0, 257, 32896, 65535]])
    values = values / 65535 if mode == "F" else values
    image = PIL.Image.fromarray(values.astype(dtype) if mode != "F" else values.astype(np.float32))
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_thirty_two_bit_images_of_bytes_stay_as_they_are():
    image = PIL.Image.fromarray(PIXELS[..., 0].astype(np.int32))
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], PIXELS[..., 0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_sixteen_bits_that_hold_bytes_stay_as_they_are(dtype):
    gray = PIXELS[..., 0]
    equal(load_image(PIXELS.astype(dtype)), PIXELS)
    if dtype != np.int64:  # Pillow has no mode for it
        equal(to_rgb(PIL.Image.fromarray(gray.astype(dtype))), np.repeat(gray[..., None], 3, axis=-1))


@pytest.mark.parametrize(("greatest", "warns"), [(255, False), (4095, True), (4096, False), (65535, False)])
def test_sixteen_bits_that_leave_an_image_dark_are_warned_of(greatest, warns, caplog):
    array = np.array([[0, greatest]], np.uint16)
    for image in (array, PIL.Image.fromarray(array)):
        caplog.clear()
        load_image(image)
        assert [f"end at {greatest} of 65535" in text for text in caplog.messages] == [True] * warns


class ArrayOfAnotherLibrary:
    """As JAX's and TensorFlow's are: NumPy can have it, but it is no array of NumPy's."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_arrays_of_other_libraries_are_images():
    equal(load_image(ArrayOfAnotherLibrary(PIXELS)), PIXELS)
    _, second = flatten_images(ArrayOfAnotherLibrary(np.stack([PIXELS, PIXELS])))
    equal(load_image(second), PIXELS)
    np.testing.assert_array_equal(
        to_raster(ArrayOfAnotherLibrary(PIXELS.astype(np.float32)))[0], PIXELS[..., 0]
    )


def with_orientation(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def test_orientation_is_left_alone_with_a_warning_or_applied_on_request(caplog):
    with caplog.at_level(logging.WARNING, "detrkit"):
        equal(load_image(with_orientation(6)), PIXELS)
    assert len(caplog.records) == 1
    assert "exif_orientation=True" in caplog.text
    caplog.clear()
    equal(load_image(with_orientation(6), exif_orientation=True), np.rot90(PIXELS, -1))
    equal(load_image(with_orientation(1)), PIXELS)
    assert not caplog.records


def test_a_loaded_file_is_not_turned_or_warned_of_twice(tmp_path, caplog):
    with_orientation(3).save(tmp_path / "turned.png", exif=with_orientation(3).getexif())
    with caplog.at_level(logging.WARNING, "detrkit"):
        stored = load_image(tmp_path / "turned.png")
        upright = load_image(tmp_path / "turned.png", exif_orientation=True)
        equal(load_image(stored, exif_orientation=True), PIXELS)
        equal(load_image(upright, exif_orientation=True), np.rot90(PIXELS, 2))
    assert len(caplog.records) == 1


def broken_files(folder):
    """(path, what its error says) of files that are no images."""
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.jpg").touch()
    file = io.BytesIO()
    PIL.Image.effect_noise((99, 99), 50).save(file, "JPEG")
    (folder / "cut.jpg").write_bytes(file.getvalue()[:-700])
    PIL.Image.new("1", (4000, 4000)).save(folder / "large.png")
    return [
        (folder / "text.jpg", "not an image"),
        (folder / "empty.jpg", "empty"),
        (folder / "cut.jpg", "damaged"),
        (folder / "large.png", "4000x4000 exceeds"),
        (folder / "missing.jpg", "no such file"),
        (folder, "folder"),
    ]


def test_broken_files_are_named_with_a_remedy(tmp_path):
    for path, reason in broken_files(tmp_path):
        with pytest.raises(ImageError) as error:
            load_image(path, limits=ImageLimits(max_pixels=1_000_000))
        assert str(path) in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("ftp://example.org/a.jpg", "'ftp'"),
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.full((4, 5, 3), np.inf), "infinite"),
        (np.zeros((9, 9, 2)), r"\(9, 9, 2\)"),
        (np.zeros((2, 9, 9)), r"\(2, 9, 9\)"),
        (np.zeros((2, 3, 4, 5, 6)), "5"),
        (np.zeros(7), "1"),
        (np.zeros((0, 5, 3)), "empty"),
        (np.zeros((4, 5, 3), dtype=complex), "complex128"),
        (np.full((4, 5, 3), 70_000), "70000"),
        (np.full((4, 5, 3), -1), "-1"),
        (None, "NoneType"),
    ],
)
def test_what_cannot_be_an_image_is_refused(source, reason):
    with pytest.raises(ImageError, match=reason):
        load_image(source)


def test_channels_are_found_or_told():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    equal(to_raster(cube), cube.transpose(1, 2, 0))
    equal(to_raster(cube, input_data_format="channels_last"), cube)
    equal(to_raster(np.full((1, 1, 3), (1, 2, 3), dtype=np.uint8)), [[[1, 2, 3]]])


def test_real_numbers_stay_real():
    raster = to_raster(torch.rand(5, 6, 3))
    assert isinstance(raster, np.ndarray)
    assert raster.shape == (3, 5, 6)
    assert to_raster(np.ones((4, 5))).shape == (3, 4, 5)


def test_images_come_in_lists_batches_and_nested_lists():
    image = PIL.Image.fromarray(PIXELS)
    assert flatten_images(image) == [image]
    assert flatten_images([[image], (image, image)]) == [image] * 3
    assert len(flatten_images(np.zeros((5, 3, 4, 4)))) == 5
    (only,) = flatten_images(PIXELS.tolist())
    equal(load_image(only), PIXELS)
    with pytest.raises(ImageError, match="no image"):
        flatten_images([])


@pytest.mark.parametrize(
    "name",
    [
        "hopper_gray.jpg",
        "pil_sample_cmyk.jpg",
        "mode_16bit.png",
        "p_trns_single.png",
        "1_trns.png",
        "uncompressed_la.png",
        "hopper_orientation_6.jpg",
        "invalid-exif.jpg",
        "chi.gif",
        "app13-multiple.jpg",
        "high_ascii_chars.png",
        "jfif_unit_cm.jpg",
        "hopper.webp",
        "i_trns.png",
    ],
)
def test_odd_files_read_as_in_the_original(name):
    with PIL.Image.open(ODD_IMAGES / name) as image:
        expected = np.asarray(image.convert("RGB"))
    equal(load_image(ODD_IMAGES / name), expected)


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_are_read_without_a_warning():
    assert load_image(ODD_IMAGES / "pil123p.png").size == (162, 150)


def test_a_rectangle_is_turned_upright_on_request():
    assert load_image(ODD_IMAGES / "orientation_rectangle.jpg").size == (2, 1)
    assert load_image(ODD_IMAGES / "orientation_rectangle.jpg", exif_orientation=True).size == (1, 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated_jpeg.jpg", "damaged"),
        ("truncated_image.png", "damaged"),
        ("decompression_bomb.gif", "too many pixels"),
    ],
)
def test_damaged_files_are_named(name, reason):
    with pytest.raises(ImageError, match=rf"{name}.*{reason}"):
        load_image(ODD_IMAGES / name)


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_bytes_open_files_and_data_urls_read_like_the_file(png):
    content = png.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    escaped = "data:," + urllib.parse.quote_from_bytes(content)
    for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), url, escaped):
        equal(load_image(source), PIXELS)
    with png.open("rb") as file:
        file.seek(5)
        equal(load_image(file), PIXELS)
        assert file.tell() == 5


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (io.StringIO("hello"), "mode 'rb'"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,a", "base64"),
        ("http://[::1/x.jpg", r"http://\[::1/x.jpg: is not an address"),
        (PIL.Image.open(io.BytesIO(as_bytes(PIL.Image.effect_noise((99, 99), 50))[:-700])), "damaged"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot be decoded"),
        ({"bytes": b"", "path": None}, "a dictionary with 'bytes', 'path' is no image"),
        ("x" * 5000, "x{300}: cannot be opened"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image that Pillow"),
    ],
)
def test_what_holds_no_image_is_one_line(source, reason):
    with pytest.raises(ImageError, match=reason) as error:
        load_image(source)
    assert "\n" not in str(error.value)


def test_an_image_whose_file_was_closed_says_so(png):
    with PIL.Image.open(png) as lazy:
        pass
    closed = PIL.Image.fromarray(PIXELS)
    closed.close()
    for image in (lazy, closed):
        with pytest.raises(ImageError, match="closed before its pixels were read; open it again"):
            load_image(image)


@pytest.mark.parametrize(
    "entries", [{0x011A: b"x"}, {0x010E: "\ud800"}, {0x8769: b"\0" * 9}, {0x0213: 2**40, 0x011A: (1, 0)}]
)
@pytest.mark.parametrize("orientation", [6, 3])
def test_an_image_is_turned_whatever_else_its_exif_block_holds(entries, orientation):
    image = with_orientation(orientation)
    image.load()
    image.getexif().update(entries)  # what Pillow could not write back
    equal(load_image(image, exif_orientation=True), np.rot90(PIXELS, -1 if orientation == 6 else 2))


@pytest.mark.parametrize(("mode", "opaque"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_modes_read_as_the_opaque_image(mode, opaque):
    image = PIL.Image.fromarray(PIXELS).convert(opaque)
    equal(load_image(image.convert(mode)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "CMYK", "HSV", "YCbCr", "LAB", "I", "F", "I;16", "I;16B"]
)
def test_every_mode_of_pillow_is_read(mode):
    image = PIL.Image.new(mode, (9, 6))
    assert load_image(image).size == (9, 6)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_frames_are_all_read_on_request_and_told_of_otherwise(kind, caplog):
    shades = (10, 120, 230)
    frames = [PIL.Image.new("RGB", (9, 6), (shade, shade, shade)) for shade in shades]
    content = as_bytes(frames[0], kind, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, "detrkit"):
        for source in (content, PIL.Image.open(io.BytesIO(content))):
            found = [frame.getpixel((4, 3))[0] for frame in load_frames(source)]
            np.testing.assert_allclose(found, shades, atol=3)
        assert load_image(content, frame=2).getpixel((4, 3))[0] == pytest.approx(230, abs=3)
        assert not caplog.records
        assert load_image(content).getpixel((4, 3))[0] == pytest.approx(10, abs=3)
        assert "3 frames" in caplog.text
        caplog.clear()
        load_image(PIL.Image.open(io.BytesIO(content)))
        assert "3 frames" in caplog.text


def test_frames_of_one_image_are_the_image(png):
    for source in (png, PIL.Image.open(png), PIXELS):
        (only,) = load_frames(source)
        equal(only, PIXELS)


def test_frames_leave_the_callers_image_as_it_was():
    frames = [PIL.Image.new("L", (9, 6), shade) for shade in (10, 120, 230)]
    image = PIL.Image.open(io.BytesIO(as_bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    assert len(list(load_frames(image))) == 3
    assert image.tell() == 1
    assert load_image(image).getpixel((0, 0))[0] == 120


def test_a_damaged_frame_is_named():
    frames = [PIL.Image.effect_noise((40, 40), 50) for _ in range(2)]
    content = as_bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    # The second page's pixels are claimed to lie behind the file's end.
    with PIL.Image.open(io.BytesIO(content)) as image:
        image.seek(1)
        place = image.tag_v2[273][0]
    damaged = content.replace(place.to_bytes(4, "little"), (2**31 - 9).to_bytes(4, "little"))
    with pytest.raises(ImageError, match="frame 2"):
        list(load_frames(damaged))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16, ">f4", ">u2"])
def test_views_of_arrays_give_the_pixels_of_their_copies(dtype):
    pixels = np.random.default_rng(1).integers(0, 2, (20, 30, 3)).astype(dtype)
    processor = DetrImageProcessor(size={"height": 16, "width": 24}, do_rescale=False)
    odd = np.zeros(pixels.nbytes + 1, np.uint8)[1:].view(dtype).reshape(pixels.shape)
    odd[...] = pixels
    locked = pixels.copy()
    locked.flags.writeable = False
    for view, same in (
        (pixels[:, ::-1], None),
        (pixels[::-1, :, ::-1], None),
        (locked, pixels),
        (odd, pixels),
    ):
        found = processor(view, return_tensors="np")["pixel_values"]
        expected = processor(view.copy() if same is None else same, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(found, expected)
        equal(load_image(view), np.asarray(load_image(view.copy())))


def test_reading_changes_no_state_of_the_process(tmp_path):
    PIL.Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    before = list(warnings.filters), PIL.Image.MAX_IMAGE_PIXELS
    limits = ImageLimits(max_pixels=300_000_000)

    thread = threading.Thread(target=load_image, args=(tmp_path / "large.png",), kwargs={"limits": limits})
    thread.start()
    while thread.is_alive():
        assert (list(warnings.filters), PIL.Image.MAX_IMAGE_PIXELS) == before
    thread.join()
