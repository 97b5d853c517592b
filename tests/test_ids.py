"""Every sample that can be in a memory can be named, and no name is taken for another."""

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.cli.asked import read_ids
from fastntk.cli.options import text_of
from fastntk.inputs.ids import ids_of


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        ((1, 2, 3, 4), "1,2", [1, 2]),
        ((1, 2, 3, 4), "1 2\n3,4", [1, 2, 3, 4]),
        (("3 4", 3, 4), "3 4", ["3 4"]),
        (("a,b", "a", "b"), "a,b", ["a,b"]),
        (("a,b", "a", "b"), "b,a", ["b", "a"]),
        (("[red]", "x y"), "[red]\nx y", ["[red]", "x y"]),
        ((" led", "led"), " led", [" led"]),
        (("zoe\u0301", "b"), "zo\u00e9", ["zoe\u0301"]),
        (("zo\u00e9", "b"), "zoe\u0301", ["zo\u00e9"]),
        (("a\u2028b", "c"), "a\u2028b\nc", ["a\u2028b", "c"]),
        ((1, 2), "5, x", [5, "x"]),
        ((1, 2), "02, \u0662", ["02", "\u0662"]),
    ],
)
def test_what_a_text_names(ids, text, expected):
    assert read_ids(text, ids) == expected


def test_a_subset_has_the_names_of_what_it_is_of():
    plain = TensorDataset(torch.zeros(5, 1))
    assert list(ids_of(Subset(plain, [3, 1]))) == [0, 1]
    plain.ids = list("abcde")
    assert list(ids_of(Subset(Subset(plain, [4, 3, 1]), [2, 0]))) == ["b", "e"]


@pytest.mark.parametrize("text", ["", " ", ",", "\n\n"])
def test_nothing_is_no_request(text):
    with pytest.raises(fastntk.InputError, match="names no sample"):
        read_ids(text, (1, 2))


@pytest.mark.parametrize("name", ["a,b.png", "\u00fcber 3 4.png", b"caf\xe9.png".decode(errors="surrogateescape")])
def test_a_file_has_an_id_on_each_line(name, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes(b"\xef\xbb\xbf" + name.encode(errors="surrogateescape") + b"\r\n7\r\n")
    assert read_ids(text_of(path), (name, 7, "a"), lines=True) == [name, 7]
