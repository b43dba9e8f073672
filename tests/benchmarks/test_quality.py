"""The quality benchmark where there are no logs."""

import pytest

from benchmarks import quality


def test_without_the_logs_it_says_so_and_succeeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv(quality.DATA, raising=False)
    monkeypatch.setattr("sys.argv", ["quality", "criteo_80k", "globo", "gowalla"])
    quality.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count(quality.DATA) == 3
