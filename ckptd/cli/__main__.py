# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run ckptctl by python -m ckptd.cli."""

import sys

from ckptd.cli.main import main

sys.exit(main())
