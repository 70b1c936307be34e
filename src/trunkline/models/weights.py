"""Reading safetensors checkpoints: mapped into memory, one tensor at a time, every mismatch named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from trunkline.config.model_spec import ModelError
from trunkline.kernels.ops import Activation, Kernels, Quantization
from trunkline.kernels.pages import NOT_NEEDED, advise
from trunkline.layers.linear import GatedLinear, Linear
from trunkline.layers.norm import RMSNorm

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PROGRESS_AFTER = 2.0  # seconds of loading before the progress bar shows
_NAMED = 5  # tensors that an error lists by name


class Checkpoint:
    """The tensors of a model folder. `take` hands out each once; `finish` complains about leftovers.

    Raises ModelError: no weights, missing shard, missing or extra tensor, wrong shape, wrong dtype.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.shards = {path.name: self._open(path) for path in self._shard_paths()}
        self.where = {name: shard for shard, file in self.shards.items() for name in file.keys()}  # noqa: SIM118
        self._check_index()
        self.left = set(self.where)
        self._taken: list[Tensor] = []
        self._progress = tqdm(
            total=len(self.where),
            desc="loading weights",
            unit=" tensors",
            delay=_PROGRESS_AFTER,
            file=sys.stderr,
        )

    def _shard_paths(self) -> list[Path]:
        if (self.folder / _SINGLE).exists():
            return [self.folder / _SINGLE]
        names = sorted(set(self._index().values()))
        if not names:
            pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in _PICKLES)
            hint = f"; {_some(pickles)} may run code when read and never are" if pickles else ""
            raise ModelError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}{hint}", "no_weights")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{self.folder}: {len(missing)} of {len(names)} weight files are missing: {_some(missing)}",
                "missing_shard",
            )
        return [self.folder / name for name in names]

    def _index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        if not path.exists():
            return {}
        try:
            names = json.loads(path.read_bytes())["weight_map"]
            safe = all(isinstance(name, str) and Path(name).name == name for name in names.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is malformed: {error!r}", "bad_checkpoint") from error
        if not safe:
            raise ModelError(f"{path}: a weight file is not a plain file name", "bad_checkpoint")
        return dict(names)

    def _check_index(self) -> None:
        if _SINGLE in self.shards:
            return
        absent = [name for name in self._index() if name not in self.where]
        if absent:
            raise ModelError(
                f"{self.folder}: {len(absent)} tensors of {_INDEX} are in no file: {_some(absent)}",
                "missing_tensor",
            )

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} can't be read: {error}", "bad_checkpoint") from error

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name`, mapped and not copied, after checking its shape and that it holds floats."""
        if name not in self.where:
            raise ModelError(
                f"{self.folder}: the tensor {name} {list(shape)} is missing ({len(self.where)} are there)",
                "missing_tensor",
            )
        tensor: Tensor = self.shards[self.where[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.folder}: {name} has shape {list(tensor.shape)}; config.json implies {list(shape)}",
                "wrong_shape",
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{self.folder}: {name} is {tensor.dtype}; float32, bfloat16 or float16 is expected "
                "(quantised checkpoints are not supported)",
                "wrong_dtype",
            )
        self.left.discard(name)
        self._taken.append(tensor)
        self._progress.update()
        return tensor

    def release(self) -> None:
        """The tensors taken so far are not needed any more: their part of the files leaves memory."""
        for tensor in self._taken:
            advise(tensor, NOT_NEEDED)
        self._taken.clear()

    def skip(self, *names: str) -> None:
        """Tensors that may be there and are not needed."""
        self.left.difference_update(names)

    def finish(self) -> None:
        """Close the files. Raises ModelError if a tensor was never asked for."""
        self._progress.close()
        self._taken.clear()
        self.shards.clear()
        if self.left:
            raise ModelError(
                f"{self.folder}: {len(self.left)} tensors don't belong to this architecture: "
                f"{_some(sorted(self.left))}",
                "extra_tensor",
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class LayerLoader:
    """Makes layers from the checkpoint's tensors under a name prefix, in the engine's dtype and device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
        prefix: str = "",
    ) -> None:
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.prefix = prefix

    def at(self, name: str) -> LayerLoader:
        prefix = f"{self.prefix}{name}."
        return LayerLoader(self.checkpoint, self.kernels, self.dtype, self.device, self.quantization, prefix)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of its own: casting or `clone` detaches it from the mapped file."""
        found = self.checkpoint.take(self.prefix + name, shape)
        moved = found.to(self.device, self.dtype)
        return moved.clone() if moved.data_ptr() == found.data_ptr() else moved

    def mapped(self, name: str, *shape: int) -> Tensor:
        """A matrix that only packing needs: still in the file where no cast is needed."""
        return self.checkpoint.take(self.prefix + name, shape).to(self.device, self.dtype)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.kernels, self.tensor(f"{name}.weight", size), eps)

    def linear(self, sizes: dict[str, int], inputs: int, *, bias: bool) -> Linear:
        """One product for all the projections in `sizes` (name -> outputs)."""
        weights, biases = self._weights(sizes, inputs, bias)
        with self._naming(sizes):
            return Linear(self.kernels, weights, biases, self.quantization)

    def gated(
        self, gate: str, up: str, outputs: int, inputs: int, activation: Activation, *, bias: bool
    ) -> GatedLinear:
        """The two projections of a gated product."""
        sizes = {gate: outputs, up: outputs}
        (first, second), biases = self._weights(sizes, inputs, bias)
        with self._naming(sizes):
            return GatedLinear(self.kernels, first, second, biases, self.quantization, activation)

    @contextmanager
    def _naming(self, sizes: dict[str, int]) -> Iterator[None]:
        """Say which weights could not be packed."""
        try:
            yield
        except ValueError as error:
            names = ", ".join(self.prefix + name for name in sizes)
            raise ModelError(f"{self.checkpoint.folder}: {names}: {error}", "bad_weight") from error

    def _weights(self, sizes: dict[str, int], inputs: int, bias: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Weights still mapped where no cast is needed (packing is the copy), and biases."""
        weights = [self.mapped(f"{name}.weight", size, inputs) for name, size in sizes.items()]
        return weights, [self.tensor(f"{name}.bias", size) for name, size in sizes.items()] if bias else []
