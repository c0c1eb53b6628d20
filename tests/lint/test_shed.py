# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rights are shed before anything through which memory of the user steers a task (restore/shed.py)."""

import ast
from pathlib import Path

RESTORE = Path(__file__).parents[2] / 'ckptd' / 'restore'
# calls after which memory or a signal of the user's can lead a task anywhere
STEERING = {'rseq', 'rt_sigaction', 'timer_create', 'timer_settime', 'setitimer', 'rt_sigqueueinfo',
            'rt_tgsigqueueinfo'}
# the module that works on tasks that have shed
AFTER = 'leave.py'
# the first stub takes default actions for what we ignore, before it has any memory of the image
BEFORE_ANY_MEMORY = {('bootstrap.py', 'start_bootstrap')}


def _functions(path: Path) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def _calls(node: ast.AST) -> list[str]:
    """Names of the remote system calls that a function puts into a batch or script."""
    return [call.args[0].value for call in ast.walk(node) if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute) and call.func.attr in ('call', 'call_now')
            and call.args and isinstance(call.args[0], ast.Constant)]


def test_no_steering_call_before_the_shed() -> None:
    steering = {name for name, node in _functions(RESTORE / 'attributes.py').items() if STEERING & set(_calls(node))}
    assert {'rseq', 'actions', 'interval_timers', 'queue'} <= steering
    steering |= {'posix_timers'}
    for path in RESTORE.rglob('*.py'):
        for name, node in _functions(path).items():
            used = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)
                    and isinstance(one.value, ast.Name) and one.value.id == 'attributes'}
            assert not used & steering or path.name == AFTER, f'{path.name}: {name} steers tasks before the shed'
            if path.name != 'attributes.py' and (path.name, name) not in BEFORE_ANY_MEMORY:
                assert not STEERING & set(_calls(node)), f'{path.name}: {name} makes a steering call'


def test_the_shed_comes_after_the_service_fds_and_before_what_acts_for_the_tree() -> None:
    body = _functions(RESTORE / 'run.py')['_rebuild']
    lines = {word: min(node.lineno for node in ast.walk(body)
                       if (isinstance(node, ast.Attribute) and node.attr == word)
                       or (isinstance(node, ast.Name) and node.id == word))
             for word in ('_process', '_close_service_fds', 'Shed', 'finish', '_become_zombies')}
    assert len(set(lines.values())) == len(lines)
    assert sorted(lines, key=lines.__getitem__) == ['_process', '_close_service_fds', 'Shed', 'finish',
                                                    '_become_zombies']
