"""What a backend offers: a target described as data, a lowering, kernel facts and a package."""

from __future__ import annotations

import abc
import dataclasses
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypedDict

import onnx_ir as ir

from qcompile import manifest
from qcompile.errors import UserError
from qcompile.ledger import LOWERING, Preserves
from qcompile.pipeline import Arrays, Context, Pass, Target

Program = Callable[[Arrays], Arrays]
TVM_PROGRAM = "program.json"  # a folder with it is TVM's


class Kernel(TypedDict):
    """How one matmul of the lowered program runs. ``site`` is a name of the user's model.

    ``kernel``: the operator in the optimised graph; ``low_bit``: whether it computes on integers;
    ``reason``: why it does not, else empty.
    """

    site: str
    kernel: str
    low_bit: bool
    reason: str


class Backend(Protocol):
    """A place where the program runs. Constructing one imports no runtime."""

    @property
    def target(self) -> Target: ...

    def lower(self, model: ir.Model, ctx: Context) -> int:
        """Rewrite ``model`` in place into shapes that reach this target's kernels; the number of rewrites."""

    def kernels_of(self, model: Path) -> list[Kernel]:
        """The kernel that each matmul of the packaged program reaches, in graph order.

        model: the file ``model.onnx`` of its folder, whether or not this backend writes one
        """

    def package(self, model: ir.Model, folder: Path) -> None:
        """Write the program into the empty ``folder``; ``model.onnx`` and its data for ONNX Runtime."""


def spelled(backend: Any) -> str:
    """The target as the command line writes it: its name, and in braces the options that differ from the default."""
    chosen = [f"{f.name}={v}" for f in dataclasses.fields(backend) if (v := getattr(backend, f.name)) != f.default]
    return f"{backend.name}{{{' '.join(chosen)}}}" if chosen else str(backend.name)


def check_ready(backend: Any) -> None:
    """UserError where a tool that ``backend`` compiles with is missing: rather now than after the search for ranges."""
    ready = getattr(backend, "ready", None)
    if ready is not None:
        ready()


class Route(Protocol):
    """One way to a package for another machine."""

    def lower(self, model: ir.Model, ctx: Context) -> int: ...
    def kernels_of(self, model: Path) -> list[Kernel]: ...
    def package(self, model: ir.Model, folder: Path) -> None: ...

    def open(self, folder: Path) -> Program:
        """The program, or what stands for it on this machine."""

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        """As ``device_facts``."""


class Routed(abc.ABC):
    """A backend for another machine, whose work the route does that its options choose."""

    @property
    @abc.abstractmethod
    def route(self) -> Route: ...

    def ready(self) -> None:
        check_ready(self.route)

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return self.route.lower(model, ctx)

    def kernels_of(self, model: Path) -> list[Kernel]:
        return self.route.kernels_of(model)

    def package(self, model: ir.Model, folder: Path) -> None:
        self.route.package(model, folder)

    def open(self, folder: Path) -> Program:
        return self.route.open(folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        return self.route.facts(folder, feeds)


def device_facts(backend: Backend, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any] | None:
    """What a backend for another machine knows of its package: None where the program runs on this one.

    Keys: ``ship``, the files that go to the device, and ``bytes``, their size; ``run`` and ``not_run``, sentences that
    say what was executed and where, and what was only compiled, linked or written.
    """
    told = getattr(backend, "facts", None)
    return None if told is None else dict(told(folder, feeds))


@dataclasses.dataclass(frozen=True)
class Lower(Pass):
    """The lowering of a backend as a step of the pipeline."""

    name: ClassVar[str] = LOWERING
    preserves: ClassVar[Preserves] = "approximation"
    backend: Backend

    @property
    def spec(self) -> str:
        return f"lower{{target={self.backend.target.name}}}"

    def run(self, model: ir.Model, ctx: Context) -> int:
        return self.backend.lower(model, ctx)


def program_at(path: Path) -> Path:
    """The folder of a program that is no ONNX file, else the ONNX file that ``path`` is or has in it."""
    if (path / TVM_PROGRAM).is_file():
        return path
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise _elsewhere(path)
    return file


def open_session(path: Path, *, threads: int | None = None, library: Path | None = None) -> Any:
    """The program at ``path``, a folder of any backend or an ONNX file, with the methods of an ONNX Runtime session.

    library: of ONNX Runtime's kernels, where no manifest lists them yet; otherwise those that the manifest lists
    """
    from qcompile.calibration import runner
    from qcompile.calibration.library import library_beside

    found = program_at(path)
    if found.is_file():
        beside = library if library is not None else library_beside(found)
        return runner.open_session(found, threads=threads, library=beside)
    from qcompile.backends.tvm.program import Session, describe

    if describe(found)["device"] != "cpu":
        from qcompile.backends.gpu.program import opened

        return opened(found)
    return Session(found, threads)


def longest_text(folder: Path) -> int:
    """Tokens that the program in ``folder`` has positions for, where that is not seen in its graph."""
    from qcompile.calibration.inputs import UNLIMITED

    if not (folder / TVM_PROGRAM).is_file():
        return UNLIMITED
    from qcompile.backends.tvm.program import describe

    return int(describe(folder)["longest"])


def program_interface(folder: Path) -> dict[str, Any]:
    """Names, types and shapes of the inputs and outputs of the program in ``folder``, as the manifest has them."""
    from qcompile.instruments import interface

    if (folder / TVM_PROGRAM).is_file():
        from qcompile.backends.tvm.program import ports

        return ports(folder)
    return dict(interface(ir.load(folder / "model.onnx")))


def open_program(folder: Path, *, library: Path | None = None) -> Program:
    """The compiled program in ``folder`` as a function from inputs to outputs, both by name.

    Where its cache is quantised, a float past is taken too. ``library``: as for ``open_session``.
    """
    from qcompile.calibration.caches import fed
    from qcompile.calibration.runner import run_session

    session = open_session(folder, library=library)
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, run_session(session, names, fed(session, feeds)), strict=True))

    return run


def _elsewhere(folder: Path) -> UserError:
    """There is no program for this machine at ``folder``."""
    device = manifest.load(folder).get("device") if (folder / manifest.FILE).is_file() else None
    if device is None or "triple" not in device:
        return UserError(f"no program at '{folder}'", hint="give the folder of -o DIR or an .onnx file")
    here = f"{platform.machine()} {platform.system()}"
    what = f"'{folder}' is a package for {device['triple']}, and this machine is {here}"
    return UserError(what, hint="run it on the device (its README.md says how), or compile with --target cpu as well")
