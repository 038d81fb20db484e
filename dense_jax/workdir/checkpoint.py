"""Saves and restores the training state with Orbax.

A checkpoint has two items: `default` is the state, and `about` holds the state's scores and the
digests of its arrays. Digests are needed because neither Orbax nor TensorStore detects a flipped
bit. The position in the data is not saved, because it follows from the step.
"""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dense_jax import buckets, storage

_LOG = logging.getLogger("dense_jax")


class Checkpoints:
    """Saves and restores checkpoints in `directory`.

    Keeps only the newest `max_to_keep` checkpoints, or all checkpoints if `max_to_keep` is None.

    Saving copies the state to the host immediately and writes it in the background. A checkpoint
    gets its final name only when it is complete. If writing fails, or if the first checkpoint
    cannot be read back, the next call of save, wait or close raises OSError.
    """

    def __init__(self, directory: epath.PathLike, max_to_keep: int | None = None):
        self.directory = storage.absolute(directory)
        self._max_to_keep = max_to_keep
        # The first step that was saved, or 0 once its checkpoint has been read back.
        self._first: int | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # `latest` and `best` are saved concurrently, so each needs its own barriers.
        prefix = "-".join(self.directory.parts[-3:])
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._max_to_keep,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=prefix
            ),
        )
        return ocp.CheckpointManager(
            self.directory, options=options, item_names=("default", "about")
        )

    @property
    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, in increasing order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, scores: Mapping[str, float] = {}) -> None:
        """Saves the state after `step` optimizer steps, unless that step is already saved."""
        if step not in self.steps:
            self.wait()
            about = {"digests": digests(state), "scores": dict(scores)}
            items = ocp.args.Composite(
                default=ocp.args.PyTreeSave(state),
                about=ocp.args.JsonSave({**about, "checksum": _checksum(about)}),
            )
            with self._writing():
                self._manager.save(step, args=items, force=True)
            self._first = step if self._first is None else self._first

    def wait(self) -> None:
        """Waits until all saved checkpoints are on disk."""
        with self._writing():
            self._manager.wait_until_finished()
        if self._first:
            step, self._first = self._first, 0
            # Only process 0 finalizes a checkpoint. In others, Orbax takes one in a bucket for
            # unfinished.
            if jax.process_index() != 0:
                return
            try:
                self._manager.metadata(step)  # opens every array
            except Exception as error:  # orbax and tensorstore raise many types
                raise OSError(
                    f"checkpoint {self.directory / str(step)} was written, but cannot be read: "
                    f"{error}. Use another --workdir"
                ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types
            saved = sorted(self._manager.all_steps(read=True))  # read from the disk
            raise OSError(
                f"cannot save to {self.directory}: {error}; is the disk full? The "
                f"checkpoints of steps {saved} are whole: the same command resumes"
            ) from error

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state at a step, or a part of the state.

        like: A TrainState of jax.ShapeDtypeStructs with shardings, or a dict of some of its fields.

        Raises ValueError if the checkpoint does not match `like` or is corrupted.
        """
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        item = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
        restored = self._read(step, default=item)
        saved, read = restored["about"]["digests"], digests(restored["default"])
        if wrong := [name for name in read if read[name] != saved.get(name)]:
            raise ValueError(
                f"cannot read checkpoint {self.directory / str(step)}: the disk returns other "
                f"values than were saved of {', '.join(wrong[:3])}{' and others' if wrong[3:] else ''}"
            )
        return restored["default"]

    def scores(self, step: int) -> dict[str, float]:
        """Returns the scores saved at a step. Raises ValueError if the scores cannot be read."""
        return self._read(step)["about"]["scores"]

    def _read(self, step: int, **items: Any) -> Mapping[str, Any]:
        try:
            args = ocp.args.Composite(about=ocp.args.JsonRestore(), **items)
            restored = self._manager.restore(step, args=args)
            about = dict(restored["about"])
            if about.pop("checksum") != _checksum(about):
                raise ValueError("its item `about` is damaged")
            return restored
        except Exception as error:  # orbax and tensorstore raise many types
            raise ValueError(
                f"cannot read checkpoint {self.directory / str(step)}: {error}"
            ) from error

    def restore_latest(self, like: Any) -> Any | None:
        """Returns the newest state that can be read, or None if there is no checkpoint.

        A checkpoint that cannot be read is moved aside (see `set_aside`), with a warning.
        Raises ValueError if every checkpoint is unreadable, because runs must not silently restart.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return self.restore(step, like)
            except ValueError as error:
                _LOG.warning("%s; trying the one before it", error)
                self.set_aside(step)
        if steps:
            raise ValueError(
                f"none of the checkpoints in {self.directory} could be read; they are in "
                f"{self.directory}.unreadable. Start again in an empty workdir"
            )
        return None

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint to an unused path in the folder "`directory`.unreadable"."""
        if jax.process_index() == 0:
            aside = self.directory.parent / f"{self.directory.name}.unreadable"
            aside.mkdir(exist_ok=True)
            names = itertools.chain([str(step)], (f"{step}.{k}" for k in itertools.count(1)))
            free = next(aside / name for name in names if not (aside / name).exists())
            buckets.move(self.directory / str(step), free)
        self._manager.close()
        self._manager = self._open()

    def remove(self, step: int) -> None:
        """Deletes one checkpoint."""
        self._manager.delete(step)

    def close(self) -> None:
        """Waits until all saved checkpoints are on disk, then releases all resources."""
        self.wait()
        with self._writing():
            self._manager.close()


def _checksum(about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(about).encode())


def digests(state: Any) -> dict[str, int]:
    """Returns {path: digest} for all arrays in a state. A flipped bit changes the digest.

    The digest of an array is the sum over i of (2 * i + 1) * v_i, modulo 2**32, where v_i is the
    array's i-th value, reinterpreted as an unsigned integer. The digest does not depend on how
    the array is split over devices and hosts.
    """

    paths, arrays = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    numbers = np.arange(1, 2 * max(array.size for array in arrays), 2, dtype=np.uint32)

    def digest(array: jax.Array) -> int:
        odd, total = numbers[: array.size].reshape(array.shape), 0
        for shard in array.addressable_shards:
            if shard.replica_id == 0:  # counts each shard once
                bits = np.ravel(shard.data).view(f"u{array.dtype.itemsize}")
                bits = bits.astype(np.uint32, copy=False)
                total += np.dot(bits, np.ravel(odd[shard.index])).item()
        return total % 2**32

    with concurrent.futures.ThreadPoolExecutor() as pool:  # numpy releases the GIL
        host_digests = np.array(list(pool.map(digest, arrays)), np.uint32)
    totals = multihost_utils.process_allgather(host_digests[None], tiled=True).sum(
        axis=0, dtype=np.uint32
    )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return dict(zip(names, totals.tolist(), strict=True))
