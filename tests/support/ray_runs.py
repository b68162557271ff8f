"""Quantizes on a Ray cluster of two nodes on this machine, and again while one of them is lost.

This is a separate program with the arguments source, tokens, folder, preset. Tasks are slowed down and record
where they begin and end, so that the test can check that a lost node had work. It prints JSON: the result of
each task, and the messages.
"""

import json
import sys
import threading
import time
import zlib
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from nemoquant.api import RunOptions, quantize
from nemoquant.run import cluster

source, rows, folder, preset = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
call, observe = cluster._call, cluster._observe
log, doomed = folder / "tasks.log", folder / "doomed"


def write_down(what, name):
    with log.open("a") as f:
        f.write(json.dumps([what, name, ray.get_runtime_context().get_node_id()]) + "\n")


def slowed(name):
    """Slows a task down; on the node that will be lost, the task waits until the loss."""
    write_down("begin", name)
    time.sleep(0.4)
    if doomed.exists() and doomed.read_text() == ray.get_runtime_context().get_node_id():
        write_down("held", name)
        time.sleep(600)


def slow_call(source, function, arguments):
    first = arguments[0]
    name = str(
        [r.name for r in first]
        if isinstance(first, tuple)
        else [first.name, str(arguments[1:2]), function.__name__]
    )
    slowed(name)
    result = call(source, function, arguments)
    write_down("end", name)
    return result


def slow_observe(source, config, layer, states, device, observers):
    name = f"layer {layer} {zlib.crc32(states[0])}"
    slowed(name)
    result = observe(source, config, layer, states, device, observers)
    write_down("end", name)
    return result


def options(**changes):
    return RunOptions(
        method="max", data=rows, dtype="float32", row_batch=1, on="ray", shard_bytes=60_000, **changes
    )


def lose_in(stage, options):
    """A run that loses the second node when a third of ``stage`` is done.

    Returns the id of the lost node, and the result of each task.
    """
    second = two.add_node(num_cpus=1, object_store_memory=100 << 20)
    two.wait_for_nodes()
    lost, threads = [], []

    def held():
        return log.exists() and any(line.startswith('["held"') for line in log.read_text().splitlines())

    def lose():
        doomed.with_suffix(".id").write_text(second.node_id)
        doomed.with_suffix(".id").replace(doomed)
        while not held():
            time.sleep(0.01)
        lost.append(second.node_id)
        two.remove_node(second, allow_graceful=False)

    def progress(now, done, total, _):
        if now == stage and done * 3 > total and not threads:
            threads.append(threading.Thread(target=lose))
            threads[0].start()

    quantize(source, folder / stage, preset, options, progress=progress)
    threads[0].join()
    tasks = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    doomed.unlink()
    return {"lost": lost[0], "tasks": tasks}


two = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False},
)
first = two.add_node(num_cpus=1, object_store_memory=100 << 20)
ray.init(address=two.address, log_to_driver=False)
two.wait_for_nodes()
said: list[str] = []
quantize(source, folder / "two", preset, options(), say=said.append)
two.remove_node(first)
cluster._call, cluster._observe = slow_call, slow_observe
report = {"said": said, "calibrate": lose_in("calibrate", options())}
report["pack"] = lose_in(
    "pack",
    RunOptions(method="max", scales=folder / "two/nemoquant_scales.json", on="ray", shard_bytes=60_000),
)
ray.shutdown()
two.shutdown()
print(json.dumps(report))
