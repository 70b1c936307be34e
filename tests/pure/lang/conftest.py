"""A default backend for each test, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import trunkline as sgl
from tests.pure.lang.fake import FakeBackend


@pytest.fixture
def fake() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    sgl.set_default_backend(backend)
    yield backend
    sgl.set_default_backend(None)
