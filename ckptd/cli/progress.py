# SPDX-License-Identifier: LGPL-2.1-or-later
"""The progress bar on a terminal's stderr: phase, share of the whole, bytes and time. It is removed when the job has
ended."""

from typing import TYPE_CHECKING, Any, Protocol

from ckptd.cli.output import Output
from ckptd.cli.quantities import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# descriptions of the phases of a job (ckptd.protocol.messages)
PHASES = {
    '': 'waiting', 'resolve': 'finding the tree', 'scan': 'scanning', 'freeze': 'freezing', 'rescan': 'scanning again',
    'seize': 'stopping threads', 'state': 'reading state', 'memory': 'copying memory', 'release': 'letting go',
    'write': 'writing', 'publish': 'publishing',
    'verify': 'verifying', 'plan': 'planning', 'open': 'opening files', 'create': 'making processes',
    'fill': 'filling memory', 'rebuild': 'rebuilding state', 'start': 'starting', 'attend': 'running',
}
# phases that move bytes
MOVING = ('memory', 'fill')
_BESIDE, _BAR = 4 + 35 + 7 + 5, range(5, 31)     # columns


class Follower(Protocol):
    """A receiver of a job's progress."""

    def update(self, phase: str, progress: float, bytes_done: int = 0, bytes_total: int = 0) -> None: ...
    def message(self, text: str) -> None: ...


class ProgressLines:
    """One line per signal, where a bar cannot be drawn and every step is worth seeing."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def __enter__(self) -> 'ProgressLines':
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there is no bar to remove."""

    def update(self, phase: str, progress: float, bytes_done: int = 0, bytes_total: int = 0) -> None:
        volume = _volume(phase, bytes_done, bytes_total)
        self._output.line(f'  {progress * 100:3.0f}%  {PHASES.get(phase, phase):<17} {volume}'.rstrip())

    def message(self, text: str) -> None:
        self._output.line(f'        {text}')


class ProgressBar:
    """A progress bar: `with ProgressBar(output) as bar: bar.update(...)`. It draws nothing with --json, or if stderr is
    not a terminal."""

    def __init__(self, output: Output, what: str, *, keep: bool = False) -> None:
        """Make the bar. keep: leave the finished bar on the screen."""
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._message = ''
        if not output.json and output.stderr.isatty():
            self._progress = _make(output, len(what), keep)
            self._task = self._progress.add_task(what, total=1.0, phase=PHASES[''], volume='')

    def __enter__(self) -> 'ProgressBar':
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal. A second call does nothing."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def update(self, phase: str, progress: float, bytes_done: int = 0, bytes_total: int = 0) -> None:
        """Show the values of a Progress signal. bytes_total 0: unknown."""
        if self._progress is None or self._task is None:
            return
        changed: dict[str, Any] = {'phase': self._message or PHASES.get(phase, phase),
                                   'volume': '' if self._message else _volume(phase, bytes_done, bytes_total)}
        self._progress.update(self._task, completed=min(max(progress, 0.0), 1.0), refresh=True, **changed)

    def message(self, text: str) -> None:
        """Show this text in place of the phase from now on."""
        self._message = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, phase=text, volume='', refresh=True)


def _volume(phase: str, done: int, total: int) -> str:
    """Return the bytes of a phase that moves them. In other phases the last count is out of date."""
    if phase in PHASES and phase not in MOVING:
        return ''
    return f'{format_bytes(done)} of {format_bytes(total)}' if total else format_bytes(done) if done else ''


def _make(output: Output, length: int, keep: bool) -> 'Progress':
    """Make a bar with a description of this length, which is shortened only if the bar would be too short."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column
    console = output.console(output.stderr)
    # what is left by percentage, phase with volume, time, and spaces
    room = max(console.width - _BESIDE, 20)
    bar = min(max(room - length, _BAR.start), _BAR.stop - 1)
    return Progress(
        TextColumn('{task.description}', style='bold',
                   table_column=Column(no_wrap=True, overflow='ellipsis', max_width=room - bar)),
        BarColumn(bar_width=bar),
        TextColumn('{task.percentage:>3.0f}%'), TextColumn('{task.fields[phase]}', style='cyan'),
        TextColumn('{task.fields[volume]}', style='dim'), TimeElapsedColumn(),
        console=console, transient=not keep)
