# SPDX-License-Identifier: LGPL-2.1-or-later
"""From an image to a running tree: plan, create, fill, rebuild, start; or nothing at all."""
