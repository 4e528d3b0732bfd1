"""Interface of exporters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from scoredist3d.config import ComponentConfig
from scoredist3d.export.report import ExportReport
from scoredist3d.export.stages import StageProgress
from scoredist3d.meshes.exportable import Exportable


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        paths: The files written, each after those it refers to.
        report: Report on the files and their content.
    """

    paths: list[Path]
    report: ExportReport


class Exporter(ABC):
    """Base class of exporters, which convert an object to files."""

    @dataclass
    class Config(ComponentConfig):
        """Options of an exporter; each subclass defines its own."""

    @abstractmethod
    def export(self, shape: Exportable, folder: Path, name: str, progress: StageProgress | None = None) -> ExportResult:
        """Write files of the object to ``folder``: either all of them or none.

        Args:
            shape: The object.
            folder: Target folder; created if absent.
            name: Stem of the file names; reduced to ASCII letters, digits, dots, dashes and underscores.
            progress: Callback that receives the name of each stage and the fraction of it that is done.

        Raises:
            ValueError: The object is empty or has invalid values; the message names the setting to change.
        """

    def for_prompt(self, prompt: str) -> Exporter:
        """The exporter for an object with this prompt; another one if an option depends on the prompt.

        Raises:
            FieldError: An option does not fit the prompt.
        """
        return self
