"""The parity tests need torch and transformers (`make parity`)."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="rewrite tests/data/parity_*.npz")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--record")
