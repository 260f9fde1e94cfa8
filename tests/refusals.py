"""What every error for the user must be, checked in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crossx.errors import CrossXError


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the message with which a call is refused, after checking that it is one line that ends as a sentence."""
    with pytest.raises(CrossXError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message
