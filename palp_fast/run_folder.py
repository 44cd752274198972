"""The output folder of a run: whose it is, its metrics file, and where checkpoints and samples go."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from palp_fast import checkpoint
from palp_fast.errors import ConfigError
from palp_fast.export import write_atomic


class RunFolder:
    """<output_dir> with run.json (fingerprint), config.toml, metrics.jsonl, checkpoint/ and samples/."""

    def __init__(self, path: str | os.PathLike, fingerprint: str):
        self.path, self.fingerprint = Path(path), fingerprint
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoint"
        self.samples = self.path / "samples"
        self._owner = self.path / "run.json"
        self._metrics_file = None

    def check_writable(self) -> None:
        """Raises ConfigError if no file can be made where the folder is or will be; permission bits do not tell all."""
        existing = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        try:
            # Unnamed on Linux: nothing is ever to be seen.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            reason = f"no file can be made in {str(existing)!r} ({error.strerror})"
            raise ConfigError(f"output_dir: {str(self.path)!r} is not allowed; {reason}") from error

    def earlier_state(self, resume: str) -> dict | None:
        """The checkpoint state to go on from, or None. Writes nothing.

        Raises ConfigError if the folder holds a run of another config, or no checkpoint although resume is "must".
        """
        found = checkpoint.find(self.checkpoints)
        owners = {self._fingerprint_on_disk(), found[1]["fingerprint"] if found else None} - {None}
        if owners - {self.fingerprint}:
            raise ConfigError(f"output_dir: {str(self.path)!r} holds a run of another config; choose another folder")
        if resume == "must" and not found:
            raise ConfigError(f"resume: 'must', but {str(self.path)!r} holds no complete checkpoint; "
                              "allowed here: 'auto', 'never'")
        return checkpoint.load(self.checkpoints) if found and resume != "never" else None

    def _fingerprint_on_disk(self):
        try:
            return json.loads(self._owner.read_text())["fingerprint"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"output_dir: {str(self._owner)!r} cannot be read ({error}); choose another folder"
            raise ConfigError(message) from error

    def open(self, config, metrics_bytes: int | None) -> None:
        """Creates the folder; the metrics file is cut to the length that the checkpoint knew; None: all starts anew."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self._owner, json.dumps({"fingerprint": self.fingerprint}).encode())
        try:
            config.to_toml(self.path / "config.toml")
        except ConfigError:
            # PIL images have no place in TOML: such a run is repeated from Python.
            (self.path / "config.toml").unlink(missing_ok=True)
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("embeddings/.*.tmp")):
            leftover.unlink()
        if metrics_bytes is None:
            checkpoint.clear(self.checkpoints)
            for earlier in self.samples.glob("step-*"):
                shutil.rmtree(earlier)
        self._metrics_file = open(self.metrics, "ab")
        self._metrics_file.truncate(min(metrics_bytes or 0, self._metrics_bytes()))

    def write_metrics(self, metrics: dict) -> None:
        """One line of JSON, visible to other processes at once; an fp16 overflow shows as null."""
        metrics = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        self._metrics_file.write(json.dumps(metrics).encode() + b"\n")
        self._metrics_file.flush()

    def save_checkpoint(self, state: dict) -> Path:
        """Syncs the metrics, notes their length in the checkpoint and writes it."""
        os.fsync(self._metrics_file.fileno())
        state = state | {"fingerprint": self.fingerprint, "metrics_bytes": self._metrics_bytes()}
        return checkpoint.save(self.checkpoints, state)

    def _metrics_bytes(self):
        return os.fstat(self._metrics_file.fileno()).st_size
