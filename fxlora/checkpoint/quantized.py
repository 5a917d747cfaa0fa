"""Quantized weights in checkpoints: recognised by the tensors beside them, refused by name, or decoded.

Decoded are the formats whose arithmetic is a product with scales: float8 and int8 with scales, and bitsandbytes' int8 and
4 bits. A decoded weight is the float64 value of the format's formula, so that a merge rounds once, to the dtype that is
written. All others must be dequantized by the library that made them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fxlora._passes import MergeError
from fxlora.checkpoint.sources import Decoder, Read, Source
from fxlora.errors import CheckpointError

REMEDY = (
    "merge into the base that it was quantized from and quantize the result, or load the model and use export_merged"
)
"""What can always be done."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E8M0")
"""Dtypes of scales."""

_FOUR_BITS = re.compile(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)")
_BESIDE_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

_MARKS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors (packed)",
    "weight_qdata": "torchao",
    "_weight_qdata": "torchao",
    "weight._data": "quanto",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_blocks": "MXFP4",
    "gate_up_proj_blocks": "MXFP4",
    "down_proj_blocks": "MXFP4",
}
"""Ends of names that a format puts in the place of a weight's. The weight's own is what the module's name makes of it."""

_ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".kv_scale")
"""Ends of names of scales for what a layer computes, which a model of plain weights does not have."""

CONFIG_FILE = "hf_quant_config.json"
"""Where ModelOpt says a second time that a checkpoint is quantized."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What of a checkpoint is quantized.

    Attributes:
        formats: by the name that the weight has without quantization, the format.
        decoders: those that can be decoded.
        companions: names of the tensors beside the weights, which go when the weights are decoded.
        dtype: of the weights before they were quantized, as far as the checkpoint says.
    """

    formats: dict[str, str]
    decoders: dict[str, Decoder]
    companions: frozenset[str]
    dtype: torch.dtype | None = None

    def refuse(self, name: str) -> MergeError:
        """The error for a weight that is to be changed."""
        remedy = "pass dequantize=True" if set(self.formats) == set(self.decoders) else REMEDY
        return MergeError(
            f"'{name}' is quantized ({self.formats[name]}), and an update cannot be added to it; {remedy}. {self.count}"
        )

    @property
    def count(self) -> str:
        """A sentence that says how many weights are quantized."""
        weights = "1 weight" if len(self.formats) == 1 else f"{len(self.formats)} weights"
        return f"Quantized in this base: {weights}; nothing was written"

    def check_decodable(self) -> None:
        """Refuse a checkpoint with a weight that cannot be decoded.

        Raises:
            MergeError: naming the weight and its format.
        """
        rest = sorted(self.formats.keys() - self.decoders.keys())
        if rest:
            raise MergeError(
                f"'{rest[0]}' is quantized ({self.formats[rest[0]]}), which is not dequantized here; {REMEDY}. {self.count}"
            )


def find_quantized(sources: Mapping[str, Source], config: Mapping[str, Any], read: Read) -> Quantized:
    """Recognise quantized weights.

    Args:
        sources: all tensors of a checkpoint.
        config: its `config.json`, empty if there is none.
        read: for the small tensors that describe a format.

    Raises:
        CheckpointError: when what describes a format cannot be understood.
    """
    settings = _settings(config)
    method = str(settings.get("quant_method", ""))
    found = [*_four_bits(sources, read), *_by_scales(sources, settings, config, read), *_by_marks(sources, method)]
    formats: dict[str, str] = {}
    decoders: dict[str, Decoder] = {}
    companions: set[str] = set()
    for each in found:
        formats.setdefault(each.weight, each.format)
        companions.update(each.beside)
        if each.decoder is not None:
            decoders.setdefault(each.weight, each.decoder)
    for name, source in sources.items():
        if (
            name.rpartition(".")[2] == "weight"
            and name not in formats
            and source.entry.dtype in ("I8", "U8", "I32", *_FLOAT8)
        ):
            formats[name] = method or f"{source.entry.dtype} without scales that are known"
    if formats:
        companions.update(name for name in sources if name.endswith(_ACTIVATIONS))
    return Quantized(formats, decoders, frozenset(companions - formats.keys()), _dtype(found, config))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that does not say that weights are quantized, also in the configurations of parts."""
    return {
        key: without_quantization(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


@dataclass(frozen=True, slots=True)
class _Found:
    """A quantized weight."""

    weight: str
    format: str
    beside: tuple[str, ...]
    decoder: Decoder | None = None
    dtype: str = ""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration, or that of one of its parts, says of the quantization."""
    parts = [config, *(each for each in config.values() if isinstance(each, dict))]
    for part in cast("list[Mapping[str, Any]]", parts):
        found = part.get("quantization_config", part.get("compression_config"))
        if isinstance(found, dict):
            return cast("dict[str, Any]", found)
    return {}


def _dtype(found: list[_Found], config: Mapping[str, Any]) -> torch.dtype | None:
    parts = [config, *(each for each in config.values() if isinstance(each, dict))]
    names = [part.get(key) for part in cast("list[Mapping[str, Any]]", parts) for key in ("dtype", "torch_dtype")]
    for name in (*names, *(each.dtype for each in found)):
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


# ---- products with scales ----


@dataclass(frozen=True, slots=True)
class Scaled:
    """`W = q · s / divisor`, with one scale for each block of W.

    float8 with `weight_scale_inv` for blocks, as DeepSeek-V3 (technical report, arXiv:2412.19437, section 3.3.2, and
    `weight_dequant` of its inference code); with `weight_scale` for a tensor or for each row, as compressed-tensors, fbgemm
    and ModelOpt; int8 with `weight_scale` and without zero points, as compressed-tensors; int8 with `SCB` and the
    divisor 127, as bitsandbytes (LLM.int8(), arXiv:2208.07339, section 2.1). The product of q and s is exact in float64.

    Attributes:
        shape: of W.
        scale: the scales, one for each block along each dimension.
        block: rows and columns of a block; the last ones may be smaller.
        divisor: 1 or 127.
    """

    shape: tuple[int, int]
    scale: Source
    block: tuple[int, int]
    divisor: float = 1.0

    def rows(self, source: Source, read: Read, start: int, stop: int) -> Tensor:
        """See `Decoder.rows`."""
        columns = _grid(self.shape, self.block)[1]
        first, last = start // self.block[0], -(-stop // self.block[0])
        scales = _as_double(read(self.scale, first, last)).view(-1, columns)
        scales = scales[torch.arange(start, stop) // self.block[0] - first]
        if columns > 1:
            scales = scales[:, torch.arange(self.shape[1]) // self.block[1]]
        weights = _as_double(read(source, start, stop)) * scales
        return weights if self.divisor == 1 else weights / self.divisor


def _as_double(values: Tensor) -> Tensor:
    return values.float().double() if values.dtype.itemsize == 1 else values.double()


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


_SCALES = ("_scale_inv", "_scale")


def _by_scales(
    sources: Mapping[str, Source], settings: Mapping[str, Any], config: Mapping[str, Any], read: Read
) -> Iterator[_Found]:
    method = str(settings.get("quant_method", ""))
    for name, source in sources.items():
        module, _, leaf = name.rpartition(".")
        if source.entry.dtype not in (*_FLOAT8, "I8"):
            continue
        codes = f"{module}.SCB".lstrip(".")
        if source.entry.dtype == "I8" and leaf == "weight" and codes in sources:
            beside = (codes, f"{module}.weight_format".lstrip("."))
            decoder = _int8(source, sources, beside, config, read)
            yield _Found(name, "bitsandbytes int8", beside, decoder)
            continue
        for end in _SCALES:
            if name + end in sources:
                kind = "float8" if source.entry.dtype in _FLOAT8 else "int8"
                beside = tuple(other for other in _beside(name) if other in sources)
                plain = set(beside) <= {name + end, name + "_shape"}
                decoder = _scaled(source, sources[name + end], settings) if plain else None
                yield _Found(name, f"{method or 'scaled'} {kind}", beside, decoder)
                break


def _beside(name: str) -> tuple[str, ...]:
    return tuple(
        name + end for end in ("_scale_inv", "_scale", "_scale_2", "_zero_point", "_g_idx", "_shape", "_global_scale")
    )


def _scaled(source: Source, scale: Source, settings: Mapping[str, Any]) -> Scaled | None:
    """The decoder of a weight with scales whose layout is certain, else None."""
    shape = source.entry.shape
    if len(shape) != 2 or scale.entry.dtype not in _NUMBERS:
        return None
    block = _block(shape, scale.entry.shape, settings)
    return None if block is None else Scaled(shape, scale, block)


def _block(shape: tuple[int, int], scales: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that one scale is for: the whole weight, a row, or a block of the size that is configured."""
    if all(size == 1 for size in scales):
        return shape
    if scales in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    size = settings.get("weight_block_size")
    if isinstance(size, list) and len(cast("list[Any]", size)) == 2 and len(scales) == 2:
        block = tuple(cast("list[Any]", size))
        if all(isinstance(each, int) and each > 0 for each in block) and _grid(shape, cast("Any", block)) == scales:
            return cast("tuple[int, int]", block)
    return None


_TRANSPOSING = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Models with `Conv1D`, whose weights bitsandbytes stores transposed."""


def _int8(
    source: Source, sources: Mapping[str, Source], beside: tuple[str, str], config: Mapping[str, Any], read: Read
) -> Scaled | None:
    scale, layout = sources[beside[0]], sources.get(beside[1])
    shape = source.entry.shape
    if len(shape) != 2 or scale.entry.shape != shape[:1] or config.get("model_type") in _TRANSPOSING:
        return None
    if layout is not None and int(read(layout, 0, 1).reshape(-1)[0]) != 0:  # rows in an order that a GPU wants
        return None
    return Scaled((shape[0], shape[1]), scale, (1, shape[1]), 127.0)


# ---- bitsandbytes, 4 bits ----


@dataclass(frozen=True, slots=True)
class FourBits:
    """`W = map[code] · absmax`, two codes in a byte, the first of them in its upper half, one absmax for each block.

    QLoRA (arXiv:2305.14314, section 3). The map is in the file. With nested quantization the absmax are
    `nested_map[code] · nested_absmax + offset` in float32, as bitsandbytes computes them; W is the float64 product.

    Attributes:
        shape: of W.
        block: entries in a block, in the order of W.
        absmax: of the blocks.
        map: the 16 values.
        nested_absmax: of the blocks of absmax; None if these are numbers themselves.
        nested_map: the 256 values.
        nested_block: how many absmax are in a block.
        offset: what is added to them.
    """

    shape: tuple[int, int]
    block: int
    absmax: Source
    map: Source
    nested_absmax: Source | None = None
    nested_map: Source | None = None
    nested_block: int = 1
    offset: float = 0.0

    def rows(self, source: Source, read: Read, start: int, stop: int) -> Tensor:
        """See `Decoder.rows`."""
        first, last = start * self.shape[1], stop * self.shape[1]
        packed = _flat(source, read, first // 2, -(-last // 2))
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[first % 2 :][: last - first]
        blocks = torch.arange(first, last) // self.block
        scales = self._absmax(read, first // self.block, -(-last // self.block))
        values = _flat(self.map, read, 0, 16).float()[codes.int()]
        return (values.double() * scales.double()[blocks - first // self.block]).view(stop - start, self.shape[1])

    def _absmax(self, read: Read, first: int, last: int) -> Tensor:
        found = _flat(self.absmax, read, first, last)
        if self.nested_absmax is None or self.nested_map is None:
            return found.float()
        outer = torch.arange(first, last) // self.nested_block
        scales = _flat(self.nested_absmax, read, int(outer[0]), int(outer[-1]) + 1).float()[outer - outer[0]]
        values = _flat(self.nested_map, read, 0, 256).float()[found.int()]
        return values * scales + torch.tensor(self.offset, dtype=torch.float32)


def _flat(source: Source, read: Read, first: int, last: int) -> Tensor:
    """Entries of a tensor that is a row, or a column."""
    if source.entry.shape[:1] == (1,):
        return read(source, 0, 1).flatten()[first:last]
    return read(source, first, last).flatten()


def _four_bits(sources: Mapping[str, Source], read: Read) -> Iterator[_Found]:
    for name, source in sources.items():
        match = _FOUR_BITS.fullmatch(name)
        if match is None or match[1] not in sources:
            continue
        weight, kind = match[1], f"bitsandbytes {match[2]}"
        beside = (name, *(f"{weight}.{each}" for each in _BESIDE_FOUR_BITS if f"{weight}.{each}" in sources))
        try:
            values = json.loads(bytes(read(source, 0, source.entry.num_entries).tolist()))
            decoder = _four_bit_decoder(sources, weight, values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source.path}: '{name}' does not describe a weight of {kind} ({error}); save the checkpoint again"
            ) from error
        yield _Found(weight, kind, beside, decoder, str(values.get("dtype", "")))


def _four_bit_decoder(sources: Mapping[str, Source], weight: str, values: Mapping[str, Any]) -> FourBits | None:
    """From what bitsandbytes writes beside the weight; None for another shape than a matrix."""
    shape = tuple(int(size) for size in values["shape"])
    if len(shape) != 2:
        return None
    plain = FourBits(shape, int(values["blocksize"]), sources[f"{weight}.absmax"], sources[f"{weight}.quant_map"])
    if sources[weight].entry.num_entries != -(-shape[0] * shape[1] // 2) or plain.map.entry.num_entries != 16:
        raise ValueError(f"shape {shape} does not fit")
    if f"{weight}.nested_absmax" not in sources:
        return plain
    return replace(
        plain,
        nested_absmax=sources[f"{weight}.nested_absmax"],
        nested_map=sources[f"{weight}.nested_quant_map"],
        nested_block=int(values["nested_blocksize"]),
        offset=float(values["nested_offset"]),
    )


# ---- others ----


def _by_marks(sources: Mapping[str, Source], method: str) -> Iterator[_Found]:
    for name in sources:
        for mark, kind in _MARKS.items():
            if f".{name}".endswith(f".{mark}"):
                module = name.removesuffix(mark)
                leaf = mark.removesuffix("_blocks") if mark.endswith("_blocks") else "weight"
                yield _Found(module + leaf, method.upper() if mark == "qweight" and method else kind, ())
                break
