"""A run spread over a Ray cluster (extra ``ray``): the same pure functions, called on other machines.

Packing sends groups of whole weights (experts of one layer and projection) and chunks of larger ones;
calibration sends a layer's batches of rows. Arguments and results travel through Ray's object store. This
process puts them in order, writes the output and keeps the state for ``--resume``. A task whose worker or
node is lost runs again and gives the same bytes: every task computes with one thread, whatever the size of
the cluster.

Each node needs nemoquant of this version and the source under the same path; each worker checks both before
its first task.
"""

import hashlib
import importlib.util
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from nemoquant._version import __version__
from nemoquant.calibrate.run import Observed, Observers, observe
from nemoquant.checkpoint.identity import Units, differing, hash_units, told, units_of
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CheckpointError, MissingExtraError, UsageError
from nemoquant.formats import Device
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.roles import mixer_table
from nemoquant.pack.workers import Threads

P = ParamSpec("P")
T = TypeVar("T")
GROUP_BYTES = 64 << 20  # of source in one packing task
USAGE = "RAY_USAGE_STATS_ENABLED"  # environment variable of Ray
AHEAD = 2  # tasks for each processor of the cluster that may run or wait
SourceOnNode = tuple[str, str, str, str]  # path, hash of its small tensors, version, run
Wire = tuple[np.ndarray[Any, Any], tuple[int, ...], torch.dtype]


class Cluster:
    """A connection with what a run needs from it: workers for packing, ``spread`` for calibration.

    Attributes:
        processors: number that tasks can use, over all nodes.
        units: hashes of the source's units that nodes calibrated, as they read them.
    """

    def __init__(self, ray: Any, checkpoint: Checkpoint) -> None:
        self._ray, self.checkpoint = ray, checkpoint
        self.units: Units = {}
        self.processors = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # The last part is of this run alone: a worker may outlive it, in a connection that the caller keeps,
        # and must open the source again for another one.
        self._source = (
            str(checkpoint.path.resolve()),
            small_tensors_sha256(checkpoint),
            __version__,
            secrets.token_hex(8),
        )
        # A task that is lost with its node runs again, as long as there are nodes. Tasks are spread, because
        # each node has its own disk and memory.
        options = {"num_cpus": 1, "max_retries": -1, "scheduling_strategy": "SPREAD"}
        self._call = ray.remote(**options)(_call)
        self._observe = ray.remote(**options)(_observe)

    def workers(self, threads: int) -> "RayWorkers":
        """Workers for packing; ``threads`` of this process copy what is not quantized."""
        return RayWorkers(self, threads)

    def spread(
        self,
        checkpoint: Checkpoint,
        config: NemotronHConfig,
        layer: int,
        batches: Iterable[Tensor],
        device: str,
        observers: Observers,
    ) -> Iterator[Observed]:
        """Run a layer's batches on the cluster; results in order. See ``calibrate.run.Spread``."""
        assert checkpoint is self.checkpoint
        shared = self._ray.put(config)
        waiting: deque[Any] = deque()
        for states in batches:
            waiting.append(
                self._observe.remote(self._source, shared, layer, to_wire(states), device, observers)
            )
            if len(waiting) > AHEAD * self.processors:
                yield self._observed(waiting.popleft())
        while waiting:
            yield self._observed(waiting.popleft())

    def _observed(self, reference: Any) -> Observed:
        output, finite, collected, units = self.result(reference)
        changed = differing(self.units, units)
        if changed:
            raise CheckpointError(
                f"{self.checkpoint.path} is not the same on all nodes of the cluster: "
                f"{told(changed, len(units))}; copy it to them again"
            )
        self.units |= units
        return Observed(from_wire(output), finite, collected)

    def begin(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> Any:
        """Start a task; returns its reference."""
        return self._call.remote(self._source, function, arguments)

    def result(self, reference: Any) -> Any:
        """A task's result; an error of nemoquant is raised as it was in the task.

        Raises:
            UsageError: the cluster can't run the task any more.
        """
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except exceptions.RayError as error:
            raise UsageError(
                f"the Ray cluster failed ({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from None


class RayFuture(Future[T]):
    """A task's result, fetched when ``result`` is called."""

    def __init__(self, cluster: Cluster, reference: Any) -> None:
        super().__init__()
        self._cluster, self._reference = cluster, reference

    def result(self, timeout: float | None = None) -> T:  # noqa: ARG002  there is no timeout
        result: T = self._cluster.result(self._reference)
        return result

    def cancel(self) -> bool:
        self._cluster._ray.cancel(self._reference, force=False)
        return True


class RayWorkers:
    """``pack.workers.Workers`` on a cluster. Use as a context manager."""

    group_bytes = GROUP_BYTES
    device: Device = "cpu"

    def __init__(self, cluster: Cluster, threads: int) -> None:
        self.cluster, self.ahead = cluster, AHEAD * cluster.processors
        self._threads = Threads(cluster.checkpoint, threads)
        self.here = self._threads.submit

    def submit(
        self, function: Callable[Concatenate[Checkpoint, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        assert not kwargs
        return RayFuture(self.cluster, self.cluster.begin(function, args))

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.__exit__(*error)


@contextmanager
def connected(address: str | None, checkpoint: Checkpoint) -> Iterator[Cluster]:
    """Connect to the cluster at ``address`` (``auto``: one that runs on this machine), or start one here.

    A cluster started here ends with the run. A connection that the caller already has is used, and stays
    open.

    Raises:
        MissingExtraError: Ray is not installed. UsageError: nothing answers at ``address``.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--on ray needs the extra `ray`: pip install 'nemoquant[ray]'")
    import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options["include_dashboard"] = False
        try:
            with _without_statistics():
                ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = address or "this machine"
            raise UsageError(
                f"no Ray cluster at {where} ({str(error).splitlines()[0]}); start one by `ray start --head`"
            ) from None
    try:
        yield Cluster(ray, checkpoint)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _without_statistics() -> Iterator[None]:
    """Processes that Ray starts send no usage statistics, unless the environment says that they do."""
    if USAGE in os.environ:
        yield
        return
    os.environ[USAGE] = "0"
    try:
        yield
    finally:
        del os.environ[USAGE]


# The functions below run on the nodes.


def _call(source: SourceOnNode, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    checkpoint = _opened(source)
    result = function(checkpoint, *arguments)
    checkpoint.check_unchanged()
    return result


def _observe(
    source: SourceOnNode,
    config: NemotronHConfig,
    layer: int,
    states: Wire,
    device: str,
    observers: Observers,
) -> tuple[Any, ...]:
    checkpoint = _opened(source)
    output, *rest = observe(checkpoint, config, layer, from_wire(states), device, observers)
    prefix, kind = names.layer(layer), config.layers[layer]
    mixer = (spec.name for spec in mixer_table(config.of_layer(layer), kind, prefix + names.MIXER, layer))
    units = _hashed(source, (f"{prefix}norm.weight", *mixer))
    checkpoint.check_unchanged()  # also for a batch whose layer was hashed with an earlier one
    return (to_wire(output), *rest, units)


@lru_cache(maxsize=2)
def _hashed(source: SourceOnNode, tensors: tuple[str, ...]) -> Units:
    """Hashes of a layer's units on this node, once for all batches of a worker."""
    return hash_units(_opened(source), units_of(tensors), 1)


def small_tensors_sha256(checkpoint: Checkpoint) -> str:
    """sha256 of all one-dimensional tensors: norms, SSM parameters, biases.

    These few megabytes distinguish one training from another, before a node begins. What its tasks read is
    hashed whole.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name, info in checkpoint.tensors.items() if len(info.shape) == 1):
        digest.update(checkpoint.raw(name).data)
        checkpoint.release([name])
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _opened(source: SourceOnNode) -> Checkpoint:
    """The source, opened once a worker.

    Raises CheckpointError where the source or the version of nemoquant differs on this node.
    """
    path, fingerprint, version, _ = source
    torch.set_num_threads(1)
    if version != __version__:
        raise CheckpointError(
            f"a node of the cluster has nemoquant {__version__}; expected {version}, as here"
        )
    checkpoint = Checkpoint(Path(path))
    if small_tensors_sha256(checkpoint) != fingerprint:
        raise CheckpointError(
            f"{path} is another checkpoint on a node of the cluster; expected the same one under this path "
            f"everywhere"
        )
    return checkpoint


def to_wire(states: Tensor) -> Wire:
    """A tensor as Ray moves it without a copy: its bytes, its shape and its dtype."""
    return states.contiguous().view(torch.uint8).numpy(), tuple(states.shape), states.dtype


def from_wire(wire: Wire) -> Tensor:
    """The reverse of ``to_wire``; a copy, because data from the object store can't be written."""
    data, shape, dtype = wire
    return torch.from_numpy(data.copy()).view(dtype).view(shape)
