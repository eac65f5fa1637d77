"""Photographs as people have them: turned, transparent, of 16 bits, moving, damaged, linked."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnsp import UserError
from cnnsp.data import images
from cnnsp.data.decoding import decode
from cnnsp.data.folder import check_folder, find_images, list_folder
from cnnsp.data.images import load_folder

from .scripts import run_code
from .test_train import make_photographs

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
GREY = np.repeat((RAMP * 255).round().astype(np.uint8)[..., None], 3, 2)


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((96, 64), Image.Resampling.BICUBIC)


def resized(image: Image.Image, size: int = 32) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    path, exif = tmp_path / f"turned{suffix}", Image.Exif()
    exif[274] = orientation
    picture().save(path, exif=exif)
    with Image.open(path) as image:
        assert np.array_equal(decode(path, 32), resized(ImageOps.exif_transpose(image)))
        assert np.array_equal(decode(path, 32), resized(image)) == (orientation == 1)


def test_a_damaged_exif_spoils_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    picture().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    with Image.open(path) as image:
        assert np.array_equal(decode(path, 32), resized(image))


DEEP = {
    "16-png": ((RAMP * 65535).astype(np.uint16), ".png"),
    "16-tif": ((RAMP * 65535).astype(np.uint16), ".tif"),
    "16-tif-big": ((RAMP * 65535).astype(">u2"), ".tif"),
    "10-in-16": ((RAMP * 1023).astype(np.uint16), ".tif"),
    "12-in-16": ((RAMP * 4095).astype(np.uint16), ".tif"),
    "14-in-16": ((RAMP * 16383).astype(np.uint16), ".png"),
    "32-int": ((RAMP * 65535).astype(np.int32), ".tif"),
    "float-to-1": (RAMP.astype(np.float32), ".tif"),
    "float-to-255": ((RAMP * 255).astype(np.float32), ".tif"),
    "float-16": ((RAMP * 65535).astype(np.float32), ".tif"),
}


@pytest.mark.parametrize(("pixels", "suffix"), DEEP.values(), ids=DEEP)
def test_more_than_eight_bits_are_scaled(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(pixels).save(path)
    difference = decode(path, 32).astype(int) - resized(Image.fromarray(GREY))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("pixels", "top"), [(np.uint16, 65535), (np.float32, 1)])
def test_a_tiff_whose_white_is_0(tmp_path: Path, pixels: type, top: int) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(((1 - RAMP) * top).astype(pixels)).save(path, tiffinfo={262: 0})
    difference = decode(path, 32).astype(int) - resized(Image.fromarray(GREY))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "pixels",
    [RAMP - 0.5, RAMP * 1e6, np.where(RAMP > 0.5, np.nan, RAMP), np.where(RAMP > 0.5, np.inf, 0)],
    ids=["negative", "large", "nan", "inf"],
)
def test_pixels_without_a_scale_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "measured.tif"
    Image.fromarray(pixels.astype(np.float32)).save(path)
    with pytest.raises(UserError, match=r"measured\.tif has pixels from .*; convert it to 8 bits"):
        decode(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "key"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """Black lies under the left half, which one does not see."""
    path, colours = tmp_path / "cut.png", np.zeros((32, 64, 4), np.uint8)
    colours[:, 32:] = (200, 200, 200, 255)
    image = Image.fromarray(colours)
    if mode == "key":
        Image.fromarray(colours[..., :3]).save(path, transparency=(0, 0, 0))
    elif mode == "P":
        image.quantize(4).save(path)
    else:
        image.convert(mode).save(path)
    seen = decode(path, 64)
    assert (seen[:, :30] == 255).all()
    assert np.abs(seen[:, 34:].astype(int) - 200).max() <= 2


def test_a_deep_grey_that_stands_for_nothing_is_white(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    pixels = np.full((8, 8), 51400, np.uint16)
    pixels[:, :4] = 4660
    Image.fromarray(pixels).save(path, transparency=4660)
    assert (decode(path, 8) == np.repeat([255, 200], 4)[:, None]).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    path = tmp_path / "glass.png"
    Image.new("RGBA", (8, 8), (55, 55, 55, 51)).save(path)  # a fifth of 55 and four of 255
    assert (decode(path, 8) == 215).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving{suffix}"
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (decode(path, 8) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("brand", "message"),
    [(b"heic", "is HEIC: pip install pillow-heif"), (b"avif", "is AVIF: pip install --upgrade")],
)
def test_formats_that_pillow_needs_help_with(tmp_path: Path, brand: bytes, message: str) -> None:
    path = tmp_path / "IMG_0001.jpg"  # whatever its name
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(UserError, match=rf"IMG_0001\.jpg {message}"):
        decode(path)


def test_heic_is_read_where_its_package_is(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "IMG_0002.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    opened, read = picture(), Image.open

    def register() -> None:
        monkeypatch.setattr(Image, "open", lambda p: opened if p == path else read(p))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(decode(path, 32), resized(opened))


def test_warnings_name_their_files(tmp_path: Path) -> None:
    """Each of them, from several threads at once, none of other code, and nothing stays changed."""
    paths = [str(tmp_path / f"{number}.png") for number in range(6)]
    for path in paths:
        picture().save(path)
    code = """if True:
        import numpy, sys, warnings  # which changes them, too
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from PIL import Image
        before = warnings.showwarning, list(warnings.filters)
        from cnnsp.data.decoding import decode
        Image.MAX_IMAGE_PIXELS = 5000
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(decode, map(Path, sys.argv[1:])))
        assert (warnings.showwarning, list(warnings.filters)) == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode(Path(sys.argv[1]))
        warnings.warn("of other code")
    """
    done = run_code(code, *paths, check=True)
    lines = [line.split(": ") for line in done.stderr.splitlines() if "6144 pixels" in line]
    assert sorted(path for _, path, _ in lines) == sorted([*paths, paths[0]])
    assert all(start == "warning" for start, *_ in lines)
    assert "UserWarning: of other code" in done.stderr


def test_errors_name_their_files(tmp_path: Path, monkeypatch) -> None:
    """Also where Pillow's text does not."""
    picture().save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    for name in ("set.zip", "best.pt"):  # a checkpoint is a ZIP archive, too
        (tmp_path / name).write_bytes(b"PK\3\4" + bytes(30))
    for name, reason in [
        ("huge.png", "cannot decode .*huge.png: .*exceeds limit"),
        ("folder.jpg", "folder.jpg is not a file"),
        ("none.jpg", "none.jpg does not exist"),
        ("empty.jpg", "empty.jpg is empty"),
        ("set.zip", "set.zip is not an image.*unpack it"),
        ("best.pt", "best.pt is not an image$"),
    ]:
        with pytest.raises(UserError, match=reason):
            decode(tmp_path / name)


@pytest.mark.parametrize("budget", [images.HOST_BUDGET, 0], ids=["memory", "files"])
def test_all_bad_files_are_named_at_once(tmp_path: Path, budget: int, monkeypatch) -> None:
    monkeypatch.setattr(images, "HOST_BUDGET", budget)
    folder = make_photographs(tmp_path)
    bad = [folder / "train_data" / "daisy" / "1.jpg", folder / "train_data" / "rose" / "0.jpg"]
    if budget > 0:  # else they are decoded when they are used
        bad.append(folder / "test_data" / "daisy" / "0.jpg")
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError) as caught:  # noqa: PT012  where it is raised is one of the two
        train, _ = load_folder(folder)
        list(train.batches([train.labels.new_tensor(range(4))], train.labels.device, 2))
    assert all(str(path) in str(caught.value) for path in bad)
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_with_folders_is_named_at_once(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path)
    (folder / "train_data" / "daisy" / "more").mkdir()
    (folder / "test_data" / "rose" / "gone.png").symlink_to(folder / "nowhere")
    (folder / "test_data" / "c").mkdir()
    with pytest.raises(UserError) as caught:
        list_folder(folder)
    for reason in ("more is not a file", "gone.png is a link to nothing", "c holds no images"):
        assert reason in str(caught.value)


def test_one_class_is_too_few_for_quarters_too(tmp_path: Path) -> None:
    folder = tmp_path / "train_data" / "a"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.png").touch()
    (folder.parent / "@eaDir").mkdir()  # a network drive's
    with pytest.raises(UserError, match="holds one class, 'a'"):
        list_folder(tmp_path, validate=2)


def test_a_folder_too_deep_and_one_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    folder = make_photographs(tmp_path / "set")
    with pytest.raises(UserError, match=r"train_data/train_data is missing.*--data-dir \S*set may"):
        list_folder(folder / "train_data")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot read .*train_data: Permission denied"):
        list_folder(folder)


def test_an_archive_in_place_of_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    archive.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"photos\.zip is a file, not a folder; unpack it"):
        check_folder(archive, "data folder")


def test_patterns_that_the_shell_leaves_are_matched(tmp_path: Path) -> None:
    """As those of Windows do; a file of that very name comes first."""
    for name in ("b.jpg", "a.jpg", "a[b].jpg", "notes.txt"):
        (tmp_path / name).touch()
    for pattern, *expected in (
        ("?.jpg", ("a.jpg", True), ("b.jpg", True)),
        ("a[b].jpg", ("a[b].jpg", False)),
        ("*.png", ("*.png", False)),
    ):
        sources, _ = find_images([str(tmp_path / pattern)])
        assert [(source.path.name, source.in_folder) for source in sources] == expected


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@needs_links
def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    album, other = tmp_path / "album", tmp_path / "other"
    for folder in (album / "in", other):
        folder.mkdir(parents=True)
        picture().save(folder / "1.png")
    (album / "linked").symlink_to(other)
    (album / "in" / "up").symlink_to(album)  # a loop
    (other / "back").symlink_to(album / "in")  # one of two links
    (album / "gone.png").symlink_to(tmp_path / "nowhere.png")
    sources, passed_over = find_images([album])
    found = sorted(str(source.path.relative_to(album)) for source in sources)
    assert found == ["gone.png", "in/1.png", "linked/1.png", "linked/back/1.png"]
    assert sorted(passed_over) == sorted(
        f"{album / loop} links to a folder that it lies in" for loop in ("in/up", "linked/back/up")
    )


def test_none_of_the_flowers_changes(photographs: Path) -> None:
    """Decoded as before there was anything but RGB."""
    paths = sorted(photographs.glob("*_data/*/*"))
    assert len(paths) == 900

    def same(path: Path) -> bool:
        with Image.open(path) as image:
            return np.array_equal(decode(path), resized(image, 256))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(same, paths))
