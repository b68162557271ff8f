"""The host libraries, for every test of the plugins."""

import pytest
from support.plugin_build import harness, host_folder
from support.trt_caller import Caller

from nemoquant.ops.library import Kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The kernels run by the emulator, called through their C interface."""
    return Kernels(host_folder() / "libnemoquant_host.so")


@pytest.fixture(scope="session")
def caller() -> Caller:
    """The plugin library over the same kernels, loaded as TensorRT would."""
    return Caller(harness(), host_folder() / "libnemoquant_plugins_host.so")
