# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl list, show, verify and remove."""

import os
import pwd

from ckptd.cli.output import Column, Output
from ckptd.cli.quantities import format_bytes, format_count, format_time, format_timespan
from ckptd.cli.session import LONG, Session
from ckptd.client.records import snake
from ckptd.errors import CkptError, ImageDamaged

COLUMNS = (Column('IMAGE', style='bold'), Column('COMMAND'), Column('TARGET', fold=True), Column('TASKS', right=True),
           Column('SIZE', right=True), Column('OWNER'), Column('CREATED'))
PAGE = os.sysconf('SC_PAGE_SIZE')
TIMES = ('freezing_time', 'frozen_time', 'memdump_time', 'memwrite_time', 'total_time')
PAGES = ('pages_scanned', 'pages_written')


async def list_images(session: Session) -> int:
    """List the images that the caller may see, oldest first."""
    async with session.daemon() as daemon:
        rows = await daemon.manager('ListImages')
    rows = sorted(rows, key=lambda row: (row.get('created', 0), row['image']))
    if session.out.json:
        session.out.document(rows)
        return 0
    cells = [[row['image'], row['command'], row['target'], str(row['tasks']), format_bytes(row['size']),
              user_name(row['owner']), format_time(row['created'])] for row in rows]
    session.out.table(COLUMNS, cells, empty='No images.', what='images')
    return 0


async def show(session: Session) -> int:
    """Show all properties of an image."""
    async with session.daemon() as daemon:
        image = await daemon.image_properties(session.args.image)
    if session.out.json:
        session.out.document({snake(key): value for key, value in image.items()})
        return 0
    statistics = image.get('Statistics', {})
    rows = [('Image', image['Id']), ('Command', image['Command']), ('Target', image['Target']),
            ('Created', format_time(image['Created'])), ('Owner', user_name(image['Owner'])),
            ('Tasks', f'{image["Tasks"]} in {format_count(image["Processes"], "process")}'),
            ('Size', format_bytes(image['Size'])),
            ('Kernel', f'{image["Kernel"]} ({image["Architecture"]})'), ('Boot', image['BootId'])]
    rows += [(_title(key), format_timespan(statistics[key])) for key in TIMES if key in statistics]
    rows += [(_title(key), f'{statistics[key]} ({format_bytes(statistics[key] * PAGE)})') for key in PAGES
             if key in statistics]
    fields(session.out, rows)
    return 0


async def verify(session: Session) -> int:
    """Check each image and list every damage."""
    found: dict[str, list[str]] = {}
    async with session.daemon() as daemon:
        for image in session.args.images:
            found[image] = await daemon.manager('VerifyImage', 's', image, seconds=LONG)
            _report_damages(session.out, image, found[image])
    if session.out.json:
        session.out.document([{'image': image, 'intact': not damages, 'damages': damages}
                              for image, damages in found.items()])
    return ImageDamaged.exit_status if any(found.values()) else 0


async def remove(session: Session) -> int:
    """Remove each image. The first failure is reported after all were tried."""
    failures: list[CkptError] = []
    removed = []
    async with session.daemon() as daemon:
        for image in session.args.images:
            try:
                await daemon.manager('RemoveImage', 's', image, seconds=LONG)
                removed.append(image)
                session.out.line(f'{image} removed')
            except CkptError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    if session.out.json:
        session.out.document({'removed': removed})
    return 0


def fields(out: Output, rows: list[tuple[str, str]]) -> None:
    """Print one value per line, with right-aligned names as in systemctl status."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        out.line(f'{name:>{width}}: {value}')


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def _report_damages(out: Output, image: str, damages: list[str]) -> None:
    if not damages:
        out.line(f'{image}: intact', 'green')
        return
    out.line(f'{image}: damaged', 'bold red')
    for damage in damages:
        out.line(f'  {damage}')


def _title(key: str) -> str:
    return key.replace('_', ' ').capitalize()
