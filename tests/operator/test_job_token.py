import re
from pathlib import Path

import pytest

from grpo_operator.token import TokenKeyError, job_token, read_key


def test_a_token_follows_from_key_and_uid_alone():
    assert job_token(b"k" * 32, "uid") == job_token(b"k" * 32, "uid")
    assert len({job_token(b"k" * 32, "uid"), job_token(b"k" * 32, "other"), job_token(b"l" * 32, "uid")}) == 3
    assert re.fullmatch(r"[a-z2-7]{52}", job_token(b"k" * 32, "uid"))


def test_a_key_file_that_is_missing_or_short_is_said(tmp_path: Path):
    with pytest.raises(TokenKeyError, match="No such file"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"short\n")
    with pytest.raises(TokenKeyError, match="5 bytes; at least 16"):
        read_key(tmp_path / "key")
