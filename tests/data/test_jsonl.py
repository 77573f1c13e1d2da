"""Lines of jsonl files."""

import pytest

from longqlora.data.jsonl import read_rows
from longqlora.data.row import text_of_row


def test_read_rows():
    lines = [b"\xef\xbb\xbf" + b'{"text": "a"}\r\n', b" \n", b'{"text": ""}']
    assert list(read_rows(lines, "x", flag="--x")) == [(1, {"text": "a"}), (3, {"text": ""})]
    assert list(read_rows(lines, "x", flag="--x", parse=text_of_row)) == [(1, "a"), (3, "")]
    with pytest.raises(ValueError, match='^--x: x line 8: no key "text"'):
        list(read_rows([b"\n", b"{}"], "x", flag="--x", parse=text_of_row, first=7))
