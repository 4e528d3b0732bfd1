#!/usr/bin/env python
"""Validate glTF and GLB files with the Khronos validator.

    python scripts/validate_gltf.py --install       # once: installs the npm package gltf-validator
    python scripts/validate_gltf.py outputs/quickstart/RUN/refine/export/*.glb

The script prints every error, warning, information and hint. Its exit code is 1 if a file has an error. It needs node.
The npm package is installed in ``$SCOREDIST3D_NODE`` or ``~/.cache/scoredist3d/node``, outside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "gltf-validator@2.0.0-dev.3.10"
SEVERITIES = ("error", "warning", "information", "hint")
SCRIPT = Path(__file__).with_suffix(".mjs")
INSTALL = "python scripts/validate_gltf.py --install"


def cache_folder() -> Path:
    """Folder of the npm package."""
    return Path(os.environ.get("SCOREDIST3D_NODE") or Path.home() / ".cache" / "scoredist3d" / "node")


def problem() -> str:
    """The reason why files cannot be validated, or an empty string."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (cache_folder() / "node_modules" / "gltf-validator").is_dir():
        return f"the npm package gltf-validator is not installed: {INSTALL}"
    return ""


def install() -> None:
    """Install the validator with npm.

    Raises:
        RuntimeError: npm is missing or failed.
    """
    if shutil.which("npm") is None:
        raise RuntimeError("npm is not installed; install Node.js, because the validator is an npm package")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"npm failed: {done.stderr.strip() or done.stdout.strip()}")


def validate(paths: Sequence[Path | str]) -> list[dict[str, Any]]:
    """The report of the validator for each file.

    Raises:
        RuntimeError: The validator is missing or failed.
    """
    if reason := problem():
        raise RuntimeError(reason)
    command = ["node", str(SCRIPT), str(cache_folder() / "node_modules"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"the validator failed: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def describe(report: dict[str, Any]) -> list[str]:
    """Lines of text for a report: one for the file and one per message."""
    issues, info = report["issues"], report.get("info", {})
    counts = ", ".join(
        f"{issues[key]} {key[3:].lower()}" for key in ("numErrors", "numWarnings", "numInfos", "numHints")
    )
    size = f"{info.get('totalTriangleCount', 0)} triangles, {info.get('materialCount', 0)} materials"
    lines = [f"{report['uri']}: {counts} ({size})"]
    for message in issues["messages"]:
        severity = SEVERITIES[message["severity"]]
        lines.append(f"  {severity} {message['code']} at {message.get('pointer', '?')}: {message['message']}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Validate the files given on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="glTF or GLB files")
    parser.add_argument("--install", action="store_true", help="install the validator with npm first")
    arguments = parser.parse_args(argv)
    try:
        if arguments.install:
            install()
        reports = validate(arguments.files) if arguments.files else []
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    for report in reports:
        print("\n".join(describe(report)))
    return int(any(report["issues"]["numErrors"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
