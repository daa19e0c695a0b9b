from __future__ import annotations

import pytest

from spolia.errors import SpoliaError
from spolia.runs.link_demo import demo

TEXT = "The return statement leaves the current function call with the expression list as return value."


@pytest.mark.slow
def test_a_sentence_is_read_by_every_receiver():
    clear, noisy, again = demo(TEXT, 12.0), demo(TEXT, 1.0), demo(TEXT, 1.0)
    assert [read.text for read in clear.reads] == [TEXT] * 5  # 12 dB: all codes are without error
    assert noisy == again and not noisy.reads[0].right
    by_name = {read.receiver: read for read in noisy.reads}
    assert len(by_name) == 5 and "dB Es/N0" in str(noisy) and "(nothing)" not in str(clear)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(SpoliaError, match="there is no text"):
        demo("  ")
