"""Video and image files, read back after writing."""

import builtins
import contextlib
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoredist3d.export import video as video_module
from scoredist3d.export.images import image_grid, save_png, to_uint8
from scoredist3d.export.video import VideoError, VideoWriter, ffmpeg_available

needs_ffmpeg = pytest.mark.skipif(not ffmpeg_available(), reason="imageio-ffmpeg is not installed")


def frames(count, height, width):
    """Frames of a uniform color that changes from frame to frame."""
    for index in range(count):
        frame = torch.zeros(height, width, 3)
        frame[..., 0], frame[..., 1], frame[..., 2] = index / max(count - 1, 1), 0.5, 0.25
        yield frame


def decoded(path: Path, height: int, width: int) -> tuple[str, np.ndarray]:
    """Metadata of a video from ffmpeg, and its frames (N, height, width, 3)."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=600)
    frames = np.frombuffer(done.stdout, dtype=np.uint8).reshape(-1, height, width, 3)
    return done.stderr.decode(errors="replace"), frames


@needs_ffmpeg
def test_the_folder_of_a_video_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VideoWriter(Path("http:") / "50%d" / "-a b.mp4") as video:
        video.add(np.zeros((8, 8, 3)))
    assert [path.name for path in Path("http:/50%d").iterdir()] == [video.path.name]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 51)])
def test_mp4_has_the_frames_and_an_even_size(tmp_path, height, width):
    with VideoWriter(tmp_path / "new" / "turn.mp4", fps=12) as video:
        for frame in frames(9, height, width):
            video.add(frame)
        assert not (tmp_path / "new" / "turn.mp4").exists()
    assert video.path == tmp_path / "new" / "turn.mp4" and video.num_frames == 9 and video.note == ""
    said, read = decoded(video.path, height + height % 2, width + width % 2)
    assert re.search(r"Video: h264 .*yuv420p.* 12 fps", said) and len(read) == 9
    for index, frame in enumerate(read):
        # Chroma subsampling and crf 18 change a uniform color by a few levels.
        np.testing.assert_allclose(frame.mean((0, 1)), [255 * index / 8, 127.5, 63.75], atol=5)
    assert os.listdir(tmp_path / "new") == ["turn.mp4"]


@needs_ffmpeg
def test_mp4_starts_with_its_index(tmp_path):
    with VideoWriter(tmp_path / "turn.mp4") as video:
        for frame in frames(3, 32, 32):
            video.add(frame)
    data = video.path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@needs_ffmpeg
def test_an_exception_leaves_no_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "turn.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="in the middle"), VideoWriter(tmp_path / "turn.mp4") as video:
        for frame in frames(3, 32, 32):
            video.add(frame)
        raise RuntimeError("in the middle")
    assert os.listdir(tmp_path) == ["turn.mp4"] and (tmp_path / "turn.mp4").read_bytes() == b"old"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Use a shell script as ffmpeg; ``$REAL`` is the real one, ``$LAST`` the last argument."""
    import imageio_ffmpeg

    program = folder / "ffmpeg"
    last = "for LAST; do :; done"
    program.write_text(f"#!/bin/sh\nREAL='{imageio_ffmpeg.get_ffmpeg_exe()}'\n{last}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


@needs_ffmpeg
@pytest.mark.parametrize(
    ("script", "said"),
    [
        # All frames are accepted, a file is there, and only the exit status tells that it is broken.
        ('"$REAL" "$@"; echo "disk quota exceeded" >&2; exit 3', r"exit status 3 \(disk quota exceeded\)"),
        ("head -c 10 >/dev/null; exit 4", r"exit status 4 \(without a message\)"),
        ('"$REAL" "$@" || exit; case "$LAST" in *.mp4) truncate -s 2000 "$LAST";; esac', "cannot be read"),
        ('case "$LAST" in *.mp4) cat >/dev/null; : >"$LAST";; *) exec "$REAL" "$@";; esac', "cannot be read"),
        ('case "$LAST" in *.mp4) head -c 36864 | "$REAL" "$@"; cat >/dev/null;; *) exec "$REAL" "$@";; esac', "3 of 9"),
        ("exit 0", "exit status 0|cannot be read"),
    ],
)
def test_a_video_that_ffmpeg_breaks_is_an_error(tmp_path, monkeypatch, script, said):
    stand_in(tmp_path, monkeypatch, script)
    out = tmp_path / "out"
    with pytest.raises(VideoError, match=said) as caught, VideoWriter(out / "turn.mp4") as video:
        for frame in frames(9, 64, 64):
            video.add(frame)
    assert os.listdir(out) == [] and "\n" not in str(caught.value) and "write a .webp or .gif" in str(caught.value)


@needs_ffmpeg
def test_an_ffmpeg_that_cannot_be_started_is_an_error_and_a_missing_one_is_replaced(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(VideoError, match=r"ffmpeg cannot be started \(.*ffmpeg: Exec format error\)"):  # noqa: SIM117
        with VideoWriter(tmp_path / "turn.mp4") as video:
            video.add(np.zeros((8, 8, 3), dtype=np.uint8))
    program.unlink()
    with VideoWriter(tmp_path / "turn.mp4") as video:
        video.add(np.zeros((8, 8, 3), dtype=np.uint8))
    assert video.path.suffix in (".webp", ".gif") and "ffmpeg was not found" in video.note


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_incomplete_animation_is_an_error(tmp_path, monkeypatch, suffix):
    save = Image.Image.save

    def incomplete(self, path, **options):
        save(self, path, **{**options, "append_images": options["append_images"][:-1]})

    for change, said in ((None, ""), (incomplete, "so frames are missing")):
        if change is not None:
            monkeypatch.setattr(Image.Image, "save", change)
        # Equal frames, which the formats merge, are all there.
        with contextlib.ExitStack() as stack:
            if said:
                stack.enter_context(pytest.raises(VideoError, match=said))
            video = stack.enter_context(VideoWriter(tmp_path / f"turn{suffix}", fps=24))
            for value in (0, 0, 0, 90, 90, 200):
                video.add(np.full((16, 16, 3), value, dtype=np.uint8))
    assert os.listdir(tmp_path) == [f"turn{suffix}"]

    def cut(self, path, **options):
        save(self, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(VideoError), VideoWriter(tmp_path / f"turn{suffix}", fps=24) as video:
        for frame in frames(6, 16, 16):
            video.add(frame)


@needs_ffmpeg
def test_frames_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"size of the first, \(32, 32\), got \(32, 30\)"):  # noqa: SIM117
        with VideoWriter(tmp_path / "a.mp4") as video:
            video.add(np.zeros((32, 32, 3), dtype=np.uint8))
            video.add(np.zeros((32, 30, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="1 values are not finite"), VideoWriter(tmp_path / "b.mp4") as video:
        frame = torch.zeros(8, 8, 3)
        frame[0, 0, 0] = torch.nan
        video.add(frame)
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "c.mp4"):
        pass
    with pytest.raises(ValueError, match="fps"):
        VideoWriter(tmp_path / "d.mp4", fps=0)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def without_ffmpeg(monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.startswith("imageio_ffmpeg"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert not video_module.ffmpeg_available()


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_without_ffmpeg_an_animation_of_the_same_stem_is_written(tmp_path, monkeypatch, without_ffmpeg, caplog, suffix):
    if suffix == ".gif":
        monkeypatch.setattr("PIL.features.check", lambda name: False)
    with VideoWriter(tmp_path / "turn.mp4", fps=10) as video:
        for frame in frames(6, 33, 48):
            video.add(frame)
    assert video.path == tmp_path / f"turn{suffix}" and os.listdir(tmp_path) == [video.path.name]
    assert "imageio-ffmpeg" in video.note and video.note in caplog.text
    with Image.open(video.path) as animation:
        assert animation.n_frames == 6 and animation.size == (48, 34)
        animation.seek(5)
        np.testing.assert_allclose(np.asarray(animation.convert("RGB")).mean((0, 1)), [255, 127.5, 63.75], atol=6)


def test_without_ffmpeg_an_exception_leaves_no_file(tmp_path, without_ffmpeg):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "turn.mp4") as video:
        for frame in frames(3, 16, 16):
            video.add(frame)
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_png_round_trip_and_rounding(tmp_path):
    image = torch.tensor([[[0.0, 0.5, 1.0], [-0.2, 1.2, 100.4 / 255]]])
    path = save_png(image, tmp_path / "deep" / "image.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), [[[0, 128, 255], [0, 255, 100]]])
    assert os.listdir(tmp_path / "deep") == ["image.png"]
    gray = to_uint8(torch.full((2, 3), 0.2))
    assert gray.shape == (2, 3, 3) and (gray == 51).all()
    unchanged = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(to_uint8(unchanged), unchanged)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(unchanged)), unchanged)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, 4), torch.zeros(2), torch.zeros(2, 2, 3, dtype=torch.int64)])
def test_other_images_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=r"^image: the"):
        save_png(bad, tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_image_grid_places_images_row_by_row():
    images = [torch.full((4, 6, 3), value) for value in (0.0, 0.2, 0.4, 0.6, 0.8)]
    grid = image_grid(images, columns=2, gap=1)
    assert grid.shape == (3 * 5 - 1, 2 * 7 - 1, 3) and grid.dtype == np.uint8
    for index, value in enumerate((0, 51, 102, 153, 204)):
        top, left = index // 2 * 5, index % 2 * 7
        assert (grid[top : top + 4, left : left + 6] == value).all()
    assert (grid[4] == 255).all() and (grid[:, 6] == 255).all() and (grid[10:, 7:] == 255).all()
    assert image_grid(torch.zeros(7, 4, 4, 3)).shape == (3 * 6 - 2, 3 * 6 - 2, 3)


def test_image_grid_labels_are_drawn_under_the_images():
    images = [torch.zeros(16, 40, 3)] * 2
    plain, labelled = image_grid(images, gap=0), image_grid(images, labels=["step 1", "φ"], gap=0)
    assert labelled.shape == (plain.shape[0] + 14, plain.shape[1], 3)
    assert (labelled[:16] == 0).all() and labelled[16:].min() < 128 < labelled[16:].mean()
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        image_grid(images, labels=["only one"])
    with pytest.raises(ValueError, match="at least one"):
        image_grid([])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_are_chosen_by_the_suffix(tmp_path, suffix):
    with VideoWriter(tmp_path / f"turn{suffix}", fps=10) as video:
        for frame in frames(5, 33, 47):
            video.add(frame)
    assert video.path == tmp_path / f"turn{suffix}" and video.note == "" and os.listdir(tmp_path) == [video.path.name]
    with Image.open(video.path) as animation:
        # GIF and WebP allow odd sizes.
        assert animation.n_frames == 5 and animation.size == (47, 33) and animation.info["loop"] == 0
        animation.seek(4)
        animation.load()
        assert animation.info["duration"] == 100
        np.testing.assert_allclose(np.asarray(animation.convert("RGB")).mean((0, 1)), [255, 127.5, 63.75], atol=6)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the name of a video must end in \.mp4, \.gif, \.webp, got turn\.avi"):
        VideoWriter(tmp_path / "turn.avi")
