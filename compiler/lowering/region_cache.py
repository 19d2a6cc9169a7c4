"""Compiled regions that are kept on disk, so that the next process need not compile them (docs/artifacts.md).

What is kept of a region is inductor's own record of it, with the native libraries that it calls. Such records are pickles: they
are read from the user's own folder only, and after their hash has been checked.
"""

import atexit
import hashlib
import operator
import os
import pickle
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import standalone_compile
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.standalone_compile import CompiledArtifact
from torch.fx.experimental.proxy_tensor import make_fx

from stepgraph.compiler.lowering.lift_region import LiftedModule
from stepgraph.env import get_logger, read_env
from stepgraph.errors import CompileError
from stepgraph.files.store import Store

RECORD = "record"
# What stands behind the kernels in inductor's sources.
BINDINGS = b"// Python bindings"
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
# Where regions are kept: a record has native libraries, or Triton's binaries.
DEVICES = ("cpu", "cuda")
PROPERTIES = ("name", "major", "minor", "gcnArchName", "multi_processor_count", "total_memory", "L2_cache_size")
# What a record raises that is whole, and yet of no use here: another build of torch, a library that cannot be loaded.
OF_NO_USE = (
    RuntimeError, OSError, ImportError, EOFError, pickle.UnpicklingError, AssertionError, AttributeError, LookupError,
    TypeError, ValueError,
)  # fmt: skip
# The folder that inductor works in is a setting of the whole process.
LOCK = threading.RLock()


def region_store() -> Store | None:
    """Where regions are kept; None where STEPGRAPH_REGIONS is 0.

    Raises:
        CompileError: Somebody else may write there.
    """
    env = read_env()
    return Store(env.cache / "regions", int(env.regions_mb * 1e6)) if env.regions_mb else None


def compile_kept(gm: fx.GraphModule, examples: Sequence[torch.Tensor], patches: dict[str, Any] | None) -> Callable[..., Any]:
    """Compile a region with inductor, or take it as it was compiled before; (*tensors) -> tuple of tensors.

    It is run once on the examples, so that nothing is left to be compiled, and a kept region shows that it runs.
    """
    try:
        return _compile_kept(gm, examples, patches)
    except InvalidCxxCompiler as error:
        raise CompileError(
            "no C++ compiler was found, which backend='inductor' needs on CPUs, for kept regions too; install one, name one in "
            "CXX, or pass backend='eager'"
        ) from error


def _compile_kept(gm: fx.GraphModule, examples: Sequence[torch.Tensor], patches: dict[str, Any] | None) -> Callable[..., Any]:
    log = get_logger("regions")
    try:
        store = region_store()
    except (CompileError, OSError) as error:
        log.warning("%s; regions are not kept", error)
        store = None
    keepable = all(tensor.device.type in DEVICES for tensor in examples)
    key = region_key(gm, examples, patches) if store is not None and keepable else None
    if store is None or key is None:
        run: Any = compile_fx(gm, list(examples), config_patches=patches)
        run(*examples)
        return run  # type: ignore[no-any-return]
    with LOCK, _inductor_works_in(_work_folder(store.folder)) as work:
        files = store.get(key)
        if files is not None:
            try:
                restored = _restore(files, work)
                restored(*examples)
                return restored
            except (InvalidCxxCompiler, torch.OutOfMemoryError):
                raise
            except OF_NO_USE as error:
                log.warning("the kept region %s cannot be used (%s: %s); it is compiled anew", key, type(error).__name__, error)
        return _compile_and_keep(gm, examples, patches, work, store, key)


def _restore(files: dict[str, bytes], work: Path) -> Callable[..., Any]:
    for name, data in files.items():
        path = work / name
        if not path.is_file() or name == RECORD:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return CompiledArtifact.load(path=str(work / RECORD), format="binary")


def _compile_and_keep(
    gm: fx.GraphModule, examples: Sequence[torch.Tensor], patches: dict[str, Any] | None, work: Path, store: Store, key: str
) -> Callable[..., Any]:
    # What this process has loaded from another folder would not be written into this one, nor be part of the record.
    CppPythonBindingsCodeCache.cache_clear()
    CompiledTritonKernels.cache_clear()
    # torch keeps records of graphs of its own operations only, not of Python functions.
    flat = make_fx(gm, tracing_mode="fake")(*examples)
    run = standalone_compile(
        flat, list(examples), dynamic_shapes="from_example_inputs", options={"config_patches": patches or {}}
    )
    run(*examples)
    try:
        run.save(path=str(work / RECORD), format="binary")
    except RuntimeError as error:
        get_logger("regions").info("%s is not kept: %s", key, error)
        return run
    record = (work / RECORD).read_bytes()
    files = {str(path.relative_to(work)): path.read_bytes() for path in _libraries(work, record)}
    store.put(key, files | {RECORD: record})
    return run


def _libraries(work: Path, record: bytes) -> list[Path]:
    """The native code that a record calls, made for this region or an earlier one, with the sources it is found by.

    A record has the text of its kernels, to which inductor adds what makes a library of them. Sources without a kernel are
    probes of what the processor can do; every process asks them.
    """
    sources = {path: path.read_bytes().partition(BINDINGS) for path in work.glob("??/*.cpp")}
    called = [path for path, (kernel, marker, _) in sources.items() if not marker or kernel.strip() in record]
    files = {sibling for path in called for sibling in (path, path.with_suffix(".so"))}
    return sorted(path for path in files if path.is_file())


def region_key(gm: fx.GraphModule, examples: Sequence[torch.Tensor], patches: dict[str, Any] | None) -> str | None:
    """32 hexadecimal digits of everything that compiled code depends on; None where that cannot be told."""
    try:
        lines = [_line(node) for node in gm.graph.nodes]
    except ValueError as error:
        get_logger("regions").info("a region is not kept: %s", error)
        return None
    facts = [f"{tuple(t.shape)} {t.stride()} {t.dtype} {t.device}" for t in examples]
    settings = repr(sorted((patches or {}).items()))
    devices = [_accelerator(device) for device in sorted({t.device for t in examples if t.device.type != "cpu"}, key=str)]
    digest = hashlib.sha256("\n".join([*lines, *facts, settings, *_surroundings(), *devices]).encode())
    return digest.hexdigest()[:32]


def _line(node: fx.Node) -> str:
    if node.op in ("get_attr", "call_module"):
        raise ValueError(f"{node.op} {node.target} holds values of its own")
    arguments = fx.node.map_aggregate((node.args, node.kwargs), _plain)
    return f"{node.name} {node.op} {_named(node.target)} {arguments!r}"


def _plain(value: Any) -> Any:
    """An argument, if its text says all that it is."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, PLAIN) or value is Ellipsis:
        return value
    raise ValueError(f"an argument is a {type(value).__name__}")


def _named(target: Any) -> str:
    """A node's target by a name that means the same in every process."""
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    if isinstance(target, LiftedModule):
        return repr(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    # Under its name an operation stands in the reference's place; its code is part of the key (`_sources`).
    if isinstance(target, FunctionType) and str(module).startswith("stepgraph.") and not target.__closure__:
        return f"{module}.{name}"
    for place in (module, "torch", "torch.nn.functional", "torch._C._nn"):
        for known in (name, getattr(target, "__name__", "")):
            try:
                if place is not None and operator.attrgetter(known)(sys.modules[place]) is target:
                    return f"{place}.{known}"
            except (AttributeError, KeyError):
                continue
    raise ValueError(f"{target!r} has no name to find it by")


def _surroundings() -> list[str]:
    """What else compiled code depends on: versions, processor, threads, and settings of torch."""
    settings = [
        torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.is_inference_mode_enabled(),
        [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(("TORCHINDUCTOR_", "CXX", "CC", "ATEN_"))
         and name != "TORCHINDUCTOR_CACHE_DIR"],
    ]  # fmt: skip
    versions = [sys.version, str(torch.__version__), torch.version.git_version or ""]
    return [*versions, _processor(), _sources(), repr(settings), repr(inductor_config.save_config_portable())]


@lru_cache
def _accelerator(device: torch.device) -> str:
    """What Triton and inductor compile for, and choose kernels by; and the compilers.

    Triton's variables do not count: inductor sets some of them when it first compiles.
    """
    properties = torch.cuda.get_device_properties(device)
    facts = [getattr(properties, name, None) for name in PROPERTIES]
    return repr([facts, torch.version.cuda, torch.version.hip, version("triton")])


@lru_cache
def _processor() -> str:
    """What inductor compiles for: the processor's model and features, which are more than torch tells apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("vendor_id", "model", "flags", "Features", "CPU "))}))


@lru_cache
def _sources() -> str:
    """Hash of stepgraph's own code, which fused operations are part of."""
    digest = hashlib.sha256()
    for package in ("stepgraph", "stepgraph.runtime", "stepgraph.triton_kernels", "stepgraph.csrc", "stepgraph.compiler"):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            for path in sorted(Path(place).rglob("*")):
                if path.suffix in (".py", ".cpp", ".h"):
                    digest.update(f"{package}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


_folders: dict[tuple[int, Path], Path] = {}


def _work_folder(folder: Path) -> Path:
    """Where inductor works in this process; removed when it ends."""
    place = os.getpid(), folder
    if place not in _folders or not _folders[place].is_dir():
        _folders[place] = Path(tempfile.mkdtemp(prefix="stepgraph-regions-"))
        atexit.register(_leave, os.getpid(), _folders[place])
    return _folders[place]


def _leave(owner: int, work: Path) -> None:
    # A forked process has its parent's exit handlers, and not its folder.
    if os.getpid() == owner:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _inductor_works_in(work: Path) -> Iterator[Path]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work)
    try:
        yield work
    finally:
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
