"""A GPU driver for Triton that compiles for sm_90 and notes launches instead of making them."""

from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class FakeDriver(DriverBase):
    """``launches`` are (grid, stream, name of the kernel, arguments)."""

    def __init__(self):
        self.launches = []
        results = 4 if triton.__version__.startswith("3.2") else 5  # module, function, registers, spills, threads
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20, "warpSize": 32},
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024)[:results],
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls):
        return True

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            self.launches.append(((x, y, z), stream, metadata.hash, arguments))

        return launch

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        assert device == 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError
