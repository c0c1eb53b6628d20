# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write ckptd's interfaces as XML files for binding generators: `python -m ckptd.bus.interfaces dbus`."""

import sys
from pathlib import Path

from ckptd.bus.export import Exported
from ckptd.bus.image import ImageObject
from ckptd.bus.introspect import introspection_xml
from ckptd.bus.job import JobObject
from ckptd.bus.manager import ManagerObject

INTERFACES: tuple[type[Exported], ...] = (ManagerObject, JobObject, ImageObject)
HEADER = '<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->\n'


def documents() -> dict[str, str]:
    """Return the content by file name, such as 'org.ckptd1.Job.xml'."""
    return {f'{cls.interface}.xml': introspection_xml([cls.table]).replace('<node>', HEADER + '<node>', 1)
            for cls in INTERFACES}


if __name__ == '__main__':
    for name, content in documents().items():
        (Path(sys.argv[1]) / name).write_text(content)
