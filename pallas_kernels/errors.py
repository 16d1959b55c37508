"""The error of a kernel that was named and cannot run, in a file of its own: catching it needs no JAX."""


class UnavailableError(ValueError):
    """A named implementation that cannot run here: one sentence with the op, the reason and what to use."""

    def __init__(self, op: str, implementation: str, cannot: str, reason: str, instead: str):
        super().__init__(f"{op}: {implementation!r} cannot {cannot} because {reason}; use {instead} instead")

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback; IPython asks for it by this name."""
        return [f"error: {self}"]
