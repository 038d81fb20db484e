"""Saving and restoring the training state: orbax, and nothing but arrays.

The position in the data is a function of the step, so a checkpoint needs no iterator state.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

_LOG = logging.getLogger("dense_jax")


class Checkpoints:
    """The checkpoints in one directory, DIRECTORY/STEP; the oldest go when there are too many.

    Saving copies the state to the host at once and writes it in the background. A checkpoint
    appears under its final name only when it is complete. What fails in the background, on a full
    disk for example, is raised by the next call of save, wait or close, as OSError.
    """

    def __init__(self, directory: epath.PathLike, max_to_keep: int | None = None):
        self.directory = epath.Path(directory).resolve()
        self._max_to_keep = max_to_keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # What several directories of a run write at once must not meet at the same barriers.
        prefix = "-".join(self.directory.parts[-3:])
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._max_to_keep,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=prefix
            ),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, in increasing order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Saves the state after `step` optimizer steps; does nothing where it is saved already."""
        if step not in self.steps:
            with self._writing():
                self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise all sorts
            there = sorted(self._manager.all_steps(read=True))  # on disk, not as it was to be
            raise OSError(
                f"cannot save to {self.directory}: {error}; is the disk full? The "
                f"checkpoints of steps {there} are whole: the same command resumes"
            ) from error

    def restore(self, step: int, like: Any) -> Any:
        """The state at a step, placed like `like`, a tree of jax.ShapeDtypeStructs.

        Raises ValueError if it cannot be read as that.
        """
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:  # orbax and tensorstore raise all sorts
            raise ValueError(
                f"cannot read checkpoint {self.directory / str(step)}: {error}"
            ) from error

    def restore_latest(self, like: Any) -> Any | None:
        """The newest state that can be read, or None where there is no checkpoint at all.

        What cannot be read is said, and moved to DIRECTORY.unreadable/STEP. Raises ValueError if
        there are checkpoints but none can be read: a run never starts over by itself.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return self.restore(step, like)
            except ValueError as error:
                _LOG.warning("%s; trying the one before it", error)
                if jax.process_index() == 0:
                    aside = self.directory.parent / f"{self.directory.name}.unreadable"
                    aside.mkdir(exist_ok=True)
                    (self.directory / str(step)).replace(aside / str(step))
                self._manager.close()
                self._manager = self._open()
        if steps:
            raise ValueError(
                f"none of the checkpoints in {self.directory} could be read; they are in "
                f"{self.directory}.unreadable. Start again in an empty workdir"
            )
        return None

    def remove(self, step: int) -> None:
        """Deletes one checkpoint."""
        self._manager.delete(step)

    def close(self) -> None:
        """Waits and releases the directory."""
        with self._writing():
            self._manager.close()
