"""Addresses in stores: their parts, and what is shown of them."""

import pytest

from ldm_lab.utils.urls import URL, is_url, masked, without_secrets


@pytest.mark.parametrize(
    ("text", "shown", "identity"),
    [
        ("s3://b/photos/", "s3://b/photos/", "s3://b/photos"),
        ("s3://b/what?.png", "s3://b/what?.png", "s3://b/what?.png"),
        ("s3://key:secret@b/x", "s3://***@b/x", "s3://b/x"),
        ("https://me:pw@h.org/x.zip?X-Amz-Signature=abc", "https://***@h.org/x.zip?***", "https://h.org/x.zip"),
        ("file:///data/x", "file:///data/x", "file:///data/x"),
    ],
)
def test_what_is_shown_holds_no_secret(text, shown, identity):
    url = URL(text)
    assert (str(url), repr(url), url.identity) == (shown, shown, identity)
    assert f"{[url]}" == f"[{shown}]"


def test_a_name_comes_before_the_query():
    assert (URL("https://h/x/?s=1") / "a b.png").text == "https://h/x/a b.png?s=1"
    assert (URL("s3://b/x") / "a?.png").text == "s3://b/x/a?.png"
    assert URL("https://h/x/y.tar?s=1").name == "y.tar"


def test_secrets_within_other_texts():
    config = {
        "data": {"root": "https://a:b@h/x?s=1", "list": ["s3://b/x", 3]},
        "note": "see http://h/y?token=1 or not",
    }
    assert without_secrets(config) == {
        "data": {"root": "https://***@h/x?***", "list": ["s3://b/x", 3]},
        "note": "see http://h/y?*** or not",
    }
    assert masked("none here?") == "none here?"


def test_a_path_is_no_address():
    assert is_url("s3://b")
    assert not any(map(is_url, ("/a/b", "a:/b", "./x", "C:\\x", None, "~/x")))
