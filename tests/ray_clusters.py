"""Ray clusters on loopback, with nothing of the machine's own cluster and no outside address."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_OPTIONS = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}


@contextmanager
def ray_cluster(num_nodes: int, num_cpus: int) -> Iterator[Any]:
    """A cluster of so many nodes, to which this process is connected; skips without Ray."""
    # Sockets lie in it: their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ |= {
        "RAY_TMPDIR": folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'tide-cache[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **_OPTIONS,
            "num_cpus": num_cpus,
            "include_dashboard": False,
        },
    )
    try:
        for _ in range(num_nodes - 1):
            add_node(cluster, num_cpus)
        ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Any, num_cpus: int) -> Any:
    """Add a node and return it."""
    return cluster.add_node(**_OPTIONS, num_cpus=num_cpus)
