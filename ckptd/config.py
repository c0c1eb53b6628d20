# SPDX-License-Identifier: LGPL-2.1-or-later
"""Configuration in the manner of systemd's programs (systemd-system.conf(5)): ckptd.conf and drop-ins.

    [Manager]
    Spool=/var/spool/ckptd
    MaxJobs=4
    FreezeTimeoutSec=10s

Files are read in this order, and a later assignment wins: /etc/ckptd/ckptd.conf, then every ckptd.conf.d/*.conf of
/usr/lib/ckptd, /run/ckptd and /etc/ckptd, sorted by file name. A file in /etc hides one of the same name in /run, and
that one hides one in /usr/lib. A user's daemon reads $XDG_CONFIG_HOME/ckptd.

An empty assignment restores the default. An unknown section, key or value is logged as a warning. The daemon starts all
the same, because a newer configuration must not stop an older daemon.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckptd.external import parse_list

log = logging.getLogger(__name__)

SECTION = 'Manager'
INFINITY = (1 << 64) - 1
VENDOR = Path('/usr/lib/ckptd')
RUN = Path('/run/ckptd')
ETC = Path('/etc/ckptd')


class Percent(int):
    """A size as a share of the file system that holds the spool."""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the daemon. Times are in microseconds. INFINITY: no limit. Root is bound by max_jobs only."""
    spool: Path | None = None    # None: the default of the bus that the daemon is on
    max_jobs: int = 4            # workers at once
    max_jobs_per_user: int = 16
    max_queued_jobs: int = 256
    max_images_per_user: int = 1000
    max_images: int = 20_000
    max_bytes_per_user: int = Percent(75)
    max_bytes: int = Percent(90)
    keep_free: int = Percent(5)
    freeze_timeout_usec: int = 10_000_000
    keep_jobs_usec: int = 30_000_000        # how long the object of a finished job stays
    inhibit_delay_usec: int = 5_000_000     # how long programs may delay the checkpoint of their tree
    idle_exit_usec: int = 120_000_000       # time without anything to do, after which a bus-activated daemon exits
    external: tuple[str, ...] = ()          # policies for connections to the outside, see ckptd.external
    stream_stall_usec: int = 300_000_000    # time after which an export that is not read, or an import that is not
                                            # written, fails


class Assignment(NamedTuple):
    section: str
    key: str
    value: str
    where: str      # file:line


def parse_span(text: str) -> int:
    """Parse a time span as systemd.time(7) writes it, '1min 30s' or '90', into microseconds. ValueError."""
    if text.strip() == 'infinity':
        return INFINITY
    if not re.fullmatch(r'(\s*\d+(\.\d+)?\s*[a-z]*)+\s*', text):
        raise ValueError(f'{text!r} is not a time span')
    parts = re.findall(r'(\d+(?:\.\d+)?)\s*([a-z]*)', text)
    if any(unit not in SPANS for _, unit in parts):
        raise ValueError(f'{text!r} has an unknown unit of time')
    return sum(round(float(number) * SPANS[unit]) for number, unit in parts)


SPANS = {'us': 1, 'usec': 1, 'ms': 1_000, 'msec': 1_000, '': 1_000_000, 's': 1_000_000, 'sec': 1_000_000,
         'second': 1_000_000, 'seconds': 1_000_000, 'm': 60_000_000, 'min': 60_000_000, 'minute': 60_000_000,
         'minutes': 60_000_000, 'h': 3_600_000_000, 'hr': 3_600_000_000, 'hour': 3_600_000_000,
         'hours': 3_600_000_000}


def parse_size(text: str) -> int:
    """Parse bytes, with K, M, G or T of 1024, or a share of the spool's file system such as '80%'. ValueError."""
    if share := re.fullmatch(r'(\d{1,2}|100)%', text):
        return Percent(share[1])
    found = re.fullmatch(r'(\d+)\s*([KMGT]?)', text)
    if text == 'infinity':
        return INFINITY
    if found is None:
        raise ValueError(f'{text!r} is not a size')
    return int(found[1]) << {'': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}[found[2]]


def parse_count(text: str) -> int:
    """Parse a number above 0. ValueError."""
    if text == 'infinity':
        return INFINITY
    if not re.fullmatch(r'[0-9]{1,9}', text) or int(text) == 0:
        raise ValueError(f'{text!r} is not a number above 0')
    return int(text)


def parse_directory(text: str) -> Path:
    """Parse an absolute path. ValueError."""
    path = Path(text)
    if not path.is_absolute() or '..' in path.parts:
        raise ValueError(f'{text!r} is not an absolute path')
    return path


KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    'Spool': ('spool', parse_directory),
    'MaxJobs': ('max_jobs', parse_count),
    'MaxJobsPerUser': ('max_jobs_per_user', parse_count),
    'MaxQueuedJobs': ('max_queued_jobs', parse_count),
    'MaxImages': ('max_images', parse_count),
    'MaxBytes': ('max_bytes', parse_size),
    'MaxImagesPerUser': ('max_images_per_user', parse_count),
    'MaxBytesPerUser': ('max_bytes_per_user', parse_size),
    'KeepFree': ('keep_free', parse_size),
    'FreezeTimeoutSec': ('freeze_timeout_usec', parse_span),
    'KeepJobsSec': ('keep_jobs_usec', parse_span),
    'InhibitDelayMaxSec': ('inhibit_delay_usec', parse_span),
    'IdleExitSec': ('idle_exit_usec', parse_span),
    'External': ('external', parse_list),
    'StreamStallSec': ('stream_stall_usec', parse_span),
}


def parse_config(text: str, name: str) -> Iterator[Assignment]:
    """Yield the assignments of one file in order. Log a warning for any other line."""
    section, begun, start = '', '', 0
    for number, line in enumerate(text.splitlines(), 1):
        # comments are allowed between continued lines, too (systemd.syntax(7))
        if line.lstrip().startswith(('#', ';')):
            continue
        start = start if begun else number
        begun += line.removesuffix('\\') + ' ' if line.endswith('\\') else line
        if line.endswith('\\'):
            continue
        whole, begun = begun.strip(), ''
        key, equals, value = whole.partition('=')
        if whole.startswith('[') and whole.endswith(']'):
            section = whole[1:-1]
        elif equals:
            yield Assignment(section, key.strip(), value.strip(), f'{name}:{start}')
        elif whole:
            log.warning('%s:%d: not an assignment: %s', name, start, whole)


def apply(config: Config, assignment: Assignment) -> Config:
    """Return the configuration with one more assignment. A bad assignment is logged as a warning and changes
    nothing."""
    section, key, value, where = assignment
    if section != SECTION or key not in KEYS:
        known = ', '.join(KEYS)
        log.warning('%s: unknown %s, ignored; [%s] knows %s', where,
                    f'section [{section}]' if section != SECTION else f'key {key}=', SECTION, known)
        return config
    field, parse = KEYS[key]
    try:
        parsed = parse(value) if value else getattr(Config(), field)
    except ValueError as error:
        log.warning('%s: %s=: %s, ignored', where, key, error)
        return config
    return dataclasses.replace(config, **{field: parsed})


def find_files(main: Path, drop_ins: Iterable[Path]) -> list[Path]:
    """Return the main file, then the drop-ins sorted by name. Among drop-ins of one name the last directory's wins."""
    by_name = {path.name: path for directory in drop_ins for path in sorted(directory.glob('*.conf'))}
    return [main, *(by_name[name] for name in sorted(by_name))]


def read_config(main: Path, drop_ins: Iterable[Path]) -> Config:
    """Read the configuration files. A missing file is skipped; a file that cannot be read is logged as a warning."""
    config = Config()
    for path in find_files(main, drop_ins):
        try:
            text = path.read_text(encoding='utf-8')
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            log.warning('%s cannot be read: %s', path, error)
            continue
        for assignment in parse_config(text, str(path)):
            config = apply(config, assignment)
    return config


def load(file: Path | None, system: bool) -> Config:
    """Load the configuration of a daemon: from `file` and FILE.d if given, else that of the system or the user."""
    if file is not None:
        return read_config(file, [Path(f'{file}.d')])
    if system:
        return read_config(ETC / 'ckptd.conf', [base / 'ckptd.conf.d' for base in (VENDOR, RUN, ETC)])
    home = Path(os.environ.get('XDG_CONFIG_HOME') or Path.home() / '.config') / 'ckptd'
    return read_config(home / 'ckptd.conf', [home / 'ckptd.conf.d'])
