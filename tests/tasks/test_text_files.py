"""Text files, plain or compressed: their lines, and each way they can be unreadable, with file and line."""

import gzip
import re

import pytest

from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.tasks.text_files import find_file, fingerprint_files, read_lines, root_folder

TEXT = "Ein Hund läuft.\r\nZwei\u2028Katzen\u0085schlafen.\n\nOhne Ende"


@pytest.fixture(params=["", ".gz"])
def write(request, tmp_path):
    """Writes a file of this kind."""

    def write(content: bytes):
        path = tmp_path / f"text{request.param}"
        path.write_bytes(gzip.compress(content) if request.param else content)
        return path

    return write


def test_lines_end_where_bytes_say_so(write):
    assert list(read_lines(write(TEXT.encode()))) == [f"{line}\n" for line in TEXT.split("\n")[:-1]] + ["Ohne Ende"]
    assert list(read_lines(write(b""))) == []


def test_a_mark_of_byte_order_is_left_out_at_the_beginning_alone(write):
    marked = "\ufefferste\n\ufeffzweite\n"
    assert list(read_lines(write(marked.encode()))) == ["erste\n", "\ufeffzweite\n"]


def refused(path) -> str:
    with pytest.raises(UserError) as mistake:
        list(read_lines(path))
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one\nt\xffo\n", "line 2: not UTF-8 (byte 2 is 0xff)"),
        ("\ufeffé".encode()[:-1] + b"\n", "line 1: not UTF-8 (byte 4 is 0xc3)"),
        ("Wort".encode("utf-16"), "line 1: not UTF-8 (byte 1 is 0xff)"),
    ],
)
def test_what_is_not_utf_8_is_told_with_line_and_byte(write, content, said):
    path = write(content)
    assert refused(path) == f"{path}, {said}"


LONG = "".join(f"line {number} of many\n" for number in range(50_000)).encode()
DAMAGED = {
    "foreign": b"no gzip at all",
    "cut": gzip.compress(b"one\ntwo\n")[:-6],
    "cut in the middle": gzip.compress(LONG)[:60_000],
    "changed": gzip.compress(LONG)[:2000] + b"\xff" * 50 + gzip.compress(LONG)[2050:],
    "rubbish after it": gzip.compress(b"one\n") + b"more",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_named(content, tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(content)
    assert re.fullmatch(re.escape(str(path)) + r" is damaged, or no gzip file \(.+\)", refused(path))


def test_a_file_that_cannot_be_opened_is_named_with_the_reason(tmp_path):
    assert refused(tmp_path / "text") == f"{tmp_path / 'text'} cannot be read (No such file or directory)"
    (tmp_path / "folder.gz").mkdir()
    assert "folder.gz cannot be read (Is a directory)" in refused(tmp_path / "folder.gz")


def test_the_plain_file_goes_before_the_compressed_one(tmp_path):
    assert find_file(tmp_path, "text") is None
    for name in ("text.gz", "text"):
        (tmp_path / name).touch()
        assert find_file(tmp_path, "text") == tmp_path / name


def test_a_root_is_given_and_there(tmp_path, monkeypatch):
    config = DatasetConfig(name="parallel")
    with pytest.raises(UserError, match=r"^dataset\.root is not given; dataset=parallel expects ROOT/a or b$"):
        root_folder(config, "ROOT/a or b")
    config.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^dataset\.root=.*nowhere: there is no such folder; expected ROOT/a or b$"):
        root_folder(config, "ROOT/a or b")
    monkeypatch.setenv("HOME", str(tmp_path))
    config.root = "~"
    assert root_folder(config, "") == tmp_path


def test_the_fingerprint_follows_names_and_sizes_and_not_the_place(tmp_path):
    def found(folder, name, content):
        root = tmp_path / folder
        root.mkdir()
        (root / name).write_bytes(content)
        fingerprint = fingerprint_files(DatasetConfig(root=str(root)), [root / name])
        assert fingerprint["root"] == str(root)
        return fingerprint["names_and_sizes"]

    first = found("one", "text", b"12")
    assert found("two", "text", b"34") == first
    assert first not in (found("three", "text", b"123"), found("four", "text.gz", b"12"))
