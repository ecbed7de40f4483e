"""``compile``: one model through the whole pipeline, every step proved, and a folder with the result."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import backends, manifest, report
from qcompile import recipe as recipes
from qcompile.acceptance import check
from qcompile.backends.base import Backend, Lower, check_ready, device_facts, open_program
from qcompile.calibration import text
from qcompile.calibration.library import LIBRARY
from qcompile.environment import warn_of_saturation
from qcompile.errors import ContractError, QCompileError, UserError
from qcompile.generation import Token, generate
from qcompile.graph.workspace import Workspace
from qcompile.instruments import Dump, Instrument, LayerErrors, Timer, Verify, interface
from qcompile.intake import Taken, describe_tokenizer, take, take_samples
from qcompile.ledger import Entry, Ledger, Proof
from qcompile.pipeline import Arrays, Context, IrPass, Pass, make_pass
from qcompile.planning import Step, check_legal, expand
from qcompile.progress import say, step, warn
from qcompile.publish import check_destination, publish, writing
from qcompile.recipe import Recipe

BULKY = ("channel_ranges",)  # facts that the report draws and the manifest leaves out
AUTO_MAX_DROP = 0.01  # the gate of recipe "auto" where none is given


class CompiledModel:
    """The result of ``compile``: a program, the proof of it, and where to put both.

    Its files live in a temporary folder until ``save``; close it (or leave its ``with``) to remove them.
    """

    def __init__(self, workspace: Workspace, folder: Path, record: manifest.Manifest) -> None:
        self.folder = folder
        self.manifest = record
        self._program: Callable[[Arrays], Arrays] | None = None
        self._close = weakref.finalize(self, workspace.close)

    @property
    def report(self) -> dict[str, Any]:
        """The figures a caller wants: sizes, end-to-end proof, per-layer SQNR in dB, kernels, gate."""
        return {key: self.manifest[key] for key in ("sizes", "end_to_end", "layers", "kernels", "gate")}

    def run(self, feeds: Arrays) -> Arrays:
        """The outputs by name for one set of inputs, computed by the compiled program."""
        if self._program is None:
            self._program = open_program(self.folder)
        return self._program(feeds)

    def generate(self, ids: Sequence[int], **options: Any) -> Iterator[Token]:
        """The tokens that continue ``ids``; ``options`` are those of ``generation.generate``."""
        return generate(self.folder, ids, **options)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write program, manifest and report to ``folder``, all or nothing.

        Replaces an earlier result; raises UserError where ``folder`` holds anything else, unless ``force``.
        """
        publish(self.folder, Path(folder), force)
        return Path(folder)

    def close(self) -> None:
        """Remove the temporary files."""
        self._program = None
        self._close()

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compile(
    model: Any,
    *,
    recipe: str | Recipe = "w8a8_static",
    passes: str | Sequence[Step] | None = None,
    target: str = "cpu",
    calibration: Any = None,
    tokenizer: str | Path | None = None,
    max_drop: float | None = None,
    max_samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
    dump: str | Path | None = None,
    resume: str | Path | None = None,
    strict: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    allow_pickle: bool = False,
    with_past: bool = False,
) -> CompiledModel:
    """Compile ``model`` and prove every step.

    model:       path to .onnx, a Hugging Face folder, 'module:factory', an ``ir.Model``, or a torch module
                 with ``example_inputs`` (tensors by argument name) and maybe ``dynamic_shapes``
    recipe:      a name, a .toml file or a Recipe
    passes:      the transforms; None means os_plus where the recipe quantises activations
    calibration: a path (.npz, folder, .txt, .jsonl) or a list of {input name: array}; None uses built-in text,
                 or random data (of ``seed``) where the model reads no text or there is no tokenizer
    tokenizer:   folder with tokenizer.json; None takes one that lies beside the model
    max_drop:    the allowed drop of the output metric; GateError when it cannot be held
    max_samples, max_length: calibration samples at most, and tokens in one of them
    dump:        folder for the model after each pass
    resume:      folder where passes that learn keep finished blocks; the same compilation, started again after a
                 kill, goes on behind them. It may go when the compilation is done
    strict:      int_only raises UserError for an operator without an integer form, as with its option ``strict``
    output:      folder to save to; ``force`` replaces whatever is in it
    allow_pickle: load .bin weights, which can run code of whoever made them
    with_past:   export a Hugging Face folder with its key/value cache as inputs and outputs

    Raises UserError for what the caller can mend, ContractError when a pass breaks its promise.
    """
    settings = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    backend = backends.by_name(target)
    check_legal(settings, backend)
    check_ready(backend)
    pipeline = expand(passes, settings, backend, strict)
    if settings.name == "auto" and max_drop is None:
        max_drop = AUTO_MAX_DROP
    _check_max_drop(max_drop, settings)
    if seed < 0:
        raise UserError(f"seed is {seed}, but must be a whole number from 0 up", hint="leave it out for 0")
    if output is not None:
        check_destination(Path(output), force, (model, calibration, tokenizer))
    workspace = Workspace()
    try:
        with writing():
            say(f"pipeline: {', '.join(p.spec for p in pipeline)}")
            torch_only = {"example_inputs": example_inputs, "dynamic_shapes": dynamic_shapes}
            taken = take(model, workspace, allow_pickle=allow_pickle, with_past=with_past, **torch_only)
            words = Path(tokenizer) if tokenizer is not None else taken.tokenizer
            samples, described = take_samples(
                taken.model, calibration, words, max_samples, max_length, seed, workspace
            )
            ctx = context(workspace, settings, backend, samples, max_drop, seed)
            ctx.resume = _lasting(resume, "resume")
            inputs = _inputs(taken, described, words)
            compiled = _compiled(taken, pipeline, ctx, backend, inputs, _lasting(dump, "dump"))
        if output is not None:
            compiled.save(output, force=force)
        return compiled
    except BaseException:
        workspace.close()
        raise


def _lasting(folder: str | Path | None, option: str) -> Path | None:
    """``folder``, made if it is not there; UserError where it cannot be one."""
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"'{folder}' is no folder, and none can be made there"
        raise UserError(what, where=option, hint="name a folder, or a place for one") from error
    return Path(folder)


def _check_max_drop(max_drop: float | None, recipe: Recipe) -> None:
    """Refuse what is no bound; say so, before minutes of search, where a bound is hardly one that was meant."""
    if max_drop is None:
        return
    if not 0 <= max_drop < math.inf:  # NaN is neither
        hint = "0.01 allows one hundredth; without it nothing is gated"
        raise UserError(f"max_drop is {max_drop}, but must be a number from 0 up", hint=hint)
    if max_drop == 0 and recipe.rules:
        warn("--max-drop 0 allows no loss at all, and rounded weights alone nearly always lose some")
    if max_drop >= 1:
        what = "a perplexity twice as high, or outputs that have nothing in common"
        warn(f"--max-drop {max_drop:g} allows {what}; 0.01 allows one hundredth")


def _inputs(taken: Taken, calibration: dict[str, Any], tokenizer: Path | None) -> dict[str, Any]:
    """What the manifest says of everything that went in."""
    return {
        "name": taken.name,
        "source": taken.source,
        "calibration": calibration,
        "tokenizer": describe_tokenizer(tokenizer),
        "interface": interface(taken.model),
    }


def context(
    workspace: Workspace,
    recipe: Recipe,
    backend: Backend,
    samples: Any,
    max_drop: float | None = None,
    seed: int = 0,
) -> Context:
    """What the passes are given."""
    from qcompile.calibration.runner import OrtRunner

    return Context(
        workspace=workspace,
        ledger=Ledger(),
        recipe=recipe,
        target=backend.target,
        samples=samples,
        runner=OrtRunner(workspace),
        max_drop=max_drop,
        seed=seed,
    )


def run_pipeline(
    model: ir.Model, pipeline: Sequence[Pass], ctx: Context, watch: Sequence[Instrument]
) -> None:
    """Run the passes in order, each under the instruments and with its own entry in the ledger."""
    for one in pipeline:
        entry = ctx.ledger.open(one.name, one.spec, one.preserves)
        for held in (model, ctx.exact):
            if held is not None:
                ctx.workspace.let_go(held)
        if ctx.exact is None and one.preserves == "approximation":
            ctx.exact = model.clone()
        for instrument in watch:
            instrument.before(model, one, ctx)
        with step(one.name):
            entry.rewrites = _guarded(one, model, ctx)
        for instrument in watch:
            instrument.after(model, one, ctx, entry)
        if one.preserves == "function" and entry.rewrites == 0 and one.name != "canonicalise":
            warn(f"{one.name} changed nothing: {_main_reason(entry) or 'no place in this graph matches'}")


def _main_reason(entry: Entry) -> str:
    """The reason of most skips, of several the last: passes tell first of places, then of whole blocks."""
    counts = Counter(skip.reason for skip in reversed(entry.skips))
    return max(counts, key=counts.__getitem__, default="")


def _guarded(one: Pass, model: ir.Model, ctx: Context) -> int:
    """Run a pass; an exception that nobody designed names the pass that it came from."""
    try:
        return one.run(model, ctx)
    except (QCompileError, OSError, MemoryError):
        raise
    except Exception as error:
        what = f"pass '{one.spec}' failed: {type(error).__name__}: {error}"
        if isinstance(one, IrPass):
            raise UserError(what, hint="--debug shows the traceback") from error
        raise ContractError(what, hint="--debug shows the traceback; please report it") from error


# --------------------------------------------------------------------------- packaging


def _compiled(
    taken: Taken,
    pipeline: Sequence[Pass],
    ctx: Context,
    backend: Backend,
    inputs: dict[str, Any],
    dump: Path | None,
) -> CompiledModel:
    """Run the pipeline and stage its result in the workspace."""
    verify = Verify()
    watch: list[Instrument] = [] if dump is None else [Dump(dump)]
    watch += [verify, LayerErrors(), Timer(len(pipeline))]
    run_pipeline(taken.model, pipeline, ctx, watch)
    folder = ctx.workspace.root / "package"
    folder.mkdir()
    with step("writing the program"):
        backend.package(taken.model, folder)
    with step("inspecting the kernels"):
        kernels = backend.kernels_of(folder / "model.onnx")
    with step("checking the program"):
        proof = _end_to_end(folder, backend, verify, ctx)
        device = device_facts(backend, folder, (sample.feeds for sample in verify.samples))
    files = manifest.describe_files(folder, manifest.files_below(folder))
    sizes = {"before": taken.bytes, "after": sum(f["bytes"] for f in files.values())}
    record = _record(pipeline, ctx, backend) | inputs
    record["interface"] = interface(taken.model)  # a quantised cache has inputs and outputs of its own
    record |= {"kernels": kernels, "end_to_end": proof, "sizes": sizes, "files": files}
    if device is not None:
        record["device"] = device
    check(record, proof)
    warn_of_saturation(kernels)
    return _staged(folder, record, ctx)


def _staged(folder: Path, record: manifest.Manifest, ctx: Context) -> CompiledModel:
    """Write the manifest and the report beside the program."""
    record = manifest.plain(record)
    html = report.render(record, [manifest.plain(entry) for entry in ctx.ledger.as_list()])
    (folder / manifest.REPORT).write_text(html, encoding="utf-8")
    (folder / manifest.FILE).write_text(manifest.dumps(record), encoding="utf-8")
    return CompiledModel(ctx.workspace, folder, record)


def _record(pipeline: Sequence[Pass], ctx: Context, backend: Backend) -> manifest.Manifest:
    """What the manifest says of the compilation itself."""
    entries = ctx.ledger.as_list()
    for entry in entries:
        entry["facts"] = {k: v for k, v in entry["facts"].items() if k not in BULKY}
    return {
        "format": manifest.FORMAT,
        "versions": manifest.versions(),
        "recipe": ctx.recipe,
        "target": backend.target,
        "seed": ctx.seed,
        "max_drop": ctx.max_drop,
        "pipeline": [_described(p) for p in pipeline],
        "layers": _fact(entries, "layers", []),
        "gate": manifest.plain(_fact(entries, "gate", None)),
        "passes": entries,
    }


def _described(one: Pass) -> dict[str, Any]:
    described: dict[str, Any] = {"name": one.name, "spec": one.spec, "options": {}}
    if dataclasses.is_dataclass(one) and not isinstance(one, Lower):
        described["options"] = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return described


def _fact(entries: list[dict[str, Any]], key: str, default: Any) -> Any:
    """The last entry's fact ``key``, moved out of the entry: the manifest states it once, at the top."""
    found = default
    for entry in entries:
        found = entry["facts"].pop(key, found)
    return found


def _end_to_end(folder: Path, backend: Backend, verify: Verify, ctx: Context) -> Proof:
    """The packaged program, as a user would run it, against the model as it was captured."""
    library = folder / LIBRARY
    opened = getattr(backend, "open", None)  # of a program for another machine
    program = opened(folder) if opened else open_program(folder, library=library if library.is_file() else None)
    results = verify.keep((program(s.feeds) for s in verify.samples), ctx, "packaged")
    return verify.compare(verify.original, results, None)


def analyze(
    model: Any,
    *,
    calibration: Any = None,
    tokenizer: str | Path | None = None,
    max_samples: int = 128,
    max_length: int = 512,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """The ledger entry of the ``outliers`` pass on ``model``; nothing is compiled."""
    settings = recipes.load("float")
    pipeline = [make_pass("canonicalise", {}), make_pass("outliers", {})]
    with Workspace() as workspace, writing():
        taken = take(model, workspace, allow_pickle=allow_pickle)
        words = Path(tokenizer) if tokenizer is not None else taken.tokenizer
        samples, _ = take_samples(taken.model, calibration, words, max_samples, max_length, workspace=workspace)
        ctx = context(workspace, settings, backends.by_name("cpu"), samples)
        run_pipeline(taken.model, pipeline, ctx, [Verify(), Timer(len(pipeline))])
        entry = ctx.ledger.current.as_dict()
        if words is not None:
            _spell_tokens(entry, words)
        return entry


def _spell_tokens(entry: dict[str, Any], words: Path) -> None:
    """Write each named token's text beside its id."""
    sites = entry["facts"].get("outliers", {}).get("sites", {}).values()
    named = [token for site in sites for token in site["top_tokens"] if token["id"] is not None]
    written = text.spelled(text.load_tokenizer(words), {token["id"] for token in named})
    for token in named:
        token["text"] = written.get(token["id"])
