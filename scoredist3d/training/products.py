"""Products of a trained run: image grid, exported objects and video, each of which succeeds or fails on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.paths import command_name
from scoredist3d.reasons import part, reason
from scoredist3d.systems.base import System
from scoredist3d.training.announcement import shell_path
from scoredist3d.training.console import Console, StageClock
from scoredist3d.training.failures import explained
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.outputs import (
    NoMeshError,
    export_objects,
    latest_preview,
    save_preview,
    set_export_aside,
    write_video,
)
from scoredist3d.training.summary import IMAGES, MESH, NO_MESH, VIDEO
from scoredist3d.visualization.turntable import video_name


@dataclass
class ProductWriter:
    """Writer of the products of a trained system.

    :meth:`attempt` records the failure of a product, so that it costs none of the others.

    Attributes:
        system: The trained system.
        config: Config of the run.
        folder: Folder of the run.
        console: Prints progress and messages.
        clock: Wall times of the stages.
        step: Number of optimizer steps of the state.
        paths: Files that were written, by label.
        problems: Mapping from each product to the reason why it failed; None if it was written.
    """

    system: System
    config: ExperimentConfig
    folder: RunFolder
    console: Console
    clock: StageClock
    step: int
    paths: dict[str, Path] = field(default_factory=dict)
    problems: dict[str, str | None] = field(default_factory=dict)

    def write_all(self, *, mesh: bool, video: bool) -> None:
        """Write the image grid and, if requested, the objects and then the video."""
        self.attempt(IMAGES, self.images)
        if mesh and self.system.shapes():
            self.attempt(MESH, self.mesh_or_none)
        if video:
            self.attempt(VIDEO, self.video)

    def attempt(self, product: str, write: Callable[[], None]) -> None:
        """Write a product; any exception is recorded as the reason of its failure."""
        self.problems[product] = None
        try:
            write()
        except NoMeshError as error:
            self.problems[product] = _one_line(str(error))
        except Exception as error:  # The products are independent, and a bug in one of them must not cost the others.
            were = "were" if product == IMAGES else "was"
            why = _one_line(reason(explained(error, self.config)))
            self.problems[product] = f"no {product} {were} written: {why}"
        if product == MESH and self.problems[MESH] is not None:
            self.clock.status["export"] = NO_MESH

    def images(self) -> None:
        """Save the image grid of the last step if training could not save it."""
        grid = latest_preview(self.folder, self.step)
        if grid is None:
            with part("the image grid", "preview.size"):
                grid = save_preview(self.system, self.config.preview, self.folder, self.step)
        self.paths["image grid"] = grid

    def video(self) -> None:
        """Write the final video."""

        def progress(fraction: float) -> None:
            if self.console.due():
                self.console.progress(f"{name}: {fraction:.0%}")

        name = video_name(self.system)
        with self.clock.stage(name), part("the video", "test.height", "test.width"):
            path, replaced = write_video(self.system, self.config, self.folder, progress)
        self.paths[name] = path
        if replaced:
            self.console.say(f"{name}: {replaced}")

    def mesh(self) -> None:
        """Export the objects; some that cannot be exported are recorded as the problem of the product.

        Raises:
            NoMeshError: No object could be exported; the files of an earlier export are unchanged.
        """

        def progress(stage: str, fraction: float) -> None:
            if self.console.due():
                self.console.progress(f"export: {stage} {fraction:.0%}")

        with self.clock.stage("export"), part("the export", "exporter.resolution", "exporter.texture_size"):
            exported = export_objects(self.system, self.config, self.folder, progress)
        self.paths |= exported.paths
        for item in exported.results:
            self.console.say(item.report.describe())
        if exported.remark:
            self.console.say(f"export: {exported.remark}")
        self.problems[MESH] = exported.problem

    def mesh_or_none(self) -> None:
        """Export the objects; on a failure, files that were exported from an earlier state are moved away."""
        try:
            self.mesh()
        except Exception:
            aside = set_export_aside(self.folder)
            if aside:
                self.console.say(f"export: {aside}")
            raise

    def report(self) -> None:
        """Print one line for each product: written, or the reason of its failure."""
        for product, problem in self.problems.items():
            self.console.say(f"  {product:<16} {'written' if problem is None else problem}")

    def remedy(self, resume_from: Path | None) -> str:
        """What to do about the products that failed."""
        root, command, sentences = self.folder.root, command_name(), ["Everything else is saved."]
        run, continued = shell_path(root), shell_path(resume_from or root)
        if self.problems.get(MESH) is not None:
            stage = f"stages.{root.name}." if resume_from else ""
            sentences.append(
                f"Export again with {command} --export {run} KEY=VALUE, or train longer with {command} --train "
                f"--resume {continued} {stage}trainer.max_steps=N."
            )
        if self.problems.get(VIDEO) is not None:
            sentences.append(f"Write the video again with {command} --test {run} KEY=VALUE.")
        if self.problems.get(IMAGES) is not None:
            sentences.append(f"Render images again with {command} --validate {run}.")
        return " ".join(sentences).removesuffix(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())
