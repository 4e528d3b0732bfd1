"""Video files, written frame by frame."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from threading import Thread
from types import TracebackType

import numpy as np

from scoredist3d.export.images import Image, to_uint8
from scoredist3d.files import publish

logger = logging.getLogger(__name__)


def ffmpeg_available() -> bool:
    """Whether imageio-ffmpeg and an ffmpeg executable are available."""
    try:
        import imageio_ffmpeg

        return shutil.which(imageio_ffmpeg.get_ffmpeg_exe()) is not None
    except (ImportError, RuntimeError):
        return False


SUFFIXES = (".mp4", ".gif", ".webp")
_INSTEAD = "free disk space if it is short, or write a .webp or .gif file, which needs no ffmpeg"


class VideoError(OSError):
    """Error raised if a video could not be encoded, or if the written file is incomplete."""


class VideoWriter:
    """Writer of video files in the format of the path's suffix: mp4, gif or webp.

    MP4 files are H.264, yuv420p, BT.709, with the index at the start, so that browsers play them without delay.
    Animated GIF and WebP files repeat forever; GIF is limited to 256 colors per frame and to frame times in multiples
    of 1/100 second.

    The writer is a context manager. The file appears at :attr:`path` when the block ends without an exception, after
    all of its frames have been decoded; an incomplete file raises :class:`VideoError`. Frames are passed to the encoder
    or to a temporary file immediately, so memory does not grow with their number. If the width or height of an MP4 is
    odd, the last column or row is repeated. Without ffmpeg, an animated WebP (or GIF, if Pillow lacks WebP) is written
    instead of an MP4: :attr:`path` then has another suffix and :attr:`note` gives the reason. ::

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
            VideoError: The encoder failed.
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
                publish(temporary, self.path)
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
    # To ffmpeg, a relative path with a colon is a network protocol.
    return path.absolute().with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


class _Ffmpeg:
    """Encoder that pipes frames to ffmpeg."""

    def __init__(self, temporary: Path, height: int, width: int, fps: float, crf: int) -> None:
        self.temporary, self.count = temporary, 0
        rate = str(Fraction(fps).limit_denominator())
        # Players decode untagged files with BT.601 or BT.709, depending on the size: convert to one of them and tag it.
        color = ["-vf", "scale=out_color_matrix=bt709:out_range=tv"]
        color += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
        codec = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), "-preset", "medium"]
        arguments = [*source, *codec, *color, "-movflags", "+faststart", "-y", str(temporary)]
        self.process = _start(arguments, subprocess.PIPE, subprocess.DEVNULL)
        # A full pipe would block ffmpeg, so its messages are read while it runs.
        self.messages: deque[bytes] = deque(maxlen=20)
        self.reader = Thread(target=self.messages.extend, args=(self.process.stderr,), daemon=True)
        self.reader.start()

    def add(self, frame: np.ndarray) -> None:
        """Encode a frame, (H, W, 3) uint8."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError:  # ffmpeg has ended; its exit status and messages say why.
            raise self._failure() from None
        self.count += 1

    def close(self, finish: bool) -> None:
        """Close ffmpeg and, if ``finish`` is true, check its exit status and the file.

        Raises:
            VideoError: ffmpeg failed, or the file is incomplete.
        """
        if not finish:
            self.process.kill()
        self._wait()
        if not finish:
            return
        if self.process.returncode != 0:
            raise self._failure()
        found = _decoded_frames(self.temporary)
        if found != self.count:
            raise VideoError(f"ffmpeg wrote {found} of {self.count} frames; {_INSTEAD}")

    def _wait(self) -> None:
        assert self.process.stdin is not None and self.process.stderr is not None
        with suppress(OSError):  # The rest of the buffer cannot be written if ffmpeg has ended.
            self.process.stdin.close()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()

    def _failure(self) -> VideoError:
        self._wait()
        message = " ".join(b"".join(self.messages).decode(errors="replace").split())
        status = f"ffmpeg failed with exit status {self.process.returncode}"
        return VideoError(f"{status} ({message[-200:] or 'without a message'}); {_INSTEAD}")


def _start(arguments: list[str], stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """ffmpeg with ``arguments``, in a session of its own, so that Ctrl-C does not end it before the frames are written.

    Raises:
        VideoError: The program cannot be started.
    """
    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    command = [program, "-hide_banner", "-v", "error", *arguments]
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise VideoError(f"ffmpeg cannot be started ({program}: {error.strerror}); {_INSTEAD}") from error


def _decoded_frames(path: Path) -> int:
    """Number of frames of a video file, all of which are decoded.

    Raises:
        VideoError: The file cannot be decoded.
    """
    checks = ["-nostdin", "-xerror", "-i", str(path), "-map", "0:v:0", "-f", "null", "-progress", "pipe:1", "-"]
    with _start(checks, subprocess.DEVNULL, subprocess.PIPE) as process:
        output, messages = process.communicate()
    counts = re.findall(rb"^frame=\s*(\d+)", output, re.MULTILINE)
    if process.returncode != 0 or messages.strip() or not counts:
        message = " ".join(messages.decode(errors="replace").split())[:200]
        raise VideoError(f"the video written by ffmpeg cannot be read ({message or 'it has no frames'}); {_INSTEAD}")
    return int(counts[-1])


class _Pillow:
    """Encoder that collects raw frames in a temporary file, because Pillow encodes all frames at once."""

    def __init__(self, temporary: Path, height: int, width: int, fps: float) -> None:
        self.temporary, self.size, self.fps, self.count = temporary, (height, width), fps, 0
        self.first, self.moving = b"", False
        self.spool = tempfile.TemporaryFile(dir=temporary.parent)  # noqa: SIM115 closed in close()

    def add(self, frame: np.ndarray) -> None:
        """Store a frame, (H, W, 3) uint8."""
        opaque = np.full((*self.size, 1), 255, dtype=np.uint8)
        content = np.concatenate([frame, opaque], axis=2).tobytes()
        self.first = self.first or content
        self.moving = self.moving or content != self.first
        self.spool.write(content)
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
                duration=self.duration,
                loop=0,
                quality=90,
            )
        self._check()

    @property
    def duration(self) -> int:
        """Time of a frame in ms; GIF stores multiples of 10 ms, and viewers show 0 as 100 ms."""
        return max(10, round(100 / self.fps) * 10) if self.temporary.suffix == ".gif" else round(1000 / self.fps)

    def _check(self) -> None:
        """Decode the file. Equal frames are stored as one, so their times are compared instead of their number.

        If all frames are equal, the file is a still image without a time.

        Raises:
            VideoError: The file is incomplete.
        """
        from PIL import Image as Pillow
        from PIL import ImageSequence

        found, kind, expected = 0, self.temporary.suffix, self.count * self.duration
        try:
            with Pillow.open(self.temporary) as animation:
                for frame in ImageSequence.Iterator(animation):
                    frame.load()
                    found += int(frame.info.get("duration", 0))
        except (OSError, ValueError, SyntaxError) as error:
            raise VideoError(f"the written {kind} file cannot be read ({error}); write it again") from error
        if self.moving and found != expected:
            raise VideoError(
                f"the written {kind} file lasts {found} ms instead of {expected} ms, so frames are missing; "
                "write it again"
            )
