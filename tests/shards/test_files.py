"""Addresses: what is missing for one is said with its remedy."""

import sys

import pytest
from fsspec.registry import _registry

from shards.errors import InputError
from shards.files import filesystem


def test_without_s3fs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # makes its import fail
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"^address 's3://bucket/x': .*pip install '\.\[s3\]'$"):
        filesystem("s3://bucket/x")


def test_an_unknown_scheme_is_refused_without_naming_an_extra() -> None:
    with pytest.raises(InputError, match=r"use a path, or a scheme that fsspec has a package for$"):
        filesystem("nosuch://bucket/x")
