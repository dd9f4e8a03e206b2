"""Workloads as data: lists of gradients of real models and of the shapes that hurt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

STD = 0.02  # of every normal gradient: small enough that no norm of a 16-bit one leaves its range
CONSTANT = 0.1
FILLED_ROWS = 0.01  # of a "rows" gradient; the others are zero


@dataclass(frozen=True)
class Workload:
    """A list of gradients.

    Attributes:
        shapes: one per parameter.
        fill: "normal" (mean 0, deviation STD), "constant" (CONSTANT everywhere), or "rows" (normal, but only
            a random FILLED_ROWS of the rows, as an embedding's gradient).
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    description: str
    fill: str = "normal"

    @property
    def size(self) -> int:
        """Elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> tuple[Shape, ...]:
    """As in Hugging Face's gpt2, whose Conv1D weights are [in, out]; the output layer is tied to wte."""
    norm = ((width,), (width,))
    block = (
        *norm,  # ln_1
        *((width, 3 * width), (3 * width,)),  # attn.c_attn
        *((width, width), (width,)),  # attn.c_proj
        *norm,  # ln_2
        *((width, 4 * width), (4 * width,)),  # mlp.c_fc
        *((4 * width, width), (width,)),  # mlp.c_proj
    )
    return ((vocabulary, width), (context, width), *block * layers, *norm)


def resnet50_shapes() -> tuple[Shape, ...]:
    """As in torchvision's resnet50."""
    shapes: list[Shape] = []

    def convolution(out: int, into: int, kernel: int) -> None:
        shapes.extend([(out, into, kernel, kernel), (out,), (out,)])  # and its batch norm

    convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, into, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, into, 1)  # downsample
            into = 4 * width
    return (*shapes, (1000, into), (1000,))


def llama_shapes(
    layers: int = 22, width: int = 2048, key_width: int = 256, hidden: int = 5632, vocabulary: int = 32000
) -> tuple[Shape, ...]:
    """As in Hugging Face's Llama; the defaults are TinyLlama's, 1.1 billion parameters."""
    block = (
        *((width, width), (key_width, width), (key_width, width), (width, width)),  # q, k, v, o
        *((hidden, width), (hidden, width), (width, hidden)),  # gate, up, down
        *((width,), (width,)),  # norms
    )
    return ((vocabulary, width), *block * layers, (width,), (vocabulary, width))


def lstm_shapes(features: int = 8, hidden: int = 512, layers: int = 2) -> tuple[Shape, ...]:
    """``nn.LSTM`` and a linear layer that forecasts one number."""
    shapes: list[Shape] = []
    for layer in range(layers):
        shapes += [(4 * hidden, features if layer == 0 else hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    return (*shapes, (1, hidden), (1,))


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def in_dtype(workload: Workload, dtype: torch.dtype) -> Workload:
    """The same shapes and fill in another dtype."""
    return replace(workload, name=workload.name.replace(SHORT[workload.dtype], SHORT[dtype]), dtype=dtype)


GPT2 = Workload("GPT-2 fp32", gpt2_shapes(), torch.float32, "GPT-2 124M, 148 tensors")
GPT2_BF16 = in_dtype(GPT2, torch.bfloat16)
GPT2_FP16 = in_dtype(GPT2, torch.float16)
RESNET50 = Workload("ResNet-50 fp32", resnet50_shapes(), torch.float32, "ResNet-50, 161 tensors")
LSTM = Workload("LSTM fp32", lstm_shapes(), torch.float32, "LSTM forecaster, 2 layers of 512, 10 tensors")
LLAMA = Workload("Llama 1.1B fp32", llama_shapes(), torch.float32, "Llama 1.1B, 201 tensors")
LLAMA_BF16 = in_dtype(LLAMA, torch.bfloat16)
SMALL = Workload("2,000 small fp32", ((64,),) * 2000, torch.float32, "2,000 tensors of 64 elements")
SCALARS = Workload("150 scalars fp32", ((1,),) * 150, torch.float32, "150 tensors of one element")
KIBI = Workload("1,000 x 1,024 fp32", ((1024,),) * 1000, torch.float32, "1,000 tensors of 1,024 elements")
KIBI_MANY = Workload("10,000 x 1,024 fp32", ((1024,),) * 10_000, torch.float32, "10,000 tensors of 1,024 elements")
FLAT = Workload("100M fp32", ((100_000_000,),), torch.float32, "one tensor of 100M elements")
FLAT_BF16 = in_dtype(FLAT, torch.bfloat16)
GIBI = Workload("1 GiB fp32", ((1 << 28,),), torch.float32, "one tensor of 2^28 elements")
GIBI_BF16 = replace(in_dtype(GIBI, torch.bfloat16), shapes=((1 << 29,),), description="one tensor of 2^29 elements")
FLAT_CONSTANT = Workload("100M x 0.1 fp32", FLAT.shapes, torch.float32, "one tensor of 100M times 0.1", "constant")
EMBEDDING = Workload("embedding fp32", ((50257, 768),), torch.float32, "dense gradient of an embedding")
EMBEDDING_BF16 = in_dtype(EMBEDDING, torch.bfloat16)
ROWS = Workload("embedding rows fp32", EMBEDDING.shapes, torch.float32, "the same, 99% of its rows zero", "rows")
ROWS_BF16 = in_dtype(ROWS, torch.bfloat16)

WORKLOADS: tuple[Workload, ...] = (
    *(GPT2, GPT2_BF16, GPT2_FP16, RESNET50, LSTM, SMALL, SCALARS),
    *(FLAT, FLAT_BF16, FLAT_CONSTANT, EMBEDDING, EMBEDDING_BF16, ROWS, ROWS_BF16),
)


def parameters(workload: Workload, seed: int = 0, device: str = "cpu") -> list[nn.Parameter]:
    """Parameters with their ``.grad`` set; the same seed gives the same gradients on the same type of device.

    The parameters' own values are uninitialised, so that they take no memory; see ``filled``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = []
    for shape in workload.shapes:
        parameter = nn.Parameter(torch.empty(shape, dtype=workload.dtype, device=device))
        parameter.grad = _gradient(workload, shape, generator)
        made.append(parameter)
    return made


def filled(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same, for work that reads them: as large as their gradients, whose deviation is that of GPT-2's weights."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    return parameters


def _gradient(workload: Workload, shape: Shape, generator: torch.Generator) -> Tensor:
    device = generator.device
    if workload.fill == "constant":
        return torch.full(shape, CONSTANT, dtype=workload.dtype, device=device)
    if workload.fill == "normal":
        return _normal(workload, shape, generator)
    if workload.fill == "rows":
        gradient = torch.zeros(shape, dtype=workload.dtype, device=device)
        filled = max(1, round(FILLED_ROWS * shape[0]))
        rows = torch.randperm(shape[0], generator=generator, device=device)[:filled]
        gradient[rows] = _normal(workload, (filled, *shape[1:]), generator)
        return gradient
    raise ValueError(f"workload {workload.name}: unknown fill {workload.fill!r}")


def _normal(workload: Workload, shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(STD).to(workload.dtype)
