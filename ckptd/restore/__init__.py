# SPDX-License-Identifier: LGPL-2.1-or-later
"""The restart: from an image to a running tree: plan, create, fill, rebuild, start. A failure leaves nothing."""
