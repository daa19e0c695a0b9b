from __future__ import annotations

import gzip

import pytest

from spolia.data.texts import PACKED, file_texts, packed_files, packed_texts, python_texts
from spolia.errors import SpoliaError


def test_the_parts_of_pythons_prose_share_no_paragraph():
    texts = python_texts(1)
    whole = ["".join(part) for part in (texts.train, texts.design, texts.test)]
    parts = [{paragraph for paragraph in text.split("\n\n") if paragraph.strip()} for text in whole]
    assert all(len(part) > 5 for part in parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_lines_of_files_are_parted_in_order(tmp_path):
    lines = [f"line {i}" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"eins\n zwei \n"))
    alone = file_texts([tmp_path / "a.txt"])
    assert alone.train + alone.design + alone.test == lines
    assert (len(alone.train), len(alone.design), len(alone.test)) == (81, 9, 10)
    assert file_texts([tmp_path / "a.txt"], [tmp_path / "b.gz"]).test == ["eins", "zwei"]


def test_packed_texts_leave_headings_out(tmp_path):
    for file in PACKED["wikitext2"]:
        (tmp_path / file).write_bytes(gzip.compress("".join(f" = H =\n\n word {i} .\n" for i in range(20)).encode()))
    texts = packed_texts("wikitext2", tmp_path)
    assert texts.train + texts.design == texts.test == [f"word {i} ." for i in range(20)]
    with pytest.raises(SpoliaError, match=r"there is no sent_europarl_en_train\.txt\.gz"):
        packed_files("europarl", tmp_path)
    with pytest.raises(SpoliaError, match="did you mean `europarl`"):
        packed_texts("europarle", tmp_path)


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", None])
def test_what_is_no_text_is_told(tmp_path, raw):
    file = tmp_path / "x.txt"
    if raw is not None:
        file.write_bytes(raw)
    with pytest.raises(SpoliaError, match="cannot be read"):
        file_texts([file])


def test_too_little_text_is_told(tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    with pytest.raises(SpoliaError, match="2 lines to learn from and 0 to send"):
        file_texts([tmp_path / "x.txt"])
