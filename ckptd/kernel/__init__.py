# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Linux offers, in Python types: kernel names, no policy, no logging, no asyncio."""
