# SPDX-License-Identifier: LGPL-2.1-or-later
"""Set up logging to standard error, with priorities if the journal reads it.

CKPTD_DEBUG=ckptd.worker,ckptd.bus shows debug messages of these modules and their submodules. CKPTD_DEBUG=ckptd shows
all of them.
"""

import logging
import os
import sys

# A line that begins with <N> has syslog priority N (sd-daemon(3)).
PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalFormatter(logging.Formatter):
    """Format as '<4>ckptd.bus: text'. The journal adds the time itself. Every line of a traceback gets the priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f'<{PRIORITY.get(record.levelno, 6)}>'
        return '\n'.join(prefix + line for line in super().format(record).splitlines())


def is_journal(fd: int) -> bool:
    """Whether fd leads to the journal. systemd sets JOURNAL_STREAM to its device and inode (systemd.exec(5))."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{stat.st_dev}:{stat.st_ino}'


def setup(verbose: bool) -> None:
    """Log warnings, errors and authorization decisions; with `verbose`, informational messages too."""
    handler = logging.StreamHandler(sys.stderr)
    text = '%(name)s: %(message)s'
    handler.setFormatter(JournalFormatter(text) if is_journal(2) else logging.Formatter(f'%(asctime)s {text}'))
    top = logging.getLogger('ckptd')
    top.handlers[:] = [handler]
    top.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger('ckptd.audit').setLevel(logging.INFO)
    for name in filter(None, os.environ.get('CKPTD_DEBUG', '').split(',')):
        logging.getLogger(name.strip()).setLevel(logging.DEBUG)
