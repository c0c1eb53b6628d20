# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd.conf and its drop-ins."""

import logging
import re
from pathlib import Path

import pytest

from ckptd import config
from ckptd.config import INFINITY, Config, Percent, parse_config, parse_size, parse_span, read_config


@pytest.mark.parametrize(('text', 'usec'), [
    ('10', 10_000_000), ('10s', 10_000_000), ('500ms', 500_000), ('1min 30s', 90_000_000), ('1.5 h', 5_400_000_000),
    ('20us', 20), ('infinity', INFINITY), ('1min30', 90_000_000),
])
def test_time_spans(text: str, usec: int) -> None:
    assert parse_span(text) == usec


@pytest.mark.parametrize('text', ['', 'soon', '10 parsecs', '-1', 's', '1,5s'])
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(ValueError):
        parse_span(text)


def test_sizes() -> None:
    assert [parse_size(text) for text in ('7', '4K', '2G', 'infinity')] == [7, 4096, 2 << 30, INFINITY]
    assert isinstance(parse_size('80%'), Percent)
    assert (parse_size('80%'), parse_size('100%')) == (80, 100)
    for bad in ('', '4k', 'G', '-1', '1.5G'):
        with pytest.raises(ValueError):
            parse_size(bad)


def test_syntax() -> None:
    text = """# comment
; comment
[Manager]
MaxJobs = 2
Spool=/a\\
# between continued lines
  /b
[Other]
x=y=z
"""
    assert [tuple(one) for one in parse_config(text, 'f')] == [
        ('Manager', 'MaxJobs', '2', 'f:4'), ('Manager', 'Spool', '/a   /b', 'f:5'), ('Other', 'x', 'y=z', 'f:9')]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def test_drop_ins_by_name_and_by_rank(tmp_path: Path) -> None:
    main = write(tmp_path / 'etc/ckptd.conf', '[Manager]\nMaxJobs=1\nSpool=/one\n')
    vendor, local = tmp_path / 'usr/ckptd.conf.d', tmp_path / 'etc/ckptd.conf.d'
    write(vendor / '10-a.conf', '[Manager]\nMaxJobs=2\n')
    write(vendor / '50-hidden.conf', '[Manager]\nMaxJobs=9\n')
    write(local / '50-hidden.conf', '[Manager]\nMaxJobsPerUser=3\n')
    write(local / '60-b.conf', '[Manager]\nSpool=\nFreezeTimeoutSec=2s\n')
    write(local / 'readme.txt', '[Manager]\nMaxJobs=8\n')
    assert read_config(main, [vendor, local]) == Config(max_jobs=2, max_jobs_per_user=3, freeze_timeout_usec=2_000_000)


def test_nothing_there_is_the_default(tmp_path: Path) -> None:
    assert read_config(tmp_path / 'no.conf', [tmp_path / 'no.conf.d']) == Config()


@pytest.mark.parametrize(('line', 'warning'), [
    ('Spol=/x', 'unknown key Spol='), ('MaxJobs=many', "'many' is not a number"), ('Spool=x', 'not an absolute path'),
    ('nonsense', 'not an assignment'), ('[Managre]\nMaxJobs=1', r'unknown section \[Managre\]'),
])
def test_what_is_not_understood_is_a_warning_with_its_place(
        tmp_path: Path, line: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / 'ckptd.conf', f'[Manager]\n{line}\n')
    with caplog.at_level(logging.WARNING, 'ckptd.config'):
        assert read_config(path, []) == Config()
    [record] = caplog.records
    assert f'{path}:' in record.getMessage()
    assert re.search(warning, record.getMessage())


def test_a_file_of_ones_own_has_its_own_drop_ins(tmp_path: Path) -> None:
    path = write(tmp_path / 'mine.conf', '[Manager]\nMaxJobs=2\n')
    write(tmp_path / 'mine.conf.d/x.conf', '[Manager]\nMaxJobs=3\n')
    assert config.load(path, system=True).max_jobs == 3


def test_a_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    write(tmp_path / 'ckptd/ckptd.conf', '[Manager]\nMaxJobs=7\n')
    assert config.load(None, system=False).max_jobs == 7
