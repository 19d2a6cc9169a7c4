"""Compiled regions on disk: found again by content, checked, limited in size, safe after kills and beside other processes."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

from helpers.children import environment
from helpers.region import product, region
from stepgraph.cli.main import app
from stepgraph.compiler.lowering import region_cache
from stepgraph.compiler.lowering.region_cache import compile_kept, region_key, region_store
from stepgraph.errors import CompileError
from stepgraph.files.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "regions", 10_000)


# -- the store -------------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(store: Store):
    assert store.get("a") is None
    store.put("a", {"x": b"1", "d/y": b"2"})
    assert store.get("a") == {"x": b"1", "d/y": b"2"}
    assert [entry.key for entry in store.entries()] == ["a"]


def test_every_flipped_byte_and_every_cut_is_noticed(store: Store):
    store.put("a", {"x": b"some code"})
    path = next(store.folder.iterdir())
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert store.get("a") is None
        assert not path.exists()
        path.write_bytes(whole[:at])
        assert store.get("a") is None
    path.write_bytes(whole)
    assert store.get("a") == {"x": b"some code"}


def test_what_was_not_used_for_longest_goes_first(store: Store):
    for number, key in enumerate("abc"):
        store.put(key, {"x": bytes(3000)})
        os.utime(store.folder / f"{key}.bundle", (number, number))
    assert store.get("a") is not None
    store.put("d", {"x": bytes(3000)})
    assert {entry.key for entry in store.entries()} == {"a", "c", "d"}
    assert store.prune(4000) == 2
    assert store.prune(0) == 1
    assert store.entries() == []


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(CompileError, match=r"nobody else may enter \(mode 0700\); it has owner \d+ and mode 0755"):
        Store(tmp_path / "open", 1)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CompileError, match="must be a folder of your own"):
        Store(tmp_path / "link", 1)


def write_forever(folder: Path, ready: Any) -> None:
    """A forked child."""
    store = Store(folder, 10**9)
    ready.release()
    while True:
        for number in range(20):
            store.put(f"k{number}", {"x": bytes([number]) * 200_000})
            found = store.get(f"k{(number * 7) % 20}")
            assert found is None or set(found["x"]) == {(number * 7) % 20}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_processes_that_are_killed_leave_whole_bundles(tmp_path: Path):
    folder, fork = tmp_path / "regions", multiprocessing.get_context("fork")
    ready = fork.Semaphore(0)
    started = [fork.Process(target=write_forever, args=(folder, ready), daemon=True) for _ in range(2)]
    for process in started:
        process.start()
    assert all(ready.acquire(timeout=60) for _ in started)
    time.sleep(0.5)
    for process in started:
        assert process.is_alive()
        process.kill()
        process.join()
    store = Store(folder, 10**9)
    kept = store.entries()
    assert kept
    for entry in kept:
        assert store.get(entry.key) == {"x": bytes([int(entry.key[1:])]) * 200_000}
    for partial in folder.glob(".*.partial"):
        os.utime(partial, (0, 0))
    store.prune()
    assert list(folder.glob(".*")) == []


# -- regions ---------------------------------------------------------------------------------------------------------------


def test_keys_tell_regions_apart():
    x, y = torch.zeros(4, 8), torch.zeros(4, 8)
    key = region_key(region(), (x, y), None)
    assert key == region_key(region(), (torch.ones(4, 8), y), None)
    others = [
        region_key(region(3.0), (x, y), None), region_key(region(), (x, y), {"max_autotune": True}),
        region_key(region(), (x[:, :4], y[:, :4]), None), region_key(region(), (x.bfloat16(), y.bfloat16()), None),
        region_key(region(), (x.t().contiguous().t(), y), None),
    ]  # fmt: skip
    with inductor_config.patch(emulate_precision_casts=True):
        others.append(region_key(region(), (x, y), None))
    assert None not in others
    assert len({key, *others}) == 7


class OnCuda:
    """What a key asks of an example, of a tensor that lies on a card."""

    shape, dtype = torch.Size((4, 8)), torch.float32

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)

    def stride(self) -> tuple[int, ...]:
        return (8, 1)


def test_keys_tell_cards_and_their_compilers_apart(monkeypatch):
    def key(index: int = 0, **changes: object) -> str | None:
        region_cache._accelerator.cache_clear()
        properties = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 150_000}
        with monkeypatch.context() as patch:
            facts = SimpleNamespace(**(properties | changes))
            patch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
            patch.setattr(region_cache, "version", lambda name: changes.get("triton", "3.6.0"))
            return region_key(region(), (OnCuda(index), OnCuda(index)), None)

    keys = [
        key(), key(1), key(name="NVIDIA H100", total_memory=80_000), key(minor=3), key(multi_processor_count=114),
        key(triton="3.7.0"), region_key(region(), (torch.zeros(4, 8), torch.zeros(4, 8)), None),
    ]  # fmt: skip
    assert None not in keys
    assert len(set(keys)) == len(keys)
    # Inductor sets this one in the process that compiles; the next process has to find the region without.
    monkeypatch.setenv("TRITON_LIBDEVICE_PATH", "/somewhere")
    assert key() == keys[0]


def test_code_without_a_name_and_values_inside_are_not_kept():
    graph = fx.Graph()
    graph.output((graph.call_function(lambda x: x + 1, (graph.placeholder("x"),)),))
    assert region_key(fx.GraphModule({}, graph), (torch.zeros(2),), None) is None
    graph = fx.Graph()
    graph.output((graph.get_attr("weight"),))
    assert region_key(fx.GraphModule({"weight": torch.nn.Parameter(torch.zeros(2))}, graph), (), None) is None


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Keys of the regions that were really compiled; regions are kept."""
    monkeypatch.setenv("STEPGRAPH_REGIONS", "10")
    compiled: list[str] = []
    compile_and_keep = region_cache._compile_and_keep
    monkeypatch.setattr(
        region_cache, "_compile_and_keep", lambda *given: (compiled.append(given[-1]), compile_and_keep(*given))[1]
    )
    return compiled


def test_a_kept_region_is_not_compiled_again_unless_it_is_damaged(counted: list[str], monkeypatch):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    given = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR",)}
    assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
    # Another process has another folder to work in.
    monkeypatch.setattr(region_cache, "_folders", {})
    assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
    assert len(counted) == 1
    store = region_store()
    path = next(store.folder.glob("*.bundle"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
    assert len(counted) == 2
    # Whole, but not a record that torch can read.
    store.put(path.stem, {region_cache.RECORD: b"nonsense"})
    assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
    assert len(counted) == 3
    assert {name: os.environ.get(name) for name in given} == given


def test_regions_for_devices_of_no_known_kind_are_not_kept(counted: list[str], monkeypatch):
    monkeypatch.setattr(region_cache, "DEVICES", ("cuda",))
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
    assert counted == []
    assert region_store().entries() == []


@pytest.mark.gpu
def test_a_region_on_cuda_is_kept_with_its_kernels(counted: list[str], tmp_path: Path):
    """By the process that compiled it, and by one that has nothing but the record, and cannot compile a region."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, y = torch.ones(4, 8, device="cuda"), torch.ones(4, 8, device="cuda")
    assert torch.equal(compile_kept(product(), (x, y), None)(x, y)[0], x * 2 + y)
    assert len(counted) == 1
    script = (
        "import torch\n"
        "from helpers.region import product\n"
        "from stepgraph.compiler.lowering import region_cache\n"
        "region_cache._compile_and_keep = None\n"
        "x = torch.ones(4, 8, device='cuda')\n"
        "print(*region_cache.compile_kept(product(), (x, x), None)(x, x)[0].unique().tolist())\n"
    )
    around = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"))
    alone = subprocess.run([sys.executable, "-c", script], env=around, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.split() == ["3.0"]


ALONE = """
import sys, torch
from torch._inductor import cpp_builder
from helpers.region import product, region
from stepgraph.compiler.lowering import region_cache
built, build = [], cpp_builder.CppBuilder.build
# Inductor asks the compiler for its headers even where all libraries are there.
cpp_builder.CppBuilder.build = lambda self: (self._name.endswith("header") or built.append(self._name), build(self))[1]
compiled, compile_and_keep = [], region_cache._compile_and_keep
region_cache._compile_and_keep = lambda *given: (compiled.append(given[-1]), compile_and_keep(*given))[1]
x, y = torch.ones(4, 8), torch.ones(4, 8)
for make in sys.argv[1:]:
    total = region_cache.compile_kept(globals()[make](), (x, y), None)(x, y)[0]
    assert torch.equal(total, x * 2 + y)
print(len(built), len(compiled))
"""


@pytest.mark.slow
def test_a_kept_region_brings_the_kernels_that_another_one_has_in_common_with_it(tmp_path: Path):
    around = environment(STEPGRAPH_REGIONS="10", STEPGRAPH_CACHE=str(tmp_path))

    def builds(*regions: str) -> tuple[int, int]:
        found = subprocess.run([sys.executable, "-c", ALONE, *regions], env=around, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        libraries, compiled = map(int, found.stdout.split())
        return libraries, compiled

    libraries, compiled = builds("region", "product")
    assert libraries >= 1
    assert compiled == 2
    # In the other order: nothing of "region" is there when "product" is loaded.
    assert builds("product", "region") == (0, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_cannot_be_written_costs_no_run(counted: list[str], caplog):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    folder = region_store().folder
    compile_kept(region(), (x, y), None)
    bundle = next(folder.glob("*.bundle"))
    bundle.write_bytes(b"damaged")
    folder.chmod(0o500)
    try:
        assert torch.equal(compile_kept(region(), (x, y), None)(x, y)[0], x * 2 + y)
        assert torch.equal(compile_kept(region(3.0), (x, y), None)(x, y)[0], x * 3 + y)
    finally:
        folder.chmod(0o700)
    assert "is not kept: [Errno" in caplog.text


def test_a_file_that_cannot_be_removed_is_as_good_as_none(store: Store, monkeypatch, caplog):
    """As on a read-only file system."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    store.put("a", {"x": b"1"})
    next(store.folder.iterdir()).write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert store.get("a") is None
    store.put("b", {"x": b"1"})
    assert "b is not kept: [Errno 30]" in caplog.text


def test_without_a_compiler_the_error_says_so(counted: list[str], monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(region_cache, "_folders", {})

    def refuse(*_: object) -> None:
        raise region_cache.InvalidCxxCompiler

    monkeypatch.setattr(region_cache, "_compile_and_keep", refuse)
    with pytest.raises(CompileError, match=r"no C\+\+ compiler was found, which backend='inductor' needs"):
        compile_kept(region(), (torch.zeros(4, 8), torch.zeros(4, 8)), None)


def test_what_was_compiled_elsewhere_in_this_process_is_kept_whole(counted: list[str], tmp_path: Path, monkeypatch):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    for place in ("one", "other"):
        monkeypatch.setenv("STEPGRAPH_CACHE", str(tmp_path / place))
        compile_kept(region(), (x, y), None)
        (entry,) = region_store().entries()
        names = set(region_store().get(entry.key))
        sources = {name for name in names if name.endswith(".main.cpp")}
        assert sources
        assert {name.replace(".cpp", ".so") for name in sources} <= names
    assert len(counted) == 2


def test_cache_commands(counted: list[str]):
    compile_kept(region(), (torch.zeros(4, 8), torch.zeros(4, 8)), None)

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["cache", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "1 regions" in invoke("ls")
    assert counted[0] in invoke("ls", "--json")
    assert invoke("prune", "--json") == '{"removed": 0}\n'
    next(region_store().folder.glob("*.bundle")).write_bytes(b"cut")
    assert invoke("prune", "--json") == '{"removed": 1}\n'
    compile_kept(region(), (torch.zeros(4, 8), torch.zeros(4, 8)), None)
    assert invoke("clear", "--json") == '{"removed": 1}\n'
    assert "0 regions" in invoke("ls")


def test_without_a_limit_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("STEPGRAPH_REGIONS", "0")
    assert region_store() is None
    result = CliRunner().invoke(app, ["cache", "ls"])
    assert result.exit_code == 1
    assert "STEPGRAPH_REGIONS is 0" in result.stderr
