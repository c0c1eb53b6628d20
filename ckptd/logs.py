# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log messages go: standard error, in the journal's way when that is what reads it.

CKPTD_DEBUG=ckptd.worker,ckptd.bus shows debug messages of these modules (and what is below them); CKPTD_DEBUG=ckptd of
all.
"""

import logging
import os
import sys

# sd-daemon(3): a line that begins with <N> has syslog priority N
PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalFormatter(logging.Formatter):
    """'<4>ckptd.bus: text': the journal has the time already. Every line of a traceback has the priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f'<{PRIORITY.get(record.levelno, 6)}>'
        return '\n'.join(prefix + line for line in super().format(record).splitlines())


def is_journal(fd: int) -> bool:
    """Whether what is written to fd goes to the journal: systemd names its device and inode, systemd.exec(5)."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{stat.st_dev}:{stat.st_ino}'


def setup(verbose: bool) -> None:
    """Warnings and worse, and who was allowed what; with `verbose` what happens, too."""
    handler = logging.StreamHandler(sys.stderr)
    text = '%(name)s: %(message)s'
    handler.setFormatter(JournalFormatter(text) if is_journal(2) else logging.Formatter(f'%(asctime)s {text}'))
    top = logging.getLogger('ckptd')
    top.handlers[:] = [handler]
    top.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger('ckptd.audit').setLevel(logging.INFO)
    for name in filter(None, os.environ.get('CKPTD_DEBUG', '').split(',')):
        logging.getLogger(name.strip()).setLevel(logging.DEBUG)
