"""A device of WebGPU for the tests: wgpu on a driver of Vulkan, Mesa's for processors where there is no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.system import install

PACKAGES = ("mesa-vulkan-drivers", "libvulkan1")


def adapter() -> Any:
    """The first adapter of Vulkan; where there is none and it is allowed, Mesa's driver is installed."""
    wgpu = pytest.importorskip("wgpu", reason="wgpu is not installed: pip install wgpu")
    for attempt in range(2):
        found = [one for one in wgpu.gpu.enumerate_adapters_sync() if one.info["backend_type"] == "Vulkan"]
        if found:
            return found[0]
        if attempt or not install(*PACKAGES):
            pytest.skip(f"there is no driver of Vulkan: apt-get install {' '.join(PACKAGES)}")
    return None


class OnWgpu:
    """``gpu.program.Device`` with the shaders of ``folder``."""

    def __init__(self, folder: Path) -> None:
        import wgpu

        self._shaders, self._usage = folder / "shaders", wgpu.BufferUsage
        found = adapter()
        name = "max-storage-buffers-per-shader-stage"
        self._device = found.request_device_sync(required_limits={name: found.limits[name]})
        self._buffers: dict[int, Any] = {}
        self._pipelines: dict[str, Any] = {}
        self._number = itertools.count(1)

    def allocate(self, size: int) -> int:
        place = next(self._number)
        usage = self._usage.STORAGE | self._usage.COPY_DST | self._usage.COPY_SRC
        self._buffers[place] = self._device.create_buffer(size=max(-(-size // 4) * 4, 4), usage=usage)
        return place

    def free(self, place: int) -> None:
        del self._buffers[place]

    def upload(self, place: int, array: np.ndarray) -> None:
        data = array.tobytes()
        self._device.queue.write_buffer(self._buffers[place], 0, data + bytes(-len(data) % 4))

    def download(self, array: np.ndarray, place: int) -> None:
        read = self._device.queue.read_buffer(self._buffers[place])
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(read, np.uint8)[: array.nbytes]

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        if kernel not in self._pipelines:
            module = self._device.create_shader_module(code=(self._shaders / f"{kernel}.wgsl").read_text())
            compute = {"module": module, "entry_point": kernel}
            self._pipelines[kernel] = self._device.create_compute_pipeline(layout="auto", compute=compute)
        pipeline = self._pipelines[kernel]
        tensors = [one.value for one in arguments if type(one).__name__ == "c_ulong"]
        numbers = np.array([*(one.value for one in arguments[len(tensors) :]), grid - 1], np.int32)
        uniform = self._device.create_buffer_with_data(data=numbers, usage=self._usage.UNIFORM)
        buffers = [*(self._buffers[place] for place in tensors), uniform]
        bound = [{"buffer": one, "offset": 0, "size": one.size} for one in buffers]
        entries = [{"binding": number, "resource": one} for number, one in enumerate(bound)]
        group = self._device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        encoder = self._device.create_command_encoder()
        run = encoder.begin_compute_pass()
        run.set_pipeline(pipeline)
        run.set_bind_group(0, group)
        run.dispatch_workgroups(grid, 1, 1)
        run.end()
        self._device.queue.submit([encoder.finish()])
