"""The sizes of the windows in which a long text is read."""

from __future__ import annotations

from topkapi.model.errors import InvalidRequest


def window_sizes(context_length: int | None, window: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens read at a time and tokens between windows, by default the context length and half a window.

    Raises `InvalidRequest` for sizes that cannot work; where the context is not known yet (None), for those that
    could not in any.
    """
    size = context_length if window is None else window
    if size is not None and not 2 <= size <= (context_length or size):
        up_to = "" if context_length is None else f" and at most the context length {context_length}"
        raise InvalidRequest(f"window must be at least 2{up_to}, not {size}", field="window")
    step = max(1, (size or 2) // 2) if stride is None else stride
    if step < 1 or (size is not None and step >= size):
        below = "" if size is None else f" and below the window of {size}"
        raise InvalidRequest(f"stride must be at least 1{below}, not {step}", field="stride")
    return size or 2, step
