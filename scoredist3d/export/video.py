"""Video files, written frame by frame."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import tempfile
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from scoredist3d.export.images import Image, to_uint8

logger = logging.getLogger(__name__)


def ffmpeg_available() -> bool:
    """Whether imageio-ffmpeg and an ffmpeg executable are available."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


SUFFIXES = (".mp4", ".gif", ".webp")


class VideoWriter:
    """Writer of video files in the format of the path's suffix: mp4, gif or webp.

    MP4 files are H.264, yuv420p, BT.709, with the index at the start, so that browsers play them without delay.
    Animated GIF and WebP files repeat forever; GIF is limited to 256 colors per frame and to frame times in multiples
    of 1/100 second.

    The writer is a context manager. The file appears at :attr:`path` when the block ends without an exception. Frames
    are passed to the encoder or to a temporary file immediately, so memory does not grow with their number. If the
    width or height of an MP4 is odd, the last column or row is repeated. Without ffmpeg, an animated WebP (or GIF, if
    Pillow lacks WebP) is written instead of an MP4: :attr:`path` then has another suffix and :attr:`note` gives the
    reason. ::

        with VideoWriter(folder / "turntable.mp4", fps=30) as video:
            for frame in frames:
                video.add(frame)
        print(video.path)

    Args:
        path: Target file, ``.mp4``, ``.gif`` or ``.webp``; its folder is created if absent.
        fps: Frames per second.
        crf: Constant rate factor of H.264: lower values give higher quality; 18 is visually lossless.

    Raises:
        ValueError: ``fps`` is not positive, or the suffix is not supported.
    """

    def __init__(self, path: Path, fps: float = 30.0, *, crf: int = 18) -> None:
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.path, self.fps, self.crf = Path(path), float(fps), crf
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"the name of a video must end in {', '.join(SUFFIXES)}, got {self.path.name}")
        self._even = self.path.suffix == ".mp4"
        self.note = ""
        self.num_frames = 0
        self._shape: tuple[int, ...] = ()
        self._encoder: _Ffmpeg | _Pillow | None = None

    def __enter__(self) -> VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, frame: Image) -> None:
        """Append a frame, (H, W, 3), uint8 or floating point in [0, 1].

        Raises:
            ValueError: The shape differs from that of the first frame, or some values are not finite.
            OSError: The encoder failed.
        """
        array = to_uint8(frame)
        if self._encoder is None:
            self._shape = array.shape
            self._encoder = self._open(*self._padded(array).shape[:2])
        if array.shape != self._shape:
            raise ValueError(
                f"all frames of a video must have the size of the first, {self._shape[:2]}, got {array.shape[:2]}"
            )
        self._encoder.add(self._padded(array))
        self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._encoder is None:
            if kind is None:
                raise ValueError(f"{self.path.name}: no frame was added; add at least one")
            return
        temporary = self._encoder.temporary
        try:
            self._encoder.close(finish=kind is None)
            if kind is None:
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _padded(self, frame: np.ndarray) -> np.ndarray:
        """The frame, padded to an even width and height as the codec of MP4 files requires."""
        height, width = (size % 2 if self._even else 0 for size in frame.shape[:2])
        return np.pad(frame, ((0, height), (0, width), (0, 0)), mode="edge")

    def _open(self, height: int, width: int) -> _Ffmpeg | _Pillow:
        if not self._even:
            return _Pillow(_beside(self.path), height, width, self.fps)
        if ffmpeg_available():
            return _Ffmpeg(_beside(self.path), height, width, self.fps, self.crf)
        from PIL import features

        self.path = self.path.with_suffix(".webp" if features.check("webp") else ".gif")
        self.note = f"ffmpeg was not found, so the video is {self.path.name}; for an mp4, `pip install imageio-ffmpeg`"
        logger.warning(self.note)
        return _Pillow(_beside(self.path), height, width, self.fps)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


class _Ffmpeg:
    """Encoder that pipes frames to ffmpeg."""

    def __init__(self, temporary: Path, height: int, width: int, fps: float, crf: int) -> None:
        import imageio_ffmpeg

        self.temporary = temporary
        rate = str(Fraction(fps).limit_denominator())
        raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24", "-r", rate]
        # Players decode untagged files with BT.601 or BT.709, depending on the size: convert to one of them and tag it.
        color = ["-vf", "scale=out_color_matrix=bt709:out_range=tv"]
        color += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
        coded = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), "-preset", "medium", *color]
        program = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in close()
        # In a process group of its own, ffmpeg does not receive the terminal's Ctrl-C.
        self.process = subprocess.Popen(
            [*program, *raw, "-i", "-", *coded, "-movflags", "+faststart", str(temporary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            process_group=0,
        )

    def add(self, frame: np.ndarray) -> None:
        """Encode a frame, (H, W, 3) uint8.

        Raises:
            OSError: ffmpeg has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError as error:
            self.process.wait()
            raise self._failure() from error

    def close(self, finish: bool) -> None:
        """Finish the file if ``finish`` is true, and end ffmpeg.

        Raises:
            OSError: ffmpeg failed, so the file is not complete.
        """
        assert self.process.stdin is not None
        with self.errors:
            if not finish:
                self.process.kill()
            with suppress(BrokenPipeError):  # The exit code tells that ffmpeg has failed.
                self.process.stdin.close()
            try:
                code = self.process.wait()
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise
            if finish and code != 0:
                raise self._failure()

    def _failure(self) -> OSError:
        """The error of an ffmpeg that has ended, with the last line of its messages."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        full = any(os.strerror(errno.ENOSPC) in line for line in lines)
        reason = os.strerror(errno.ENOSPC) if full else lines[-1]
        return OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg failed: {reason}", str(self.temporary))


class _Pillow:
    """Encoder that collects raw frames in a temporary file, because Pillow encodes all frames at once."""

    def __init__(self, temporary: Path, height: int, width: int, fps: float) -> None:
        self.temporary, self.size, self.fps, self.count = temporary, (height, width), fps, 0
        self.spool = tempfile.TemporaryFile(dir=temporary.parent)  # noqa: SIM115 closed in close()

    def add(self, frame: np.ndarray) -> None:
        """Store a frame, (H, W, 3) uint8."""
        opaque = np.full((*self.size, 1), 255, dtype=np.uint8)
        self.spool.write(np.concatenate([frame, opaque], axis=2).tobytes())
        self.count += 1

    def close(self, finish: bool) -> None:
        """Encode the stored frames if ``finish`` is true, and delete them."""
        from PIL import Image as Pillow

        with self.spool:
            if not finish:
                return
            self.spool.flush()
            height, width = self.size
            frames = np.memmap(self.spool, dtype=np.uint8, mode="r", shape=(self.count, height, width, 4))
            # With this mode and layout, frombuffer does not copy: frames stay on disk until they are encoded.
            images = [Pillow.frombuffer("RGBA", (width, height), frame, "raw", "RGBA", 0, 1) for frame in frames]
            images[0].save(
                self.temporary,
                save_all=True,
                append_images=images[1:],
                duration=round(1000 / self.fps),
                loop=0,
                quality=90,
            )
