# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: the gate, the settled check, victims, private buses, the /proc oracle. Imports nothing of ckptd."""
