"""What does not fit is refused with what would hold it."""

from types import SimpleNamespace

import pytest

from pyggml_repkv.engine.checks import check_fits
from pyggml_repkv.errors import ContextFullError


@pytest.mark.parametrize(
    ("bounded", "n_ctx", "remedy"),
    [
        (False, 255, "a larger -c holds more"),
        (False, 256, "a larger -c holds more, or --kv repkv"),
        (False, 300, "a larger -c holds more, or --kv repkv"),
        (True, 300, "a larger -c holds more"),
    ],
)
def test_a_context_that_is_full_says_what_holds_more(bounded, n_ctx, remedy):
    policy = SimpleNamespace(bounded=bounded, n_ctx=n_ctx)
    check_fits(policy, 5, n_ctx - 5, 256)
    with pytest.raises(ContextFullError) as error:
        check_fits(policy, 6, n_ctx - 5, 256)
    assert str(error.value) == f"6 tokens do not fit: {n_ctx - 5} of {n_ctx} are used; {remedy}"
