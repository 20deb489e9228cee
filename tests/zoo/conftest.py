"""Fixtures of the tests of published models."""

import pytest


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of `rn18_etf.x/1`; the cache is empty, waiting is short."""
    from downloads import DATA, make_version

    import server as http
    from etfzoo.zoo import download

    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ETFZOO_TIMEOUT", "0.4")
    monkeypatch.delenv("ETFZOO_OFFLINE", raising=False)
    monkeypatch.setattr(download, "WAITS", (0.01, 0.02))
    make_version(tmp_path / "site/rn18_etf.x/1")
    with http.serve(tmp_path / "site") as server:
        server.version = f"{server.url}/rn18_etf.x/1"
        server.data = f"/rn18_etf.x/1/{DATA}"
        server.folder = tmp_path / "site/rn18_etf.x/1"
        yield server
