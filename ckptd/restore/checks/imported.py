# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check images that were imported. Their rights, limits and priorities may be made up. A worker that is the importer
may have no more than the importer in any case, and no other worker restores them."""

from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.linked_names import linked_names


def check(context: CheckContext) -> Iterator[Finding]:
    caller, manifest = context.request.caller, context.reader.manifest
    if manifest.imported and (names := linked_names(context.reader)):
        yield about(0, 'image', 'ENOENT', f'the image was imported, and needs a deleted file that its checkpoint has '
                    f'named {min(names)}', 'restore the image that was exported, where it was made')
    if not manifest.imported or context.plan.namespaces.user:
        return
    # the importer could invent root's rights in it; with a broker, root restores it as the importer
    if caller.uid != manifest.owner_uid and not context.request.brokered:
        yield about(0, 'image', 'EPERM', f'the image was imported by uid {manifest.owner_uid}, who alone may '
                    'restore it', 'restore it as that user, or import it yourself')
