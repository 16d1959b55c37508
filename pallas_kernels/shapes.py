"""The named shapes that tests, lowering checks and benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step's sizes: a model's (per layer), and how many rows against how many cached tokens."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    batch: int  # rows of one step: sequences x schedules
    context: int  # cached tokens a row
    page_size: int  # cached tokens a page

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.name}-{self.batch}x{self.context}-p{self.page_size}"


# name: hidden, ffn, heads, kv_heads, head_size; and the size of its pages, for generation
_MODELS = {
    "smollm2-135m": ((576, 1536, 9, 3, 64), 8),
    "llama-3.2-1b": ((2048, 8192, 32, 8, 64), 16),
    "llama-3.2-3b": ((3072, 8192, 24, 8, 128), 16),
    "llama-3.1-8b": ((4096, 14336, 32, 8, 128), 16),
}
# (batch, context): what fits one device, from generation for one user to a batch of training schedules.
_LOADS = (
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (8, 1024),
    (8, 32768),
    (8, 131072),
    (128, 1024),
    (128, 8192),
)
# The paper trains every model with pages of 8.  These loads are its prefix length, and the most that such a
# batch may hold.
_TRAINING_PAGE, _TRAINING_LOADS = 8, ((8, 1024), (128, 8192))

SHAPES: tuple[Shape, ...] = tuple(
    Shape(name, *sizes, *load, size)
    for name, (sizes, page_size) in _MODELS.items()
    for size in sorted({page_size, _TRAINING_PAGE}, reverse=True)
    for load in (_LOADS if size == page_size else _TRAINING_LOADS)
)


def named(name: str) -> Shape:
    """Returns the one of SHAPES of that name."""
    return next(shape for shape in SHAPES if str(shape) == name)


def distinct(*fields: str) -> tuple[Shape, ...]:
    """Returns the first of SHAPES for each combination of `fields`, for an op that depends on those alone."""
    first: dict[tuple[int | str, ...], Shape] = {}
    for shape in SHAPES:
        first.setdefault(tuple(getattr(shape, field) for field in fields), shape)
    return tuple(first.values())
